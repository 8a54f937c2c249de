"""What ranks exchange, apart from any model: bandwidth by size, whether what arrives is what was sent, and
how a rank that raises sets the others free.

Knows groups and their exchanges; no network.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from random import Random
from typing import Any

import torch
from torch import Tensor

from benchmarks.scaling.ranks import Ranks, Work
from chitu_diffusion.distributed.collectives import Collectives
from chitu_diffusion.distributed.plan import plan_for
from chitu_diffusion.distributed.process_groups import ProcessGroups


def links(ranks: Ranks, sizes: Sequence[int]) -> dict[str, Any]:
    """Seconds of both kinds of exchange by bytes that a rank sends; bandwidth is of one direction of one
    rank.
    """
    groups = ranks.layout(plan_for(ranks.world, ranks.world, cp=ranks.world, ulysses=ranks.world))
    rows = []
    for kind, size, work in link_exchanges(groups, ranks.device, sizes):
        took = ranks.each(work)
        rows.append({"kind": kind, "bytes": size, "seconds": took, "gigabytes_per_second": size / took / 1e9})
    return {"ranks": ranks.world, "rows": rows}


def link_exchanges(
    groups: ProcessGroups, device: torch.device, sizes: Sequence[int]
) -> Iterable[tuple[str, int, Work]]:
    """(kind, bytes that a rank sends, the exchange) for both ways in which blocks talk: `ring_shift` and
    `all_to_all`.
    """
    group = groups.ulysses
    for size in sizes:
        x = torch.zeros(size // 2, dtype=torch.bfloat16, device=device)
        each = size // 2 // (group.size - 1)

        def ring(x: Tensor = x) -> None:
            group.release_buffers()
            group.ring_shift([x], [group.recv_buffer(from_the_one_before(len(x), group.size), (), x)])()

        def all_to_all(x: Tensor = x, each: int = each) -> None:
            group.release_buffers()
            arriving = group.recv_buffer([[each] * group.size] * group.size, (), x)
            group.all_to_all([x[:each]] * group.size, arriving)()

        yield "ring", size, ring
        yield "all_to_all", 2 * each * (group.size - 1), all_to_all


def from_the_one_before(rows: int, size: int) -> list[list[int]]:
    """A table for `Collectives.recv_buffer`: each of `size` ranks gets so many rows from the one before."""
    return [[rows * (sender == (peer - 1) % size) for sender in range(size)] for peer in range(size)]


def exchanges(ranks: Ranks) -> dict[str, Any]:
    """Whether what arrives is what was sent, in each kind of exchange, with ranks that are late in turn."""
    found: dict[str, Any] = {}
    for axis, ulysses in (("ulysses", ranks.world), ("ring", 1)):
        groups = ranks.layout(plan_for(ranks.world, ranks.world, cp=ranks.world, ulysses=ulysses))
        told = ranks.gathered(wrong_arrivals(vars(groups)[axis], ranks.device))
        wrong = [each["wrong"] for each in told]
        found[axis] = {"by": groups.exchanges.get(axis, "gloo"), "parts": told[0]["parts"], "wrong": wrong}
    return found


def wrong_arrivals(group: Collectives, device: torch.device, rounds: int = 40) -> dict[str, int]:
    """Random parts sent round, several exchanges under way at once, ranks and readers late at random: how
    many came, and how many were not what the other rank had drawn.
    """
    common = Random(1)
    own = Random(group.index)
    like = torch.empty(0, dtype=torch.int32, device=device)
    before = (group.index - 1) % group.size
    after = (group.index + 1) % group.size
    found = {"parts": 0, "wrong": 0}

    def drawn(token: int, rows: int) -> Tensor:
        generator = torch.Generator(device).manual_seed(token)
        return torch.randint(-99, 99, (rows, 3, 8), generator=generator, device=device, dtype=torch.int32)

    def late() -> None:
        if device.type == "cuda":
            torch.cuda._sleep(own.randrange(1_000_000))  # cycles

    for turn in range(rounds):
        only_next = bool(turn % 2)
        group.release_buffers()
        under_way = []
        for _ in range(common.randrange(1, 4)):
            longest = common.choice((50, 5_000, 200_000))
            rows = [[common.randrange(1, longest) for _ in range(group.size)] for _ in range(group.size)]
            token = common.randrange(1 << 30)
            if only_next:
                ones = from_the_one_before(1, group.size)
                rows = [[n * m for n, m in zip(*each, strict=True)] for each in zip(rows, ones, strict=True)]
            late()
            arriving = group.recv_buffer(rows, (3, 8), like)
            leaving = [drawn(token + group.index * 8 + to, rows[to][group.index]) for to in range(group.size)]
            if only_next:
                wait = group.ring_shift([leaving[after]], [arriving])
            else:
                wait = group.all_to_all(leaving, arriving)
            sizes = [x.shape for x in leaving]
            del leaving  # what is given out anew must not be what still travels
            overwritten = [torch.full(size, 7, dtype=torch.int32, device=device) for size in sizes]
            del overwritten
            sources = [before] if only_next else [p for p in range(group.size) if p != group.index]
            expected = {s: (token + s * 8 + group.index, rows[group.index][s]) for s in sources}
            under_way.append((arriving, wait, expected))
        for arriving, wait, expected in under_way:
            wait()
            late()
            for source, drawing in expected.items():
                found["parts"] += 1
                found["wrong"] += not torch.equal(arriving.parts[source], drawn(*drawing))
    return found


def rank_that_raises(ranks: Ranks, kind: str) -> dict[str, Any]:
    """The last rank raises while the others wait in an exchange with it: how long they wait, and whether
    groups open again.

    Args:
        ranks: the run.
        kind: "group", an exchange of the process group; "sequence", one within a sequence; "refused", one
            within a sequence, through NCCL, that is refused half begun on every rank.
    """
    size = ranks.world
    plan = plan_for(size, size, cp=size, ulysses=size)
    groups = ranks.layout(plan, copies=kind == "sequence")
    x = torch.zeros(1 << 20, device=ranks.device)

    def exchange(x: Tensor = x) -> None:
        if kind == "group":
            groups.world.all_gather(x)
            return
        groups.ulysses.release_buffers()
        arriving = groups.ulysses.recv_buffer([[len(x)] * size] * size, (), x)
        groups.ulysses.all_to_all([x] * size, arriving)()

    for _ in range(3):
        exchange()
    began = time.monotonic()
    said = ""
    try:
        if kind == "refused":
            exchange(x.short())  # of a type that NCCL does not know
        if ranks.rank == size - 1:
            time.sleep(1.0)
            ranks.fall()
            raise ValueError("on purpose")
        exchange()
        float(x.sum())  # the host waits for the device here
    except (TypeError, ValueError, RuntimeError) as error:
        said = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    found = {"seconds": time.monotonic() - began, "broken": groups.broken, "raised": said}
    groups.abort()  # with gloo that is what wakes those who wait for this rank
    facts = ranks.gathered(found)
    groups.open()
    exchange()
    own = torch.full((1,), float(ranks.rank), device=ranks.device)
    again = [float(part[0]) for part in groups.world.all_gather(own)] == [float(r) for r in range(size)]
    return {"exchanges": groups.exchanges, "ranks": facts, "groups_again": again}
