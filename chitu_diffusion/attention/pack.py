"""Heads of q, k and v side by side, a place for each peer that gets them: what Ulysses sends.

One pass over memory on a GPU (a Triton kernel), plain torch elsewhere and where Triton is missing. Knows tensors only.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from chitu_diffusion.attention.merge import has_triton


def pack(q: Tensor, k: Tensor, v: Tensor, places: Sequence[Tensor], share: int, first: int) -> None:
    """Copies heads p * share + first and following of q, k and v to places[p], for every p.

    Args:
        q, k, v: [B, S, H, D].
        places: contiguous, each [S, 3, B, h, D].
        share: heads between one place's first and the next one's.
        first: of the first place.
    """
    if q.is_cuda and has_triton():
        from chitu_diffusion.attention.pack_triton import pack_fused

        return pack_fused(q, k, v, places, share, first)
    for peer, place in enumerate(places):
        theirs = slice(peer * share + first, peer * share + first + place.shape[3])
        torch.stack([x[:, :, theirs].transpose(0, 1) for x in (q, k, v)], dim=1, out=place)
