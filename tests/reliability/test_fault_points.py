"""Two tasks take turns, and at the first fail point something goes wrong, at the second, ... until none is
left: an error, memory or a disk that runs out, a NaN, Ctrl+C, a cancelling. Each task ends, and none changes
another.
"""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from card import Card
from conftest import MakeConfig
from injecting import FailAt, files_below, frames_sha256
from torch import Tensor

from chitu_diffusion.config import EngineConfig
from chitu_diffusion.engine import Engine
from chitu_diffusion.errors import NonFiniteError, StageError
from chitu_diffusion.files.faults import fail_points
from chitu_diffusion.task import DiffusionTask, Progress, TaskStatus
from chitu_diffusion.task.events import END_STATES

SEEDS = (1, 2)
STEPS = 2
FULL = OSError(errno.ENOSPC, "No space left on device")


class Jobs:
    """Two requests with a file and a folder for checkpoints each; what was left of earlier ones goes.

    Args:
        folder: for all of it.
    """

    def __init__(self, folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        self.folder = folder
        self.tasks: dict[int, DiffusionTask] = {}

    def submit(self, engine: Engine) -> None:
        """Both, once more where they were there before."""
        for seed in SEEDS:
            more = {"save_path": str(self.path(seed)), "role": f"of {seed}"}
            checkpoints = self.folder / f"kept-{seed}"
            self.tasks[seed] = engine.submit(
                "a cat", seed=seed, num_inference_steps=STEPS, checkpoints=checkpoints, **more
            )

    def path(self, seed: int) -> Path:
        """Of a seed's video."""
        return self.folder / f"{seed}.mp4"

    def hashes(self) -> dict[int, str]:
        """Of the videos that stand, each of which must be whole."""
        return {seed: frames_sha256(self.path(seed)) for seed in SEEDS if self.path(seed).exists()}

    def with_status(self, status: TaskStatus) -> list[int]:
        """The seeds of the tasks that ended, or are, so."""
        return [seed for seed, task in self.tasks.items() if task.status is status]

    def strays(self) -> list[str]:
        """What lies there beside videos of finished tasks and checkpoints of others."""
        videos = {f"{seed}.mp4" for seed in self.with_status(TaskStatus.FINISHED)}
        kept = {f"kept-{seed}" for seed, task in self.tasks.items() if task.status is not TaskStatus.FINISHED}
        return [
            name
            for name in files_below(self.folder)
            if name not in videos and (name.partition("/")[0] not in kept or ".part" in name)
        ]


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernel has outlives the process; waiting for the disk is most of the time here."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture
def config(tiny_folder: Path, make_config: MakeConfig) -> EngineConfig:
    return make_config(tiny_folder, checkpoint__every_s=0, scheduler__policy="fair", scheduler__keep_ended=3)


@pytest.fixture
def engine(config: EngineConfig) -> Iterator[Engine]:
    with Engine(config) as made:
        yield made


@pytest.fixture
def alone(engine: Engine, tmp_path: Path) -> dict[int, str]:
    """The videos where nothing goes wrong."""
    jobs = Jobs(tmp_path / "alone")
    jobs.submit(engine)
    engine.run_until_idle()
    assert jobs.strays() == []
    return jobs.hashes()


def is_of_files(point: str, value: Any) -> bool:
    return point.startswith(("file.", "mux.", "checkpoint."))


def is_where_disks_fill(point: str, value: Any) -> bool:
    return point in ("file.begin", "file.filled", "file.rename", "mux.frame")


def raise_runtime_error(point: str, value: Any) -> None:
    raise RuntimeError("boom")


def raise_full(point: str, value: Any) -> None:
    raise FULL


def raise_out_of_memory(point: str, value: Any) -> None:
    raise (
        MemoryError("no room") if is_of_files(point, value) else torch.OutOfMemoryError("CUDA out of memory")
    )


def write_nan(point: str, value: Tensor) -> None:
    value.view(-1)[0] = torch.nan


FAULTS: dict[str, Any] = {
    "raise": (raise_runtime_error, lambda point, value: not is_of_files(point, value)),
    "full disk": (raise_full, is_where_disks_fill),
    "out of memory": (
        raise_out_of_memory,
        lambda point, value: point not in ("file.renamed", "checkpoint.clear"),
    ),
    "nan": (write_nan, lambda point, value: isinstance(value, Tensor)),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_a_fault_at_every_point_costs_one_task_at_most(
    kind: str, engine: Engine, alone: dict[int, str], tmp_path: Path, card: Card
) -> None:
    act, counts = FAULTS[kind]
    failed: list[StageError] = []
    rescued = 0
    points = 0
    for number in itertools.count() if kind == "nan" else card.every_point():
        engine.backend.low_mem_level = 0
        jobs = Jobs(tmp_path / "jobs")
        handler = FailAt(number, act, counts)
        with fail_points(handler):
            jobs.submit(engine)
            engine.run_until_idle(raise_on_failure=False)
        if handler.at is None:
            break
        bad = jobs.with_status(TaskStatus.FAILED)
        good = jobs.with_status(TaskStatus.FINISHED)
        assert len(bad) <= 1 and len(bad) + len(good) == len(SEEDS), handler.at
        assert jobs.hashes() == {seed: alone[seed] for seed in good}, handler.at
        assert jobs.strays() == [], handler.at
        rescued += not bad
        for seed in bad:
            error = jobs.tasks[seed].error
            assert isinstance(error, StageError)
            failed.append(error)
        jobs.submit(engine)
        engine.run_until_idle()
        assert jobs.hashes() == alone and jobs.strays() == [], handler.at
        points += 1
    card.add(points=points, survived=points, rescued=rescued, failed=len(failed))
    assert points >= (8 if kind == "nan" else card.rounds(4, 14))
    if kind == "out of memory":
        assert not failed, "there is a level above"
    if kind in ("raise", "nan"):
        assert not rescued
    if kind == "nan":
        assert all(isinstance(error.cause, NonFiniteError) for error in failed)
        found = [error.step for error in failed if error.stage == "denoising"]
        assert sorted(found) == [0, 0, 0, 0, 1, 1]  # the noise and both velocities of each task


def test_ctrl_c_at_every_point_loses_no_step_that_was_done(
    config: EngineConfig, alone: dict[int, str], tmp_path: Path, card: Card
) -> None:
    def interrupt(point: str, value: Any) -> None:
        signal.raise_signal(signal.SIGINT)

    points = 0
    lost: list[int] = []
    engine = Engine(config)
    for number in card.every_point():
        jobs = Jobs(tmp_path / "jobs")
        handler = FailAt(number, interrupt)
        caught = False
        try:
            with fail_points(handler):
                jobs.submit(engine)
                engine.run_until_idle()
        except KeyboardInterrupt:
            caught = True
        if handler.at is None:
            break
        assert caught, handler.at
        done = sum(task.current_step for task in jobs.tasks.values())
        if points % 3 == 0:  # as another process; else the same engine goes on
            engine.close()
            ended = jobs.with_status(TaskStatus.FINISHED)
            engine = Engine(config)
            jobs.submit(engine)
            went_on = [task.current_step for seed, task in jobs.tasks.items() if seed not in ended]
            lost.append(done - sum(went_on) - STEPS * len(ended))
        engine.run_until_idle()
        assert jobs.hashes() == alone and jobs.strays() == [], handler.at
        points += 1
    engine.close()
    card.add(points=points, survived=points, steps_lost=lost)
    assert points > card.rounds(13, 40) and set(lost) == {0}


def test_cancelled_three_times_at_every_point_it_ends_once(
    config: EngineConfig, alone: dict[int, str], tmp_path: Path, card: Card
) -> None:
    events: list[Progress] = []
    points = 0
    cancelled = 0
    with Engine(config, on_event=events.append) as engine:
        for number in card.every_point():
            jobs = Jobs(tmp_path / "jobs")
            events.clear()

            def cancel(point: str, value: Any, jobs: Jobs = jobs) -> None:
                for _ in range(3):
                    engine.cancel(jobs.tasks[2].task_id)

            handler = FailAt(number, cancel)
            jobs.submit(engine)
            with fail_points(handler):
                engine.run_until_idle()
            if handler.at is None:
                break
            task = jobs.tasks[2]
            assert task.status in (TaskStatus.CANCELLED, TaskStatus.FINISHED), handler.at
            ends = [event for event in events if event.task_id == task.task_id and event.status in END_STATES]
            assert len(ends) <= 1 and task.buffer.latent is None and task.buffer.conditioning is None
            cancelled += task.status is TaskStatus.CANCELLED
            expected = {seed: alone[seed] for seed in jobs.with_status(TaskStatus.FINISHED)}
            assert jobs.hashes() == expected and 1 in expected, handler.at
            assert jobs.strays() == [], handler.at
            points += 1
    card.add(points=points, survived=points, cancelled=cancelled, double_ends=0)
    assert points > card.rounds(13, 40) and cancelled > card.rounds(5, 20)
