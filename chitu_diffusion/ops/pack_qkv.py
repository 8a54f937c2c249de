"""Heads of q, k and v side by side, a place for each peer that gets them: what Ulysses sends.

One pass over memory on a GPU (a Triton kernel), plain torch elsewhere and where Triton is missing. Knows
tensors only.
"""

import torch
from torch import Tensor

from chitu_diffusion.ops.merge_lse import has_triton


def pack(
    q: Tensor, k: Tensor, v: Tensor, away: Tensor, own: Tensor, index: int, share: int, first: int
) -> None:
    """Copies heads p * share + first and following of q, k and v to place p: `own` for p = index, else
    away[p].

    Args:
        q, k, v: [B, S, H, D].
        away: contiguous, [P, S, 3, B, h, D]; away[index] is left alone.
        own: contiguous, [S, 3, B, h, D].
        index: the place that is `own`.
        share: heads between one place's first and the next one's.
        first: of the first place.
    """
    if q.is_cuda and has_triton():
        from chitu_diffusion.ops.pack_qkv_triton import pack_fused

        return pack_fused(q, k, v, away, own, index, share, first)
    for peer in range(len(away)):
        theirs = slice(peer * share + first, peer * share + first + own.shape[3])
        place = own if peer == index else away[peer]
        torch.stack([x[:, :, theirs].transpose(0, 1) for x in (q, k, v)], dim=1, out=place)
