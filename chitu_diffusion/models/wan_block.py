"""One block of the Wan transformer: self-attention, cross-attention to the text, feed-forward.

Single-device code on a residual stream of tokens. It takes the attention as an argument and knows nothing of the other
blocks, of positions beyond the rotary table it is handed, or of caches beyond a callable that it asks.
Precision is told in `chitu_diffusion.models.wan`.
"""

from collections.abc import Callable
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chitu_diffusion.attention.kernels import AttentionFn, sdpa, sdpa_weighted
from chitu_diffusion.flexcache.seam import Level
from chitu_diffusion.models.wan_config import WanConfig

Rope = tuple[Tensor, Tensor]  # (cos, sin), each [S, head_dim / 2] float32
Ask = Callable[[Level, Callable[[], Tensor], Tensor], Tensor]  # (level, compute, entering tokens) -> module output


class Float32LayerNorm(nn.LayerNorm):
    """LayerNorm that works in float32 and returns float32, whatever dtype comes in."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalises x [..., dim] over its last axis."""
        weight = self.weight.float() if self.elementwise_affine else None
        bias = self.bias.float() if self.elementwise_affine else None
        return F.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps)


class WanAttention(nn.Module):
    """Attention with RMS-normalised queries and keys; of tokens among themselves or over the text."""

    def __init__(self, dim: int, heads: int, eps: float) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, dim)
        self.to_k = nn.Linear(dim, dim)
        self.to_v = nn.Linear(dim, dim)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])
        self.norm_q = nn.RMSNorm(dim, eps=eps)
        self.norm_k = nn.RMSNorm(dim, eps=eps)

    def forward(self, x: Tensor, source: Tensor, rope: Rope | None, attention: AttentionFn) -> Tensor:
        """x [B, S, dim] attends to source [B, L, dim]; with `rope`, q and k are turned by position (then L = S)."""
        # norms over all heads at once, then [B, S, heads, head_dim]
        q, k = self.to_q(x), self.to_k(source)
        # in the norm's own dtype: under autocast that is float32, where the products are 16 bits
        q = self.norm_q(q.to(self.norm_q.weight.dtype)).unflatten(2, (self.heads, -1))
        k = self.norm_k(k.to(self.norm_k.weight.dtype)).unflatten(2, (self.heads, -1))
        v = self.to_v(source).unflatten(2, (self.heads, -1))
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        out = attention(q.to(v.dtype), k.to(v.dtype), v)
        return cast(Tensor, self.to_out[0](out.flatten(2)))


class GeluLinear(nn.Module):
    """The first half of the feed-forward: a projection and a tanh-approximated GELU."""

    def __init__(self, dim: int, ffn_dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, ffn_dim)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., dim] -> [..., ffn_dim]."""
        return F.gelu(self.proj(x), approximate="tanh")


class FeedForward(nn.Module):
    """dim -> ffn_dim -> dim. The empty place at index 1 is a dropout in diffusers; it keeps the parameters' names."""

    def __init__(self, dim: int, ffn_dim: int) -> None:
        super().__init__()
        self.net = nn.ModuleList([GeluLinear(dim, ffn_dim), nn.Identity(), nn.Linear(ffn_dim, dim)])

    def forward(self, x: Tensor) -> Tensor:
        """x [..., dim] -> [..., dim]."""
        return cast(Tensor, self.net[2](self.net[0](x)))


class WanBlock(nn.Module):
    """Self-attention, cross-attention and feed-forward on a residual stream.

    `self_attention`, `cross_attention` and `feed_forward` give what each module adds before its gate; `add_gated` and
    plain addition put it on the stream. `forward` is all of them in one piece, the unit that is compiled, checkpointed
    and streamed.
    """

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        dim, heads, eps = config.dim, config.num_attention_heads, config.eps
        self.norm1 = Float32LayerNorm(dim, eps, elementwise_affine=False)
        self.attn1 = WanAttention(dim, heads, eps)
        self.attn2 = WanAttention(dim, heads, eps)
        self.norm2 = Float32LayerNorm(dim, eps) if config.cross_attn_norm else nn.Identity()
        self.ffn = FeedForward(dim, config.ffn_dim)
        self.norm3 = Float32LayerNorm(dim, eps, elementwise_affine=False)
        self.scale_shift_table = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)

    def forward(
        self,
        tokens: Tensor,
        text: Tensor,
        modulation: Tensor,
        rope: Rope,
        attention: AttentionFn,
        text_bias: Tensor | None = None,
    ) -> Tensor:
        """One block.

        Args:
            tokens: [B, S, dim], the stream.
            text: [B, L, dim]; its dtype is the one in which this block multiplies.
            modulation: [B, 6, dim], the projected time embedding.
            rope: (cos, sin) of the tokens' positions, [S, head_dim / 2] float32.
            attention: self-attention, in layout [B, S, heads, head_dim].
            text_bias: [B, L] added to the scores of the cross-attention, or None.
        """
        shifts = self.modulate(modulation)
        tokens = add_gated(tokens, self.self_attention(tokens, shifts, text.dtype, rope, attention), shifts[2])
        tokens = add(tokens, self.cross_attention(tokens, text, text_bias))
        return add_gated(tokens, self.feed_forward(tokens, shifts, text.dtype), shifts[5])

    def forward_at_sites(
        self,
        tokens: Tensor,
        text: Tensor,
        modulation: Tensor,
        rope: Rope,
        attention: AttentionFn,
        text_bias: Tensor | None,
        ask: Ask,
    ) -> Tensor:
        """`forward`, where `ask(level, compute, entering)` answers for each of the three modules."""
        shifts, dtype = self.modulate(modulation), text.dtype
        added = ask("attention", lambda: self.self_attention(tokens, shifts, dtype, rope, attention), tokens)
        attended = add_gated(tokens, added, shifts[2])
        crossed = add(attended, ask("cross", lambda: self.cross_attention(attended, text, text_bias), attended))
        added = ask("ffn", lambda: self.feed_forward(crossed, shifts, dtype), crossed)
        return add_gated(crossed, added, shifts[5])

    def modulate(self, modulation: Tensor) -> tuple[Tensor, ...]:
        """(shift, scale, gate) of the self-attention, then of the feed-forward; six of [B, 1, dim] float32."""
        return (self.scale_shift_table.float() + modulation.float()).chunk(6, dim=1)

    def self_attention(
        self, tokens: Tensor, shifts: tuple[Tensor, ...], dtype: torch.dtype, rope: Rope, attention: AttentionFn
    ) -> Tensor:
        """What the self-attention gives before its gate, [B, S, dim]."""
        x = (self.norm1(tokens) * (1 + shifts[1]) + shifts[0]).to(dtype)
        return cast(Tensor, self.attn1(x, x, rope, attention))

    def cross_attention(self, tokens: Tensor, text: Tensor, text_bias: Tensor | None = None) -> Tensor:
        """What the attention to the text gives, [B, S, dim]. It has neither gate nor modulation."""
        attention = sdpa if text_bias is None else partial(sdpa_weighted, bias=text_bias)
        return cast(Tensor, self.attn2(self.norm2(tokens).to(text.dtype), text, None, attention))

    def feed_forward(self, tokens: Tensor, shifts: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
        """What the feed-forward gives before its gate, [B, S, dim]."""
        return cast(Tensor, self.ffn((self.norm3(tokens) * (1 + shifts[4]) + shifts[3]).to(dtype)))


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Turns each neighbouring pair of channels of x [B, S, heads, head_dim] by its token's angles; in float32."""
    cos, sin = (part[:, None, :] for part in rope)  # [S, 1, head_dim / 2]
    even, odd = x.float().reshape(*x.shape[:-1], -1, 2).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).to(x.dtype)


def add(tokens: Tensor, added: Tensor) -> Tensor:
    """tokens + added in the stream's dtype, which autocast's own must not widen."""
    return tokens + added.to(tokens.dtype)


def add_gated(tokens: Tensor, added: Tensor, gate: Tensor) -> Tensor:
    """tokens + added * gate, summed in float32 and rounded once to the stream's dtype."""
    return (tokens.float() + added.float() * gate).to(tokens.dtype)
