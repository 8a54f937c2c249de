"""Models that are sampled on a list of noise levels, or with fresh noise, from their folder to the file."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import WAN_TINY, Chitu, MakeConfig
from ranks import run_ranks
from running import config_for, latent_and_video, run_to_end, task_for

from chitu_diffusion.backend import DiffusionBackend
from chitu_diffusion.distributed.plan import ParallelPlan
from chitu_diffusion.engine import Engine
from chitu_diffusion.errors import CannotResumeError, CheckpointError, UsageError
from chitu_diffusion.executor.worker_group import WorkerGroup
from chitu_diffusion.flexcache.registry import STRATEGIES
from chitu_diffusion.generator import Generator
from chitu_diffusion.media.reading import read_recipe
from chitu_diffusion.models.convert import convert, verify
from chitu_diffusion.models.registry import resolve_model
from chitu_diffusion.pipelines.checkpoint import load_task, save_task
from chitu_diffusion.sampling.noise import initial_noise
from chitu_diffusion.task import CascadeStage, DiffusionTask, TaskStatus

SEED = secrets.randbelow(2**31)
SHIFTED = {"sampler": "euler", "timesteps": [1000, 750, 500, 250], "shift": 5.0, "guidance": [1.0]}
DMD = {
    "sampler": "renoise",
    "sigmas": [1.0, 0.756757, 0.521739],
    "timesteps": [1000, 757, 522],
    "guidance": 1,
}
FRESH = {**SHIFTED, "sampler": "renoise"}
SMALL = {"height": 64, "width": 64, "num_frames": 5}


def with_defaults(source: Path, folder: Path, **defaults: Any) -> Path:
    """A model's folder with other defaults: its files are links, but for `chitu.json`."""
    shutil.copytree(source, folder, copy_function=os.symlink)
    metadata = json.loads((source / "chitu.json").read_text())
    metadata["defaults"] = {key: value for key, value in metadata["defaults"].items() if key != "steps"}
    metadata["defaults"] |= defaults
    (folder / "chitu.json").unlink()
    (folder / "chitu.json").write_text(json.dumps(metadata))
    return folder


@pytest.fixture(scope="module")
def folders(tiny_folder, two_experts_folder, tmp_path_factory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("lists")
    return {
        "euler": with_defaults(WAN_TINY, place / "euler", **SHIFTED),
        "renoise": with_defaults(WAN_TINY, place / "renoise", **DMD),
        "tiny euler": with_defaults(tiny_folder, place / "tiny-euler", **SHIFTED),
        "tiny renoise": with_defaults(tiny_folder, place / "tiny-renoise", **FRESH),
        "experts": with_defaults(two_experts_folder, place / "experts", **{**FRESH, "guidance": [3.0, 1.0]}),
    }


def frames_of(task: DiffusionTask) -> bytes:
    assert task.status is TaskStatus.FINISHED, task.error_message
    return np.load(task.buffer.save_path).tobytes()


# -- what is made


@pytest.mark.parametrize("name", ["tiny euler", "tiny renoise"])
def test_a_task_takes_the_steps_of_its_list(folders, name, make_config: MakeConfig) -> None:
    """By hand: exact noise levels, the network's own velocity, and the noise that `sampling.noise` states."""
    backend = DiffusionBackend(make_config(folders[name]))
    generator = Generator(backend)
    latent, _ = latent_and_video(generator, task_for(seed=SEED))
    text = generator.encode_text("A cat walking on grass")
    sigmas = [1, 15 / 16, 5 / 6, 5 / 8, 0]
    own = initial_noise(latent.shape, SEED)
    for step, (sigma, following) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True)):
        velocity = generator.forward_with_cp(own, text, torch.tensor(1000 * sigma))
        if name == "tiny euler":
            own = own + (following - sigma) * velocity
        else:
            fresh = initial_noise(latent.shape, SEED, (step + 1) * 2**20)
            own = (1 - following) * (own - sigma * velocity) + following * fresh
    # the same float32 operations but for the rounding of sigma, over 4 steps
    torch.testing.assert_close(latent, own, rtol=0, atol=1e-5)
    by_page = generator.denoise_loop(
        initial_noise(latent.shape, SEED), text, num_steps=4, guidance_scale=1.0, seed=SEED
    )
    assert torch.equal(by_page, latent)


RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "euler": ("euler", SMALL),
    "renoise": ("renoise", SMALL),
    "a cache": ("renoise", {**SMALL, "flexcache": {"strategy": "interval", "warmup": 0, "cooldown": 0}}),
    "experts": ("experts", {}),
    "a cascade": (
        "tiny renoise",
        {"cascade": (CascadeStage(32, 32, 4), CascadeStage(48, 48, 2, strength=0.5))},
    ),
}


@pytest.mark.parametrize("name", RUNS)
def test_cut_short_after_any_unit_it_ends_in_the_same_bytes(folders, name, tmp_path) -> None:
    which, more = RUNS[name]
    backend = DiffusionBackend(config_for(folders[which], tmp_path))
    task = task_for(seed=SEED, save_path=str(tmp_path / "a.npy"), **more)
    saved = []
    for unit, _ in enumerate(run_to_end(Generator(backend), task)):
        if not task.is_finished():
            saved.append(tmp_path / f"{unit}.safetensors")
            save_task(task, saved[-1], backend)
    expected = frames_of(task)
    assert len(saved) == task.num_inference_steps + 2
    again = DiffusionBackend(config_for(folders[which], tmp_path))
    for unit, file in enumerate(saved):
        found = load_task(file, again)
        assert found.resumed.exact
        for _ in run_to_end(Generator(again), found):
            pass
        assert frames_of(found) == expected, f"cut after unit {unit}, seed {SEED}"


def on_two_ranks(rank: int, world: int, store: dist.Store, folder: str, out: str, seed: int) -> None:
    for number, layout in enumerate((ParallelPlan(ulysses=2), ParallelPlan(cfg=2))):
        workers = WorkerGroup(layout, rank, dist.PrefixStore(str(number), store), device=torch.device("cpu"))
        engine = Engine(config_for(Path(folder), Path(out)), workers=workers)
        if rank == 0:
            engine.submit(task_for(seed=seed, save_path=f"{out}/{number}.npy", guidance_scale=3.0).params)
        while engine.has_work():
            engine.step()
            for task in engine.pool:
                if task.status is TaskStatus.DECODING:
                    torch.save(task.buffer.latent, Path(out, f"{number}-{rank}.pt"))
        engine.close()


def test_fresh_noise_is_one_on_all_ranks(folders, tmp_path) -> None:
    run_ranks(2, on_two_ranks, str(folders["tiny renoise"]), str(tmp_path), SEED, errors=tmp_path, seconds=60)
    backend = DiffusionBackend(config_for(folders["tiny renoise"], tmp_path))
    task = task_for(seed=SEED, save_path=str(tmp_path / "one.npy"), guidance_scale=3.0)
    for _ in run_to_end(Generator(backend), task):
        pass
    for number in (0, 1):
        first, second = (torch.load(tmp_path / f"{number}-{rank}.pt", weights_only=True) for rank in (0, 1))
        assert torch.equal(first, second)
        assert np.load(tmp_path / f"{number}.npy").tobytes() == frames_of(task)


# -- what is said of it


def test_the_list_is_in_the_recipe_and_a_resume_notices(folders, tmp_path) -> None:
    backend = DiffusionBackend(config_for(folders["tiny euler"], tmp_path))
    task = task_for(save_path=str(tmp_path / "a.npy"))
    generator = Generator(backend)
    for _ in range(3):
        generator.generate_step(task)
    save_task(task, tmp_path / "cut.safetensors", backend)
    for _ in run_to_end(generator, task):
        pass
    said = read_recipe(tmp_path / "a.npy")["sampler"]
    assert said["name"] == "euler" and said["sigmas"] == pytest.approx([1, 0.9375, 5 / 6, 0.625])
    assert said["timesteps"] == pytest.approx([1000, 937.5, 2500 / 3, 625])
    others = {
        "sampler euler, here renoise": folders["tiny renoise"],
        r"sigmas \[1.0, 0.9375.*, here \[1.0, 0.8\]": with_defaults(
            folders["tiny euler"], tmp_path / "other", sigmas=[1.0, 0.8], timesteps=None
        ),
        r"timesteps \[1000.0, .*, here \[999, ": with_defaults(
            folders["tiny euler"],
            tmp_path / "integers",
            sigmas=said["sigmas"],
            timesteps=[999, 937, 833, 625],
        ),
    }
    for words, folder in others.items():
        with pytest.raises(CannotResumeError, match=words.replace("[999, ", "[999.0, ")):
            load_task(tmp_path / "cut.safetensors", DiffusionBackend(config_for(folder, tmp_path)))
    own = config_for(folders["tiny euler"], tmp_path)
    own.infer.sampler = "dpm++"
    with pytest.raises(CannotResumeError, match="sampler euler, here dpm"):
        load_task(tmp_path / "cut.safetensors", DiffusionBackend(own))


def test_the_setting_overrides_the_model(folders, tiny_folder, make_config: MakeConfig) -> None:
    backend = DiffusionBackend(make_config(tiny_folder))
    assert backend.sampler.name == "unipc" and backend.sampler.levels is None
    listed = DiffusionBackend(make_config(folders["tiny euler"], infer__sampler="renoise"))
    assert listed.sampler.name == "renoise" and len(listed.sampler.levels.sigmas) == 4
    free = DiffusionBackend(make_config(folders["tiny euler"], infer__sampler="unipc"))
    assert free.sampler.levels is None and free.spec.defaults.steps == 4
    task = task_for(num_inference_steps=6)
    latent_and_video(Generator(free), task)
    assert task.num_inference_steps == 6


@pytest.mark.parametrize("name", STRATEGIES)
def test_fresh_noise_goes_with_every_cache_but_those_that_predict_a_path(name, make_config) -> None:
    backend = DiffusionBackend(make_config(WAN_TINY, infer__sampler="renoise"))
    task = task_for(num_inference_steps=12, flexcache=name, **SMALL)
    generator = Generator(backend)
    generator.generate_step(task)
    if name in ("plan", "meancache"):
        assert task.status is TaskStatus.FAILED
        assert f"flexcache {name} predicts along a path without fresh noise" in task.error_message
        assert "infer.sampler = unipc or dpm++ or euler" in task.error_message
        return
    while task.status is TaskStatus.DENOISING:
        generator.generate_step(task)
    assert task.status is TaskStatus.DECODING, task.error_message


def test_a_cascade_runs_the_end_of_the_list_or_says_what_fits(folders, tmp_path) -> None:
    backend = DiffusionBackend(config_for(folders["tiny euler"], tmp_path))
    for stages, words in (
        ((CascadeStage(32, 32, 5),), "num_inference_steps = 5: .* use 4"),
        (
            (CascadeStage(32, 32, 4), CascadeStage(48, 48, 4, strength=0.5)),
            r"4 steps at strength 0\.5 are the end of 8.*use 2 steps at strength 0\.5",
        ),
    ):
        with pytest.raises(UsageError, match=words):
            Engine(backend.args).submit(task_for(cascade=stages).params)


def test_from_the_command_line(chitu: Chitu, folders, tiny_folder) -> None:
    code, _, err = chitu("generate", "cat", "--model", folders["tiny euler"], "--steps", 50, "-o", "a.npy")
    assert code == 2 and "--steps 50: this model is sampled on a list of 4 noise levels; use 4" in err
    code, _, err = chitu("generate", "cat", "--model", tiny_folder, "--sampler", "eular", "-o", "a.npy")
    assert code == 2 and "--sampler" in err and "'euler'" in err and "'renoise'" in err
    words = ("generate", "cat", "--model", tiny_folder, "--steps", 2, "--seed", 1, "-o", "a.npy")
    code, _, err = chitu(*words, "--sampler", "renoise")
    assert code == 0, err
    assert read_recipe("a.npy")["sampler"]["name"] == "renoise"
    shown = chitu("config", "show")[1]
    assert "auto" in shown and "renoise: fresh noise" in shown


def test_a_batch_row_of_another_list_is_made_again(chitu: Chitu, folders, tmp_path) -> None:
    Path("p.txt").write_text("a cat\n", encoding="utf-8")
    other = with_defaults(folders["tiny euler"], tmp_path / "other", timesteps=[1000, 900, 500, 250])
    for folder, done in ((folders["tiny euler"], False), (folders["tiny euler"], True), (other, False)):
        code, _, err = chitu("batch", "p.txt", "-o", "out", "--model", folder, "--overwrite")
        assert code == 0 and ("done already" in err) is done, err


def test_calibration_with_fresh_noise_is_refused_in_words(chitu: Chitu, folders, tmp_path) -> None:
    Path("p.txt").write_text("a cat\na dog\na bird\na fish\n", encoding="utf-8")
    code, _, err = chitu(
        "calibrate", "--model", folders["tiny renoise"], "--prompts", "p.txt", "-o", tmp_path / "out"
    )
    assert code == 2 and "takes fresh noise at each step" in err and "use --sampler euler" in err


# -- what a folder may say


@pytest.mark.parametrize(
    ("said", "key", "expected"),
    [
        ({"sampler": "eular"}, "sampler", "unipc or dpm"),
        ({"sampler": ["euler"]}, "sampler", "unipc or dpm"),
        ({"timesteps": [1000, 500]}, "sampler", "euler or renoise, which take a list"),
        ({"sampler": "unipc", "sigmas": [1.0]}, "sampler", "euler or renoise"),
        ({"sampler": "euler", "sigmas": [1.0, 1.0]}, "sigmas", "a falling list"),
        ({"sampler": "euler", "sigmas": [1.5, 1.0]}, "sigmas", "a falling list"),
        ({"sampler": "euler", "sigmas": [1.0, 0]}, "sigmas", "a falling list"),
        ({"sampler": "euler", "sigmas": [1.0, "x"]}, "sigmas", "a falling list"),
        ({"sampler": "euler", "sigmas": []}, "sigmas", "a falling list"),
        ({"sampler": "euler", "sigmas": 1.0}, "sigmas", "a falling list"),
        ({"sampler": "euler", "timesteps": [1001, 500]}, "timesteps", "at most 1000"),
        ({"sampler": "euler", "timesteps": [float("nan")]}, "timesteps", "at most 1000"),
        ({"sampler": "euler", "sigmas": [1.0], "timesteps": [1000, 5]}, "timesteps", "one for each"),
        ({"sampler": "euler", "timesteps": [1000, 500], "steps": 4}, "steps", "2, as many"),
        ({"guidance": "5"}, "guidance", "a number from 0"),
        ({"guidance": []}, "guidance", "a number from 0"),
        ({"shift": 0}, "shift", "a number from 1e-06 to 1000"),
        ({"height": 2.5}, "height", "a whole number"),
        ({"negative_prompt": 3}, "negative_prompt", "text"),
        ({"samplre": "euler"}, "samplre", "sampler"),
    ],
    ids=str,
)
def test_what_a_folder_cannot_say(tiny_folder, tmp_path, said, key, expected) -> None:
    folder = with_defaults(tiny_folder, tmp_path / "spoilt", **said)
    with pytest.raises(CheckpointError, match=expected) as caught:
        resolve_model(str(folder))
    assert caught.value.key == key and str(caught.value.file).endswith("chitu.json")


def test_timesteps_are_shifted_as_the_folder_says_or_else_its_scheduler(tiny_folder, tmp_path) -> None:
    listed = {"sampler": "euler", "timesteps": [1000, 500]}
    for number, (config, said, shift) in enumerate(
        [
            ({"flow_shift": 3.0}, {}, 3),
            ({"flow_shift": 3.0}, {"shift": 5.0}, 5),
            ({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 8.0}, {}, 8),
            ({}, {}, 1),
        ]
    ):
        folder = with_defaults(tiny_folder, tmp_path / str(number), **listed, **said)
        (folder / "scheduler" / "scheduler_config.json").unlink()
        (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
        levels = resolve_model(str(folder)).spec.defaults.levels
        assert levels is not None and levels.sigmas == pytest.approx([1, shift / (1 + shift)])


def test_the_list_goes_along_when_a_model_is_converted(folders, tmp_path) -> None:
    target = tmp_path / "official"
    convert(folders["tiny renoise"], target, "official")
    assert all(finding.ok for finding in verify(target))
    ours, theirs = (resolve_model(str(place)).spec.defaults for place in (folders["tiny renoise"], target))
    assert ours == theirs and ours.levels is not None and ours.steps == 4
