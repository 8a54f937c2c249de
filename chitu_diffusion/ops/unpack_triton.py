"""`unpack` as Triton kernels, one a packing: every packed byte is read once and every number written once.
Imported only where Triton is.

A program takes BLOCKS blocks. Scales times numbers are exact in float32 but for Q6_K's, whose product is
rounded once and added to nothing, so that fused multiply-adds change no bit.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_NUMBERS = 4096
"""That a program writes."""


@triton.jit
def _store(out_ptr, at, values, keep):
    tl.store(out_ptr + at, values.to(out_ptr.dtype.element_ty), mask=keep)


@triton.jit
def _six_bits(byte_ptr, group):
    # scale and minimum of a group: 8 low ones whole, of 8 high ones four bits here and two above the low ones
    early = group < 4
    own = tl.load(byte_ptr + 4 + group % 4).to(tl.int32)
    least = tl.load(byte_ptr + 8 + group % 4).to(tl.int32)
    rest = tl.load(byte_ptr + 12 + group % 4).to(tl.int32)
    scale = tl.where(early, own & 63, (rest & 15) | ((own >> 2) & 48))
    minimum = tl.where(early, least & 63, (rest >> 4) | ((least >> 2) & 48))
    return scale.to(tl.float32), minimum.to(tl.float32)


@triton.jit
def _q8_0(byte_ptr, half_ptr, out_ptr, blocks, BLOCKS: tl.constexpr):
    block = (tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)).to(tl.int64)[:, None]
    number = tl.arange(0, 32)[None, :]
    # all programs but the last are whole; its blocks beyond the end are read from the last one
    keep = (block < blocks) & (number < 32)
    block = tl.minimum(block, blocks - 1)
    scale = tl.load(half_ptr + block * 17).to(tl.float32)
    values = tl.load(byte_ptr + block * 34 + 2 + number).to(tl.int8, bitcast=True).to(tl.float32)
    _store(out_ptr, block * 32 + number, values * scale, keep)


@triton.jit
def _q4_k(byte_ptr, half_ptr, out_ptr, blocks, BLOCKS: tl.constexpr):
    block = (tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)).to(tl.int64)[:, None, None]
    pair = tl.arange(0, 4)[None, :, None]
    number = tl.arange(0, 32)[None, None, :]
    keep = (block < blocks) & (pair < 4) & (number < 32)
    block = tl.minimum(block, blocks - 1)
    scale = tl.load(half_ptr + block * 72).to(tl.float32)
    least = tl.load(half_ptr + block * 72 + 1).to(tl.float32)
    low_scale, low_least = _six_bits(byte_ptr + block * 144, pair * 2)
    high_scale, high_least = _six_bits(byte_ptr + block * 144, pair * 2 + 1)
    two = tl.load(byte_ptr + block * 144 + 16 + pair * 32 + number).to(tl.int32)
    at = block * 256 + pair * 64 + number
    low = (scale * low_scale) * (two & 15).to(tl.float32) - least * low_least
    high = (scale * high_scale) * (two >> 4).to(tl.float32) - least * high_least
    _store(out_ptr, at, low, keep)
    _store(out_ptr, at + 32, high, keep)


@triton.jit
def _q5_k(byte_ptr, half_ptr, out_ptr, blocks, BLOCKS: tl.constexpr):
    block = (tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)).to(tl.int64)[:, None, None]
    pair = tl.arange(0, 4)[None, :, None]
    number = tl.arange(0, 32)[None, None, :]
    keep = (block < blocks) & (pair < 4) & (number < 32)
    block = tl.minimum(block, blocks - 1)
    scale = tl.load(half_ptr + block * 88).to(tl.float32)
    least = tl.load(half_ptr + block * 88 + 1).to(tl.float32)
    low_scale, low_least = _six_bits(byte_ptr + block * 176, pair * 2)
    high_scale, high_least = _six_bits(byte_ptr + block * 176, pair * 2 + 1)
    fifth = tl.load(byte_ptr + block * 176 + 16 + number).to(tl.int32) >> (pair * 2)
    two = tl.load(byte_ptr + block * 176 + 48 + pair * 32 + number).to(tl.int32)
    at = block * 256 + pair * 64 + number
    low_number = ((two & 15) | ((fifth & 1) << 4)).to(tl.float32)
    high_number = ((two >> 4) | (((fifth >> 1) & 1) << 4)).to(tl.float32)
    _store(out_ptr, at, (scale * low_scale) * low_number - least * low_least, keep)
    _store(out_ptr, at + 32, (scale * high_scale) * high_number - least * high_least, keep)


@triton.jit
def _q6_k(byte_ptr, half_ptr, out_ptr, blocks, BLOCKS: tl.constexpr):
    block = (tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)).to(tl.int64)[:, None, None]
    part = tl.arange(0, 4)[None, :, None]  # of 32 low bytes: which half of the block, which 32 of its 64
    number = tl.arange(0, 32)[None, None, :]
    keep = (block < blocks) & (part < 4) & (number < 32)
    block = tl.minimum(block, blocks - 1)
    whole = tl.load(half_ptr + block * 105 + 104).to(tl.float32)
    two = tl.load(byte_ptr + block * 210 + part * 32 + number).to(tl.int32)
    bits = tl.load(byte_ptr + block * 210 + 128 + (part // 2) * 32 + number).to(tl.int32)
    inner = (part % 2) * 32 + number  # of 64 low halves
    first = (part // 2) * 128 + inner
    scale_ptr = byte_ptr + block * 210 + 192
    low_scale = tl.load(scale_ptr + first // 16).to(tl.int8, bitcast=True).to(tl.float32)
    high_scale = tl.load(scale_ptr + (first + 64) // 16).to(tl.int8, bitcast=True).to(tl.float32)
    low = (two & 15) | (((bits >> ((part % 2) * 2)) & 3) << 4)
    high = (two >> 4) | (((bits >> ((part % 2) * 2 + 4)) & 3) << 4)
    at = block * 256 + first
    _store(out_ptr, at, (whole * low_scale) * (low - 32).to(tl.float32), keep)
    _store(out_ptr, at + 64, (whole * high_scale) * (high - 32).to(tl.float32), keep)


_KERNELS: Mapping[str, Any] = MappingProxyType({"Q8_0": _q8_0, "Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k})


def unpack_fused(packed: Tensor, packing: str, count: int, size: int, dtype: torch.dtype) -> Tensor:
    blocks = packed.numel() // size
    out = torch.empty(blocks * count, dtype=dtype, device=packed.device)
    each = _NUMBERS // count
    grid = (triton.cdiv(blocks, each),)
    _KERNELS[packing][grid](packed, packed.view(torch.float16), out, blocks, BLOCKS=each)
    return out
