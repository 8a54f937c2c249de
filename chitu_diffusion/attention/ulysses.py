"""Ulysses: ranks trade heads for tokens around an attention (DeepSpeed Ulysses, arXiv:2309.14509).

Each rank comes with its tokens and all heads, attends with all the group's tokens and its share of the heads, and leaves
with its tokens and all heads. Two exchanges a call: q, k and v packed into one, and the output. A rank's traffic is
4 B s d (P - 1) / P numbers, s its tokens and d all heads' channels. Tokens may be shared unevenly; nothing is padded.
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
    receive = list(lengths)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch, own, heads, channels = q.shape
        if heads % peers.size:
            raise UsageError(f"{heads} heads cannot be shared by {peers.size} ranks", field="infer.diffusion.up")
        share, send = heads // peers.size, [own] * peers.size
        # [3, B, s, P, h, D] -> rows [P * s, 3, B, h, D]: peer p gets its heads of all our tokens
        packed = torch.stack([q, k, v]).unflatten(3, (peers.size, share)).permute(3, 2, 0, 1, 4, 5)
        rows = packed.reshape(peers.size * own, 3, batch, share, channels)
        here = peers.all_to_all(rows, send, receive)  # [S, 3, B, h, D]
        out = inner(*(part.transpose(0, 1) for part in here.unbind(1)))  # [B, S, h, D]
        back = peers.all_to_all(out.transpose(0, 1).contiguous(), receive, send)
        # [P, s, B, h, D] -> [B, s, P, h, D]
        return back.unflatten(0, (peers.size, own)).permute(2, 1, 0, 3, 4).flatten(2, 3)

    return attend
