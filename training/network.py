"""The transformer's forward for training: the weights of a `WanTransformer`, each clip with two times.

The first latent frame has a time of its own: 0 where it is known (image to video), else that of the others.
That is diffusers' `expand_timesteps`, a time for each token, of which only two differ. Each block is one
compiled graph on a GPU. A test holds it to diffusers' own forward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chitu_diffusion.models.wan.block import WanBlock
from chitu_diffusion.models.wan.transformer import WanTransformer

_MANY = 256
Block = Callable[[WanBlock, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, int], Tensor]


class Velocity:
    """Calls a transformer for training.

    Args:
        dit: its parameters are used in place; linear layers may be wrapped by adapters.
        compiled: compile the block, once for each shape; a few clips without gradients are not worth it.
    """

    def __init__(self, dit: WanTransformer, compiled: bool = False) -> None:
        self.dit = dit
        self.compiled: Block = torch.compile(_block, dynamic=False) if compiled else _block

    def __call__(self, latent: Tensor, text: Tensor, bias: Tensor, time: Tensor, first: Tensor) -> Tensor:
        """The velocity [B, C, T, H, W].

        Args:
            latent: [B, C, T, H, W], normalised.
            text, bias: [B, L, D] and [B, L], of `text.encode`.
            time: [B], 0 to 1000, of all latent frames but the first.
            first: [B], of the first.
        """
        dit = self.dit
        patch = dit.config.patch_size
        grid = cast(tuple[int, int, int], tuple(n // p for n, p in zip(latent.shape[2:], patch, strict=True)))
        embedder = dit.condition_embedder
        times = torch.stack([first, time], dim=1).flatten()
        embedded, modulation = embedder.embed_time(times)
        embedded = embedded.float().unflatten(0, (-1, 2))  # [B, 2, D]
        modulation = modulation.float().unflatten(0, (-1, 2))  # [B, 2, 6, D]
        rows = embedder.text_embedder(text)
        weight = dit.patch_embedding.weight
        tokens = dit.patch_embedding(latent).to(weight.dtype)
        cos, sin = dit.rope_table(grid, latent.device)
        split = grid[1] * grid[2]
        block = self.compiled if torch.is_grad_enabled() or len(latent) >= _MANY else _block
        for layer in dit.blocks:
            tokens = block(cast(WanBlock, layer), tokens, rows, bias, modulation, cos, sin, split)
        shift, scale = (dit.scale_shift_table.float()[:, None] + embedded[:, :, None]).unbind(2)
        return dit.unpatchify(
            dit.proj_out(_normed(tokens, shift, scale, dit.config.eps, split)), grid
        ).float()


def _block(
    layer: WanBlock,
    tokens: Tensor,
    rows: Tensor,
    bias: Tensor,
    modulation: Tensor,
    cos: Tensor,
    sin: Tensor,
    split: int,
) -> Tensor:
    """One block on tokens [B, S, D], of which the first `split` have the first of two modulations."""
    table = layer.scale_shift_table.float()[:, None] + modulation
    shift, scale, gate, shift_ffn, scale_ffn, gate_ffn = table.unbind(2)  # each [B, 2, D]
    own = layer.attn1
    x = _normed(tokens, shift, scale, layer.eps, split)
    q = _turned(_heads(own.norm_q(own.to_q(x).float()), own.heads), cos, sin)
    k = _turned(_heads(own.norm_k(own.to_k(x).float()), own.heads), cos, sin)
    v = _heads(own.to_v(x), own.heads)
    attended = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v)
    tokens = tokens + own.to_out[0](attended.transpose(1, 2).flatten(2)) * _spread(gate, tokens, split)

    other = layer.attn2
    norm = cast(nn.LayerNorm, layer.norm2)
    x = F.layer_norm(tokens.float(), tokens.shape[-1:], norm.weight, norm.bias, layer.eps)
    q = _heads(other.norm_q(other.to_q(x).float()), other.heads)
    k = _heads(other.norm_k(other.to_k(rows).float()), other.heads)
    v = _heads(other.to_v(rows), other.heads)
    mask = bias[:, None, None].to(v.dtype).expand(-1, other.heads, q.shape[2], -1)
    attended = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v, attn_mask=mask)
    tokens = tokens + other.to_out[0](attended.transpose(1, 2).flatten(2))

    x = _normed(tokens, shift_ffn, scale_ffn, layer.eps, split)
    first, _, last = layer.ffn.net
    x = last(F.gelu(first.proj(x), approximate="tanh"))
    return tokens + x * _spread(gate_ffn, tokens, split)


def _spread(values: Tensor, tokens: Tensor, split: int) -> Tensor:
    """[B, 2, D] for the tokens of the first latent frame and for the others -> [B, S, D]."""
    is_first = (torch.arange(tokens.shape[1], device=tokens.device) < split)[None, :, None]
    return torch.where(is_first, values[:, :1], values[:, 1:])


def _normed(tokens: Tensor, shift: Tensor, scale: Tensor, eps: float, split: int) -> Tensor:
    x = F.layer_norm(tokens.float(), tokens.shape[-1:], None, None, eps)
    return x * (1 + _spread(scale, tokens, split)) + _spread(shift, tokens, split)


def _heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(2, (heads, -1)).transpose(1, 2)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions on [B, heads, S, d]; pairs of channels lie side by side."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)
