"""What a video follows from beside its request: weights, adapters, solver, precision, kernels.

One function makes it, before a model is loaded or after, and one compares: recipes, checkpoints, calibrations
and batches all ask here. Rounding that nobody asked for (which exact kernel, device, versions, threads) is no
part of it. Knows settings, models and backends; no tasks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from chitu_diffusion.attention import KERNELS, attention_kernel
from chitu_diffusion.backend import DiffusionBackend, pick_device, pick_dtype
from chitu_diffusion.config import AttnSchedule, EngineConfig
from chitu_diffusion.models.loading import weight_files
from chitu_diffusion.models.registry import FoundModel
from chitu_diffusion.models.spec import ModelSpec
from chitu_diffusion.sampling.noise_levels import levels_as_lists
from chitu_diffusion.task.lora import Lora
from chitu_diffusion.weights.hashing import hashes_of
from chitu_diffusion.weights.manifest import sha256_of

_AUTO = "auto"
_LONGEST_SAID = 60
_SAID_AS = {
    "weights_sha256": "weights",
    "config_sha256": "configs and tokenizer",
    "sampler.name": "sampler",
    "sampler.shift": "shift",
    "sampler.sigmas": "sigmas",
    "sampler.timesteps": "timesteps",
    "sampler.recipe": "sampler recipe",
    "attn_schedule": "attention schedule",
}


def fingerprint_of(
    backend: DiffusionBackend,
    shift: float | None = None,
    recipe: str | None = None,
    lora: Sequence[Lora] | None = None,
) -> dict[str, Any]:
    """Of a loaded model, as JSON values under the names that they have in a recipe. Waits for the hash of the
    weights.

    Args:
        shift, recipe, lora: of the request; None is the model's own, and no adapter.
    """
    sampler = backend.sampler_for(recipe)
    return _fingerprint(
        backend.args,
        backend.spec.with_recipe(recipe),
        weights_sha256=backend.weights_sha256(),
        config_sha256=backend.config_sha256,
        shift=sampler.shift if shift is None else shift,
        dtype=str(backend.dtype),
        attention=backend.attn_backend.name,
        lora=lora,
    )


def fingerprint_before_loading(
    config: EngineConfig, model: FoundModel, cache_dir: Path | None, shift: float | None = None
) -> dict[str, Any]:
    """`fingerprint_of` the model that these settings would load, without adapters. Hashes its weights, unless
    they are known.

    Args:
        model: with the settings' sampler.
        cache_dir: where hashes are remembered.
        shift: of the request; None is the model's own.

    Raises:
        ModelError: the model is not here, or a file of it cannot be read.
    """
    folder = model.required()
    own = model.spec.defaults.shift or 1.0
    return _fingerprint(
        config,
        model.spec,
        weights_sha256=sha256_of(folder.files, hashes_of(weight_files(folder), cache_dir)),
        config_sha256=folder.config_sha256(),
        shift=own if shift is None else shift,
        dtype=str(pick_dtype(config.infer.dtype, pick_device(config.infer.device))),
        attention=config.infer.attn_type,
    )


def identity_of(backend: DiffusionBackend, lora: Sequence[Lora] | None = None) -> dict[str, Any]:
    """What of a fingerprint is the model itself, however it is run; weights that are not hashed yet are None,
    so that no step waits for them.
    """
    weights = backend.weights_sha256() if backend.weights_are_hashed() else None
    return {"weights_sha256": weights, "config_sha256": backend.config_sha256, "adapters": adapters_of(lora)}


def adapters_of(lora: Sequence[Lora] | None) -> list[dict[str, Any]]:
    """A request's adapters as a fingerprint has them."""
    return [each.about() for each in lora or ()]


def _fingerprint(
    config: EngineConfig,
    spec: ModelSpec,
    *,
    weights_sha256: str | None,
    config_sha256: str | None,
    shift: float,
    dtype: str,
    attention: str,
    lora: Sequence[Lora] | None = None,
) -> dict[str, Any]:
    return {
        "weights_sha256": weights_sha256,
        "config_sha256": config_sha256,
        "adapters": adapters_of(lora),
        "sampler": sampler_of(spec, shift),
        "dtype": dtype.removeprefix("torch."),
        "quant": quant_of(config),
        "attention": attention,
        "attn_schedule": attn_schedule_of(config),
    }


def sampler_of(spec: ModelSpec, shift: float) -> dict[str, Any]:
    """The solver's part of a fingerprint: with whichever schedule and recipe the spec has."""
    own = spec.defaults
    said: dict[str, Any] = {"name": own.sampler, "shift": float(shift), **levels_as_lists(own.levels)}
    return said if own.sampler_recipe is None else {**said, "recipe": own.sampler_recipe}


def differences(made: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """Where two fingerprints differ, in words: "shift 3.0, here 12.0".

    Args:
        made: of a video, or what else was made: a recipe, of which only what a fingerprint has is looked at.
        here: a whole fingerprint, or a part of one. Its "auto" attention is as any exact kernel.
    """
    found = []
    for name, value in _leaves(here).items():
        before = _leaves(made).get(name)
        if before != value and not (name == "attention" and value == _AUTO and is_exact(before)):
            found.append(f"{_SAID_AS.get(name, name)} {_short(before)}, here {_short(value)}")
    return found


def is_exact(kernel: object) -> bool:
    """Whether an attention kernel of this name is there and approximates nothing."""
    return kernel in KERNELS and KERNELS[str(kernel)].exact


def quant_of(args: EngineConfig) -> dict[str, Any] | None:
    """How linear layers were rounded; None for not at all. It is lossy, so a video says it."""
    infer = args.infer
    if infer.quant == "none":
        return None
    kept = infer.quant_keep
    begins = infer.quant_from
    originals = infer.quant_originals
    return {"name": infer.quant, "lossy": True, "keep": kept, "from": begins, "originals": originals}


def attn_schedule_of(args: EngineConfig) -> dict[str, Any] | None:
    """Which attention kernel took over after how many steps, or which share of them; None for none.

    Raises:
        UsageError: no kernel has that name.
    """
    schedule = AttnSchedule.from_text(args.infer.attn_schedule)
    if schedule is None:
        return None
    lossy = not attention_kernel(schedule.kernel, setting="infer.attn_schedule").exact
    unit = "share" if schedule.of_share else "steps"
    return {"kernel": schedule.kernel, "lossy": lossy, f"after_{unit}": float(schedule.after)}


def _leaves(said: Mapping[str, Any]) -> dict[str, Any]:
    """The solver's values beside the others, each under a dotted name."""
    sampler = said.get("sampler")
    rest = {name: value for name, value in said.items() if name != "sampler"}
    solver = sampler if isinstance(sampler, Mapping) else {}
    return rest | {f"sampler.{name}": value for name, value in solver.items()}


def _short(value: Any) -> str:
    text = str(value)
    if len(text) == 64:
        return text[:12]
    return text if len(text) <= _LONGEST_SAID else f"{text[: _LONGEST_SAID - 3]}..."
