"""Our UniPC beside diffusers' scheduler: equal bits; other settings go to diffusers."""

from __future__ import annotations

import pytest
import torch
from diffusers import UniPCMultistepScheduler

from chitu_diffusion.sampling import unipc
from chitu_diffusion.sampling.library import LibrarySolver
from chitu_diffusion.sampling.registry import SOLVERS


@pytest.mark.parametrize("steps", [1, 2, 3, 8, 31])
@pytest.mark.parametrize(
    ("shift", "dtype"), [(1.0, torch.float32), (3.0, torch.float64), (8.0, torch.float32)]
)
def test_every_step_is_diffusers_own(steps: int, shift: float, dtype: torch.dtype) -> None:
    theirs = UniPCMultistepScheduler(flow_shift=shift, **unipc.USUAL)
    theirs.set_timesteps(steps)
    ours = unipc.UniPC(steps, shift, 1000)
    assert torch.equal(ours.sigmas, theirs.sigmas) and torch.equal(ours.timesteps, theirs.timesteps)
    latent = torch.randn(1, 4, 3, 5, 6, dtype=dtype)
    expected = latent
    for timestep in theirs.timesteps:
        velocity = torch.randn_like(latent)
        expected = theirs.step(velocity, timestep, expected, return_dict=False)[0]
        (latent,) = ours.step(velocity, timestep, latent)
        assert torch.equal(latent, expected)


def test_the_usual_settings_are_the_schedulers_defaults_and_flow() -> None:
    names = {name for name in UniPCMultistepScheduler().config if not name.startswith("_")}
    assert names == {*unipc.USUAL, "num_train_timesteps", "flow_shift"}


@pytest.mark.parametrize(
    "other",
    [{"solver_order": 3}, {"solver_type": "bh1"}, {"use_karras_sigmas": True}, {"disable_corrector": [0]}],
)
def test_other_settings_are_diffusers(other: dict[str, object]) -> None:
    config = {"_class_name": "UniPCMultistepScheduler", **unipc.USUAL, "flow_shift": 3.0}
    kind = SOLVERS["unipc"].library
    assert kind is not None
    usual = LibrarySolver(kind, config)
    assert isinstance(usual._scheduler(5, 3.0), unipc.UniPC)
    assert isinstance(LibrarySolver(kind, config | other)._scheduler(5, 3.0), UniPCMultistepScheduler)
