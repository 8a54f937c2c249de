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

_NUMBERS = 2048
"""That a program writes."""


@triton.jit
def _blocks(blocks, BLOCKS: tl.constexpr):
    # this program's, [BLOCKS]; those behind the end are the last one, which is written several times alike
    mine = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    return tl.minimum(mine, blocks - 1).to(tl.int64)


@triton.jit
def _store(out_ptr, at, values):
    tl.store(out_ptr + at, values.to(out_ptr.dtype.element_ty))


@triton.jit
def _group(block_ptr, scale_ptr, group):
    # scale and minimum of a group: pointers [BLOCKS, 1] and groups [1, 4] -> [BLOCKS, 4, 1] float32. The six
    # bits of groups 0 to 3 are low ones; of 4 to 7 four stand in a third byte, two above those of the others
    early = group < 4
    scale = tl.load(block_ptr + 4 + group % 4).to(tl.int32)
    least = tl.load(block_ptr + 8 + group % 4).to(tl.int32)
    rest = tl.load(block_ptr + 12 + group % 4).to(tl.int32)
    scale = tl.where(early, scale & 63, (rest & 15) | ((scale >> 2) & 48)).to(tl.float32)
    least = tl.where(early, least & 63, (rest >> 4) | ((least >> 2) & 48)).to(tl.float32)
    scale = scale * tl.load(scale_ptr).to(tl.float32)
    least = least * tl.load(scale_ptr + 1).to(tl.float32)
    return scale[:, :, None], least[:, :, None]


@triton.jit
def _q8_0(byte_ptr, half_ptr, out_ptr, blocks, BLOCKS: tl.constexpr):
    block = _blocks(blocks, BLOCKS)
    scale = tl.load(half_ptr + block * 17).to(tl.float32)[:, None]
    number = tl.arange(0, 32)[None, :]
    values = tl.load(byte_ptr + block[:, None] * 34 + 2 + number).to(tl.int8, bitcast=True).to(tl.float32)
    _store(out_ptr, block[:, None] * 32 + number, values * scale)


@triton.jit
def _q4_k(byte_ptr, half_ptr, out_ptr, blocks, BLOCKS: tl.constexpr):
    block = _blocks(blocks, BLOCKS)
    pair = tl.arange(0, 4)[None, :]
    block_ptr = byte_ptr + block[:, None] * 144
    scale_ptr = half_ptr + block[:, None] * 72
    low_scale, low_least = _group(block_ptr, scale_ptr, pair * 2)
    high_scale, high_least = _group(block_ptr, scale_ptr, pair * 2 + 1)
    number = tl.arange(0, 32)[None, None, :]
    two = tl.load(block_ptr[:, :, None] + 16 + pair[:, :, None] * 32 + number).to(tl.int32)
    at = block[:, None, None] * 256 + pair[:, :, None] * 64 + number
    _store(out_ptr, at, low_scale * (two & 15).to(tl.float32) - low_least)
    _store(out_ptr, at + 32, high_scale * (two >> 4).to(tl.float32) - high_least)


@triton.jit
def _q5_k(byte_ptr, half_ptr, out_ptr, blocks, BLOCKS: tl.constexpr):
    block = _blocks(blocks, BLOCKS)
    pair = tl.arange(0, 4)[None, :]
    block_ptr = byte_ptr + block[:, None] * 176
    scale_ptr = half_ptr + block[:, None] * 88
    low_scale, low_least = _group(block_ptr, scale_ptr, pair * 2)
    high_scale, high_least = _group(block_ptr, scale_ptr, pair * 2 + 1)
    number = tl.arange(0, 32)[None, None, :]
    fifth = tl.load(block_ptr[:, :, None] + 16 + number).to(tl.int32) >> (pair[:, :, None] * 2)
    two = tl.load(block_ptr[:, :, None] + 48 + pair[:, :, None] * 32 + number).to(tl.int32)
    low = ((two & 15) | ((fifth & 1) << 4)).to(tl.float32)
    high = ((two >> 4) | (((fifth >> 1) & 1) << 4)).to(tl.float32)
    at = block[:, None, None] * 256 + pair[:, :, None] * 64 + number
    _store(out_ptr, at, low_scale * low - low_least)
    _store(out_ptr, at + 32, high_scale * high - high_least)


@triton.jit
def _q6_k(byte_ptr, half_ptr, out_ptr, blocks, BLOCKS: tl.constexpr):
    block = _blocks(blocks, BLOCKS)
    part = tl.arange(0, 8)[None, :]  # of 16 low bytes: 4 in each half of the block
    scale_ptr = byte_ptr + block[:, None] * 210 + 192 + part // 4 * 8 + part % 4
    whole = tl.load(half_ptr + block[:, None] * 105 + 104).to(tl.float32)
    low_scale = whole * tl.load(scale_ptr).to(tl.int8, bitcast=True).to(tl.float32)
    high_scale = whole * tl.load(scale_ptr + 4).to(tl.int8, bitcast=True).to(tl.float32)
    part = part[:, :, None]
    number = tl.arange(0, 16)[None, None, :]
    block_ptr = byte_ptr + block[:, None, None] * 210
    two = tl.load(block_ptr + part * 16 + number).to(tl.int32)
    bits = tl.load(block_ptr + 128 + part // 4 * 32 + part % 2 * 16 + number).to(tl.int32)
    bits = bits >> (part % 4 // 2 * 2)
    low = (two & 15) | ((bits & 3) << 4)
    high = (two >> 4) | (((bits >> 4) & 3) << 4)
    at = block[:, None, None] * 256 + part // 4 * 128 + part % 4 * 16 + number
    _store(out_ptr, at, low_scale[:, :, None] * (low - 32).to(tl.float32))
    _store(out_ptr, at + 64, high_scale[:, :, None] * (high - 32).to(tl.float32))


_KERNELS: Mapping[str, Any] = MappingProxyType({"Q8_0": _q8_0, "Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k})


def unpack_fused(packed: Tensor, packing: str, count: int, size: int, dtype: torch.dtype) -> Tensor:
    blocks = packed.numel() // size
    out = torch.empty(blocks * count, dtype=dtype, device=packed.device)
    each = _NUMBERS // count
    grid = (triton.cdiv(blocks, each),)
    _KERNELS[packing][grid](packed, packed.view(torch.float16), out, blocks, BLOCKS=each)
    return out
