"""The networks of one model together, each loaded straight to where it will first be used, in its dtype.

Knows the settings that decide where and as what; reading is `models.loading`'s, what is done with the
networks the engine's.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import nn

from chitu_diffusion.config import EngineConfig, cache_dir
from chitu_diffusion.errors import UsageError
from chitu_diffusion.models.folder import ModelFolder
from chitu_diffusion.models.kinds import EXPERT_ROLES, PARTS, PartKind, Role
from chitu_diffusion.models.loading import Originals, load_part, weight_files
from chitu_diffusion.models.registry import FoundModel
from chitu_diffusion.models.spec import ModelSpec
from chitu_diffusion.models.wan.image_encoder import ImageEncoder
from chitu_diffusion.models.wan.text_encoder import TextEncoder
from chitu_diffusion.models.wan.transformer import WanTransformer
from chitu_diffusion.models.wan.vae import WanVAE
from chitu_diffusion.ops.float8_linear import Float8Plan, has_float8_products
from chitu_diffusion.sampling.solvers import Sampler
from chitu_diffusion.weights.manifest import LoadedFolder

logger = logging.getLogger(__name__)

_HOME = torch.device("cpu")
_NOWHERE = torch.device("meta")


@dataclass(frozen=True)
class Networks:
    """A model's networks, wherever their weights lie.

    Attributes:
        spec: the model without its weights.
        parts: by role.
        scheduler: the checkpoint's `scheduler_config.json`.
        folder: where the weights came from, and which bytes they are; None for networks made in memory.
        config_sha256: of configs and tokenizer, likewise.
        originals: of transformers from files: what each parameter was.
    """

    spec: ModelSpec
    parts: Mapping[Role, nn.Module]
    scheduler: Mapping[str, Any]
    folder: LoadedFolder | None = None
    config_sha256: str | None = None
    originals: Mapping[Role, Originals] = field(default_factory=dict)

    @property
    def experts(self) -> Sequence[WanTransformer]:
        """One transformer, or two: high noise first."""
        return [cast(WanTransformer, self.parts[role]) for role in EXPERT_ROLES if role in self.parts]

    @property
    def text_encoder(self) -> TextEncoder:
        """Prompts to embeddings."""
        return cast(TextEncoder, self.parts["text_encoder"])

    @property
    def image_encoder(self) -> ImageEncoder:
        """Pictures to rows, where the model has one."""
        return cast(ImageEncoder, self.parts["image_encoder"])

    @property
    def vae(self) -> WanVAE:
        """Latents to videos, and videos to latents."""
        return cast(WanVAE, self.parts["vae"])

    def sampler(self, recipe: str | None) -> Sampler:
        """The solver with a recipe's schedule; None is the model's own.

        Raises:
            UsageError: no such recipe, or not for this model.
        """
        spec = self.spec.with_recipe(recipe)
        own = spec.defaults
        config = _with_shift(self.scheduler, own.shift)
        return Sampler(own.sampler, config, own.levels, own.sampler_recipe, spec.boundary)


def _with_shift(scheduler: Mapping[str, Any], shift: float | None) -> Mapping[str, Any]:
    """The checkpoint's scheduler config with the model's shift, for `chitu.json` may name another."""
    if shift is None:
        return scheduler
    key = "shift" if scheduler.get("_class_name") == "FlowMatchEulerDiscreteScheduler" else "flow_shift"
    rest = {name: value for name, value in scheduler.items() if name not in ("shift", "flow_shift")}
    return {**rest, key: shift}


def float8_plan(args: EngineConfig) -> Float8Plan | None:
    """Which layers the settings want in 8 bits; None for none."""
    if args.infer.quant == "none":
        return None
    return Float8Plan.from_text(args.infer.quant_keep, args.infer.quant_originals)


def check_quant(args: EngineConfig, device: torch.device, dtype: torch.dtype) -> None:
    """Whether a device can do what `infer.quant` asks: 8-bit products give bfloat16; where there are none,
    the numbers are right and the speed is not.

    Raises:
        UsageError: 8 bits and a dtype that is not bfloat16.
    """
    if args.infer.quant == "none":
        return
    if not has_float8_products(device):
        logger.warning(
            "infer.quant = fp8: %s has no 8-bit products; their numbers are computed in float32, slowly",
            device,
        )
    elif dtype != torch.bfloat16:
        name = str(dtype).removeprefix("torch.")
        raise UsageError(f"infer.quant = fp8 with dtype {name}: use bfloat16", field="infer.quant")


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

    An encoder is loaded into main memory from memory level 2, the transformers from level 3; the rest
    onto the device. In float16 the text encoder is bfloat16: T5's activations do not fit float16's range. An
    image encoder is float32.

    Raises:
        ModelError: no such model on this machine, or a faulty checkpoint.
        UsageError: a plan for 8 bits that does not fit the network.
    """
    folder = model.required()
    level = args.infer.diffusion.low_mem_level
    place: Mapping[PartKind, torch.device] = {
        "encoder": _NOWHERE if not encodes else _HOME if level >= 2 else device,
        "denoiser": _HOME if level >= 3 else device,
        "decoder": device,
    }
    loaded = LoadedFolder(folder.files, weight_files(folder), cache_dir())
    try:
        parts = {
            role: _part(args, folder, role, place[PARTS[role].kind], dtype) for role in folder.components
        }
        originals = {role: Originals(folder, role) for role in EXPERT_ROLES if role in folder.components}
        loaded.settle()
    except BaseException:
        loaded.close()
        raise
    return Networks(model.spec, parts, folder.scheduler, loaded, folder.config_sha256(), originals)


def networks_without_weights(args: EngineConfig, model: FoundModel, dtype: torch.dtype) -> Networks:
    """What `load_networks` gives, on the meta device: every size, no values. Reads configs, tokenizer
    and headers of GGUF files.

    Raises:
        ModelError, UsageError: as `load_networks`, but for what the weights' files hold.
    """
    folder = model.required()
    parts = {role: _part(args, folder, role, _NOWHERE, dtype) for role in folder.components}
    return Networks(model.spec, parts, folder.scheduler)


def _part(
    args: EngineConfig, folder: ModelFolder, role: Role, device: torch.device, dtype: torch.dtype
) -> nn.Module:
    if role == "text_encoder" and dtype == torch.float16:
        dtype = torch.bfloat16
    if role == "image_encoder":
        dtype = torch.float32  # as diffusers' own examples: it runs once
    plan = float8_plan(args)
    return load_part(folder, role, device=device, dtype=dtype, float8=plan, packed=args.infer.packed)
