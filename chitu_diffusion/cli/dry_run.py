"""What a run is about to do, told before anything is loaded: `--dry-run`, and the checks that every run makes
first.

Knows models by their configs only; torch is not imported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from chitu_diffusion.cli.console import emit, printable, quoted, say
from chitu_diffusion.errors import UsageError

if TYPE_CHECKING:
    from chitu_diffusion.cli.flags import Args
    from chitu_diffusion.config import EngineConfig
    from chitu_diffusion.distributed.plan import ParallelPlan
    from chitu_diffusion.models.registry import FoundModel
    from chitu_diffusion.models.spec import ModelSpec
    from chitu_diffusion.task import DiffusionTask, DiffusionUserParams


def find_model(config: EngineConfig, args: Args) -> FoundModel:
    """The model that the settings name, sampled as they say, which must be on this machine.

    Raises:
        UsageError: no model has that name; the nearest is named.
        ModelMissingError: it is known, but not here; the message tells how to get it.
        CheckpointError: its folder cannot be understood.
    """
    from chitu_diffusion.models.registry import resolve_model

    with args.named():
        model = resolve_model(config.models.name, config.models.ckpt_dir)
    model.required()
    return model._replace(spec=model.spec.with_sampler(config.infer.sampler))


def picked_cache(spec: ModelSpec, args: Args) -> dict[str, Any]:
    """The request's cache by `--fidelity` or `--speedup`, as {"flexcache": ...}; {} where neither was typed.

    Says which it is and what to expect.

    Raises:
        UsageError: both, or a cache besides, or a model that was not calibrated, or more than it was found to
            keep.
    """
    fidelity = args["fidelity"]
    speedup = args["speedup"]
    if fidelity is speedup is None:
        return {}
    if args["cache"] is not None or None not in (fidelity, speedup):
        raise UsageError("--cache, --fidelity and --speedup: use one of them", field="flexcache")
    if spec.calibration is None:
        raise UsageError(
            f"{'--speedup' if fidelity is None else '--fidelity'}: {spec.name} was not calibrated; 'chitu "
            f"calibrate --model {args['model'] or spec.name}' does that",
            field="flexcache",
        )
    expected: float | None
    if fidelity is not None:
        row = spec.calibration.for_fidelity(fidelity)
        flexcache = dict(row.flexcache)
        expected = row.psnr[0]
        speedup = row.speedup
    else:
        flexcache, expected = spec.calibration.for_speedup(speedup)
    kept = "beyond what was checked" if expected is None else f"{expected:.1f} dB to expect"
    steps, guidance = (spec.calibration.about.get(name) for name in ("steps", "guidance"))
    videos = max((row.videos for row in spec.calibration.table), default=0)
    say(
        f"cache {setting_text(flexcache)}: {speedup:.3g} times fewer forwards, {kept} (PSNR against full "
        f"compute, mean over {videos} checked video(s) at {steps} steps, guidance "
        f"{guidance[0] if guidance else '-'})"
    )
    made = spec.calibration.about.get("sampler")
    here = {"name": spec.defaults.sampler, "shift": args["shift"] or spec.defaults.shift}
    if isinstance(made, Mapping) and any(made.get(name) != value for name, value in here.items()):
        say(
            f"it was checked with sampler {made.get('name')} at shift {made.get('shift')}, and this is "
            f"{here['name']} at {here['shift']}: another PSNR may follow; 'chitu calibrate' measures it"
        )
    return {"flexcache": flexcache}


def setting_text(flexcache: str | Mapping[str, Any] | None) -> str:
    """A cache as `--cache` takes it; "none" for none."""
    if flexcache is None or isinstance(flexcache, str):
        return flexcache or "none"
    more = ",".join(
        f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}"
        for key, value in flexcache.items()
        if key != "strategy"
    )
    return f"{flexcache['strategy']}:{more}".removesuffix(":")


def task_for(
    model: FoundModel, config: EngineConfig, params: DiffusionUserParams, layout: ParallelPlan | None = None
) -> DiffusionTask:
    """A request's task, with the model's own values in place of None.

    Args:
        layout: of the ranks that share it; None where they check it themselves.

    Raises:
        UsageError: what this model or layout cannot do, naming the field.
    """
    from chitu_diffusion.pipelines.request import check_cache, check_tokens, resolve_task
    from chitu_diffusion.task import DiffusionTask

    task = DiffusionTask.from_user_request(params)
    task.resolved = resolve_task(task, model.spec, config.output.dir)
    # what "auto" will be is not known yet: the least is checked here, the rest when the engine takes the
    # request in
    item = 4 if config.infer.dtype == "float32" else 2
    check_cache(task.resolved, model.spec, item, config.infer.diffusion.cache_memory_gb)
    check_tokens(task.resolved, model.spec, 1 if layout is None else layout.sequence)
    lora_notes(model.spec, task.resolved)
    return task


def lora_notes(spec: ModelSpec, resolved: DiffusionUserParams) -> list[str]:
    """What of a request's adapters has no place in the model. Imports torch where there are any.

    Raises:
        UsageError: one that cannot be used.
    """
    if not resolved.lora:
        return []
    from chitu_diffusion.adapters.merging import check_adapters

    return check_adapters(resolved.lora, spec.transformers)


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
    config: EngineConfig,
    model: FoundModel,
    tasks: Sequence[DiffusionTask],
    layout: ParallelPlan | None,
    *,
    as_json: bool,
) -> int:
    """Print what would be made of resolved tasks, and make nothing."""
    from chitu_diffusion.attn_schedule import AttnSchedule

    spec = model.spec
    folder = model.required().path
    level = config.infer.diffusion.low_mem_level
    plans = [plan_of(spec, task.resolved or task.params) for task in tasks]
    quant = config.infer.quant
    schedule = AttnSchedule.from_text(config.infer.attn_schedule)
    device = config.infer.device
    if as_json:
        about = {"model": spec.name, "folder": folder, "device": device, "low_mem_level": level}
        about |= {"sampler": spec.defaults.sampler, "authors_shift": spec.authors_shift}
        ranks = None if layout is None else asdict(layout)
        emit("plan", **about, ranks=ranks, quant=quant, attn_schedule=config.infer.attn_schedule, tasks=plans)
        return 0
    say(f"model   {spec.name} in {folder}")
    say(
        f"device  {device}, dtype {config.infer.dtype}, memory level {level}, attention "
        f"{config.infer.attn_type}"
    )
    say_layout(layout)
    if quant != "none":
        share = f"{config.infer.quant_from:.0%}"
        kept = config.infer.quant_keep or "none"
        say(f"quant   {quant} linear layers after {share} of the steps (kept in 16 bits: {kept}); lossy")
    for plan, task in zip(plans, tasks, strict=True):
        sampled = "on its list of noise levels" if spec.defaults.levels else f"shift {plan['shift'] or 1:g}"
        late = "" if schedule is None else f", {schedule.describe(plan['num_inference_steps'])}"
        say(
            f"video   {quoted(plan['prompt'])}\n"
            f"        {plan['width']}x{plan['height']}, {plan['num_frames']} frames at {plan['fps']} fps "
            f"({plan['seconds_of_video']:g} s), {plan['tokens']} tokens\n"
            f"        {plan['num_inference_steps']} steps, guidance {plan['guidance_scale']}, seed "
            f"{plan['seed']}, "
            f"cache {setting_text(plan['flexcache'])}{late}\n"
            f"        sampler {spec.defaults.sampler}, {sampled}\n"
            f"        to {plan['save_path']}"
        )
        resolved = task.resolved or task.params
        if resolved.lora:
            say(f"lora    {', '.join(map(str, resolved.lora))}")
        for note in (spec.shift_note(plan["shift"]), *lora_notes(spec, resolved)):
            if note:
                say(f"note    {printable(note)}")
    say("nothing was made (--dry-run)")
    return 0


def say_layout(layout: ParallelPlan | None) -> None:
    """How the ranks share the work, where there are several."""
    if layout is not None and layout.world > 1:
        say(f"ranks   {layout.world}: {layout}")
