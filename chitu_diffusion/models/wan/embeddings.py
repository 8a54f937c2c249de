"""What turns a latent, a time, a text and an image's rows into what the blocks take."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chitu_diffusion.models.wan.block import FeedForward, Float32LayerNorm, GeluLinear
from chitu_diffusion.models.wan.config import WanConfig
from chitu_diffusion.models.wan.positions import sinusoids


class PatchEmbedding(nn.Conv3d):
    """Turns a latent [B, C, T, H, W] into tokens [B, S, dim].

    The kernel equals the stride, so the convolution is a matrix product over patches; written as one, it
    needs no convolution library and rounds like every other product here. Only the weight's shape is that of
    a convolution.
    """

    def forward(self, latent: Tensor) -> Tensor:
        """Embeds; the latent's axes must be multiples of the patch."""
        batch, channels, frames, rows, columns = latent.shape
        p_t, p_h, p_w = self.kernel_size
        patches = latent.reshape(batch, channels, frames // p_t, p_t, rows // p_h, p_h, columns // p_w, p_w)
        # [B, t, h, w, C, p_t, p_h, p_w] -> [B, S, C * p_t * p_h * p_w]
        patches = patches.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(batch, -1, self.weight[0].numel())
        return F.linear(patches.to(self.weight.dtype), self.weight.flatten(1), self.bias)


class MLPEmbedding(nn.Module):
    """Linear, activation, linear: the time embedder (SiLU) and the text projection (tanh-GELU)."""

    def __init__(self, dim_in: int, dim: int, activation: nn.Module) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(dim_in, dim)
        self.activation = activation
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., dim_in] -> [..., dim], computed in the weights' dtype."""
        return cast(Tensor, self.linear_2(self.activation(self.linear_1(x.to(self.linear_1.weight.dtype)))))


class TimeTextEmbedding(nn.Module):
    """Projects time, text and, where the network takes one, an image to the width of the stream."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.freq_dim = config.freq_dim
        self.time_embedder = MLPEmbedding(config.freq_dim, config.dim, nn.SiLU())
        self.time_proj = nn.Linear(config.dim, 6 * config.dim)
        self.text_embedder = MLPEmbedding(config.text_dim, config.dim, nn.GELU(approximate="tanh"))
        if config.image_dim is not None:
            self.image_embedder = ImageEmbedding(config.image_dim, config.dim, config.pos_embed_seq_len)

    def embed_time(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """timestep [N] -> (time [N, dim], modulation [N, 6, dim]), in `time_proj`'s dtype.

        Sinusoids as in "Denoising Diffusion Probabilistic Models" (arXiv 2006.11239), cosines first. Autocast
        is off: timesteps reach 1000, and what a few bits lose here every block would feel.
        """
        with torch.autocast(device_type=timestep.device.type, enabled=False):
            time = self.time_embedder(sinusoids(timestep, self.freq_dim)).to(self.time_proj.weight.dtype)
            modulation = self.time_proj(F.silu(time)).unflatten(1, (6, -1))
        return time, modulation


class ImageEmbedding(nn.Module):
    """Projects an image encoder's rows to the width of the stream."""

    def __init__(self, image_dim: int, dim: int, positions: int | None) -> None:
        super().__init__()
        self.norm1 = Float32LayerNorm(image_dim)
        self.ff = FeedForward(image_dim, image_dim)
        self.ff.net[2] = nn.Linear(image_dim, dim)
        self.norm2 = Float32LayerNorm(dim)
        self.pos_embed = None if positions is None else nn.Parameter(torch.zeros(1, positions, image_dim))

    def forward(self, rows: Tensor) -> Tensor:
        """[B, I, image_dim] -> [B, I, dim]. The GELU is the exact one here."""
        first = cast(GeluLinear, self.ff.net[0]).proj
        dtype = first.weight.dtype
        rows = rows.to(dtype)
        if self.pos_embed is not None:
            rows = rows + self.pos_embed
        return cast(Tensor, self.norm2(self.ff.net[2](F.gelu(first(self.norm1(rows).to(dtype))))).to(dtype))
