"""Ulysses: ranks trade heads for tokens around an attention (DeepSpeed Ulysses, arXiv:2309.14509).

Each rank comes with its tokens and all heads, attends with all the group's tokens and its share of the heads, and leaves
with its tokens and all heads. Two exchanges a call: q, k and v packed into one, and the output; each tensor is copied
once on either side, and what a rank keeps for itself does not travel. A rank's traffic is 4 B s d (P - 1) / P numbers,
s its tokens and d all heads' channels. Tokens may be shared unevenly; nothing is padded.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from chitu_diffusion.attention.kernels import AttentionFn
from chitu_diffusion.attention.peers import Peers
from chitu_diffusion.errors import UsageError


def ulysses(inner: AttentionFn, peers: Peers, lengths: Sequence[int]) -> AttentionFn:
    """An attention over the tokens of all peers.

    Args:
        inner: attends with [B, sum(lengths), H / P, D].
        peers: the group, in the order of its tokens.
        lengths: each peer's tokens.

    Returns:
        (q, k, v) -> out, all [B, lengths[own], H, D].

    Raises:
        UsageError: when called with heads that the group does not divide.
    """
    if peers.size == 1:
        return inner
    rows = list(lengths)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch, own, heads, channels = q.shape
        if heads % peers.size:
            raise UsageError(f"{heads} heads cannot be shared by {peers.size} ranks", field="infer.diffusion.up")
        share, index = heads // peers.size, peers.index
        here = q.new_empty(sum(rows), 3, batch, share, channels)  # q, k, v of everybody's tokens, our heads
        arriving, leaving = here.split(rows), list(q.new_empty(peers.size, own, *here.shape[1:]).unbind())
        leaving[index] = arriving[index]  # what stays is written where it will be read
        for peer, place in enumerate(leaving):
            theirs = slice(peer * share, (peer + 1) * share)
            torch.stack([x[:, :, theirs].transpose(0, 1) for x in (q, k, v)], dim=1, out=place)
        peers.swap(leaving, arriving)
        out = inner(*(part.transpose(0, 1) for part in here.unbind(1)))  # [B, S, h, D]
        leaving = list(out.transpose(0, 1).contiguous().split(rows))
        back = list(out.new_empty(peers.size, *leaving[index].shape).unbind())  # our tokens, everybody's heads
        back[index] = leaving[index]
        peers.swap(leaving, back)
        return torch.stack([part.transpose(0, 1) for part in back], dim=2).flatten(2, 3)  # [B, s, P, h, D] -> [B, s, H, D]

    return attend
