"""Exchanges by copy engines, on threads: each rank is a thread, its copies are made by another one, late at
random.

What a GPU does in the order of its streams is here: the main stream is the rank's own thread, the side stream
a queue. That the driver's calls do the same is looked at on two GPUs (`benchmarks.scaling --only exchanges`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from random import Random
from typing import Any

import pytest
import torch
from fake_peer_memory import PATIENCE, Machine, ThreadPeers, on_threads
from torch import Tensor

from chitu_diffusion.attention.kernels import NOWHERE, AttentionKernel, dense
from chitu_diffusion.distributed.collectives import RecvBuffer
from chitu_diffusion.distributed.ring import ring
from chitu_diffusion.distributed.torch_collectives import TorchCollectives
from chitu_diffusion.distributed.ulysses import ulysses


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
        following = (self.index + 1) % self.size
        before = (self.index - 1) % self.size
        return begin(
            self, {following: list(leaving)}, {before: [buffer.parts[before] for buffer in recv_buffers]}
        )

    monkeypatch.setattr(TorchCollectives, "all_to_all", all_to_all)
    monkeypatch.setattr(TorchCollectives, "ring_shift", ring_shift)


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v))
    ).transpose(1, 2)


def with_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v), scores.logsumexp(-1).transpose(1, 2)


KERNEL = AttentionKernel("plain", exact=True, run=dense(sdpa), run_with_lse=dense(with_lse))


@pytest.mark.parametrize("way", ["ulysses", "ring"])
@pytest.mark.parametrize("size", [2, 3])
def test_attention_over_threads(way: str, size: int) -> None:
    """Sequences of changing length, several attentions one after the other, with ranks that are late in
    turn.
    """
    machine = Machine(size)
    heads = 2 * size
    channels = 8
    generator = torch.Generator().manual_seed(size)
    cases = []
    for tokens in (5 * size + 1, 5 * size + 1, 5 * size + 1, 9 * size + 2, 3 * size, 9 * size + 2):
        whole = torch.randn(3, 2, tokens, heads, channels, generator=generator, dtype=torch.float64)
        cases.append((whole, [tokens // size + (rank < tokens % size) for rank in range(size)]))

    def work(peers: ThreadPeers) -> list[Tensor]:
        found = []
        late = Random(peers.index)
        for whole, lengths in cases:
            first = sum(lengths[: peers.index])
            own = whole[:, :, first : first + lengths[peers.index]]
            time.sleep(late.random() * 0.01)
            attention = (
                ulysses(KERNEL, peers, lengths, 2) if way == "ulysses" else ring(KERNEL, peers, lengths)
            )
            found.append(attention(*own.unbind(), NOWHERE))
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
    machine = Machine(size, slow=0.0005)
    tables = Random(3)
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
    large = [[300, 300], [300, 300]]
    small = [[20, 20], [20, 20]]
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
