"""A sequence of tokens in shards: which rows are ours, and the whole again. Shards may differ in length by
one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from chitu_diffusion.attention.kernels import AttentionFn, AttentionKernel
from chitu_diffusion.distributed.collectives import Peers
from chitu_diffusion.distributed.plan import shard_lengths
from chitu_diffusion.distributed.ring import ring
from chitu_diffusion.distributed.ulysses import ulysses
from chitu_diffusion.errors import UsageError


@dataclass(frozen=True)
class Shards:
    """Rows of a sequence over the ranks of a group.

    Attributes:
        lengths: of every shard, in order.
        index: ours.
    """

    lengths: tuple[int, ...]
    index: int

    @classmethod
    def of(cls, total: int, peers: Peers) -> Shards:
        """Even shards of `total` rows.

        Raises:
            UsageError: fewer rows than ranks.
        """
        if total < peers.size:
            field = "infer.diffusion.cp_size"
            raise UsageError(
                f"{total} tokens cannot be shared by {peers.size} ranks; at most {total} would do",
                field=field,
            )
        return cls(shard_lengths(total, peers.size), peers.index)

    def take(self, x: Tensor, dim: int) -> Tensor:
        """Our rows of x along `dim`, as a view."""
        return x.narrow(dim, sum(self.lengths[: self.index]), self.lengths[self.index])

    def gather(self, x: Tensor, peers: Peers) -> Tensor:
        """Every rank's rows [B, own, C] as the whole [B, S, C].

        Shorter shards travel with one row of padding, which is dropped on arrival.
        """
        missing = max(self.lengths) - x.shape[1]
        sent = torch.nn.functional.pad(x, (0, 0, 0, missing)).contiguous()
        parts = peers.all_gather(sent)
        return torch.cat([part[:, :length] for part, length in zip(parts, self.lengths, strict=True)], dim=1)


def sharded_attention(
    kernel: AttentionKernel, ulysses_peers: Peers, ring_peers: Peers, lengths: tuple[int, ...]
) -> AttentionFn:
    """Self-attention over a sharded sequence: Ulysses inside, the ring outside, one exchange back at the end.

    Args:
        kernel: of one rank.
        ulysses_peers: neighbours in the sequence.
        ring_peers: ranks with the same heads.
        lengths: of every shard of the whole sequence, in order.

    Returns:
        (q, k, v) -> out, each [B, own tokens, H, D]; `kernel` itself where one rank has the whole sequence.
    """
    degree = ulysses_peers.size
    neighbourhoods = [lengths[first : first + degree] for first in range(0, len(lengths), degree)]
    passed = ring(kernel, ring_peers, [sum(shards) for shards in neighbourhoods])
    # with a ring inside, whose own exchanges are hidden already, a second piece would only double their
    # number
    pieces = None if ring_peers.size == 1 else 1
    return ulysses(passed, ulysses_peers, neighbourhoods[ring_peers.index], pieces)
