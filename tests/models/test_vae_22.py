"""Wan2.2-TI2V-5B's VAE at its full size, without weights: shapes, numbers and names in both layouts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan

from chitu_diffusion.models.spec import LatentGeometry
from chitu_diffusion.models.wan.checkpoint_names import official_vae_name
from chitu_diffusion.models.wan.presets import FULL_SIZE
from chitu_diffusion.models.wan.vae import WanVAE, build_vae
from chitu_diffusion.models.wan.vae_22 import VAE_22

RESIDUAL = ("residual.0.gamma", *(f"residual.{n}.{kind}" for n in (2, 6) for kind in ("weight", "bias")))
RESIDUAL = (*RESIDUAL, "residual.3.gamma")


def official_names() -> set[str]:
    """What `Wan2.2_VAE.pth` holds, written down from its own code (wan/modules/vae2_2.py)."""
    names = {f"{place}.{kind}" for place in ("conv1", "conv2") for kind in ("weight", "bias")}
    for half, level, blocks in (("encoder", "downsamples", 2), ("decoder", "upsamples", 3)):
        ends = [f"{place}.{kind}" for place in ("conv1", "head.2") for kind in ("weight", "bias")]
        names |= {f"{half}.{end}" for end in (*ends, "head.0.gamma")}
        names |= {f"{half}.middle.{n}.{name}" for n in (0, 2) for name in RESIDUAL}
        attention = [f"{layer}.{kind}" for layer in ("to_qkv", "proj") for kind in ("weight", "bias")]
        names |= {f"{half}.middle.1.{name}" for name in (*attention, "norm.gamma")}
        # stages whose first block changes the width, and those with a resampler in time
        wider, timed = ((1, 2), (1, 2)) if half == "encoder" else ((2, 3), (0, 1))
        for stage in range(4):
            place = f"{half}.{level}.{stage}.{level}"
            names |= {f"{place}.{n}.{name}" for n in range(blocks) for name in RESIDUAL}
            layers = [f"{place}.0.shortcut"] * (stage in wider)
            layers += [f"{place}.{blocks}.resample.1"] * (stage < 3)
            layers += [f"{place}.{blocks}.time_conv"] * (stage in timed)
            names |= {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}
    return names


def test_names_shapes_and_numbers() -> None:
    network = build_vae(VAE_22)
    assert sum(weight.numel() for weight in network.parameters()) == 704_688_668
    halves = (network.encoder, network.decoder)
    assert [sum(weight.numel() for weight in half.parameters()) // 10**5 for half in halves] == [1496, 5550]
    names = {official_vae_name(name, 2, residual=True) for name in network.state_dict()}
    assert len(names) == len(network.state_dict()) and names == official_names()
    assert network.config.latents_mean[19] == 0.5109 and network.config.latents_std[39] == 1.6887


def test_geometry_and_defaults() -> None:
    spec = FULL_SIZE["Wan2.2-TI2V-5B"]
    assert spec.geometry == LatentGeometry.of_vae(VAE_22)
    assert WanVAE(build_vae(VAE_22)).stride == spec.geometry.stride == (4, 16, 16)
    own = spec.defaults
    assert spec.latent_shape(own.num_frames, own.height, own.width) == (48, 31, 44, 80)
    assert spec.tokens(own.num_frames, own.height, own.width) == 27_280
    assert (own.fps, own.steps, own.shift, own.guidance) == (24, 50, 5.0, (5.0,))


@pytest.mark.parametrize("config", [{}, VAE_22], ids=["2.1", "2.2"])
def test_modules_are_named_and_sized_as_diffusers_own(config: dict[str, Any]) -> None:
    """And what the halves ask of them besides weights."""
    ours: Any = build_vae(config)
    with torch.device("meta"):
        theirs = AutoencoderKLWan.from_config({"_class_name": "AutoencoderKLWan", **config})
    expected = {name: value.shape for name, value in theirs.state_dict().items()}
    assert {name: value.shape for name, value in ours.state_dict().items()} == expected
    for name in vars(ours.config):
        assert list(np.atleast_1d(getattr(ours.config, name))) == list(np.atleast_1d(theirs.config[name]))
    pairs = [(stage, theirs.get_submodule(name)) for name, stage in ours.named_modules()]
    modes = [(own.mode, other.mode) for own, other in pairs if hasattr(own, "mode")]
    assert modes and all(own == other for own, other in modes)
    shortcuts = [
        (own.avg_shortcut, other.avg_shortcut) for own, other in pairs if hasattr(own, "avg_shortcut")
    ]
    assert bool(shortcuts) == bool(config)
    for own, other in shortcuts:
        assert (own is None) == (other is None)
        assert own is None or all(getattr(other, name) == value for name, value in vars(own).items())
