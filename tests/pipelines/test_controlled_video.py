"""Controlled video beside diffusers' own `WanVACEPipeline`, and everything that a request of it may be."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from running import CAT, config_for, latent_and_video, psnr, relative_error, task_for
from test_image_to_video import picture
from test_pipeline_parity import diffusers_run
from test_video_to_video import film, pictures

from chitu_diffusion.backend import DiffusionBackend
from chitu_diffusion.generator import Generator

SIZES = {"height": 32, "width": 48, "num_frames": 9, "num_inference_steps": 2, "negative_prompt": "blurry"}
TALL = {**SIZES, "height": 48, "width": 32, "num_frames": 5}


@pytest.fixture(scope="module")
def backend(control_folder, tmp_path_factory):
    return DiffusionBackend(config_for(control_folder, tmp_path_factory.mktemp("outputs")))


@pytest.fixture(scope="module")
def pipeline(control_folder):
    from diffusers import WanVACEPipeline

    pipeline = WanVACEPipeline.from_pretrained(control_folder, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def masks(frames: int, height: int, width: int) -> list[Image.Image]:
    """A soft disc that moves: some of it lies between black and white."""
    rows, columns = np.mgrid[:height, :width]
    found = []
    for frame in range(frames):
        far = np.hypot(rows - height / 2, columns - (frame + 2) * width / 12)
        found.append(
            Image.fromarray((255 * np.clip(height / 3 - far, 0, 4) / 4).astype(np.uint8)).convert("RGB")
        )
    return found


def given(name: str, frames: int, height: int, width: int) -> dict[str, object]:
    """Inputs of a request, as both take them; both stretch videos of twice the size by Lanczos."""
    video = pictures(film(frames, 2 * height, 2 * width))
    return {
        "text": {},
        "video": {"video": video},
        "mask": {"video": video, "mask": masks(frames, 2 * height, 2 * width)},
        "references": {"reference_images": [picture(50, 70), picture(70, 41, seed=2)]},
        "all": {
            "video": video,
            "mask": masks(frames, 2 * height, 2 * width),
            "reference_images": [picture()],
            "conditioning_scale": [0.5, 1.5],
        },
    }[name]


@pytest.mark.parametrize(
    ("name", "sizes", "guidance", "seed"),
    [
        ("text", SIZES, 5.0, 11),
        ("video", SIZES, 5.0, 12),
        ("mask", TALL, 1.0, 11),
        ("mask", SIZES, 5.0, 11),
        ("references", TALL, 5.0, 12),
        ("all", SIZES, 5.0, 12),
        ("all", TALL, 1.0, 11),
    ],
)
def test_parity_with_diffusers(backend, pipeline, name, sizes, guidance, seed):
    more = given(name, sizes["num_frames"], sizes["height"], sizes["width"])
    request = {**sizes, **more, "guidance_scale": guidance}
    latent, video = latent_and_video(Generator(backend), task_for(seed=seed, **request))
    theirs, frames = diffusers_run(pipeline, CAT, seed, **request)
    print(f"latent {relative_error(latent, theirs):.1e}, frames {psnr(video, frames):.0f} dB")
    assert latent.shape == theirs.shape and video.shape == frames.shape
    assert relative_error(latent, theirs) < 1e-4  # float32 sums in another order
    assert psnr(video, frames) >= 50
    if more:
        plain = latent_and_video(Generator(backend), task_for(seed=seed, **sizes, guidance_scale=guidance))[0]
        assert relative_error(latent[:, :, -plain.shape[2] :], plain) > 3e-3  # far above the error
