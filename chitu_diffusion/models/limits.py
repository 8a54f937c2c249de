"""How large each number in a model's configs may be: what no network of this family comes near is refused
before anything is built of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from chitu_diffusion.errors import CheckpointError

MOST_SHIFT = 1000
MOST_MEASURED = 10_000


@dataclass(frozen=True)
class Limit:
    """What a field may hold.

    Attributes:
        low, high: of the number, or of each in a list.
        whole: whether it is a whole number.
        most: numbers in a list; 0 for a single number.
        optional: whether null may stand for it.
    """

    low: float
    high: float
    whole: bool = True
    most: int = 0
    optional: bool = False

    def __str__(self) -> str:
        kind = "whole number" if self.whole else "number"
        span = f"from {self.low:g} to {self.high:g}"
        return f"a list of at most {self.most} {kind}s {span}" if self.most else f"a {kind} {span}"

    def allows(self, value: object) -> bool:
        """Whether a value as JSON has it is within the limit."""
        if value is None:
            return self.optional
        if self.most:
            return isinstance(value, list | tuple) and len(value) <= self.most and all(map(self._one, value))
        return self._one(value)

    def _one(self, value: object) -> bool:
        if isinstance(value, bool):
            return self.high == 1 and self.whole
        if not isinstance(value, int if self.whole else int | float):
            return False
        return math.isfinite(value) and self.low <= value <= self.high


_RATE = Limit(0, 1, whole=False)
_CHANNELS = Limit(1, 4096)
TRANSFORMER = MappingProxyType(
    {
        "patch_size": Limit(1, 16, most=3),
        "num_attention_heads": Limit(1, 256),
        "attention_head_dim": Limit(1, 1024),
        "in_channels": _CHANNELS,
        "out_channels": Limit(1, 4096, optional=True),
        "text_dim": Limit(1, 65536),
        "freq_dim": Limit(1, 16384),
        "ffn_dim": Limit(1, 262144),
        "num_layers": Limit(1, 256),
        "rope_max_seq_len": Limit(1, 65536),
        "image_dim": Limit(1, 65536, optional=True),
        "added_kv_proj_dim": Limit(1, 65536, optional=True),
        "pos_embed_seq_len": Limit(1, 65536, optional=True),
        "vace_layers": Limit(0, 255, most=256, optional=True),
        "vace_in_channels": Limit(1, 4096, optional=True),
        "eps": _RATE,
    }
)
OFFICIAL_TRANSFORMER = MappingProxyType(
    {
        "patch_size": Limit(1, 16, most=3),
        "dim": Limit(1, 65536),
        "num_heads": Limit(1, 256),
        "in_dim": _CHANNELS,
        "out_dim": _CHANNELS,
        "vace_layers": Limit(0, 255, most=256, optional=True),
        "vace_in_dim": Limit(1, 4096, optional=True),
        "text_dim": Limit(1, 65536),
        "freq_dim": Limit(1, 16384),
        "ffn_dim": Limit(1, 262144),
        "num_layers": Limit(1, 256),
        "eps": _RATE,
    }
)
VAE = MappingProxyType(
    {
        "base_dim": Limit(1, 1024),
        "decoder_base_dim": Limit(1, 1024, optional=True),
        "z_dim": Limit(1, 1024),
        "dim_mult": Limit(1, 64, most=6),
        "num_res_blocks": Limit(1, 16),
        "attn_scales": Limit(0, 64, whole=False, most=6),
        "temperal_downsample": Limit(0, 1, most=6),
        "dropout": _RATE,
        "latents_mean": Limit(-1e6, 1e6, whole=False, most=1024),
        "latents_std": Limit(1e-9, 1e6, whole=False, most=1024),
        "in_channels": _CHANNELS,
        "out_channels": _CHANNELS,
        "patch_size": Limit(1, 8, optional=True),
        "scale_factor_temporal": Limit(1, 64, optional=True),
        "scale_factor_spatial": Limit(1, 64, optional=True),
    }
)
TEXT_ENCODER = MappingProxyType(
    {
        "vocab_size": Limit(1, 2_000_000),
        "d_model": Limit(1, 65536),
        "d_kv": Limit(1, 1024),
        "d_ff": Limit(1, 262144),
        "num_layers": Limit(1, 256),
        "num_heads": Limit(1, 256),
        "relative_attention_num_buckets": Limit(2, 4096),
        "relative_attention_max_distance": Limit(1, 65536),
        "dropout_rate": _RATE,
        "layer_norm_epsilon": _RATE,
        "initializer_factor": Limit(0, 1000, whole=False),
        "pad_token_id": Limit(0, 2_000_000, optional=True),
        "eos_token_id": Limit(0, 2_000_000, optional=True),
    }
)
IMAGE_ENCODER = MappingProxyType(
    {
        "hidden_size": Limit(1, 65536),
        "intermediate_size": Limit(1, 262144),
        "num_hidden_layers": Limit(2, 256),
        "num_attention_heads": Limit(1, 256),
        "num_channels": Limit(3, 3),
        "image_size": Limit(1, 1024),
        "patch_size": Limit(1, 256),
        "layer_norm_eps": _RATE,
        "projection_dim": Limit(1, 65536),
        "attention_dropout": _RATE,
        "initializer_range": Limit(0, 1000, whole=False),
        "initializer_factor": Limit(0, 1000, whole=False),
    }
)
PREPROCESSING = MappingProxyType(
    {
        "size": Limit(1, 1024),
        "crop_size": Limit(1, 1024),
        "image_mean": Limit(-10, 10, whole=False, most=3),
        "image_std": Limit(1e-3, 10, whole=False, most=3),
        "resample": Limit(0, 5),
        "rescale_factor": _RATE,
    }
)
"""Of `preprocessor_config.json`; a size that is a table is looked at as its one number."""
BOUNDARY = MappingProxyType({"boundary_ratio": Limit(0, 1, whole=False, optional=True)})
"""In `model_index.json`, or in a `chitu.json`."""


def check_limits(config: Mapping[str, Any], limits: Mapping[str, Limit], file: Path) -> None:
    """Looks at those fields of a config that have a limit.

    Raises:
        CheckpointError: one is beyond it; names file, field, value and limit.
    """
    for key, limit in limits.items():
        if key in config and not limit.allows(config[key]):
            raise CheckpointError(
                "a config has a value that no such model has",
                file=file,
                key=key,
                expected=str(limit),
                found=repr(config[key]),
            )
