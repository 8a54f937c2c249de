"""Process groups: the one place where they are opened and closed.

A `RankGroups` holds the groups of one layout. Exchanges have a timeout. When an exchange was cut short, the groups are
of no use any more: `abandon` drops them, which also releases whoever waits in them, and `open` makes new ones. All ranks
do so in the same order. Knows torch.distributed; no network, no task.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from chitu_diffusion.attention.peers import ALONE, Peers
from chitu_diffusion.parallel.plan import ParallelPlan


class GroupPeers:
    """The ranks of a process group.

    Args:
        group: of torch.distributed; this rank is in it.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self._ranks = dist.get_process_group_ranks(group)
        self.size = len(self._ranks)
        self.index = self._ranks.index(dist.get_rank())

    def all_to_all(self, x: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        """See `Peers`."""
        out = x.new_empty(sum(receive), *x.shape[1:])
        dist.all_to_all_single(out, x.contiguous(), list(receive), list(send), group=self._group)
        return out

    def pass_on(self, x: Tensor, arriving: Tensor) -> Callable[[], Tensor]:
        """See `Peers`."""
        following, before = (self._ranks[(self.index + step) % self.size] for step in (1, -1))
        moves = [dist.P2POp(dist.isend, x, following, self._group), dist.P2POp(dist.irecv, arriving, before, self._group)]
        under_way = dist.batch_isend_irecv(moves)

        def wait() -> Tensor:
            for work in under_way:
                work.wait()
            return arriving

        return wait

    def all_gather(self, x: Tensor) -> list[Tensor]:
        """See `Peers`."""
        parts = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(parts, x, group=self._group)
        return parts

    def broadcast(self, x: Tensor) -> Tensor:
        """See `Peers`."""
        dist.broadcast(x, self._ranks[0], group=self._group)
        return x

    def send_to_first(self, x: Tensor) -> None:
        """See `Peers`."""
        dist.send(x.contiguous(), self._ranks[0], group=self._group)

    def receive_from(self, index: int, arriving: Tensor) -> Tensor:
        """See `Peers`."""
        dist.recv(arriving, self._ranks[index], group=self._group)
        return arriving


class RankGroups:
    """A layout's groups as this rank sees them.

    Args:
        plan: the layout; `ParallelPlan()` is one rank, which needs no groups.
        rank: ours.
        device: where the exchanged tensors lie: NCCL for CUDA, gloo for the CPU.
        store: where the ranks meet; None for one rank.
        timeout: seconds after which an exchange that does not move raises.

    Attributes:
        world, branches, sequence, ulysses, ring: this rank's group along each axis; `ALONE` where it has one rank.
    """

    def __init__(
        self,
        plan: ParallelPlan | None = None,
        rank: int = 0,
        device: torch.device | None = None,
        store: dist.Store | None = None,
        timeout: float = 60.0,
    ) -> None:
        self.plan, self.rank = plan or ParallelPlan(), rank
        self.device, self._store, self._timeout = device or torch.device("cpu"), store, timedelta(seconds=timeout)
        self._generation = 0
        self._open = False
        self.world: Peers = ALONE
        self.branches: Peers = ALONE
        self.sequence: Peers = ALONE
        self.ulysses: Peers = ALONE
        self.ring: Peers = ALONE

    @property
    def generation(self) -> int:
        """How often the groups were made: what ranks agreed on before does not bind them after."""
        return self._generation

    def open(self) -> None:
        """Make the groups, if they are not there. Every rank must come.

        Raises:
            RuntimeError: a rank did not come in time.
        """
        if self._open or self.plan.world == 1:
            return
        assert self._store is not None
        self._generation += 1
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        dist.init_process_group(
            "nccl" if self.device.type == "cuda" else "gloo",
            store=dist.PrefixStore(f"groups/{self._generation}", self._store),
            rank=self.rank,
            world_size=self.plan.world,
            timeout=self._timeout,
            device_id=self.device if self.device.type == "cuda" else None,
        )
        self._open = True
        assert dist.group.WORLD is not None
        self.world = GroupPeers(dist.group.WORLD)
        self.branches, self.sequence, self.ulysses, self.ring = (
            self._axis(groups)
            for groups in (
                self.plan.branch_groups(),
                self.plan.sequence_groups(),
                self.plan.ulysses_groups(),
                self.plan.ring_groups(),
            )
        )

    def agree(self, value: float | None) -> float:
        """One number common to all ranks: the largest that any gives. None gives none.

        Raises:
            ValueError: nobody gave a number.
        """
        own = torch.tensor([float("-inf") if value is None else value], dtype=torch.float64, device=self.device)
        largest = max(float(part) for part in self.world.all_gather(own))
        if largest == float("-inf"):
            raise ValueError("no rank gave a number to agree on")
        return largest

    def _axis(self, groups: list[list[int]]) -> Peers:
        if len(groups[0]) == 1:
            return ALONE
        if len(groups) == 1:
            return self.world
        made = [dist.new_group(ranks, timeout=self._timeout) for ranks in groups]
        mine = next(index for index, ranks in enumerate(groups) if self.rank in ranks)
        return GroupPeers(made[mine])

    def abandon(self) -> None:
        """Drop the groups as they are, mid-exchange or not; whoever waits in one of them gets an error at once."""
        if not self._open:
            return
        self._open = False
        self._set_alone()
        self.interrupt()
        if dist.is_initialized():
            dist.destroy_process_group()

    def interrupt(self) -> None:
        """Cut short what is under way on the device, from whatever thread; gloo's peers notice a closed group themselves."""
        if self.device.type == "cuda" and dist.is_initialized():
            dist.distributed_c10d._abort_process_group()

    def close(self) -> None:
        """Leave in peace; silent the second time."""
        if self._open:
            self._open = False
            self._set_alone()
            dist.destroy_process_group()

    def _set_alone(self) -> None:
        self.world = self.branches = self.sequence = self.ulysses = self.ring = ALONE
