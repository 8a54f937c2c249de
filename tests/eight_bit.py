"""A transformer's tensors in the 8-bit forms that people have, and what each stands for."""

from __future__ import annotations

import json

import torch
from torch import Tensor

FLOAT8 = torch.float8_e4m3fn
FORMS = (
    "cast",
    "cast-e5m2",
    "scaled-old",
    "scaled-new",
    "scaled-header",
    "rows",
    "rows-int8",
    "int8",
    "blocks",
)
BLOCK = 16


def is_linear(name: str, value: Tensor) -> bool:
    """The layers that such files hold in 8 bits."""
    return value.ndim == 2 and name.startswith("blocks.") and name.endswith(".weight")


def in_eight_bits(
    tensors: dict[str, Tensor], form: str
) -> tuple[dict[str, Tensor], dict[str, str], dict[str, Tensor]]:
    """(tensors of a file, what it says of itself, what they stand for in float32)."""
    stored = {}
    plain = {}
    layers = {}
    for name, value in tensors.items():
        if not is_linear(name, value):
            stored[name] = value
            plain[name] = value
            continue
        base = name.removesuffix(".weight")
        kind = torch.int8 if form in ("rows-int8", "int8", "blocks") else FLOAT8
        kind = torch.float8_e5m2 if form == "cast-e5m2" else kind
        largest = 127.0 if kind == torch.int8 else 448.0
        scale = torch.ones(1)
        if form.startswith("rows"):
            scale = value.float().abs().amax(1, keepdim=True) / largest  # [N, 1]
        elif form == "blocks":
            rows, columns = (size // BLOCK for size in value.shape)
            tiles = value.float().reshape(rows, BLOCK, columns, BLOCK)
            scale = tiles.abs().amax((1, 3)) / largest  # [N / 16, K / 16]
        elif not form.startswith("cast"):
            scale = (value.float().abs().max() / largest).reshape(())
        whole = scale
        if form == "blocks":
            whole = scale[:, None, :, None].expand(-1, BLOCK, -1, BLOCK).reshape(value.shape)
        rounded = (value.float() / whole).clamp(-largest, largest)
        rounded = rounded.round().to(kind) if kind == torch.int8 else rounded.to(kind)
        stored[name] = rounded
        plain[name] = rounded.float() * whole
        if form == "scaled-old":
            stored |= {f"{base}.scale_weight": scale, f"{base}.scale_input": torch.ones(())}
        elif not form.startswith("cast"):
            stored[f"{base}.weight_scale"] = scale
        note = {"format": {"int8": "int8_tensorwise", "blocks": "int8_blockwise"}.get(form, "float8_e4m3fn")}
        if form == "blocks":
            note["group_size"] = BLOCK
        if form in ("scaled-new", "int8", "blocks"):
            stored[f"{base}.comfy_quant"] = torch.tensor(list(json.dumps(note).encode()), dtype=torch.uint8)
        elif form == "scaled-header":
            layers[base] = note
    if form == "scaled-old":
        stored["scaled_fp8"] = torch.zeros(2, dtype=FLOAT8)
    said = (
        {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})} if layers else {}
    )
    return stored, {"format": "pt", **said}, plain
