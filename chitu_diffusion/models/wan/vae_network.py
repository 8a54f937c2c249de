"""The weights of Wan's video autoencoder as modules, under the names that diffusers' `AutoencoderKLWan` gives
them. Modules here hold and name; what they compute stands in `vae_encoder` and `vae_decoder`, which take
diffusers' own network as well.

Of its own, so that no run waits for the import of diffusers; a test holds names, shapes and settings to it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from chitu_diffusion.errors import UsageError

# fmt: off
_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508, 0.4134, -0.0715, 0.5517, -0.3632,
    -0.1922, -0.9497, 0.2503, -0.2921,
)
_DEVIATION = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743, 3.2687, 2.1526, 2.8652, 1.5579, 1.6382,
    1.1253, 2.8251, 1.9160,
)
# fmt: on
_KERNEL = 3


@dataclass(frozen=True)
class VaeConfig:
    """What a `config.json` says of the autoencoder; names are diffusers', defaults Wan2.1's.

    Attributes:
        base_dim, decoder_base_dim: channels of the widest frames; None: the decoder's are the encoder's.
        z_dim: channels of the latent.
        dim_mult: of each stage's channels.
        num_res_blocks: of a stage; the decoder has one more.
        attn_scales: Wan's have none.
        temperal_downsample: which of the halvings halve time, too.
        latents_mean, latents_std: z_dim numbers each.
        is_residual: Wan2.2's, with shortcuts around stages.
        in_channels, out_channels: 3 patch_size^2.
        patch_size: pixels that are channels, along an edge; None: 1.
    """

    base_dim: int = 96
    decoder_base_dim: int | None = None
    z_dim: int = 16
    dim_mult: Sequence[int] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    attn_scales: Sequence[float] = ()
    temperal_downsample: Sequence[bool] = (False, True, True)
    latents_mean: Sequence[float] = _MEAN
    latents_std: Sequence[float] = _DEVIATION
    is_residual: bool = False
    in_channels: int = 3
    out_channels: int = 3
    patch_size: int | None = None

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> VaeConfig:
        """Raises UsageError: a value that no such VAE can have."""
        names = {field.name for field in fields(cls)}
        found = cls(**{name: value for name, value in config.items() if name in names})
        if not found.dim_mult:
            raise UsageError("vae config has an empty dim_mult: use one number for each stage")
        for name in ("latents_mean", "latents_std"):
            values = getattr(found, name)
            if not isinstance(values, list | tuple) or len(values) != found.z_dim:
                raise UsageError(f"vae config has {name}={values!r}: use {found.z_dim} numbers (z_dim)")
        if found.attn_scales:
            raise UsageError(
                f"vae config has attn_scales={found.attn_scales!r}: Wan's VAEs have none; use []"
            )
        patch = found.patch_size
        channels = found.out_channels
        if patch not in (None, 1, 2, 4, 8) or channels != 3 * (patch or 1) ** 2:
            raise UsageError(
                f"vae config has patch_size={patch!r}, out_channels={channels!r}: "
                "use 3 x patch_size^2 channels"
            )
        return found


class VaeNetwork(nn.Module):
    """Both halves, and the two maps of the latent's channels between them."""

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = VaeEncoder(config)
        self.quant_conv = nn.Conv3d(2 * config.z_dim, 2 * config.z_dim, 1)
        self.post_quant_conv = nn.Conv3d(config.z_dim, config.z_dim, 1)
        self.decoder = VaeDecoder(config)


class VaeEncoder(nn.Module):
    """From pixels to the latent's mean and variance."""

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        channels = [config.base_dim * factor for factor in (1, *config.dim_mult)]
        self.conv_in = nn.Conv3d(config.in_channels, channels[0], _KERNEL)
        self.down_blocks = nn.ModuleList()
        for stage, (into, out) in enumerate(pairwise(channels)):
            last = stage == len(config.dim_mult) - 1
            halves_time = not last and bool(config.temperal_downsample[stage])
            halving = None if last else Resample(out, "down", halves_time)
            if config.is_residual:
                self.down_blocks.append(DownStage(into, out, config.num_res_blocks, halving))
                continue
            self.down_blocks.extend(_residuals(into, out, config.num_res_blocks))
            if halving is not None:
                self.down_blocks.append(halving)
        self.mid_block = MiddleBlock(channels[-1])
        self.norm_out = Norm(channels[-1], 3)
        self.conv_out = nn.Conv3d(channels[-1], 2 * config.z_dim, _KERNEL)


class VaeDecoder(nn.Module):
    """From the latent to pixels."""

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        width = config.decoder_base_dim or config.base_dim
        factors = (config.dim_mult[-1], *reversed(config.dim_mult))
        channels = [width * factor for factor in factors]
        doubles_time = list(reversed(config.temperal_downsample))
        self.conv_in = nn.Conv3d(config.z_dim, channels[0], _KERNEL)
        self.mid_block = MiddleBlock(channels[0])
        self.up_blocks = nn.ModuleList()
        for stage, (into, out) in enumerate(pairwise(channels)):
            last = stage == len(config.dim_mult) - 1
            time = not last and bool(doubles_time[stage])
            if config.is_residual:
                doubling = None if last else Resample(out, "up", time, out)
                self.up_blocks.append(ResidualUpStage(into, out, config.num_res_blocks + 1, doubling))
            else:
                doubling = None if last else Resample(out, "up", time, out // 2)
                # the stage before has halved them
                entering = into if stage == 0 else into // 2
                self.up_blocks.append(UpStage(entering, out, config.num_res_blocks + 1, doubling))
        self.norm_out = Norm(channels[-1], 3)
        self.conv_out = nn.Conv3d(channels[-1], config.out_channels, _KERNEL)


class Norm(nn.Module):
    """The scale of a root mean square over channels, [C, 1, 1] or [C, 1, 1, 1]."""

    def __init__(self, channels: int, axes: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, *(1,) * axes))


class ResidualBlock(nn.Module):
    """Two norms and convolutions, and a shortcut."""

    def __init__(self, into: int, out: int) -> None:
        super().__init__()
        self.norm1 = Norm(into, 3)
        self.conv1 = nn.Conv3d(into, out, _KERNEL)
        self.norm2 = Norm(out, 3)
        self.conv2 = nn.Conv3d(out, out, _KERNEL)
        self.conv_shortcut = nn.Identity() if into == out else nn.Conv3d(into, out, 1)


class Attention(nn.Module):
    """Of each frame by itself."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = Norm(channels, 2)
        self.to_qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)


class MiddleBlock(nn.Module):
    """At the latent's resolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([Attention(channels)])
        self.resnets = nn.ModuleList(_residuals(channels, channels, 2))


class Resample(nn.Module):
    """Half or twice the rows and columns, and the frames where `time` says so.

    Attributes:
        mode: "downsample2d", "upsample3d" and so on.
        resample: its second layer is the convolution.
    """

    def __init__(self, channels: int, way: str, time: bool, out: int | None = None) -> None:
        super().__init__()
        self.mode = f"{way}sample{3 if time else 2}d"
        stride = 2 if way == "down" else 1
        self.resample = nn.Sequential(
            nn.Identity(), nn.Conv2d(channels, out or channels, _KERNEL, stride=stride)
        )
        if time:
            frames = channels if way == "down" else 2 * channels
            self.time_conv = nn.Conv3d(channels, frames, (_KERNEL, 1, 1))


@dataclass(frozen=True)
class DownShortcut:
    """Groups of `group_size` of the neighbours' channels are averaged."""

    factor_t: int
    factor_s: int
    group_size: int


@dataclass(frozen=True)
class UpShortcut:
    """Every number is repeated."""

    factor_t: int
    factor_s: int
    out_channels: int
    repeats: int


class DownStage(nn.Module):
    """Wan2.2's stage of the encoder."""

    def __init__(self, into: int, out: int, blocks: int, halving: Resample | None) -> None:
        super().__init__()
        time = 1 if halving is None or halving.mode == "downsample2d" else 2
        space = 1 if halving is None else 2
        self.avg_shortcut = DownShortcut(time, space, _whole(into * time * space**2, out))
        self.resnets = nn.ModuleList(_residuals(into, out, blocks))
        self.downsampler = halving


class UpStage(nn.Module):
    """Wan2.1's stage of the decoder."""

    def __init__(self, into: int, out: int, blocks: int, doubling: Resample | None) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(_residuals(into, out, blocks))
        self.upsamplers = None if doubling is None else nn.ModuleList([doubling])


class ResidualUpStage(nn.Module):
    """Wan2.2's."""

    def __init__(self, into: int, out: int, blocks: int, doubling: Resample | None) -> None:
        super().__init__()
        self.avg_shortcut = None
        if doubling is not None:
            time = 2 if doubling.mode == "upsample3d" else 1
            self.avg_shortcut = UpShortcut(time, 2, out, _whole(out * time * 4, into))
        self.resnets = nn.ModuleList(_residuals(into, out, blocks))
        self.upsampler = doubling


def _residuals(into: int, out: int, blocks: int) -> list[ResidualBlock]:
    return [ResidualBlock(out if number else into, out) for number in range(blocks)]


def _whole(numbers: int, groups: int) -> int:
    """How many numbers a group has.

    Raises:
        UsageError: not a whole number.
    """
    if groups < 1 or numbers % groups:
        raise UsageError(f"vae config has stages of {numbers} and {groups} numbers: use multiples")
    return numbers // groups
