"""Explicit lists of noise levels and the updates that run on them, beside diffusers and float64."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from chitu_diffusion.errors import UsageError
from chitu_diffusion.sampling.noise import initial_noise
from chitu_diffusion.sampling.noise_levels import NoiseLevels
from chitu_diffusion.sampling.solvers import Sampler

SHAPE = (1, 4, 2, 4, 4)
SHIFTED = NoiseLevels.listed(None, (1000, 750, 500, 250), 5.0)
DMD = NoiseLevels.listed((1.0, 0.756757, 0.521739), (1000, 757, 522), 3.0)
WAN = {"_class_name": "UniPCMultistepScheduler", "flow_shift": 3.0}
SEED = 11


def velocity_at(latent: torch.Tensor, timestep: float) -> torch.Tensor:
    """A stand-in for the network: smooth, nonlinear, dependent on time."""
    return torch.sin(latent * 1.7) + latent * timestep / 1000


def run(sampler: Sampler, steps: int, **more) -> torch.Tensor:
    state = sampler.begin(steps, seed=SEED, **more)
    latent = initial_noise(SHAPE, SEED)
    while not sampler.is_done(state):
        latent, state = sampler.step(state, velocity_at(latent, float(sampler.timestep(state))), latent)
    return latent


def noise_of(step: int, stage: int = 0) -> torch.Tensor:
    """The fresh noise after a step, as `noise` says that it is drawn."""
    stream = (step + 1) * 2**20 + stage
    generator = torch.Generator("cpu").manual_seed((SEED + stream * 1_000_003) % 2**63)
    return torch.randn(SHAPE, generator=generator)


def by_hand(levels: NoiseLevels, *, fresh: bool, first: int = 0) -> torch.Tensor:
    latent = initial_noise(SHAPE, SEED).double()
    sigmas = [*levels.sigmas, 0.0]
    for step in range(first, len(levels.sigmas)):
        velocity = velocity_at(latent, levels.timesteps[step])
        if fresh:
            data = latent - sigmas[step] * velocity
            latent = (1 - sigmas[step + 1]) * data + sigmas[step + 1] * noise_of(step).double()
        else:
            latent = latent + (sigmas[step + 1] - sigmas[step]) * velocity
    return latent


def test_timesteps_are_places_on_the_shifted_grid():
    """Shift 5 and the list of LightX2V's 4-step models, as exact fractions and as diffusers has it."""
    exact = [5 * u / (1 + 4 * u) for u in (Fraction(1), Fraction(3, 4), Fraction(1, 2), Fraction(1, 4))]
    assert exact == [1, Fraction(15, 16), Fraction(5, 6), Fraction(5, 8)]
    assert SHIFTED.sigmas == pytest.approx([float(each) for each in exact], abs=1e-15)
    assert SHIFTED.timesteps == pytest.approx([1000 * float(each) for each in exact], abs=1e-12)
    theirs = FlowMatchEulerDiscreteScheduler(shift=5.0)
    theirs.set_timesteps(sigmas=[1, 0.75, 0.5, 0.25])
    state = Sampler("euler", WAN, SHIFTED).begin(4)
    assert torch.equal(state["sigmas"], theirs.sigmas)
    assert torch.equal(state["timesteps"], theirs.timesteps)
    # the first-and-last-frame model's shift, to the digits that are published
    other = NoiseLevels.listed(None, (1000, 750, 500, 250), 16.0)
    assert other.sigmas == pytest.approx([1, 0.9796, 0.9412, 0.8421], abs=5e-5)


def test_sigmas_stand_as_they_are_and_timesteps_may_differ():
    state = Sampler("renoise", WAN, DMD).begin(3)
    assert state["timesteps"].tolist() == [1000, 757, 522]
    assert state["sigmas"].tolist() == pytest.approx([1, 0.756757, 0.521739, 0], abs=1e-7)
    assert NoiseLevels.listed((1.0, 0.5), None, 9.0).timesteps == (1000, 500)
    assert NoiseLevels.listed(None, None, 9.0) is None


def test_euler_on_a_list_is_diffusers_own_step_and_the_formula():
    theirs = FlowMatchEulerDiscreteScheduler(shift=5.0)
    theirs.set_timesteps(sigmas=[1, 0.75, 0.5, 0.25])
    latent = initial_noise(SHAPE, SEED)
    for timestep in theirs.timesteps:
        latent = theirs.step(velocity_at(latent, float(timestep)), timestep, latent, return_dict=False)[0]
    ours = run(Sampler("euler", WAN, SHIFTED), 4)
    assert torch.equal(ours, latent)
    # float32 roundings of 4 steps, which the stand-in's slope carries on
    torch.testing.assert_close(ours.double(), by_hand(SHIFTED, fresh=False), rtol=0, atol=5e-6)


@pytest.mark.parametrize("levels", [SHIFTED, DMD], ids=["shifted", "dmd"])
def test_renoise_is_diffusers_stochastic_step_with_our_noise_and_the_formula(levels, monkeypatch):
    theirs = FlowMatchEulerDiscreteScheduler(shift=1.0, stochastic_sampling=True)
    theirs.set_timesteps(sigmas=list(levels.sigmas))
    drawn = iter(noise_of(step) for step in range(9))
    monkeypatch.setattr(
        "diffusers.schedulers.scheduling_flow_match_euler_discrete.randn_tensor", lambda *a, **b: next(drawn)
    )
    latent = initial_noise(SHAPE, SEED)
    for timestep, told in zip(theirs.timesteps, levels.timesteps, strict=True):
        latent = theirs.step(velocity_at(latent, told), timestep, latent, return_dict=False)[0]
    steps = len(levels.sigmas)
    ours = run(Sampler("renoise", WAN, levels), steps)
    torch.testing.assert_close(ours, latent, rtol=0, atol=5e-6)
    torch.testing.assert_close(ours.double(), by_hand(levels, fresh=True), rtol=0, atol=5e-6)
    assert not torch.equal(run(Sampler("euler", WAN, levels), steps), ours)


def test_renoise_without_a_list_takes_even_steps_of_the_shift():
    sampler = Sampler("renoise", {"flow_shift": 5.0})
    assert torch.equal(sampler.begin(4)["sigmas"], Sampler("euler", WAN, SHIFTED).begin(4)["sigmas"])
    assert len(sampler.begin(7)["timesteps"]) == 7


def test_fresh_noise_follows_from_seed_step_and_stage_alone():
    sampler = Sampler("renoise", WAN, SHIFTED)
    zeros = torch.zeros(SHAPE)
    seen = {}
    for seed in (SEED, SEED + 1):
        for stage in (0, 1):
            for index in (2, 0, 1):  # in any order
                state = {**sampler.begin(4, seed=seed, stream=stage), "index": index}
                moved, _ = sampler.step(state, zeros, zeros)
                seen[seed, stage, index] = moved / state["sigmas"][index + 1]
    for index in range(3):
        torch.testing.assert_close(seen[SEED, 0, index], noise_of(index))
        torch.testing.assert_close(seen[SEED, 1, index], noise_of(index, 1))
    every = torch.stack([*(seen[key] for key in sorted(seen)), initial_noise(SHAPE, SEED)]).flatten(1)
    # independent draws of 128 numbers: correlations of 13 pairs' size 0.09, at most 0.4 by far
    assert (torch.corrcoef(every) - torch.eye(len(every))).abs().max() < 0.4
    last = {**sampler.begin(4, seed=SEED), "index": 3}
    assert torch.equal(sampler.step(last, zeros, zeros)[0], zeros), "the last step ends at the data"


def test_the_end_of_a_list_is_a_strength_of_it():
    for name, fresh in (("euler", False), ("renoise", True)):
        sampler = Sampler(name, WAN, SHIFTED)
        assert sampler.sigma(sampler.begin(2, 0.5)) == pytest.approx(5 / 6)
        ours = run(sampler, 2, strength=0.5)
        torch.testing.assert_close(ours.double(), by_hand(SHIFTED, fresh=fresh, first=2), rtol=0, atol=5e-6)
    with pytest.raises(UsageError, match=r"list of 4 noise levels; use 1 steps at strength 0\.25"):
        sampler.begin(4, 0.3)


def test_another_number_of_steps_is_refused_in_words():
    with pytest.raises(UsageError, match="num_inference_steps = 50: .* list of 4 noise levels; use 4, or "):
        Sampler("euler", WAN, SHIFTED).begin(50)


def test_what_takes_no_list_says_what_does():
    with pytest.raises(UsageError, match="'unipc' takes no list of noise levels; use euler or renoise"):
        Sampler("unipc", WAN, SHIFTED)


def test_a_state_of_a_list_is_not_taken_for_one_of_a_schedule():
    with pytest.raises(UsageError, match="begun with sampler 'euler on a list', not 'euler'"):
        Sampler("euler", WAN).step(Sampler("euler", WAN, SHIFTED).begin(4), torch.ones(1), torch.ones(1))


def test_the_response_of_a_list_is_its_steps_and_of_fresh_noise_none():
    sampler = Sampler("euler", WAN, SHIFTED)
    expected = sampler.begin(4)["sigmas"].diff().tolist()
    assert sampler.response(sampler.begin(4)) == pytest.approx(expected, abs=1e-7)
    renoise = Sampler("renoise", WAN, SHIFTED)
    with pytest.raises(UsageError, match="fresh noise"):
        renoise.response(renoise.begin(4))


def test_a_share_of_a_list_is_counted_in_its_steps():
    for share, time in ((0.0, 1000), (0.25, 937.5), (0.3, 833.333), (0.75, 625), (1.0, 0)):
        assert SHIFTED.time_after(share) == pytest.approx(time, abs=1e-2)
