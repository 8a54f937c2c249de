"""Exchanges by the GPUs' copy engines: what leaves is written straight into the other rank's memory.

NCCL's kernels take multiprocessors, most of the time to wait for the other rank; a copy engine takes none,
and a stream that waits for a number in memory takes nothing at all. Every rank has an arena of the same size,
placed alike on all, and two rows of numbers that only grow: how many exchanges have arrived from each peer,
and how often each peer has read its arena.

- A part is written, then the number of its exchange; both in the order of one stream, so the number never
  comes first.
- Whoever begins to use its arena anew says so once what it has queued before is done; nobody writes there
  earlier.

Both are waited for on the device, so a rank that is late holds up nothing but what needs it. Ranks make the
same calls with the same tables, so they agree without a word on where everything lies. What does not fit the
arena goes through the process group, and the arena grows before the next use. The same numbers arrive either
way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Protocol

import torch.distributed as dist
from torch import Tensor

from chitu_diffusion.distributed.collectives import RecvBuffer
from chitu_diffusion.distributed.torch_collectives import InFlightTimer, TorchCollectives

_ALIGNED = 1024


class PeerMemory(Protocol):
    """Memory that the peers can write, and numbers that they can raise. Peers are counted within their group.

    Calls queue work on one of two streams and return: the main one, which computes, and a side one, which
    copies.
    """

    def resize(self, size: int) -> Tensor | None:
        """A new arena of so many bytes on every peer, this rank's as [size] uint8; None, and none at all,
        where one has no memory. All come; it waits for them.

        Raises:
            RuntimeError: a peer did not come.
        """
        ...

    def fork(self) -> None:
        """The side stream goes on after what the main one has so far."""
        ...

    def wait_read(self, peer: int, number: int) -> None:
        """The side stream waits until `peer` has read its arena so many times."""
        ...

    def copy(self, x: Tensor, peer: int, offset: int) -> None:
        """On the side stream: x, contiguous, into the peer's arena from byte `offset`."""
        ...

    def signal_arrived(self, peer: int, number: int) -> None:
        """On the side stream: `peer` has what this rank's exchanges up to `number` bring it."""
        ...

    def sent(self) -> Callable[[], None]:
        """A call by which the main stream waits for what the side one has so far."""
        ...

    def wait_arrived(self, peer: int, number: int) -> None:
        """The main stream waits for the exchanges of `peer` up to `number`."""
        ...

    def signal_read(self, peer: int, number: int) -> None:
        """On the main stream: this rank has read its arena so many times."""
        ...

    def waiting(self) -> float:
        """From any thread: seconds that nothing has moved of what is waited for; 0 where nothing is."""
        ...

    def release(self) -> None:
        """From any thread: no stream waits any more, now or later; what is computed from now on is void."""
        ...


@dataclass(frozen=True)
class _Place(RecvBuffer):
    """A recv_buffer in the arena.

    Attributes:
        to: the byte in each peer's arena at which what we send it begins.
    """

    to: list[int]


class P2PCollectives(TorchCollectives):
    """The ranks of a process group on GPUs of one machine that reach each other's memory.

    Args:
        group, in_flight: see `TorchCollectives`; used for all that is not copied.
        memory: to the same peers.
    """

    def __init__(self, group: dist.ProcessGroup, in_flight: InFlightTimer, memory: PeerMemory) -> None:
        super().__init__(group, in_flight)
        self._memory = memory
        self._arena: Tensor | None = None
        self._used = 0
        self._wanted = 0
        self._most: int | None = None  # no arena of so many bytes
        self._exchanges = 0
        self._readings = 0
        # by where they begin and all that makes them: the same each block
        self._places: dict[tuple[object, ...], _Place] = {}
        self._heard: dict[int, int] = {}  # how many readings of a peer the side stream has waited for

    def recv_buffer(self, rows: Sequence[Sequence[int]], shape: Sequence[int], like: Tensor) -> RecvBuffer:
        own = rows[self.index]
        row = prod(shape) * like.element_size()
        # alike on all, though what arrives may differ in length
        reserved = -(-max(sum(parts) for parts in rows) * row // _ALIGNED) * _ALIGNED
        self._wanted += reserved
        if self._arena is None or self._used + reserved > len(self._arena):
            return super().recv_buffer(rows, shape, like)
        begin = self._used
        self._used = self._used + reserved
        key = (begin, tuple(map(tuple, rows)), tuple(shape), like.dtype)
        found = self._places.get(key)
        if found is None:
            whole = self._arena[begin : begin + sum(own) * row].view(like.dtype).view(sum(own), *shape)
            to = [begin + sum(parts[: self.index]) * row for parts in rows]
            found = self._places[key] = _Place(whole, list(whole.split(list(own))), to)
        return _Place(found.whole, list(found.parts), found.to)

    def release_buffers(self) -> None:
        """See `Collectives`; here the arena grows, if the buffers before this call wanted more than there
        was.

        Raises:
            RuntimeError: a peer did not come.
        """
        if self._wanted == 0:
            return
        held = 0 if self._arena is None else len(self._arena)
        if self._wanted > held and (self._most is None or self._wanted < self._most):
            self._grow(self._wanted)
        if self._used:
            self._readings += 1
            for peer in self._others():
                self._memory.signal_read(peer, self._readings)
        self._used = 0
        self._wanted = 0

    def _grow(self, size: int) -> None:
        self._places.clear()
        self._arena = None  # ours must be free before the new one is made
        held = self._memory.resize(size)
        if held is None:
            self._most = size
        self._arena = held
        self._used = 0

    def all_to_all(self, leaving: Sequence[Tensor], recv_buffer: RecvBuffer) -> Callable[[], None]:
        if not isinstance(recv_buffer, _Place):
            return super().all_to_all(leaving, recv_buffer)
        return self._write({peer: [(leaving[peer], recv_buffer)] for peer in self._others()}, self._others())

    def ring_shift(self, leaving: Sequence[Tensor], recv_buffers: Sequence[RecvBuffer]) -> Callable[[], None]:
        places = [buffer for buffer in recv_buffers if isinstance(buffer, _Place)]
        if len(places) < len(recv_buffers):
            return super().ring_shift(leaving, recv_buffers)
        following, before = ((self.index + step) % self.size for step in (1, -1))
        return self._write({following: list(zip(leaving, places, strict=True))}, [before])

    def _write(
        self, parts: Mapping[int, Sequence[tuple[Tensor, _Place]]], sources: Sequence[int]
    ) -> Callable[[], None]:
        """Send each peer its parts, and give what waits for those of the sources."""
        self._exchanges += 1
        memory = self._memory
        number = self._exchanges
        memory.fork()
        for peer, for_it in parts.items():
            if self._heard.get(peer, 0) < self._readings:
                memory.wait_read(peer, self._readings)
                self._heard[peer] = self._readings
            for x, place in for_it:
                memory.copy(x, peer, place.to[peer])
            memory.signal_arrived(peer, number)
        sent = memory.sent()
        travelling = [x for for_it in parts.values() for x, _ in for_it]

        def wait() -> None:
            for peer in sources:
                memory.wait_arrived(peer, number)
            sent()
            travelling.clear()  # until here its memory must not be used for anything else

        return wait

    def _others(self) -> list[int]:
        """The other peers, each rank in another order, so that not all write to one."""
        return [(self.index + step) % self.size for step in range(1, self.size)]
