"""What a run is about to do, told before anything is loaded: `--dry-run`, and the checks that every run makes
first.

The checks know models by their configs only, and import no torch; `--dry-run` looks at the machine, too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chitu_diffusion.cli.console import duration, emit, exit_code_of, printable, quoted, say, size
from chitu_diffusion.cli.launch import layout_of
from chitu_diffusion.errors import UsageError, counted

if TYPE_CHECKING:
    from chitu_diffusion.attn_schedule import AttnSchedule
    from chitu_diffusion.cli.flags import Args
    from chitu_diffusion.config import EngineConfig
    from chitu_diffusion.distributed.plan import ParallelPlan
    from chitu_diffusion.models.registry import FoundModel
    from chitu_diffusion.models.spec import ModelSpec
    from chitu_diffusion.pipelines.preflight import Memory, Outlook, Preflight
    from chitu_diffusion.task import DiffusionTask, DiffusionUserParams

_NVIDIA = Path("/dev/nvidiactl")
"""Is there where NVIDIA's driver runs."""


def find_model(config: EngineConfig, args: Args) -> FoundModel:
    """The model that the settings name, sampled as they say, which must be on this machine.

    Raises:
        ModelMissingError: no model has that name, or it is not here; the message tells how to get it.
        CheckpointError: its folder cannot be understood.
    """
    from chitu_diffusion.models.registry import model_of

    with args.named():
        model = model_of(config.models)
    model.required()
    return model._replace(spec=model.spec.with_sampler(config.infer.sampler))


def _say_model(model: FoundModel, quant: str) -> None:
    """Where it lies; of files that lie apart all of them, and what is stored in 8 bits."""
    from chitu_diffusion.models.kinds import EXPERT_ROLES
    from chitu_diffusion.models.loading import open_weights

    folder = model.required()
    say(f"model   {model.spec.name} in {folder.path}, its files whole")
    if folder.layout == "files":
        say(f"        with {', '.join(str(file) for file in folder.files.names if file != folder.path)}")
    found = {role: open_weights(folder, role).eight_bit for role in folder.components}
    kinds = {role: {str(each.stored.dtype) for each in weights.values()} for role, weights in found.items()}
    for role in (role for role in kinds if kinds[role]):
        said = " and ".join(sorted(kinds[role])).replace("torch.", "")
        hint = "; --quant fp8 multiplies in 8 bits, lossy" * (role in EXPERT_ROLES and quant == "none")
        say(f"        {role}: {said} in its file, widened to 16 or 32 bits while loading{hint}")


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
    from chitu_diffusion.pipelines.request import computed_frames, steps_of

    frames = resolved.num_frames or 1
    fps = resolved.fps or 1
    return {
        **resolved.to_mapping(),
        "seconds_of_video": round(float(frames / fps), 3),
        "steps_taken": steps_of(resolved),
        "tokens": spec.tokens(computed_frames(resolved, spec), resolved.height or 0, resolved.width or 0),
    }


def forecast(
    config: EngineConfig, spec: ModelSpec, tasks: Sequence[DiffusionTask], layout: ParallelPlan | None
) -> tuple[float, bool]:
    """Seconds that resolved tasks will take, beside loading, by the paces that this machine remembers; and
    whether it remembers some for all of them.
    """
    from chitu_diffusion.config import cache_dir
    from chitu_diffusion.pipelines.paces import Paces
    from chitu_diffusion.pipelines.time_left import TaskTimes, setup_of, units_of

    infer = config.infer
    ranks = 1 if layout is None else layout.world
    asked = setup_of(infer, spec.name, ranks, infer.device, infer.dtype, infer.threads)
    # torch, which would know, takes longer to import than all of this
    on_gpu = infer.device.startswith("cuda") or (infer.device == "auto" and _NVIDIA.exists())
    device = "cuda" if on_gpu else "cpu"
    times = TaskTimes(Paces.of_settings(cache_dir(), asked), device, spec.geometry.decoder_cost)
    units = [unit for task in tasks for unit in units_of(spec, task.resolved or task.params, infer)]
    return times.left(units), times.is_measured(units)


def forecast_text(seconds: float, is_measured: bool) -> str:
    """In words."""
    how = "by what was measured here" if is_measured else "a first guess: not all of it was measured here yet"
    return f"about {duration(seconds)} after loading ({how})"


def print_plan(
    config: EngineConfig,
    model: FoundModel,
    tasks: Sequence[DiffusionTask],
    layout: ParallelPlan | None,
    *,
    as_json: bool,
) -> int:
    """Print what would be made of resolved tasks, and make nothing.

    Returns:
        the exit code that the run would have: 0, or of what it would refuse.

    Raises:
        UsageError, ModelError: as `preflight`.
    """
    from chitu_diffusion.attn_schedule import AttnSchedule

    spec = model.spec
    folder = model.required().path
    level = config.infer.diffusion.low_mem_level
    found = look_ahead(config, model, tasks, layout)
    outlooks = [found.outlooks[task.task_id] for task in tasks]
    times = [forecast(config, spec, [task], layout) for task in tasks]
    plans = [
        {**plan_of(spec, task.resolved or task.params), "seconds": round(seconds, 2), "is_measured": measured}
        for task, (seconds, measured) in zip(tasks, times, strict=True)
    ]
    quant = config.infer.quant
    schedule = AttnSchedule.from_text(config.infer.attn_schedule)
    code = shared_code(outlook.problem for outlook in outlooks)
    if as_json:
        about: dict[str, Any] = {
            "model": spec.name,
            "folder": folder,
            "device": found.device,
            "low_mem_level": level,
        }
        about |= {"dtype": found.dtype, "attention": found.attention, "exit_code": code}
        about |= {"sampler": spec.defaults.sampler, "authors_shift": spec.authors_shift}
        ranks = None if layout is None else asdict(layout)
        told = [plan | _outlook_of(outlook) for plan, outlook in zip(plans, outlooks, strict=True)]
        emit("plan", **about, ranks=ranks, quant=quant, attn_schedule=config.infer.attn_schedule, tasks=told)
        return code
    _say_model(model, quant)
    say(f"device  {found.device}, dtype {found.dtype}, memory level {level}, attention {found.attention}")
    say_layout(layout)
    if quant != "none":
        share = f"{config.infer.quant_from:.0%}"
        kept = config.infer.quant_keep or "none"
        say(f"quant   {quant} linear layers after {share} of the steps (kept in 16 bits: {kept}); lossy")
    for plan, outlook, task in zip(plans, outlooks, tasks, strict=True):
        _say_video(spec, plan, task.resolved or task.params, outlook, schedule)
    say("nothing was made (--dry-run)")
    return code


def _say_video(
    spec: ModelSpec,
    plan: Mapping[str, Any],
    resolved: DiffusionUserParams,
    outlook: Outlook,
    schedule: AttnSchedule | None,
) -> None:
    own = spec.with_recipe(plan["sampler_recipe"]).defaults
    sampled = "on its list of noise levels" if own.levels else f"shift {plan['shift'] or 1:g}"
    late = "" if schedule is None else f", {schedule.describe(plan['steps_taken'])}"
    frames = counted(plan["num_frames"], "frame")
    say(
        f"video   {quoted(plan['prompt'])}\n"
        f"        {plan['width']}x{plan['height']}, {frames} at {plan['fps']} fps "
        f"({plan['seconds_of_video']:g} s), {counted(plan['tokens'], 'token')}\n"
        f"        {_steps_text(plan)}, guidance {plan['guidance_scale']}, seed "
        f"{plan['seed']}, "
        f"cache {setting_text(plan['flexcache'])}{late}\n"
        f"        sampler {own.sampler}, {sampled}\n"
        f"        to {plan['save_path']}\n"
        f"        {forecast_text(plan['seconds'], plan['is_measured'])}"
    )
    if outlook.memory is not None:
        say(f"memory  {_memory_text(outlook.memory)}")
    if resolved.lora:
        say(f"lora    {printable(', '.join(map(str, resolved.lora)))}")
    for note in (*outlook.notes, *lora_notes(spec, resolved)):
        say(f"note    {printable(note)}")
    if outlook.problem is not None:
        say(f"refused {printable(str(outlook.problem))}")


def _steps_text(plan: Mapping[str, Any]) -> str:
    steps = counted(plan["num_inference_steps"], "step")
    if plan["strength"] is None:
        return steps
    return f"{steps}, of which the last {plan['steps_taken']} are taken (strength {plan['strength']:g})"


def look_ahead(
    config: EngineConfig, model: FoundModel, tasks: Sequence[DiffusionTask], layout: ParallelPlan | None
) -> Preflight:
    """`preflight`, for one of many ranks in the layout that all will have."""
    from chitu_diffusion.config import rank_place
    from chitu_diffusion.pipelines.preflight import preflight

    place = rank_place() if layout is None else None
    if place is not None:
        layout = layout_of(config, model.spec, place.world)
    return preflight(config, model, tasks, layout)


def shared_code(problems: Iterable[BaseException | None]) -> int:
    """The exit code of a command whose tasks failed by these: the one that all share, else 1; 0 for none."""
    codes = {exit_code_of(problem) for problem in problems if problem is not None}
    return 0 if not codes else codes.pop() if len(codes) == 1 else 1


def _outlook_of(outlook: Outlook) -> dict[str, Any]:
    """As plain JSON values; sizes in bytes."""
    memory = None if outlook.memory is None else asdict(outlook.memory)
    problem = None if outlook.problem is None else str(outlook.problem)
    return {"memory": memory, "notes": list(outlook.notes), "problem": problem}


def _memory_text(memory: Memory) -> str:
    text = (
        f"about {size(memory.device)} of {size(memory.device_free)} free ({size(memory.device_total)} in all)"
    )
    if memory.host != memory.device:
        text += f" on the device, {size(memory.host)} of {size(memory.host_free)} free in main memory"
    return f"{text}, at level {memory.level}"


def say_layout(layout: ParallelPlan | None) -> None:
    """How the ranks share the work, where there are several."""
    if layout is not None and layout.world > 1:
        say(f"ranks   {layout.world}: {layout}")
