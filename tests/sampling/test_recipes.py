"""The rows of `sampling.recipes`: their noise levels to the digits that the authors' code gives, and steps
beside the authors' formula in their precision.
"""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from chitu_diffusion.errors import UsageError
from chitu_diffusion.sampling.noise import initial_noise
from chitu_diffusion.sampling.recipes import RECIPES, recipe_named, recipe_of_names
from chitu_diffusion.sampling.solvers import Sampler

SHAPE = (1, 4, 2, 4, 6)
WAN = {"_class_name": "UniPCMultistepScheduler", "flow_shift": 3.0}
SEED = 11

FOUR = ([1, 0.9375, 0.833333, 0.625], [1000, 937.5, 833.33, 625], "euler")
RCM = [0.933781, 0.852895, 0.608979]
ACC = [1, 0.9779, 0.9515, 0.9195, 0.8797, 0.8290, 0.7623, 0.6705, 0.5361, 0.3205]
AS_PRINTED = {
    "lightx2v-4step": FOUR,
    "wan2.2-lightning": FOUR,
    "lightx2v-flf2v-4step": ([1, 0.9796, 0.9412, 0.8421], [1000, 979.6, 941.2, 842.1], "euler"),
    "fastwan": ([1, 0.756757, 0.521739], [1000, 757, 522], "renoise"),
    "causvid": ([1, 0.756757, 0.521739], [1000, 757, 522], "renoise"),
    "rcm": ([0.987654, *RCM], [988, 932, 852, 608], "renoise"),
    "rcm-3step": ([0.987654, *RCM[:2]], [988, 932, 852], "renoise"),
    "rcm-2step": ([0.987654, *RCM[:1]], [988, 932], "renoise"),
    "rcm-1step": ([0.987654], [988], "renoise"),
    "rcm-720p": ([0.991736, *RCM], [992, 932, 852, 608], "renoise"),
    "turbowan2.2-i2v": ([0.995025, *RCM], [996, 932, 852, 608], "renoise"),
    "turbowan2.2-i2v-ode": ([0.995025, *RCM], [996, 932, 852, 608], "euler"),
    "accvideo": (ACC, [1000 * sigma for sigma in ACC], "euler"),
}
"""Sigmas, times and update, as they are published or as the authors' code prints them."""


def digits(printed: float) -> float:
    """Half a unit of a printed number's last digit."""
    return 0.5 * 10.0 ** -len(str(printed).partition(".")[2])


@pytest.mark.parametrize("name", AS_PRINTED)
def test_a_row_has_the_printed_levels(name):
    sigmas, times, update = AS_PRINTED[name]
    row = RECIPES[name]
    assert row.sampler == update and row.guidance == 1
    for found, printed in zip(row.levels.sigmas, sigmas, strict=True):
        assert abs(found - printed) <= 1.01 * max(digits(printed), 5e-7 if name == "accvideo" else 0)
    # of the last row the sigmas alone are printed
    slack = 0.06 if name == "accvideo" else 0
    for found, printed in zip(row.levels.timesteps, times, strict=True):
        assert abs(found - printed) <= 1.01 * max(digits(printed), slack)


def test_every_row_is_tested():
    assert set(RECIPES) - set(AS_PRINTED) == {"accvideo-i2v-480p"}  # the same formula at shift 3, below


@pytest.mark.parametrize(("name", "shift"), [("accvideo", 5.0), ("accvideo-i2v-480p", 3.0)])
def test_accvideo_is_every_fifth_of_diffusers_fifty(name, shift):
    theirs = FlowMatchEulerDiscreteScheduler(shift=shift)
    theirs.set_timesteps(50)
    # float32 there
    assert RECIPES[name].levels.sigmas == pytest.approx(theirs.sigmas[:-1:5].tolist(), abs=1e-6)
    assert RECIPES[name].levels.timesteps == pytest.approx(theirs.timesteps[::5].tolist(), abs=1e-3)


@pytest.mark.parametrize("name", ["fastwan", "causvid"])
def test_dmd_levels_are_the_nearest_of_diffusers_grid(name):
    """The whole grid of training at shift 8, whose time is nearest to each integer."""
    grid = FlowMatchEulerDiscreteScheduler(shift=8.0)
    for sigma, time in zip(RECIPES[name].levels.sigmas, (1000, 757, 522), strict=True):
        assert sigma == pytest.approx(float(grid.sigmas[(grid.timesteps - time).abs().argmin()]), abs=1e-6)


@pytest.mark.parametrize("name", [name for name in RECIPES if name.startswith(("rcm", "turbowan"))])
def test_rcm_times_are_bfloat16(name):
    sigmas = torch.tensor(RECIPES[name].levels.sigmas, dtype=torch.float64)
    assert RECIPES[name].levels.timesteps == tuple((1000 * sigmas).to(torch.bfloat16).tolist())
    start = {"rcm": 80, "turbowan2.2": 200}[name.split("-")[0]] if name != "rcm-720p" else 120
    assert sigmas[0].item() == pytest.approx(start / (1 + start), abs=1e-15)  # tan of the first angle
    assert sigmas[1:].tolist() == pytest.approx(
        [math.tan(angle) / (1 + math.tan(angle)) for angle in (1.5, 1.4, 1.0)][: len(sigmas) - 1], abs=1e-14
    )


# -- steps


def velocity_at(latent: torch.Tensor, timestep: float) -> torch.Tensor:
    """A stand-in for the network, which gives float32: smooth, nonlinear, dependent on time."""
    latent = latent.float()
    return torch.sin(latent * 1.7) + latent * timestep / 1000


def run(name: str) -> torch.Tensor:
    row = RECIPES[name]
    sampler = Sampler(row.sampler, WAN, row.levels, name)
    state = sampler.begin(len(row.levels.sigmas), seed=SEED)
    latent = sampler.first_latent(state, SHAPE)
    while not sampler.is_done(state):
        latent, state = sampler.step(state, velocity_at(latent, float(sampler.timestep(state))), latent)
    return latent


def noise_of(step: int) -> torch.Tensor:
    generator = torch.Generator("cpu").manual_seed((SEED + (step + 1) * 2**20 * 1_000_003) % 2**63)
    return torch.randn(SHAPE, generator=generator)


@pytest.mark.parametrize("name", [name for name, row in RECIPES.items() if row.sampler == "euler"])
def test_euler_rows_follow_the_velocity(name):
    row = RECIPES[name]
    latent = initial_noise(SHAPE, SEED).double()
    if name.startswith("turbowan"):
        latent = latent * row.levels.sigmas[0]
    sigmas = [*row.levels.sigmas, 0.0]
    for step, time in enumerate(row.levels.timesteps):
        latent = latent + (sigmas[step + 1] - sigmas[step]) * velocity_at(latent, time).double()
    found = run(name)
    assert found.dtype == (torch.float64 if name.startswith("turbowan") else torch.float32)
    # float32 noise levels and sums over at most 10 steps
    torch.testing.assert_close(found.double(), latent, rtol=0, atol=5e-6)


@pytest.mark.parametrize("name", [name for name in RECIPES if name.startswith("rcm")])
def test_rcm_steps_in_float64_from_scaled_noise(name):
    """x' = (1 - s')(x - s v) + s' noise; the noise is drawn in float32."""
    levels = RECIPES[name].levels
    sigmas = [*levels.sigmas, 0.0]
    latent = sigmas[0] * initial_noise(SHAPE, SEED).double()
    for step, time in enumerate(levels.timesteps):
        data = latent - sigmas[step] * velocity_at(latent, time).double()
        latent = (1 - sigmas[step + 1]) * data + sigmas[step + 1] * noise_of(step).double()
    found = run(name)
    assert found.dtype == torch.float64
    # the levels of a schedule are kept in float32
    torch.testing.assert_close(found, latent, rtol=0, atol=2e-6)


def test_fastwan_draws_and_rounds_as_its_authors():
    """One generator, [B, T, C, H, W] in bfloat16; data in float64 and then bfloat16, mixed in float32."""
    levels = RECIPES["fastwan"].levels
    sigmas = [*levels.sigmas, 0.0]
    generator = torch.Generator("cpu").manual_seed(SEED)

    def draw():
        shape = (SHAPE[0], SHAPE[2], SHAPE[1], *SHAPE[3:])
        return torch.randn(shape, generator=generator, dtype=torch.bfloat16).transpose(1, 2)

    latent = draw()
    for step, time in enumerate(levels.timesteps):
        velocity = velocity_at(latent, time)
        data = (latent.double() - sigmas[step] * velocity.double()).to(torch.bfloat16)
        latent = data
        if step < 2:
            latent = ((1 - sigmas[step + 1]) * data.float() + sigmas[step + 1] * draw().float()).bfloat16()
    found = run("fastwan")
    assert found.dtype == torch.bfloat16
    # all but a few numbers are the very same: a sum that lies half way between two may be rounded otherwise
    assert (found != latent).float().mean() < 0.02
    torch.testing.assert_close(found.float(), latent.float(), rtol=0.02, atol=0.02)


def test_causvid_rounds_its_data_to_bfloat16():
    levels = RECIPES["causvid"].levels
    sigmas = [*levels.sigmas, 0.0]
    latent = initial_noise(SHAPE, SEED).bfloat16()
    for step, time in enumerate(levels.timesteps):
        data = (latent.double() - sigmas[step] * velocity_at(latent, time).double()).to(torch.bfloat16)
        fresh = noise_of(step).bfloat16()
        latent = ((1 - sigmas[step + 1]) * data.float() + sigmas[step + 1] * fresh.float()).bfloat16()
    found = run("causvid")
    assert (found != latent).float().mean() < 0.02
    torch.testing.assert_close(found.float(), latent.float(), rtol=0.02, atol=0.02)


def test_the_end_of_a_row_begins_with_a_mixed_latent():
    row = RECIPES["rcm"]
    sampler = Sampler(row.sampler, WAN, row.levels, "rcm")
    clean = torch.randn(SHAPE, generator=torch.Generator().manual_seed(2))
    state = sampler.begin(2, 0.5, seed=SEED)
    found = sampler.renoise(state, clean)
    sigma = RCM[1]
    torch.testing.assert_close(
        found, (1 - sigma) * clean.double() + sigma * initial_noise(SHAPE, SEED).double(), rtol=0, atol=2e-6
    )


# -- names


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("wan2.2_i2v_A14b_high_noise_lightx2v_4step_1030.safetensors", "lightx2v-4step"),
        ("Wan2.1-I2V-14B-480P-StepDistill-CfgDistill-Lightx2v", "lightx2v-4step"),
        ("lightx2v_T2V_14B_cfg_step_distill_v2_lora_rank64_bf16.safetensors", "lightx2v-4step"),
        ("Wan2.2-Lightning_T2V-v1.1-A14B-4steps-lora_HIGH_fp16.safetensors", "wan2.2-lightning"),
        ("Wan2.2-T2V-A14B-4steps-lora-rank64-Seko-V1.1", "wan2.2-lightning"),
        ("FastVideo--FastWan2.2-TI2V-5B-FullAttn-Diffusers", "fastwan"),
        ("FastWan2.1-T2V-1.3B-Diffusers", "fastwan"),
        ("TurboWan2.1-T2V-1.3B-480P.pth", "rcm"),
        ("rCM_Wan2.1_T2V_1.3B_480p.pt", "rcm"),
        ("TurboWan2.2-I2V-A14B-high-720P.pth", "turbowan2.2-i2v"),
        ("AccVideo-WanX-T2V-14B", "accvideo"),
        ("AccVideo-WanX-I2V-480P-14B", "accvideo-i2v-480p"),
        ("causvid_bidirectional_checkpoint2", "causvid"),
        ("Self-Forcing", "self-forcing"),
    ],
)
def test_published_names_are_known(file, name):
    assert recipe_of_names(["snapshots", file]) == (name, file)


@pytest.mark.parametrize(
    "file",
    [
        "Wan2.1-T2V-14B-Diffusers",
        "Wan2.2-I2V-A14B",
        "wan-tiny",
        "diffusion_pytorch_model-00001-of-00006.safetensors",
        "wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors",
        "arcmodel-2",
    ],
)
def test_usual_names_are_not(file):
    assert recipe_of_names([file]) is None


def test_what_is_no_row_says_why():
    with pytest.raises(UsageError, match="chunks of three frames"):
        recipe_named("self-forcing")
    with pytest.raises(UsageError, match="Did you mean 'fastwan'"):
        recipe_named("fastwn")
