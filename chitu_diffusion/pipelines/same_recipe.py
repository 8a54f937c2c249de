"""Whether the video in a file is the one that a request would give. Knows recipes; loads no weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from chitu_diffusion.models.spec import ModelSpec
from chitu_diffusion.pipelines.fingerprint import differences, sampler_of
from chitu_diffusion.task import DiffusionTask
from chitu_diffusion.task.params import INPUTS

_NOT_OF_THE_VIDEO = ("save_path", "task_id", "role", "priority")


def same_recipe(
    made: Mapping[str, Any],
    task: DiffusionTask,
    spec: ModelSpec,
    quality: int,
    fingerprint: Callable[[], Mapping[str, Any]],
) -> list[str]:
    """What differs between a recipe and the one that a task would leave; nothing where its video stands.

    Machine, versions and memory level make no other video, and neither does which exact attention kernel
    "auto" takes; a seed that nobody asked for may be any.

    Args:
        made: the recipe.
        task: its request resolved.
        spec: its model, with the settings' sampler.
        quality: of an mp4.
        fingerprint: of the model as it would be loaded; asked last, where all else agrees.

    Raises:
        ChituError: settings that the model or this machine cannot do.
    """
    resolved = task.resolved or task.params
    theirs = made.get("params")
    params = dict(theirs) if isinstance(theirs, Mapping) else {}
    here = json.loads(json.dumps(resolved.to_mapping(), default=str))
    ignored = [*_NOT_OF_THE_VIDEO, *(["seed"] if task.params.seed is None else [])]
    for mapping in (params, here):
        for name in INPUTS:
            if isinstance(mapping.get(name), Mapping):
                mapping[name] = mapping[name].get("sha256")  # by whatever name
    about: dict[str, Any] = {"model": spec.name}
    if str(resolved.save_path).lower().endswith(".mp4"):
        about["quality"] = quality
    differs = differences(made, about)
    differs += differences(params, {name: value for name, value in here.items() if name not in ignored})
    if differs:
        return differs
    loaded = fingerprint()
    shift = resolved.shift or loaded["sampler"]["shift"]
    return differences(
        made, {**loaded, "sampler": sampler_of(spec.with_recipe(resolved.sampler_recipe), shift)}
    )
