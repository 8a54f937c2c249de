"""Process groups: the one place where they are opened and closed.

A `ProcessGroups` holds the groups of one layout. Exchanges have a timeout. When an exchange was cut short,
the groups are of no use any more: `abort` drops them, which also releases whoever waits in them, and `open`
makes new ones. All ranks do so in the same order. Knows torch.distributed; no network, no task.

On a GPU exchanges are queued and the host goes on, so nothing raises on a rank whose peer is gone: it waits
on the device for good. There the watch asks `waiting`, and cuts the exchange short with `interrupt`, from its
own thread. What the device computed from then on is void, which `broken` says. (torch's own NCCL watchdog
would end the process instead, and is switched off by `config.set_nccl_defaults`.)
"""

from __future__ import annotations

import threading
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from chitu_diffusion.distributed.collectives import SINGLE, Collectives
from chitu_diffusion.distributed.p2p_collectives import P2PCollectives
from chitu_diffusion.distributed.peer_memory import CudaPeerMemory, PeerMemoryError, open_peer_memory
from chitu_diffusion.distributed.plan import ParallelPlan
from chitu_diffusion.distributed.torch_collectives import InFlightTimer, TorchCollectives

_FAREWELL = 5.0
_GLANCE = 0.002
_LAST_RESORT = 10
"""torch's own timeout for groups on a GPU, as a multiple of ours: torch counts from the moment of queueing,
we from the last progress, and ours shall come first."""


class ProcessGroups:
    """A layout's groups as this rank sees them.

    Args:
        plan: the layout; `ParallelPlan()` is one rank, which needs no groups.
        rank: ours.
        device: where the exchanged tensors lie: NCCL for CUDA, gloo for the CPU.
        store: where the ranks meet; None for one rank.
        timeout: seconds after which an exchange that does not move raises.
        multiprocessors: how many of a GPU's NCCL may take for an exchange; None leaves it to NCCL.
        copies: let the GPUs' copy engines do the exchanges within a sequence, where ranks reach each other's
            memory.
        at_once: connect when the groups are made, so that the first exchange is as any other. Groups that
            others split (torch's device meshes) must not be: NCCL 2.28 crashed there.

    Attributes:
        broken: why the exchanges of this generation were cut short; None as long as they were not.
        exchanges: what exchanges along an axis are done by, in words.
        world, branches, sequence, ulysses, ring: this rank's group along each axis; `SINGLE` where it has one
            rank.
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
        copies: bool = True,
        at_once: bool = True,
    ) -> None:
        self.plan = plan or ParallelPlan()
        self.rank = rank
        self._multiprocessors = multiprocessors
        self._at_once = at_once
        self._copies = copies
        self.device = device or torch.device("cpu")
        self._store = store
        self._timeout = timedelta(seconds=timeout)
        self._generation = 0
        self.broken: str | None = None
        self._open = False
        self._opening = False
        self.exchanges: dict[str, str] = {}
        self._memory: list[CudaPeerMemory] = []
        self._detached: list[CudaPeerMemory] = []
        self._lock = threading.Lock()  # the watch interrupts while the main thread may be abandoning
        self._in_flight = InFlightTimer(self.device)
        self.world: Collectives = SINGLE
        self.branches: Collectives = SINGLE
        self.sequence: Collectives = SINGLE
        self.ulysses: Collectives = SINGLE
        self.ring: Collectives = SINGLE

    @property
    def generation(self) -> int:
        """How often the groups were made: what ranks agreed on before does not bind them after."""
        return self._generation

    @property
    def held_bytes(self) -> int:
        """GPU memory into which the other ranks write; torch does not count it."""
        return sum(memory.held for memory in self._memory)

    def open(self) -> None:
        """Make the groups, if they are not there, and this rank's GPU the calling thread's. Every rank must
        come.

        Raises:
            RuntimeError: a rank did not come in time, or `interrupt` was called meanwhile.
        """
        if self.plan.world == 1:
            return
        cuda = self.device.type == "cuda"
        if cuda:
            # of each thread: it says where kernels go, and stream 0 of the driver's calls
            torch.cuda.set_device(self.device)
        if self._open:
            return
        assert self._store is not None
        self._gather()
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
        self.world = TorchCollectives(dist.group.WORLD, self._in_flight)
        for memory in self._detached:
            memory.free()  # all ranks are here, so all have let go of it
        self._detached = []
        self.branches, self.sequence = (
            self._axis(self.plan.branch_groups()),
            self._axis(self.plan.sequence_groups()),
        )
        self.ulysses = self._axis(self.plan.ulysses_groups(), "ulysses")
        self.ring = self._axis(self.plan.ring_groups(), "ring")

    def _gather(self) -> None:
        """Wait for every rank to begin anew; torch's own waiting hears no signals and takes minutes."""
        assert self._store is not None
        with self._lock:
            self._generation += 1
            self.broken, self._in_flight, self._opening = None, InFlightTimer(self.device), True
        try:
            self._store.set(f"opens/{self._generation}/{self.rank}", "")
            late = list(range(self.plan.world))
            began = time.monotonic()
            patience = self._timeout.total_seconds()
            while late := [r for r in late if not self._store.check([f"opens/{self._generation}/{r}"])]:
                if self.broken is not None:
                    raise RuntimeError(f"the process groups were not made: {self.broken}")
                if time.monotonic() - began > patience:
                    raise RuntimeError(
                        f"the process groups were not made: ranks {late} did not come within {patience:g} s"
                    )
                time.sleep(_GLANCE)
        finally:
            self._opening = False

    def all_reduce_max(self, value: float | None) -> float:
        """One number common to all ranks: the largest that any gives. None gives none.

        Raises:
            ValueError: nobody gave a number.
        """
        own = torch.tensor(
            [float("-inf") if value is None else value], dtype=torch.float64, device=self.device
        )
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

    def _axis(self, groups: list[list[int]], copied: str | None = None) -> Collectives:
        """The collectives along an axis, by all its groups; `copied` names one that copy engines may do."""
        if len(groups[0]) == 1:
            return SINGLE
        mine = next(index for index, ranks in enumerate(groups) if self.rank in ranks)
        if len(groups) == 1:
            group = dist.group.WORLD
        else:
            timeout = self._timeout * (_LAST_RESORT if self.device.type == "cuda" else 1)
            group = [dist.new_group(ranks, timeout=timeout, pg_options=self._options()) for ranks in groups][
                mine
            ]
        assert group is not None
        if copied is None or self.device.type != "cuda":
            return TorchCollectives(group, self._in_flight)
        if not self._copies:
            self.exchanges[copied] = "NCCL, as asked for"
            return TorchCollectives(group, self._in_flight)
        assert self._store is not None
        store = dist.PrefixStore(f"memory/{self._generation}/{copied}/{groups[mine][0]}", self._store)
        index = groups[mine].index(self.rank)
        seconds = self._timeout.total_seconds()
        opened = list(self._memory)
        memory, problem = open_peer_memory(
            index, len(groups[mine]), self.device, store, seconds, self._hold, lambda: self.broken
        )
        if memory is None:
            self._memory = opened
            self.exchanges[copied] = f"NCCL, for {problem}"
            return TorchCollectives(group, self._in_flight)
        self.exchanges[copied] = "copy engines"
        return P2PCollectives(group, self._in_flight, memory)

    def _hold(self, memory: CudaPeerMemory) -> None:
        with self._lock:
            self._memory.append(memory)
            if self.broken is not None:
                memory.release()

    def waiting(self) -> float:
        """Seconds that an exchange on the device has not moved; 0 on the CPU, where exchanges raise."""
        if not self._open or self.broken is not None:
            return 0.0
        return max(self._in_flight.waiting(), *(memory.waiting() for memory in self._memory), 0.0)

    def abort(self) -> None:
        """Drop the groups as they are, mid-exchange or not; whoever waits in one of them gets an error at
        once.

        On a GPU only this rank's own waiting ends; that of the others must be ended by their `interrupt`.
        """
        if not self._open:
            return
        self.cancel("this rank gave them up")
        self._open = False
        self._set_single()
        self._detach()
        if dist.is_initialized():
            dist.destroy_process_group()

    def cancel(self, why: str, generation: int | None = None) -> None:
        """Cut short what is under way, from whatever thread; gloo's peers notice a closed group themselves.

        Args:
            why: for `broken`.
            generation: leaves later ones alone; None means the one that is open.
        """
        with self._lock:
            begun = self._open or self._opening
            if not begun or self.broken is not None or generation not in (None, self._generation):
                return
            self.broken = why
            for memory in self._memory:
                memory.release()
            if self.device.type == "cuda" and dist.is_initialized():
                # all communicators at once: one after the other, each would wait for the next (torch issue
                # 119797)
                dist.distributed_c10d._abort_process_group()

    def close(self) -> None:
        """Leave in peace; silent the second time."""
        if self._open and self.broken is not None:
            self.abort()
        elif self._open:
            self._open = False
            self._set_single()
            # nobody interrupts any more: a peer that went without its last copies must not keep us
            late = threading.Timer(self._timeout.total_seconds(), _release, [self._memory])
            late.start()
            detached = self._detach()
            late.cancel()
            for memory in detached:
                try:
                    memory.meet(None, _FAREWELL)
                except PeerMemoryError:
                    continue  # somebody may still hold this memory; the end of the process gives it back
                memory.free()
                self._detached.remove(memory)
            dist.destroy_process_group()

    def _detach(self) -> list[CudaPeerMemory]:
        """Let go of the others' memory; what is returned may be freed when all have."""
        memory = self._memory
        self._memory = []
        for each in memory:
            each.detach()
        self._detached += memory
        return memory

    def _set_single(self) -> None:
        self.world = self.branches = self.sequence = self.ulysses = self.ring = SINGLE


def _release(memories: list[CudaPeerMemory]) -> None:
    for memory in memories:
        memory.release()
