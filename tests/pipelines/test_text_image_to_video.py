"""Text and image to video by one checkpoint whose tokens have times of their own, beside diffusers' own two
pipelines with `expand_timesteps`; and everything that a request to such a model may be.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import WAN_TINY
from diffusers import AutoencoderKLWan
from PIL import Image
from ranks import run_ranks
from running import config_for, latent_and_video, psnr, relative_error, run_to_end, task_for
from test_image_to_video import picture
from test_pipeline_parity import diffusers_run
from test_video_to_video import film
from tiny_model import write_tiny_model

from chitu_diffusion.backend import DiffusionBackend
from chitu_diffusion.distributed.plan import ParallelPlan
from chitu_diffusion.engine import Engine
from chitu_diffusion.errors import UsageError
from chitu_diffusion.executor.worker_group import WorkerGroup
from chitu_diffusion.flexcache.registry import STRATEGIES
from chitu_diffusion.generator import Generator
from chitu_diffusion.media.reading import read_frames
from chitu_diffusion.models.convert import convert, verify
from chitu_diffusion.models.registry import resolve_model
from chitu_diffusion.pipelines.encoding import encode_first_frame
from chitu_diffusion.pipelines.request import resolve_task
from chitu_diffusion.sampling.noise import initial_noise
from chitu_diffusion.task import CascadeStage, Conditioning, DiffusionUserParams, TaskStatus

SIZES = {"height": 32, "width": 48, "num_frames": 9, "num_inference_steps": 5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("models") / "both", token_times=True, shift=5.0, seed=4)


@pytest.fixture(scope="module")
def backend(folder, tmp_path_factory):
    return DiffusionBackend(config_for(folder, tmp_path_factory.mktemp("outputs")))


@pytest.fixture(scope="module", params=["text", "image", "image, trained"])
def beside_diffusers(request, folder, backend, tmp_path_factory):
    """A folder opened by us and by diffusers, and the image that it takes. (`wan-tiny` with text alone
    stands in `test_pipeline_parity`.)
    """
    from diffusers import WanImageToVideoPipeline, WanPipeline

    kind = WanPipeline if request.param == "text" else WanImageToVideoPipeline
    ours = backend
    place = folder
    if request.param == "image, trained":
        place = WAN_TINY
        ours = DiffusionBackend(config_for(WAN_TINY, tmp_path_factory.mktemp("outputs")))
    pipeline = kind.from_pretrained(place, torch_dtype=torch.float32)
    assert pipeline.config.expand_timesteps  # as the folder says
    pipeline.set_progress_bar_config(disable=True)
    return ours, pipeline, {} if request.param == "text" else {"image": picture()}


@pytest.mark.parametrize(
    ("changed", "guidance", "seed"), [({}, 5.0, 11), ({}, 1.0, 3), ({"height": 48, "num_frames": 5}, 5.0, 3)]
)
def test_parity_with_diffusers(beside_diffusers, changed, guidance, seed):
    backend, pipeline, given = beside_diffusers
    request = {**SIZES, **changed, **given, "negative_prompt": "blurry", "guidance_scale": guidance}
    task = task_for(seed=seed, **request)
    latent, video = latent_and_video(Generator(backend), task)
    theirs, frames = diffusers_run(pipeline, task.params.prompt, seed, **request)
    # diffusers puts the first frame in its place after its last callback
    error = relative_error(latent[:, :, 1:], theirs[:, :, 1:])
    print(f"latent {error:.1e}, frames {psnr(video, frames):.0f} dB")
    assert error < 1e-4  # float32 sums in another order, over 5 steps
    assert psnr(video, frames) >= 50
    if given:
        assert relative_error(latent[:, :, :1], theirs[:, :, :1]) > 1e-2
        plain = latent_and_video(Generator(backend), task_for(seed=seed, **{**request, "image": None}))[0]
        assert relative_error(plain, latent) > 1e-2


def test_what_is_refused_in_words(backend, tiny_folder):
    first = picture()
    stages = (CascadeStage(16, 16, 2), CascadeStage(32, 32, 2, 0.5))
    for given, said in (
        ({"image": first, "last_image": first}, "told of the first frame alone"),
        ({"image": first, "video": film()}, "video and image together"),
        ({"image": first, "cascade": stages}, "image and cascade"),
    ):
        with pytest.raises(UsageError, match=said):
            resolve_task(task_for(**given), backend.spec, "")
    generator = Generator(backend)
    latent = torch.randn(1, 4, 3, 4, 6)
    text = generator.encode_text("a cat")
    for frame in (torch.zeros(1, 4, 1, 4, 4), torch.zeros(1, 4, 2, 4, 6)):
        with pytest.raises(UsageError, match=r"use \[1, 4, 1, H, W\]"):
            generator.forward_with_cp(latent, Conditioning(text, first_frame=frame), 500)
    plain = Generator(DiffusionBackend(config_for(tiny_folder, Path("outputs"))))
    frame = torch.zeros(1, 4, 1, 4, 6)
    with pytest.raises(UsageError, match="takes no first_frame"):
        plain.forward_with_cp(latent, Conditioning(text, first_frame=frame), 500)


def test_a_loop_by_hand_is_the_task(backend):
    """The page's way, whose single forwards take the first frame, too."""
    generator = Generator(backend)
    task = task_for(image=picture(), seed=2, guidance_scale=3.0, **SIZES)
    expected = latent_and_video(generator, task)[0]
    first = encode_first_frame(backend, task.resolved)
    assert torch.equal(expected[:, :, :1], first)
    told = Conditioning(generator.encode_text(["A cat walking on grass", "blurry, ugly"]), first_frame=first)
    noise = initial_noise((1, 4, 3, 4, 6), 2)
    found = generator.denoise_loop(noise, told, SIZES["num_inference_steps"], 3.0)
    assert relative_error(found, expected) < 1e-6
    velocity = generator.forward_with_cp(noise, told, 700)
    replaced = noise.clone()
    replaced[:, :, :1] = 7.0  # what lies there is not looked at
    assert torch.equal(generator.forward_with_cp(replaced, told, 700), velocity)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_cache_goes_with_a_first_frame_or_says_why(backend, strategy):
    task = task_for(image=picture(), flexcache=strategy, **{**SIZES, "num_inference_steps": 12})
    generator = Generator(backend)
    while task.status in (TaskStatus.PENDING, TaskStatus.ENCODING, TaskStatus.DENOISING):
        generator.generate_step(task)
    if task.status is TaskStatus.FAILED:
        said = ("were measured on", "was not calibrated", "no plan")
        assert strategy in ("plan", "magcache") and any(words in task.error_message for words in said)
        return
    exact = latent_and_video(generator, task_for(image=picture(), **{**SIZES, "num_inference_steps": 12}))[0]
    assert torch.equal(task.buffer.latent[:, :, :1], exact[:, :, :1])
    assert relative_error(task.buffer.latent, exact) < 0.5


def test_a_cache_that_decides_looks_at_the_composed_latent(backend):
    """EasyCache's signal stays as it is whatever lies where the first frame is put."""
    own = {"strategy": "easycache", "threshold": 0.3, "warmup": 2}
    task = task_for(image=picture(), flexcache=own, **{**SIZES, "num_inference_steps": 12})
    generator = Generator(backend)
    while task.status is not TaskStatus.DECODING:
        generator.generate_step(task)
        assert task.error is None, task.error_message
        if task.status is TaskStatus.DENOISING and task.current_step:
            anchor = task.buffer.cache["notes"].get("anchor")
            if anchor is not None:
                assert torch.equal(anchor[:, :, :1], task.buffer.conditioning.first_frame)
    assert "saved work in" in task.notes[-1] and " in 0 of" not in task.notes[-1]


@pytest.mark.usefixtures("gelu_apart")
def test_every_memory_level_and_way_of_guidance_makes_the_same(folder, backend, make_config):
    expected, video = latent_and_video(Generator(backend), task_for(image=picture(), **SIZES))
    for level in range(1, 5):
        other = DiffusionBackend(make_config(folder, infer__diffusion__low_mem_level=level))
        latent, frames = latent_and_video(Generator(other), task_for(image=picture(), **SIZES))
        assert torch.equal(latent, expected) and psnr(frames, video) >= 60
    apart = DiffusionBackend(make_config(folder, infer__diffusion__cfg_batch="sequential"))
    latent, _ = latent_and_video(Generator(apart), task_for(image=picture(), **SIZES))
    assert relative_error(latent, expected) < 1e-4
    compiled = DiffusionBackend(make_config(folder))
    torch._dynamo.reset()
    compiled.model_pool[0].compile_blocks(backend="eager")
    latent, _ = latent_and_video(Generator(compiled), task_for(image=picture(), **SIZES))
    torch._dynamo.reset()
    assert torch.equal(latent, expected)


LAYOUTS = {
    2: ({"ulysses": 2}, {"ring": 2}, {"cfg": 2}),
    4: ({"ulysses": 2, "ring": 2}, {"cfg": 2, "ulysses": 2}),
}


def on_ranks(rank: int, world: int, store: dist.Store, folder: str, out: str) -> None:
    """Rank 0 alone has the picture. A frame has 6 of 18 tokens: of two shares the first holds the border, of
    four the second, whose first token alone is the known frame's.
    """
    for number, layout in enumerate(LAYOUTS[world]):
        place = dist.PrefixStore(str(number), store)
        workers = WorkerGroup(ParallelPlan(**layout), rank, place, device=torch.device("cpu"))
        with Engine(config_for(Path(folder), Path(out)), workers=workers) as engine:
            if engine.is_driver:
                path = f"{out}/{world}.{number}.npy"
                engine.submit(DiffusionUserParams("a cat", seed=1, image=picture(), save_path=path, **SIZES))
                engine.run_until_idle()


@pytest.mark.parametrize("world", LAYOUTS)
def test_ranks_make_the_video_of_one(folder, backend, tmp_path, world):
    alone = task_for(prompt="a cat", seed=1, image=picture(), save_path=str(tmp_path / "alone.npy"), **SIZES)
    for _ in run_to_end(Generator(backend), alone):
        pass
    expected = read_frames(tmp_path / "alone.npy").astype(int)
    run_ranks(world, on_ranks, str(folder), str(tmp_path), errors=tmp_path)
    for number in range(len(LAYOUTS[world])):
        # the layouts round apart by a bit of float32, and a frame by one of its 256 steps at the most
        assert np.abs(read_frames(tmp_path / f"{world}.{number}.npy") - expected).max() <= 1


def test_a_video_is_made_anew_beside_diffusers(folder, backend):
    from diffusers import WanPipeline, WanVideoToVideoPipeline

    text = WanPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    kept = ("tokenizer", "text_encoder", "transformer", "vae", "scheduler")
    pipeline = WanVideoToVideoPipeline(**{name: text.components[name] for name in kept})
    pipeline.set_progress_bar_config(disable=True)
    pipeline.vae_scale_factor_spatial = 8  # it counts the VAE's stages and forgets the patches
    request = {
        "num_inference_steps": 5,
        "strength": 0.6,
        "height": 32,
        "width": 48,
        "negative_prompt": "ugly",
    }
    clip = film()
    task = task_for(video=clip, seed=5, num_frames=9, **request)
    latent, _ = latent_and_video(Generator(backend), task)
    theirs, _ = diffusers_run(pipeline, task.params.prompt, 5, video=list(clip / 255.0), **request)
    assert relative_error(latent, theirs) < 1e-4


def test_both_layouts_hold_it(folder, tmp_path):
    official = convert(folder, tmp_path / "official", "official")
    back = convert(tmp_path / "official", tmp_path / "back", "diffusers")
    for each in (official, back):
        assert each.kind.token_times and all(part.ok for part in verify(each.path))
    config = json.loads((tmp_path / "official" / "config.json").read_text())
    assert config["model_type"] == "ti2v" and (tmp_path / "official" / "Wan2.2_VAE.pth").exists()
    index = json.loads((tmp_path / "back" / "model_index.json").read_text())
    assert index["_class_name"] == "WanPipeline" and index["expand_timesteps"] is True
    index["_class_name"] = "WanImageToVideoPipeline"  # with expand_timesteps the same kind
    (tmp_path / "back" / "model_index.json").write_text(json.dumps(index))
    assert resolve_model(str(tmp_path / "back")).spec.kind.image_is_optional
    (tmp_path / "official" / "chitu.json").unlink()
    spec = resolve_model(str(tmp_path / "official")).spec
    assert spec.geometry.stride == (4, 16, 16) and spec.defaults.shift == 5.0  # as its authors have it


def test_the_command_line_takes_a_picture_or_none(folder, tmp_path, chitu):
    picture().save(tmp_path / "first.png")
    words = ("generate", "a cat", "--model", folder, "--steps", 2, "--frames", 5, "--seed", 1)
    for more in ((), ("--image", "first.png")):
        code, _, err = chitu(*words, *more, "-o", f"{len(more)}.npy")
        assert code == 0, err
    assert not np.array_equal(*(read_frames(tmp_path / f"{n}.npy")[0, :16, :32] for n in (0, 2)))
    assert chitu("reproduce", "2.npy", "--check", "--model", folder)[0] == 0
    code, _, err = chitu(*words, "--image", "first.png", "--last-image", "first.png")
    assert code == 2 and "--last-image" in err and "first frame alone" in err


@torch.no_grad()
@pytest.mark.parametrize(("width", "height"), [(71, 33), (33, 90), (48, 32), (400, 1)])
@pytest.mark.parametrize("floats", [False, True])
def test_official_preprocessing_cuts_where_others_stretch(backend, width, height, floats):
    """Written down from the authors' code (wan/textimage2video.py), with diffusers' VAE."""
    image = picture().resize((width, height))
    given = np.asarray(image) / np.float32(255) if floats else image
    task = task_for(image=given, image_preprocessing="official", **SIZES)
    Generator(backend).generate_step(task)
    assert task.error is None, task.error_message
    scale = max(48 / width, 32 / height)
    large = image.resize((round(width * scale), round(height * scale)), Image.Resampling.LANCZOS)
    left = (large.width - 48) // 2
    top = (large.height - 32) // 2
    frame = torch.from_numpy(np.array(large.crop((left, top, left + 48, top + 32)))) / 255 * 2 - 1
    vae = AutoencoderKLWan.from_config(
        {"_class_name": "AutoencoderKLWan", **vars(backend.vae.network.config)}
    )
    vae.load_state_dict(backend.vae.network.state_dict())
    latent = vae.encode(frame.permute(2, 0, 1)[None, :, None]).latent_dist.mode()
    mean, std = (
        torch.tensor(each).view(1, -1, 1, 1, 1) for each in (vae.config.latents_mean, vae.config.latents_std)
    )
    error = relative_error(task.buffer.conditioning.first_frame, (latent - mean) / std)
    print(f"{width}x{height}: {error:.1e}")
    assert error < (5e-3 if floats else 1e-5)  # floats are not rounded to 8 bits
    cut = f"image of {width}x{height} is cut to the shape of 48x32"
    assert any(cut in note for note in task.notes) == ((width, height) != (48, 32))
