"""`pack` as one Triton kernel: every number is read and written once. Imported only where Triton is."""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

_TOKENS = 32


@triton.jit
def _pack_kernel(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr, v_ptr, away_ptr, own_ptr,
    tokens, batch, heads, channels, index, share, first,
    q_b, q_s, q_h, k_b, k_s, k_h, v_b, v_s, v_h,
    TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    # one program: TOKENS tokens of one head of one batch element, of q, k and v, for one place
    peer = tl.program_id(2)
    first += peer * share
    # a batch may pass 2^31 numbers
    element = (tl.program_id(1) // heads).to(tl.int64)
    head = tl.program_id(1) % heads
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    channel = tl.arange(0, CHANNELS)
    whole = (token < tokens)[:, None] & (channel < channels)[None, :]
    row = token.to(tl.int64)[:, None]
    q = tl.load(q_ptr + element * q_b + row * q_s + (first + head) * q_h + channel[None, :], mask=whole)
    k = tl.load(k_ptr + element * k_b + row * k_s + (first + head) * k_h + channel[None, :], mask=whole)
    v = tl.load(v_ptr + element * v_b + row * v_s + (first + head) * v_h + channel[None, :], mask=whole)
    # of a contiguous [S, 3, B, h, D]
    step = batch * heads * channels
    place_ptr = own_ptr if peer == index else away_ptr + peer.to(tl.int64) * tokens * 3 * step
    place = place_ptr + row * 3 * step + (element * heads + head) * channels + channel[None, :]
    tl.store(place, q, mask=whole)
    tl.store(place + step, k, mask=whole)
    tl.store(place + 2 * step, v, mask=whole)


def pack_fused(
    q: Tensor, k: Tensor, v: Tensor, away: Tensor, own: Tensor, index: int, share: int, first: int
) -> None:
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    tokens, _, batch, heads, channels = own.shape
    grid: Any = (triton.cdiv(tokens, _TOKENS), batch * heads, len(away))
    _pack_kernel[grid](
        q, k, v, away, own, tokens, batch, heads, channels, index, share, first,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        TOKENS=_TOKENS, CHANNELS=triton.next_power_of_2(channels),
    )  # fmt: skip
