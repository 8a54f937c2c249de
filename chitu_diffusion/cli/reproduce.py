"""`chitu reproduce`: the video in a file made again from its recipe, and whether it is the same.

Knows recipes and how two videos differ; the video itself is `Engine.generate`'s.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from chitu_diffusion.cli.console import complain, emit, printable, say
from chitu_diffusion.cli.dry_run import find_model, task_for
from chitu_diffusion.cli.existing import refuse_others
from chitu_diffusion.cli.flags import Args, takes_flags
from chitu_diffusion.cli.launch import check_layout, launch
from chitu_diffusion.errors import UsageError, counted
from chitu_diffusion.files.places import expand_home

if TYPE_CHECKING:
    from chitu_diffusion.config import EngineConfig
    from chitu_diffusion.media.video import Frames
    from chitu_diffusion.models.registry import FoundModel
    from chitu_diffusion.pipelines.result import VideoResult
    from chitu_diffusion.task import DiffusionUserParams

NOT_THE_SAME = 5
_LOSSY = (".mp4", ".gif")
_SETTINGS = {
    "model": "models.name",
    "dtype": "infer.dtype",
    "attention": "infer.attn_type",
    "fused": "infer.fused",
    "compile": "infer.compile",
    "low_mem_level": "infer.diffusion.low_mem_level",
    "sampler.name": "infer.sampler",
    "quality": "output.quality",
    "quant.name": "infer.quant",
    "quant.keep": "infer.quant_keep",
    "quant.from": "infer.quant_from",
    "quant.originals": "infer.quant_originals",
}
"""What a recipe says, and the setting that it was."""
_OWN = (
    "seconds", "params.save_path", "params.task_id", "params.image.path", "params.last_image.path",
    "params.video.path", "params.mask.path", "params.reference_images.images",
)  # fmt: skip
"""What a run has for itself."""


@takes_flags
def reproduce(
    file: Annotated[
        Path, typer.Argument(help="A video that chitu wrote: .mp4, .gif, .npy or a folder of frames.")
    ],
    args: Args,
    context: typer.Context,
) -> int:
    """Make the video in a file again from its recipe, and say whether it is the same: exit code 0, else 5.

    Flags stand above what the recipe says, and that above --config. Example: chitu reproduce cat.mp4 --check
    """
    from chitu_diffusion.media.reading import read_frames, read_recipe

    file = expand_home(file)
    recipe = read_recipe(file)
    frames = read_frames(file)
    target = _target(file, args)
    config, _ = args.load_config(_settings_of(recipe))
    with args.named():
        params = _request_of(recipe, args.request_fields())
        for name, given in params.inputs().items():
            given.require_unchanged(name)  # before anything is loaded
    model = find_model(config, args)
    gpus = args["gpus"]
    with args.named():
        task_for(model, config, params, check_layout(config, model.spec, gpus))
        if target is not None and not args["overwrite"]:
            refuse_others([task_for(model, config, replace(params, save_path=target))], model, config)
    if gpus and gpus > 1:
        return launch(context.find_root().obj, gpus, config)
    with args.named():
        result = _make(_runnable(config, recipe), model, params, as_json=args["json"])
    again = _as_stored(result, file)
    found = compare_frames(frames, again)
    differs = differences(recipe, result.recipe)
    path = None if target is None else str(result.save(target))
    if args["json"]:
        emit("reproduced", **found, differs=differs, path=path)
    elif not args["quiet"]:
        _report(file, found, differs, path)
    elif not found["same"]:
        complain(_verdict(found))
    return 0 if found["same"] else NOT_THE_SAME


def _target(file: Path, args: Args) -> str | None:
    """Where the new video goes; None with `--check`."""
    from chitu_diffusion.media.video import check_save_path

    asked: Path | None = args["output"]
    if args["check"]:
        if asked is not None:
            raise UsageError("--check writes nothing: leave it out, or -o", field="save_path")
        return None
    target = file.with_name(f"{file.stem}-again{file.suffix}") if asked is None else asked
    if target.absolute() == file.absolute():
        raise UsageError(f"-o {target}: that is the video itself; use another name", field="save_path")
    with args.named():
        check_save_path(target)
    return str(target)


def _settings_of(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that a recipe names, by dotted name. A GPU of another name is as good as any."""
    from chitu_diffusion.attn_schedule import AttnSchedule

    said = dict(_leaves(recipe))
    settings = {setting: said[name] for name, setting in _SETTINGS.items() if said.get(name) is not None}
    if isinstance(late := recipe.get("attn_schedule"), Mapping):
        settings["infer.attn_schedule"] = AttnSchedule.from_recipe(late)
    return settings | ({"infer.device": "cpu"} if said.get("device") == "cpu" else {})


def _request_of(recipe: Mapping[str, Any], typed: Mapping[str, Any]) -> DiffusionUserParams:
    from chitu_diffusion.task import DiffusionUserParams

    params = recipe.get("params")
    if not isinstance(params, dict):
        raise UsageError("its recipe has no 'params': another program has changed it", field="file")
    own = {"seed": recipe.get("seed"), "save_path": None, "task_id": "again"}
    return DiffusionUserParams.from_mapping({**params, **own, **typed})


def _runnable(config: EngineConfig, recipe: Mapping[str, Any]) -> EngineConfig:
    """The settings, with another attention kernel where the recipe's does not run here; one that should have
    taken over late is left out there.
    """
    from chitu_diffusion.attention import attention_kernel
    from chitu_diffusion.attn_schedule import AttnSchedule
    from chitu_diffusion.backend import pick_device

    infer = config.infer
    late = AttnSchedule.from_text(infer.attn_schedule)
    said = _settings_of(recipe)
    for setting, name, other in (
        ("attn_type", infer.attn_type, "auto"),
        ("attn_schedule", late.kernel if late else None, None),
    ):
        if name is None or vars(infer)[setting] != said.get(f"infer.{setting}"):
            continue
        try:
            attention_kernel(name, device=pick_device(infer.device))
        except UsageError as error:
            say(f"attention kernel {name} cannot run here, the best one is taken: {printable(str(error))}")
            setattr(infer, setting, other)
    return config


def _make(
    config: EngineConfig, model: FoundModel, params: DiffusionUserParams, *, as_json: bool
) -> VideoResult:
    from chitu_diffusion.cli.progress import make_reporter
    from chitu_diffusion.task import DiffusionTask

    reporter = make_reporter(as_json=as_json)
    reporter.loading(config.models.name)
    began = time.monotonic()
    try:
        from chitu_diffusion.engine import Engine

        with Engine(config, model=model, on_event=reporter.advance) as engine:
            if not engine.is_driver:
                engine.run_worker()
                raise typer.Exit(0)
            reporter.loaded(time.monotonic() - began)
            reporter.begin(DiffusionTask.from_user_request(params), 1, 1)
            result = engine.generate(params)
            reporter.end(result.task)
            return result
    finally:
        reporter.close()


def _as_stored(result: VideoResult, file: Path) -> Frames:
    """The new frames as they come out of a file of the same format: equal frames are encoded alike."""
    from chitu_diffusion.media.reading import read_frames

    if file.is_dir() or file.suffix.lower() not in _LOSSY:
        return result.frames
    with tempfile.TemporaryDirectory() as folder:
        return read_frames(result.save(Path(folder, f"again{file.suffix}")))


def compare_frames(a: Frames, b: Frames) -> dict[str, Any]:
    """Two videos uint8 [T, H, W, 3], as JSON values.

    Returns:
        same; frames, [of a, of b]; psnr: dB over all of both, None where they are the same or of other
        shapes; first_differing_frame: from 0, or None.
    """
    import numpy as np

    found = {"same": False, "frames": [len(a), len(b)], "psnr": None, "first_differing_frame": None}
    if a.shape != b.shape:
        return found | {"shapes": [list(a.shape), list(b.shape)]}
    pairs = zip(a, b, strict=True)
    errors = [float(np.mean((x.astype(np.float64) - y) ** 2)) for x, y in pairs]
    if not any(errors):
        return found | {"same": True}
    psnr = 10 * math.log10(255**2 / (sum(errors) / len(errors)))
    first = next(index for index, error in enumerate(errors) if error)
    return found | {"psnr": round(psnr, 2), "first_differing_frame": first}


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Where two recipes differ, but for what each run has for itself: {dotted name: {"file", "here"}}."""
    before = dict(_leaves(old))
    after = dict(_leaves(new))
    return {
        name: {"file": before.get(name), "here": after.get(name)}
        for name in dict.fromkeys([*before, *after])
        if before.get(name) != after.get(name) and not name.startswith(_OWN)
    }


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for name, value in tree.items():
        if isinstance(value, Mapping):
            rows += _leaves(value, f"{prefix}{name}.")
        else:
            # as JSON has it, for one of the two has been a file
            rows.append((prefix + name, list(value) if isinstance(value, tuple) else value))
    return rows


def _verdict(found: Mapping[str, Any]) -> str:
    count = found["frames"][0]
    if found["same"]:
        return f"the same: {counted(count, 'frame')}, each identical"
    if found["psnr"] is None:
        before, after = found["shapes"]
        return f"not the same: {before} in the file, {after} here"
    first = found["first_differing_frame"]
    return f"not the same: PSNR {found['psnr']:.2f} dB, the first frame that differs is {first} of {count}"


def _report(
    file: Path, found: Mapping[str, Any], differs: Mapping[str, Mapping[str, Any]], path: str | None
) -> None:
    print(_verdict(found))
    for name, values in differs.items():
        print(printable(f"  {name}: {values['file']} in the file, {values['here']} here"))
    if not found["same"] and not differs and file.suffix.lower() in _LOSSY:
        say("the encoder may be another, or run on another number of cores: .npy and png folders have none")
    if path is not None:
        print(path, flush=True)
