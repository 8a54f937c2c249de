"""The solvers: equal to diffusers' own run in one go, with their state cut out and put back at every step."""

import copy

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from chitu_diffusion.errors import CheckpointError, UsageError
from chitu_diffusion.sampling.library import shift_of
from chitu_diffusion.sampling.noise import initial_noise, upsample_latent
from chitu_diffusion.sampling.registry import SOLVERS
from chitu_diffusion.sampling.solvers import Sampler

WAN = {
    "_class_name": "UniPCMultistepScheduler",
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
    "flow_shift": 3.0,
    "num_train_timesteps": 1000,
}
SHAPE = (1, 4, 2, 4, 4)
LIBRARY = [name for name, kind in SOLVERS.items() if kind.library]
LINEAR = [name for name, kind in SOLVERS.items() if kind.linear]


def velocity_at(latent: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    """A stand-in for the network: smooth, nonlinear, dependent on time."""
    return torch.sin(latent * 1.7) + latent * float(timestep) / 1000


def run(sampler: Sampler, steps: int, strength: float = 1.0) -> torch.Tensor:
    state = sampler.begin(steps, strength)
    latent = initial_noise(SHAPE, 7)
    while not sampler.is_done(state):
        latent, state = sampler.step(state, velocity_at(latent, sampler.timestep(state)), latent)
    return latent


def diffusers_run(scheduler, steps: int) -> torch.Tensor:
    scheduler.set_timesteps(steps)
    scheduler.set_begin_index(0)
    latent = initial_noise(SHAPE, 7)
    for timestep in scheduler.timesteps:
        latent = scheduler.step(velocity_at(latent, timestep), timestep, latent, return_dict=False)[0]
    return latent


@pytest.mark.parametrize("steps", [1, 2, 5, 20])
def test_unipc_is_diffusers_bit_for_bit(steps):
    config = {key: value for key, value in WAN.items() if not key.startswith("_")}
    assert torch.equal(
        run(Sampler("unipc", WAN), steps), diffusers_run(UniPCMultistepScheduler(**config), steps)
    )


@pytest.mark.parametrize("steps", [1, 3, 16])
def test_own_config_of_the_other_classes_is_honoured_whole(steps):
    euler = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 5.0}
    assert torch.equal(
        run(Sampler("euler", euler), steps), diffusers_run(FlowMatchEulerDiscreteScheduler(shift=5.0), steps)
    )
    settings = {
        "flow_shift": 2.0,
        "use_flow_sigmas": True,
        "prediction_type": "flow_prediction",
        "solver_order": 3,
    }
    dpm = {"_class_name": "DPMSolverMultistepScheduler", **settings}
    assert torch.equal(
        run(Sampler("dpm++", dpm), steps), diffusers_run(DPMSolverMultistepScheduler(**settings), steps)
    )


@pytest.mark.parametrize("steps", [1, 2, 3, 20])
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("name", LIBRARY)
def test_steps_as_weighted_sums_are_the_solvers_own(name, order, steps, monkeypatch):
    """What runs on a GPU, without a wait in the step, beside what runs here."""
    classes = {"unipc": "UniPCMultistepScheduler", "dpm++": "DPMSolverMultistepScheduler"}
    sampler = Sampler(name, {**WAN, "_class_name": classes.get(name, ""), "solver_order": order})
    expected = run(sampler, steps)
    solver = sampler._solver
    solved = solver._solved
    sizes = []

    def solved_on_units(state, velocity, latent):
        if velocity.shape == SHAPE:
            return solver._weighed(state, velocity, latent)
        sizes.append(latent.shape[1])
        return solved(state, velocity, latent)

    monkeypatch.setattr(solver, "_solved", solved_on_units)
    found = run(sampler, steps)
    assert len(sizes) == steps and sizes[0] == 2
    # a few float32 roundings a step, which the network's slope of 1.7 carries on
    error = float((found - expected).norm() / expected.norm())
    print(f"{error:.1e}")
    assert error < 5e-6


def test_a_different_order_in_the_checkpoints_config_changes_the_run():
    third = Sampler("unipc", {**WAN, "solver_order": 3})
    assert not torch.equal(run(third, 8), run(Sampler("unipc", WAN), 8))
    assert (
        len(third.step(third.begin(4), torch.ones(SHAPE), torch.ones(SHAPE))[1]["history"]["model_outputs"])
        == 3
    )


def test_the_shift_follows_to_another_sampler():
    assert shift_of(WAN) == 3.0
    unipc = Sampler("unipc", WAN).begin(10)
    euler = Sampler("euler", WAN).begin(10)
    assert torch.allclose(unipc["sigmas"], euler["sigmas"], atol=2e-6)
    assert Sampler("dpm++", WAN).begin(10)["sigmas"].sub(unipc["sigmas"]).abs().max() < 5e-3


def test_all_samplers_agree_when_steps_are_many():
    results = {name: run(Sampler(name, WAN), 200) for name in LINEAR}
    for name, latent in results.items():
        assert (latent - results["unipc"]).norm() / latent.norm() < 0.02, name


@pytest.mark.parametrize("name", SOLVERS)
def test_a_step_is_a_function_of_its_arguments(name):
    sampler = Sampler(name, WAN)
    state = sampler.begin(6)
    latent = initial_noise(SHAPE, 1)
    for _ in range(3):
        latent, state = sampler.step(state, velocity_at(latent, sampler.timestep(state)), latent)
    kept = copy.deepcopy(state)
    velocity = velocity_at(latent, sampler.timestep(state))
    first, _ = sampler.step(state, velocity, latent)
    assert state.keys() == kept.keys() and state["index"] == kept["index"]
    again, _ = Sampler(name, WAN).step(kept, velocity, latent)
    assert torch.equal(first, again)


@pytest.mark.parametrize("name", LINEAR)
def test_strength_runs_the_end_of_a_longer_schedule(name):
    sampler = Sampler(name, WAN)
    state = sampler.begin(4, strength=0.5)
    whole = sampler.begin(8)
    assert (state["schedule"], state["index"]) == (8, 4)
    assert sampler.sigma(state) == float(whole["sigmas"][4])
    latent = sampler.renoise(state, torch.zeros(SHAPE), torch.ones(SHAPE))
    assert torch.allclose(latent, torch.full(SHAPE, sampler.sigma(state)))
    steps = 0
    while not sampler.is_done(state):
        latent, state = sampler.step(state, torch.ones(SHAPE), latent)
        steps += 1
    assert steps == 4
    # with the true velocity noise - data = 1 every solver lands on the data, 0
    assert latent.abs().max() < 1e-4


def test_the_solver_ignores_autocast():
    sampler = Sampler("unipc", WAN)
    expected = run(sampler, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(run(sampler, 5), expected)


def test_noise_is_diffusers_own_for_a_seed_and_differs_by_stream():
    from diffusers.utils.torch_utils import randn_tensor

    theirs = randn_tensor(
        SHAPE,
        generator=torch.Generator("cpu").manual_seed(5),
        device=torch.device("cpu"),
        dtype=torch.float32,
    )
    assert torch.equal(initial_noise(SHAPE, 5), theirs)
    assert not torch.equal(initial_noise(SHAPE, 5), initial_noise(SHAPE, 5, stream=1))
    initial_noise(SHAPE, 2**63 - 1, stream=3)


def test_upsample_keeps_frames_apart_and_constants_constant():
    latent = torch.arange(3.0).view(1, 1, 3, 1, 1).expand(1, 2, 3, 4, 6).contiguous()
    larger = upsample_latent(latent, 8, 10)
    assert larger.shape == (1, 2, 3, 8, 10)
    assert torch.allclose(larger, torch.arange(3.0).view(1, 1, 3, 1, 1).expand(1, 2, 3, 8, 10), atol=1e-5)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("flow_shift", "x"),
        ("flow_shift", []),
        ("num_train_timesteps", None),
        ("num_train_timesteps", 10**9),
        ("beta_start", "x"),
        ("beta_schedule", "x"),
        ("final_sigmas_type", "x"),
    ],
)
def test_a_spoilt_scheduler_config_is_a_checkpoint_error_at_once(key, value):
    with pytest.raises(CheckpointError, match="scheduler_config.json"):
        Sampler("unipc", {**WAN, key: value})


def test_a_shift_of_none_is_no_shift():
    assert torch.equal(
        Sampler("unipc", {**WAN, "flow_shift": None}).begin(3)["sigmas"],
        Sampler("unipc", {**WAN, "flow_shift": 1.0}).begin(3)["sigmas"],
    )


def test_refusals():
    with pytest.raises(UsageError, match="Did you mean 'unipc'"):
        Sampler("unpic", WAN)
    with pytest.raises(UsageError, match="dynamic"):
        Sampler("unipc", {**WAN, "use_dynamic_shifting": True})
    with pytest.raises(UsageError, match="use infer.sampler = renoise"):
        Sampler("euler", {"_class_name": "FlowMatchEulerDiscreteScheduler", "stochastic_sampling": True})
    sampler = Sampler("unipc", WAN)
    with pytest.raises(UsageError):
        sampler.begin(0)
    with pytest.raises(UsageError):
        sampler.begin(4, strength=0.0)
    with pytest.raises(UsageError, match="begun with sampler"):
        Sampler("euler", WAN).step(sampler.begin(2), torch.ones(SHAPE), torch.ones(SHAPE))


@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_the_response_says_what_an_error_of_a_velocity_does_to_the_last_latent(name, strength):
    """Solvers are linear in their velocities: random ones with random errors, float32 rounding aside."""
    sampler = Sampler(name, WAN)
    steps = 9
    begun = sampler.begin(steps, strength)
    velocities = torch.randn(steps, *SHAPE)
    errors = torch.randn(steps, *SHAPE)
    ends = []
    for given in (velocities, velocities + errors):
        latent = initial_noise(SHAPE, 7)
        state = begun
        for velocity in given:
            latent, state = sampler.step(state, velocity, latent)
        ends.append(latent)
    expected = sum(weight * error for weight, error in zip(sampler.response(begun), errors, strict=True))
    torch.testing.assert_close(ends[1] - ends[0], expected, rtol=0, atol=2e-4)
