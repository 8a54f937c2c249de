"""Wan2.1's image to video and first-and-last-frame, whose networks attend to an image encoder's rows, beside
diffusers' own `WanImageToVideoPipeline`.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from running import CAT, config_for, latent_and_video, psnr, relative_error, task_for
from test_image_to_video import picture
from test_pipeline_parity import diffusers_run
from tiny_model import write_tiny_model

from chitu_diffusion.backend import DiffusionBackend
from chitu_diffusion.generator import Generator

SIZES = {"height": 32, "width": 48, "num_frames": 9, "num_inference_steps": 3, "negative_prompt": "blurry"}
LONG = {**SIZES, "height": 48, "width": 32, "num_frames": 5}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """By the number of pictures that the networks tell apart."""
    home = tmp_path_factory.mktemp("models")
    return {clip: write_tiny_model(home / f"{clip}", image=True, clip=clip, seed=4 + clip) for clip in (1, 2)}


@pytest.fixture(scope="module")
def backends(folders, tmp_path_factory):
    outputs = tmp_path_factory.mktemp("outputs")
    return {clip: DiffusionBackend(config_for(folder, outputs)) for clip, folder in folders.items()}


@pytest.fixture(scope="module")
def pipelines(folders):
    from diffusers import WanImageToVideoPipeline

    made = {clip: WanImageToVideoPipeline.from_pretrained(folder) for clip, folder in folders.items()}
    for pipeline in made.values():
        pipeline.set_progress_bar_config(disable=True)
    return made


@pytest.mark.parametrize("clip", [1, 2])
@pytest.mark.parametrize(
    ("sizes", "guidance", "seed"), [(SIZES, 5.0, 11), (LONG, 5.0, 12), (SIZES, 1.0, 12), (LONG, 1.0, 11)]
)
def test_parity_with_diffusers(backends, pipelines, clip, sizes, guidance, seed):
    images = {"image": picture(), "last_image": picture(60, 44, seed=1) if clip == 2 else None}
    request = {**sizes, "guidance_scale": guidance}
    task = task_for(seed=seed, **images, **request)
    latent, video = latent_and_video(Generator(backends[clip]), task)
    theirs, frames = diffusers_run(pipelines[clip], task.params.prompt, seed, **images, **request)
    print(f"latent {relative_error(latent, theirs):.1e}, frames {psnr(video, frames):.0f} dB")
    assert relative_error(latent, theirs) < 1e-4
    assert psnr(video, frames) >= 50


@pytest.mark.parametrize(("other", "bound"), [(0, 1e-4), (3, None)])
def test_a_last_image_without_places_is_seen_by_the_vae_alone(backends, pipelines, monkeypatch, other, bound):
    """diffusers fails there, having rows of two pictures for one latent; with the first's alone it is ours,
    with another picture's it is not.
    """
    images = {"image": picture(), "last_image": picture(seed=1)}
    latent, _ = latent_and_video(Generator(backends[1]), task_for(seed=2, **images, **SIZES))
    rows = pipelines[1].encode_image(picture(seed=other), torch.device("cpu"))
    monkeypatch.setattr(pipelines[1], "encode_image", lambda images, device: rows)
    theirs, _ = diffusers_run(pipelines[1], CAT, 2, **images, **SIZES)
    error = relative_error(latent, theirs)
    assert error < bound if bound else error > 1e-3


@pytest.mark.parametrize("size", [(28, 28), (50, 70), (311, 97), (28, 1000), (1, 1), (3, 2), (720, 1280)])
def test_the_encoder_is_shown_what_transformers_shows_it(backends, pipelines, size):
    shown = picture(*size)
    expected = pipelines[1].image_processor(images=shown, return_tensors="pt")["pixel_values"]
    found = backends[1].image_encoder.preprocessing.cropped(np.asarray(shown))
    assert (found - expected).abs().max() < 1e-6
