"""Two ranks that were cut short: what each has saved, and from what both go on."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from running import config_for
from tiny_model import write_tiny_model

from chitu_diffusion.distributed.plan import ParallelPlan
from chitu_diffusion.engine import Engine
from chitu_diffusion.errors import RankLostError
from chitu_diffusion.executor.worker_group import WorkerGroup
from chitu_diffusion.pipelines import denoising
from chitu_diffusion.task import DiffusionUserParams

STEPS = 8
ASKED = DiffusionUserParams(prompt="A cat", num_inference_steps=STEPS, num_frames=5, seed=1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("ranks") / "tiny")


@contextmanager
def engine_on(
    rank: int, store: dist.Store, folder: str, out: str, number: int, every_s: float = 0.0, **more: Any
) -> Iterator[Engine]:
    """The engine of the run of a number; ranks but the first serve."""
    place = dist.PrefixStore(str(number), store)
    workers = WorkerGroup(ParallelPlan(ulysses=2), rank, place, device=torch.device("cpu"), timeout=15.0)
    config = config_for(Path(folder), Path(out))
    config.checkpoint.every_s = every_s
    config.scheduler.keep_ended = more.get("keep_ended", 100)
    engine = Engine(config, workers=workers)
    try:
        yield engine
    finally:
        engine.close()


def told(out: str | Path, **values: Any) -> None:
    Path(out, "told.json").write_text(json.dumps(values))


def asked_of(out: Path) -> dict[str, Any]:
    return json.loads((out / "told.json").read_text())


# -- files that do not go together


def spoil_and_go_on(rank: int, world: int, store: dist.Store, folder: str, out: str, how: str) -> None:
    """Rank 1's newest file is damaged, or gone, or of another seed."""
    for number, seed in enumerate((1, 2, 2)):
        with engine_on(rank, store, folder, out, number) as engine:
            if not engine.is_driver:
                continue
            kept = Path(out, "one" if number == 0 else "two")
            if number == 2:
                newest = sorted(kept.glob("rank1-*"))[-1]
                if how == "cut":
                    newest.write_bytes(newest.read_bytes()[:-100])
                if how == "gone":
                    newest.unlink()
                if how == "other":
                    for file in kept.glob("rank1-*"):
                        file.unlink()
                    for file in Path(out, "one").glob("rank1-*"):
                        shutil.copy(file, kept / file.name)
            asked = dataclasses.replace(ASKED, seed=seed, flexcache="interval")
            task = engine.submit(asked, checkpoints=kept)
            if number == 2:
                resumed = dataclasses.asdict(task.resumed)
                engine.run_until_idle()
                told(out, resumed=resumed, seed=task.seed, status=str(task.status), left=os.path.exists(kept))
            for _ in range(5 if number < 2 else 0):
                engine.step()


@pytest.mark.parametrize(("how", "step", "said"), [
    ("cut", 3, "cannot be used"), ("gone", 3, ""), ("other", 0, "seed 1, here 2"),
])  # fmt: skip
def test_the_newest_step_that_all_have_counts(
    model: Path, tmp_path: Path, how: str, step: int, said: str
) -> None:
    run_ranks(2, spoil_and_go_on, str(model), str(tmp_path), how, errors=tmp_path, seconds=60)
    seen = asked_of(tmp_path)
    assert seen["resumed"]["step"] == step and seen["seed"] == 2, seen
    assert said in "; ".join(seen["resumed"]["differs"]) or step, seen
    assert seen["status"] == "finished" and not seen["left"]


def fewer_ranks(rank: int, world: int, store: dist.Store, folder: str, out: str) -> None:
    with engine_on(rank, store, folder, out, 0) as engine:
        if engine.is_driver:
            engine.submit(ASKED, checkpoints=f"{out}/kept")
            for _ in range(4):
                engine.step()


def test_one_rank_clears_the_files_of_two(model: Path, tmp_path: Path) -> None:
    run_ranks(2, fewer_ranks, str(model), str(tmp_path), errors=tmp_path, seconds=60)
    assert len(list((tmp_path / "kept").glob("rank1-*"))) == 2
    with Engine(config_for(model, tmp_path)) as engine:
        task = engine.submit(ASKED, checkpoints=tmp_path / "kept")
        assert task.resumed is not None and task.resumed.step == 3
        engine.run_until_idle()
    assert not (tmp_path / "kept").exists()


# -- Ctrl+C


def interrupt_both(rank: int, world: int, store: dist.Store, folder: str, out: str, where: str) -> None:
    """Ctrl+C at a place on rank 1, and on rank 0 while it waits for the report; then another run."""
    compute = denoising.predict_velocity
    calls = [0]

    def velocity(*given: Any, **more: Any) -> Any:
        calls[0] += 1
        if calls[0] == 9 and where == "before":
            os.kill(os.getpid(), signal.SIGINT)
        answer = compute(*given, **more)
        if calls[0] == 9 and where == "after":
            os.kill(os.getpid(), signal.SIGINT)
        return answer

    with engine_on(rank, store, folder, out, 0, every_s=3600.0) as engine:
        channel = engine._executor._channel  # type: ignore[attr-defined]
        gather = channel.gather_status

        def interrupted(kind: str, *given: Any) -> Any:
            units[0] += kind == "unit"
            if units[0] == 6 and (rank == 0 or where == "reports"):
                units[0] += 1
                os.kill(os.getpid(), signal.SIGINT)
            return gather(kind, *given)

        units = [0]
        channel.gather_status = interrupted
        if rank == 1:
            denoising.predict_velocity = velocity
        if engine.is_driver:
            task = engine.submit(ASKED, checkpoints=f"{out}/kept")
            try:
                engine.run_until_idle()
            except KeyboardInterrupt:
                saved = [task.current_step for task in engine.save_tasks()]
            error = task.error_message
        else:
            engine.run_worker()
    denoising.predict_velocity = compute
    with engine_on(rank, store, folder, out, 1) as engine:
        if engine.is_driver:
            task = engine.submit(ASKED, checkpoints=f"{out}/kept")
            told(out, saved=saved, error=error, step=task.resumed and task.resumed.step)


@pytest.mark.parametrize("where", ["before", "after", "reports", "nowhere"])
def test_ctrl_c_on_both_ranks_saves_one_step(model: Path, tmp_path: Path, where: str) -> None:
    run_ranks(2, interrupt_both, str(model), str(tmp_path), where, errors=tmp_path, seconds=60)
    seen = asked_of(tmp_path)
    assert seen["error"] is None and seen["saved"] == [seen["step"]] and seen["step"] >= 4, seen


# -- names, and rounds


def reuse_names(rank: int, world: int, store: dist.Store, folder: str, out: str) -> None:
    with engine_on(rank, store, folder, out, 0, keep_ended=2) as engine:
        if not engine.is_driver:
            engine.run_worker()
            told(out, kept=len(engine.pool))
            return
        for name in ("a", "b", "c", "d", "a"):
            task = engine.submit(dataclasses.replace(ASKED, num_inference_steps=1, task_id=name))
            engine.run_until_idle()
            assert str(task.status) == "finished", task.error_message


def test_a_name_comes_again_and_workers_forget(model: Path, tmp_path: Path) -> None:
    run_ranks(2, reuse_names, str(model), str(tmp_path), errors=tmp_path, seconds=60)
    assert asked_of(tmp_path)["kept"] <= 3


def report_of_two_things(rank: int, world: int, store: dist.Store, folder: str, out: str) -> None:
    place = WorkerGroup(ParallelPlan(ulysses=2), rank, store, device=torch.device("cpu"), timeout=5.0)
    try:
        place.channel.gather_status("unit" if rank else "checkpoints", {}, 5.0)
    except RankLostError as error:
        Path(out, f"{rank}.said").write_text(str(error))
    place.leave()


def test_ranks_that_are_not_at_one_place_say_so(model: Path, tmp_path: Path) -> None:
    run_ranks(2, report_of_two_things, str(model), str(tmp_path), errors=tmp_path, seconds=60)
    assert "rank 1 of 2" in (said := (tmp_path / "0.said").read_text()) and "'unit'" in said
    assert (tmp_path / "1.said").exists()
