"""Exchanges through torch's process groups: NCCL on GPUs, gloo on CPUs; and how long one is under way."""

from __future__ import annotations

import ctypes
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

import torch
import torch.distributed as dist
from torch import Tensor

from chitu_diffusion.distributed.collectives import RecvBuffer


class InFlightTimer:
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


class TorchCollectives:
    """The ranks of a process group.

    Args:
        group: of torch.distributed; this rank is in it.
        in_flight: is told of every exchange.
    """

    def __init__(self, group: dist.ProcessGroup, in_flight: InFlightTimer) -> None:
        self._group = group
        self._in_flight = in_flight
        self._ranks = dist.get_process_group_ranks(group)
        self.size = len(self._ranks)
        self.index = self._ranks.index(dist.get_rank())

    def recv_buffer(self, rows: Sequence[Sequence[int]], shape: Sequence[int], like: Tensor) -> RecvBuffer:
        """See `Collectives`; new memory each time."""
        return RecvBuffer.new(rows[self.index], shape, like)

    def release_buffers(self) -> None:
        """See `Collectives`; nobody else writes into this rank's memory."""

    def all_to_all(self, leaving: Sequence[Tensor], recv_buffer: RecvBuffer) -> Callable[[], None]:
        moves = []
        for step in range(1, self.size):
            to = (self.index + step) % self.size
            source = (self.index - step) % self.size
            moves += [self._send(leaving[to], to), self._receive(recv_buffer.parts[source], source)]
        return self._begin(moves)

    def ring_shift(self, leaving: Sequence[Tensor], recv_buffers: Sequence[RecvBuffer]) -> Callable[[], None]:
        following, before = ((self.index + step) % self.size for step in (1, -1))
        sends = [self._send(x, following) for x in leaving]
        return self._begin(sends + [self._receive(buffer.parts[before], before) for buffer in recv_buffers])

    def _begin(self, moves: list[dist.P2POp]) -> Callable[[], None]:
        with self._in_flight.exchange():
            try:
                under_way = dist.batch_isend_irecv(moves)
            except BaseException:
                self._leave_batch(moves[0].tensor.device)
                raise

        def wait() -> None:
            with self._in_flight.exchange():
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
                # the one that torch has loaded
                nccl = ctypes.CDLL("libnccl.so.2")
                tries = range(8)
                next((n for n in tries if nccl.ncclGroupEnd() != 0), None)  # refused where none is open

    def all_gather(self, x: Tensor) -> list[Tensor]:
        parts = [torch.empty_like(x) for _ in range(self.size)]
        with self._in_flight.exchange():
            dist.all_gather(parts, x, group=self._group)
        return parts

    def broadcast(self, x: Tensor) -> Tensor:
        with self._in_flight.exchange():
            dist.broadcast(x, self._ranks[0], group=self._group)
        return x

    def send_to_rank0(self, x: Tensor) -> None:
        self._begin([self._send(x.contiguous(), 0)])()

    def recv_from(self, index: int, arriving: Tensor) -> Tensor:
        self._begin([self._receive(arriving, index)])()
        return arriving

    def _send(self, x: Tensor, index: int) -> dist.P2POp:
        return dist.P2POp(dist.isend, x, self._ranks[index], self._group)

    def _receive(self, x: Tensor, index: int) -> dist.P2POp:
        return dist.P2POp(dist.irecv, x, self._ranks[index], self._group)
