"""A Triton kernel for the attention of many tokens to a text of few rows, with the norm of the queries
inside.

One program takes a tile of tokens. It reads their queries once for the mean square over all heads, and a
second time head by head, where they are normed, multiplied with the keys and summed over the values. So
normed queries are never written, and a row of the text may weigh as much as n equal ones: the bias is added
to the scores in float32, where a GPU's flash kernels take none. The plain torch that says the same is
`chitu_diffusion.attention.cross_attention`. It needs Triton; on a CPU it runs in Triton's interpreter
(TRITON_INTERPRET=1), which is for tests.
"""

from __future__ import annotations

import math
from functools import cache, lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from chitu_diffusion.ops.custom_op import operator
from chitu_diffusion.ops.fused_triton import on_device

_LOG2_E = 1 / math.log(2)
_SLOTS = 132
"""Programs that run at once: one on each multiprocessor of an H100 or H200."""
_SHARED = 227 * 1024
"""Bytes of shared memory that a program may have there."""


class Launch(NamedTuple):
    """How the kernel is started.

    Attributes:
        tile: tokens of a program.
        keys: rows of the text that are multiplied at a time.
        parts: programs that share the heads of a tile evenly; each reads all of its queries for the mean
            square.
        warps: of a program.
        stages: tiles of keys, under `unroll` heads, of which shared memory holds the keys and values: what is
            multiplied, and what is on its way.
        unroll: whether all keys of a head are one stage, so that the loop over heads is the innermost: no
            head begins with waiting.
    """

    tile: int
    keys: int
    parts: int
    warps: int
    stages: int
    unroll: bool


@triton.jit
def _add_keys(
    normed, top, total, attended, k, v, bias, start, length,
    HEAD_DIM: tl.constexpr, K_ROW: tl.constexpr, V_ROW: tl.constexpr, KEYS: tl.constexpr, BIAS: tl.constexpr,
    SCORE_SCALE: tl.constexpr, LOG2_E: tl.constexpr,
):  # fmt: skip
    # one tile of keys: the sums of exponentials and of weighted values, below the highest score so far
    near = tl.arange(0, KEYS)
    channel = tl.arange(0, HEAD_DIM)
    known = near < length - start
    k_at = (start + near.to(tl.int64))[:, None] * K_ROW + channel[None, :]  # [KEYS, HEAD_DIM]
    v_at = (start + near.to(tl.int64))[:, None] * V_ROW + channel[None, :]
    keys = tl.load(k + k_at, mask=known[:, None], other=0.0)
    extra = tl.where(known, 0.0, float("-inf"))
    if BIAS:
        extra = tl.load(bias + start + near, mask=known, other=float("-inf")) * LOG2_E
    # to base 2, for which a GPU has an instruction
    scores = tl.dot(normed, tl.trans(keys), input_precision="ieee") * SCORE_SCALE + extra[None, :]
    higher = tl.maximum(top, tl.max(scores, axis=1))
    shares = tl.exp2(scores - higher[:, None])
    fade = tl.exp2(top - higher)
    values = tl.load(v + v_at, mask=known[:, None], other=0.0)
    attended = tl.dot(shares.to(values.dtype), values, attended * fade[:, None], input_precision="ieee")
    return higher, total * fade + tl.sum(shares, axis=1), attended


@triton.jit(do_not_specialize=["rows", "length"])
def _cross_attention(
    q, weight, k, v, bias, out, rows, length, k_batch, k_head, v_batch, v_head, bias_batch, eps,
    HEADS: tl.constexpr, OWN_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, K_ROW: tl.constexpr,
    V_ROW: tl.constexpr,
    TILE: tl.constexpr, KEYS: tl.constexpr, WHOLE: tl.constexpr, REST: tl.constexpr, UNROLL: tl.constexpr,
    BIAS: tl.constexpr, SCORE_SCALE: tl.constexpr, LOG2_E: tl.constexpr,
):  # fmt: skip
    # strides are constants and places have 64 bits from the start: so one address does for all rows of a
    # thread, which leaves its registers to the products
    batch = tl.program_id(2).to(tl.int64)
    begin = tl.program_id(1) * TILE
    own = tl.arange(0, TILE)
    channel = tl.arange(0, HEAD_DIM)
    at = own.to(tl.int64)[:, None] * (HEADS * HEAD_DIM) + channel[None, :]  # [TILE, HEAD_DIM]
    base = (batch * rows + begin) * (HEADS * HEAD_DIM)
    inside = (own < rows - begin)[:, None]
    squares = tl.zeros((TILE,), tl.float32)
    for head in tl.range(0, HEADS, num_stages=3):
        x = tl.load(q + base + head * HEAD_DIM + at, mask=inside, other=0.0).to(tl.float32)
        squares += tl.sum(x * x, axis=1)
    factor = 1.0 / tl.sqrt(squares / (HEADS * HEAD_DIM) + eps)
    first = tl.program_id(0) * OWN_HEADS
    x = tl.load(q + base + first * HEAD_DIM + at, mask=inside, other=0.0)
    bias += batch * bias_batch
    for turn in range(OWN_HEADS):
        head = first + turn
        w = tl.load(weight + head * HEAD_DIM + channel).to(tl.float32)
        normed = (x.to(tl.float32) * factor[:, None] * w[None, :]).to(k.dtype.element_ty)
        # the next head's are on their way while this one's are multiplied
        x = tl.load(q + base + (head + 1) * HEAD_DIM + at, mask=inside & (turn + 1 < OWN_HEADS), other=0.0)
        k_here = k + batch * k_batch + head * k_head
        v_here = v + batch * v_batch + head * v_head
        # a finite number below all scores: keys that weigh nothing must not make infinity less infinity
        top = tl.full((TILE,), -1e30, tl.float32)
        total = tl.zeros((TILE,), tl.float32)
        attended = tl.zeros((TILE, HEAD_DIM), tl.float32)
        # so that the loop over heads is the innermost, and the next head's keys are on their way, too
        if UNROLL:
            for start in tl.static_range(0, WHOLE * KEYS, KEYS):
                top, total, attended = _add_keys(
                    normed, top, total, attended, k_here, v_here, bias, start, length,
                    HEAD_DIM, K_ROW, V_ROW, KEYS, BIAS, SCORE_SCALE, LOG2_E,
                )  # fmt: skip
        else:
            for start in range(0, WHOLE * KEYS, KEYS):
                top, total, attended = _add_keys(
                    normed, top, total, attended, k_here, v_here, bias, start, length,
                    HEAD_DIM, K_ROW, V_ROW, KEYS, BIAS, SCORE_SCALE, LOG2_E,
                )  # fmt: skip
        if REST:
            top, total, attended = _add_keys(
                normed, top, total, attended, k_here, v_here, bias, WHOLE * KEYS, length,
                HEAD_DIM, K_ROW, V_ROW, REST, BIAS, SCORE_SCALE, LOG2_E,
            )  # fmt: skip
        attended *= (1.0 / total)[:, None]
        tl.store(out + base + head * HEAD_DIM + at, attended.to(out.dtype.element_ty), mask=inside)


@operator(
    "chitu_diffusion::cross_attention",
    schema="(Tensor q, Tensor weight, Tensor k, Tensor v, Tensor? bias, float eps) -> Tensor",
)
def cross_attention(
    q: Tensor, weight: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, eps: float
) -> Tensor:
    """Queries [B, S, heads * head_dim], RMS-normed over all heads, attend to the few rows of a text.

    Args:
        q: in any float dtype; it is normed in float32 and rounded once, to that of the keys.
        weight: of the norm, [heads * head_dim].
        k, v: [B or 1, L, heads, head_dim] in one dtype, strided as they are; head_dim a power of two from 16
            on.
        bias: [B or 1, L] float32, added to the scores, or None.
        eps: added to the mean square.

    Returns:
        [B, S, heads, head_dim] in v's dtype.
    """
    batch, rows, _ = q.shape
    length, heads, width = k.shape[1:]
    q = q.contiguous()
    weight = weight.contiguous()
    k, v = ((x if x.stride(-1) == 1 else x.contiguous()).expand(batch, -1, -1, -1) for x in (k, v))
    if bias is not None:
        bias = bias.float().contiguous().expand(batch, -1)
    out = torch.empty((batch, rows, heads, width), dtype=v.dtype, device=q.device)
    how = launch_text(batch, rows, length, heads, width, k.dtype, _shared_memory(q.device))
    whole, rest = _split(length, how.keys) if how.unroll else (triton.cdiv(length, how.keys), 0)
    with on_device(q):
        _cross_attention[(how.parts, triton.cdiv(rows, how.tile), batch)](
            q,
            weight,
            k,
            v,
            q if bias is None else bias,
            out,
            rows,
            length,
            k.stride(0),
            k.stride(2),
            v.stride(0),
            v.stride(2),
            0 if bias is None else bias.stride(0),
            eps,
            HEADS=heads,
            OWN_HEADS=heads // how.parts,
            HEAD_DIM=width,
            K_ROW=k.stride(1),
            V_ROW=v.stride(1),
            TILE=how.tile,
            KEYS=how.keys,
            WHOLE=whole,
            REST=rest,
            UNROLL=how.unroll,
            BIAS=bias is not None,
            SCORE_SCALE=width**-0.5 * _LOG2_E,
            LOG2_E=_LOG2_E,
            num_warps=how.warps,
            num_stages=how.stages,
        )
    return out


@cross_attention.register_fake
def _(q: Tensor, weight: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    return torch.empty((*q.shape[:2], *k.shape[2:]), dtype=v.dtype, device=q.device)


@lru_cache(maxsize=64)
def launch_text(
    batch: int, rows: int, length: int, heads: int, head_dim: int, dtype: torch.dtype, shared: int = _SHARED
) -> Launch:
    """How to start the kernel, for q [batch, rows, heads * head_dim], a text of `length` rows and bytes of
    shared memory.

    128 tokens and 8 warps hold a head's sums, its queries, the next head's and a tile of scores in some 200
    registers a thread; then one program fills a multiprocessor. Tiles of half that size would read the keys
    twice as often. Where a short sequence leaves multiprocessors idle, several programs share a tile's heads:
    each reads all queries once, which is about a quarter of the work.
    """
    tile, keys, warps = (128, 64, 8) if dtype.itemsize == 2 else (32, 32, 4)
    whole, rest = _split(length, keys)
    held = whole * keys + rest
    row = head_dim * dtype.itemsize
    small = 2048
    ways = [(True, held), (False, keys)] if held <= 3 * keys else [(False, keys)]
    # with three stages, loads are under way while another head, or tile, is multiplied; with two, only in
    # between
    fitting = [
        (stages, unroll)
        for unroll, stage in ways
        for stages in (3, 2)
        if (tile + 2 * stages * stage) * row + small <= shared
    ]
    stages, unroll = fitting[0] if fitting else (1, False)
    if not fitting:
        tile = tile // 2
        warps = warps // 2
    tiles = batch * triton.cdiv(rows, tile)

    def cost(parts: int) -> int:
        return triton.cdiv(tiles * parts, _SLOTS) * (heads + 3 * heads // parts)

    parts = min((parts for parts in range(1, heads + 1) if heads % parts == 0), key=cost)
    return Launch(tile, keys, parts, warps, stages, unroll)


def _split(length: int, keys: int) -> tuple[int, int]:
    """How many whole tiles of keys, and of how many the last one is made: a power of two from 16 on, or 0."""
    whole, rest = divmod(length, keys)
    return whole, rest and max(16, triton.next_power_of_2(rest))


@cache
def _shared_memory(device: torch.device) -> int:
    """Bytes that a program may have; a CPU plays an H100."""
    if device.type != "cuda":
        return _SHARED
    index = torch.cuda.current_device() if device.index is None else device.index
    return int(triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"])
