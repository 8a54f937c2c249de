"""What a run is about to do, told before anything is loaded: `--dry-run`, and the checks that every run makes
first.

Knows models by their configs only; torch is not imported.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chitu_diffusion.cli.console import emit, quoted, say
from chitu_diffusion.cli.flags import flags_named

if TYPE_CHECKING:
    from chitu_diffusion.config import EngineConfig
    from chitu_diffusion.models.spec import ModelSpec
    from chitu_diffusion.task import DiffusionUserParams


def find_model(config: EngineConfig) -> tuple[ModelSpec, Path]:
    """The model that the settings name, which must be on this machine.

    Raises:
        UsageError: no model has that name; the nearest is named.
        ModelMissingError: it is known, but not here; the message tells how to get it.
        CheckpointError: its folder cannot be understood.
    """
    from chitu_diffusion.models.registry import resolve_model

    with flags_named():
        model = resolve_model(config.models.name, config.models.ckpt_dir)
    return model.spec, model.required().path


def resolved_requests(
    spec: ModelSpec, config: EngineConfig, requests: Sequence[DiffusionUserParams]
) -> list[DiffusionUserParams]:
    """Every request with the model's own values in place of None.

    Raises:
        UsageError: what this model cannot do, naming the flag.
    """
    with flags_named():
        return [resolve(spec, config, params) for params in requests]


def resolve(spec: ModelSpec, config: EngineConfig, params: DiffusionUserParams) -> DiffusionUserParams:
    """One request with the model's own values in place of None; a seed of None becomes 0.

    Raises:
        UsageError: what this model cannot do, naming the field.
    """
    from chitu_diffusion.flexcache.registry import cache_bytes, parse_flexcache
    from chitu_diffusion.pipelines.request import cache_shapes, resolve_request

    task_id, seed = params.task_id or "task", params.seed or 0
    resolved = resolve_request(params, spec, seed=seed, task_id=task_id, output_dir=config.output.dir)
    parse_flexcache(resolved.flexcache, resolved.num_inference_steps or 1)
    # what "auto" will be is not known yet: the least is checked here, the rest when the engine takes the
    # request in
    item = 4 if config.infer.dtype == "float32" else 2
    cache_bytes(
        resolved.flexcache, cache_shapes(resolved, spec, item), config.infer.diffusion.cache_memory_gb
    )
    return resolved


def plan_of(spec: ModelSpec, resolved: DiffusionUserParams) -> dict[str, Any]:
    """A resolved request as plain JSON values, with what follows from it."""
    frames, fps = resolved.num_frames or 1, resolved.fps or 1
    return {
        **resolved.to_mapping(),
        "seconds_of_video": round(frames / fps, 3),
        "tokens": spec.tokens(frames, resolved.height or 0, resolved.width or 0),
    }


def print_plan(
    config: EngineConfig,
    spec: ModelSpec,
    folder: Path,
    requests: Sequence[DiffusionUserParams],
    *,
    as_json: bool,
) -> int:
    """Print what would be made of resolved requests, and make nothing."""
    level = config.infer.diffusion.low_mem_level
    plans = [plan_of(spec, resolved) for resolved in requests]
    quant = config.infer.quant
    device = config.infer.device
    if as_json:
        about = {"model": spec.name, "folder": folder, "device": device, "low_mem_level": level}
        emit("plan", **about, quant=quant, tasks=plans)
        return 0
    say(f"model   {spec.name} in {folder}")
    say(
        f"device  {device}, dtype {config.infer.dtype}, memory level {level}, attention "
        f"{config.infer.attn_type}"
    )
    if quant != "none":
        share, kept = f"{config.infer.quant_from:.0%}", config.infer.quant_keep or "none"
        say(f"quant   {quant} linear layers after {share} of the steps (kept in 16 bits: {kept}); lossy")
    for plan in plans:
        say(
            f"video   {quoted(plan['prompt'])}\n"
            f"        {plan['width']}x{plan['height']}, {plan['num_frames']} frames at {plan['fps']} fps "
            f"({plan['seconds_of_video']:g} s), {plan['tokens']} tokens\n"
            f"        {plan['num_inference_steps']} steps, guidance {plan['guidance_scale']}, seed "
            f"{plan['seed']}, "
            f"cache {plan['flexcache'] or 'none'}\n"
            f"        to {plan['save_path']}"
        )
    say("nothing was made (--dry-run)")
    return 0
