"""The object that hand-written loops step with: the page's loop as it stands, diffusers' call, refusals."""

from __future__ import annotations

import ast

import numpy as np
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
    for steps in (0, -1, 1001, 10**9, 2.5, "4", True):
        with pytest.raises(ValueError, match="use at least 1"):
            backend.scheduler(steps)


STEP = torch.zeros(SHAPE)
WRONG = {
    "noise_pred is a ndarray": (STEP.numpy(), None, STEP),
    "latent is a list": (STEP, None, STEP.tolist()),
    "noise_pred is a NoneType": (None, None, STEP),
    "noise_pred is torch.int64": (STEP.long(), None, STEP),
    "latent is torch.complex64": (STEP, None, STEP.to(torch.complex64)),
    "latent is torch.float32, torch.sparse_coo": (STEP, None, STEP.to_sparse()),
    "noise_pred is .* on meta": (STEP.to("meta"), None, STEP),
    "timestep = 999": (STEP, "999", STEP),
    r"timestep = \[\]": (STEP, [], STEP),
    "timestep = torch.float32 .* on meta": (STEP, torch.empty((), device="meta"), STEP),
}


@pytest.mark.parametrize("said", WRONG)
def test_what_is_no_step_is_refused_in_words(backend, said):
    scheduler = backend.scheduler(3)
    velocity, timestep, latent = WRONG[said]
    timestep = scheduler.timestep if timestep is None else timestep
    with pytest.raises(ValueError, match=said):
        scheduler.step(velocity, timestep, latent)
    assert scheduler.step(STEP, scheduler.timestep, STEP).shape == SHAPE
    with pytest.raises(ValueError, match=r"latent is \[1, 4, 2, 4, 2\], at the step before it was \[1, 4"):
        scheduler.step(STEP[..., :2], scheduler.timestep, STEP[..., :2])
    for seed in ("x", -1, 2**63, 1.5):
        with pytest.raises(ValueError, match="seed = .*whole number"):
            backend.scheduler(3, seed)


def test_numbers_of_numpy_are_numbers(backend):
    scheduler = backend.scheduler(np.int64(3), np.int32(SEED))
    first = scheduler.step(STEP, np.float32(scheduler.timestep), STEP)
    own = backend.scheduler(3, SEED)
    assert torch.equal(first, own.step(STEP, own.timestep, STEP))
