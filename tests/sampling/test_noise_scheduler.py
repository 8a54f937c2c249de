"""The object that hand-written loops step with: the page's loop as it stands, diffusers' call, refusals."""

from __future__ import annotations

import ast

import pytest
import torch

from chitu_diffusion.backend import DiffusionBackend
from chitu_diffusion.pipelines.denoising import denoise
from chitu_diffusion.sampling.noise import initial_noise
from chitu_diffusion.sampling.registry import SOLVERS

PAGE = """
for step in range(num_steps):
    # Predict noise
    noise_pred = model(latent, embeddings, timestep)

    # Apply CFG
    if guidance_scale > 1.0:
        noise_cond, noise_uncond = noise_pred.chunk(2)
        noise_pred = noise_uncond + guidance_scale * (noise_cond - noise_uncond)

    # Update latent
    latent = scheduler.step(noise_pred, timestep, latent)
"""
SHAPE = (1, 4, 2, 4, 4)
SEED = 5


def branches(latent: torch.Tensor, embeddings: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    """A linear stand-in for the network: both branches' velocities, stacked."""
    return torch.cat([latent * weight + timestep / 1000 * weight**2 for weight in embeddings])


@pytest.fixture(scope="module", params=SOLVERS)
def backend(request, tiny_folder, tmp_path_factory) -> DiffusionBackend:
    from running import config_for

    config = config_for(tiny_folder, tmp_path_factory.mktemp("out"))
    config.infer.sampler = request.param
    return DiffusionBackend(config)


def looped(backend: DiffusionBackend, steps: int, embeddings: torch.Tensor, scale: float) -> torch.Tensor:
    """The latent that the engine's own loop ends in."""

    def predict(latent, timestep, expert, active):
        return branches(latent, embeddings, timestep)

    latent = initial_noise(SHAPE, SEED)
    state = backend.sampler.begin(steps, seed=SEED)
    for taken in denoise(backend, latent, state, (scale, scale), predict):
        latent = taken.latent
    return latent


@pytest.mark.parametrize("scale", [1.0, 7.0])
def test_the_page_s_loop_runs_as_it_stands(backend, scale):
    embeddings = torch.rand(2 if scale > 1 else 1) * 0.5
    scheduler = backend.scheduler(6, seed=SEED)
    names = {
        "num_steps": 6,
        "model": branches,
        "embeddings": embeddings,
        "guidance_scale": scale,
        "scheduler": scheduler,
        "latent": initial_noise(SHAPE, SEED),
        "timestep": scheduler.timestep,
    }
    exec(compile(ast.parse(PAGE), "<the API page>", "exec"), names)
    assert torch.equal(names["latent"], looped(backend, 6, embeddings, scale))
    assert scheduler.timestep is names["timestep"] and float(scheduler.timestep) == 0


def test_diffusers_way_of_calling_gives_the_same(backend):
    embeddings = torch.rand(1)
    scheduler = backend.scheduler(seed=SEED)
    assert len(scheduler.timesteps) == backend.spec.defaults.steps
    for _ in range(2):  # begun anew, with the same noise
        scheduler.set_timesteps(5, device="cpu")
        assert len(scheduler.timesteps) == 5 and len(scheduler.sigmas) == 6 and scheduler.sigmas[-1] == 0
        latent = initial_noise(SHAPE, SEED)
        for timestep in scheduler.timesteps:
            assert float(timestep) == float(scheduler.timestep) and scheduler.timestep.shape == ()
            answer = scheduler.step(
                branches(latent, embeddings, timestep), timestep, latent, return_dict=False
            )
            assert isinstance(answer, tuple) and len(answer) == 1
            latent = answer[0]
        assert torch.equal(latent, looped(backend, 5, embeddings, 1.0))


def test_a_step_out_of_order_is_refused_and_takes_nothing(backend):
    scheduler = backend.scheduler(3, seed=SEED)
    latent = initial_noise(SHAPE, SEED)
    times = scheduler.timesteps
    for wrong in (times[1], float(times[0]) + 1, times[:2], torch.nan):
        with pytest.raises(ValueError, match=r"the coming step's is .*; use scheduler\.timestep"):
            scheduler.step(latent, wrong, latent)
    with pytest.raises(ValueError, match=r"noise_pred is \[2, 4, 2, 4, 4\] and latent \[1, 4, 2, 4, 4\]"):
        scheduler.step(torch.cat([latent, latent]), times[0], latent)
    for timestep in times:
        latent = scheduler.step(latent, timestep.reshape(1), latent)
    with pytest.raises(ValueError, match="all 3 steps are taken; call set_timesteps"):
        scheduler.step(latent, times[-1], latent)
    for steps in (0, -1):
        with pytest.raises(ValueError, match="use at least 1"):
            backend.scheduler(steps)
