"""Whether what stands at a video's name may be replaced: never where it shows something else, unless asked.

Knows files and recipes; loads no weights.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chitu_diffusion.cli.console import printable
from chitu_diffusion.errors import UsageError

if TYPE_CHECKING:
    from chitu_diffusion.config import EngineConfig
    from chitu_diffusion.models.registry import FoundModel
    from chitu_diffusion.models.spec import ModelSpec
    from chitu_diffusion.task import DiffusionTask

Fingerprint = Callable[[], Mapping[str, Any]]


def fingerprint_here(config: EngineConfig, model: FoundModel) -> Fingerprint:
    """Gives what would be loaded, found out when it is asked for, and once."""

    def found() -> Mapping[str, Any]:
        from chitu_diffusion.config import cache_dir
        from chitu_diffusion.pipelines.fingerprint import fingerprint_before_loading

        return fingerprint_before_loading(config, model, cache_dir())

    return functools.cache(found)


def refuse_others(tasks: Iterable[DiffusionTask], model: FoundModel, config: EngineConfig) -> None:
    """Where a resolved task's file shows something else than it will.

    Raises:
        UsageError: it does; names in what.
    """
    here = fingerprint_here(config, model)
    for task in tasks:
        path = str((task.resolved or task.params).save_path)
        if other := other_video(path, task, model.spec, config.output.quality, here):
            raise UsageError(f"save_path = {other_text(path, other, 'name')}", field="save_path")


def other_text(path: str, other: list[str], names: str) -> str:
    """What is said of a file that shows something else, and what to do: `names` is what else to name."""
    differs = printable("; ".join(other[:4]))
    return f"'{printable(path)}' shows something else ({differs}); use another {names}, or add --overwrite"


def other_video(
    path: str, task: DiffusionTask, spec: ModelSpec, quality: int, here: Fingerprint
) -> list[str] | None:
    """None where a resolved task's video stands, whole; [] where nothing does that is worth keeping; else in
    what the file there is another.
    """
    place = Path(path)
    if not os.path.lexists(place):
        return []
    if not place.is_file() and not place.is_dir():
        return ["neither a file nor a folder"]
    from chitu_diffusion.media.reading import is_cut, is_whole, read_recipe
    from chitu_diffusion.pipelines.same_recipe import same_recipe

    try:
        recipe = read_recipe(path)
    except UsageError as error:
        try:
            return [] if is_cut(path) else [str(error)]
        except OSError:
            return [str(error)]
    if other := same_recipe(recipe, task, spec, quality, here):
        return other
    resolved = task.resolved or task.params
    try:
        whole = is_whole(path, resolved.num_frames or 1, resolved.fps or 1)
    except UsageError:
        whole = False
    return None if whole else []
