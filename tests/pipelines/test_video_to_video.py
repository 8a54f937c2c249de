"""Video to video beside diffusers' own `WanVideoToVideoPipeline`, and everything that a request with a video
may be.
"""

from __future__ import annotations

import json
import secrets
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import Chitu, MakeConfig
from PIL import Image
from ranks import run_ranks
from running import CAT, config_for, latent_and_video, psnr, relative_error, run_to_end, task_for
from test_pipeline_parity import diffusers_run

from chitu_diffusion.backend import DiffusionBackend
from chitu_diffusion.distributed.plan import ParallelPlan
from chitu_diffusion.engine import Engine
from chitu_diffusion.errors import UsageError
from chitu_diffusion.executor.worker_group import WorkerGroup
from chitu_diffusion.flexcache.registry import STRATEGIES
from chitu_diffusion.generator import Generator
from chitu_diffusion.media.reading import read_frames, read_recipe
from chitu_diffusion.media.video import write_video
from chitu_diffusion.models.registry import FULL_SIZE, resolve_model
from chitu_diffusion.pipelines.checkpoint import load_task, save_task
from chitu_diffusion.pipelines.guidance import expert_at
from chitu_diffusion.pipelines.request import resolve_task
from chitu_diffusion.sampling.noise import initial_noise
from chitu_diffusion.sampling.solvers import Sampler
from chitu_diffusion.task import CascadeStage, TaskStatus

SEED = secrets.randbelow(2**31)
SIZES = {"height": 32, "width": 48, "num_frames": 9}


def film(frames: int = 9, height: int = 32, width: int = 48, seed: int = 0) -> np.ndarray:
    """Noise on a slope that moves: every pixel differs from its neighbours."""
    numbers = np.random.default_rng(seed)
    slope = np.linspace(0, 150, width)[None, None, :, None] + 8 * np.arange(frames)[:, None, None, None]
    return (slope % 200 + numbers.integers(0, 55, (frames, height, width, 3))).astype(np.uint8)


def pictures(frames: np.ndarray) -> list[Image.Image]:
    return [Image.fromarray(frame) for frame in frames]


@pytest.fixture(scope="module")
def backend(tiny_folder, tmp_path_factory):
    return DiffusionBackend(config_for(tiny_folder, tmp_path_factory.mktemp("outputs")))


@pytest.fixture(scope="module")
def experts(two_experts_folder, tmp_path_factory):
    return DiffusionBackend(config_for(two_experts_folder, tmp_path_factory.mktemp("outputs")))


@pytest.fixture(scope="module")
def pipeline(tiny_folder):
    from diffusers import WanPipeline, WanVideoToVideoPipeline

    text = WanPipeline.from_pretrained(tiny_folder, torch_dtype=torch.float32)
    kept = ("tokenizer", "text_encoder", "transformer", "vae", "scheduler")
    pipeline = WanVideoToVideoPipeline(**{name: text.components[name] for name in kept})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("strength", [0.8, 0.3, 1.0])
@pytest.mark.parametrize(("height", "width", "frames"), [(32, 48, 9), (48, 32, 5)])
@pytest.mark.parametrize("guidance", [5.0, 1.0])
def test_parity_with_diffusers(backend, pipeline, strength, height, width, frames, guidance):
    """Frames of 50x70 pixels, which both stretch by Lanczos."""
    given = pictures(film(frames, 50, 70))
    request = {"num_inference_steps": 8, "strength": strength, "guidance_scale": guidance}
    request |= {"height": height, "width": width, "negative_prompt": "blurry"}
    task = task_for(video=given, seed=11, num_frames=frames, **request)
    latent, video = latent_and_video(Generator(backend), task)
    theirs, frames_there = diffusers_run(pipeline, CAT, 11, video=given, **request)
    print(f"latent {relative_error(latent, theirs):.1e}, frames {psnr(video, frames_there):.0f} dB")
    assert relative_error(latent, theirs) < 1e-4
    assert psnr(video, frames_there) >= 50
    assert task.num_inference_steps == task.current_step == int(8 * strength)
    other = task_for(video=film(frames, 50, 70, seed=5), seed=11, num_frames=frames, **request)
    if strength < 1:  # at 1 the noise is all that is left
        assert relative_error(latent_and_video(Generator(backend), other)[0], theirs) > 1e-3


@pytest.mark.parametrize("strength", [0.9, 0.3])
def test_two_experts_share_what_is_left(experts, strength):
    """Diffusers has no such pipeline: the loop by hand, from the noise level where it begins."""
    generator = Generator(experts)
    clip = film()
    task = task_for(
        video=clip, strength=strength, seed=4, num_inference_steps=20, guidance_scale=(4.0, 3.0), **SIZES
    )
    said = generator.generate_step(task).message
    clean = task.buffer.latent
    used = []
    while task.status is TaskStatus.DENOISING:
        generator.generate_step(task)
        used.append(task.expert)
    whole = experts.sampler.begin(20)
    first = 20 - int(20 * strength)
    times = whole["timesteps"][first:]
    assert used == [expert_at(time, 0.875) for time in times]
    assert ("the high-noise expert takes no step" in said) == (0 not in used) == (strength == 0.3)
    sigma = float(whole["sigmas"][first])
    noise = initial_noise(clean.shape, 4)
    state = experts.sampler.begin(int(20 * strength), strength)
    latent = (1 - sigma) * clean + sigma * noise
    text = generator.encode_text([CAT, "blurry, ugly"])
    while not experts.sampler.is_done(state):
        velocity = generator.forward_with_cfg_parallel(
            latent, text, experts.sampler.timestep(state), guidance_scale=(4.0, 3.0)
        )
        latent, state = experts.sampler.step(state, velocity, latent)
    assert relative_error(task.buffer.latent, latent) < 1e-5


@pytest.mark.parametrize(("name", "skips"), [("Wan2.2-T2V-A14B", 0.35), ("Wan2.2-I2V-A14B", 0.62)])
def test_full_size_experts_skip_the_first_below_a_strength(name, skips):
    """40 steps; the strengths are model by model what the authors' shift makes of them."""
    spec = FULL_SIZE[name]
    sampler = Sampler("unipc", {"flow_shift": spec.defaults.shift}, boundary=spec.boundary)
    for steps in range(1, 41):
        state = sampler.begin(steps, steps / 40)
        needs_first = expert_at(sampler.timestep(state), spec.boundary) == 0
        assert needs_first == (steps / 40 > skips + 0.01)


def test_the_latent_is_that_of_diffusers_vae(backend, pipeline):
    task = task_for(video=film(), **SIZES)
    Generator(backend).generate_step(task)
    pixels = torch.from_numpy(film()).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    with torch.no_grad():
        theirs = pipeline.vae.encode(pixels).latent_dist.mode()
    mean, deviation = (
        torch.tensor(values).view(1, -1, 1, 1, 1)
        for values in (pipeline.vae.config.latents_mean, pipeline.vae.config.latents_std)
    )
    assert relative_error(task.buffer.latent, (theirs - mean) / deviation) < 1e-5


# -- in which form it comes


def test_a_video_is_not_written_over_itself(tmp_path, chitu):
    write_video(film(), "a.npy", fps=8)
    Path("linked").symlink_to(".")
    for place in ("a.npy", "linked/a.npy"):
        words = ("generate", "a cat", "--video", "a.npy", "--overwrite", "-o", place)
        for more in ((), ("--dry-run",)):
            code, _, err = chitu(*words, *more)
            assert code == 2 and "it is the video that is made anew" in err, err
    assert np.array_equal(read_frames("a.npy"), film())


@pytest.mark.parametrize("wrong", [-0.5, 1.5, float("nan")])
def test_floats_out_of_range_are_refused_before_anything_runs(chitu, wrong):
    frames = film().astype(np.float32) / 255
    frames[-1, 0, 0, 0] = wrong
    np.save("a.npy", frames)
    for more in ((), ("--dry-run",)):
        code, _, err = chitu("generate", "a cat", "--video", "a.npy", "-o", "b.npy", *more)
        assert code == 2 and "numbers below 0 or above 1, or NaN" in err, err


def test_whatever_holds_the_frames_gives_the_same_video(backend, tmp_path):
    """Of 8-bit frames; what an mp4 keeps of them is compared with its own decoded frames."""
    clip = film()
    for name in ("clip.npy", "clip.gif", "clip.mp4", "clip"):
        write_video(clip, tmp_path / name, fps=8)
    floats = tmp_path / "floats.npy"
    np.save(floats, clip.astype(np.float32) / np.float32(255))
    forms = {
        "array": clip,
        "floats": clip / 255,
        "pictures": pictures(clip),
        "tensor": torch.from_numpy(clip).permute(0, 3, 1, 2),
        "npy": tmp_path / "clip.npy",
        "npy floats": floats,
        "folder": str(tmp_path / "clip"),
    }
    latents = {
        name: latent_and_video(Generator(backend), task_for(video=form, **SIZES))[0]
        for name, form in forms.items()
    }
    for name, latent in latents.items():
        assert relative_error(latent, latents["array"]) < 1e-5, name
    for name in ("clip.mp4", "clip.gif"):
        stored = read_frames(tmp_path / name)
        pair = [
            latent_and_video(Generator(backend), task_for(video=form, **SIZES))[0]
            for form in (tmp_path / name, stored)
        ]
        assert torch.equal(*pair)


def test_a_size_a_length_and_a_rate_follow_the_video(backend, tmp_path):
    """The model's number of pixels, 32 x 32, and at most its 5 frames; the video's own rate."""
    write_video(film(11, 30, 120), tmp_path / "a.mp4", fps=Fraction(24000, 1001))
    resolved = resolve_task(task_for(video=tmp_path / "a.mp4"), backend.spec, "")
    assert (resolved.height, resolved.width, resolved.num_frames) == (16, 64, 5)
    assert resolved.fps == Fraction(24000, 1001) and resolved.strength == 0.8
    longer = resolve_task(task_for(video=tmp_path / "a.mp4", num_frames=9, fps=12), backend.spec, "")
    assert longer.num_frames == 9 and longer.fps == 12
    short = resolve_task(task_for(video=film(3)), backend.spec, "")
    assert short.num_frames == 1 and short.fps == backend.spec.defaults.fps
    with pytest.raises(UsageError, match="num_frames = 13: the video has 11; use at most 9"):
        resolve_task(task_for(video=tmp_path / "a.mp4", num_frames=13), backend.spec, "")
    task = task_for(video=tmp_path / "a.mp4", height=32, width=32)
    said = Generator(backend).generate_step(task).message
    assert "its first 5 of 11 frames are taken" in said and "video of 120x30 is stretched to 32x32" in said
    assert "strength 0.8 takes 3 of 4 steps" in said


def test_odd_sizes_are_cut_out_of_whole_patches(backend):
    small = film(9, 24, 40)
    latent, video = latent_and_video(
        Generator(backend), task_for(video=small, **SIZES | {"height": 24, "width": 40})
    )
    edged = np.pad(small, ((0, 0), (0, 8), (0, 8), (0, 0)), mode="edge")
    whole, frames = latent_and_video(Generator(backend), task_for(video=edged, **SIZES))
    assert torch.equal(latent, whole) and torch.equal(video, frames[..., :24, :40])


REFUSED = [
    ({"video": "nowhere.mp4"}, "cannot be read: No such file"),
    ({"video": __file__}, r"use .mp4, .m4v, .mov, .webm, .mkv, .gif, .npy, or a folder"),
    ({"video": "/dev/zero"}, "it is a device"),
    ({"video": 7}, "use a file's name, a list of pictures"),
    ({"video": []}, "use a file's name, a list of pictures"),
    ({"video": np.zeros((2, 4, 4, 7), np.uint8)}, r"expected \[T, H, W, 3\]"),
    ({"video": torch.zeros(2, 4, 4, 3)}, r"expected \[T, 3, H, W\]"),
    ({"video": np.full((2, 4, 4, 3), 300.0)}, "floats from 0 to 1"),
    ({"video": np.zeros((0, 4, 4, 3), np.uint8)}, "expected"),
    ({"video": [Image.new("RGB", (8, 8)), Image.new("RGB", (8, 16))]}, "different sizes"),
    ({"video": {"path": "x"}}, "use a file's name"),
    ({"video": film(), "strength": 0}, "strength = 0: must be a number from 0.01 to 1"),
    ({"video": film(), "strength": "much"}, "strength = 'much'"),
    ({"strength": True}, "strength = True"),
    ({"denoising_strength": 0.5}, "use strength"),
]


@pytest.mark.parametrize(("values", "said"), REFUSED)
def test_no_video_is_refused_in_words(values, said):
    with pytest.raises(UsageError, match=said):
        task_for(**values)


def test_what_a_model_can_do_with_a_video(backend, image_folder):
    image = resolve_model(str(image_folder)).spec
    for values, spec, said in (
        ({"strength": 0.5}, backend.spec, "use --video FILE"),
        ({"video": film(), "image": pictures(film())[0]}, image, "image to video model and takes none"),
        (
            {"video": film(), "cascade": (CascadeStage(32, 32, 4),)},
            backend.spec,
            "video and cascade together",
        ),
        ({"video": film(), "strength": 0.2}, backend.spec, "of 4 steps that is none; use 0.25 or more"),
    ):
        with pytest.raises(UsageError, match=said):
            resolve_task(task_for(**values), spec, "")


# -- on its way


def test_cut_short_after_any_unit_it_ends_in_the_same_bytes(backend, tmp_path):
    clip = tmp_path / "clip.npy"
    np.save(clip, film())
    more = {"video": clip, "num_inference_steps": 6, "strength": 0.7, **SIZES}
    task = task_for(seed=SEED, save_path=str(tmp_path / "a.npy"), **more)
    saved = []
    for unit, _ in enumerate(run_to_end(Generator(backend), task)):
        if not task.is_finished():
            saved.append(tmp_path / f"{unit}.safetensors")
            save_task(task, saved[-1], backend)
    assert len(saved) == 4 + 2
    expected = np.load(tmp_path / "a.npy").tobytes()
    clip.unlink()  # a checkpoint needs it no more
    for unit, file in enumerate(saved):
        found = load_task(file, backend)
        assert found.resumed.exact
        for _ in run_to_end(Generator(backend), found):
            pass
        assert np.load(tmp_path / "a.npy").tobytes() == expected, f"cut after unit {unit}, seed {SEED}"


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_cache_goes_with_it_or_says_why(backend, strategy):
    task = task_for(video=film(), flexcache=strategy, num_inference_steps=15, **SIZES)
    generator = Generator(backend)
    while task.status in (TaskStatus.PENDING, TaskStatus.ENCODING, TaskStatus.DENOISING):
        generator.generate_step(task)
    if task.status is TaskStatus.FAILED:
        said = ("were measured on", "was not calibrated", "no plan")
        assert any(words in task.error_message for words in said), task.error_message
        assert strategy in ("plan", "magcache")
    else:
        assert task.current_step == 12


def test_a_recipe_s_list_runs_its_end(backend):
    """4 levels at strength 0.8: the last 3, from 0.9375."""
    task = task_for(video=film(), sampler_recipe="lightx2v-4step", **SIZES)
    said = Generator(backend).generate_step(task).message
    assert "strength 0.8 takes 3 of 4 steps, from noise 0.938" in said
    latent_and_video(Generator(backend), task)
    assert task.current_step == 3


def on_two_ranks(rank: int, world: int, store: dist.Store, folder: str, out: str) -> None:
    for number, layout in enumerate((ParallelPlan(ulysses=2), ParallelPlan(cfg=2))):
        workers = WorkerGroup(layout, rank, dist.PrefixStore(str(number), store), device=torch.device("cpu"))
        engine = Engine(config_for(Path(folder), Path(out)), workers=workers)
        if rank == 0:
            engine.submit(task_for(video=film(), save_path=f"{out}/{number}.npy", **SIZES).params)
        while engine.has_work():
            engine.step()
        engine.close()


def test_two_ranks_make_the_video_of_one(backend, tiny_folder, tmp_path):
    """From memory, which the first rank alone has."""
    run_ranks(2, on_two_ranks, str(tiny_folder), str(tmp_path), errors=tmp_path, seconds=60)
    one = task_for(video=film(), save_path=str(tmp_path / "one.npy"), **SIZES)
    for _ in run_to_end(Generator(backend), one):
        pass
    for number in (0, 1):
        assert np.array_equal(np.load(tmp_path / f"{number}.npy"), np.load(tmp_path / "one.npy"))


@pytest.mark.parametrize("level", [0, 1, 2, 3, 4])
def test_every_memory_level_makes_it(tiny_folder, backend, make_config: MakeConfig, level):
    lower = DiffusionBackend(make_config(tiny_folder, infer__diffusion__low_mem_level=level))
    task = task_for(video=film(), **SIZES)
    latent, _ = latent_and_video(Generator(lower), task)
    assert torch.equal(latent, latent_and_video(Generator(backend), task_for(video=film(), **SIZES))[0])


# -- from the command line to the file


def test_from_the_command_line_to_its_reproduction(tiny_folder, tmp_path, chitu: Chitu):
    clip = tmp_path / "clip.mp4"
    write_video(film(13, 48, 64), clip, fps=12)
    base = ("generate", CAT, "--model", tiny_folder, "-o", tmp_path / "a.npy", "--video", clip, "--seed", "3")
    code, _, err = chitu(*base, "--dry-run")
    assert code == 0 and "4 steps, of which the last 3 are taken (strength 0.8)" in err
    code, out, _ = chitu(*base, "--dry-run", "--json")
    plan = json.loads(out.splitlines()[-1])["tasks"][0]
    assert (plan["height"], plan["width"], plan["num_frames"], plan["fps"]) == (16, 32, 5, 12)
    code, _, err = chitu(*base, "--strength", "0.6")
    assert code == 0 and "strength 0.6 takes 2 of 4 steps" in err
    said = read_recipe(tmp_path / "a.npy")["params"]
    assert said["video"]["path"] == str(clip) and len(said["video"]["sha256"]) == 64
    assert said["strength"] == 0.6 and said["fps"] == 12
    again = ("reproduce", tmp_path / "a.npy", "--check", "--model", tiny_folder)
    assert chitu(*again)[0] == 0
    moved = tmp_path / "moved.mp4"
    clip.rename(moved)
    assert chitu(*again)[0] == 2
    assert chitu(*again, "--video", moved)[0] == 0
    write_video(film(13, 48, 64, seed=7), clip, fps=12)
    code, _, err = chitu(*again)
    assert code == 2 and "has changed since the request" in err


def test_a_batch_knows_its_video_again_and_another_one(tiny_folder, tmp_path, chitu: Chitu):
    clip = tmp_path / "clip.npy"
    rows = tmp_path / "rows.csv"
    rows.write_text(f"prompt,seed,video,strength,save_path\n{CAT},1,{clip},0.5,one.npy\n")
    command = ("batch", rows, "--model", tiny_folder, "-o", tmp_path / "out")
    for seed, code, words in ((0, 0, "done in"), (0, 0, "1 done already"), (1, 2, "shows something else")):
        np.save(clip, film(seed=seed))
        found, _, err = chitu(*command)
        assert found == code and words in err, err
