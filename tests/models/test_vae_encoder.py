"""The encoder over diffusers' weights: the latent that diffusers makes, in every way of computing it, in
tiles and strips.
"""

from __future__ import annotations

import secrets

import pytest
import torch
from diffusers import AutoencoderKLWan
from test_vae_decoder import SIZES, TRITON, error, fresh_network
from torch import Tensor

from chitu_diffusion.errors import UsageError
from chitu_diffusion.models.wan import vae_encoder
from chitu_diffusion.models.wan.vae import WanVAE
from chitu_diffusion.models.wan.vae_layers import TileRect, VaeOptions


@pytest.fixture(autouse=True)
def fresh_numbers() -> None:
    seed = secrets.randbelow(2**31)
    print("torch seed", seed)  # shown when a test fails
    torch.manual_seed(seed)


@pytest.fixture(scope="module", params=SIZES)
def network(request: pytest.FixtureRequest) -> AutoencoderKLWan:
    torch.manual_seed(secrets.randbelow(2**31))
    return fresh_network(SIZES[request.param])


def by_diffusers(network: AutoencoderKLWan, video: Tensor) -> Tensor:
    """What `WanImageToVideoPipeline` makes of a video in [0, 1]."""
    mean, deviation = (
        torch.tensor(values).view(1, -1, 1, 1, 1)
        for values in (network.config.latents_mean, network.config.latents_std)
    )
    with torch.no_grad():
        pixels = (video.transpose(1, 2) * 2 - 1).to(network.dtype)
        latent = network.encode(pixels).latent_dist.mode().float()
    found: Tensor = (latent - mean) / deviation
    return found


def clip(vae: WanVAE, frames: int, height: int, width: int, batch: int = 1) -> Tensor:
    """A video of so many latent cells."""
    rows, columns = vae.stride[1:]
    return torch.rand(batch, 4 * frames - 3, 3, rows * height, columns * width)


@pytest.mark.parametrize(("frames", "height", "width"), [(1, 5, 3), (2, 4, 4), (5, 3, 2)])
def test_encode_is_diffusers(frames: int, height: int, width: int, network: AutoencoderKLWan) -> None:
    for frames_per_call in (None, 1, 3):
        vae = WanVAE(network, frames_per_call)
        video = clip(vae, frames, height, width, batch=2 if frames == 2 else 1)
        expected = by_diffusers(network, video)
        found = vae.encode(video)
        assert found.shape == expected.shape and found.dtype == torch.float32
        assert error(found, expected) < 1e-5  # sums in another order: some 25 layers, each 1e-7


@pytest.mark.parametrize("convolution", ["conv3d", "stacked", "widened", "flat"])
@pytest.mark.parametrize("norm", ["torch", TRITON])
def test_every_way_of_computing_is_diffusers(norm: str, convolution: str, network: AutoencoderKLWan) -> None:
    if norm == "triton" and (network.config.patch_size is None or convolution != "flat"):
        pytest.skip("takes long in Triton's interpreter; one network and way has all of its layers")
    vae = WanVAE(network, ways=VaeOptions(norm, convolution, attention="product"))
    video = clip(vae, 2, 1, 2)
    assert error(vae.encode(video), by_diffusers(network, video)) < 1e-5


def test_bf16_stays_near_float32(network: AutoencoderKLWan) -> None:
    video = clip(WanVAE(network), 3, 4, 4)
    exact = by_diffusers(network, video)
    half = AutoencoderKLWan.from_config(network.config).to(torch.bfloat16).eval()
    half.load_state_dict(network.state_dict())
    theirs = error(by_diffusers(half, video), exact)
    # random weights amplify rounding more than trained ones do: theirs is the measure of what bf16 costs here
    assert error(WanVAE(half).encode(video), exact) < 1.3 * theirs < 0.2


def test_not_a_number_shows(network: AutoencoderKLWan) -> None:
    vae = WanVAE(network)
    video = clip(vae, 2, 2, 2)
    video[0, 2, 1, 3, 3] = torch.nan
    assert torch.isnan(vae.encode(video)).any()


def test_tiles_and_strips_are_the_whole_frame(network: AutoencoderKLWan) -> None:
    vae = WanVAE(network)
    video = clip(vae, 2, 2, 27)
    whole = vae.encode(video)
    assert error(vae.encode(video, 5), whole) < 1e-5
    turned = video.transpose(-1, -2)
    for given, axis in ((video, -1), (turned, -2)):
        strips = [vae.encode_strip(given, low, high, axis) for low, high in ((0, 13), (13, 14), (14, 27))]
        assert [strip.shape[axis] for strip in strips] == [13, 1, 13]
        assert error(vae.latent_of(torch.cat(strips, dim=axis)), vae.encode(given)) < 1e-5


def test_a_strip_takes_the_neighbours_that_matter_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    network = fresh_network(SIZES["full"])
    vae = WanVAE(network)
    video = clip(vae, 2, 2, 60)
    expected = vae.encode_strip(video, 0, 60)[..., 28:30]
    assert error(vae.encode_strip(video, 28, 30), expected) < 1e-5
    stages = vae_encoder.stages_of(network.encoder)
    seen = vae_encoder.needed(stages, TileRect(0, 2, 28, 30), 16, 480)[0][0]
    # two residual blocks of two convolutions a stage: 4, 4 + 8, 4 + 24, 4 + 56 cells and one for each halving
    assert (seen.left, seen.right) == (8 * 28 - 60, 8 * 30 + 60 + 7)
    grown = TileRect.grown
    monkeypatch.setattr(TileRect, "grown", lambda rect, by, *size: grown(rect, max(by - 1, 0), *size))
    assert error(vae.encode_strip(video, 28, 30), expected) > 1e-4


def test_frames_a_call_follow_the_budget(network: AutoencoderKLWan) -> None:
    video = clip(WanVAE(network), 6, 2, 2)
    exact = WanVAE(network, 1).encode(video)
    for budget in (1, 2**40):
        assert error(WanVAE(network, memory_budget=budget).encode(video), exact) < 1e-5


@pytest.mark.parametrize("shape", [(1, 4, 3, 16, 16), (1, 5, 4, 16, 16), (1, 5, 3, 20, 16), (5, 3, 16, 16)])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    vae = WanVAE(fresh_network(SIZES["full"]))
    with pytest.raises(UsageError, match=r"expected \[B, T, 3, H, W\]"):
        vae.encode(torch.rand(shape))
