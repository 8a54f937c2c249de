"""Peer memory of ranks that are threads: copies are made by another thread, late at random.

What a GPU does in the order of its streams is here: the main stream is the rank's own thread, the side
stream a queue.
"""

from __future__ import annotations

import queue
import threading
import time
import weakref
from collections.abc import Callable
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from chitu_diffusion.distributed.p2p_collectives import P2PCollectives

PATIENCE = 10.0


class Machine:
    """What the ranks of a test share: arenas, numbers, and a place to meet."""

    def __init__(self, size: int, refuses: tuple[int, ...] = (), slow: float = 0.002) -> None:
        self.size = size
        self.refuses = refuses
        self.slow = slow
        self.arenas: list[Tensor | None] = [None] * size
        self.numbers: dict[tuple[str, int, int], int] = {}
        self.changed = threading.Condition()
        self.meeting = threading.Barrier(size, timeout=PATIENCE)
        self.sizes: list[int] = []
        self.through_group: list[int] = []

    def await_number(self, kind: str, to: int, source: int, number: int) -> None:
        with self.changed:
            came = self.changed.wait_for(lambda: self.numbers.get((kind, to, source), 0) >= number, PATIENCE)
        assert came, f"rank {to} waits for {kind} {number} of {source}"

    def raise_number(self, kind: str, to: int, source: int, number: int) -> None:
        with self.changed:
            assert self.numbers.get((kind, to, source), 0) < number, "numbers only grow"
            self.numbers[kind, to, source] = number
            self.changed.notify_all()


class ThreadMemory:
    """`PeerMemory` of one rank of a `Machine`."""

    def __init__(self, machine: Machine, index: int) -> None:
        self.machine = machine
        self.index = index
        self.late = Random(index)
        self.work: queue.Queue[Callable[[], None] | None] = queue.Queue()
        self.wrong: list[str] = []
        threading.Thread(target=self._side, daemon=True).start()

    def _side(self) -> None:
        while (work := self.work.get()) is not None:
            try:
                work()
            except Exception as error:
                self.wrong.append(f"side stream of rank {self.index}: {error}")

    def resize(self, size: int) -> Tensor | None:
        self._finish()
        self.machine.meeting.wait()
        if self.index == 0:
            self.machine.sizes.append(size)
        refused = size in self.machine.refuses
        self.machine.arenas[self.index] = None if refused else torch.full((size,), 255, dtype=torch.uint8)
        self.machine.meeting.wait()
        return self.machine.arenas[self.index]

    def _finish(self) -> None:
        done = threading.Event()
        self.work.put(done.set)
        assert done.wait(PATIENCE)

    def fork(self) -> None:
        """The main stream is the thread that calls: what it has so far is done."""

    def wait_read(self, peer: int, number: int) -> None:
        self.work.put(lambda: self.machine.await_number("read", self.index, peer, number))

    def copy(self, x: Tensor, peer: int, offset: int) -> None:
        assert x.is_contiguous()
        alive = weakref.ref(x)
        raw = x.view(-1).view(torch.uint8)
        size = raw.numel()
        arena = self.machine.arenas[peer]
        assert arena is not None and offset + size <= len(arena)
        seen = raw.data_ptr()
        del raw, x

        def do() -> None:
            time.sleep(self.late.random() * self.machine.slow)
            source = alive()
            assert source is not None and source.data_ptr() == seen, (
                "what travels was given up before it had arrived"
            )
            arena[offset : offset + size] = source.view(-1).view(torch.uint8)

        self.work.put(do)

    def signal_arrived(self, peer: int, number: int) -> None:
        self.work.put(lambda: self.machine.raise_number("arrived", peer, self.index, number))

    def sent(self) -> Callable[[], None]:
        done = threading.Event()
        self.work.put(done.set)
        return lambda: None if done.wait(PATIENCE) else pytest.fail("the side stream hangs")

    def wait_arrived(self, peer: int, number: int) -> None:
        self.machine.await_number("arrived", self.index, peer, number)

    def signal_read(self, peer: int, number: int) -> None:
        self.machine.raise_number("read", peer, self.index, number)

    def waiting(self) -> float:
        return 0.0

    def release(self) -> None:
        raise AssertionError("nothing is to be released here")


class ThreadPeers(P2PCollectives):
    """`P2PCollectives` whose process group is the `Machine`."""

    def __init__(self, machine: Machine, index: int) -> None:
        group = SimpleNamespace()
        in_flight = SimpleNamespace(exchange=lambda: _nothing())
        ranks = list(range(machine.size))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("torch.distributed.get_process_group_ranks", lambda group: ranks)
            patch.setattr("torch.distributed.get_rank", lambda: index)
            super().__init__(group, in_flight, ThreadMemory(machine, index))  # type: ignore[arg-type]
        self.machine = machine


class _nothing:
    def __enter__(self) -> None: ...

    def __exit__(self, *given: object) -> None: ...


def on_threads(machine: Machine, work: Callable[[ThreadPeers], Any]) -> list[Any]:
    """What `work` gives on each rank; errors of any of them, and of their side streams, are raised."""
    results: list[Any] = [None] * machine.size
    errors: list[BaseException] = []
    all_peers = [ThreadPeers(machine, index) for index in range(machine.size)]

    def run(index: int) -> None:
        peers = all_peers[index]
        try:
            results[index] = work(peers)
            peers._memory._finish()
            errors.extend(AssertionError(said) for said in peers._memory.wrong)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(index,), daemon=True) for index in range(machine.size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    if errors:
        raise errors[0]
    assert not any(thread.is_alive() for thread in threads), "a rank hangs"
    return results


class Store(dict[str, bytes]):
    """As much of a torch store as memory use."""

    def set(self, key: str, value: str) -> None:
        self[key] = value.encode()

    def check(self, keys: list[str]) -> bool:
        return all(key in self for key in keys)

    def wait(self, keys: list[str], patience: object) -> None:
        deadline = time.monotonic() + PATIENCE
        while not self.check(keys):
            assert time.monotonic() < deadline
            time.sleep(0.001)


def in_threads(work: Callable[[int], Any], size: int = 2) -> list[Any]:
    found: list[Any] = [None] * size

    def run(index: int) -> None:
        found[index] = work(index)

    threads = [threading.Thread(target=run, args=(index,), daemon=True) for index in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
        assert not thread.is_alive(), "a rank hangs"
    return found
