"""Whether the video in a file is the one that a request would give. Knows recipes; loads no weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from chitu_diffusion.attention import attention_kernel
from chitu_diffusion.backend import pick_device, pick_dtype
from chitu_diffusion.config import EngineConfig
from chitu_diffusion.errors import UsageError
from chitu_diffusion.models.registry import FoundModel
from chitu_diffusion.pipelines.recipe import attn_schedule_of, quant_of
from chitu_diffusion.sampling.noise_levels import levels_as_lists
from chitu_diffusion.sampling.solvers import Sampler
from chitu_diffusion.task import DiffusionTask

_NOT_OF_THE_VIDEO = ("save_path", "task_id", "role", "priority")


def same_recipe(
    made: Mapping[str, Any],
    task: DiffusionTask,
    model: FoundModel,
    config: EngineConfig,
    *,
    weights_sha256: Callable[[], str | None],
) -> list[str]:
    """What differs between a recipe and the one that a task would leave; nothing where its video stands.

    Machine, versions and memory level make no other video, and neither does which exact attention kernel
    "auto" takes; a seed that nobody asked for may be any.

    Args:
        made: the recipe.
        task: its request resolved.
        model: found on this machine, sampled as the settings say.
        config: the settings.
        weights_sha256: of the model's weights; is asked last, where all else agrees.

    Raises:
        ChituError: settings that the model or this machine cannot do.
    """
    expected = dict(_settings(task, model, config))
    differs = [*_differences(made, expected), *_attention(made, config)]
    theirs = made.get("params")
    params = dict(theirs) if isinstance(theirs, Mapping) else {}
    here = json.loads(json.dumps((task.resolved or task.params).to_mapping(), default=str))
    ignored = [*_NOT_OF_THE_VIDEO, *(["seed"] if task.params.seed is None else [])]
    for mapping in (params, here):
        for name in ("image", "last_image"):
            if isinstance(mapping.get(name), Mapping):
                mapping[name] = mapping[name].get("sha256")  # by whatever name
    differs += _differences(params, {name: value for name, value in here.items() if name not in ignored})
    return differs or list(_differences(made, {"weights_sha256": weights_sha256()}))


def _settings(task: DiffusionTask, model: FoundModel, config: EngineConfig) -> Iterator[tuple[str, Any]]:
    defaults = model.spec.defaults
    sampler = Sampler(defaults.sampler, model.required().scheduler, defaults.levels)
    lists = levels_as_lists(sampler.levels)
    yield "model", model.spec.name
    yield (
        "dtype",
        str(pick_dtype(config.infer.dtype, pick_device(config.infer.device))).removeprefix("torch."),
    )
    yield "quant", quant_of(config)
    yield "attn_schedule", attn_schedule_of(config)
    yield "fused", config.infer.fused
    yield "compile", config.infer.compile
    yield "sampler", {"name": sampler.name, "shift": sampler.shift, **lists}
    if str((task.resolved or task.params).save_path).lower().endswith(".mp4"):
        yield "quality", config.output.quality


def _attention(made: Mapping[str, Any], config: EngineConfig) -> Iterator[str]:
    kernel = str(made.get("attention"))
    asked = config.infer.attn_type
    try:
        same = (
            attention_kernel(kernel, setting="infer.attn_type").exact if asked == "auto" else kernel == asked
        )
    except UsageError:
        same = False  # no kernel of that name
    if not same:
        yield f"attention {kernel}, here {asked}"


def _differences(made: Mapping[str, Any], here: Mapping[str, Any]) -> Iterator[str]:
    for name, value in here.items():
        if made.get(name) != value:
            yield f"{name} {_short(made.get(name))}, here {_short(value)}"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
