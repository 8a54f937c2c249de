"""The whole pipeline beside diffusers' own `WanPipeline` on the same folder, noise and steps: the heart of
the promise.
"""

import pytest
import torch
from conftest import WAN_TINY
from running import CAT, config_for, latent_and_video, psnr, relative_error, task_for
from torch import Tensor

from chitu_diffusion.backend import DiffusionBackend
from chitu_diffusion.engine import Engine
from chitu_diffusion.errors import UsageError
from chitu_diffusion.generator import Generator
from chitu_diffusion.pipelines.guidance import expert_at
from chitu_diffusion.pipelines.request import resolve_task
from chitu_diffusion.sampling.noise import initial_noise, upsample_latent
from chitu_diffusion.task import CascadeStage, TaskStatus


@pytest.fixture(scope="module")
def backend(tiny_folder, tmp_path_factory):
    return DiffusionBackend(config_for(tiny_folder, tmp_path_factory.mktemp("outputs")))


@pytest.fixture(scope="module")
def experts(two_experts_folder, tmp_path_factory):
    return DiffusionBackend(config_for(two_experts_folder, tmp_path_factory.mktemp("outputs")))


def diffusers_run(pipeline, prompt: str, seed: int, **sizes) -> tuple[Tensor, Tensor]:
    """Final latent and frames [1, T, C, H, W] of WanPipeline with its own defaults."""
    kept: dict[str, Tensor] = {}

    def keep(_pipeline, _step, _time, tensors):
        kept.update(tensors)
        return {}

    noise = torch.Generator("cpu").manual_seed(seed)
    frames = pipeline(
        prompt=prompt, generator=noise, output_type="pt", callback_on_step_end=keep, **sizes
    ).frames
    return kept["latents"], frames


@pytest.fixture(scope="module", params=["random-tiny", "wan-tiny"])
def beside_diffusers(request, tiny_folder, tmp_path_factory):
    """One folder opened by us and by diffusers."""
    from diffusers import WanPipeline

    folder = tiny_folder if request.param == "random-tiny" else WAN_TINY
    if not (folder / "model_index.json").exists():
        pytest.skip("wan-tiny is not here")
    pipeline = WanPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    ours = DiffusionBackend(config_for(folder, tmp_path_factory.mktemp("outputs")))
    return ours, pipeline


@pytest.mark.parametrize(
    ("height", "width", "frames", "steps", "guidance"),
    [
        (128, 128, 33, 3, 5.0),
        (32, 32, 5, 6, 5.0),
        (48, 32, 9, 3, 5.0),
        (32, 64, 1, 4, 1.0),
        (64, 48, 13, 2, 2.5),
        (32, 32, 17, 12, 0.0),
    ],
)
def test_pipeline_parity(beside_diffusers, height, width, frames, steps, guidance):
    backend, pipeline = beside_diffusers
    sizes = {
        "height": height,
        "width": width,
        "num_frames": frames,
        "num_inference_steps": steps,
        "guidance_scale": guidance,
    }
    prompt = "  A cat &amp; a  dog walking on grass "
    task = task_for(prompt=prompt, negative_prompt="blurry, ugly", seed=11, **sizes)
    latent, video = latent_and_video(Generator(backend), task)
    theirs, frames_there = diffusers_run(pipeline, prompt, 11, negative_prompt="blurry, ugly", **sizes)
    print(f"latent {relative_error(latent, theirs):.1e}, frames {psnr(video, frames_there):.0f} dB")
    assert relative_error(latent, theirs) < 1e-3
    assert video.shape == frames_there.shape
    assert psnr(video, frames_there) >= 50


def test_a_callback_that_changes_latents_is_diffusers(tiny_folder, tmp_path):
    """The same callback there and here, with a solver that remembers what came before."""
    from diffusers import WanPipeline

    pipeline = WanPipeline.from_pretrained(tiny_folder, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    sizes = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 6, "guidance_scale": 5.0}
    seen = {"ours": [], "theirs": []}

    def callback(who):
        def change(_, step, timestep, given):
            seen[who].append((step, float(timestep), given["latents"]))
            return {"latents": given["latents"] * 0.7} if step in (1, 4) else given

        return change

    noise = torch.Generator("cpu").manual_seed(8)
    hook = callback("theirs")
    pipeline(CAT, "", generator=noise, output_type="latent", callback_on_step_end=hook, **sizes)
    with Engine(config_for(tiny_folder, tmp_path)) as engine:
        engine.generate(CAT, negative_prompt="", seed=8, callback_on_step_end=callback("ours"), **sizes)
    for (step, timestep, ours), (step_there, timestep_there, theirs) in zip(*seen.values(), strict=True):
        assert step == step_there and timestep == pytest.approx(timestep_there)
        assert relative_error(ours, theirs) < 1e-4
    assert len(seen["ours"]) == 6


def test_expert_switch_is_diffusers(experts, two_experts_folder):
    """The switch is by timestep, guidance is high on the high-noise side, and both experts really run."""
    from diffusers import WanPipeline

    pipeline = WanPipeline.from_pretrained(two_experts_folder, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    sizes = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 20}
    task = task_for(negative_prompt="blurry", seed=5, guidance_scale=(4.0, 3.0), **sizes)
    generator = Generator(experts)
    used = []
    while task.status in (TaskStatus.PENDING, TaskStatus.ENCODING, TaskStatus.DENOISING):
        generator.generate_step(task)
        used.append(task.expert)
    theirs, _ = diffusers_run(
        pipeline, CAT, 5, negative_prompt="blurry", guidance_scale=4.0, guidance_scale_2=3.0, **sizes
    )
    assert relative_error(task.buffer.latent, theirs) < 1e-4
    # shift 12 of 20 steps: timesteps fall below 875 after the 13th
    times = experts.sampler.begin(20)["timesteps"]
    assert used[1:] == [0 if time >= 875 else 1 for time in times]
    assert used.count(0) == 13
    swapped = task_for(negative_prompt="blurry", seed=5, guidance_scale=(3.0, 4.0), **sizes)
    other, _ = latent_and_video(generator, swapped)
    assert relative_error(other, theirs) > 5e-3


def test_forty_steps_at_shift_twelve_switch_after_about_26(experts):
    times = experts.sampler.begin(40)["timesteps"]
    assert sum(expert_at(time, 0.875) == 0 for time in times) in (25, 26, 27)
    assert [expert_at(torch.tensor(time), 0.875) for time in (876, 875, 874)] == [0, 0, 1]
    assert expert_at(torch.tensor(0), None) == 0


def test_two_experts_default_guidance_and_single_scale(experts, backend):
    assert resolve_task(task_for(), experts.spec, "").guidance_scale == (4.0, 3.0)
    assert resolve_task(task_for(guidance_scale=6.0), experts.spec, "").guidance_scale == (6.0, 6.0)
    with pytest.raises(UsageError, match="one transformer"):
        resolve_task(task_for(guidance_scale=(4.0, 3.0)), backend.spec, "")


@pytest.mark.parametrize(("height", "width"), [(24, 40), (40, 24), (8, 8), (48, 40)])
def test_sizes_are_any_multiple_of_eight(backend, height, width):
    """What is computed is whole patches, what was asked for is cut out of it; so are a cascade's stages."""
    rows, columns = (-(-side // 16) * 16 for side in (height, width))
    sizes = {"num_frames": 5, "num_inference_steps": 2}
    latent, video = latent_and_video(Generator(backend), task_for(height=height, width=width, **sizes))
    whole, frames = latent_and_video(Generator(backend), task_for(height=rows, width=columns, **sizes))
    assert torch.equal(latent, whole) and torch.equal(video, frames[..., :height, :width])


def test_a_cascade_of_odd_sizes(backend):
    """The second stage goes on from what the first one shows, not from its border."""
    stages = (CascadeStage(24, 40, 2), CascadeStage(40, 72, 2, 0.5))
    task = task_for(cascade=stages, num_frames=5)
    generator = Generator(backend)
    while task.cascade_stage == 0:
        generator.generate_step(task)
    first = task.buffer.latent
    assert first.shape[-2:] == (4, 6)
    noise = initial_noise((1, *backend.spec.latent_shape(5, 40, 72)), task.seed, stream=1)
    larger = torch.nn.functional.pad(
        upsample_latent(first[..., :3, :5], 5, 9), (0, 1, 0, 1, 0, 0), "replicate"
    )
    state = backend.sampler.begin(2, 0.5)
    sigma = float(state["sigmas"][state["index"]])
    found, _ = generator.stages._position(task, stages[1])
    assert relative_error(found, (1 - sigma) * larger + sigma * noise) < 1e-6
    _, video = latent_and_video(generator, task)
    assert video.shape[-2:] == (40, 72)
