# mypy: disable-error-code="no-untyped-def"
"""The work around float8 attention in Triton, each kernel one pass over its tensors; `fp8` has the plain
twins.

All take tensors [B, S, H, D] of any strides whose last is 1, D a power of two from 16 to 128, and work in
float32; products of tiles take bfloat16, and float16 where both sides are float8, which is exact in it. What
is summed over tokens comes in parts, one from each program, which the next kernel adds up in their order: no
atomics, so that a result can be had again. Needs the package triton, which torch's CUDA builds bring.
Triton's kernels take pointers, for which Python has no types.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from chitu_diffusion.attention.fp8_steps import (
    FLOAT8,
    LARGEST,
    RMS,
    TINY,
    Means,
    Rounded,
    Scales,
    Steps,
    hadamard,
    sample,
)

_LARGE_TILE = 128
_TILE = 64
_SMALL_TILE = 32
_SLAB = 16
"""Channels of v that one program corrects; tensor cores take no fewer rows."""
_PROGRAMS = 264
"""Programs that share one pass: two for each multiprocessor of a Hopper GPU, all of which run at once."""


@triton.jit
def _tile(x, first, tokens, stride, channel, TILE: tl.constexpr):
    """TILE rows of one head from `first` on, zero beyond its tokens. 64-bit to the first row, then 32."""
    row = tl.arange(0, TILE)
    place = x + first.to(tl.int64) * stride
    return tl.load(
        place + (row[:, None] * stride + channel[None, :]), mask=(first + row < tokens)[:, None], other=0.0
    )


@triton.jit
def _store_tile(out, first, tokens, stride, channel, tile):
    """As `_tile`, the other way."""
    row = tl.arange(0, tile.shape[0])
    place = out + first.to(tl.int64) * stride
    tl.store(place + (row[:, None] * stride + channel[None, :]), tile, mask=(first + row < tokens)[:, None])


@triton.jit
def _folded(x, FOLD: tl.constexpr):
    """Sum of the rows of x [TILE, D] that are equal modulo FOLD, [FOLD, D].

    Rows FOLD apart lie in the same thread, which adds them up without a word to the others; those are heard
    after the loop.
    """
    return tl.sum(tl.reshape(x, (x.shape[0] // FOLD, FOLD, x.shape[1])), 0)


@triton.jit
def _rounded(x, DROPPED: tl.constexpr):
    """x without DROPPED of its 23 bits behind the point, ties to even: where the interpreter would cut them
    off, or worse.
    """
    bits = x.to(tl.int32, bitcast=True)
    bits += (1 << (DROPPED - 1)) - 1 + ((bits >> DROPPED) & 1)
    return (bits >> DROPPED << DROPPED).to(tl.float32, bitcast=True)


@triton.jit
def _float8(x, LARGEST: tl.constexpr, INTERPRETED: tl.constexpr):
    """x in float8. A GPU's instruction takes its largest number for what is above it.

    Triton's interpreter loses the carry when it rounds (7.95 becomes 4), and gets numbers that need no
    rounding: three bits behind the point, and below 2^-6 multiples of 2^-9, which are what is left next to
    24576.
    """
    if INTERPRETED:
        x = tl.minimum(tl.maximum(x, -LARGEST), LARGEST)
        x = tl.where(tl.abs(x) < 0.015625, x + 24576.0 - 24576.0, _rounded(x, 20))
    return x.to(tl.float8e4nv)


@triton.jit
def _measure_kernel(
    q, k, v, rows, product, q_tokens, tokens, heads,
    q_b, q_s, q_h, k_b, k_s, k_h, v_b, v_s, v_h,
    Q_SHARE: tl.constexpr, SHARE: tl.constexpr, D: tl.constexpr, Q_TILE: tl.constexpr, TILE: tl.constexpr,
    FOLD: tl.constexpr, PRODUCT: tl.constexpr,
):  # fmt: skip
    """This program's part of the means of q^2, k, k^2, v, v^2, [B * H, parts, 5, D], and of k v^T, [B * H,
    parts, D, D].
    """
    head = tl.program_id(0)
    part = tl.program_id(1)
    parts = tl.num_programs(1)
    b = (head // heads).to(tl.int64)
    h = (head % heads).to(tl.int64)
    channel = tl.max_contiguous(tl.arange(0, D), 8)  # of one thread, which is what FOLD counts on
    place = (head * parts + part).to(tl.int64)
    to = rows + place * (5 * D) + channel
    q_two = tl.zeros((FOLD, D), tl.float32)
    for start in range(0, Q_SHARE, Q_TILE):
        q_tile = _tile(q + b * q_b + h * q_h, part * Q_SHARE + start, q_tokens, q_s, channel, Q_TILE).to(
            tl.float32
        )
        q_two += _folded(q_tile * q_tile, FOLD)
    tl.store(to, tl.sum(q_two, 0) / q_tokens)
    k_one = tl.zeros((FOLD, D), tl.float32)
    k_two = tl.zeros((FOLD, D), tl.float32)
    v_one = tl.zeros((FOLD, D), tl.float32)
    v_two = tl.zeros((FOLD, D), tl.float32)
    both = tl.zeros((D, D), tl.float32)
    for start in range(0, SHARE, TILE):
        k_tile = _tile(k + b * k_b + h * k_h, part * SHARE + start, tokens, k_s, channel, TILE).to(PRODUCT)
        v_tile = _tile(v + b * v_b + h * v_h, part * SHARE + start, tokens, v_s, channel, TILE).to(PRODUCT)
        both = tl.dot(tl.trans(k_tile), v_tile, both)
        k_wide = k_tile.to(tl.float32)
        v_wide = v_tile.to(tl.float32)
        k_one += _folded(k_wide, FOLD)
        k_two += _folded(k_wide * k_wide, FOLD)
        v_one += _folded(v_wide, FOLD)
        v_two += _folded(v_wide * v_wide, FOLD)
    tl.store(to + D, tl.sum(k_one, 0) / tokens)
    tl.store(to + 2 * D, tl.sum(k_two, 0) / tokens)
    tl.store(to + 3 * D, tl.sum(v_one, 0) / tokens)
    tl.store(to + 4 * D, tl.sum(v_two, 0) / tokens)
    tl.store(product + place * (D * D) + channel[:, None] * D + channel[None, :], both / tokens)


@triton.jit
def _sum_of_rows(parts, place, PARTS: tl.constexpr, STRIDE: tl.constexpr, D: tl.constexpr):
    """Over PARTS rows [D] that lie STRIDE apart; all are asked for at once, not one after the other."""
    total = tl.zeros((D,), tl.float32)
    for first in range(0, PARTS, 32):
        part = first + tl.arange(0, 32)
        total += tl.sum(
            tl.load(parts + part[:, None] * STRIDE + place[None, :], mask=(part < PARTS)[:, None], other=0.0),
            0,
        )
    return total


@triton.jit
def _sum_of_slabs(parts, place, PARTS: tl.constexpr, D: tl.constexpr, SLAB: tl.constexpr):
    """Over PARTS slabs [D, SLAB] of as many [D, D]."""
    total = tl.zeros((D, SLAB), tl.float32)
    for first in range(0, PARTS, 8):
        for part in tl.static_range(8):  # of which all loads are under way at a time
            total += tl.load(parts + (first + part) * (D * D) + place, mask=first + part < PARTS, other=0.0)
    return total


@triton.jit
def _scale_kernel(
    rows, signs, out, k_turn, descale, PARTS: tl.constexpr, D: tl.constexpr, RMS: tl.constexpr,
    TINY: tl.constexpr
):  # fmt: skip
    """`fp8.scale` of one head: from rows [B * H, PARTS, 5, D] to out [5, B * H, D], k_turn [B * H, D, D],
    descale [B * H].
    """
    head = tl.program_id(0)
    heads = tl.num_programs(0)
    channel = tl.arange(0, D)
    rows += head.to(tl.int64) * (PARTS * 5 * D)
    q_square = _sum_of_rows(rows, channel, PARTS, 5 * D, D)
    k_mean = _sum_of_rows(rows + D, channel, PARTS, 5 * D, D)
    k_square = _sum_of_rows(rows + 2 * D, channel, PARTS, 5 * D, D)
    v_mean = _sum_of_rows(rows + 3 * D, channel, PARTS, 5 * D, D)
    v_square = _sum_of_rows(rows + 4 * D, channel, PARTS, 5 * D, D)
    q_rms = tl.sqrt(tl.maximum(q_square, TINY))
    k_rms = tl.sqrt(tl.maximum(k_square - k_mean * k_mean, TINY))
    v_rms = tl.sqrt(tl.maximum(v_square - v_mean * v_mean, TINY))
    balance = tl.sqrt(k_rms / q_rms)
    size = tl.sqrt(tl.sum(q_rms * k_rms, 0) / D) / RMS
    k_factor = _rounded(D**-0.5 / (balance * size), 16)  # to bfloat16
    place = channel[:, None] * D + channel[None, :]
    turn = tl.load(signs + place).to(tl.float32) * k_factor[:, None]
    to = out + head * D + channel
    tl.store(k_turn + head.to(tl.int64) * (D * D) + place, turn.to(k_turn.dtype.element_ty))
    tl.store(to, k_mean)
    tl.store(to + heads * D, v_mean)
    tl.store(to + 2 * heads * D, D**-0.5 / (k_factor * size * size))
    tl.store(to + 3 * heads * D, tl.sum(turn * k_mean[:, None], 0))
    tl.store(to + 4 * heads * D, RMS / v_rms)
    tl.store(descale + head, size)


@triton.jit
def _quantise_q_kernel(
    q, factor, signs, out, tokens, heads, q_b, q_s, q_h,
    SHARE: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr, PRODUCT: tl.constexpr,
    LARGEST: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """float8 of (q * factor) @ signs / sqrt(D) for this program's tokens; out [B, S, H, D] contiguous."""
    head = tl.program_id(1)
    part = tl.program_id(0)
    b = (head // heads).to(tl.int64)
    h = (head % heads).to(tl.int64)
    channel = tl.arange(0, D)
    # signs alone are exact in 16 bits; the 1 / sqrt(D) that makes them a rotation goes into the factor
    times = (tl.load(factor + head * D + channel) * D**-0.5)[None, :]
    turn = tl.load(signs + channel[:, None] * D + channel[None, :]).to(PRODUCT)
    for start in range(0, SHARE, TILE):
        first = part * SHARE + start
        tile = _tile(q + b * q_b + h * q_h, first, tokens, q_s, channel, TILE).to(tl.float32) * times
        tile = _float8(tl.dot(tile.to(PRODUCT), turn), LARGEST, INTERPRETED)
        _store_tile(out + (b * tokens * heads + h) * D, first, tokens, heads * D, channel, tile)


@triton.jit
def _quantise_kv_kernel(
    k, v, k_turn, k_shift, v_mean, v_factor, k8, v8, rows, product, tokens, heads, k_b, k_s, k_h, v_b, v_s,
    v_h,
    SHARE: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr, FOLD: tl.constexpr, PRODUCT: tl.constexpr,
    EIGHT: tl.constexpr,
    LARGEST: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """float8 of k @ k_turn - k_shift and of (v - mean) * factor, both [B, L, H, D] contiguous, and of these
    this program's part of the means of v8, [B * H, parts, D], and of k8 v8^T, [B * H, parts, D, D]. EIGHT
    multiplies float8, exactly.

    Registers decide here: the product takes 64 of a thread's 128. So k goes to the tensor cores as it is
    read, and is kept as k^T, which fills both groups of four warps with half a tile and, rounded, is the
    product's left side where it stands.
    """
    head = tl.program_id(1)
    part = tl.program_id(0)
    parts = tl.num_programs(0)
    b = (head // heads).to(tl.int64)
    h = (head % heads).to(tl.int64)
    channel = tl.max_contiguous(tl.arange(0, D), 8)  # of one thread, which is what FOLD counts on
    at = head * D + channel
    turn = tl.trans(
        tl.load(k_turn + head.to(tl.int64) * (D * D) + channel[:, None] * D + channel[None, :]).to(PRODUCT)
    )
    shift = -tl.load(k_shift + at)[:, None]
    out = (b * tokens * heads + h) * D
    v_one = tl.zeros((FOLD, D), tl.float32)
    both = tl.zeros((D, D), tl.float32)
    for start in range(0, SHARE, TILE):
        first = part * SHARE + start
        k_tile = _tile(k + b * k_b + h * k_h, first, tokens, k_s, channel, TILE).to(PRODUCT)
        v_tile = _tile(v + b * v_b + h * v_h, first, tokens, v_s, channel, TILE).to(tl.float32)
        # both are read again for every tile: there are no registers for them to wait in
        v_tile = (v_tile - tl.load(v_mean + at)[None, :]) * tl.load(v_factor + at)[None, :]
        inside = first + tl.arange(0, TILE) < tokens
        # nothing beyond, in the product too
        v_tile = _float8(tl.where(inside[:, None], v_tile, 0.0), LARGEST, INTERPRETED)
        _store_tile(v8 + out, first, tokens, heads * D, channel, v_tile)
        v_one += _folded(v_tile.to(tl.float32), FOLD)
        k_tile = _float8(tl.dot(turn, tl.trans(k_tile)) + shift, LARGEST, INTERPRETED)
        _store_tile(k8 + out, first, tokens, heads * D, channel, tl.trans(k_tile))
        both = tl.dot(k_tile.to(EIGHT), v_tile.to(EIGHT), both)
    to = (head * parts + part).to(tl.int64)
    tl.store(rows + to * D + channel, tl.sum(v_one, 0) / tokens)
    tl.store(product + to * (D * D) + channel[:, None] * D + channel[None, :], both / tokens)


@triton.jit
def _correct_kernel(
    exact, given, rows, k_mean, v_mean, q_factor, v_factor, descale, signs, bias, matrix,
    PARTS: tl.constexpr, GIVEN_PARTS: tl.constexpr, D: tl.constexpr, SLAB: tl.constexpr,
    PRODUCT: tl.constexpr,
):  # fmt: skip
    """`fp8.correct` for SLAB of the channels of v of one head; exact, given [B * H, parts, D, D], rows [B *
    H, parts, D].
    """
    head = tl.program_id(1).to(tl.int64)
    of_v = tl.program_id(0) * SLAB + tl.arange(0, SLAB)
    of_k = tl.arange(0, D)
    place = of_k[:, None] * D + of_v[None, :]
    means = tl.load(v_mean + head * D + of_v)
    scale = 1.0 / tl.load(v_factor + head * D + of_v)
    size = tl.load(descale + head)
    found = _sum_of_slabs(given + head * (GIVEN_PARTS * D * D), place, GIVEN_PARTS, D, SLAB)
    # turned back in three products, since 16 bits of a number are too few where two nearly equal ones are
    # subtracted
    turn = tl.load(signs + of_k[:, None] * D + of_k[None, :]).to(PRODUCT)
    high = found.to(PRODUCT)
    rest = found - high.to(tl.float32)
    middle = rest.to(PRODUCT)
    low = (rest - middle.to(tl.float32)).to(PRODUCT)
    found = tl.dot(turn, high, tl.dot(turn, middle, tl.dot(turn, low)))
    found *= tl.load(q_factor + head * D + of_k)[:, None] * (scale * (size * size * D**-0.5))[None, :]
    whole = _sum_of_slabs(exact + head * (PARTS * D * D), place, PARTS, D, SLAB)
    whole -= tl.load(k_mean + head * D + of_k)[:, None] * means[None, :]
    tl.store(matrix + head * (D * D) + place, ((whole - found) * D**-0.5).to(matrix.dtype.element_ty))
    given_mean = _sum_of_rows(rows + head * (GIVEN_PARTS * D), of_v, GIVEN_PARTS, D, SLAB)
    tl.store(bias + head * D + of_v, means - scale * given_mean)


@triton.jit
def _finish_kernel(
    given, factor, bias, q, matrix, k_mean, lse, out, out_lse, tokens, heads, g_b, g_s, g_h, q_b, q_s, q_h,
    SHARE: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr, PRODUCT: tl.constexpr, LSE: tl.constexpr,
):  # fmt: skip
    """given / factor + bias + q @ matrix for this program's share of the tokens, out [B, S, H, D] contiguous;
    if LSE is set, also lse + q . k_mean / sqrt(D), both [B, H, S] contiguous.
    """
    head = tl.program_id(1)
    part = tl.program_id(0)
    b = (head // heads).to(tl.int64)
    h = (head % heads).to(tl.int64)
    channel = tl.arange(0, D)
    turn = tl.load(matrix + head.to(tl.int64) * D * D + channel[:, None] * D + channel[None, :]).to(PRODUCT)
    times = 1.0 / tl.load(factor + head * D + channel)[None, :]
    plus = tl.load(bias + head * D + channel)[None, :]
    for start in range(0, SHARE, TILE):
        row = part * SHARE + start + tl.arange(0, TILE).to(tl.int64)
        mask = (row < tokens)[:, None]
        q_tile = tl.load(
            q + b * q_b + row[:, None] * q_s + h * q_h + channel[None, :], mask=mask, other=0.0
        ).to(PRODUCT)
        tile = tl.dot(q_tile, turn)
        out8 = tl.load(
            given + b * g_b + row[:, None] * g_s + h * g_h + channel[None, :], mask=mask, other=0.0
        )
        tile += out8.to(tl.float32) * times + plus
        place = ((b * tokens + row[:, None]) * heads + h) * D + channel[None, :]
        tl.store(out + place, tile.to(out.dtype.element_ty), mask=mask)
        if LSE:
            taken = tl.sum(q_tile.to(tl.float32) * tl.load(k_mean + head * D + channel)[None, :], 1) * D**-0.5
            at = head.to(tl.int64) * tokens + row
            tl.store(out_lse + at, tl.load(lse + at, mask=row < tokens, other=0.0) + taken, mask=row < tokens)


def _product(x: Tensor) -> tl.dtype:
    """What tiles are multiplied in; Triton's interpreter, which a CPU means, cannot multiply bfloat16."""
    return tl.bfloat16 if x.is_cuda else tl.float32


def _shares(x: Tensor, tile: int) -> tuple[int, int]:
    """(programs for each head of x [B, S, H, D], tokens of one), so that all programs run at once."""
    batch, tokens, heads, _ = x.shape
    share = triton.cdiv(tokens, max(1, _PROGRAMS // (batch * heads)) * tile) * tile
    return triton.cdiv(tokens, share), share


def _fold(warps: int, tile: int, channels: int) -> int:
    """Rows that as many warps hold at a time, eight neighbouring channels to a thread."""
    return min(tile, warps * 32 * 8 // channels)


@cache
def _signs(device: torch.device, size: int) -> Tensor:
    return hadamard(size).sign().to(device, torch.bfloat16)


def _even(x: Tensor) -> Tensor:
    """x itself, or a copy whose channels lie side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


def measure(q: Tensor, k: Tensor, v: Tensor) -> Means:
    q = _even(sample(q))
    k = _even(k)
    v = _even(v)
    batch, tokens, heads, channels = k.shape
    parts, share = _shares(k, _SMALL_TILE)
    q_share = triton.cdiv(q.shape[1], parts * _LARGE_TILE) * _LARGE_TILE
    rows = torch.empty(batch, heads, parts, 5, channels, dtype=torch.float32, device=k.device)
    product = torch.empty(batch, heads, parts, channels, channels, dtype=torch.float32, device=k.device)
    _measure_kernel[(batch * heads, parts)](
        q, k, v, rows, product, q.shape[1], tokens, heads, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        Q_SHARE=q_share, SHARE=share, D=channels, Q_TILE=_LARGE_TILE, TILE=_SMALL_TILE, FOLD=_fold(8,
        _SMALL_TILE, channels),
        PRODUCT=_product(k), num_warps=8, num_stages=4, maxnreg=128,
    )  # fmt: skip
    return Means(rows, product)


def scale(means: Means) -> Scales:
    batch, heads, parts, _, channels = means.rows.shape
    device = means.rows.device
    out = torch.empty(5, batch, heads, channels, dtype=torch.float32, device=device)
    turn = torch.empty(batch, heads, channels, channels, dtype=torch.bfloat16, device=device)
    descale = torch.empty(batch, heads, dtype=torch.float32, device=device)
    _scale_kernel[(batch * heads,)](
        means.rows,
        _signs(device, channels),
        out,
        turn,
        descale,
        PARTS=parts,
        D=channels,
        RMS=RMS,
        TINY=TINY,
        num_warps=8,
    )
    k_mean, v_mean, q_factor, k_shift, v_factor = out.unbind()
    return Scales(k_mean, v_mean, q_factor, turn, k_shift, v_factor, descale)


def quantise_q(q: Tensor, scales: Scales) -> Tensor:
    q = _even(q)
    batch, tokens, heads, channels = q.shape
    out = torch.empty(q.shape, dtype=FLOAT8, device=q.device)
    # few programs read the signs once for many tiles and the next tile ahead
    parts, share = _shares(q, _TILE)
    _quantise_q_kernel[(parts, batch * heads)](
        q, scales.q_factor, _signs(q.device, channels), out, tokens, heads, *q.stride()[:3], SHARE=share,
        D=channels, TILE=_TILE,
        PRODUCT=_product(q), LARGEST=LARGEST, INTERPRETED=not q.is_cuda, num_warps=4,
    )  # fmt: skip
    return out


def quantise_kv(k: Tensor, v: Tensor, scales: Scales) -> Rounded:
    k = _even(k)
    v = _even(v)
    batch, tokens, heads, channels = k.shape
    parts, share = _shares(k, _SMALL_TILE)
    k8, v8 = (torch.empty(k.shape, dtype=FLOAT8, device=k.device) for _ in range(2))
    rows = torch.empty(batch, heads, parts, channels, dtype=torch.float32, device=k.device)
    product = torch.empty(batch, heads, parts, channels, channels, dtype=torch.float32, device=k.device)
    _quantise_kv_kernel[(parts, batch * heads)](
        k, v, scales.k_turn, scales.k_shift, scales.v_mean, scales.v_factor, k8, v8, rows, product, tokens,
        heads,
        *k.stride()[:3], *v.stride()[:3], SHARE=share, D=channels, TILE=_SMALL_TILE, FOLD=_fold(8,
        _SMALL_TILE, channels),
        PRODUCT=_product(k), EIGHT=tl.float16 if k.is_cuda else tl.float32, LARGEST=LARGEST,
        INTERPRETED=not k.is_cuda,
        num_warps=8, num_stages=3, maxnreg=128,
    )  # fmt: skip
    return Rounded(k8, v8, rows, product)


def correct(means: Means, scales: Scales, given: Rounded) -> tuple[Tensor, Tensor]:
    """As `fp8.correct`; the matrix in bfloat16."""
    batch, heads, parts, _, channels = means.product.shape
    device = means.product.device
    bias = torch.empty(batch, heads, channels, dtype=torch.float32, device=device)
    matrix = torch.empty(batch, heads, channels, channels, dtype=torch.bfloat16, device=device)
    _correct_kernel[(channels // _SLAB, batch * heads)](
        means.product, given.product, given.v_mean, scales.k_mean, scales.v_mean, scales.q_factor,
        scales.v_factor,
        scales.descale, _signs(device, channels), bias, matrix, PARTS=parts,
        GIVEN_PARTS=given.product.shape[2], D=channels,
        SLAB=_SLAB, PRODUCT=_product(bias), num_warps=8,
    )  # fmt: skip
    return bias, matrix


def finish(
    out: Tensor, lse: Tensor | None, q: Tensor, scales: Scales, bias: Tensor, matrix: Tensor
) -> tuple[Tensor, Tensor]:
    """As `fp8.finish`; the matrix in bfloat16."""
    given = _even(out)
    q = _even(q)
    batch, tokens, heads, channels = q.shape
    result = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    whole_lse = torch.empty(
        (0,) if lse is None else (batch, heads, tokens), dtype=torch.float32, device=q.device
    )
    parts, share = _shares(q, _TILE)
    _finish_kernel[(parts, batch * heads)](
        given, scales.v_factor, bias, q, matrix, scales.k_mean, bias if lse is None else lse.contiguous(),
        result, whole_lse,
        tokens, heads, *given.stride()[:3], *q.stride()[:3], SHARE=share, D=channels, TILE=_TILE,
        PRODUCT=_product(q),
        LSE=lse is not None, num_warps=8, maxnreg=128,
    )  # fmt: skip
    return result, whole_lse


STEPS = Steps(measure, scale, quantise_q, quantise_kv, correct, finish)
