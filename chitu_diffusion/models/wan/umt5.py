"""UMT5's encoder ("UniMax", arXiv 2304.09151; layers of T5, arXiv 1910.10683), under transformers' names.

Its own module, so that no run waits for the import of transformers; a test holds it to transformers' own, bit
by bit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chitu_diffusion.errors import UsageError


@dataclass(frozen=True)
class Umt5Config:
    """What a `config.json` says of the encoder; names and defaults are transformers'."""

    vocab_size: int = 250112
    d_model: int = 512
    d_kv: int = 64
    d_ff: int = 1024
    num_layers: int = 8
    num_heads: int = 6
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    feed_forward_proj: str = "gated-gelu"

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> Umt5Config:
        """What else stands there (labels, code, another attention) is none of the network's.

        Raises:
            UsageError: another feed-forward than Wan's encoder has.
        """
        names = {field.name for field in fields(cls)}
        found = cls(**{name: value for name, value in config.items() if name in names})
        if found.feed_forward_proj != "gated-gelu":
            raise UsageError(
                f"text encoder config has feed_forward_proj={found.feed_forward_proj!r}: use gated-gelu"
            )
        return found


class Umt5Encoder(nn.Module):
    """[1, tokens] -> [1, tokens, d_model]."""

    def __init__(self, config: Umt5Config) -> None:
        super().__init__()
        self.shared = nn.Embedding(config.vocab_size, config.d_model)
        self.encoder = _Stack(config, self.shared)

    def forward(self, ids: Tensor) -> Tensor:
        """Embeddings in the dtype of the weights.

        Args:
            ids: [B, L] int64, without padding.
        """
        x = self.shared(ids)
        buckets = self.encoder.buckets(ids.shape[1], ids.device)
        for block in self.encoder.block:
            x = block(x, buckets)
        normed: Tensor = self.encoder.final_layer_norm(x)
        return normed


class _Stack(nn.Module):
    def __init__(self, config: Umt5Config, shared: nn.Embedding) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = shared
        self.block = nn.ModuleList(_Block(config) for _ in range(config.num_layers))
        self.final_layer_norm = _Norm(config)

    def buckets(self, tokens: int, device: torch.device) -> Tensor:
        """[L, L] int64: the bucket of each distance. One half of them is for what comes later; in each half
        the near distances have their own, the far ones share on a logarithmic scale.
        """
        half = self.config.relative_attention_num_buckets // 2
        exact = half // 2
        places = torch.arange(tokens, device=device)
        distance = places[None, :] - places[:, None]
        away = distance.abs()
        scale = math.log(self.config.relative_attention_max_distance / exact)
        far = torch.log(away.float() / exact) / scale * (half - exact)
        far = (exact + far.clamp(min=0).long()).clamp(max=half - 1)
        return torch.where(away < exact, away, far) + (distance > 0) * half


class _Block(nn.Module):
    def __init__(self, config: Umt5Config) -> None:
        super().__init__()
        self.layer = nn.ModuleList([_SelfAttention(config), _FeedForward(config)])

    def forward(self, x: Tensor, buckets: Tensor) -> Tensor:
        attention, feed_forward = self.layer
        x = x + attention(x, buckets)
        changed: Tensor = x + feed_forward(x)
        return changed


class _SelfAttention(nn.Module):
    def __init__(self, config: Umt5Config) -> None:
        super().__init__()
        self.SelfAttention = _Attention(config)
        self.layer_norm = _Norm(config)

    def forward(self, x: Tensor, buckets: Tensor) -> Tensor:
        attended: Tensor = self.SelfAttention(self.layer_norm(x), buckets)
        return attended


class _Attention(nn.Module):
    """Attention of which every layer has its own bias by distance, and whose logits are not scaled."""

    def __init__(self, config: Umt5Config) -> None:
        super().__init__()
        self.heads = config.num_heads
        inner = config.num_heads * config.d_kv
        self.q = nn.Linear(config.d_model, inner, bias=False)
        self.k = nn.Linear(config.d_model, inner, bias=False)
        self.v = nn.Linear(config.d_model, inner, bias=False)
        self.o = nn.Linear(inner, config.d_model, bias=False)
        self.relative_attention_bias = nn.Embedding(config.relative_attention_num_buckets, config.num_heads)

    def forward(self, x: Tensor, buckets: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v)
        )
        bias = self.relative_attention_bias(buckets).permute(2, 0, 1)[None]  # [1, heads, L, L]
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)
        out: Tensor = self.o(attended.transpose(1, 2).flatten(2))
        return out


class _FeedForward(nn.Module):
    def __init__(self, config: Umt5Config) -> None:
        super().__init__()
        self.DenseReluDense = _Gated(config)
        self.layer_norm = _Norm(config)

    def forward(self, x: Tensor) -> Tensor:
        changed: Tensor = self.DenseReluDense(self.layer_norm(x))
        return changed


class _Gated(nn.Module):
    def __init__(self, config: Umt5Config) -> None:
        super().__init__()
        self.wi_0 = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.wi_1 = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.wo = nn.Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.wi_0(x)
        # written out: the fused gelu rounds otherwise
        bent = 1.0 + torch.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate.pow(3)))
        inner = 0.5 * gate * bent * self.wi_1(x)
        out: Tensor = self.wo(inner.to(self.wo.weight.dtype))  # stays float32 in a float16 network
        return out


class _Norm(nn.Module):
    """Root mean square, in float32."""

    def __init__(self, config: Umt5Config) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.d_model))
        self.eps = config.layer_norm_epsilon

    def forward(self, x: Tensor) -> Tensor:
        variance = x.float().pow(2).mean(-1, keepdim=True)
        normed = x * torch.rsqrt(variance + self.eps)
        if self.weight.dtype.itemsize < 4:
            normed = normed.to(self.weight.dtype)
        return self.weight * normed
