"""The data that a step's velocity points at: previews show it, whatever the solver."""

from __future__ import annotations

import pytest
import torch

from chitu_diffusion.sampling.noise import initial_noise
from chitu_diffusion.sampling.noise_levels import NoiseLevels
from chitu_diffusion.sampling.recipes import RECIPES
from chitu_diffusion.sampling.registry import SOLVERS
from chitu_diffusion.sampling.solvers import Sampler

SHAPE = (1, 4, 2, 4, 4)
WAN = {"_class_name": "UniPCMultistepScheduler", "flow_shift": 3.0}
LIST = NoiseLevels.listed(None, (1000, 750, 500, 250), 5.0)


def samplers() -> dict[str, tuple[Sampler, int]]:
    """By name, with how many steps."""
    found = {name: (Sampler(name, WAN), 6) for name in SOLVERS}
    takes_list = [name for name, kind in SOLVERS.items() if kind.takes_list]
    found |= {f"{name} on a list": (Sampler(name, WAN, LIST), 4) for name in takes_list}
    for name, row in RECIPES.items():
        found[name] = (Sampler(row.sampler, WAN, row.levels, recipe=name), len(row.levels.sigmas))
    return found


@pytest.mark.parametrize("name", samplers())
def test_it_is_the_data_at_every_step_and_the_last_latent_at_the_end(name: str) -> None:
    sampler, steps = samplers()[name]
    data = torch.randn(SHAPE, generator=torch.Generator().manual_seed(2))
    state = sampler.begin(steps, seed=7)
    latent = sampler.first_latent(state, SHAPE)
    while not sampler.is_done(state):
        velocity = (latent.double() - data) / sampler.sigma(state)
        clean = sampler.clean(state, velocity, latent)
        # float32 roundings, of a velocity that grows as the noise level falls; a bf16 latent is the given one
        torch.testing.assert_close(clean, data, rtol=0, atol=1e-5)
        latent, state = sampler.step(state, velocity, latent)
    tolerance = 1e-5 if latent.dtype == torch.float32 else 2.0**-7
    torch.testing.assert_close(latent.float(), clean, rtol=tolerance, atol=1e-5)


@pytest.mark.parametrize("name", samplers())
def test_the_last_one_is_the_last_latent_of_a_network_that_knows_no_data(name: str) -> None:
    sampler, steps = samplers()[name]
    state = sampler.begin(steps, seed=7)
    latent = initial_noise(SHAPE, 7)
    while not sampler.is_done(state):
        velocity = torch.sin(latent.float() * 1.7) + latent.float() * float(sampler.timestep(state)) / 1000
        clean = sampler.clean(state, velocity, latent)
        latent, state = sampler.step(state, velocity, latent)
    tolerance = 1e-5 if latent.dtype == torch.float32 else 2.0**-7
    torch.testing.assert_close(latent.float(), clean, rtol=tolerance, atol=1e-5)
