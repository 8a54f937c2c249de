"""Text and image to video by one checkpoint whose tokens have times of their own, beside diffusers' own two
pipelines with `expand_timesteps`.
"""

from __future__ import annotations

import pytest
import torch
from running import config_for, latent_and_video, psnr, relative_error, task_for
from test_image_to_video import picture
from test_pipeline_parity import diffusers_run
from tiny_model import write_tiny_model

from chitu_diffusion.backend import DiffusionBackend
from chitu_diffusion.errors import UsageError
from chitu_diffusion.generator import Generator
from chitu_diffusion.pipelines.request import resolve_task

SIZES = {"height": 32, "width": 48, "num_frames": 9, "num_inference_steps": 5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("models") / "both", token_times=True, shift=5.0, seed=4)


@pytest.fixture(scope="module")
def backend(folder, tmp_path_factory):
    return DiffusionBackend(config_for(folder, tmp_path_factory.mktemp("outputs")))


@pytest.fixture(scope="module", params=[False, True], ids=["text", "image"])
def beside_diffusers(request, folder):
    """diffusers' pipeline, and the image that it takes."""
    from diffusers import WanImageToVideoPipeline, WanPipeline

    kind = WanImageToVideoPipeline if request.param else WanPipeline
    pipeline = kind.from_pretrained(folder, torch_dtype=torch.float32, expand_timesteps=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, {"image": picture()} if request.param else {}


@pytest.mark.parametrize(
    ("changed", "guidance", "seed"), [({}, 5.0, 11), ({}, 1.0, 3), ({"height": 48, "num_frames": 5}, 5.0, 3)]
)
def test_parity_with_diffusers(backend, beside_diffusers, changed, guidance, seed):
    pipeline, given = beside_diffusers
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


def test_what_is_refused_in_words(backend):
    with pytest.raises(UsageError, match="told of the first frame alone"):
        resolve_task(task_for(image=picture(), last_image=picture()), backend.spec, "")
