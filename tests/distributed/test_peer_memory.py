"""Memory that ranks share, without a GPU: what is told when it cannot be had, and how waiting ends."""

from __future__ import annotations

import json
import os
import threading
import time
from typing import Any

import pytest
import torch
from fake_peer_memory import PATIENCE, Store, in_threads

from chitu_diffusion.distributed import peer_memory
from chitu_diffusion.distributed.peer_memory import CudaPeerMemory, PeerMemoryError, open_peer_memory


def test_a_machine_that_cannot_is_known_on_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """No driver on one rank: both go through the process group, at once, and know why."""
    store = Store()

    class Willing(CudaPeerMemory):
        def __init__(self, index: int, *given: Any) -> None:
            if index == 1:
                raise OSError("libcuda.so.1: not here")
            self.index = index
            self.size = 2
            self._store = store
            self._timeout = PATIENCE
            self._meetings = 0
            self._released = threading.Event()
            self._gone = threading.Event()
            self._flags = None
            self._flags_at = 0

        def detach(self) -> None:
            self._gone.set()

    monkeypatch.setattr(peer_memory, "CudaPeerMemory", Willing)
    began = time.monotonic()
    found = in_threads(lambda index: open_peer_memory(index, 2, torch.device("cpu"), store, PATIENCE))  # type: ignore[arg-type]
    assert found == [(None, "libcuda.so.1: not here")] * 2
    assert time.monotonic() - began < PATIENCE / 2, "nobody waits for one who has given up"


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch) -> list[CudaPeerMemory]:
    """Peer memory of two ranks without a GPU: their numbers, and a place to meet."""
    store = Store()
    memory = [object.__new__(CudaPeerMemory) for _ in range(2)]
    for index, each in enumerate(memory):
        each.index = index
        each.size = 2
        each._store = store  # type: ignore[assignment]
        each._timeout = PATIENCE
        each._meetings = 0
        each._released = threading.Event()
        each._gone = threading.Event()
        each._latest = 7
        each._awaited = {}
        each._flags = None
        each._flags_at = 0
        each._seen = ()
        each._moved = time.monotonic()
        monkeypatch.setattr(
            each, "_register", lambda address, size, each=each: setattr(each, "_flags_at", address)
        )
    in_threads(lambda index: memory[index].map_numbers())
    assert json.loads(store["1/0"])["token"]
    return memory


def put(memory: CudaPeerMemory, kind: int, to: int, source: int, number: int) -> None:
    """What a GPU's stream does."""
    assert memory._flags is not None
    memory._flags[(memory._number_at(kind, to, source) - memory._flags_at) // 4] = number % 2**32


def test_numbers_are_shared_and_a_release_is_seen(pair: list[CudaPeerMemory]) -> None:
    """The numbers' memory is one for both; released, they stay ahead of whatever a peer puts there."""
    kinds = range(4)
    places = {pair[0]._number_at(kind, to, source) for kind in kinds for to in (0, 1) for source in (0, 1)}
    assert len(places) == 16
    pair[0]._set_numbers(5)
    put(pair[0], 0, 1, 0, 3)
    assert pair[1]._number(0, 0) == 3 and pair[1]._number(1, 0) == 0
    assert [pair[0]._number(kind, 1) for kind in kinds] == [5] * 4
    pair[1].release()
    put(pair[0], 0, 1, 0, 8)  # a peer that has not heard yet
    deadline = time.monotonic() + PATIENCE
    while pair[1]._number(0, 0) != 7 + (1 << 30) and time.monotonic() < deadline:
        time.sleep(0.005)
    assert [pair[1]._number(kind, 0) for kind in kinds] == [7 + (1 << 30)] * 4
    with pytest.raises(PeerMemoryError, match="cut short"):
        pair[1].meet(None)
    pair[1]._gone.set()


def test_waiting_is_the_time_since_a_number_last_moved(
    pair: list[CudaPeerMemory], monkeypatch: pytest.MonkeyPatch
) -> None:
    own = pair[0]
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    own._awaited |= {(0, 1): 3, (1, 1): 1}
    put(own, 1, 0, 1, 1)
    own.waiting()  # the first look
    clock[0] += 4
    assert own.waiting() == 4
    put(own, 0, 0, 1, 2)  # one step nearer
    assert own.waiting() == 0
    clock[0] += 5
    assert own.waiting() == 5
    put(own, 0, 0, 1, 3)
    assert own.waiting() == 0
    clock[0] += 50  # nothing is under way
    assert own.waiting() == 0
    own._awaited[0, 1] = 2**32 + 1  # numbers begin anew behind the largest
    put(own, 0, 0, 1, 2**32 - 1)
    own.waiting()
    clock[0] += 6
    assert own.waiting() == 6
    put(own, 0, 0, 1, 2**32 + 2)
    clock[0] += 6
    assert own.waiting() == 0


def test_wires_go_though_the_device_is_in_error(
    pair: list[CudaPeerMemory], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rank that hit an illegal access has still to give up its groups, vote, and tell of it."""

    def refuse(device: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", refuse)
    monkeypatch.setattr(torch.cuda, "device", refuse)
    own = pair[0]
    own._device = torch.device("cuda")
    own.release()
    own.detach()
    assert own._gone.is_set()
    deadline = time.monotonic() + PATIENCE
    while (
        any(thread.name == "chitu-release" for thread in threading.enumerate())
        and time.monotonic() < deadline
    ):
        time.sleep(0.01)
    assert not any(thread.name == "chitu-release" for thread in threading.enumerate())


def test_a_meeting_that_fails_leaves_no_file_open(pair: list[CudaPeerMemory]) -> None:
    before = len(os.listdir("/proc/self/fd"))
    pair[0]._timeout = 0.05
    with pytest.raises(PeerMemoryError, match="did not come"):
        pair[0].map_numbers()
    assert len(os.listdir("/proc/self/fd")) == before


class Unwilling(CudaPeerMemory):
    """Peer memory without a GPU, whose trial on rank 1 ends as it is told."""

    def __init__(self, index: int, size: int, device: object, store: Any, timeout: float) -> None:
        self.index = index
        self.size = size
        self._store = store
        self._timeout = timeout
        self._meetings = 0
        self._released = threading.Event()
        self._gone = threading.Event()
        self._latest = 0
        self._flags = None
        self._flags_at = 0
        self._device = torch.device("cpu")

    def map_numbers(self) -> None:
        self.meet(None)

    def trial(self) -> None:
        if self.index == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.meet(None)

    def detach(self) -> None:
        self._gone.set()


def test_a_rank_without_memory_for_the_trial_tells_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer_memory, "CudaPeerMemory", Unwilling)
    store = Store()
    began = time.monotonic()
    found = in_threads(lambda index: open_peer_memory(index, 2, torch.device("cpu"), store, PATIENCE))  # type: ignore[arg-type]
    assert found == [(None, "CUDA out of memory")] * 2
    assert time.monotonic() - began < PATIENCE / 2


@pytest.mark.parametrize("meets", [True, False])
def test_opening_is_cut_short(meets: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone in a meeting, or after it has given up: whoever interrupts the groups has the memory already."""
    monkeypatch.setattr(peer_memory, "CudaPeerMemory", Unwilling)
    held: list[CudaPeerMemory] = []
    why: list[str] = []

    def alone(_: int) -> str:
        try:
            open_peer_memory(
                0 if meets else 1,
                3,
                torch.device("cpu"),
                Store(),
                PATIENCE,
                held.append,
                lambda: why[0] if why else None,
            )  # type: ignore[arg-type]
        except PeerMemoryError as error:
            return str(error)
        return "opened"

    def cancel() -> None:
        why.append("rank 2 is lost")
        held[0]._released.set()

    threading.Timer(0.3, cancel).start()
    began = time.monotonic()
    assert in_threads(alone, 1) == ["rank 2 is lost"]
    assert time.monotonic() - began < PATIENCE / 2
