"""What one rank has and all need, and what all have and one needs: text embeddings, and strips of a video."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from chitu_diffusion.distributed.collectives import Peers
from chitu_diffusion.distributed.plan import shard_lengths

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MOST_AXES = 5


def from_first(compute: Callable[[], Tensor], peers: Peers, device: torch.device) -> Tensor:
    """What `compute` gives on the first peer, on every peer. Its shape and dtype travel ahead of it.

    Args:
        compute: called on the first peer alone; at most 5 axes, a float dtype.
        peers: who shares.
        device: where the result shall lie on the others.
    """
    if peers.size == 1:
        return compute()
    first = compute().to(device).contiguous() if peers.index == 0 else None
    header = torch.zeros(2 + _MOST_AXES, dtype=torch.int64)
    if first is not None:
        header[: 2 + first.ndim] = torch.tensor([_DTYPES.index(first.dtype), first.ndim, *first.shape])
    kind, axes, *shape = peers.broadcast(header.to(device)).tolist()
    return peers.broadcast(
        first if first is not None else torch.empty(shape[:axes], dtype=_DTYPES[kind], device=device)
    )


def strips_on_first(
    compute: Callable[[int, int], Tensor], cells: int, axis: int, peers: Peers
) -> Tensor | None:
    """Strips of one tensor, each computed by one peer, put together on the first.

    Args:
        compute: (low, high) of a strip in cells -> the strip, as long along `axis` as it has cells, times a
            constant.
        cells: the length of all strips together.
        axis: along which they lie; from the end, so negative.
        peers: who shares; those for whom no cell is left do nothing.

    Returns:
        the whole on the first peer, None on the others.
    """
    lengths = shard_lengths(cells, peers.size)
    low = sum(lengths[: peers.index])
    own = compute(low, low + lengths[peers.index]) if lengths[peers.index] else None
    if peers.index > 0:
        if own is not None:
            peers.send_to_first(own)
        return None
    assert own is not None
    strips, scale = [own], own.shape[axis] // lengths[0]
    for index in range(1, peers.size):
        if lengths[index]:
            shape = list(own.shape)
            shape[axis] = lengths[index] * scale
            strips.append(peers.receive_from(index, own.new_empty(shape)))
    return torch.cat(strips, dim=axis)
