"""One block of the Wan transformer: self-attention, cross-attention to the text, feed-forward.

Single-device code on a residual stream of tokens. It takes the attention as an argument and knows nothing of
the other blocks, of positions beyond the rotary table it is handed, or of caches beyond a callable that it
asks. Precision is told in `chitu_diffusion.models.wan.transformer`.
"""

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chitu_diffusion.attention.cross_attention import cross_attention, has_fused_cross_attention
from chitu_diffusion.attention.kernels import DenseAttention, sdpa
from chitu_diffusion.flexcache.interface import Level
from chitu_diffusion.models.wan.config import WanConfig
from chitu_diffusion.models.wan.positions import RotaryTable
from chitu_diffusion.models.wan.text_kv import TextKV
from chitu_diffusion.models.wan.token_times import TimeRows
from chitu_diffusion.ops.float8_linear import wants_float8
from chitu_diffusion.ops.fused import (
    Float8Rows,
    add_gated,
    add_gated_norm,
    can_fuse,
    gelu,
    has_linear_gelu,
    layer_norm,
    linear_gelu,
    norm_and_rotate,
)
from chitu_diffusion.ops.packed_linear import wide_weight

_FEW_ROWS = 256
Activation = Tensor | Float8Rows  # what enters a matrix product: 8 bits only where its layer wants them
# (level, compute, entering tokens) -> module output
Ask = Callable[[Level, Callable[[], Tensor], Tensor], Tensor]


class Float32LayerNorm(nn.LayerNorm):
    """LayerNorm that works in float32 and returns float32, whatever dtype comes in."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalises x [..., dim] over its last axis."""
        weight = self.weight.float() if self.elementwise_affine else None
        bias = self.bias.float() if self.elementwise_affine else None
        return F.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps)


class WanAttention(nn.Module):
    """Attention with RMS-normalised queries and keys; of tokens among themselves, or over the text and, with
    `image`, over an image's rows as well: the two add up.
    """

    def __init__(self, dim: int, heads: int, eps: float, image: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.head_dim = dim // heads
        self.to_q = nn.Linear(dim, dim)
        self.to_k = nn.Linear(dim, dim)
        self.to_v = nn.Linear(dim, dim)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])
        self.norm_q = nn.RMSNorm(dim, eps=eps)
        self.norm_k = nn.RMSNorm(dim, eps=eps)
        if image:
            self.add_k_proj = nn.Linear(dim, dim)
            self.add_v_proj = nn.Linear(dim, dim)
            self.norm_added_k = nn.RMSNorm(dim, eps=eps)

    def project(self, x: Activation, rope: RotaryTable, fused: bool) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v of x [B, S, dim], each [B, S, heads, head_dim]: q and k normed over all heads and turned by
        position.
        """
        # in the norms' own dtype: under autocast that is float32, where the products are 16 bits
        q, k = (project(x).to(self.norm_q.weight.dtype) for project in (self.to_q, self.to_k))
        weights = (self.norm_q.weight, self.norm_k.weight)
        eps = cast(float, self.norm_q.eps)
        q, k = norm_and_rotate(q, k, weights, eps, rope, self.heads, fused=fused)
        v = self.to_v(x).unflatten(2, (self.heads, -1))
        return q.to(v.dtype), k.to(v.dtype), v

    def cross_attend(self, x: Activation, text: TextKV, fused: bool) -> Tensor:
        """x [B, S, dim] attends to the keys of a text; [B, S, dim]."""
        # many rows that all differ are left to torch, whose kernels are made for them
        fused = fused and (text.bias is not None or text.k.shape[1] <= _FEW_ROWS)
        fused = fused and has_fused_cross_attention(text.v.dtype, text.v.device, self.head_dim)
        query = (self.to_q(x), self.norm_q.weight, cast(float, self.norm_q.eps))
        attended = cross_attention(*query, text.k, text.v, text.bias, fused=fused)
        if text.image_k is not None and text.image_v is not None:
            attended = attended + cross_attention(*query, text.image_k, text.image_v, None, fused=False)
        return self.out(attended)

    def keys(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised keys and values of x [B, L, dim], each [B, L, heads, head_dim] in one dtype."""
        return self._keys(x, self.to_k, self.norm_k, self.to_v)

    def image_keys(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`keys` of an image's rows."""
        return self._keys(x, self.add_k_proj, self.norm_added_k, self.add_v_proj)

    def _keys(self, x: Tensor, to_k: nn.Module, norm_k: nn.RMSNorm, to_v: nn.Module) -> tuple[Tensor, Tensor]:
        k = norm_k(to_k(x).to(norm_k.weight.dtype)).unflatten(2, (self.heads, -1))
        v = to_v(x).unflatten(2, (self.heads, -1))
        return k.to(v.dtype), v

    def out(self, attended: Tensor) -> Tensor:
        """attended [B, S, heads, head_dim] -> [B, S, dim]."""
        return cast(Tensor, self.to_out[0](attended.flatten(2)))


class GeluLinear(nn.Module):
    """The first half of the feed-forward: a projection and a tanh-approximated GELU."""

    def __init__(self, dim: int, ffn_dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, ffn_dim)

    def forward(self, x: Activation, float8: bool = False, fused: bool = False) -> Activation:
        """x [..., dim] -> [..., ffn_dim], in 8 bits if whoever comes next wants that."""
        if isinstance(x, Float8Rows) or wants_float8(self.proj):
            return gelu(self.proj(x), float8=float8, fused=fused)
        weight = wide_weight(self.proj, x.dtype)
        if weight is None:
            return gelu(self.proj(x), float8=float8, fused=fused)
        if not float8 and has_linear_gelu(x, weight, fused):
            return linear_gelu(x, weight, self.proj.bias)
        return gelu(F.linear(x, weight, self.proj.bias), float8=float8, fused=fused)


class FeedForward(nn.Module):
    """dim -> ffn_dim -> dim. Index 1, a dropout in diffusers, is empty: the parameters keep their names."""

    def __init__(self, dim: int, ffn_dim: int) -> None:
        super().__init__()
        self.net = nn.ModuleList([GeluLinear(dim, ffn_dim), nn.Identity(), nn.Linear(ffn_dim, dim)])

    def forward(self, x: Activation, fused: bool = False) -> Tensor:
        """x [..., dim] -> [..., dim]."""
        return cast(Tensor, self.net[2](self.net[0](x, wants_float8(self.net[2]), fused)))


class WanBlock(nn.Module):
    """Self-attention, cross-attention and feed-forward on a residual stream.

    `self_attention`, `cross_attention` and `feed_forward` give what each module adds before its gate.
    `forward` is all of them in one piece, the unit that is checkpointed and streamed; `attend` is its first
    third alone. `PIECES` are what is compiled: all but the self-attention itself, which may be any callable
    (another library's kernel, an exchange between ranks) and never enters a graph.

    Attributes:
        fused: whether the work between the products is done by the kernels of `ops.fused`, where they can
            run.
    """

    PIECES = ("project", "after_attention", "cross_attention", "feed_forward")

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        dim = config.dim
        heads = config.num_attention_heads
        eps = config.eps
        self.fused = True
        self.eps = eps
        self.norm1 = Float32LayerNorm(dim, eps, elementwise_affine=False)
        self.attn1 = WanAttention(dim, heads, eps)
        self.attn2 = WanAttention(dim, heads, eps, image=config.image_dim is not None)
        self.norm2 = Float32LayerNorm(dim, eps) if config.cross_attn_norm else nn.Identity()
        self.ffn = FeedForward(dim, config.ffn_dim)
        self.norm3 = Float32LayerNorm(dim, eps, elementwise_affine=False)
        self.scale_shift_table = nn.Parameter(torch.empty(1, 6, dim).normal_(std=dim**-0.5))

    def forward(
        self,
        tokens: Tensor,
        text: TextKV,
        modulation: TimeRows,
        rope: RotaryTable | None,
        attention: DenseAttention = sdpa,
    ) -> Tensor:
        """One block.

        Args:
            tokens: [B, S, dim], the stream.
            text: of `text_keys`; its dtype is the one in which this block multiplies.
            modulation: [B or 1, R, 6, dim], the projected time embedding.
            rope: (cos, sin) of the tokens' positions, [S, head_dim / 2] float32; None where `attend` was run
                already.
            attention: self-attention, in layout [B, S, heads, head_dim].
        """
        if rope is None:
            return self.after_attention(tokens, None, text, modulation)
        attended = attention(*self.project(tokens, modulation, rope, text.v.dtype))
        return self.after_attention(tokens, attended, text, modulation)

    def attend(
        self,
        tokens: Tensor,
        modulation: TimeRows,
        rope: RotaryTable,
        dtype: torch.dtype,
        attention: DenseAttention = sdpa,
    ) -> Tensor:
        """The stream after the self-attention, which knows nothing of the text; `forward` without `rope` does
        the rest.
        """
        added = self.self_attention(tokens, modulation, rope, dtype, attention)
        gate = self.modulate(modulation)[2]
        return add_gated(tokens, added, gate, fused=self._fuses(tokens), split=modulation.split)

    def forward_at_sites(
        self,
        tokens: Tensor,
        text: TextKV,
        modulation: TimeRows,
        rope: RotaryTable,
        attention: DenseAttention,
        ask: Ask,
    ) -> Tensor:
        """`forward`, where `ask(level, compute, entering)` answers for each of the three modules."""
        shifts = self.modulate(modulation)
        dtype = text.v.dtype
        fused = self._fuses(tokens)
        added = ask(
            "attention", lambda: self.self_attention(tokens, modulation, rope, dtype, attention), tokens
        )
        attended = add_gated(tokens, added, shifts[2], fused=fused, split=modulation.split)
        added = ask("cross", lambda: self.cross_attention(attended, text), attended)
        crossed = add_gated(attended, added, None, fused=fused)
        added = ask("ffn", lambda: self.feed_forward(crossed, modulation, dtype), crossed)
        return add_gated(crossed, added, shifts[5], fused=fused, split=modulation.split)

    def text_keys(self, rows: Tensor, image: Tensor | None = None) -> tuple[Tensor, ...]:
        """k, v of the cross-attention for projected text rows [B, L, dim], each [B, L, heads, head_dim] in
        one dtype, and the same of an image's rows where there are any.

        They depend on the prompt and the image alone: `TextKVCache` asks once for all steps.
        """
        text = self.attn2.keys(rows)
        return text if image is None else (*text, *self.attn2.image_keys(image))

    def takes_bias(self, tokens: Tensor, dtype: torch.dtype) -> bool:
        """Whether the attention of `tokens` to a text of `dtype` takes rows with a bias, where else they are
        copied.
        """
        if tokens.device.type == "cpu":
            return True
        return self._fuses(tokens) and has_fused_cross_attention(dtype, tokens.device, self.attn2.head_dim)

    def modulate(self, modulation: TimeRows) -> tuple[Tensor, ...]:
        """(shift, scale, gate) of the self-attention, then of the feed-forward; six of [B or 1, R,
        dim] float32.
        """
        return (self.scale_shift_table.float() + modulation.rows.float()).unbind(2)

    def self_attention(
        self,
        tokens: Tensor,
        modulation: TimeRows,
        rope: RotaryTable,
        dtype: torch.dtype,
        attention: DenseAttention,
    ) -> Tensor:
        """What the self-attention gives before its gate, [B, S, dim]."""
        return self.attn1.out(attention(*self.project(tokens, modulation, rope, dtype)))

    def project(
        self, tokens: Tensor, modulation: TimeRows, rope: RotaryTable, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v of the self-attention, each [B, S, heads, head_dim]."""
        shifts = self.modulate(modulation)
        fused = self._fuses(tokens)
        float8 = all(wants_float8(layer) for layer in (self.attn1.to_q, self.attn1.to_k, self.attn1.to_v))
        affine = (1 + shifts[1], shifts[0])
        split = modulation.split
        x = layer_norm(tokens, affine, self.eps, dtype, float8=float8, fused=fused, split=split)
        return self.attn1.project(x, rope, fused)

    def after_attention(
        self, tokens: Tensor, attended: Tensor | None, text: TextKV, modulation: TimeRows
    ) -> Tensor:
        """The block from the self-attention's output [B, S, heads, head_dim] on; None: the stream holds it
        already.
        """
        shifts = self.modulate(modulation)
        dtype = text.v.dtype
        fused = self._fuses(tokens)
        split = modulation.split
        if attended is not None and self._norm2 is not None:
            added = self.attn1.out(attended)
            to_8 = wants_float8(self.attn2.to_q)
            tokens, x = add_gated_norm(
                tokens, added, shifts[2], self._norm2, self.eps, dtype, float8=to_8, fused=fused, split=split
            )
        else:
            if attended is not None:
                tokens = add_gated(tokens, self.attn1.out(attended), shifts[2], fused=fused, split=split)
            x = self._before_text(tokens, dtype)
        added = self.attn2.cross_attend(x, text, fused)
        after = (1 + shifts[4], shifts[3])
        to_8 = wants_float8(self.ffn.net[0].proj)
        tokens, x = add_gated_norm(
            tokens, added, None, after, self.eps, dtype, float8=to_8, fused=fused, split=split
        )
        return add_gated(tokens, self.ffn(x, fused), shifts[5], fused=fused, split=split)

    def cross_attention(self, tokens: Tensor, text: TextKV) -> Tensor:
        """What the attention to the text gives, [B, S, dim]. It has neither gate nor modulation."""
        return self.attn2.cross_attend(self._before_text(tokens, text.v.dtype), text, self._fuses(tokens))

    def feed_forward(self, tokens: Tensor, modulation: TimeRows, dtype: torch.dtype) -> Tensor:
        """What the feed-forward gives before its gate, [B, S, dim]."""
        shifts = self.modulate(modulation)
        fused = self._fuses(tokens)
        float8 = wants_float8(self.ffn.net[0].proj)
        affine = (1 + shifts[4], shifts[3])
        split = modulation.split
        x = layer_norm(tokens, affine, self.eps, dtype, float8=float8, fused=fused, split=split)
        return cast(Tensor, self.ffn(x, fused))

    @property
    def _norm2(self) -> tuple[Tensor, Tensor] | None:
        """Weight and bias of the norm before the cross-attention, where there is one."""
        return (self.norm2.weight, self.norm2.bias) if isinstance(self.norm2, Float32LayerNorm) else None

    def _before_text(self, tokens: Tensor, dtype: torch.dtype) -> Activation:
        """What the cross-attention looks at, [B, S, dim]."""
        if self._norm2 is None:
            return tokens.to(dtype)
        float8 = wants_float8(self.attn2.to_q)
        return layer_norm(tokens, self._norm2, self.eps, dtype, float8=float8, fused=self._fuses(tokens))

    def _fuses(self, tokens: Tensor) -> bool:
        return self.fused and can_fuse(tokens)


class WanVACEBlock(WanBlock):
    """A block of the control stream (VACE, arXiv:2503.07598): a Wan block, and what it says to the main one.

    Args:
        first: whether it takes the main stream in.
    """

    def __init__(self, config: WanConfig, first: bool) -> None:
        super().__init__(config)
        self.proj_in = nn.Linear(config.dim, config.dim) if first else None
        self.proj_out = nn.Linear(config.dim, config.dim)

    def entering(self, control: Tensor, tokens: Tensor) -> Tensor:
        """The control stream [B, S, dim] before this block, given the main one before its first block."""
        if self.proj_in is None:
            return control
        return self.proj_in(control.to(self._dtype)).to(tokens.dtype) + tokens

    def hint(self, control: Tensor) -> Tensor:
        """What is added to the main stream, [B, S, dim], for the control stream after this block."""
        return cast(Tensor, self.proj_out(control.to(self._dtype)))

    @property
    def _dtype(self) -> torch.dtype:
        return cast(Tensor, self.proj_out.bias).dtype
