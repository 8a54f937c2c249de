"""The decoder over diffusers' weights: the same video as diffusers' own, in every way of computing it, in
tiles and strips.
"""

from __future__ import annotations

import secrets
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from chitu_diffusion.errors import UsageError
from chitu_diffusion.models.wan.vae import WanVAE, _tiles
from chitu_diffusion.models.wan.vae_layers import TileRect, VaeOptions, best_options, searching_kernels, spans
from chitu_diffusion.ops import vae_norm_triton as vae_triton
from chitu_diffusion.ops.vae_conv import (
    CONVOLUTIONS,
    NORMS,
    phased_weight,
    upsample_nearest,
    upsample_phased,
    weight_for,
)
from chitu_diffusion.ops.vae_conv_gemm import flat_conv, flat_weight, suits_flat
from chitu_diffusion.ops.vae_sum import Sum

# Wan2.1's four stages of three residual blocks, and wan-tiny's three with patches; narrow, so that two cores
# suffice
SIZES: dict[str, dict[str, Any]] = {
    "full": {"base_dim": 8, "z_dim": 4, "dim_mult": [1, 2, 4, 4]},
    "patched": {
        "base_dim": 8,
        "z_dim": 4,
        "dim_mult": [1, 2, 3],
        "temperal_downsample": [True, True],
        "patch_size": 2,
        "in_channels": 12,
        "out_channels": 12,
    },
    # Wan2.2-TI2V-5B's, of three stages
    "residual": {
        "base_dim": 4,
        "decoder_base_dim": 8,
        "z_dim": 4,
        "dim_mult": [1, 2, 2],
        "num_res_blocks": 1,
        "temperal_downsample": [True, True],
        "is_residual": True,
        "patch_size": 2,
        "in_channels": 12,
        "out_channels": 12,
    },
}
needs_triton = pytest.mark.skipif(
    vae_triton.triton is None, reason="triton is not installed; its kernels cannot be tested"
)
TRITON = pytest.param("triton", marks=needs_triton)


@pytest.fixture(autouse=True)
def fresh_numbers() -> None:
    seed = secrets.randbelow(2**31)
    print("torch seed", seed)  # shown when a test fails
    torch.manual_seed(seed)


def fresh_network(config: dict[str, Any]) -> AutoencoderKLWan:
    """Random weights of which every one counts: gains and biases too, and a video of sensible range."""
    statistics = {"latents_mean": torch.randn(4).tolist(), "latents_std": torch.rand(4).add(0.5).tolist()}
    network = AutoencoderKLWan(**config, **statistics).eval()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "gamma" in name:
                parameter.uniform_(0.6, 1.4)
            elif parameter.ndim > 1:
                parameter.normal_(0, parameter[0].numel() ** -0.5)
            else:
                parameter.normal_(0, 0.1)
        network.decoder.conv_out.weight.mul_(0.5)
    return network


@pytest.fixture(scope="module", params=SIZES)
def network(request: pytest.FixtureRequest) -> AutoencoderKLWan:
    torch.manual_seed(secrets.randbelow(2**31))
    return fresh_network(SIZES[request.param])


def by_diffusers(network: AutoencoderKLWan, latent: Tensor) -> Tensor:
    """What `WanPipeline` does after its last step, and then what makes frames of it."""
    mean, deviation = (
        torch.tensor(values).view(1, -1, 1, 1, 1)
        for values in (network.config.latents_mean, network.config.latents_std)
    )
    with torch.no_grad():
        pixels = network.decode((latent * deviation + mean).to(latent.dtype), return_dict=False)[0]
    video: Tensor = (pixels / 2 + 0.5).clamp(0, 1).transpose(1, 2)
    return video


def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / (expected - expected.mean()).norm())


# -- against diffusers


@pytest.mark.parametrize(("frames", "height", "width"), [(1, 5, 3), (2, 4, 4), (5, 3, 2), (9, 2, 1)])
def test_decode_is_diffusers(frames: int, height: int, width: int, network: AutoencoderKLWan) -> None:
    latent = torch.randn(2 if frames == 2 else 1, 4, frames, height, width)
    expected = by_diffusers(network, latent)
    assert expected.std() > 0.005  # the decoder says something
    for frames_per_call in (None, 1, 3):
        found = WanVAE(network, frames_per_call).decode(latent)
        assert (
            found.shape == (len(latent), 4 * frames - 3, 3, 8 * height, 8 * width)
            and found.dtype == torch.float32
        )
        # sums in another order: some 30 layers, each 1e-7
        assert error(found, expected) < 1e-5


def test_wide_shortcuts_without_time_are_diffusers() -> None:
    """Its third stage: half the channels, twice the rows and columns, as many frames. And its encoder."""
    network = fresh_network(
        {
            **SIZES["residual"],
            "dim_mult": [1, 2, 4, 4],
            "temperal_downsample": [False, True, True],
            "scale_factor_spatial": 16,
        }
    )
    latent = torch.randn(1, 4, 2, 1, 2)
    vae = WanVAE(network)
    video = vae.decode(latent)
    assert video.shape == (1, 5, 3, 16, 32)
    assert error(video, by_diffusers(network, latent)) < 1e-5
    mean, deviation = (
        torch.tensor(values).view(1, -1, 1, 1, 1)
        for values in (network.config.latents_mean, network.config.latents_std)
    )
    with torch.no_grad():
        encoded = network.encode(video.transpose(1, 2) * 2 - 1).latent_dist.mode()
    assert error(vae.encode(video), (encoded - mean) / deviation) < 1e-5
    one = vae.encode(video[:, :1])
    assert one.shape == (1, 4, 1, 1, 2) and error(one, vae.encode(video)[:, :, :1]) < 1e-5


WAYS = [
    VaeOptions(convolution="conv3d"),
    VaeOptions(convolution="stacked", attention="product"),
    VaeOptions(upsample="nearest"),
    VaeOptions(convolution="flat"),
    pytest.param(VaeOptions("triton", "flat"), marks=needs_triton),
]


@pytest.mark.parametrize("ways", WAYS, ids=str)
def test_every_way_of_computing_is_diffusers(ways: VaeOptions, network: AutoencoderKLWan) -> None:
    if ways.norm == "triton" and network.config.patch_size is None:
        pytest.skip("takes long in Triton's interpreter; the patched network has the same layers")
    latent = torch.randn(1, 4, 2, 1, 2)
    assert error(WanVAE(network, ways=ways).decode(latent), by_diffusers(network, latent)) < 1e-5


def test_bf16_stays_near_float32(network: AutoencoderKLWan) -> None:
    latent = torch.randn(1, 4, 3, 4, 4)
    exact = by_diffusers(network, latent)
    half = AutoencoderKLWan.from_config(network.config).to(torch.bfloat16).eval()
    half.load_state_dict(network.state_dict())
    theirs = by_diffusers(half, latent.to(torch.bfloat16)).float()
    # random weights amplify rounding more than trained ones do: theirs is the measure of what bf16 costs here
    assert error(WanVAE(half).decode(latent), exact) < 1.3 * error(theirs, exact) < 0.2


def test_float64_latents_and_weights(network: AutoencoderKLWan) -> None:
    latent = torch.randn(1, 4, 2, 2, 2, dtype=torch.float64)
    wide = AutoencoderKLWan.from_config(network.config).double().eval()
    wide.load_state_dict(network.state_dict())
    # the video is float32
    assert error(WanVAE(wide).decode(latent).double(), by_diffusers(wide, latent)) < 1e-6


def test_not_a_number_shows(network: AutoencoderKLWan) -> None:
    latent = torch.randn(1, 4, 2, 2, 2)
    latent[0, 0, 1, 0, 0] = torch.nan
    assert torch.isnan(WanVAE(network).decode(latent)).any()


# -- windows


def test_tiles_are_the_whole_frame(network: AutoencoderKLWan) -> None:
    latent = torch.randn(1, 4, 2, 3, 31)
    whole = WanVAE(network).decode(latent)
    for tile_size in (8, 30):
        assert error(WanVAE(network).decode_tiled(latent, tile_size), whole) < 1e-5


def test_strips_of_odd_places(network: AutoencoderKLWan) -> None:
    latent = torch.randn(1, 4, 2, 2, 31)
    vae = WanVAE(network)
    expected = vae.decode(latent)[..., 8 * 15 : 8 * 16]
    assert error(vae.decode_strip(latent, 15, 16), expected) < 1e-5
    turned = vae.decode_strip(latent.transpose(-1, -2), 15, 16, axis=-2)
    assert turned.shape == (1, 5, 3, 8, 16)
    assert error(turned, vae.decode(latent.transpose(-1, -2))[..., 8 * 15 : 8 * 16, :]) < 1e-5


def test_tiles_cover_a_window_once() -> None:
    for window, size in (
        (TileRect(0, 60, 0, 104), 32),
        (TileRect(0, 9, 3, 20), 8),
        (TileRect(0, 1, 0, 1), 8),
        (TileRect(2, 7, 0, 31), 1),
    ):
        count = torch.zeros(64, 128)
        for top, bottom, left, right in _tiles(window, size):
            count[top:bottom, left:right] += 1
            assert max(bottom - top, right - left) < 1.5 * size + 1
        whole = torch.zeros(64, 128)
        whole[window.top : window.bottom, window.left : window.right] = 1
        assert torch.equal(count, whole)


@pytest.mark.parametrize("most", [1, 2, 4, 5, 30])
def test_calls_cover_all_frames_once(most: int) -> None:
    for frames in (1, 2, 6, 9, 21):
        calls = list(spans(frames, most))
        assert calls[0] == (0, 1) and calls[-1][1] == frames
        assert all(end == start for (_, end), (start, _) in zip(calls, calls[1:], strict=False))
        assert max(end - start for start, end in calls) <= most


# -- kernels


@pytest.mark.parametrize("norm", ["torch", TRITON])
@pytest.mark.parametrize(("phased", "residual"), [(False, True), (False, False), (True, False), (True, True)])
def test_norms_are_the_formula(norm: str, phased: bool, residual: bool) -> None:
    """Against float64: a cut of the sum, its norm, and both written into larger buffers."""
    frames = 2
    height = 6
    width = 10
    channels = 24
    shape = (
        (frames, height // 2 + 1, width // 2 + 1, 4 * channels)
        if phased
        else (frames, height, width, channels)
    )
    value = torch.randn(shape)
    bias = torch.randn(channels)
    gamma = torch.rand(channels) + 0.5
    rest = torch.randn(frames, height, width, channels) if residual else None
    whole = value.double()
    if phased:
        whole = torch.empty(frames, height, width, channels, dtype=torch.float64)
        for y in range(height):
            for x in range(width):
                phase = (2 * (y % 2) + x % 2) * channels
                whole[:, y, x] = value[:, y // 2 + y % 2, x // 2 + x % 2, phase : phase + channels]
    whole = (whole + bias + (0 if rest is None else rest))[:, 1:6, 3:10]
    expected = whole / whole.norm(dim=-1, keepdim=True) * channels**0.5 * gamma
    expected = expected * expected.sigmoid()
    parts = Sum(value, bias, rest, phased, (0, 0, height, width)).cut(1, 3, 5, 7)
    assert parts.shape == (frames, 5, 7, channels)
    out = torch.zeros(frames + 2, 5, 7, channels)
    total = torch.zeros(frames, 5, 7, channels)
    norm_silu, add_up = NORMS[norm]
    norm_silu(parts, gamma, out[2:], total)
    assert torch.allclose(out[2:].double(), expected, atol=2e-6) and not out[:2].any()
    assert torch.allclose(total.double(), whole, atol=1e-6)
    total.zero_()
    add_up(parts, total)
    assert torch.allclose(total.double(), whole, atol=1e-6)


def test_a_pixel_of_zeros_stays_zero() -> None:
    for norm_silu, _ in [NORMS["torch"]] + ([NORMS["triton"]] if vae_triton.triton is not None else []):
        out = torch.ones(1, 1, 2, 8)
        norm_silu(Sum(torch.zeros(1, 1, 2, 8)), torch.ones(8), out, None)
        assert not out.any()


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("kernel", [(3, 3, 3), (3, 1, 1)])
def test_convolutions_are_the_definition(name: str, kernel: tuple[int, int, int]) -> None:
    x = torch.randn(5, 6, 7, 16)
    weight = torch.randn(96, 16, *kernel)
    padding = (0, kernel[1] // 2, kernel[2] // 2)
    expected = torch.nn.functional.conv3d(
        x.permute(3, 0, 1, 2)[None].double(), weight.double(), padding=padding
    )
    found = CONVOLUTIONS[name](x, weight_for(name, weight))
    assert torch.equal(weight_for(name, weight), weight) and found.stride(-1) == 1
    assert error(found.double(), expected[0].permute(1, 2, 3, 0)) < 1e-6


@pytest.mark.parametrize("on_gpu", [False, pytest.param(True, marks=needs_triton)])
@pytest.mark.parametrize(("into", "out"), [(16, 32), (48, 48), (96, 96)])
def test_flat_convolution_is_the_definition(into: int, out: int, on_gpu: bool) -> None:
    x = torch.randn(4, 3, 5, into)
    weight = torch.randn(out, into, 3, 3, 3)
    assert suits_flat(weight)
    expected = torch.nn.functional.conv3d(
        x.permute(3, 0, 1, 2)[None].double(), weight.double(), padding=(0, 1, 1)
    )
    bordered = torch.nn.functional.pad(x, (0, 0, 1, 1, 1, 1))
    found = flat_conv(bordered, flat_weight(weight), on_gpu)
    assert error(found.double(), expected[0].permute(1, 2, 3, 0)) < 1e-6


@pytest.mark.parametrize(
    ("shape", "suits"),
    [
        ((96, 96, 3, 3, 3), True),
        ((128, 64, 3, 3, 3), True),
        ((3, 96, 3, 3, 3), False),
        ((96, 112, 3, 3, 3), False),
        ((192, 192, 3, 3, 3), False),
        ((64, 32, 3, 1, 1), False),
        ((72, 72, 3, 3, 3), False),
    ],
)
def test_flat_convolution_knows_its_sizes(shape: tuple[int, ...], suits: bool) -> None:
    assert suits_flat(torch.empty(shape)) == suits


def test_phases_are_nearest_and_a_convolution() -> None:
    x = torch.randn(2, 5, 7, 16)
    weight = torch.randn(8, 16, 3, 3)
    bias = torch.randn(8)
    images = torch.nn.functional.interpolate(
        x.permute(0, 3, 1, 2).double(), scale_factor=2, mode="nearest-exact"
    )
    expected = torch.nn.functional.conv2d(images, weight.double(), bias.double(), padding=1).permute(
        0, 2, 3, 1
    )
    for parts in (upsample_phased(x, phased_weight(weight), bias), upsample_nearest(x, weight, bias)):
        total = torch.empty(parts.shape)
        NORMS["torch"][1](parts, total)
        assert error(total.double(), expected) < 1e-6


def test_the_search_is_on_inside_alone() -> None:
    before = torch.backends.cudnn.benchmark
    with pytest.raises(KeyError), searching_kernels(True):
        assert torch.backends.cudnn.benchmark
        raise KeyError
    assert torch.backends.cudnn.benchmark == before
    with searching_kernels(False):
        assert torch.backends.cudnn.benchmark == before
    assert best_options(torch.device("cpu"), 384) == VaeOptions()


# -- memory


class LiveBytes(TorchDispatchMode):
    """Bytes of all tensors made inside and still held, and the most that there were."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            storage = tensor.untyped_storage() if isinstance(tensor, Tensor) else None
            if storage is not None and storage._cdata not in given | self.known:
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        return result

    def _gone(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


@pytest.mark.parametrize(("tile", "frames_per_call"), [(None, 1), (None, 3), (6, 2)])
def test_the_peak_is_as_stated(tile: int | None, frames_per_call: int, network: AutoencoderKLWan) -> None:
    latent = torch.randn(1, 4, 7, 3, 12)
    vae = WanVAE(network, frames_per_call)
    tiles = [] if tile is None else _tiles(TileRect(0, 3, 0, 12), tile)
    with LiveBytes() as live:
        vae.decode(latent) if tile is None else vae.decode_tiled(latent, tile)
    stated = vae.peak_bytes(latent, tiles, frames_per_call)
    assert live.peak <= stated <= 1.6 * live.peak


def test_a_budget_shrinks_the_calls_or_refuses(network: AutoencoderKLWan) -> None:
    latent = torch.randn(1, 4, 9, 4, 6)
    least = WanVAE(network).peak_bytes(latent)
    with pytest.raises(UsageError, match=r"decode smaller tiles"):
        WanVAE(network, memory_budget=least - 1).decode(latent)
    with LiveBytes() as live:
        small = WanVAE(network, memory_budget=least).decode(latent)
    assert live.peak <= least
    assert error(small, WanVAE(network).decode(latent)) < 1e-5
