"""What is shared out over ranks, and the whole again: tokens of a sequence, guidance branches, a text, strips
of a video. Shards may differ in length by one; where there are not as many branches as ranks, each rank runs
all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from chitu_diffusion.attention.kernels import AttentionFn, AttentionKernel
from chitu_diffusion.distributed.collectives import Collectives
from chitu_diffusion.distributed.plan import shard_lengths
from chitu_diffusion.distributed.ring import ring
from chitu_diffusion.distributed.ulysses import ulysses
from chitu_diffusion.errors import UsageError

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MOST_AXES = 5


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
    def of(cls, total: int, group: Collectives) -> Shards:
        """Even shards of `total` rows.

        Raises:
            UsageError: fewer rows than ranks.
        """
        if total < group.size:
            field = "infer.diffusion.cp_size"
            raise UsageError(
                f"{total} tokens cannot be shared by {group.size} ranks; use at most {total}", field=field
            )
        return cls(shard_lengths(total, group.size), group.index)

    @property
    def own(self) -> tuple[int, int]:
        """Our rows: from the first to before the second."""
        low = sum(self.lengths[: self.index])
        return low, low + self.lengths[self.index]

    def gather(self, x: Tensor, group: Collectives) -> Tensor:
        """Every rank's rows [B, own, C] as the whole [B, S, C].

        Shorter shards travel with one row of padding, which is dropped on arrival.
        """
        missing = max(self.lengths) - x.shape[1]
        sent = torch.nn.functional.pad(x, (0, 0, 0, missing)).contiguous()
        parts = group.all_gather(sent)
        return torch.cat([part[:, :length] for part, length in zip(parts, self.lengths, strict=True)], dim=1)


def sharded_attention(
    kernel: AttentionKernel, ulysses_group: Collectives, ring_group: Collectives, lengths: tuple[int, ...]
) -> AttentionFn:
    """Self-attention over a sharded sequence: Ulysses inside, the ring outside, one exchange back at the end.

    Args:
        kernel: of one rank.
        ulysses_group: neighbours in the sequence.
        ring_group: ranks with the same heads.
        lengths: of every shard of the whole sequence, in order.

    Returns:
        (q, k, v, where) -> out, each [B, own tokens, H, D]; `kernel` itself where one rank has the whole
        sequence.
    """
    degree = ulysses_group.size
    neighbourhoods = [lengths[first : first + degree] for first in range(0, len(lengths), degree)]
    passed = ring(kernel, ring_group, [sum(shards) for shards in neighbourhoods])
    # with a ring inside, whose own exchanges are hidden already, a second piece would only double their
    # number
    pieces = None if ring_group.size == 1 else 1
    return ulysses(passed, ulysses_group, neighbourhoods[ring_group.index], pieces)


def own_branches(branches: tuple[int, ...], group: Collectives) -> tuple[int, ...]:
    """The branches that this rank runs: one where there is one for each rank, else all."""
    return branches[group.index : group.index + 1] if len(branches) == group.size else branches


def all_branches(velocity: Tensor, branches: int, group: Collectives) -> Tensor:
    """The velocity of every branch, [branches * B, ...], from that of `own_branches`."""
    return torch.cat(group.all_gather(velocity.contiguous())) if branches == group.size else velocity


def broadcast_from_rank0(compute: Callable[[], Tensor], group: Collectives, device: torch.device) -> Tensor:
    """What `compute` gives on the first peer, on every peer. Its shape and dtype travel ahead of it.

    Args:
        compute: called on the first peer alone; at most 5 axes, a float dtype.
        group: the ranks that share.
        device: where the result shall lie on the others.
    """
    if group.size == 1:
        return compute()
    first = compute().to(device).contiguous() if group.index == 0 else None
    header = torch.zeros(2 + _MOST_AXES, dtype=torch.int64)
    if first is not None:
        header[: 2 + first.ndim] = torch.tensor([_DTYPES.index(first.dtype), first.ndim, *first.shape])
    kind, axes, *shape = group.broadcast(header.to(device)).tolist()
    return group.broadcast(
        first if first is not None else torch.empty(shape[:axes], dtype=_DTYPES[kind], device=device)
    )


def gather_strips(
    compute: Callable[[int, int], Tensor], cells: int, axis: int, group: Collectives
) -> Tensor | None:
    """Strips of one tensor, each computed by one peer, put together on the first.

    Args:
        compute: (low, high) of a strip in cells -> the strip, as long along `axis` as it has cells, times a
            constant.
        cells: the length of all strips together.
        axis: along which they lie; from the end, so negative.
        group: the ranks that share; those for whom no cell is left do nothing.

    Returns:
        the whole on the first peer, None on the others.
    """
    lengths = shard_lengths(cells, group.size)
    low = sum(lengths[: group.index])
    own = compute(low, low + lengths[group.index]) if lengths[group.index] else None
    if group.index > 0:
        if own is not None:
            group.send_to_rank0(own)
        return None
    assert own is not None
    strips = [own]
    scale = own.shape[axis] // lengths[0]
    for index in range(1, group.size):
        if lengths[index]:
            shape = list(own.shape)
            shape[axis] = lengths[index] * scale
            strips.append(group.recv_from(index, own.new_empty(shape)))
    return torch.cat(strips, dim=axis)
