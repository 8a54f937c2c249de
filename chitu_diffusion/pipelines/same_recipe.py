"""Whether the video in a file is the one that a request would give. Knows recipes; loads no weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from chitu_diffusion.errors import OutputError, UsageError
from chitu_diffusion.files.places import identity
from chitu_diffusion.media.reading import read_recipe
from chitu_diffusion.models.spec import ModelSpec
from chitu_diffusion.pipelines.fingerprint import adapters_of, differences, sampler_of
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
        mapping.pop("lora", None)  # in the fingerprint, without their names
    about: dict[str, Any] = {"model": spec.name}
    if str(resolved.save_path).lower().endswith(".mp4"):
        about["quality"] = quality
    differs = differences(made, about)
    differs += differences(params, {name: value for name, value in here.items() if name not in ignored})
    if differs:
        return differs
    loaded = fingerprint()
    shift = resolved.shift or loaded["sampler"]["shift"]
    sampler = sampler_of(spec.with_recipe(resolved.sampler_recipe), shift)
    return differences(made, {**loaded, "adapters": adapters_of(resolved.lora), "sampler": sampler})


def require_own_place(task: DiffusionTask, path: str, recipe: Mapping[str, Any]) -> None:
    """Whether nobody has put another video at a task's path since an engine took the task in.

    Args:
        recipe: of the video that is to stand there; one of the same recipe may be replaced.

    Raises:
        OutputError: somebody has.
    """
    if task.replaces == () or identity(path) in (None, task.replaces):
        return
    try:
        same = _of_the_video(read_recipe(path)) == _of_the_video(recipe)
    except (UsageError, OSError):
        same = False
    if not same:
        raise OutputError(
            f"another run has put '{path}' there since this one began, and it shows something else; give the "
            "same command again with another name"
        )


def _of_the_video(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe as it is read from a file, without what each run has for itself."""
    read = json.loads(json.dumps(dict(recipe), default=str))
    kept = {name: value for name, value in read.items() if name != "seconds"}
    if isinstance(params := kept.get("params"), dict):
        kept["params"] = {name: value for name, value in params.items() if name not in _NOT_OF_THE_VIDEO}
    return kept
