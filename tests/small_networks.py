"""Small Wan transformers with random weights, ours and diffusers', and a cache that is asked everywhere."""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from chitu_diffusion.flexcache.interface import Site, SiteInputs
from chitu_diffusion.models.wan.transformer import WanConfig, WanTransformer

CONFIG = WanConfig(
    num_attention_heads=3,
    attention_head_dim=20,
    in_channels=6,
    out_channels=6,
    text_dim=24,
    freq_dim=32,
    ffn_dim=96,
    num_layers=3,
)

COMPILED = WanConfig(
    num_attention_heads=2,
    attention_head_dim=16,
    in_channels=4,
    out_channels=4,
    text_dim=24,
    freq_dim=32,
    ffn_dim=96,
    num_layers=5,
)
Inputs = tuple[Tensor, Tensor, Tensor]


def reference(config: WanConfig) -> WanTransformer3DModel:
    """diffusers' network with weights that make every part matter."""
    fields = {key: value for key, value in config.to_json().items() if not key.startswith("_")}
    model = WanTransformer3DModel(**fields).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = 1.5 * parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.3
            parameter.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, spread)
    return model


def twin(model: WanTransformer3DModel, config: WanConfig = CONFIG) -> WanTransformer:
    ours = WanTransformer(config).eval()
    ours.load_state_dict(model.state_dict())
    return ours


class EverySite:
    """A cache that is asked everywhere and always computes."""

    levels = frozenset({"step", "block", "attention", "cross", "ffn"})

    def at(self, site: Site, compute: Callable[[], Tensor], inputs: SiteInputs) -> Tensor:
        return compute()
