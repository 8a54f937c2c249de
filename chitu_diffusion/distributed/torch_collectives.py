"""Exchanges through torch's process groups: NCCL on GPUs, gloo on CPUs; and how long the one under way has
been.
"""

from __future__ import annotations

import ctypes
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

import torch
import torch.distributed as dist
from torch import Tensor

from chitu_diffusion.distributed.collectives import Landing


class Pace:
    """How long the exchange that is under way has been, on the host or on the device. One thread writes, one
    reads.

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

    def landing(self, rows: Sequence[Sequence[int]], shape: Sequence[int], like: Tensor) -> Landing:
        """See `Peers`; new memory each time."""
        return Landing.new(rows[self.index], shape, like)

    def clear(self) -> None:
        """See `Peers`; nobody else writes into this rank's memory."""

    def swap(self, leaving: Sequence[Tensor], landing: Landing) -> Callable[[], None]:
        """See `Peers`."""
        moves = []
        for step in range(1, self.size):
            to, source = (self.index + step) % self.size, (self.index - step) % self.size
            moves += [self._send(leaving[to], to), self._receive(landing.parts[source], source)]
        return self._begin(moves)

    def pass_on(self, leaving: Sequence[Tensor], landings: Sequence[Landing]) -> Callable[[], None]:
        """See `Peers`."""
        following, before = ((self.index + step) % self.size for step in (1, -1))
        sends = [self._send(x, following) for x in leaving]
        return self._begin(sends + [self._receive(landing.parts[before], before) for landing in landings])

    def _begin(self, moves: list[dist.P2POp]) -> Callable[[], None]:
        with self._pace.exchange():
            try:
                under_way = dist.batch_isend_irecv(moves)
            except BaseException:
                self._leave_batch(moves[0].tensor.device)
                raise

        def wait() -> None:
            with self._pace.exchange():
                for work in under_way:
                    work.wait()
            moves.clear()  # until here what travels must not be reused

        return wait

    def _leave_batch(self, device: torch.device) -> None:
        """When one of a batch is refused, torch 2.13 leaves NCCL's group call open, and communicators made
        later are void.
        """
        if device.type == "cuda":
            with suppress(Exception):  # what was begun is given up anyway
                self._group._end_coalescing(device)
            with suppress(OSError):
                nccl, tries = ctypes.CDLL("libnccl.so.2"), range(8)  # the one that torch has loaded
                next((n for n in tries if nccl.ncclGroupEnd() != 0), None)  # refused where none is open

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
