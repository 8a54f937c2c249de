"""One block of the Wan transformer: self-attention, cross-attention to the text, feed-forward.

Single-device code on a residual stream of tokens. It takes the attention as an argument and knows nothing of the other
blocks, of positions beyond the rotary table it is handed, or of caches beyond a callable that it asks.
Precision is told in `chitu_diffusion.models.wan`.
"""

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chitu_diffusion.attention.kernels import AttentionFn, sdpa, sdpa_weighted
from chitu_diffusion.flexcache.seam import Level
from chitu_diffusion.models.prepared_text import TextKeys
from chitu_diffusion.models.wan_config import WanConfig

_ONEDNN = torch.backends.mkldnn.is_available()

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

    def forward(self, x: Tensor, where: Rope | TextKeys, attention: AttentionFn = sdpa) -> Tensor:
        """x [B, S, dim] attends to itself, with q and k turned by `where`'s positions, or to the keys of a text."""
        q = self.queries(x)
        if not isinstance(where, TextKeys):
            k, v = self.keys(x)
            out = attention(rotate(q, where).to(v.dtype), rotate(k, where).to(v.dtype), v)
        elif where.bias is None:
            out = sdpa(q.to(where.v.dtype), where.k, where.v)
        else:
            out = sdpa_weighted(q.to(where.v.dtype), where.k, where.v, where.bias)
        return cast(Tensor, self.to_out[0](out.flatten(2)))

    def queries(self, x: Tensor) -> Tensor:
        """Normalised queries of x [B, S, dim]: [B, S, heads, head_dim], in the norm's dtype."""
        # normed over all heads at once; under autocast the norm's dtype is float32, where the product is 16 bits
        return self.norm_q(self.to_q(x).to(self.norm_q.weight.dtype)).unflatten(2, (self.heads, -1))

    def keys(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised keys (in the norm's dtype) and values of x [B, L, dim], each [B, L, heads, head_dim]."""
        k = self.norm_k(self.to_k(x).to(self.norm_k.weight.dtype))
        return k.unflatten(2, (self.heads, -1)), self.to_v(x).unflatten(2, (self.heads, -1))


class GeluLinear(nn.Module):
    """The first half of the feed-forward: a projection and a tanh-approximated GELU."""

    def __init__(self, dim: int, ffn_dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, ffn_dim)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., dim] -> [..., ffn_dim]."""
        if _has_fused_gelu(x, self.proj):
            return cast(Tensor, torch.ops.mkldnn._linear_pointwise(x, self.proj.weight, self.proj.bias, "gelu", [], "tanh"))
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
    and streamed; `attend` is its first third alone.
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
        self, tokens: Tensor, text: TextKeys, modulation: Tensor, rope: Rope | None, attention: AttentionFn = sdpa
    ) -> Tensor:
        """One block.

        Args:
            tokens: [B, S, dim], the stream.
            text: of `text_keys`; its dtype is the one in which this block multiplies.
            modulation: [B, 6, dim] or [1, 6, dim], the projected time embedding.
            rope: (cos, sin) of the tokens' positions, [S, head_dim / 2] float32; None where `attend` was run already.
            attention: self-attention, in layout [B, S, heads, head_dim].
        """
        dtype, shifts = text.v.dtype, self.modulate(modulation)
        if rope is not None:
            tokens = add_gated(tokens, self.self_attention(tokens, shifts, dtype, rope, attention), shifts[2])
        tokens = add(tokens, self.cross_attention(tokens, text))
        return add_gated(tokens, self.feed_forward(tokens, shifts, dtype), shifts[5])

    def attend(
        self, tokens: Tensor, modulation: Tensor, rope: Rope, dtype: torch.dtype, attention: AttentionFn = sdpa
    ) -> Tensor:
        """The stream after the self-attention, which knows nothing of the text; `forward` without `rope` does the rest."""
        shifts = self.modulate(modulation)
        return add_gated(tokens, self.self_attention(tokens, shifts, dtype, rope, attention), shifts[2])

    def forward_at_sites(
        self, tokens: Tensor, text: TextKeys, modulation: Tensor, rope: Rope, attention: AttentionFn, ask: Ask
    ) -> Tensor:
        """`forward`, where `ask(level, compute, entering)` answers for each of the three modules."""
        shifts, dtype = self.modulate(modulation), text.v.dtype
        added = ask("attention", lambda: self.self_attention(tokens, shifts, dtype, rope, attention), tokens)
        attended = add_gated(tokens, added, shifts[2])
        crossed = add(attended, ask("cross", lambda: self.cross_attention(attended, text), attended))
        added = ask("ffn", lambda: self.feed_forward(crossed, shifts, dtype), crossed)
        return add_gated(crossed, added, shifts[5])

    def text_keys(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """k, v of the cross-attention for projected text rows [B, L, dim], each [B, L, heads, head_dim] in one dtype.

        They depend on the text alone: `PreparedText` asks once for all steps.
        """
        k, v = self.attn2.keys(rows)
        return k.to(v.dtype), v

    def modulate(self, modulation: Tensor) -> tuple[Tensor, ...]:
        """(shift, scale, gate) of the self-attention, then of the feed-forward; six of [B, 1, dim] float32."""
        return (self.scale_shift_table.float() + modulation.float()).chunk(6, dim=1)

    def self_attention(
        self, tokens: Tensor, shifts: tuple[Tensor, ...], dtype: torch.dtype, rope: Rope, attention: AttentionFn
    ) -> Tensor:
        """What the self-attention gives before its gate, [B, S, dim]."""
        x = (self.norm1(tokens) * (1 + shifts[1]) + shifts[0]).to(dtype)
        return cast(Tensor, self.attn1(x, rope, attention))

    def cross_attention(self, tokens: Tensor, text: TextKeys) -> Tensor:
        """What the attention to the text gives, [B, S, dim]. It has neither gate nor modulation."""
        return cast(Tensor, self.attn2(self.norm2(tokens).to(text.v.dtype), text))

    def feed_forward(self, tokens: Tensor, shifts: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
        """What the feed-forward gives before its gate, [B, S, dim]."""
        return cast(Tensor, self.ffn((self.norm3(tokens) * (1 + shifts[4]) + shifts[3]).to(dtype)))


def _has_fused_gelu(x: Tensor, linear: nn.Module) -> bool:
    """Whether oneDNN's product with a GELU in it may stand for the two: GELU alone takes a CPU as long as the product.

    It knows no gradients and no autocast.
    """
    plain = x.device.type == "cpu" and x.dtype == torch.float32 and isinstance(linear, nn.Linear)
    plain = plain and linear.weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    return plain and _ONEDNN and not torch.is_grad_enabled()


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Turns each neighbouring pair of channels of x [B, S, heads, head_dim] by its token's angles; in float32."""
    if x.device.type == "cpu":
        # the same products and sums in one pass, as complex numbers, for which a compiler for GPUs has no code
        turns = torch.complex(*rope)[:, None, :]  # [S, 1, head_dim / 2]
        return torch.view_as_real(torch.view_as_complex(x.float().unflatten(-1, (-1, 2))) * turns).flatten(-2).to(x.dtype)
    cos, sin = (part[:, None, :] for part in rope)  # [S, 1, head_dim / 2]
    even, odd = x.float().reshape(*x.shape[:-1], -1, 2).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).to(x.dtype)


def add(tokens: Tensor, added: Tensor) -> Tensor:
    """tokens + added in the stream's dtype, which autocast's own must not widen."""
    return tokens + added.to(tokens.dtype)


def add_gated(tokens: Tensor, added: Tensor, gate: Tensor) -> Tensor:
    """tokens + added * gate, summed in float32 and rounded once to the stream's dtype."""
    return (tokens.float() + added.float() * gate).to(tokens.dtype)
