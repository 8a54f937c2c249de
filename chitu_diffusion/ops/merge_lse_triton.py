"""`merge` as one Triton kernel: reads both results once, writes one. Imported only where Triton is."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_TOKENS = 32


@triton.jit
def _merge_kernel(  # type: ignore[no-untyped-def]
    out_ptr, lse_ptr, part_ptr, part_lse_ptr, merged_ptr, both_ptr,
    tokens, heads, channels,
    out_b, out_s, out_h, lse_b, lse_s, lse_h, part_b, part_s, part_h, plse_b, plse_s, plse_h,
    TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    # one program: TOKENS tokens of one head of one batch element
    # a batch may pass 2^31 numbers
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = tl.program_id(1) % heads
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    channel = tl.arange(0, CHANNELS)
    here = token < tokens
    whole = here[:, None] & (channel < channels)[None, :]
    row = token.to(tl.int64)
    one = tl.load(lse_ptr + batch * lse_b + row * lse_s + head * lse_h, mask=here, other=0.0)
    two = tl.load(part_lse_ptr + batch * plse_b + row * plse_s + head * plse_h, mask=here, other=0.0)
    most = tl.maximum(one, two)
    both = most + tl.log(tl.exp(one - most) + tl.exp(two - most))
    x = tl.load(
        out_ptr + batch * out_b + row[:, None] * out_s + head * out_h + channel[None, :],
        mask=whole,
        other=0.0,
    )
    y = tl.load(
        part_ptr + batch * part_b + row[:, None] * part_s + head * part_h + channel[None, :],
        mask=whole,
        other=0.0,
    )
    merged = x.to(tl.float32) * tl.exp(one - both)[:, None] + y.to(tl.float32) * tl.exp(two - both)[:, None]
    place = (batch * tokens + row) * heads + head  # of a contiguous [B, S, H]
    tl.store(
        merged_ptr + place[:, None] * channels + channel[None, :],
        merged.to(merged_ptr.dtype.element_ty),
        mask=whole,
    )
    tl.store(both_ptr + place, both, mask=here)


def merge_fused(
    out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    out, part = (x if x.stride(3) == 1 else x.contiguous() for x in (out, part))
    batch, tokens, heads, channels = out.shape
    merged = torch.empty(out.shape, dtype=dtype, device=out.device)
    both = torch.empty(lse.shape, dtype=torch.float32, device=out.device)
    grid: Any = (triton.cdiv(tokens, _TOKENS), batch * heads)
    strides = (*out.stride()[:3], *lse.stride(), *part.stride()[:3], *part_lse.stride())
    _merge_kernel[grid](
        out, lse, part, part_lse, merged, both, tokens, heads, channels, *strides,
        TOKENS=_TOKENS, CHANNELS=triton.next_power_of_2(channels),
    )  # fmt: skip
    return merged, both
