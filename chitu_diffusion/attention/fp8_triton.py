# mypy: disable-error-code="no-untyped-def"
"""The work around float8 attention in Triton, each kernel one pass over its tensors; `fp8` has the plain twins.

All take tensors [B, S, H, D] of any strides whose last is 1, D a power of two from 16 to 128, and work in float32; products
of tiles take bfloat16, in which float8 is exact. Needs the package triton, which torch's CUDA builds bring.
Triton's kernels take pointers, for which Python has no types.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from chitu_diffusion.attention.fp8 import FLOAT8, LARGEST, Moments, Steps, hadamard

_TILE, _SMALL_TILE = 64, 32
_PROGRAMS = 264
"""Programs that share one pass: two for each multiprocessor of a Hopper GPU, all of which run at once."""


@triton.jit
def _moments_kernel(
    k, v, out, tokens, heads,
    k_b, k_s, k_h, v_b, v_s, v_h,
    SHARE: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr, FOLD: tl.constexpr, PRODUCT: tl.constexpr,
):  # fmt: skip
    """Sums of k, k^2, v, v^2 and v k^T over this program's share of the tokens; out [B * H, parts, 4 D + D D].

    Until the end every row modulo FOLD has its own sums: rows FOLD apart lie in the same thread, which adds them up without
    a word to the others.
    """
    head, part, parts = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    b, h = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    channel = tl.max_contiguous(tl.arange(0, D), 8)  # of one thread, in 8 bits as in 16, which is what FOLD counts on
    k_one = tl.zeros((FOLD, D), tl.float32)
    k_two = tl.zeros((FOLD, D), tl.float32)
    v_one = tl.zeros((FOLD, D), tl.float32)
    v_two = tl.zeros((FOLD, D), tl.float32)
    product = tl.zeros((D, D), tl.float32)
    for start in range(0, SHARE, TILE):
        row = part * SHARE + start + tl.arange(0, TILE).to(tl.int64)
        mask = (row < tokens)[:, None]
        k_tile = tl.load(k + b * k_b + row[:, None] * k_s + h * k_h + channel[None, :], mask=mask, other=0.0).to(PRODUCT)
        v_tile = tl.load(v + b * v_b + row[:, None] * v_s + h * v_h + channel[None, :], mask=mask, other=0.0).to(PRODUCT)
        product = tl.dot(tl.trans(v_tile), k_tile, product)
        k_wide = tl.reshape(k_tile, (TILE // FOLD, FOLD, D)).to(tl.float32)
        v_wide = tl.reshape(v_tile, (TILE // FOLD, FOLD, D)).to(tl.float32)
        k_one += tl.sum(k_wide, 0)
        k_two += tl.sum(k_wide * k_wide, 0)
        v_one += tl.sum(v_wide, 0)
        v_two += tl.sum(v_wide * v_wide, 0)
    place = out + (head * parts + part).to(tl.int64) * (4 * D + D * D)
    tl.store(place + channel, tl.sum(k_one, 0))
    tl.store(place + D + channel, tl.sum(k_two, 0))
    tl.store(place + 2 * D + channel, tl.sum(v_one, 0))
    tl.store(place + 3 * D + channel, tl.sum(v_two, 0))
    tl.store(place + 4 * D + channel[:, None] * D + channel[None, :], product)


@triton.jit
def _quantise_kernel(
    x, shift, factor, signs, out, tokens, heads, x_b, x_s, x_h,
    SHARE: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr, PRODUCT: tl.constexpr, SHIFT: tl.constexpr, ROTATE: tl.constexpr,
):  # fmt: skip
    """float8 of ((x - shift) * factor) @ signs for this program's share of the tokens; out [B, S, H, D] contiguous.

    No clamp: the instruction that rounds to float8 gives 448 for what is above.
    """
    head, part = tl.program_id(1), tl.program_id(0)
    b, h = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    channel = tl.arange(0, D)
    times = tl.load(factor + head * D + channel)[None, :]
    if SHIFT:
        plus = -tl.load(shift + head * D + channel)[None, :] * times
    if ROTATE:
        turn = tl.load(signs + channel[:, None] * D + channel[None, :]).to(PRODUCT)
    for start in range(0, SHARE, TILE):
        row = part * SHARE + start + tl.arange(0, TILE).to(tl.int64)
        mask = (row < tokens)[:, None]
        tile = tl.load(x + b * x_b + row[:, None] * x_s + h * x_h + channel[None, :], mask=mask, other=0.0).to(tl.float32)
        tile = tile * times + plus if SHIFT else tile * times
        if ROTATE:
            tile = tl.dot(tile.to(PRODUCT), turn)
        place = ((b * tokens + row[:, None]) * heads + h) * D + channel[None, :]
        tl.store(out + place, tile.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _finish_kernel(
    given, scale, bias, q, matrix, out, tokens, heads, g_b, g_s, g_h, q_b, q_s, q_h,
    SHARE: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr, PRODUCT: tl.constexpr,
):  # fmt: skip
    """given * scale + bias + q @ matrix for this program's share of the tokens; out [B, S, H, D] contiguous."""
    head, part = tl.program_id(1), tl.program_id(0)
    b, h = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    channel = tl.arange(0, D)
    turn = tl.load(matrix + head.to(tl.int64) * D * D + channel[:, None] * D + channel[None, :]).to(PRODUCT)
    times, plus = tl.load(scale + head * D + channel)[None, :], tl.load(bias + head * D + channel)[None, :]
    for start in range(0, SHARE, TILE):
        row = part * SHARE + start + tl.arange(0, TILE).to(tl.int64)
        mask = (row < tokens)[:, None]
        q_tile = tl.load(q + b * q_b + row[:, None] * q_s + h * q_h + channel[None, :], mask=mask, other=0.0).to(PRODUCT)
        tile = tl.dot(q_tile, turn)
        out8 = tl.load(given + b * g_b + row[:, None] * g_s + h * g_h + channel[None, :], mask=mask, other=0.0)
        tile += out8.to(tl.float32) * times + plus
        place = ((b * tokens + row[:, None]) * heads + h) * D + channel[None, :]
        tl.store(out + place, tile.to(out.dtype.element_ty), mask=mask)


def _product(x: Tensor) -> tl.dtype:
    """What tiles are multiplied in; Triton's interpreter, which a CPU means, cannot multiply bfloat16."""
    if not x.is_cuda:
        return tl.float32
    # 8 bits are exact in both; to float16 there is an instruction
    return tl.float16 if x.dtype == FLOAT8 else tl.bfloat16


def _shares(x: Tensor, tile: int) -> tuple[int, int]:
    """(programs for each head of x [B, S, H, D], tokens of one), so that all programs run at once."""
    batch, tokens, heads, _ = x.shape
    share = triton.cdiv(tokens, max(1, _PROGRAMS // (batch * heads)) * tile) * tile
    return triton.cdiv(tokens, share), share


@cache
def _signs(device: torch.device, size: int) -> Tensor:
    return hadamard(size).sign().to(device, torch.bfloat16)


def _even(x: Tensor) -> Tensor:
    """x itself, or a copy whose channels lie side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


def moments(k: Tensor, v: Tensor) -> Moments:
    """As `fp8.moments`; k, v of 16 or 8 bits."""
    k, v = _even(k), _even(v)
    batch, tokens, heads, channels = k.shape
    parts, share = _shares(k, _SMALL_TILE)
    out = torch.empty(batch * heads, parts, channels * (4 + channels), dtype=torch.float32, device=k.device)
    warps, neighbours = 8, 8
    fold = min(_SMALL_TILE, warps * 32 * neighbours // channels)
    _moments_kernel[(batch * heads, parts)](
        k, v, out, tokens, heads, *k.stride()[:3], *v.stride()[:3], SHARE=share, D=channels, TILE=_SMALL_TILE, FOLD=fold,
        PRODUCT=_product(k), num_warps=warps, num_stages=4, maxnreg=128,
    )  # fmt: skip
    sums = out.sum(1).unflatten(0, (batch, heads))
    k_sum, kk, v_sum, vv, vk = sums.split([channels] * 4 + [channels**2], dim=-1)
    return Moments.of_sums(tokens, k_sum, kk, v_sum, vv, vk.unflatten(-1, (channels, channels)))


def quantise(x: Tensor, shift: Tensor | None, factor: Tensor, rotation: Tensor | None) -> Tensor:
    """As `fp8.quantise`; the rotation is an orthonormal Hadamard matrix."""
    x = _even(x)
    batch, tokens, heads, channels = x.shape
    # Triton's interpreter loses the carry when it rounds to float8 (7.95 becomes 4), so there torch rounds
    out = torch.empty(x.shape, dtype=FLOAT8 if x.is_cuda else torch.float32, device=x.device)
    # signs alone are exact in 16 bits; the 1 / sqrt(D) that makes them a rotation goes into the factor
    signs = factor if rotation is None else _signs(x.device, channels)
    factor = (factor if rotation is None else factor * channels**-0.5).contiguous()
    # few programs read the signs once for many tiles and the next tile ahead; without signs, many programs of one tile
    parts, share = (triton.cdiv(tokens, _TILE), _TILE) if rotation is None else _shares(x, _TILE)
    _quantise_kernel[(parts, batch * heads)](
        x, factor if shift is None else shift.contiguous(), factor, signs, out, tokens, heads, *x.stride()[:3], SHARE=share,
        D=channels, TILE=_TILE, PRODUCT=_product(x), SHIFT=shift is not None, ROTATE=rotation is not None, num_warps=4,
    )  # fmt: skip
    return out if x.is_cuda else out.clamp(-LARGEST, LARGEST).to(FLOAT8)


def finish(out: Tensor, scale: Tensor, bias: Tensor, q: Tensor, matrix: Tensor) -> Tensor:
    """As `fp8.finish`; the matrix is rounded to bfloat16."""
    given, q = _even(out), _even(q)
    batch, _, heads, channels = q.shape
    result = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    parts, share = _shares(q, _TILE)
    _finish_kernel[(parts, batch * heads)](
        given, scale.contiguous(), bias.contiguous(), q, matrix.to(torch.bfloat16).contiguous(), result, q.shape[1], heads,
        *given.stride()[:3], *q.stride()[:3], SHARE=share, D=channels, TILE=_TILE, PRODUCT=_product(q), num_warps=8,
    )  # fmt: skip
    return result


STEPS = Steps(moments, quantise, finish)
