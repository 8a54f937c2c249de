"""What people try first: each wrong call says in words what to use, and nothing is lost without a word."""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import pickle
from typing import Any

import numpy as np
import pytest
from running import CAT, config_for

from chitu_diffusion import errors
from chitu_diffusion.backend import DiffusionBackend
from chitu_diffusion.config import EngineConfig
from chitu_diffusion.engine import Engine
from chitu_diffusion.errors import ChituError, UsageError
from chitu_diffusion.task import DiffusionTask, DiffusionUserParams, TaskStatus

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, ChituError)]


@pytest.fixture
def engine(tiny_folder, tmp_path):
    with Engine(config_for(tiny_folder, tmp_path)) as engine:
        yield engine


@pytest.mark.parametrize("kind", KINDS)
def test_every_error_says_the_same_after_a_pickle(kind: type[Exception]) -> None:
    given: dict[type, tuple[Any, ...]] = {
        errors.StageError: ("saving", 3, errors.CheckpointError("m", file="f", key="k"))
    }
    error = kind(*given.get(kind, ("what",)))
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again)) == (kind, str(error))
    assert {k: str(v) for k, v in vars(again).items()} == {k: str(v) for k, v in vars(error).items()}


def test_a_failed_task_pickles_whatever_failed_it() -> None:
    class Odd(Exception):
        def __init__(self, one: int, two: int) -> None:
            super().__init__("odd")

    task = DiffusionTask.from_user_request(DiffusionUserParams(CAT))
    task.end(TaskStatus.FAILED, errors.StageError("denoising", 3, Odd(1, 2)))
    again = pickle.loads(pickle.dumps(task))
    assert str(again.error) == str(task.error) == again.error_message
    assert "Odd" in str(again.error.cause)


def _use_in_fork(engine: Engine, queue: Any) -> None:
    try:
        engine.generate(CAT)
    except ChituError as error:
        queue.put(str(error))


def test_an_engine_in_a_fork_names_spawn_at_once(engine) -> None:
    fork = multiprocessing.get_context("fork")
    queue = fork.Queue()
    child = fork.Process(target=_use_in_fork, args=(engine, queue))
    child.start()
    assert "spawn" in queue.get(timeout=20)
    child.join(timeout=20)


@pytest.mark.parametrize("make", [Engine, DiffusionBackend])
@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"args": "wan-tiny"}, 'EngineConfig(models={"name": "wan-tiny"})'),
        ({"model": "wan-tiny"}, 'EngineConfig(models={"name": "wan-tiny"})'),
        ({"args": {"infer": {"device": "cpu"}}}, "EngineConfig(**settings)"),
        ({"args": 5}, "EngineConfig("),
    ],
)
def test_what_is_no_settings_is_answered_with_the_line_to_write(make, given, said) -> None:
    with pytest.raises(UsageError) as caught:
        make(**given)
    assert said in str(caught.value)


@pytest.mark.parametrize("callback", [5, lambda step: None, lambda a, b, c: None, lambda a, b, c, d, e: None])
def test_a_callback_of_a_wrong_shape_is_refused_at_submit(engine, callback) -> None:
    with pytest.raises(UsageError, match=r"\(engine, step, timestep, kwargs\)"):
        engine.submit(CAT, callback_on_step_end=callback)
    assert not len(engine.pool)


def _interrupt(engine, step, timestep, kwargs):
    engine._interrupt = True
    return kwargs


@pytest.mark.parametrize("stop", [_interrupt, lambda e, s, t, kwargs: kwargs["task"].cancel()])
def test_a_callback_stops_its_own_task_alone(engine, stop) -> None:
    stopped = engine.submit(CAT, callback_on_step_end=stop)
    other = engine.submit(CAT)
    engine.run_until_idle()
    assert (stopped.status, stopped.current_step) == (TaskStatus.CANCELLED, 1)
    assert other.status is TaskStatus.FINISHED


def test_ctrl_c_saves_what_was_given_a_folder(tiny_folder, tmp_path) -> None:
    config = config_for(tiny_folder, tmp_path)

    def interrupt(engine, step, timestep, kwargs):
        if step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), Engine(config) as engine:
        engine.submit(CAT, seed=1, checkpoints=tmp_path / "saved", callback_on_step_end=interrupt).wait()
    with Engine(config) as engine:
        task = engine.submit(CAT, seed=1, checkpoints=tmp_path / "saved")
        engine.run_until_idle()
    assert task.resumed is not None
    assert task.resumed.step == 2


def test_leaving_with_work_left_says_so(tiny_folder, tmp_path, caplog) -> None:
    with caplog.at_level(logging.WARNING), Engine(config_for(tiny_folder, tmp_path)) as engine:
        task = engine.submit(CAT)
    assert task.status is TaskStatus.CANCELLED
    assert "run_until_idle" in task.error_message
    assert task.task_id in caplog.text
    assert "run_until_idle" in caplog.text


@pytest.fixture(scope="module")
def wan_tiny():
    with Engine(EngineConfig(infer={"device": "cpu", "dtype": "float32", "threads": 1})) as engine:
        yield engine


def notes_of(engine: Engine, **fields: Any) -> str:
    asked = {"height": 128, "width": 128, "num_frames": 17, "num_inference_steps": 1, "seed": 1, **fields}
    task = engine.submit(DiffusionUserParams(**asked))
    engine.step()  # the encoding
    task.cancel()
    return "\n".join(task.notes)


@pytest.mark.parametrize(
    ("fields", "said", "not_said"),
    [
        ({"prompt": "a dragon over a Castle"}, ["dragon, castle", "cat, dog"], ["over,"]),
        ({"prompt": "a cat, 草地上的龙"}, ["know: 龙;"], []),
        ({"prompt": "一只红色的猫在草地上走。"}, [], ["does not know"]),
        ({"prompt": "a cat 🐉"}, ["🐉"], []),
        ({"prompt": CAT, "negative_prompt": "blurry, ugly"}, ["negative prompt", "blurry, ugly"], []),
        ({"prompt": CAT, "negative_prompt": "snow", "guidance_scale": 1}, ["not used"], ["does not know"]),
        ({"prompt": "a cat " * 300}, ["1201 tokens", "reads 512"], ["does not know"]),
        ({"prompt": CAT, "height": 64, "width": 64}, ["trained on", "128x128"], []),
    ],
)
def test_what_a_model_will_not_follow_is_noted(wan_tiny, fields, said, not_said) -> None:
    notes = notes_of(wan_tiny, **fields)
    assert all(word in notes for word in said), notes
    assert not any(word in notes for word in not_said), notes


def test_what_a_model_knows_is_followed_without_a_note(wan_tiny) -> None:
    assert not notes_of(
        wan_tiny, prompt="A cat's kitten walking on grass, to the left", negative_prompt="snow"
    )


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, "prompt = ''"),
        ({"prompt": CAT, "seed": [3, 4]}, "seed=each"),
        ({"prompt": CAT, "negative_prompt": ["a", "b"]}, "negative_prompt=each"),
        ({"prompt": CAT, "sampler": "euler"}, "infer={'sampler'"),
        ({"prompt": CAT, "steps": 20}, "num_inference_steps"),
        ({"prompt": CAT, "guidance": 3}, "guidance_scale"),
    ],
)
def test_a_field_by_another_name_is_answered_with_ours(fields, said) -> None:
    with pytest.raises(UsageError) as caught:
        DiffusionUserParams(**fields)
    assert said in str(caught.value)


def test_a_result_is_an_array_and_names_what_save_takes(engine) -> None:
    result = engine.generate(CAT, seed=1)
    assert np.array_equal(np.asarray(result), result.frames)
    with pytest.raises(UsageError, match=r"result\.save\('cat\.mp4'\)"):
        result.save(5)


def test_events_are_followed_by_async_for(engine) -> None:
    async def follow() -> list[TaskStatus]:
        return [event.stage async for event in engine.submit(CAT).events()]

    assert asyncio.run(follow())[::5] == [TaskStatus.ENCODING, TaskStatus.DECODING]
