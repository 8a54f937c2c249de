"""Videos in memory, and what one may do with a task that one holds: wait, follow, cancel, await."""

from __future__ import annotations

import asyncio
import base64
import copy
import io
import pickle
import threading
import time
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from running import CAT, task_for

from chitu_diffusion.backend import DiffusionBackend
from chitu_diffusion.config import RankPlace
from chitu_diffusion.engine import Engine
from chitu_diffusion.errors import StageError, UsageError
from chitu_diffusion.media.reading import read_frames, read_recipe
from chitu_diffusion.task import DiffusionUserParams, TaskStatus

LONG = {"num_inference_steps": 200}


@pytest.fixture
def engine(tiny_folder, make_config):
    with Engine(make_config(tiny_folder)) as engine:
        yield engine


def poison(engine, monkeypatch) -> None:
    """Prompts with "poison" fail in encoding."""
    encode = engine.backend.text_encoder.encode

    def poisoned(prompts):
        if any("poison" in prompt for prompt in prompts):
            raise ValueError("boom")
        return encode(prompts)

    monkeypatch.setattr(engine.backend.text_encoder, "encode", poisoned)


def slow(engine, monkeypatch, seconds: float = 0.01) -> None:
    step = engine.backend.sampler.step

    def slowly(*given):
        time.sleep(seconds)
        return step(*given)

    monkeypatch.setattr(engine.backend.sampler, "step", slowly)


# -- generate


def test_a_prompt_gives_frames_and_no_file(engine, tmp_path):
    result = engine.generate(CAT, seed=5, num_frames=9)
    assert result.frames.dtype == np.uint8 and result.frames.shape == (9, 32, 32, 3)
    assert (result.seed, result.recipe["seed"], result.recipe["prompt"]) == (5, 5, CAT)
    assert result.task.status is TaskStatus.FINISHED and result.task.buffer.save_path is None
    assert not list(tmp_path.rglob("*.mp4")) and not (tmp_path / "outputs").exists()
    # the same request in the world of tasks: the same frames, in a file
    task = engine.submit(CAT, seed=5, num_frames=9, save_path=str(tmp_path / "cat.npy"))
    assert task.wait() and np.array_equal(read_frames(task.buffer.save_path), result.frames)


def test_a_task_without_a_path_is_written_still(engine):
    task = engine.submit(CAT, num_inference_steps=1)
    assert task.wait() and Path(task.buffer.save_path).name == f"{task.task_id}.mp4"
    assert Path(task.buffer.save_path).exists()


def test_a_path_is_written_too(engine, tmp_path):
    result = engine.generate(CAT, num_inference_steps=1, save_path=str(tmp_path / "cat.npy"))
    assert np.array_equal(read_frames(tmp_path / "cat.npy"), result.frames)


@pytest.mark.parametrize("name", ["a.mp4", "a.npy", "frames/"])
def test_what_another_put_there_meanwhile_is_not_replaced(engine, tmp_path, name):
    """Two of one path, of one engine or of two: the first one stays, and the second says so."""
    path = f"{tmp_path}/{name}"
    first, other = (engine.submit(prompt, seed=1, save_path=path) for prompt in ("a cat", "a dog"))
    with pytest.raises(StageError, match="another run has put .* there since this one began"):
        engine.run_until_idle()
    assert (first.status, other.status) == (TaskStatus.FINISHED, TaskStatus.FAILED)
    assert read_recipe(path)["prompt"] == "a cat"
    assert engine.submit("a bird", seed=1, save_path=path).wait()
    assert read_recipe(path)["prompt"] == "a bird"  # what stood there before may be replaced, as ever
    twice = [engine.submit("a bird", seed=1, save_path=path) for _ in range(2)]
    engine.run_until_idle()
    assert {task.status for task in twice} == {TaskStatus.FINISHED}


def test_a_list_gives_a_list_in_order_each_with_a_seed_of_its_own(engine):
    prompts = [CAT, DiffusionUserParams(prompt="a red fish", seed=9), CAT]
    results = engine.generate(prompts, num_inference_steps=2)
    assert [result.task.params.prompt for result in results] == [CAT, "a red fish", CAT]
    assert results[1].seed == 9 and results[0].seed != results[2].seed
    assert engine.generate([]) == []


@pytest.mark.parametrize(
    "path", [5, None, b"cat.mp4", "", "cat.avi", "a\0.mp4", ".mp4", ["cat.mp4"]], ids=str
)
def test_a_path_that_no_video_can_have(engine, path):
    with pytest.raises(UsageError, match="path = "):
        engine.generate(CAT, num_inference_steps=1).save(path)


@pytest.mark.parametrize("quality", [11, -1, "8", 5.5, True, np.nan], ids=str)
def test_a_quality_that_cannot_be(engine, tmp_path, quality):
    with pytest.raises(UsageError, match="quality = "):
        engine.generate(CAT, num_inference_steps=1).save(tmp_path / "cat.npy", quality=quality)


@pytest.mark.parametrize("name", ["cat.npy", "cat.mp4", "cat.gif", "frames/"])
def test_a_result_is_saved_in_every_format(engine, tmp_path, name):
    result = engine.generate(CAT, num_inference_steps=1)
    path = result.save(f"{tmp_path}/{name}")
    assert read_recipe(path)["seed"] == result.seed
    assert read_frames(path).shape == result.frames.shape
    if name in ("cat.npy", "frames/"):
        assert np.array_equal(read_frames(path), result.frames)


def test_pillow_and_a_notebook_show_a_result(engine):
    result = engine.generate(CAT, num_inference_steps=1, height=32, width=1040, num_frames=5)
    images = result.to_pil()
    assert all(
        np.array_equal(np.asarray(image), frame) for image, frame in zip(images, result.frames, strict=True)
    )
    page = result._repr_html_()
    data = base64.b64decode(page.split("base64,")[1].split('"')[0])
    with av.open(io.BytesIO(data)) as container:
        shown = [frame.width for frame in container.decode(video=0)]
    assert len(shown) == 5 and max(shown) <= 512
    assert "5 frames of 1040x32" in repr(result)


def test_a_failure_raises_when_the_others_are_done(engine, monkeypatch, tmp_path):
    poison(engine, monkeypatch)
    path = tmp_path / "late.npy"
    asked = [DiffusionUserParams(prompt="poison"), DiffusionUserParams(prompt=CAT, save_path=str(path))]
    with pytest.raises(StageError, match="boom") as caught:
        engine.generate(asked, num_inference_steps=1)
    assert caught.value.stage == "encoding" and path.exists()


def test_a_failure_raises_from_run_until_idle(engine, monkeypatch):
    poison(engine, monkeypatch)
    bad = engine.submit("poison", num_inference_steps=1)
    good = engine.submit(CAT, num_inference_steps=1)
    with pytest.raises(StageError) as caught:
        engine.run_until_idle()
    assert caught.value is bad.error and good.status is TaskStatus.FINISHED
    engine.run_until_idle()  # it has been told
    engine.submit("poison")
    engine.run_until_idle(raise_on_failure=False)


def test_one_bad_request_of_a_list_and_none_is_made(engine):
    with pytest.raises(UsageError, match="4n\\+1"):
        engine.generate([CAT, CAT], num_frames=4)
    with pytest.raises(UsageError, match="guidance_scale"):
        engine.generate(
            [DiffusionUserParams(prompt=CAT), DiffusionUserParams(prompt=CAT, guidance_scale=(1, 2))]
        )
    assert all(task.status is TaskStatus.CANCELLED for task in engine.pool)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"output_type": "pil"}, "result.to_pil"),
        ({"generator": torch.Generator()}, "seed="),
        ({"num_videos_per_prompt": 2}, "list of prompts"),
        ({"latents": torch.zeros(1)}, "denoise_loop"),
        ({"return_dict": False}, "result"),
        ({"num_inference_step": 3}, "Did you mean 'num_inference_steps'"),
    ],
)
def test_what_users_of_diffusers_try_is_answered_in_words(engine, fields, said):
    for call in (engine.generate, engine.submit, DiffusionUserParams):
        with pytest.raises(UsageError, match=said):
            call(prompt=CAT, **fields)
    assert len(engine.pool) == 0


# -- the hook


def test_the_hook_sees_each_step_and_a_look_changes_nothing(engine):
    seen = []

    def look(own, step, timestep, given):
        left = (given["clean"]() - given["latents"]).abs().max()
        seen.append((own is engine, step, timestep, tuple(given["latents"].shape), left))

    watched = engine.generate(CAT, seed=1, callback_on_step_end=look)
    assert np.array_equal(watched.frames, engine.generate(CAT, seed=1).frames)
    assert [step for _, step, *_ in seen] == [0, 1, 2, 3]
    assert all(own and shape == (1, 4, 2, 4, 4) for own, _, _, shape, _ in seen)
    times = [timestep for _, _, timestep, *_ in seen]
    assert times == sorted(times, reverse=True) and times[0] > 900
    assert [bool(left > 1e-5) for *_, left in seen] == [True, True, True, False], "at the end rounding alone"


def test_latents_that_the_hook_gives_are_gone_on_with(engine):
    given = torch.randn(1, 4, 2, 4, 4, generator=torch.Generator().manual_seed(4))

    def last(own, step, timestep, values):
        return {"latents": given} if step == 3 else values

    result = engine.generate(CAT, seed=1, callback_on_step_end=last)
    video = engine.generator.decode_vae(given)[0]
    frames = video.mul(255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    assert np.array_equal(result.frames, frames)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ({"latents": torch.zeros(2)}, "of shape"),
        (3, "gave int"),
        (torch.zeros(1, 4, 2, 4, 4, dtype=torch.int64), "gave torch.int64"),
        ({"latents": torch.zeros(1, 4, 2, 4, 4).to_sparse()}, "return None, or"),
        ({"latents": torch.zeros(1, 4, 2, 4, 4, device="meta")}, "return None, or"),
        ({"latents": np.zeros((1, 4, 2, 4, 4))}, "gave ndarray"),
        ({"latents": torch.full((1, 4, 2, 4, 4), float("nan"))}, "NaN"),
    ],
)
def test_a_hook_that_gives_nonsense_fails_its_task(engine, answer, said):
    with pytest.raises(StageError, match=said) as caught:
        engine.generate(CAT, callback_on_step_end=lambda *_: answer)
    assert (caught.value.stage, caught.value.step) == ("denoising", 0)


def test_latents_of_every_make_are_gone_on_with_and_stay_the_callers(engine, tmp_path):
    """Views, gradients and other dtypes; a buffer that is written over; a checkpoint of what was given."""
    start = torch.randn(1, 4, 2, 4, 4, generator=torch.Generator().manual_seed(4))
    buffer = start.clone()
    makes = (
        lambda: start.clone().requires_grad_(),
        lambda: start.double(),
        lambda: start.transpose(-1, -2).contiguous().transpose(-1, -2),
        lambda: buffer.copy_(start),
    )
    results = []
    for number, make in enumerate(makes):

        def hook(own, step, timestep, values, make=make):
            buffer.fill_(torch.nan)
            return {"latents": make()} if step == 1 else None

        task = engine.submit(
            CAT,
            seed=1,
            callback_on_step_end=hook,
            checkpoints=tmp_path / str(number),
            save_path=str(tmp_path / f"{number}.npy"),
        )
        for event in task.events():
            if event.step == 2:
                assert not task.buffer.latent.requires_grad and task.buffer.latent.is_contiguous()
                assert engine.save_tasks() == [task]
        assert task.error is None, task.error_message
        results.append(read_frames(task.buffer.save_path))
    assert all(np.array_equal(result, results[0]) for result in results)


def test_what_is_done_to_the_latents_counts_where_they_are_given_back(engine):
    for gives_back in (False, True):

        def changes(own, step, timestep, values, gives_back=gives_back):
            values["latents"].mul_(0.5)
            return values if gives_back else None

        changed = engine.generate(CAT, seed=1, callback_on_step_end=changes)
        assert np.array_equal(changed.frames, engine.generate(CAT, seed=1).frames) != gives_back


def test_a_hook_may_cancel_and_submit_but_not_step(engine):
    more = []

    def hook(own, step, timestep, given):
        for call in (own.step, own.run_until_idle, own.close, given["task"].wait, own.save_tasks):
            with pytest.raises(UsageError, match="inside it"):
                call()
        more.append(own.submit(CAT, num_inference_steps=1))
        assert given["task"].cancel()

    result = engine.generate(CAT, callback_on_step_end=hook)
    assert result.task.status is TaskStatus.CANCELLED and result.task.current_step == 1
    assert result.frames.shape == (0, 0, 0, 3) and result._repr_html_() is None
    with pytest.raises(UsageError, match="cancelled and has no frames"):
        result.save("cat.npy")
    assert len(more) == 1 and more[0].wait()


def test_what_is_no_function_is_refused_before_anything_runs(engine, make_config, tiny_folder):
    for call in (engine.generate, engine.submit):
        with pytest.raises(UsageError, match="callback_on_step_end = 'look' cannot be called"):
            call(CAT, callback_on_step_end="look")
    with pytest.raises(UsageError, match="on_event is a int; use a function"):
        Engine(make_config(tiny_folder), on_event=5)
    assert len(engine.pool) == 0


def test_nothing_is_kept_of_a_hook(engine):
    engine.generate([CAT, CAT], num_inference_steps=1, callback_on_step_end=lambda *_: None)
    engine.step()
    assert len(engine.generator.stages.hooks) == 0


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda own, task: own.cancel(task), "task_id is a DiffusionTask; use its task_id, or task.cancel"),
        (lambda own, task: own.cancel(None), "task_id is a NoneType"),
        *((lambda own, task, s=s: task.wait(s), "timeout = .*use a number") for s in ("5", np.nan, True, [])),
        (lambda own, task: task.wait(timout=5), r"wait takes no 'timout'. Did you mean 'timeout'"),
        (lambda own, task: task.cancel(now=True), "cancel takes no 'now'"),
        (lambda own, task: own.run_until_idle(raise_on_fail=True), "Did you mean 'raise_on_failure'"),
        (lambda own, task: own.generator.denoise_loop(num_inference_steps=4), "Did you mean 'num_steps'"),
        (lambda own, task: own.generator.decode_vae_tiled(0, tilesize=4), "Did you mean 'tile_size'"),
        (lambda own, task: own.backend.scheduler(num_step=4), "Did you mean 'num_steps'"),
        (lambda own, task: Engine(on_events=print), "Engine.__init__ takes no 'on_events'.*'on_event'"),
        (lambda own, task: Engine({"models": {}}), r"args is a dict; use EngineConfig"),
        (lambda own, task: Engine("wan-tiny"), "args is a str"),
        (
            lambda own, task: Engine(own.backend.args, scheduler="fair"),
            "scheduler is a str; use DiffusionScheduler",
        ),
        (lambda own, task: Engine(backend=own.backend.args), "backend is a EngineConfig; use"),
        (lambda own, task: Engine(model="wan-tiny"), "model = 'wan-tiny': choose a model by EngineConfig"),
        (lambda own, task: Engine(place=(0, 2)), "place is a tuple; use RankPlace"),
        (lambda own, task: Engine(backend=own.backend, place=RankPlace(0, 2)), "leave model and place out"),
        (lambda own, task: DiffusionBackend(model="wan-tiny"), "model = 'wan-tiny': choose"),
        (lambda own, task: DiffusionBackend(groups=2), "groups is a int"),
    ],
)
def test_wrong_kinds_and_names_are_answered_in_words(engine, call, said):
    task = engine.submit(CAT)
    with pytest.raises(UsageError, match=said):
        call(engine, task)
    assert task.status is TaskStatus.PENDING


# -- waiting


def test_whoever_waits_drives(engine):
    first = engine.submit(CAT, num_inference_steps=2)
    second = engine.submit(CAT, num_inference_steps=2)
    assert second.wait() and first.status is TaskStatus.FINISHED
    assert first.wait() and first.wait(0)


def test_a_time_limit(engine):
    task = engine.submit(CAT, **LONG)
    began = time.monotonic()
    assert not task.wait(0) and task.status is TaskStatus.PENDING
    assert not task.wait(0.2) and time.monotonic() - began < 5
    assert task.cancel() and not task.cancel() and task.wait(0)


def test_many_threads_wait_for_many_tasks(engine):
    tasks = [engine.submit(CAT, num_inference_steps=2) for _ in range(3)]
    ended = []
    threads = [
        threading.Thread(target=lambda task=task: ended.append(task.wait()))
        for task in tasks
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert ended == [True] * 9 and all(task.status is TaskStatus.FINISHED for task in tasks)


def test_waiting_beside_a_thread_that_drives(engine, monkeypatch):
    slow(engine, monkeypatch)
    task = engine.submit(CAT, num_inference_steps=20)
    drivers = set()
    advance = engine.generator.stages.advance
    monkeypatch.setattr(
        engine.generator.stages,
        "advance",
        lambda task: drivers.add(threading.current_thread().name) or advance(task),
    )
    driver = threading.Thread(target=engine.run_until_idle, name="driver")
    driver.start()
    assert task.wait(30) and task.status is TaskStatus.FINISHED
    driver.join(30)
    assert "driver" in drivers


@pytest.mark.parametrize("how", ["wait", "events"])
@pytest.mark.parametrize("end", ["cancel", "close"])
def test_waiting_ends_when_another_thread_ends_the_task(tiny_folder, make_config, monkeypatch, how, end):
    engine = Engine(make_config(tiny_folder))
    slow(engine, monkeypatch)
    task = engine.submit(CAT, num_inference_steps=900)
    thread = threading.Thread(target=lambda: task.wait() if how == "wait" else list(task.events()))
    thread.start()
    while task.current_step < 3:
        time.sleep(0.005)
    engine.close() if end == "close" else task.cancel()
    thread.join(10)
    assert not thread.is_alive() and task.status is TaskStatus.CANCELLED
    engine.close()
    assert task.wait() and list(task.events())[-1].step >= 3


def test_events_come_from_the_first_on_whenever_one_begins(engine):
    task = engine.submit(CAT)
    early = [event.stage for event in task.events()]
    assert early == ["encoding", *["denoising"] * 4, "decoding", "saving"]
    assert [event.stage for event in task.events()] == early
    other = engine.submit(CAT)
    for _ in range(3):
        engine.step()
    assert [event.step for event in other.events()] == [0, 1, 2, 3, 4, 4, 4]


def test_events_in_several_threads(engine):
    task = engine.submit(CAT)
    seen = [[], [], []]
    threads = [threading.Thread(target=lambda own=own: own.extend(task.events())) for own in seen]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert seen[0] == seen[1] == seen[2] and seen[0][-1].status is TaskStatus.FINISHED


def test_a_loop_over_events_may_cancel(engine):
    task = engine.submit(CAT, **LONG)
    for event in task.events():
        if event.step == 2:
            task.cancel()
    assert task.status is TaskStatus.CANCELLED and task.current_step == 2


def test_await(engine, monkeypatch):
    poison(engine, monkeypatch)

    async def both():
        tasks = [engine.submit(CAT, num_inference_steps=2) for _ in range(3)]
        return tasks, await asyncio.gather(*tasks)

    tasks, given = asyncio.run(both())
    assert given == tasks and all(task.status is TaskStatus.FINISHED for task in tasks)

    async def fails():
        await engine.submit("poison")

    with pytest.raises(StageError, match="boom"):
        asyncio.run(fails())


def test_an_await_that_is_given_up_stops_driving(engine):
    task = engine.submit(CAT, num_inference_steps=1000)

    async def briefly():
        await asyncio.wait_for(asyncio.ensure_future(task._ended()), 0.2)

    began = time.monotonic()
    with pytest.raises(TimeoutError):
        asyncio.run(briefly())
    assert time.monotonic() - began < 5 and not task.is_finished()


# -- a task stays plain data


def test_a_task_keeps_no_engine(engine):
    task = engine.submit(CAT, num_inference_steps=1)
    for twin in (pickle.loads(pickle.dumps(task)), copy.deepcopy(task), copy.copy(task)):
        assert twin.params == task.params
        with pytest.raises(UsageError, match="no engine"):
            twin.wait()
    assert task.wait()
    assert pickle.loads(pickle.dumps(task)).wait() and list(copy.copy(task).events()) == []


def test_a_task_of_no_engine_and_of_one_that_is_gone(tiny_folder, make_config):
    for call in ("wait", "cancel", "events"):
        with pytest.raises(UsageError, match=r"engine\.submit"):
            getattr(task_for(), call)()
    engine = Engine(make_config(tiny_folder))
    task = engine.submit(CAT)
    engine.close()
    assert task.wait() and not task.cancel() and list(task.events()) == []
