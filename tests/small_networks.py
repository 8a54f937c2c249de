"""Small Wan transformers with random weights, ours and diffusers', and a cache that is asked everywhere."""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers import WanTransformer3DModel, WanVACETransformer3DModel
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


def reference_class(config: WanConfig) -> type[WanTransformer3DModel | WanVACETransformer3DModel]:
    """Whose network it is there."""
    return WanTransformer3DModel if config.vace_layers is None else WanVACETransformer3DModel


def reference(config: WanConfig) -> WanTransformer3DModel:
    """diffusers' network with weights that make every part matter."""
    fields = {key: value for key, value in config.to_json().items() if not key.startswith("_")}
    model = reference_class(config)(**fields).eval()
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


def inputs(
    batch: int, frames: int, rows: int, columns: int, config: WanConfig = CONFIG
) -> tuple[Tensor, Tensor, Tensor]:
    latent = torch.randn(batch, config.in_channels, frames, rows, columns)
    timestep = torch.rand(batch) * 1000
    return latent, torch.randn(batch, 7, config.text_dim), timestep


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def official_names(layers: int, image_dim: int | None = None, places: int | None = None) -> set[str]:
    """What the official transformer's files hold, written down from its own code (wan/modules/model.py)."""
    top = ["patch_embedding", "text_embedding.0", "text_embedding.2", "time_embedding.0", "time_embedding.2"]
    linear = [*top, "time_projection.1", "head.head"]
    names = {f"{place}.{kind}" for place in linear for kind in ("weight", "bias")} | {"head.modulation"}
    attention = [f"{part}.{kind}" for part in "qkvo" for kind in ("weight", "bias")] + [
        "norm_q.weight",
        "norm_k.weight",
    ]
    rest = [
        "modulation",
        "norm3.weight",
        "norm3.bias",
        "ffn.0.weight",
        "ffn.0.bias",
        "ffn.2.weight",
        "ffn.2.bias",
    ]
    block = [f"{place}.{name}" for place in ("self_attn", "cross_attn") for name in attention] + rest
    if image_dim:
        image_layers = [f"img_emb.proj.{place}" for place in (0, 1, 3, 4)]
        names |= {f"{layer}.{kind}" for layer in image_layers for kind in ("weight", "bias")}
        names |= {"img_emb.emb_pos"} if places else set()
        block += [f"cross_attn.{part}_img.{kind}" for part in "kv" for kind in ("weight", "bias")]
        block += ["cross_attn.norm_k_img.weight"]
    return names | {f"blocks.{i}.{name}" for i in range(layers) for name in block}


def official_control_names(control: int) -> set[str]:
    """What the files of a network with a control stream hold besides (wan/modules/vace_model.py)."""
    if not control:
        return set()
    block = [name.removeprefix("blocks.0.") for name in official_names(1) if name.startswith("blocks.")]
    block += [f"after_proj.{kind}" for kind in ("weight", "bias")]
    names = {f"vace_blocks.{i}.{name}" for i in range(control) for name in block}
    first = ("vace_patch_embedding", "vace_blocks.0.before_proj")
    return names | {f"{place}.{kind}" for place in first for kind in ("weight", "bias")}
