"""Who wakes whom: ranks that abort, exchanges that do not move, and what becomes of groups that were cut
short.
"""

from __future__ import annotations

import os
import threading
import time

import pytest
import torch
import torch.distributed as dist
from ranks import new_store

from chitu_diffusion.config import set_nccl_defaults
from chitu_diffusion.distributed.plan import ParallelPlan
from chitu_diffusion.distributed.process_groups import InFlightTimer, ProcessGroups
from chitu_diffusion.executor.control_channel import ControlChannel
from chitu_diffusion.executor.heartbeat import HeartbeatMonitor


class Exchanges:
    """Stands for a rank's groups: remembers who cut them short, and has waited as long as it is told."""

    def __init__(self) -> None:
        self.waited = 0.0
        self.cut: list[tuple[str, int | None]] = []

    def cancel(self, why: str, generation: int | None) -> None:
        self.cut.append((why, generation))
        self.waited = 0.0


@pytest.fixture
def pair():
    """Two ranks in one process: their monitors and exchanges."""
    store = new_store()
    exchanges = [Exchanges(), Exchanges()]
    monitors = [
        HeartbeatMonitor(
            rank,
            2,
            dist.PrefixStore("pair", store),
            heartbeat_timeout=20,
            timeout=0.5,
            cancel=exchanges[rank].cancel,
            waiting=lambda rank=rank: exchanges[rank].waited,
        )
        for rank in (0, 1)
    ]
    yield monitors, exchanges
    for monitor in monitors:
        monitor.leave()


def within(seconds: float, true) -> bool:
    deadline = time.monotonic() + seconds
    while not true() and time.monotonic() < deadline:
        time.sleep(0.02)
    return true()


def test_a_rank_that_aborts_wakes_the_others(pair) -> None:
    monitors, exchanges = pair
    monitors[1].set_status("denoising, step 7 of task cat")
    monitors[1].report_abort(3)
    assert within(5, lambda: bool(exchanges[0].cut))
    why, generation = exchanges[0].cut[0]
    assert "rank 1 of 2" in why and "denoising, step 7 of task cat" in why and generation == 3
    assert exchanges[1].cut == []
    monitors[1].set_status("waiting for work")
    time.sleep(2.2)  # two more signs of life tell it again
    assert len(exchanges[0].cut) == 1
    assert monitors[0].lost is None


def test_an_exchange_that_does_not_move_is_cut_short(pair) -> None:
    _, exchanges = pair
    exchanges[0].waited = 0.4
    time.sleep(0.6)
    assert exchanges[0].cut == []
    exchanges[0].waited = 0.6
    assert within(2, lambda: bool(exchanges[0].cut))
    assert exchanges[0].cut == [("an exchange has not moved for 0.5 s", None)]


class Event:
    """A device's event that happens when it is told to."""

    def __init__(self) -> None:
        self.done = False
        self.recorded = False

    def record(self) -> None:
        self.recorded = True

    def query(self) -> bool:
        return self.done


def test_waiting_is_the_time_since_an_exchange_last_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[Event] = []
    monkeypatch.setattr(torch.cuda, "Event", lambda: events.append(Event()) or events[-1])
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    in_flight = InFlightTimer(torch.device("cuda"))
    assert in_flight.waiting() == 0
    clock[0] += 50  # nothing is under way
    for _ in range(2):
        with in_flight.exchange():
            assert in_flight.waiting() == 0
            clock[0] += 1
            assert in_flight.waiting() == 1  # the host hangs in the call
            clock[0] -= 1
    clock[0] += 30
    assert in_flight.waiting() == 30
    events[0].done = True
    assert in_flight.waiting() == 0
    clock[0] += 10
    assert in_flight.waiting() == 10
    events[1].done = True
    assert in_flight.waiting() == 0
    assert all(event.recorded for event in events)


def test_groups_that_are_not_open_cannot_be_cut_short() -> None:
    groups = ProcessGroups()
    groups.cancel("late")
    assert groups.broken is None and groups.waiting() == 0


def test_torch_is_told_not_to_end_the_process_unless_the_environment_says_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names = ("TORCH_NCCL_ASYNC_ERROR_HANDLING", "TORCH_NCCL_DUMP_ON_TIMEOUT", "TORCH_NCCL_ENABLE_MONITORING")
    for name in (*names, "TORCH_NCCL_HIGH_PRIORITY"):
        monkeypatch.setenv(name, "")  # restored after the test
        monkeypatch.delenv(name)
    monkeypatch.setenv(names[2], "1")
    set_nccl_defaults()
    assert [os.environ[name] for name in names] == ["0", "0", "1"]


def in_background(work) -> list[BaseException]:
    """What `work` raises, once it has."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            raised.append(error)

    threading.Thread(target=run, daemon=True).start()
    return raised


def test_groups_that_are_being_made_can_be_cut_short() -> None:
    """Before all are there, torch's own waiting would hear of nothing for a minute."""
    groups = ProcessGroups(ParallelPlan(ulysses=2), 0, store=new_store(), timeout=30)
    raised = in_background(groups.open)
    time.sleep(0.2)
    groups.cancel("rank 1 is lost", generation=0)
    time.sleep(0.1)
    assert not raised and groups.broken is None, "an earlier generation is none of its business"
    groups.cancel("rank 1 is lost")
    assert within(2, lambda: bool(raised))
    assert "rank 1 is lost" in str(raised[0]) and groups.broken == "rank 1 is lost"


def test_a_rank_that_does_not_come_is_named() -> None:
    groups = ProcessGroups(ParallelPlan(ulysses=3), 0, store=(store := new_store()), timeout=0.3)
    store.set("opens/1/1", "")
    with pytest.raises(RuntimeError, match=r"ranks \[2\] did not come within 0.3 s"):
        groups.open()


def test_every_thread_that_runs_a_unit_has_the_ranks_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA's current device is a thread's own; the engine may be called from any."""
    groups = ProcessGroups(ParallelPlan(ulysses=2), 1, torch.device("cuda:1"))
    groups._open = True
    chosen: list[tuple[int, torch.device]] = []
    monkeypatch.setattr(
        torch.cuda, "set_device", lambda device: chosen.append((threading.get_ident(), device))
    )
    raised = in_background(groups.open)
    assert within(2, lambda: bool(chosen)) and not raised
    assert chosen[0][0] != threading.get_ident() and chosen[0][1] == torch.device("cuda:1")


@pytest.mark.parametrize("launched", [True, False])
def test_a_store_that_is_gone_says_who_is_gone(launched: bool) -> None:
    store = new_store()
    exchanges = Exchanges()
    monitor = HeartbeatMonitor(
        0,
        2,
        store,
        heartbeat_timeout=20,
        timeout=1,
        cancel=exchanges.cancel,
        waiting=lambda: 0.0,
        launched=launched,
    )
    monitor.set_status("waiting for work")
    monitor.mark_store_lost("its store is gone (Broken pipe)")
    told = str(monitor.lost)
    who = "the launcher is lost" if launched else "rank 0 of 2 is lost, last heard of in starting"
    assert told.startswith(f"{who}: its store")
    monitor.leave()


def test_a_rank_that_was_never_heard_of_has_longer() -> None:
    """Python and torch may take long to come from a slow disk."""
    store = new_store()
    exchanges = Exchanges()
    monitor = HeartbeatMonitor(
        0, 2, store, heartbeat_timeout=1.5, timeout=3, cancel=exchanges.cancel, waiting=lambda: 0.0
    )
    time.sleep(2.2)
    assert monitor.lost is None
    assert within(5, lambda: monitor.lost is not None) and "no sign of life for 3 s" in str(monitor.lost)
    monitor.leave()


def test_an_order_during_which_ctrl_c_came_is_heard_again(pair) -> None:
    monitors, _ = pair
    held: dict[str, str] = {}

    class Interrupted:
        """A store whose answer Ctrl+C cuts off, once."""

        def __init__(self) -> None:
            self.times = 0

        def set(self, key: str, value: str) -> None:
            held[key] = value

        def check(self, keys: list[str]) -> bool:
            return all(key in held for key in keys)

        def get(self, key: str) -> str:
            self.times += 1
            if self.times == 1:
                raise KeyboardInterrupt
            return held[key]

    leader, follower = (ControlChannel(Interrupted(), monitor) for monitor in monitors)  # type: ignore[arg-type]
    leader.publish({"do": "unit", "id": "cat"})
    with pytest.raises(KeyboardInterrupt):
        follower.receive(1)
    assert follower.receive(1) == {"do": "unit", "id": "cat"}
