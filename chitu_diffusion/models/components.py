"""The networks of one model together, each loaded straight to where it will first be used, in its dtype.

Knows the settings that decide where and as what; reading is `models.loading`'s, what is done with the
networks the engine's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from chitu_diffusion.config import EngineConfig
from chitu_diffusion.models.loading import load_text_encoder, load_transformer, load_vae
from chitu_diffusion.models.registry import FoundModel
from chitu_diffusion.models.spec import ModelSpec
from chitu_diffusion.models.wan.text_encoder import TextEncoder
from chitu_diffusion.models.wan.transformer import WanTransformer
from chitu_diffusion.models.wan.vae import WanVAE
from chitu_diffusion.ops.float8_linear import Float8Plan

_HOME = torch.device("cpu")
_NOWHERE = torch.device("meta")
_EXPERTS: tuple[Literal["transformer", "transformer_2"], ...] = ("transformer", "transformer_2")


@dataclass(frozen=True)
class Networks:
    """A model's networks, wherever their weights lie.

    Attributes:
        spec: the model without its weights.
        experts: one transformer, or two: high noise first.
        scheduler: the checkpoint's `scheduler_config.json`.
        folder: where the weights came from; None for networks made in memory.
    """

    spec: ModelSpec
    experts: Sequence[WanTransformer]
    text_encoder: TextEncoder
    vae: WanVAE
    scheduler: Mapping[str, Any]
    folder: Path | None = None


def float8_plan(args: EngineConfig) -> Float8Plan | None:
    """Which layers the settings want in 8 bits; None for none."""
    if args.infer.quant == "none":
        return None
    return Float8Plan.from_text(args.infer.quant_keep, args.infer.quant_originals)


def load_networks(
    args: EngineConfig, model: FoundModel, device: torch.device, dtype: torch.dtype, *, encodes: bool = True
) -> Networks:
    """The networks of a model.

    Args:
        args: the settings.
        model: of `resolve_model`.
        device, dtype: where and as what.
        encodes: False where another rank encodes the text: the encoder is then its shapes alone, without
            weights.

    The text encoder is loaded into main memory from memory level 2, the transformers from level 3; the rest
    onto the device. In float16 the text encoder is bfloat16: T5's activations do not fit float16's range.

    Raises:
        ModelError: no such model on this machine, or a faulty checkpoint.
        UsageError: a plan for 8 bits that does not fit the network.
    """
    folder = model.required()
    level = args.infer.diffusion.low_mem_level
    experts_on = _HOME if level >= 3 else device
    text_on = _NOWHERE if not encodes else _HOME if level >= 2 else device
    text_dtype = torch.bfloat16 if dtype == torch.float16 else dtype
    text_encoder = load_text_encoder(folder, device=text_on, dtype=text_dtype)
    experts = [
        load_transformer(folder, role, device=experts_on, dtype=dtype, float8=float8_plan(args))
        for role in _EXPERTS
        if role in folder.components
    ]
    vae = load_vae(folder, device=device, dtype=dtype)
    return Networks(model.spec, experts, text_encoder, vae, folder.scheduler, folder.path)
