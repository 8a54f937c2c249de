"""An engine's tasks and their checkpoints on one rank: whose video goes on, and what is refused."""

from __future__ import annotations

import dataclasses
import secrets
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import MakeConfig
from safetensors import SafetensorError

from chitu_diffusion.engine import Engine
from chitu_diffusion.errors import UsageError
from chitu_diffusion.task import DiffusionTask, DiffusionUserParams, TaskStatus

SEED = secrets.randbelow(2**31)
STEPS = 8


def frames_of(task: DiffusionTask) -> bytes:
    assert task.status is TaskStatus.FINISHED, task.error_message
    return np.load(task.buffer.save_path).tobytes()


def test_an_engine_goes_on_where_another_stopped(tiny_folder, make_config: MakeConfig, tmp_path) -> None:
    config = make_config(tiny_folder, checkpoint__every_s=0)
    asked = DiffusionUserParams(
        prompt="A cat", num_inference_steps=STEPS, flexcache="interval", save_path=str(tmp_path / "part.npy")
    )
    with Engine(config) as engine:
        task = engine.submit(asked, checkpoints=tmp_path / "kept")
        for _ in range(5):
            engine.step()
        seed = task.seed
    assert task.status is TaskStatus.CANCELLED and (tmp_path / "kept").exists()
    with Engine(config) as engine:
        whole = engine.submit(dataclasses.replace(asked, seed=seed, save_path=str(tmp_path / "whole.npy")))
        part = engine.submit(asked, checkpoints=tmp_path / "kept")
        assert part.current_step == part.resumed.step == 4
        # drawn by the first run
        assert part.seed == seed
        engine.run_until_idle()
    assert frames_of(whole) == frames_of(part)
    assert not (tmp_path / "kept").exists()


def test_what_cannot_be_written_stops_nothing(tiny_folder, make_config: MakeConfig, tmp_path, caplog) -> None:
    (tmp_path / "file").write_text("in the way")
    with Engine(make_config(tiny_folder, checkpoint__every_s=0)) as engine:
        task = engine.submit(
            DiffusionUserParams(prompt="A cat", num_inference_steps=2), checkpoints=tmp_path / "file" / "kept"
        )
        engine.run_until_idle()
    assert task.status is TaskStatus.FINISHED and "could be written" in caplog.text


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"prompt": "A dog"}, "prompt A cat walking on grass, here A dog"),
        ({"seed": SEED + 1}, f"seed {SEED}, here {SEED + 1}"),
        ({"num_frames": 9}, "num_frames 5, here 9"),
        ({"flexcache": None}, "flexcache interval, here None"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_another_video_is_made_from_its_beginning(
    tiny_folder, make_config: MakeConfig, tmp_path, more: dict[str, Any], said: str
) -> None:
    asked = {"prompt": "A cat walking on grass", "num_frames": 5, "flexcache": "interval", "seed": SEED}
    asked = {**asked, "num_inference_steps": 4}
    config = make_config(tiny_folder, checkpoint__every_s=0)
    with Engine(config) as engine:
        engine.submit(DiffusionUserParams(**asked, task_id="one"), checkpoints=tmp_path / "kept")
        for _ in range(3):
            engine.step()
    wanted = DiffusionUserParams(**{**asked, **more}, task_id="two", save_path=str(tmp_path / "b.npy"))
    with Engine(config) as engine:
        whole = engine.submit(dataclasses.replace(wanted, task_id="whole", save_path=str(tmp_path / "w.npy")))
        engine.run_until_idle()
        task = engine.submit(wanted, checkpoints=tmp_path / "kept")
        assert task.current_step == 0 and said in task.resumed.differs[0], task.resumed
        assert task.params == wanted and task.seed == wanted.seed and task.task_id == "two"
        engine.run_until_idle()
    assert task.buffer.save_path == wanted.save_path and frames_of(task) == frames_of(whole)


def test_whose_task_it_is_stays(tiny_folder, make_config: MakeConfig, tmp_path) -> None:
    """The same video for somebody else, at another place."""
    config = make_config(tiny_folder, checkpoint__every_s=0)
    asked = DiffusionUserParams(prompt="A cat", num_inference_steps=4, save_path=str(tmp_path / "a.npy"))
    other = dataclasses.replace(
        asked, save_path=str(tmp_path / "b.npy"), task_id="b", priority=3, role="other"
    )
    with Engine(config) as engine:
        seed = engine.submit(asked, checkpoints=tmp_path / "kept").seed
        for _ in range(3):
            engine.step()
    with Engine(config) as engine:
        task = engine.submit(other, checkpoints=tmp_path / "kept")
        assert task.resumed.step == 2 and task.resumed.exact
        assert task.params == other and task.task_id == "b"
        assert task.seed == task.resolved.seed == seed, "a seed that nobody asked for is that of the steps"
        engine.run_until_idle()
    assert task.buffer.save_path == other.save_path and Path(other.save_path).exists()
    assert not Path(asked.save_path).exists()


def test_a_full_disk_stops_nothing(
    tiny_folder, make_config: MakeConfig, tmp_path, monkeypatch, caplog
) -> None:
    def full(*given: Any) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("chitu_diffusion.pipelines.checkpoint.save_file", full)
    with Engine(make_config(tiny_folder, checkpoint__every_s=0)) as engine:
        task = engine.submit(
            DiffusionUserParams(prompt="A cat", num_inference_steps=2), checkpoints=tmp_path / "kept"
        )
        engine.run_until_idle()
    assert task.status is TaskStatus.FINISHED and "No space left" in caplog.text


# -- what may be submitted


@pytest.mark.parametrize("value", [5, "", "a\0b", b"x", ["kept"]], ids=repr)
def test_what_can_name_no_folder_is_refused(tiny_folder, make_config: MakeConfig, value: Any) -> None:
    with Engine(make_config(tiny_folder)) as engine:
        with pytest.raises(UsageError, match="use the name of a folder"):
            engine.submit("A cat", checkpoints=value)
        assert not len(engine.pool) and engine.step() is None


def test_a_task_that_is_cancelled_while_it_is_taken_in_stays_so(
    tiny_folder, make_config: MakeConfig, tmp_path, monkeypatch
) -> None:
    """In the pool, and its command not in the inbox yet: its checkpoint once brought it back to life."""
    config = make_config(tiny_folder, checkpoint__every_s=0)
    asked = DiffusionUserParams(prompt="A cat", num_inference_steps=4, seed=1, task_id="a")
    with Engine(config) as engine:
        engine.submit(asked, checkpoints=tmp_path / "kept")
        for _ in range(3):
            engine.step()
    with Engine(config) as engine:
        add = engine.pool.add
        added = threading.Event()

        def slowly(task: DiffusionTask) -> None:
            add(task)
            added.set()
            time.sleep(0.3)

        monkeypatch.setattr(engine.pool, "add", slowly)
        submit = partial(engine.submit, asked, checkpoints=tmp_path / "kept")
        thread = threading.Thread(target=submit)
        thread.start()
        added.wait()
        assert engine.cancel("a")
        thread.join()
        task = engine.pool.get("a")
        assert task is not None and task.status is TaskStatus.CANCELLED
        assert engine.step() is None and task.status is TaskStatus.CANCELLED


def test_an_ended_task_is_not_brought_back(tiny_folder, make_config: MakeConfig, tmp_path) -> None:
    config = make_config(tiny_folder, checkpoint__every_s=0)
    asked = DiffusionUserParams(prompt="A cat", num_inference_steps=4, seed=1)
    with Engine(config) as engine:
        engine.submit(asked, checkpoints=tmp_path / "kept")
        for _ in range(3):
            engine.step()
        late = DiffusionTask.from_user_request(asked)
        late.resolved = asked
        late.end(TaskStatus.CANCELLED)
        engine._executor.add_task(late, tmp_path / "kept")
        assert late.status is TaskStatus.CANCELLED and late.current_step == 0


def test_a_task_of_the_past_or_of_another_engine_is_refused(tiny_folder, make_config: MakeConfig) -> None:
    with Engine(make_config(tiny_folder)) as one, Engine(make_config(tiny_folder)) as other:
        task = one.submit("A cat", num_inference_steps=2, num_frames=1)
        one.step()
        with pytest.raises(UsageError, match=r"encoding|denoising in another engine: submit its request"):
            other.submit(task)
        one.run_until_idle()
        assert task.status is TaskStatus.FINISHED
        for engine in (one, other):
            with pytest.raises(UsageError, match=r"has ended \(finished\): submit its request"):
                engine.submit(task)
        assert not other.has_work()


def test_cancelled_tasks_leave_without_a_step(tiny_folder, make_config: MakeConfig) -> None:
    with Engine(make_config(tiny_folder, scheduler__keep_ended=5)) as engine:
        for _ in range(30):
            engine.cancel(engine.submit("A cat").task_id)
        assert len(engine.pool) == 5
