"""The generator's methods, and its promises about state, failures, memory levels, cascades and caches."""

import gc
import json
import math
from dataclasses import replace
from importlib.metadata import version

import numpy as np
import pytest
import torch
from running import CAT, config_for, latent_and_video, model_of, psnr, relative_error, run_to_end, task_for
from torch import Tensor

from chitu_diffusion.backend import BackendState, DiffusionBackend
from chitu_diffusion.errors import NonFiniteError, StageError, UsageError
from chitu_diffusion.generator import Generator
from chitu_diffusion.media.reading import read_recipe
from chitu_diffusion.models.components import load_networks
from chitu_diffusion.pipelines import stages, text_to_video
from chitu_diffusion.pipelines.request import resolve_task
from chitu_diffusion.pipelines.vae import tile_size_for
from chitu_diffusion.sampling import solvers
from chitu_diffusion.sampling.noise import initial_noise
from chitu_diffusion.task import CascadeStage, DiffusionTask, DiffusionUserParams, TaskStatus


@pytest.fixture(scope="module")
def backend(tiny_folder, tmp_path_factory):
    return DiffusionBackend(config_for(tiny_folder, tmp_path_factory.mktemp("outputs")))


@pytest.fixture(scope="module")
def experts(two_experts_folder, tmp_path_factory):
    return DiffusionBackend(config_for(two_experts_folder, tmp_path_factory.mktemp("outputs")))


# -- the page's methods by hand


def test_methods_by_hand_equal_the_task(backend):
    generator = Generator(backend)
    task = task_for(num_inference_steps=5, guidance_scale=6.0)
    latent, video = latent_and_video(generator, task)
    embeddings = generator.encode_text([CAT, "blurry, ugly"])
    assert embeddings.shape == (2, 512, 32)
    noise = initial_noise((1, 4, 2, 4, 4), 3)
    by_hand = generator.denoise_loop(noise, embeddings, num_steps=5, guidance_scale=6.0)
    assert torch.equal(by_hand, latent)
    # the model's own negative prompt is the other branch where none is given
    own = generator.denoise_loop(noise, generator.encode_text(CAT), num_steps=5, guidance_scale=6.0)
    assert relative_error(own, latent) < 1e-4
    frames = generator.decode_vae(by_hand)
    assert frames.shape == (1, 5, 3, 32, 32) and frames.dtype == torch.float32
    assert torch.equal(frames, video)


def test_denoise_loop_takes_a_batch_of_latents(backend):
    generator = Generator(backend)
    noise = torch.cat([initial_noise((1, 4, 2, 4, 4), seed) for seed in (1, 2)])
    embeddings = generator.encode_text([CAT, "ugly"])
    both = generator.denoise_loop(noise, embeddings, num_steps=3, guidance_scale=4.0)
    for index in range(2):
        alone = generator.denoise_loop(noise[index : index + 1], embeddings, num_steps=3, guidance_scale=4.0)
        assert relative_error(both[index : index + 1], alone) < 1e-4


def test_batched_and_sequential_guidance_agree(tiny_folder, make_config):
    results = {}
    for mode in ("batched", "sequential"):
        args = make_config(tiny_folder, infer__diffusion__cfg_batch=mode)
        task = task_for(num_inference_steps=4)
        results[mode], _ = latent_and_video(Generator(DiffusionBackend(args)), task)
    assert relative_error(results["batched"], results["sequential"]) < 1e-4


def test_forwards_of_the_page(backend):
    generator = Generator(backend)
    latent = initial_noise((1, 4, 2, 4, 4), 0)
    embeddings = generator.encode_text([CAT, "ugly"])
    timestep = torch.tensor([700])
    plain = backend.model_pool[0](latent, embeddings, timestep)
    assert torch.allclose(generator.forward_with_cp(latent, embeddings, timestep), plain, atol=1e-5)
    guided = generator.forward_with_cfg_parallel(latent, embeddings, timestep, guidance_scale=3.0)
    # folded padding differs by rounding, some 2e-6, and guidance multiplies it
    assert torch.allclose(guided, plain[1:] + 3.0 * (plain[:1] - plain[1:]), atol=5e-5)
    own = generator.forward_with_cfg_parallel(latent, embeddings, timestep)
    assert torch.allclose(own, plain[1:] + 5.0 * (plain[:1] - plain[1:]), atol=5e-5)
    # nobody is bound: computes
    assert torch.allclose(generator.forward_with_cache(latent, embeddings, timestep, 0), plain, atol=1e-5)
    assert torch.allclose(generator.forward_with_cache(latent, embeddings, timestep, 1), plain, atol=1e-5)


def test_decode_tiled_is_close(backend):
    generator = Generator(backend)
    latent = initial_noise((1, 4, 2, 20, 12), 0)
    whole = generator.decode_vae(latent)
    tiled = generator.decode_vae_tiled(latent, tile_size=8)
    assert whole.shape == tiled.shape
    assert psnr(whole, tiled) >= 45
    assert [tile_size_for(*size) for size in ((60, 104), (16, 32), (16, 16), (4, 4))] == [32, 16, 8, 8]


def test_check_nan(backend):
    generator = Generator(backend)
    generator.check_nan(torch.zeros(3), "zeros")
    with pytest.raises(ValueError, match="NaN detected in latent"):
        generator.check_nan(torch.tensor([0.0, math.nan]), "latent")
    with pytest.raises(NonFiniteError, match="Inf detected in latent"):
        generator.check_nan(torch.tensor([0.0, math.inf]), "latent")


# -- state


def test_a_task_goes_on_with_any_generator_and_tasks_take_turns(backend):
    alone = [
        latent_and_video(Generator(backend), task_for(seed=seed, num_inference_steps=6))[0] for seed in (1, 2)
    ]
    tasks = [task_for(seed=seed, num_inference_steps=6) for seed in (1, 2)]
    while tasks[0].status is not TaskStatus.DECODING:
        for task in tasks:
            Generator(backend).generate_step(task)
    for task, latent in zip(tasks, alone, strict=True):
        assert torch.equal(task.buffer.latent, latent)


@pytest.mark.parametrize("sampler", ["euler", "dpm++"])
def test_other_samplers_run_and_same_seed_gives_same_bits(tiny_folder, make_config, sampler):
    backend = DiffusionBackend(make_config(tiny_folder, infer__sampler=sampler))
    first, _ = latent_and_video(Generator(backend), task_for())
    again, _ = latent_and_video(Generator(backend), task_for())
    other, _ = latent_and_video(Generator(backend), task_for(seed=4))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_a_drawn_seed_is_kept_told_and_repeatable(backend):
    task = DiffusionTask.from_user_request(DiffusionUserParams(prompt=CAT))
    event = Generator(backend).generate_step(task)
    assert f"seed {task.seed}" in (event.message or "") and task.resolved.seed == task.seed
    latent, _ = latent_and_video(Generator(backend), task)
    again, _ = latent_and_video(Generator(backend), task_for(seed=task.seed))
    assert torch.equal(latent, again)


def test_finished_tasks_hold_no_tensors_and_the_file_knows_its_recipe(backend):
    generator = Generator(backend)
    task = task_for(flexcache="interval")
    events = list(run_to_end(generator, task))
    assert [event.stage for event in events] == ["encoding"] + ["denoising"] * 4 + ["decoding", "saving"]
    assert events[-1].status is TaskStatus.FINISHED and events[-1].fraction == 1.0
    assert events[2].eta is not None and generator.get_progress(task) == 1.0
    assert tensors_in(task) == []
    recipe = read_recipe(task.buffer.save_path)
    assert recipe["prompt"] == CAT and recipe["seed"] == 3
    assert (
        recipe["params"]["num_inference_steps"] == 4 and recipe["params"]["negative_prompt"] == "blurry, ugly"
    )
    assert len(recipe["weights_sha256"]) == 64 and recipe["versions"]["torch"] == version("torch")
    assert set(recipe["seconds"]) == {"encoding", "denoising", "decoding"}
    assert json.dumps(recipe)


def test_saved_frames_are_the_video(backend, tmp_path):
    task = task_for(save_path=str(tmp_path / "cat.npy"))
    generator = Generator(backend)
    _, video = latent_and_video(generator, task)
    expected = video[0].mul(255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    generator.generate_step(task)
    saved = np.load(task.buffer.save_path)
    assert saved.shape == (5, 32, 32, 3) and np.array_equal(saved, expected)


def tensors_in(task: DiffusionTask) -> list[Tensor]:
    """Every tensor that can be reached from a task."""
    seen = set()
    found = []
    queue = [task]
    while queue:
        thing = queue.pop()
        if id(thing) in seen or isinstance(thing, type) or callable(thing):
            continue
        seen.add(id(thing))
        if isinstance(thing, Tensor):
            found.append(thing)
        queue += gc.get_referents(thing)
    return found


# -- failures


def poison(task: DiffusionTask, value: float) -> None:
    task.buffer.latent[0, 0, 0, 0, 0] = value


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_fails_the_task_and_says_where(backend, value):
    generator = Generator(backend)
    task = task_for(num_inference_steps=5)
    for _ in range(3):
        generator.generate_step(task)
    poison(task, value)
    event = generator.generate_step(task)
    assert event.status is TaskStatus.FAILED and task.is_finished()
    assert isinstance(task.error, StageError) and (task.error.stage, task.error.step) == ("denoising", 2)
    assert isinstance(task.error.cause, NonFiniteError) and "detected in latent" in task.error_message
    assert tensors_in(task) == [] and task.error.cause.__traceback__ is None


def test_a_failing_stage_names_itself_and_ends_the_loop(tiny_folder, make_config, monkeypatch):
    backend = DiffusionBackend(make_config(tiny_folder))
    generator = Generator(backend)

    def broken(_latent):
        raise ZeroDivisionError("the decoder is broken")

    monkeypatch.setattr(backend.vae, "decode", broken)
    task = task_for()
    while not task.is_finished():
        generator.generate_step(task)
    assert task.status is TaskStatus.FAILED
    assert task.error_message == "failed in decoding: ZeroDivisionError: the decoder is broken"
    assert generator.generate_step(task).status is TaskStatus.FAILED


def test_unwritable_output_fails_in_saving(backend, tmp_path):
    (tmp_path / "file").write_text("in the way")
    task = task_for(save_path=str(tmp_path / "file" / "cat.mp4"))
    for event in run_to_end(Generator(backend), task):
        last = event
    assert last.status is TaskStatus.FAILED and task.error.stage == "saving"


STAGE_OF_UNIT = {
    0: (text_to_video, "encode_text"),
    1: (solvers, "initial_noise"),
    2: (stages, "denoise"),
    5: (stages, "decode"),
}


@pytest.mark.parametrize("unit", STAGE_OF_UNIT)
@pytest.mark.parametrize("raised", [torch.OutOfMemoryError("CUDA out of memory"), KeyboardInterrupt()])
def test_a_unit_that_was_cut_short_can_be_run_again(backend, unit, raised, monkeypatch):
    expected, frames = latent_and_video(Generator(backend), task_for())
    task = task_for()
    generator = Generator(backend)
    for _ in range(unit):
        generator.generate_step(task)
    before = (task.status, task.current_step)

    def cut_short(*_args, **_more):
        raise raised

    with monkeypatch.context() as patch:
        patch.setattr(*STAGE_OF_UNIT[unit], cut_short)
        with pytest.raises(type(raised)):
            generator.generate_step(task)
    if unit:
        assert (task.status, task.current_step) == before
    if task.status is TaskStatus.DECODING:
        generator.generate_step(task)
        video = task.buffer.video
    else:
        latent, video = latent_and_video(Generator(backend), task)
        assert torch.equal(latent, expected)
    assert torch.equal(video, frames)


def test_out_of_memory_after_the_cache_was_written_changes_nothing(backend, monkeypatch):
    params = {"num_inference_steps": 8, "flexcache": {"strategy": "interval", "interval": 3}}
    expected, _ = latent_and_video(Generator(backend), task_for(**params))
    task = task_for(**params)
    generator = Generator(backend)
    generator.generate_step(task)
    step = backend.sampler.step
    while task.status is TaskStatus.DENOISING:
        with monkeypatch.context() as patch:
            patch.setattr(backend.sampler, "step", out_of_memory)
            with pytest.raises(torch.OutOfMemoryError):
                generator.generate_step(task)
        assert backend.sampler.step == step
        generator.generate_step(task)
    assert torch.equal(task.buffer.latent, expected)


def out_of_memory(*_args, **_kwargs):
    raise torch.OutOfMemoryError("CUDA out of memory")


# -- memory levels, cascade, cache, dtypes


def test_all_memory_levels_give_the_same_video(tiny_folder, two_experts_folder, make_config):
    for folder in (tiny_folder, two_experts_folder):
        results = {}
        for level in range(5):
            backend = DiffusionBackend(make_config(folder, infer__diffusion__low_mem_level=level))
            assert backend.low_mem_level == level
            task = task_for(num_inference_steps=6, height=96, width=32)
            results[level] = latent_and_video(Generator(backend), task)
            backend.terminate()
        for level in range(1, 5):
            assert torch.equal(results[level][0], results[0][0]), level
            assert psnr(results[level][1], results[0][1]) >= 45
            assert torch.equal(results[level][1], results[1][1])


def test_cascade_runs_its_stages_in_one_task(backend):
    stages = (CascadeStage(32, 32, 4), CascadeStage(64, 48, 3, strength=0.5))
    generator = Generator(backend)
    task = task_for(cascade=stages)
    event = generator.generate_multi_stage(task)
    assert event.status is TaskStatus.FINISHED, task.error_message
    assert task.num_inference_steps == 7 == task.current_step
    assert (task.resolved.height, task.resolved.width) == (64, 48)
    with pytest.raises(UsageError, match="one stage"):
        generator.generate_multi_stage(task_for())


def test_cascade_by_hand(backend):
    """Base, upsample, re-noise, refine: the same as doing it with the parts."""
    from chitu_diffusion.sampling.noise import upsample_latent

    stages = (CascadeStage(32, 32, 3), CascadeStage(64, 64, 2, strength=0.5))
    task = task_for(cascade=stages, guidance_scale=1.0)
    latent, _ = latent_and_video(Generator(backend), task)
    generator = Generator(backend)
    sampler = backend.sampler
    text = generator.encode_text(CAT)
    base = generator.denoise_loop(initial_noise((1, 4, 2, 4, 4), 3), text, num_steps=3, guidance_scale=1.0)
    state = sampler.begin(2, strength=0.5)
    by_hand = sampler.renoise(state, upsample_latent(base, 8, 8), initial_noise((1, 4, 2, 8, 8), 3, stream=1))
    while not sampler.is_done(state):
        velocity = generator.forward_with_cp(by_hand, text, sampler.timestep(state))
        by_hand, state = sampler.step(state, velocity, by_hand)
    assert torch.equal(by_hand, latent)


def test_cascade_over_two_models_and_its_refusals(experts):
    stages = (CascadeStage(32, 32, 3, expert=0), CascadeStage(48, 48, 2, strength=0.4, expert=1))
    task = task_for(cascade=stages)
    generator = Generator(experts)
    used = []
    for event in run_to_end(generator, task):
        if event.stage is TaskStatus.DENOISING:
            used.append(task.expert)
    assert used == [0, 0, 0, 1, 1] and task.status is TaskStatus.FINISHED
    for wrong in (
        {"cascade": stages, "height": 64},
        {"cascade": stages, "flexcache": "interval"},
        {"cascade": (replace(stages[0], strength=0.5), stages[1])},
    ):
        with pytest.raises(UsageError):
            resolve_task(task_for(**wrong), generator.backend.spec, "")


def test_two_experts_run_as_a_multi_stage_task(experts):
    task = task_for(num_inference_steps=8)
    assert Generator(experts).generate_multi_stage(task).status is TaskStatus.FINISHED
    assert "expert 1" in task.notes


def test_interval_cache_reuses_and_lies_in_the_task(backend):
    exact, _ = latent_and_video(Generator(backend), task_for(num_inference_steps=12))
    never = {"strategy": "interval", "interval": 1}
    same, _ = latent_and_video(Generator(backend), task_for(num_inference_steps=12, flexcache=never))
    assert relative_error(same, exact) < 1e-6
    generator = Generator(backend)
    tasks = [task_for(num_inference_steps=12, seed=seed, flexcache="interval") for seed in (3, 4)]
    while tasks[0].current_step < 11:
        for task in tasks:
            generator.generate_step(task)
    assert tasks[0].buffer.cache["reused"] == 5
    assert tasks[0].buffer.cache["records"] is not tasks[1].buffer.cache["records"]
    close, _ = latent_and_video(generator, tasks[0])
    assert 1e-6 < relative_error(close, exact) < 0.5
    alone, _ = latent_and_video(Generator(backend), task_for(num_inference_steps=12, flexcache="interval"))
    assert torch.equal(alone, close)


def test_cache_refusals_name_the_nearest(backend):
    for wrong, said in (
        ("intervl", "Did you mean 'interval'"),
        ({"strategy": "interval", "intervall": 2}, "Did you mean 'interval'"),
        ({"strategy": "interval", "interval": 0}, "from 1"),
        ({"strategy": "interval", "warmup": 9}, "at most"),
    ):
        task = task_for(flexcache=wrong)
        Generator(backend).generate_step(task)
        assert task.status is TaskStatus.FAILED and said in task.error_message


def test_bfloat16_and_autocast_stay_near_float32(tiny_folder, make_config):
    exact, _ = latent_and_video(
        Generator(DiffusionBackend(make_config(tiny_folder))), task_for(guidance_scale=2.0)
    )
    half = DiffusionBackend(make_config(tiny_folder, infer__dtype="bfloat16"))
    rounded, video = latent_and_video(Generator(half), task_for(guidance_scale=2.0))
    assert rounded.dtype == torch.float32 and video.dtype == torch.float32
    assert relative_error(rounded, exact) < 0.1
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast, _ = latent_and_video(
            Generator(DiffusionBackend(make_config(tiny_folder))), task_for(guidance_scale=2.0)
        )
    assert 0 < relative_error(cast, exact) < 0.1


# -- the backend


def test_backend_life(tiny_folder, make_config):
    backend = DiffusionBackend(make_config(tiny_folder))
    assert backend.state is BackendState.INITIALIZED
    assert len(backend.model_pool) == 1 and backend.attn_backend.exact
    backend.start()
    assert backend.state is BackendState.RUNNING
    backend.terminate()
    backend.terminate()
    assert backend.state is BackendState.TERMINATED == 3
    with pytest.raises(UsageError, match="terminated"):
        Generator(backend).generate_step(task_for())
    with pytest.raises(UsageError, match="terminated"):
        backend.low_mem_level = 2


def test_backend_keeps_a_frozen_copy_and_refuses_what_cannot_be(tiny_folder, make_config):
    args = make_config(tiny_folder)
    backend = DiffusionBackend(args)
    args.infer.diffusion.low_mem_level += 1
    assert backend.low_mem_level == 0 == backend.args.infer.diffusion.low_mem_level
    for dotted, value in (
        ("infer__device", "cuda:99"),
        ("infer__device", "toaster"),
        ("infer__diffusion__cp_size", 2),
    ):
        with pytest.raises(UsageError):
            DiffusionBackend(make_config(tiny_folder, **{dotted: value}))
    with pytest.raises(UsageError, match="Did you mean 'sdpa'"):
        DiffusionBackend(make_config(tiny_folder, infer__attn_type="sdqa"))


def test_backend_from_networks_in_memory(tiny_folder, make_config):
    args = make_config(tiny_folder)
    networks = load_networks(args, model_of(args), torch.device("cpu"), torch.float32)
    backend = DiffusionBackend.from_networks(replace(networks, folder=None), args)
    expected, _ = latent_and_video(Generator(DiffusionBackend(args)), task_for())
    task = task_for()
    assert torch.equal(latent_and_video(Generator(backend), task)[0], expected)
    Generator(backend).generate_step(task)
    assert read_recipe(task.buffer.save_path)["weights_sha256"] is None
