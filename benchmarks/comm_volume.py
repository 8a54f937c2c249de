"""What travels between ranks in one guided forward: by formula, and counted. Arithmetic and a wrapper; no
process.

The formulas are those of DeepSpeed Ulysses (arXiv:2309.14509) and ring attention (arXiv:2310.01889) for one
packed exchange of q, k, v and one of the output, and for keys and values that visit everyone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from chitu_diffusion.distributed.collectives import Collectives, RecvBuffer
from chitu_diffusion.distributed.plan import ParallelPlan

PACKED = 3 / 4
"""The share of Ulysses' traffic that goes out with q, k and v; the rest comes back with the output."""


@dataclass(frozen=True)
class Traffic:
    """Numbers that one rank sends in one guided forward, by the axis along which they go.

    Attributes:
        ulysses, ring: in all blocks together.
        gather: of the output projection.
        guidance: of the velocity.
    """

    ulysses: float
    ring: float
    gather: float
    guidance: float

    @property
    def total(self) -> float:
        """All together."""
        return self.ulysses + self.ring + self.gather + self.guidance


def traffic(
    plan: ParallelPlan,
    *,
    tokens: int,
    dim: int,
    blocks: int,
    values: int,
    latent: int,
    branches: int = 2,
    batch: int = 1,
    shared: int = 0,
) -> Traffic:
    """By formula, for shards of mean length.

    Args:
        plan: the layout.
        tokens: of the whole sequence.
        dim: all heads' channels.
        blocks: of the network.
        values: that the output projection gives for a token.
        latent: numbers in one velocity.
        branches: of the guidance; with as many ranks along it, each runs one.
        batch: videos at once.
        shared: self-attentions that the branches of one rank have in common, and so run once.
    """
    each = 1 if branches == plan.cfg else branches
    forwards = batch * each
    attentions = batch * (each * blocks - (each - 1) * shared)
    own = tokens / plan.sequence
    return Traffic(
        ulysses=attentions * 4 * own * dim * (plan.ulysses - 1) / plan.ulysses,
        ring=attentions * 2 * own * dim * (plan.ring - 1),
        gather=forwards * own * values * (plan.sequence - 1),
        guidance=batch * latent * (plan.cfg - 1) if branches == plan.cfg else 0.0,
    )


class Counting:
    """Collectives that count what this rank sends to the others.

    Attributes:
        sent: bytes.
        calls: exchanges.
    """

    def __init__(self, group: Collectives) -> None:
        self.group = group
        self.size = group.size
        self.index = group.index
        self.sent = 0
        self.calls = 0

    def _count(self, tensors: Sequence[Tensor], times: int = 1) -> None:
        self.sent += times * sum(x.numel() * x.element_size() for x in tensors)
        self.calls += 1

    def recv_buffer(self, rows: Sequence[Sequence[int]], shape: Sequence[int], like: Tensor) -> RecvBuffer:
        """See `Collectives`."""
        return self.group.recv_buffer(rows, shape, like)

    def release_buffers(self) -> None:
        """See `Collectives`."""
        self.group.release_buffers()

    def all_to_all(self, leaving: Sequence[Tensor], recv_buffer: RecvBuffer) -> Callable[[], None]:
        """See `Collectives`."""
        self._count([x for peer, x in enumerate(leaving) if peer != self.index])
        return self.group.all_to_all(leaving, recv_buffer)

    def ring_shift(self, leaving: Sequence[Tensor], recv_buffers: Sequence[RecvBuffer]) -> Callable[[], None]:
        """See `Collectives`."""
        self._count(leaving)
        return self.group.ring_shift(leaving, recv_buffers)

    def all_gather(self, x: Tensor) -> list[Tensor]:
        """See `Collectives`."""
        self._count([x], self.size - 1)
        return self.group.all_gather(x)

    def broadcast(self, x: Tensor) -> Tensor:
        """See `Collectives`."""
        self._count([x], self.size - 1 if self.index == 0 else 0)
        return self.group.broadcast(x)

    def send_to_rank0(self, x: Tensor) -> None:
        """See `Collectives`."""
        self._count([x])
        self.group.send_to_rank0(x)

    def recv_from(self, index: int, arriving: Tensor) -> Tensor:
        """See `Collectives`."""
        return self.group.recv_from(index, arriving)
