"""Requests that are sampled by a recipe: beside diffusers on the same noise levels, beside the authors'
formula, from the command line to the file, cut short, on ranks, and in turns.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import Chitu, MakeConfig
from PIL import Image
from ranks import run_ranks
from running import CAT, config_for, latent_and_video, relative_error, run_to_end, task_for
from test_pipeline_parity import diffusers_run

from chitu_diffusion.backend import DiffusionBackend
from chitu_diffusion.distributed.plan import ParallelPlan
from chitu_diffusion.engine import Engine
from chitu_diffusion.errors import CannotResumeError, CheckpointError, UsageError
from chitu_diffusion.executor.worker_group import WorkerGroup
from chitu_diffusion.flexcache.registry import STRATEGIES
from chitu_diffusion.generator import Generator
from chitu_diffusion.media.reading import read_recipe
from chitu_diffusion.models.registry import FULL_SIZE, resolve_model
from chitu_diffusion.pipelines.checkpoint import load_task, save_task
from chitu_diffusion.pipelines.request import resolve_task
from chitu_diffusion.sampling.noise import initial_noise, nth_noise
from chitu_diffusion.sampling.recipes import RECIPES
from chitu_diffusion.task import TaskStatus

SEED = secrets.randbelow(2**31)
SMALL = {"height": 32, "width": 48, "num_frames": 5}
EULER = [name for name, row in RECIPES.items() if row.sampler == "euler" and row.latent == "float32"]


@pytest.fixture(scope="module")
def backends(tiny_folder, two_experts_folder, image_experts_folder, tmp_path_factory):
    place = tmp_path_factory.mktemp("outputs")
    folders = {"one": tiny_folder, "two": two_experts_folder, "image": image_experts_folder}
    return {name: DiffusionBackend(config_for(folder, place)) for name, folder in folders.items()}


def on_levels(pipeline, name: str):
    """diffusers' own Euler on a row's sigmas, with a boundary that cuts between the experts' steps."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    usual = scheduler.set_timesteps
    sigmas = list(RECIPES[name].levels.sigmas)
    scheduler.set_timesteps = lambda steps, device=None, **_: usual(sigmas=sigmas, device=device)
    pipeline.scheduler = scheduler
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("name", EULER)
@pytest.mark.parametrize("experts", ["one", "two"])
def test_parity_with_diffusers_on_the_same_levels(backends, tiny_folder, two_experts_folder, experts, name):
    from diffusers import WanPipeline

    folder = tiny_folder if experts == "one" else two_experts_folder
    pipeline = on_levels(WanPipeline.from_pretrained(folder, torch_dtype=torch.float32), name)
    if experts == "two" and RECIPES[name].high_steps:
        second, third = RECIPES[name].levels.timesteps[1:3]
        pipeline.register_to_config(boundary_ratio=(0.7 * second + 0.3 * third) / 1000)
    task = task_for(seed=11, negative_prompt="blurry", sampler_recipe=name, **SMALL)
    generator = Generator(backends[experts])
    used = []
    while task.status is not TaskStatus.DECODING:
        generator.generate_step(task)
        used.append(task.expert)
    steps = len(RECIPES[name].levels.sigmas)
    theirs, _ = diffusers_run(
        pipeline, CAT, 11, negative_prompt="blurry", guidance_scale=1.0, num_inference_steps=steps, **SMALL
    )
    assert relative_error(task.buffer.latent, theirs) < 1e-4
    assert task.num_inference_steps == steps and task.resolved.guidance_scale in (1.0, (1.0, 1.0))
    if experts == "two" and RECIPES[name].high_steps:
        assert used[1:] == [0, 0, 1, 1]
    usual, _ = latent_and_video(generator, task_for(seed=11, guidance_scale=1.0, **SMALL))
    assert relative_error(usual, theirs) > 1e-3


def test_first_and_last_frame_parity(backends, image_experts_folder):
    """Shift 16: by the timestep three steps would be the first expert's, by the row two are."""
    from diffusers import WanImageToVideoPipeline

    name = "lightx2v-flf2v-4step"
    pipeline = WanImageToVideoPipeline.from_pretrained(image_experts_folder, torch_dtype=torch.float32)
    on_levels(pipeline, name).register_to_config(boundary_ratio=0.95)
    first, last = (
        Image.fromarray(np.random.default_rng(seed).integers(0, 255, (32, 48, 3), np.uint8))
        for seed in (0, 1)
    )
    task = task_for(seed=4, image=first, last_image=last, sampler_recipe=name, **SMALL)
    latent, _ = latent_and_video(Generator(backends["image"]), task)
    request = {"image": first, "last_image": last, "guidance_scale": 1.0, "num_inference_steps": 4, **SMALL}
    theirs, _ = diffusers_run(pipeline, CAT, 4, negative_prompt="", **request)
    assert relative_error(latent, theirs) < 1e-4
    pipeline.register_to_config(boundary_ratio=0.875)
    by_time, _ = diffusers_run(pipeline, CAT, 4, negative_prompt="", **request)
    assert relative_error(by_time, theirs) > 1e-3


@pytest.mark.parametrize("name", ["rcm", "rcm-2step", "turbowan2.2-i2v-ode", "fastwan", "causvid"])
def test_a_task_takes_the_authors_steps(backends, name):
    """By hand in float64, with the network's own velocity and the noise that `sampling.noise` states."""
    row = RECIPES[name]
    generator = Generator(backends["one"])
    task = task_for(seed=SEED, sampler_recipe=name, **SMALL)
    latent, _ = latent_and_video(generator, task)
    kept = getattr(torch, row.latent)
    assert latent.dtype == kept

    def noise(number):
        if name == "fastwan":
            return nth_noise(latent.shape, SEED, 0, number, torch.bfloat16).double()
        return initial_noise(latent.shape, SEED, number * 2**20).to(kept).double()

    text = generator.encode_text(CAT)
    sigmas = [*row.levels.sigmas, 0.0]
    own = noise(0) * (sigmas[0] if row.scales_start else 1)
    for step, time in enumerate(row.levels.timesteps):
        velocity = generator.forward_with_cp(own.float(), text, time).double()
        sigma, following = sigmas[step : step + 2]
        if row.sampler == "euler":
            own = own + (following - sigma) * velocity
        else:
            data = (own - sigma * velocity).to(kept).double()
            own = ((1 - following) * data + following * noise(step + 1)).to(kept).double()
    # float32 levels; 8 bits where the latent has them, and a network between
    assert relative_error(latent.double(), own) < (2e-3 if kept == torch.bfloat16 else 1e-5)


CUT = [("one", "rcm"), ("one", "fastwan"), ("two", "lightx2v-4step")]


@pytest.mark.parametrize(("model", "name"), CUT)
def test_cut_short_after_any_unit_it_ends_in_the_same_bytes(backends, model, name, tmp_path):
    backend = backends[model]
    task = task_for(seed=SEED, save_path=str(tmp_path / "a.npy"), sampler_recipe=name, **SMALL)
    saved = []
    for unit, _ in enumerate(run_to_end(Generator(backend), task)):
        if not task.is_finished():
            saved.append(tmp_path / f"{unit}.safetensors")
            save_task(task, saved[-1], backend)
    expected = np.load(tmp_path / "a.npy").tobytes()
    for unit, file in enumerate(saved):
        found = load_task(file, backend)
        assert found.resumed.exact
        for _ in run_to_end(Generator(backend), found):
            pass
        assert np.load(tmp_path / "a.npy").tobytes() == expected, f"cut after unit {unit}, seed {SEED}"
    said = read_recipe(tmp_path / "a.npy")
    assert said["params"]["sampler_recipe"] == said["sampler"]["recipe"] == name
    assert said["sampler"]["sigmas"] == pytest.approx(RECIPES[name].levels.sigmas)


def test_tasks_with_other_recipes_take_turns(tiny_folder, make_config: MakeConfig):
    names = (None, "lightx2v-4step", "rcm", "fastwan")
    config = make_config(tiny_folder)
    config.scheduler.policy = "fair"
    with Engine(config) as engine:
        solo = [engine.generate(CAT, seed=5, sampler_recipe=name, **SMALL).frames for name in names]
        tasks = [
            engine.submit(
                task_for(
                    seed=5,
                    sampler_recipe=name,
                    role=str(name),
                    save_path=f"{config.output.dir}/{name}.npy",
                    **SMALL,
                ).params
            )
            for name in names
        ]
        engine.run_until_idle()
    for frames, task in zip(solo, tasks, strict=True):
        assert np.array_equal(np.load(task.buffer.save_path), frames)


def on_two_ranks(rank: int, world: int, store: dist.Store, folder: str, out: str, name: str) -> None:
    for number, layout in enumerate((ParallelPlan(ulysses=2), ParallelPlan(cfg=2))):
        workers = WorkerGroup(layout, rank, dist.PrefixStore(str(number), store), device=torch.device("cpu"))
        engine = Engine(config_for(Path(folder), Path(out)), workers=workers)
        if rank == 0:
            engine.submit(
                task_for(sampler_recipe=name, guidance_scale=3.0, save_path=f"{out}/{number}.npy").params
            )
        while engine.has_work():
            engine.step()
        engine.close()


def test_two_ranks_make_the_video_of_one(backends, tiny_folder, tmp_path):
    run_ranks(2, on_two_ranks, str(tiny_folder), str(tmp_path), "rcm", errors=tmp_path, seconds=60)
    one = task_for(sampler_recipe="rcm", guidance_scale=3.0, save_path=str(tmp_path / "one.npy"))
    for _ in run_to_end(Generator(backends["one"]), one):
        pass
    for number in (0, 1):
        assert np.array_equal(np.load(tmp_path / f"{number}.npy"), np.load(tmp_path / "one.npy"))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", ["lightx2v-4step", "rcm"])
def test_every_cache_goes_with_it_or_says_why(backends, strategy, name):
    task = task_for(sampler_recipe=name, flexcache=strategy, **SMALL)
    generator = Generator(backends["one"])
    while task.status in (TaskStatus.PENDING, TaskStatus.ENCODING, TaskStatus.DENOISING):
        generator.generate_step(task)
    if task.status is TaskStatus.FAILED:
        # what a cache needs at all: more steps than it keeps, or something measured
        said = ("use at most the task's 4 steps", "were measured on", "was not calibrated", "no plan")
        fresh = ("without fresh noise",) if name == "rcm" else ()
        assert any(words in task.error_message for words in said + fresh), task.error_message


# -- what chooses it, and what is said


def called(source: Path, folder: Path, **notes) -> Path:
    """The folder under another name and with other notes; its files are links."""
    shutil.copytree(source, folder, copy_function=os.symlink)
    metadata = json.loads((source / "chitu.json").read_text()) | notes
    (folder / "chitu.json").unlink()
    (folder / "chitu.json").write_text(json.dumps(metadata))
    return folder


def test_a_name_or_a_note_chooses_it(tiny_folder, tmp_path, chitu: Chitu, make_config: MakeConfig):
    named = called(tiny_folder, tmp_path / "FastWan2.1-T2V-1.3B-Diffusers")
    noted = called(tiny_folder, tmp_path / "mine", recipe="rcm-2step")
    plain = called(tiny_folder, tmp_path / "FastWan-but-not", recipe="none")
    task = task_for(**SMALL)
    for folder, name, steps in ((named, "fastwan", 3), (noted, "rcm-2step", 2), (plain, None, 4)):
        backend = DiffusionBackend(make_config(folder))
        assert backend.spec.defaults.sampler_recipe == name
        task = task_for(**SMALL)
        latent_and_video(Generator(backend), task)
        assert (task.resolved.sampler_recipe, task.num_inference_steps) == (name, steps)
        asked = task_for(sampler_recipe=name or "none", **SMALL)
        assert torch.equal(
            *(latent_and_video(Generator(backend), each)[0] for each in (task_for(**SMALL), asked))
        )
    code, _, err = chitu("generate", CAT, "--model", named, "--dry-run")
    told = "sampler recipe fastwan (3 steps, renoise, guidance 1), as FastWan2.1-T2V-1.3B-Diffusers says"
    assert code == 0 and told in err
    backend = DiffusionBackend(make_config(noted, infer__sampler="unipc"))
    task = task_for(**SMALL)
    assert "infer.sampler = unipc samples them as usual" in Generator(backend).generate_step(task).message
    assert task.num_inference_steps == 4


def test_a_bad_note_or_a_causal_model_is_refused(tiny_folder, tmp_path):
    with pytest.raises(CheckpointError, match="Did you mean 'rcm'"):
        resolve_model(str(called(tiny_folder, tmp_path / "a", recipe="rcmm")))
    with pytest.raises(CheckpointError, match="chunks of three frames"):
        resolve_model(str(called(tiny_folder, tmp_path / "Self-Forcing-DMD")))


REFUSED = [
    (
        {"num_inference_steps": 8},
        "sampler recipe lightx2v-4step is sampled on a list of 4 noise levels; use 4",
    ),
    ({"shift": 3}, "sampler recipe lightx2v-4step is sampled on a list of noise levels, which has none"),
]


@pytest.mark.parametrize(("more", "said"), REFUSED)
def test_what_contradicts_it_is_refused(backends, more, said):
    with pytest.raises(UsageError, match=said):
        resolve_task(task_for(sampler_recipe="lightx2v-4step", **more), backends["one"].spec, "")


def test_no_such_recipe_is_refused_where_it_is_asked_for():
    with pytest.raises(UsageError, match="chunks of three frames"):
        task_for(sampler_recipe="self-forcing")
    with pytest.raises(UsageError, match="sampler_recipe; 'chitu reproduce'"):
        task_for(recipe="rcm")


def test_guidance_is_followed_and_said(backends):
    task = task_for(sampler_recipe="lightx2v-4step", guidance_scale=3.0, **SMALL)
    said = Generator(backends["one"]).generate_step(task).message
    assert "guidance above 1 is not what these weights were distilled for" in said
    assert task.resolved.guidance_scale == 3.0


def test_the_command_line_says_it_and_refuses_two_solvers(tiny_folder, tmp_path, chitu: Chitu):
    base = ("generate", CAT, "--model", tiny_folder, "-o", tmp_path / "a.npy", "--seed", "3")
    code, _, err = chitu(*base, "--recipe", "lightx2v-4step", "--sampler", "unipc")
    assert code == 2 and "--recipe 'lightx2v-4step' is sampled with euler, and infer.sampler is unipc" in err
    code, _, err = chitu(*base, "--recipe", "lightx2v-4step", "--steps", "8")
    assert code == 2 and "--steps 8: sampler recipe lightx2v-4step" in err
    code, _, err = chitu(*base, "--recipe", "rcm")
    assert code == 0 and "sampler recipe rcm (4 steps, renoise, guidance 1)" in err
    code, out, _ = chitu("reproduce", tmp_path / "a.npy", "--check", "--model", tiny_folder)
    assert code == 0 and "the same" in out


def test_a_batch_knows_its_video_again(tiny_folder, tmp_path, chitu: Chitu):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": CAT, "seed": 1, "sampler_recipe": "fastwan"}))
    command = ("batch", rows, "--model", tiny_folder, "-o", tmp_path / "out")
    assert chitu(*command)[0] == 0
    written = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("*.mp4")}
    assert written and chitu(*command)[0] == 0
    assert {file: file.stat().st_mtime_ns for file in written} == written


def test_a_checkpoint_of_another_recipe_is_not_gone_on_with(backends, tiny_folder, tmp_path, monkeypatch):
    task = task_for(sampler_recipe="rcm", **SMALL)
    generator = Generator(backends["one"])
    for _ in range(3):
        generator.generate_step(task)
    save_task(task, tmp_path / "cut.safetensors", backends["one"])
    rows = {**RECIPES, "rcm": RECIPES["rcm-720p"]}
    for place in ("recipes", "solvers"):
        monkeypatch.setattr(f"chitu_diffusion.sampling.{place}.RECIPES", rows)
    with pytest.raises(CannotResumeError, match="sigmas"):
        load_task(tmp_path / "cut.safetensors", DiffusionBackend(config_for(tiny_folder, tmp_path)))


@pytest.mark.parametrize("name", ["fastwan", "causvid"])
def test_a_recipe_of_one_transformer_is_refused_for_two(name):
    with pytest.raises(UsageError, match="it is of one transformer"):
        FULL_SIZE["Wan2.2-T2V-A14B"].with_recipe(name)
    assert FULL_SIZE["Wan2.1-T2V-14B"].with_recipe(name).defaults.steps == 3


def test_full_size_experts_share_the_steps_two_and_two():
    for name in ("lightx2v-4step", "lightx2v-flf2v-4step", "wan2.2-lightning", "turbowan2.2-i2v"):
        for spec in (FULL_SIZE["Wan2.2-T2V-A14B"], FULL_SIZE["Wan2.2-I2V-A14B"]):
            sampled = spec.with_recipe(name)
            times = sampled.defaults.levels.timesteps
            assert [time >= 1000 * sampled.boundary for time in times] == [True, True, False, False]
            assert sampled.shift_note(sampled.defaults.shift) is None
