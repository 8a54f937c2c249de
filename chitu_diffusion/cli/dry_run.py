"""What a run is about to do, told before anything is loaded: `--dry-run`, and the checks that every run makes
first.

Knows models by their configs only; torch is not imported.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from chitu_diffusion.cli.console import emit, quoted, say
from chitu_diffusion.cli.flags import flags_named

if TYPE_CHECKING:
    from chitu_diffusion.config import EngineConfig
    from chitu_diffusion.models.registry import FoundModel
    from chitu_diffusion.models.spec import ModelSpec
    from chitu_diffusion.task import DiffusionTask, DiffusionUserParams


def find_model(config: EngineConfig) -> FoundModel:
    """The model that the settings name, sampled as they say, which must be on this machine.

    Raises:
        UsageError: no model has that name; the nearest is named.
        ModelMissingError: it is known, but not here; the message tells how to get it.
        CheckpointError: its folder cannot be understood.
    """
    from chitu_diffusion.models.registry import resolve_model

    with flags_named():
        model = resolve_model(config.models.name, config.models.ckpt_dir)
    model.required()
    return model._replace(spec=model.spec.with_sampler(config.infer.sampler))


def task_for(model: FoundModel, config: EngineConfig, params: DiffusionUserParams) -> DiffusionTask:
    """A request's task, with the model's own values in place of None.

    Raises:
        UsageError: what this model cannot do, naming the field.
    """
    from chitu_diffusion.pipelines.request import check_cache, resolve_task
    from chitu_diffusion.task import DiffusionTask

    task = DiffusionTask.from_user_request(params)
    task.resolved = resolve_task(task, model.spec, config.output.dir)
    # what "auto" will be is not known yet: the least is checked here, the rest when the engine takes the
    # request in
    item = 4 if config.infer.dtype == "float32" else 2
    check_cache(task.resolved, model.spec, item, config.infer.diffusion.cache_memory_gb)
    return task


def check_room(tasks: Sequence[DiffusionTask], config: EngineConfig) -> None:
    """Whether the disks have room for the videos of resolved tasks, all together.

    Raises:
        UsageError: see `check_space`.
    """
    from chitu_diffusion.media.video import check_space

    requests = [task.resolved or task.params for task in tasks]
    videos = [
        (str(each.save_path), each.num_frames or 1, each.height or 0, each.width or 0) for each in requests
    ]
    check_space(videos, config.output.quality)


def plan_of(spec: ModelSpec, resolved: DiffusionUserParams) -> dict[str, Any]:
    """A resolved request as plain JSON values, with what follows from it."""
    frames = resolved.num_frames or 1
    fps = resolved.fps or 1
    return {
        **resolved.to_mapping(),
        "seconds_of_video": round(float(frames / fps), 3),
        "tokens": spec.tokens(frames, resolved.height or 0, resolved.width or 0),
    }


def print_plan(
    config: EngineConfig, model: FoundModel, tasks: Sequence[DiffusionTask], *, as_json: bool
) -> int:
    """Print what would be made of resolved tasks, and make nothing."""
    from chitu_diffusion.config import AttnSchedule

    spec = model.spec
    folder = model.required().path
    level = config.infer.diffusion.low_mem_level
    plans = [plan_of(spec, task.resolved or task.params) for task in tasks]
    quant = config.infer.quant
    schedule = AttnSchedule.from_text(config.infer.attn_schedule)
    device = config.infer.device
    if as_json:
        about = {"model": spec.name, "folder": folder, "device": device, "low_mem_level": level}
        emit("plan", **about, quant=quant, attn_schedule=config.infer.attn_schedule, tasks=plans)
        return 0
    say(f"model   {spec.name} in {folder}")
    say(
        f"device  {device}, dtype {config.infer.dtype}, memory level {level}, attention "
        f"{config.infer.attn_type}"
    )
    if quant != "none":
        share = f"{config.infer.quant_from:.0%}"
        kept = config.infer.quant_keep or "none"
        say(f"quant   {quant} linear layers after {share} of the steps (kept in 16 bits: {kept}); lossy")
    for plan in plans:
        late = "" if schedule is None else f", {schedule.describe(plan['num_inference_steps'])}"
        say(
            f"video   {quoted(plan['prompt'])}\n"
            f"        {plan['width']}x{plan['height']}, {plan['num_frames']} frames at {plan['fps']} fps "
            f"({plan['seconds_of_video']:g} s), {plan['tokens']} tokens\n"
            f"        {plan['num_inference_steps']} steps, guidance {plan['guidance_scale']}, seed "
            f"{plan['seed']}, "
            f"cache {plan['flexcache'] or 'none'}{late}\n"
            f"        to {plan['save_path']}"
        )
    say("nothing was made (--dry-run)")
    return 0
