"""GGUF files as others write them, by the `gguf` package's own writer; of types that it cannot round to,
random blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter, quants
from torch import Tensor

BY_BLOCKS = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS")
"""Types that the package reads and cannot write."""


def packed(values: Tensor, kind: str, seed: int = 0) -> np.ndarray:
    """Rows of `values` in blocks of a type, [..., bytes] uint8; of those in `BY_BLOCKS`, blocks whose numbers
    have about their size, and nothing else in common with them.
    """
    if kind not in BY_BLOCKS:
        return quants.quantize(values.float().numpy(), GGMLQuantizationType[kind])
    return random_blocks(tuple(values.shape), kind, float(values.std()), seed)


def random_blocks(shape: tuple[int, ...], kind: str, size: float = 1.0, seed: int = 0) -> np.ndarray:
    """Blocks with random bits, but for their scales, by which the numbers' deviation is about `size`."""
    count, bytes_of_block = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    chance = np.random.default_rng(seed)
    blocks = chance.integers(0, 256, (int(np.prod(shape)) // count, bytes_of_block), np.uint8)
    one = np.float16(1).reshape(1).view(np.uint8)
    at = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}.get(kind, (0,))
    for start in at:
        blocks[:, start : start + 2] = one
    deviation = float(quants.dequantize(blocks, GGMLQuantizationType[kind]).std())
    scales = (size / deviation * chance.uniform(0.5, 1.5, len(blocks))).astype(np.float16)
    for start in at:
        blocks[:, start : start + 2] = scales.reshape(-1, 1).view(np.uint8)
    return blocks.reshape(*shape[:-1], shape[-1] // count * bytes_of_block)


def write_gguf(
    path: Path,
    tensors: Mapping[str, Tensor],
    kinds: Mapping[str, str],
    *,
    architecture: str | None = "wan",
    shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> dict[str, Tensor]:
    """Writes tensors, each in the type that `kinds` names for it, else in its own.

    Args:
        architecture: None for a file that does not say, as stable-diffusion.cpp's.
        shapes: what `comfy.gguf.orig_shape.NAME` says.

    Returns:
        What the package's own arithmetic says that they hold, in float32.
    """
    writer = GGUFWriter(path, architecture or "")
    for name, shape in (shapes or {}).items():
        writer.add_array(f"comfy.gguf.orig_shape.{name}", [int(size) for size in shape])
    held = {}
    for number, (name, values) in enumerate(tensors.items()):
        if name in kinds:
            kind = GGMLQuantizationType[kinds[name]]
            blocks = packed(values, kinds[name], number)
            writer.add_tensor(name, blocks, raw_dtype=kind)
            held[name] = torch.from_numpy(quants.dequantize(blocks, kind))
        elif values.dtype is torch.bfloat16:
            data = values.view(torch.int16).numpy().view(np.uint8)
            writer.add_tensor(name, data, raw_dtype=GGMLQuantizationType.BF16)
            held[name] = values.float()
        else:
            writer.add_tensor(name, values.numpy())
            held[name] = values.float()
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return held
