"""Attention over two sets of keys, from the attention over each: weights by the log-sum-exp, sums in float32.

One pass over memory on a GPU (a Triton kernel), plain torch elsewhere and where Triton is missing. Knows
tensors only.
"""

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor


def merge(
    out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The two results as one.

    Args:
        out, part: [B, S, H, D], attention of the same queries over two sets of keys; any float dtype.
        lse, part_lse: [B, S, H] float32, their log-sum-exp.
        dtype: of the result: float32 to merge once more, else the queries' own.

    Returns:
        (out [B, S, H, D] in `dtype`, lse [B, S, H] float32) of the union of the keys.
    """
    if out.is_cuda and has_triton():
        from chitu_diffusion.ops.merge_lse_triton import merge_fused

        return merge_fused(out, lse, part, part_lse, dtype)
    both = torch.logaddexp(lse, part_lse)
    merged = out.float() * (lse - both).exp()[..., None] + part.float() * (part_lse - both).exp()[..., None]
    return merged.to(dtype), both


@cache
def has_triton() -> bool:
    """Whether it can be imported."""
    return find_spec("triton") is not None
