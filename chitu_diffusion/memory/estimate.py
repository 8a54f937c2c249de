"""Roughly how much memory a video needs. Knows sizes; not networks or tasks.

The estimate is a sizing rule, not a measurement: it exists to refuse at once what can never fit, and
errs on the side of trying.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

_TILE = 32
"""Latent cells along a side of the largest tiles."""
_NEIGHBOURS = 15
"""Of a tile, on both sides together, that the encoder sees."""
_DECODER_COPIES = 20
"""Feature maps of full size and width alive at once in the VAE's last stage; fitted to `AutoencoderKLWan` on
an H100.
"""
_ENCODER_COPIES = 10
"""The same of its encoder, of two latent frames a call; on an H200 4.2 GiB for 832x480, 81 frames."""


class LastStage(NamedTuple):
    """A VAE's decoder where it is largest: its channels, and along a side how many of its cells a latent cell
    becomes and how many pixels each of them makes.
    """

    channels: int
    growth: int = 8
    patch: int = 1


@dataclass(frozen=True)
class MemoryEstimate:
    """What an estimate is made from.

    Attributes:
        parts: (kind, bytes of its weights) of each part, as in `offload`.
        block: bytes of the largest transformer block.
        dim, ffn_dim: widths of the transformer.
        vae_stage: of the VAE's decoder.
        item: bytes of a number in the run's dtype.
        has_control: whether a control stream runs beside the transformer's.
        encodes_video: whether the VAE encodes as many frames as it decodes, as for image to video.
        on_cpu: home and device are the same memory, so that levels 2 to 4 save nothing.
    """

    parts: Mapping[str, tuple[str, int]]
    block: int
    dim: int
    ffn_dim: int
    vae_stage: LastStage
    item: int
    on_cpu: bool = False
    encodes_video: bool = False
    has_control: bool = False

    def weights(self, level: int, running: str) -> int:
        """Bytes of weights on the device while part `running` runs."""
        kind, own = self.parts[running]
        if level < 2 or self.on_cpu:
            return sum(size for _, size in self.parts.values())
        if level == 2:
            others = [part for name, part in self.parts.items() if name != running]
            return own + sum(size for other, size in others if other != "encoder")
        if kind != "denoiser":
            return own
        streamed = own if level == 3 else min(own, 2 * self.block)
        return streamed + sum(size for other, size in self.parts.values() if other == "decoder")

    def at_home(self, level: int) -> int:
        """Bytes of weights that stay in main memory at a level, beside those on the device."""
        if level < 2 or self.on_cpu:
            return 0
        return sum(size for kind, size in self.parts.values() if level > 2 or kind == "encoder")

    def denoising(self, tokens: int) -> int:
        """Bytes of activations in a transformer forward over `tokens`: float32 norms, q, k, v, and the
        feed-forward; a control stream, what enters it and its hint.
        """
        wide = 9 if self.has_control else 6
        return tokens * (16 * self.dim + self.item * (wide * self.dim + 2 * self.ffn_dim))

    def decoding(self, num_frames: int, height: int, width: int, tiled: bool) -> int:
        """Bytes of activations in the VAE's decode: four frames at full width, and the float32 video three
        times.
        """
        stage = self.vae_stage
        cells = height * width // stage.patch**2
        cells = min(cells, (_TILE * stage.growth) ** 2) if tiled else cells
        video = num_frames * height * width * 3 * 4
        return cells * 4 * stage.channels * self.item * _DECODER_COPIES + 3 * video

    def encoding(self, num_frames: int, height: int, width: int, tiled: bool) -> int:
        """Bytes of activations in the VAE's encode: eight frames at full width, and the video in float32 and
        once more.
        """
        stage = self.vae_stage
        cells = height * width // stage.patch**2
        cells = min(cells, ((_TILE + _NEIGHBOURS) * stage.growth) ** 2) if tiled else cells
        video = num_frames * height * width * 3 * 10
        return cells * 4 * stage.channels * self.item * _ENCODER_COPIES + video

    def peak(self, level: int, tokens: int, num_frames: int, height: int, width: int) -> int:
        """Bytes at the worst moment of a task."""
        encoding = self.encoding(num_frames, height, width, tiled=level >= 1) if self.encodes_video else 0
        activations = {
            "encoder": 0,
            "denoiser": self.denoising(tokens),
            "decoder": max(encoding, self.decoding(num_frames, height, width, tiled=level >= 1)),
        }
        return max(self.weights(level, name) + activations[kind] for name, (kind, _) in self.parts.items())
