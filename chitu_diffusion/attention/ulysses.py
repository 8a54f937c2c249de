"""Ulysses: ranks trade heads for tokens around an attention (DeepSpeed Ulysses, arXiv:2309.14509).

Each rank comes with its tokens and all heads, attends with all the group's tokens and its share of the heads, and leaves
with its tokens and all heads. Two exchanges a call: q, k and v packed into one, and the output; each tensor is copied
once on either side, and what a rank keeps for itself does not travel. Large exchanges go in two pieces, half of the heads
each, so that one travels while the other is computed. A rank's traffic is 4 B s d (P - 1) / P numbers,
s its tokens and d all heads' channels. Tokens may be shared unevenly; nothing is padded.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from chitu_diffusion.attention.kernels import AttentionFn
from chitu_diffusion.attention.peers import Peers
from chitu_diffusion.attention.turns import Attend, Finish
from chitu_diffusion.errors import UsageError

Arrived = Callable[[], None]
_WORTH_TWO_PIECES = 8 * 2**20


def pieces_for(heads: int, sent: float) -> int:
    """In how many pieces a rank's heads go: two where the first exchange is so large that hiding half of it is worth more
    than a call more.

    Args:
        heads: of one rank.
        sent: bytes that a rank with the longest shard sends with q, k and v.
    """
    return 2 if heads > 1 and sent >= _WORTH_TWO_PIECES else 1


def ulysses(inner: AttentionFn, peers: Peers, lengths: Sequence[int], pieces: int | None = None) -> AttentionFn:
    """An attention over the tokens of all peers.

    Args:
        inner: attends with [B, sum(lengths), heads of a piece, D].
        peers: the group, in the order of its tokens.
        lengths: each peer's tokens.
        pieces: a rank's heads are attended to in so many calls, at most one a head; while one is computed, the next one's q,
            k and v arrive and the last one's output leaves. None leaves it to `pieces_for`.

    Returns:
        (q, k, v) -> out, all [B, lengths[own], H, D]; a `Ulysses`, or `inner` itself where there is one peer.

    Raises:
        UsageError: when called with heads that the group does not divide.
    """
    return inner if peers.size == 1 else Ulysses(inner, peers, tuple(lengths), pieces)


@dataclass(frozen=True)
class Ulysses:
    """See `ulysses`; `begin` as in `attention.turns`."""

    inner: AttentionFn
    peers: Peers
    lengths: tuple[int, ...]
    pieces: int | None = None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        share = self._share(q)
        # of the longest shard, not ours: all ranks must decide alike
        sent = 3 * q.shape[0] * max(self.lengths) * (q.shape[2] - share) * q.shape[3] * q.element_size()
        return self._begin(q, k, v, self.pieces or pieces_for(share, sent))()()

    def begin(self, q: Tensor, k: Tensor, v: Tensor) -> Attend:
        """q, k and v are on their way when this returns, in one piece: another call's work hides them whole."""
        return self._begin(q, k, v, 1)

    def _begin(self, q: Tensor, k: Tensor, v: Tensor, pieces: int) -> Attend:
        peers, rows, share = self.peers, list(self.lengths), self._share(q)
        coming, first = [], 0
        for some in shard_heads(share, pieces):
            here = q.new_empty(sum(rows), 3, q.shape[0], some, q.shape[3])  # q, k, v of everybody's tokens, our heads
            arriving, leaving = list(here.split(rows)), list(q.new_empty(peers.size, q.shape[1], *here.shape[1:]).unbind())
            leaving[peers.index] = arriving[peers.index]  # what stays is written where it will be read
            for peer, place in enumerate(leaving):
                theirs = slice(peer * share + first, peer * share + first + some)
                torch.stack([x[:, :, theirs].transpose(0, 1) for x in (q, k, v)], dim=1, out=place)
            coming.append((here, peers.swap(leaving, arriving)))
            first += some
        return partial(self._attend, coming)

    def _attend(self, coming: Sequence[tuple[Tensor, Arrived]]) -> Finish:
        peers, leaving_soon = self.peers, []
        for here, arrived in coming:
            arrived()
            out = self.inner(*(part.transpose(0, 1) for part in here.unbind(1)))  # [B, S, h, D]
            leaving = list(out.transpose(0, 1).contiguous().split(list(self.lengths)))
            back = list(out.new_empty(peers.size, *leaving[peers.index].shape).unbind())  # our tokens, everybody's heads
            back[peers.index] = leaving[peers.index]
            leaving_soon.append((back, peers.swap(leaving, back)))
        return partial(self._finish, leaving_soon)

    def _finish(self, leaving_soon: Sequence[tuple[Sequence[Tensor], Arrived]]) -> Tensor:
        for _, returned in leaving_soon:
            returned()
        # [s, B, h, D] of each peer's piece -> [B, s, H, D], heads in their order
        pieces = [back[peer].transpose(0, 1) for peer in range(self.peers.size) for back, _ in leaving_soon]
        return torch.cat(pieces, dim=2)

    def _share(self, q: Tensor) -> int:
        """Heads of one rank."""
        heads = q.shape[2]
        if heads % self.peers.size:
            raise UsageError(f"{heads} heads cannot be shared by {self.peers.size} ranks", field="infer.diffusion.up")
        return heads // self.peers.size


def shard_heads(heads: int, pieces: int) -> list[int]:
    """Heads of each piece, as even as can be; no more pieces than heads."""
    pieces = min(heads, pieces)
    return [heads // pieces + (piece < heads % pieces) for piece in range(pieces)]
