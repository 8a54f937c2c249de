"""Exchanges by copy engines, on threads: each rank is a thread, its copies are made by another one, late at
random.

What a GPU does in the order of its streams is here: the main stream is the rank's own thread, the side stream
a queue. That the driver's calls do the same is looked at on two GPUs (`benchmarks.scaling --only exchanges`).
"""

from __future__ import annotations

import json
import os
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

from chitu_diffusion.attention.kernels import AttentionKernel
from chitu_diffusion.distributed import peer_memory
from chitu_diffusion.distributed.collectives import RecvBuffer
from chitu_diffusion.distributed.p2p_collectives import P2PCollectives
from chitu_diffusion.distributed.peer_memory import CudaPeerMemory, PeerMemoryError, open_peer_memory
from chitu_diffusion.distributed.ring import ring
from chitu_diffusion.distributed.torch_collectives import TorchCollectives
from chitu_diffusion.distributed.ulysses import ulysses

PATIENCE = 10.0


class Machine:
    """What the ranks of a test share: arenas, numbers, and a place to meet."""

    def __init__(self, size: int, refuses: tuple[int, ...] = (), slow: float = 0.002) -> None:
        self.size, self.refuses, self.slow = size, refuses, slow
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
        self.machine, self.index, self.late = machine, index, Random(index)
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
        alive, raw = weakref.ref(x), x.view(-1).view(torch.uint8)
        size, arena = raw.numel(), self.machine.arenas[peer]
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
        group, in_flight = SimpleNamespace(), SimpleNamespace(exchange=lambda: _nothing())
        ranks = list(range(machine.size))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("torch.distributed.get_process_group_ranks", lambda group: ranks)
            patch.setattr("torch.distributed.get_rank", lambda: index)
            super().__init__(group, in_flight, ThreadMemory(machine, index))  # type: ignore[arg-type]
        self.machine = machine


class _nothing:
    def __enter__(self) -> None: ...

    def __exit__(self, *given: object) -> None: ...


@pytest.fixture(autouse=True)
def through_the_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a process group would carry is handed over by a table that all threads see."""
    tables: dict[int, dict[tuple[int, int, int], list[Tensor]]] = {}
    counts: dict[tuple[int, int], int] = {}

    def begin(
        self: Any, sends: dict[int, list[Tensor]], takes: dict[int, list[Tensor]]
    ) -> Callable[[], None]:
        machine = self.machine
        table = tables.setdefault(id(machine), {})
        turn = counts[id(machine), self.index] = counts.get((id(machine), self.index), 0) + 1
        with machine.changed:
            machine.through_group.append(self.index)
            for to, tensors in sends.items():
                table[turn, self.index, to] = [x.clone() for x in tensors]
            machine.changed.notify_all()

        def wait() -> None:
            with machine.changed:
                assert machine.changed.wait_for(
                    lambda: all((turn, s, self.index) in table for s in takes), PATIENCE
                )
            for source, tensors in takes.items():
                for target, came in zip(tensors, table[turn, source, self.index], strict=True):
                    target.copy_(came)

        return wait

    def all_to_all(self: Any, leaving: list[Tensor], recv_buffer: RecvBuffer) -> Callable[[], None]:
        others = [p for p in range(self.size) if p != self.index]
        return begin(self, {p: [leaving[p]] for p in others}, {p: [recv_buffer.parts[p]] for p in others})

    def ring_shift(self: Any, leaving: list[Tensor], recv_buffers: list[RecvBuffer]) -> Callable[[], None]:
        following, before = (self.index + 1) % self.size, (self.index - 1) % self.size
        return begin(
            self, {following: list(leaving)}, {before: [buffer.parts[before] for buffer in recv_buffers]}
        )

    monkeypatch.setattr(TorchCollectives, "all_to_all", all_to_all)
    monkeypatch.setattr(TorchCollectives, "ring_shift", ring_shift)


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


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v))
    ).transpose(1, 2)


def with_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v), scores.logsumexp(-1).transpose(1, 2)


KERNEL = AttentionKernel("plain", exact=True, run=sdpa, run_with_lse=with_lse)


@pytest.mark.parametrize("way", ["ulysses", "ring"])
@pytest.mark.parametrize("size", [2, 3])
def test_attention_over_threads(way: str, size: int) -> None:
    """Sequences of changing length, several attentions one after the other, with ranks that are late in
    turn.
    """
    machine, heads, channels = Machine(size), 2 * size, 8
    generator = torch.Generator().manual_seed(size)
    cases = []
    for tokens in (5 * size + 1, 5 * size + 1, 5 * size + 1, 9 * size + 2, 3 * size, 9 * size + 2):
        whole = torch.randn(3, 2, tokens, heads, channels, generator=generator, dtype=torch.float64)
        cases.append((whole, [tokens // size + (rank < tokens % size) for rank in range(size)]))

    def work(peers: ThreadPeers) -> list[Tensor]:
        found, late = [], Random(peers.index)
        for whole, lengths in cases:
            first = sum(lengths[: peers.index])
            own = whole[:, :, first : first + lengths[peers.index]]
            time.sleep(late.random() * 0.01)
            attention = ulysses(sdpa, peers, lengths, 2) if way == "ulysses" else ring(KERNEL, peers, lengths)
            found.append(attention(*own.unbind()))
        return found

    results = on_threads(machine, work)
    for number, (whole, _) in enumerate(cases):
        found = torch.cat([result[number] for result in results], dim=1)
        # float64 on both sides, where the order of sums differs; a ring merges in float32
        assert torch.allclose(
            found, sdpa(*whole.unbind()), rtol=0, atol=1e-12 if way == "ulysses" else 1e-6
        ), number
    # the arena grows after the first of each longer length, whose exchanges go through the group; shorter
    # ones fit
    assert len(machine.sizes) == 2 and machine.sizes[0] < machine.sizes[1]
    assert len(machine.through_group) <= 2 * size * exchanges_of_one(way, size)


def exchanges_of_one(way: str, size: int) -> int:
    """Of a rank, in an attention to two sequences: there and back in two pieces, or one a hop."""
    return 2 * 2 * 2 if way == "ulysses" else size - 1


def exchange(peers: ThreadPeers, rows: list[list[int]], seed: int) -> bool:
    """One swap, whose source is let go of at once and whose recv_buffer is read late; whether what came is
    what was sent.
    """

    def drawn(source: int, to: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed * 64 + source * 8 + to)
        return torch.randn(rows[to][source], 3, generator=generator)

    recv_buffer = peers.recv_buffer(rows, (3,), torch.empty(0))
    wait = peers.all_to_all([drawn(peers.index, to) for to in range(peers.size)], recv_buffer)
    wait()
    if (seed + peers.index) % peers.size == 0:
        time.sleep(0.01)  # the others would write the next into it by now
    return all(
        torch.equal(recv_buffer.parts[s], drawn(s, peers.index))
        for s in range(peers.size)
        if s != peers.index
    )


@pytest.mark.parametrize("size", [2, 4])
def test_nothing_is_overwritten_before_it_was_read(size: int) -> None:
    machine, tables = Machine(size, slow=0.0005), Random(3)
    rows = [[[tables.randrange(0, 40) for _ in range(size)] for _ in range(size)] for _ in range(30)]

    def work(peers: ThreadPeers) -> list[bool]:
        found = []
        for turn, table in enumerate(rows):
            peers.release_buffers()
            found += [exchange(peers, table, 2 * turn), exchange(peers, table[::-1], 2 * turn + 1)]
        return found

    results = on_threads(machine, work)
    assert all(all(found) for found in results)
    assert machine.sizes == sorted(machine.sizes), "an arena only grows"


def test_without_memory_exchanges_go_through_the_group() -> None:
    """What is too large for one rank is too large for all; what is smaller is copied."""
    large, small = [[300, 300], [300, 300]], [[20, 20], [20, 20]]
    arena_of_large = -(-600 * 3 * 4 // 1024) * 1024
    machine = Machine(2, refuses=(arena_of_large,))

    def work(peers: ThreadPeers) -> list[bool]:
        found = []
        for turn, table in enumerate((large, large, large, small, small, small)):
            peers.release_buffers()
            found.append(exchange(peers, table, turn))
        return found

    assert on_threads(machine, work) == [[True] * 6] * 2
    assert machine.sizes == [arena_of_large, 1024], "asked once for each size"
    assert len(machine.through_group) == 2 * 4, "the large ones, and the first small one"


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


def test_a_machine_that_cannot_is_known_on_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """No driver on one rank: both go through the process group, at once, and know why."""
    store = Store()

    class Willing(CudaPeerMemory):
        def __init__(self, index: int, *given: Any) -> None:
            if index == 1:
                raise OSError("libcuda.so.1: not here")
            self.index, self.size, self._store, self._timeout, self._meetings = index, 2, store, PATIENCE, 0
            self._released, self._gone = threading.Event(), threading.Event()
            self._flags, self._flags_at = None, 0

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
        each.index, each.size, each._store, each._timeout, each._meetings = index, 2, store, PATIENCE, 0  # type: ignore[assignment]
        each._released, each._gone, each._latest, each._awaited = threading.Event(), threading.Event(), 7, {}
        each._flags, each._flags_at, each._seen, each._moved = None, 0, (), time.monotonic()
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
    own, clock = pair[0], [100.0]
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
