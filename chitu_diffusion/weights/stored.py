"""One tensor as it stands in a file; and of weights in 8 bits, which tensors belong together and what numbers
they stand for.

Knows the forms that Wan's files come in: fp8 as a plain cast, fp8 and int8 with one scale a tensor, a row or
a block, under the names that ComfyUI (old and new) and LightX2V give them. All others are refused by name.
Knows names, shapes and values; no files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from chitu_diffusion.errors import CheckpointError
from chitu_diffusion.files.reading import foreign_data, parse_json

FLOAT_TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
FLOAT8_TYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
STORED_TYPES = {
    **FLOAT_TYPES,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I8": torch.int8,
    "U8": torch.uint8,
    "I32": torch.int32,
    "I64": torch.int64,
    "BOOL": torch.bool,
}
WIDENED = torch.bfloat16
"""What weights in 8 bits are where nobody asks for another dtype."""
BESIDE = frozenset({"spiece_model", "scaled_fp8", "position_ids"})
"""Tensors that are no network's: a tokenizer as bytes, the mark of ComfyUI's older scaled files, and what
transformers once saved of positions."""
_SCALES = ("scale_weight", "weight_scale")
_UNUSED = ("scale_input", "input_scale")
"""Of activations, whose scales are found as they come by."""
_NOTE = "comfy_quant"
_HEADER_NOTE = "_quantization_metadata"
_FORMATS = MappingProxyType(
    {
        "float8_e4m3fn": torch.float8_e4m3fn,
        "float8_e5m2": torch.float8_e5m2,
        "int8_tensorwise": torch.int8,
        "int8_blockwise": torch.int8,
    }
)
_FOREIGN = MappingProxyType(
    {
        "weight_scale_2": "nvfp4, or another format with two scales",
        "pre_quant_scale": "a format that scales activations before rounding (pre_quant_scale)",
        "int8_weight": "TurboWan's blocks of int8",
    }
)
"""How names of tensors end by which formats are told that are not opened."""
_BLOCK = 128
_REMEDY = "use the model's fp8_scaled or 16-bit files"


@dataclass(frozen=True)
class Stored:
    """One tensor in a file: where, its shape and dtype, and its place in the file's order.

    `packing` is the type of a GGUF file's blocks, such as "Q4_K", and `packed_bytes` what they take; their
    values are read in float32.
    """

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype
    position: int
    packing: str | None = None
    packed_bytes: int = 0

    @property
    def bytes(self) -> int:
        """Size of its values."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()


@dataclass(frozen=True)
class EightBit:
    """A weight in 8 bits, or one with a scale.

    Attributes:
        stored: the weight itself.
        scale: name of the tensor that it is to be multiplied with; None: the numbers are the weight.
        block: rows and columns of a block with one scale; 0: a scale is of the tensor, or of a row.
    """

    stored: Stored
    scale: str | None = None
    block: int = 0

    def widened(self, values: Tensor, scale: Tensor | None) -> Tensor:
        """The weight in float32, as a tensor of its own.

        Args:
            values: as stored, [N, ...].
            scale: as stored, on any device.

        Raises:
            CheckpointError: a scale that cannot be one.
        """
        wide = values.to(torch.float32, copy=True)
        if scale is None:
            return wide
        if self.block:
            rows, columns = wide.shape
            blocks = self._checked(scale).to(wide.device)
            whole = blocks.repeat_interleave(self.block, 0).repeat_interleave(self.block, 1)
            return wide.mul_(whole[:rows, :columns])
        return wide.mul_(self.rows(scale).to(wide.device).reshape(-1, *[1] * (wide.ndim - 1)))

    def rows(self, scale: Tensor) -> Tensor:
        """The scale as [N, 1], or [1, 1] for one of the whole tensor, in float32."""
        return self._checked(scale).reshape(-1, 1)

    def _checked(self, scale: Tensor) -> Tensor:
        if not scale.isfinite().all():
            raise CheckpointError(
                "the scale of a weight is NaN or Inf", file=self.stored.file, key=self.scale
            )
        # a row or block of zeros may have none; a whole tensor has one
        if (scale < 0).any() or (scale.numel() == 1 and not scale.any()):
            raise CheckpointError(
                "the scale of a weight is not above 0", file=self.stored.file, key=self.scale
            )
        return scale.float()


def find_eight_bit(
    tensors: Mapping[str, Stored],
    metadata: Mapping[str, str],
    read: Callable[[str], Tensor],
    prefix: str = "",
) -> tuple[dict[str, EightBit], set[str]]:
    """The weights that do not stand for themselves, by name, and the names of what belongs to them.

    Args:
        tensors: of one network.
        metadata: of its files.
        read: gives a tensor's stored values.
        prefix: what stands before these names in the file.

    Raises:
        CheckpointError: a format that is not opened; a scale without its weight, a weight without its scale,
            or one of a shape that fits no form.
    """
    notes = dict(_notes(tensors, metadata, read, prefix))
    beside: set[str] = {name for name in tensors if name.rpartition(".")[2] in BESIDE}
    scales: dict[str, str] = {}
    for name in tensors:
        base, _, leaf = name.rpartition(".")
        if leaf in _FOREIGN:
            raise _refused(tensors[name].file, name, _FOREIGN[leaf])
        if leaf in (*_SCALES, *_UNUSED, _NOTE) and base:
            weight = f"{base}.weight"
            if weight not in tensors:
                raise CheckpointError(
                    "a scale has no weight", file=tensors[name].file, key=name, expected=weight
                )
            beside.add(name)
            if leaf in _SCALES:
                scales[weight] = name
    is_scaled = "scaled_fp8" in tensors or bool(scales)
    found = {}
    for name, stored in tensors.items():
        if name in beside or not (name in scales or name in notes or stored.dtype in FLOAT8_TYPES):
            continue
        if name not in scales and (is_scaled or name in notes):
            raise CheckpointError(
                "a weight in 8 bits has no scale, and other weights of its file have one",
                file=stored.file,
                key=name,
                expected=f"{name.rpartition('.')[0]}.{_SCALES[1]}",
                remedy="fetch the file again, or the model's 16-bit files",
            )
        found[name] = _eight_bit(name, tensors, scales.get(name), notes.get(name, {}))
    return found, beside


def _eight_bit(
    name: str, tensors: Mapping[str, Stored], scale: str | None, note: Mapping[str, Any]
) -> EightBit:
    stored = tensors[name]
    if "format" in note and stored.dtype != _FORMATS[note["format"]]:
        raise CheckpointError(
            "a weight is not of the type that its format says",
            file=stored.file,
            key=name,
            expected=note["format"],
            found=stored.dtype,
        )
    if scale is None:
        return EightBit(stored)
    kind = tensors[scale].dtype
    if kind not in FLOAT_TYPES.values():
        said = "mxfp8" if kind in (torch.float8_e8m0fnu, torch.uint8) else f"scales of {kind}"
        raise _refused(stored.file, scale, said)
    shape = tensors[scale].shape
    rows = stored.shape[0] if stored.shape else 1
    block = note.get("group_size") or _BLOCK
    per_block = [math.ceil(size / block) for size in stored.shape] if len(stored.shape) == 2 else None
    if math.prod(shape) == 1 or shape in ((rows,), (rows, *[1] * (len(stored.shape) - 1))):
        return EightBit(stored, scale)
    if list(shape) == per_block:
        return EightBit(stored, scale, block)
    raise CheckpointError(
        "the scale of a weight has a shape that fits no form",
        file=stored.file,
        key=scale,
        expected=f"[1], [{rows}] or [{rows}, 1]" + (f", or blocks: {per_block}" if per_block else ""),
        found=list(shape),
        remedy=_REMEDY,
    )


def _notes(
    tensors: Mapping[str, Stored], metadata: Mapping[str, str], read: Callable[[str], Tensor], prefix: str
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """What a file says of its weights' formats, checked: (weight, note)."""
    file = next(iter(tensors.values())).file if tensors else None
    with foreign_data(
        lambda cause: CheckpointError(
            f"what a file says of its 8-bit weights cannot be read: {cause}", file=file, key=_HEADER_NOTE
        )
    ):
        listed = parse_json(metadata.get(_HEADER_NOTE, "{}")).get("layers", {}).items()
        layers = {str(layer): dict(note) for layer, note in listed}
        for name in tensors:
            if name.endswith(f".{_NOTE}"):
                layers[name.removesuffix(f".{_NOTE}")] = dict(
                    parse_json(bytes(read(name).view(torch.uint8).flatten().tolist()).decode())
                )
    for layer, note in layers.items():
        weight = f"{layer.removeprefix(prefix)}.weight"  # some leave the prefix out
        if weight not in tensors:
            continue
        kind = str(note.get("format"))
        turned = any(value for key, value in note.items() if key.startswith("convrot"))
        if turned or "convrot" in kind:
            raise _refused(file, weight, f"{kind} with ConvRot, which turns weights before rounding")
        if kind not in _FORMATS:
            raise _refused(file, weight, kind)
        block = note.get("group_size")
        if block is not None and not (type(block) is int and 1 <= block <= 2**20):
            raise CheckpointError("a group size cannot be used", file=file, key=weight, found=repr(block))
        yield weight, note


def _refused(file: object, key: str, kind: str) -> CheckpointError:
    known = ", ".join(_FORMATS)
    return CheckpointError(
        "weights in a format that is not opened",
        file=file,
        key=key,
        expected=f"16 bits, or {known}",
        found=kind,
        remedy=_REMEDY,
    )
