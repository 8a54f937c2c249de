"""The engine on two ranks: in step through tasks, failures and memory that runs out; and an end when a rank
dies or freezes.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import new_store, run_ranks, start_ranks, wait_for
from running import CAT, config_for
from tiny_model import write_tiny_model

from chitu_diffusion.distributed.plan import ParallelPlan
from chitu_diffusion.engine import Engine
from chitu_diffusion.errors import UsageError
from chitu_diffusion.executor.worker_group import WorkerGroup
from chitu_diffusion.pipelines import denoising, stages
from chitu_diffusion.task import DiffusionUserParams

HEARTBEAT_TIMEOUT = 4.0
ENDS_WITHIN = 15.0
REQUESTS = 165
"""A tenth of them is cancelled."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("ranks") / "tiny")


def engine_on(rank: int, store: dist.Store, folder: str, out: str, *, timeout: float = 10.0) -> Engine:
    workers = WorkerGroup(
        ParallelPlan(ulysses=2),
        rank,
        store,
        device=torch.device("cpu"),
        timeout=timeout,
        heartbeat_timeout=HEARTBEAT_TIMEOUT,
    )
    return Engine(config_for(Path(folder), Path(out)), workers=workers)


def params(prompt: str = CAT, **more: Any) -> DiffusionUserParams:
    return DiffusionUserParams(**{"prompt": prompt, "num_inference_steps": 3, "seed": 1, **more})


def drive(engine: Engine) -> None:
    while engine.has_work():
        engine.step()


def facts(engine: Engine) -> list[list[Any]]:
    return [
        [
            task.task_id,
            task.seed,
            str(task.status),
            task.error_message,
            task.current_step,
            task.num_inference_steps,
        ]
        for task in engine.pool
    ]


# -- in step


def poisoned(rank: int):
    """Velocities that fail on rank 1 alone: with an error, or once for want of memory."""
    compute = denoising.predict_velocity
    once = [True]

    def velocity(backend, latent, text, timestep, **more):
        poison = velocity.poison
        if rank == 1 and poison == "error" and timestep < 900:
            raise ValueError("boom")
        if rank == 1 and poison == "cut" and timestep < 900:
            # on a GPU nothing raises here: the unit ends well, with anything
            backend.groups.cancel("as the watch does")
        if rank == 1 and poison == "memory" and once:
            once.clear()
            raise MemoryError("no room on this rank")
        return compute(backend, latent, text, timestep, **more)

    velocity.poison = ""
    return velocity


def lead_and_follow(rank: int, world: int, store: dist.Store, folder: str, out: str) -> None:
    """Every scene on one engine; what each rank knows goes to a file."""
    denoising.predict_velocity = velocity = poisoned(rank)
    engine = engine_on(rank, store, folder, out, timeout=2.0)
    seen = {}
    if rank == 0:
        engine.submit(params())  # rank 0 alone is given this one
    drive(engine)
    seen["one"] = facts(engine)
    assert not engine.has_work() and not engine.has_work()

    # the same script on both ranks, and each would draw its own seed and id
    task = engine.submit(params(seed=None))
    drive(engine)
    seen["own"] = [task.task_id, task.seed, str(task.status)]

    for poison in ("error", "cut", "", "memory"):
        velocity.poison = poison
        engine.submit(params(task_id=f"poison-{poison}"))
        drive(engine)
    seen["poisoned"] = facts(engine)[2:]
    seen["level"] = engine.backend.low_mem_level

    time.sleep(3.0 if rank == 0 else 0)  # longer than the groups' timeout: the other rank idles
    task = engine.submit(params(task_id="cancelled"))
    engine.step()
    if rank == 0:
        engine.cancel("cancelled")
        engine.submit(params(task_id="last"))
        engine.run_until_idle()
    engine.close()  # the other rank serves until rank 0 closes
    engine.close()
    seen["end"] = facts(engine)[6:]
    Path(out, f"{rank}.json").write_text(json.dumps(seen))


@pytest.fixture(scope="module")
def scenes(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], Path]:
    out = tmp_path_factory.mktemp("scenes")
    run_ranks(2, lead_and_follow, str(model), str(out), errors=out, seconds=60)
    return [json.loads((out / f"{rank}.json").read_text()) for rank in (0, 1)], out


def test_both_ranks_know_the_same_of_every_task(scenes) -> None:
    leader, follower = (dict(seen) for seen in scenes[0])
    ours = leader.pop("poisoned")
    theirs = follower.pop("poisoned")
    # the rank that failed knows its own error; the others know whose it was, and where that runs
    assert ours[0][3].endswith(theirs[0][3])
    assert ours[1][3].split(": ", 1)[1] == theirs[1][3].split(": ", 1)[1]
    assert ours[2:] == theirs[2:]
    assert leader == follower
    assert leader["own"][2] == "finished"


def test_only_rank_0_saves(scenes) -> None:
    (leader, _), out = scenes
    names = [
        facts[0]
        for facts in (*leader["one"], leader["own"], *leader["poisoned"], *leader["end"])
        if facts[2] == "finished"
    ]
    assert sorted(file.stem for file in out.glob("*.mp4")) == sorted(names)


def test_an_exception_on_one_rank_fails_the_task_on_all_and_the_group_lives(scenes) -> None:
    failed, _, after, _ = scenes[0][0]["poisoned"]
    assert failed[2] == "failed"
    assert "rank 1 of 2" in failed[3] and "boom" in failed[3] and "denoising, step" in failed[3]
    assert after[2] == "finished"


def test_what_was_computed_after_an_interrupted_exchange_is_void(scenes) -> None:
    for seen in scenes[0]:
        _, cut, after, _ = seen["poisoned"]
        assert cut[2] == "failed" and "rank 1 of 2" in cut[3] and "cut short: as the watch does" in cut[3]
        assert after[2] == "finished"


def test_memory_that_runs_out_on_one_rank_raises_the_level_on_all(scenes) -> None:
    leader, _ = scenes[0]
    *_, hungry = leader["poisoned"]
    assert hungry[2] == "finished" and leader["level"] == 1


def test_cancelling_reaches_all_ranks(scenes) -> None:
    assert [task[2] for task in scenes[0][0]["end"]] == ["cancelled", "finished"]


# -- other threads


def submit_from_a_thread(rank: int, world: int, store: dist.Store, folder: str, out: str) -> None:
    """A thread of rank 0 submits and cancels while its main thread steps; rank 1 serves."""
    engine = engine_on(rank, store, folder, out)
    tasks = []
    cancelled = []

    def submit() -> None:
        for index in range(REQUESTS):
            tasks.append(engine.submit(params(num_inference_steps=1, num_frames=1, task_id=f"t{index}")))
            if index % 10 == 9:
                cancelled.append(engine.cancel(f"t{index}"))
            time.sleep(0.002)

    if rank == 0:
        thread = threading.Thread(target=submit)
        thread.start()
        while thread.is_alive() or engine.has_work():
            engine.step()
        statuses = [str(task.status) for task in tasks]
        assert not any(task.error for task in tasks), [task.error_message for task in tasks if task.error][:2]
        Path(out, "seen.json").write_text(json.dumps([statuses, cancelled, len(engine.pool)]))
    engine.close()


def test_a_thread_submits_and_cancels_while_another_steps(model: Path, tmp_path: Path) -> None:
    run_ranks(2, submit_from_a_thread, str(model), str(tmp_path), errors=tmp_path, seconds=100)
    statuses, cancelled, kept = json.loads((tmp_path / "seen.json").read_text())
    # a task that ended before it was cancelled has its video
    assert len(statuses) == REQUESTS and set(statuses) <= {"finished", "cancelled"}
    assert statuses.count("cancelled") <= sum(cancelled)
    assert all(status == "finished" for index, status in enumerate(statuses) if index % 10 != 9)
    assert len(list(tmp_path.glob("*.mp4"))) == statuses.count("finished")
    assert kept <= 100


# -- checkpoints

RESUMED = {"num_inference_steps": 8, "num_frames": 9}
CACHES = {"none": None, "step": {"strategy": "interval", "interval": 3}, "module": "taylorseer"}


def stop_and_go_on(
    rank: int, world: int, store: dist.Store, folder: str, out: str, plan: ParallelPlan
) -> None:
    """For each cache: a whole run, and one that is closed after 5 steps and goes on in another engine."""
    seen: dict[str, Any] = {}

    def engine(number: int) -> Engine:
        workers = WorkerGroup(plan, rank, dist.PrefixStore(str(number), store), device=torch.device("cpu"))
        config = config_for(Path(folder), Path(out))
        config.checkpoint.every_s = 0
        return Engine(config, workers=workers)

    for index, (name, flexcache) in enumerate(CACHES.items()):
        asked = params(**RESUMED, flexcache=flexcache, task_id=name)
        place = f"{out}/kept-{name}"
        first = engine(2 * index)
        if first.is_driver:
            first.submit(dataclasses.replace(asked, task_id="whole", save_path=f"{out}/{name}-whole.npy"))
            first.run_until_idle()
            first.submit(dataclasses.replace(asked, save_path=f"{out}/{name}-part.npy"), checkpoints=place)
            for _ in range(6):
                first.step()
        first.close()
        second = engine(2 * index + 1)
        if second.is_driver:
            path = f"{out}/{name}-part.npy"
            task = second.submit(dataclasses.replace(asked, save_path=path), checkpoints=place)
            seen[name] = dataclasses.asdict(task.resumed) if task.resumed else None
            second.run_until_idle()
        second.close()
    if rank == 0:
        Path(out, "resumed.json").write_text(json.dumps(seen))


@pytest.mark.parametrize("layout", ["u2", "r2", "cfg2"])
def test_ranks_go_on_together(model: Path, tmp_path: Path, layout: str) -> None:
    plan = ParallelPlan(**{"u2": {"ulysses": 2}, "r2": {"ring": 2}, "cfg2": {"cfg": 2}}[layout])
    run_ranks(2, stop_and_go_on, str(model), str(tmp_path), plan, errors=tmp_path, seconds=100)
    seen = json.loads((tmp_path / "resumed.json").read_text())
    for name in CACHES:
        assert seen[name]["step"] == 5 and seen[name]["exact"], seen
        assert not (tmp_path / f"kept-{name}").exists()
        whole, part = (np.load(tmp_path / f"{name}-{which}.npy") for which in ("whole", "part"))
        assert np.array_equal(whole, part), name


def lose_a_file(rank: int, world: int, store: dist.Store, folder: str, out: str) -> None:
    """Rank 1's checkpoints are gone when the run goes on; then the layout is another."""
    for number, layout in enumerate([{"ulysses": 2}, {"ulysses": 2}, {"cfg": 2}]):
        plan = ParallelPlan(**layout)
        workers = WorkerGroup(plan, rank, dist.PrefixStore(str(number), store), device=torch.device("cpu"))
        config = config_for(Path(folder), Path(out))
        config.checkpoint.every_s = 0
        engine = Engine(config, workers=workers)
        if engine.is_driver:
            if number == 1:
                for file in Path(out, "kept").glob("rank1-*"):
                    file.unlink()
            task = engine.submit(
                params(**RESUMED, flexcache=CACHES["step"] if number < 2 else None), checkpoints=f"{out}/kept"
            )
            if number:
                Path(out, f"resumed-{number}.json").write_text(json.dumps(dataclasses.asdict(task.resumed)))
            for _ in range(4):
                engine.step()
        engine.close()


def test_ranks_without_the_same_checkpoint_start_over(model: Path, tmp_path: Path) -> None:
    run_ranks(2, lose_a_file, str(model), str(tmp_path), errors=tmp_path, seconds=60)
    lost, other = (json.loads((tmp_path / f"resumed-{number}.json").read_text()) for number in (1, 2))
    # rank 1 finds the file of rank 0, whose cache holds the tokens of rank 0: it is told by the layout, or by
    # the step
    assert lost["step"] == 0, lost
    assert other["step"] == 0 and any(
        "layout cfg1u2r1, here cfg2u1r1" in note for note in other["differs"]
    ), other


# -- a rank that dies, freezes, or is interrupted


def work_on(rank: int, world: int, store: dist.Store, folder: str, out: str) -> None:
    engine = engine_on(rank, store, folder, out)
    try:
        if rank == 0:
            engine.submit(params(num_inference_steps=1000))
        while engine.has_work():
            event = engine.step()
            if event is not None and event.step == 3:
                Path(out, f"begun-{rank}").touch()
    finally:
        engine.close()


FAULTS = [(1, signal.SIGKILL), (0, signal.SIGKILL), (1, signal.SIGSTOP), (0, signal.SIGSTOP)]


@pytest.mark.parametrize(("victim", "kind"), FAULTS, ids=lambda value: getattr(value, "name", value))
def test_a_lost_rank_ends_the_group_and_is_named(
    model: Path, tmp_path: Path, victim: int, kind: signal.Signals
) -> None:
    store = new_store()
    ranks = start_ranks(2, work_on, str(model), str(tmp_path), store=store, errors=tmp_path)
    wait_until_begun(tmp_path)
    os.kill(ranks[victim].pid, kind)
    took = wait_for(ranks, ENDS_WITHIN)
    told = (tmp_path / f"{1 - victim}.txt").read_text()
    # where: its last sign of life may fall between two units; the survivor's own place stands beside it
    assert (
        f"rank {victim} of 2 ({os.uname().nodename}, process {ranks[victim].pid}) is lost, last heard of in "
        in told
    )
    assert "in denoising, step" in told
    assert ranks[1 - victim].exitcode == 1
    assert took < ENDS_WITHIN


@pytest.mark.parametrize("interrupted", [(0, 1), (0,), (1,)], ids=str)
def test_ctrl_c_ends_all_ranks(model: Path, tmp_path: Path, interrupted: tuple[int, ...]) -> None:
    store = new_store()
    ranks = start_ranks(2, work_on, str(model), str(tmp_path), store=store, errors=tmp_path)
    wait_until_begun(tmp_path)
    for rank in interrupted:
        os.kill(ranks[rank].pid, signal.SIGINT)
    wait_for(ranks, ENDS_WITHIN)
    for rank in (0, 1):
        # rank 0, caught between two units, says stop; whoever hears that before the next unit goes home in
        # peace
        sent_home = rank not in interrupted and 0 in interrupted and ranks[rank].exitcode == 0
        assert sent_home or "KeyboardInterrupt" in (tmp_path / f"{rank}.txt").read_text()


def interrupted_between_units(rank: int, world: int, store: dist.Store, folder: str, out: str) -> None:
    engine = engine_on(rank, store, folder, out)
    try:
        if rank == 0:
            engine.submit(params(num_inference_steps=1000))
        while engine.has_work():
            event = engine.step()
            if rank == 1 and event is not None and event.step == 3:
                signal.raise_signal(signal.SIGINT)
    finally:
        engine.close()


def test_ctrl_c_in_a_workers_own_script_ends_all_ranks(model: Path, tmp_path: Path) -> None:
    """No unit is running on that rank: nothing but its close knows."""
    store = new_store()
    ranks = start_ranks(2, interrupted_between_units, str(model), str(tmp_path), store=store, errors=tmp_path)
    wait_for(ranks, ENDS_WITHIN)
    assert "KeyboardInterrupt: on rank 1" in (tmp_path / "0.txt").read_text()
    assert "KeyboardInterrupt" in (tmp_path / "1.txt").read_text()


def wait_until_begun(out: Path, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while len(list(out.glob("begun-*"))) < 2:
        assert time.monotonic() < deadline, [file.read_text() for file in out.glob("*.txt")]
        time.sleep(0.02)
    time.sleep(1.2)  # a sign of life later, the others know the stage


def save_slowly(rank: int, world: int, store: dist.Store, folder: str, out: str) -> None:
    """Rank 1 goes while rank 0 saves, which takes longer than a rank that hangs is left alone."""
    write = stages.write_video

    def slowly(*given: Any, **more: Any) -> Any:
        Path(out, "saving").touch()
        time.sleep(4)
        return write(*given, **more)

    stages.write_video = slowly  # type: ignore[assignment]
    engine = engine_on(rank, store, folder, out)
    if rank == 0:
        engine.submit(params(num_inference_steps=1))
        drive(engine)
    engine.close()


def test_a_video_that_is_being_saved_is_saved_whoever_is_lost(model: Path, tmp_path: Path) -> None:
    """Nobody else is needed for it, and a process that is ended over it leaves half a file behind."""
    ranks = start_ranks(
        2, save_slowly, str(model), str(tmp_path), store=(store := new_store()), errors=tmp_path
    )
    deadline = time.monotonic() + 30
    while not (tmp_path / "saving").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0.5)
    ranks[1].kill()
    wait_for(ranks, ENDS_WITHIN)
    # rank 1 had done all that is its, and had said so
    assert ranks[0].exitcode == 0 and not (tmp_path / "0.txt").exists()
    assert len(list(tmp_path.glob("*.mp4"))) == 1 and not list(tmp_path.glob("*part*"))
    del store


def rest_between(rank: int, world: int, store: dist.Store, folder: str, out: str) -> None:
    engine = engine_on(rank, store, folder, out)
    try:
        if rank == 0:
            engine.submit(params(num_inference_steps=1000))
            engine.step()
            for name in ("begun-0", "begun-1"):
                Path(out, name).touch()
            time.sleep(2.5)  # rank 1 waits for the next order
            drive(engine)
    finally:
        engine.close()


def test_ctrl_c_is_heard_by_a_rank_that_waits(model: Path, tmp_path: Path) -> None:
    """It is the others' Ctrl+C with the next unit, and no lost rank."""
    ranks = start_ranks(
        2, rest_between, str(model), str(tmp_path), store=(store := new_store()), errors=tmp_path
    )
    wait_until_begun(tmp_path)
    os.kill(ranks[1].pid, signal.SIGINT)
    wait_for(ranks, ENDS_WITHIN)
    assert "KeyboardInterrupt" in (told := (tmp_path / "0.txt").read_text()) and "lost" not in told
    del store


def load_badly(rank: int, world: int, store: dist.Store, folder: str, out: str) -> None:
    workers = WorkerGroup(
        ParallelPlan(ulysses=2),
        rank,
        store,
        device=torch.device("cpu"),
        timeout=10,
        heartbeat_timeout=HEARTBEAT_TIMEOUT,
    )
    Engine(config_for(Path(folder if rank == 0 else out), Path(out)), workers=workers)


def test_a_rank_that_cannot_load_is_named_at_once(model: Path, tmp_path: Path) -> None:
    ranks = start_ranks(
        2, load_badly, str(model), str(tmp_path), store=(store := new_store()), errors=tmp_path
    )
    wait_for(ranks, ENDS_WITHIN)
    assert "rank 1 of 2" in (told := (tmp_path / "0.txt").read_text()) and "it left: " in told
    del store


def test_a_layout_that_cannot_be_is_refused(model: Path, tmp_path: Path) -> None:
    config = config_for(model, tmp_path)
    config.infer.diffusion.cfg_size = 2
    with pytest.raises(UsageError, match="use 1, or start 2 ranks"):
        Engine(config)
