"""Process groups: the one place where they are opened and closed.

A `RankGroups` holds the groups of one layout. Exchanges have a timeout. When an exchange was cut short, the groups are
of no use any more: `abandon` drops them, which also releases whoever waits in them, and `open` makes new ones. All ranks
do so in the same order. Knows torch.distributed; no network, no task.

On a GPU exchanges are queued and the host goes on, so nothing raises on a rank whose peer is gone: it waits on the device
for good. There the watch asks `waiting`, and cuts the exchange short with `interrupt`, from its own thread. What the
device computed from then on is void, which `broken` says. (torch's own NCCL watchdog would end the process instead, and
is switched off by `config.set_nccl_defaults`.)
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from chitu_diffusion.attention.peers import ALONE, Peers
from chitu_diffusion.parallel.plan import ParallelPlan

_LAST_RESORT = 10
"""torch's own timeout for groups on a GPU, as a multiple of ours: torch counts from the moment of queueing, we from the last
progress, and ours shall come first."""


class Pace:
    """How long the exchange that is under way has been, on the host or on the device. One thread writes, one reads.

    Args:
        device: of the exchanged tensors; on a CPU an exchange is over when its call returns.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._called: float | None = None
        self._queued: deque[torch.cuda.Event] = deque()
        self._moved = time.monotonic()

    @contextmanager
    def exchange(self) -> Iterator[None]:
        """Around a call that begins an exchange, or makes the current stream wait for one."""
        if not self._cuda:
            yield
            return
        if not self._queued:
            self._moved = time.monotonic()
        self._called = time.monotonic()
        try:
            yield
        finally:
            self._called = None
        event = torch.cuda.Event()
        event.record()
        self._queued.append(event)

    def waiting(self) -> float:
        """Seconds since an exchange was last seen to end while another is under way; 0 with none."""
        try:
            while self._queued and self._queued[0].query():
                self._queued.popleft()
                self._moved = time.monotonic()
        except RuntimeError:
            return 0.0  # the device is in error, which the main thread is about to hear by itself
        called = self._called
        if called is not None:
            return time.monotonic() - max(called, self._moved)
        return time.monotonic() - self._moved if self._queued else 0.0


class GroupPeers:
    """The ranks of a process group.

    Args:
        group: of torch.distributed; this rank is in it.
        pace: is told of every exchange.
    """

    def __init__(self, group: dist.ProcessGroup, pace: Pace) -> None:
        self._group, self._pace = group, pace
        self._ranks = dist.get_process_group_ranks(group)
        self.size = len(self._ranks)
        self.index = self._ranks.index(dist.get_rank())

    def swap(self, leaving: Sequence[Tensor], arriving: Sequence[Tensor]) -> Callable[[], None]:
        """See `Peers`."""
        moves = []
        for step in range(1, self.size):
            to, source = (self.index + step) % self.size, (self.index - step) % self.size
            moves += [self._send(leaving[to], to), self._receive(arriving[source], source)]
        return self._begin(moves)

    def pass_on(self, leaving: Sequence[Tensor], arriving: Sequence[Tensor]) -> Callable[[], None]:
        """See `Peers`."""
        following, before = ((self.index + step) % self.size for step in (1, -1))
        return self._begin([self._send(x, following) for x in leaving] + [self._receive(x, before) for x in arriving])

    def _begin(self, moves: list[dist.P2POp]) -> Callable[[], None]:
        with self._pace.exchange():
            under_way = dist.batch_isend_irecv(moves)

        def wait() -> None:
            with self._pace.exchange():
                for work in under_way:
                    work.wait()
            moves.clear()  # until here what travels must not be reused

        return wait

    def all_gather(self, x: Tensor) -> list[Tensor]:
        """See `Peers`."""
        parts = [torch.empty_like(x) for _ in range(self.size)]
        with self._pace.exchange():
            dist.all_gather(parts, x, group=self._group)
        return parts

    def broadcast(self, x: Tensor) -> Tensor:
        """See `Peers`."""
        with self._pace.exchange():
            dist.broadcast(x, self._ranks[0], group=self._group)
        return x

    def send_to_first(self, x: Tensor) -> None:
        """See `Peers`."""
        self._begin([self._send(x.contiguous(), 0)])()

    def receive_from(self, index: int, arriving: Tensor) -> Tensor:
        """See `Peers`."""
        self._begin([self._receive(arriving, index)])()
        return arriving

    def _send(self, x: Tensor, index: int) -> dist.P2POp:
        return dist.P2POp(dist.isend, x, self._ranks[index], self._group)

    def _receive(self, x: Tensor, index: int) -> dist.P2POp:
        return dist.P2POp(dist.irecv, x, self._ranks[index], self._group)


class RankGroups:
    """A layout's groups as this rank sees them.

    Args:
        plan: the layout; `ParallelPlan()` is one rank, which needs no groups.
        rank: ours.
        device: where the exchanged tensors lie: NCCL for CUDA, gloo for the CPU.
        store: where the ranks meet; None for one rank.
        timeout: seconds after which an exchange that does not move raises.
        multiprocessors: how many of a GPU's NCCL may take for an exchange; None leaves it to NCCL.
        at_once: connect when the groups are made, so that the first exchange is as any other. Groups that others split (torch's
            device meshes) must not be: NCCL 2.28 crashed there.

    Attributes:
        broken: why the exchanges of this generation were cut short; None as long as they were not.
        world, branches, sequence, ulysses, ring: this rank's group along each axis; `ALONE` where it has one rank.
    """

    def __init__(
        self,
        plan: ParallelPlan | None = None,
        rank: int = 0,
        device: torch.device | None = None,
        store: dist.Store | None = None,
        timeout: float = 60.0,
        *,
        multiprocessors: int | None = None,
        at_once: bool = True,
    ) -> None:
        self.plan, self.rank, self._multiprocessors, self._at_once = plan or ParallelPlan(), rank, multiprocessors, at_once
        self.device, self._store, self._timeout = device or torch.device("cpu"), store, timedelta(seconds=timeout)
        self._generation = 0
        self.broken: str | None = None
        self._open = False
        self._lock = threading.Lock()  # the watch interrupts while the main thread may be abandoning
        self._pace = Pace(self.device)
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
        self.broken, self._pace = None, Pace(self.device)
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.set_device(self.device)
        dist.init_process_group(
            "nccl" if cuda else "gloo",
            store=dist.PrefixStore(f"groups/{self._generation}", self._store),
            rank=self.rank,
            world_size=self.plan.world,
            timeout=self._timeout * (_LAST_RESORT if cuda else 1),
            device_id=self.device if cuda and self._at_once else None,
            pg_options=self._options(),
        )
        self._open = True
        assert dist.group.WORLD is not None
        self.world = GroupPeers(dist.group.WORLD, self._pace)
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

    def _options(self) -> object | None:
        """Of a group on a GPU, where they differ from what `config.set_nccl_defaults` has set."""
        if self._multiprocessors is None or self.device.type != "cuda":
            return None
        options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
        options.config.max_ctas = self._multiprocessors
        return options

    def _axis(self, groups: list[list[int]]) -> Peers:
        if len(groups[0]) == 1:
            return ALONE
        if len(groups) == 1:
            return self.world
        timeout = self._timeout * (_LAST_RESORT if self.device.type == "cuda" else 1)
        made = [dist.new_group(ranks, timeout=timeout, pg_options=self._options()) for ranks in groups]
        mine = next(index for index, ranks in enumerate(groups) if self.rank in ranks)
        return GroupPeers(made[mine], self._pace)

    def waiting(self) -> float:
        """Seconds that an exchange on the device has not moved; 0 on the CPU, where exchanges raise by themselves."""
        return self._pace.waiting() if self._open and self.broken is None else 0.0

    def abandon(self) -> None:
        """Drop the groups as they are, mid-exchange or not; whoever waits in one of them gets an error at once.

        On a GPU only this rank's own waiting ends; that of the others must be ended by their `interrupt`.
        """
        if not self._open:
            return
        self.interrupt("this rank gave them up")
        self._open = False
        self._set_alone()
        if dist.is_initialized():
            dist.destroy_process_group()

    def interrupt(self, why: str, generation: int | None = None) -> None:
        """Cut short what is under way, from whatever thread; gloo's peers notice a closed group themselves.

        Args:
            why: for `broken`.
            generation: leaves later ones alone; None means the one that is open.
        """
        with self._lock:
            if not self._open or self.broken is not None or generation not in (None, self._generation):
                return
            self.broken = why
            if self.device.type == "cuda" and dist.is_initialized():
                # all communicators at once: one after the other, each would wait for the next (torch issue 119797)
                dist.distributed_c10d._abort_process_group()

    def close(self) -> None:
        """Leave in peace; silent the second time."""
        if self._open and self.broken is not None:
            self.abandon()
        elif self._open:
            self._open = False
            self._set_alone()
            dist.destroy_process_group()

    def _set_alone(self) -> None:
        self.world = self.branches = self.sequence = self.ulysses = self.ring = ALONE
