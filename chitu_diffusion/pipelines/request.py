"""A request against a model: every None filled in, everything that the model cannot do refused.

Knows `DiffusionUserParams` and a model's spec; loads nothing and imports no torch, so that a request can be
checked before anything else happens.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from chitu_diffusion.errors import UsageError
from chitu_diffusion.flexcache.registry import cache_bytes, parse_flexcache, parse_strategy
from chitu_diffusion.flexcache.schedule import Schedule, Shapes
from chitu_diffusion.media.frame_rate import Rate
from chitu_diffusion.media.input_video import InputVideo
from chitu_diffusion.models.spec import ModelSpec
from chitu_diffusion.pipelines.input_checks import STRENGTH, check_control, check_image, check_video
from chitu_diffusion.sampling.recipes import recipe_of_names
from chitu_diffusion.sampling.registry import SOLVERS
from chitu_diffusion.task import CascadeStage, DiffusionTask, DiffusionUserParams
from chitu_diffusion.task.params import IMAGE_PREPROCESSING, MAX_SEED


def request_of(prompt: str | DiffusionUserParams, fields: Mapping[str, Any]) -> DiffusionUserParams:
    """The request that a prompt and fields of `DiffusionUserParams` make, or a request with some changed.

    Raises:
        UsageError: a name or a value that cannot be, or neither a prompt nor a request.
    """
    if isinstance(prompt, DiffusionUserParams):
        values = {f.name: vars(prompt)[f.name] for f in dataclasses.fields(prompt)}
        return DiffusionUserParams.from_mapping({**values, **fields}) if fields else prompt
    if not isinstance(prompt, str):
        raise UsageError(
            f"a {type(prompt).__name__} is no request: use a prompt, or DiffusionUserParams(prompt=...)",
            field="prompt",
        )
    return DiffusionUserParams.from_mapping({"prompt": prompt, **fields})


def require_own_paths(requests: Sequence[DiffusionUserParams]) -> None:
    """Requests that are made together write a file each.

    Raises:
        UsageError: two of them write the same.
    """
    paths = [os.path.abspath(request.save_path) for request in requests if request.save_path is not None]
    for path, count in Counter(paths).items():
        if count > 1:
            raise UsageError(
                f"save_path = {path!r} for {count} videos, of which one would be left: hand over a request "
                "for each, DiffusionUserParams(prompt, save_path=...), or result.save(...) each",
                field="save_path",
            )


def resolve_request(
    params: DiffusionUserParams, spec: ModelSpec, *, seed: int, task_id: str, output_dir: str | None
) -> DiffusionUserParams:
    """The request with the model's own value for each None.

    A cascade's height and width are its last stage's, its number of steps the sum of the stages'. One
    guidance scale for a model with two experts holds for both.

    Args:
        output_dir: for a file named by the task's id, where the request names none; None: then no file.

    Raises:
        UsageError: what this model cannot do, naming the field, the value and what to use.
    """
    spec = spec.with_recipe(_recipe_for(params))
    defaults = spec.defaults
    check_image(params, spec)
    check_video(params, spec)
    check_control(params, spec, _frames(params, spec))
    params = _with_input_shape(_with_cascade(params, len(spec.transformers)), spec)
    resolved = dataclasses.replace(
        params,
        negative_prompt=defaults.negative_prompt
        if params.negative_prompt is None
        else params.negative_prompt,
        height=params.height or defaults.height,
        width=params.width or defaults.width,
        num_frames=_frames(params, spec),
        fps=params.fps or _rate_of(params.video) or defaults.fps,
        strength=params.strength or (None if params.video is None or spec.kind.takes_control else STRENGTH),
        conditioning_scale=1.0
        if spec.kind.takes_control and params.conditioning_scale is None
        else params.conditioning_scale,
        num_inference_steps=params.num_inference_steps or defaults.steps,
        guidance_scale=resolve_guidance(params.guidance_scale, spec),
        shift=_shift(params, spec),
        sampler_recipe=defaults.sampler_recipe,
        image_preprocessing=params.image_preprocessing or (IMAGE_PREPROCESSING[0] if params.image else None),
        seed=seed,
        save_path=_path(params, task_id, output_dir),
    )
    for height, width in {
        (resolved.height, resolved.width),
        *((leg.height, leg.width) for leg in stages_of(resolved)),
    }:
        _check_size(spec, height or 0, width or 0, computed_frames(resolved, spec))
    _check_solver(spec, resolved)
    source = None if resolved.video is None else resolved.video.path
    if source and resolved.save_path and os.path.realpath(resolved.save_path) == os.path.realpath(source):
        raise UsageError(
            f"save_path = {resolved.save_path!r}: it is the video that is made anew; use another name",
            field="save_path",
        )
    return resolved


def _shift(params: DiffusionUserParams, spec: ModelSpec) -> float | None:
    own = spec.defaults.shift
    if params.shift not in (None, own) and spec.defaults.levels is not None:
        raise UsageError(
            f"shift = {params.shift:g}: {_sampled_by(spec)} is sampled on a list of noise levels, which has "
            "none; leave it out",
            field="shift",
        )
    return own if params.shift is None else float(params.shift)


def _sampled_by(spec: ModelSpec) -> str:
    """Whose list of noise levels it is."""
    recipe = spec.defaults.sampler_recipe
    return "this model" if recipe is None else f"sampler recipe {recipe}"


def _path(params: DiffusionUserParams, task_id: str, output_dir: str | None) -> str | None:
    if params.save_path is not None:
        return str(params.save_path)
    return None if output_dir is None else str(Path(output_dir) / f"{task_id}.mp4")


def resolve_task(task: DiffusionTask, spec: ModelSpec, output_dir: str | None) -> DiffusionUserParams:
    """A task's request with the model's own value for each None; what was resolved once stays.

    Raises:
        UsageError: what this model cannot do, naming the field, the value and what to use.
    """
    if task.resolved is not None:
        return task.resolved
    return resolve_request(task.params, spec, seed=task.seed, task_id=task.task_id, output_dir=output_dir)


def stages_of(resolved: DiffusionUserParams) -> tuple[CascadeStage, ...]:
    """The denoising stages of a resolved request: its cascade, or the one stage that there is."""
    if resolved.cascade:
        return resolved.cascade
    if resolved.height is None or resolved.width is None or resolved.num_inference_steps is None:
        raise UsageError("the request has not been resolved against a model yet", field="num_inference_steps")
    whole = resolved.num_inference_steps
    # as diffusers rounds
    steps = whole if resolved.video is None else int(whole * (resolved.strength or 1))
    return (CascadeStage(resolved.height, resolved.width, steps, steps / whole),)


def computed_frames(resolved: DiffusionUserParams, spec: ModelSpec) -> int:
    """Frames that a resolved request's latent stands for: those of the video, and before them a latent
    frame's for each reference image.
    """
    return (resolved.num_frames or 1) + spec.geometry.stride[0] * len(resolved.reference_images or ())


def steps_of(resolved: DiffusionUserParams) -> int:
    """Denoising steps that a resolved request takes: of a video's, those after its noise."""
    return sum(stage.num_inference_steps for stage in stages_of(resolved))


def check_cache(resolved: DiffusionUserParams, spec: ModelSpec, item: int, limit_gb: float | None) -> int:
    """Bytes that a resolved request's cache keeps at the most.

    Args:
        item: bytes of a number in the run's dtype.
        limit_gb: see `cache_bytes`.

    Raises:
        UsageError: a cache that cannot be, needs what was not measured, or keeps more than the limit.
    """
    steps = steps_of(resolved)
    parse_flexcache(resolved.flexcache, steps)
    if resolved.flexcache is not None:
        known = dataclasses.replace(
            Schedule.bare(steps), measured=spec.measured, calibration=spec.calibration, model=spec.name
        )
        parse_strategy(resolved.flexcache)[1].check_measured(known)
    return cache_bytes(resolved.flexcache, cache_shapes(resolved, spec, item), limit_gb)


def check_tokens(resolved: DiffusionUserParams, spec: ModelSpec, ranks: int) -> None:
    """Whether a resolved request has a token for each rank that shares its sequence.

    Raises:
        UsageError: a stage has fewer, naming the smallest sizes that have enough.
    """
    frames = computed_frames(resolved, spec)
    for stage in stages_of(resolved):
        height = stage.height
        width = stage.width
        while spec.tokens(frames, height, width) < ranks:
            height, width = (height, 2 * width) if width <= height else (2 * height, width)
        if (height, width) != (stage.height, stage.width):
            tokens = spec.tokens(frames, stage.height, stage.width)
            raise UsageError(
                f"{stage.width}x{stage.height} with {frames} frame(s): {tokens} token(s) cannot be shared by "
                f"{ranks} ranks; use {width}x{height} or larger, or at most {tokens} for a sequence",
                field="width",
            )


def cache_shapes(resolved: DiffusionUserParams, spec: ModelSpec, item: int) -> Shapes:
    """What the memory of a resolved request's cache is computed from.

    Args:
        item: bytes of a number in the run's dtype.
    """
    frames = computed_frames(resolved, spec)
    height = resolved.height or 0
    width = resolved.width or 0
    config = spec.transformers[0]
    return Shapes(
        tokens=spec.tokens(frames, height, width),
        dim=config.dim,
        layers=config.num_layers,
        item=item,
        latent=math.prod(spec.latent_shape(frames, height, width)),
        branches=2 if max(guidance_pair(resolved.guidance_scale)) > 1 else 1,
    )


def guidance_pair(scale: float | tuple[float, float] | None) -> tuple[float, float]:
    """A resolved guidance scale as (high noise, low noise)."""
    if isinstance(scale, tuple):
        return scale
    return float(scale or 0.0), float(scale or 0.0)


def resolve_guidance(
    asked: float | tuple[float, float] | None, spec: ModelSpec
) -> float | tuple[float, float]:
    """A guidance scale for a model: one for each of its transformers.

    Raises:
        UsageError: more or fewer than there are.
    """
    experts = len(spec.transformers)
    if asked is None:
        own = spec.defaults.guidance
        return (own[0], own[-1]) if experts == 2 else own[0]
    if isinstance(asked, tuple):
        if experts == 1:
            raise UsageError(
                f"guidance_scale = {asked}: {spec.name} has one transformer; use one number",
                field="guidance_scale",
            )
        if len(asked) != 2:
            raise UsageError(
                f"guidance_scale = {asked}: one number, or two (high noise, low noise)",
                field="guidance_scale",
            )
        return asked
    return (asked, asked) if experts == 2 else asked


def _with_cascade(params: DiffusionUserParams, experts: int) -> DiffusionUserParams:
    if not params.cascade:
        return params
    last = params.cascade[-1]
    steps = sum(stage.num_inference_steps for stage in params.cascade)
    if params.cascade[0].strength != 1:
        raise UsageError(
            f"cascade strength = {params.cascade[0].strength}: the first stage starts from noise; use 1",
            field="cascade",
        )
    if params.image is not None:
        raise UsageError("image and cascade together are not supported; use one of them", field="cascade")
    if params.flexcache is not None:
        raise UsageError(
            "flexcache and cascade together are not supported; use one of them", field="flexcache"
        )
    for name, value in (("height", last.height), ("width", last.width), ("num_inference_steps", steps)):
        asked = vars(params)[name]
        if asked not in (None, value):
            raise UsageError(f"{name} = {asked}: the cascade makes it {value}; leave it out", field=name)
    for stage in params.cascade:
        if stage.expert is not None and stage.expert >= experts:
            raise UsageError(
                f"cascade expert = {stage.expert}: this model has {experts} transformer(s)", field="cascade"
            )
    return dataclasses.replace(params, height=last.height, width=last.width, num_inference_steps=steps)


def is_cut(spec: ModelSpec, resolved: DiffusionUserParams) -> bool:
    """Whether an image of another shape than the video's is cut, not stretched: so Wan2.2-TI2V-5B's authors
    do it.
    """
    return spec.kind.token_times and resolved.image_preprocessing == "official"


def _frames(params: DiffusionUserParams, spec: ModelSpec) -> int:
    """Frames that are asked for; else the model's own number, or what a shorter video has of 4n + 1."""
    if params.video is None:
        return params.num_frames or spec.defaults.num_frames
    step = spec.geometry.stride[0]
    there = (params.video.frames - 1) // step * step + 1
    if params.num_frames is not None and params.num_frames > there:
        raise UsageError(
            f"num_frames = {params.num_frames}: the video has {params.video.frames}; use at most {there}",
            field="num_frames",
        )
    return params.num_frames or min(there, spec.defaults.num_frames)


def _rate_of(video: InputVideo | None) -> Rate | None:
    """Frames per second of a video, where a file can have them."""
    return video.fps if video is not None and video.fps is not None and 1 <= video.fps <= 240 else None


def _with_input_shape(params: DiffusionUserParams, spec: ModelSpec) -> DiffusionUserParams:
    """Where no size is asked for: the model's number of pixels in the image's or video's shape, in whole
    patches.
    """
    given = params.image or params.video
    if given is None or params.height is not None or params.width is not None:
        return params
    height, width = spec.size_of_shape(given.height, given.width)
    try:
        return dataclasses.replace(params, height=height, width=width)
    except UsageError:
        name = "video" if params.image is None else "image"
        raise UsageError(
            f"{name}: it has {given.width}x{given.height} pixels, and in that shape a video would be "
            f"{width}x{height}; use height and width (--size)",
            field=name,
        ) from None


def _check_size(spec: ModelSpec, height: int, width: int, num_frames: int) -> None:
    for name, value, step in zip(("height", "width"), (height, width), spec.geometry.stride[1:], strict=True):
        if value % step:
            raise UsageError(f"{name} = {value}: {spec.name} takes multiples of {step}", field=name)
    step = spec.geometry.stride[0]
    if num_frames % step != 1 % step:
        raise UsageError(f"num_frames = {num_frames}: {spec.name} takes {step}n+1", field="num_frames")
    _, frames, rows, columns = spec.latent_shape(num_frames, height, width)
    patch = spec.transformers[0].patch_size
    longest = spec.transformers[0].rope_max_seq_len
    cells = (("num_frames", frames // patch[0]), ("height", rows // patch[1]), ("width", columns // patch[2]))
    for name, length in cells:
        if length > longest:
            raise UsageError(
                f"{name}: {length} tokens along one axis; {spec.name} has positions for {longest}", field=name
            )


def _recipe_for(params: DiffusionUserParams) -> str | None:
    """The request's, or that of a step-distilled adapter whose published name it has."""
    if params.sampler_recipe is not None or not params.lora:
        return params.sampler_recipe
    found = recipe_of_names(Path(each.path).name for each in params.lora)
    return None if found is None else found[0]


def _check_solver(spec: ModelSpec, resolved: DiffusionUserParams) -> None:
    """The steps fit the model's list of noise levels, and the cache its solver."""
    levels = spec.defaults.levels
    for stage in stages_of(resolved):
        if levels is not None:
            levels.require_steps(stage.num_inference_steps, stage.strength, _sampled_by(spec))
    if resolved.flexcache is None:
        return
    name, strategy = parse_strategy(resolved.flexcache)
    if resolved.lora and name == "plan":
        raise UsageError(
            "flexcache plan: it was calibrated without adapters, and lora makes the model another; use "
            "flexcache teacache, or leave one of them out",
            field="flexcache",
        )
    if strategy.needs_linear_solver and not SOLVERS[spec.defaults.sampler].linear:
        linear = " or ".join(sampler for sampler, kind in SOLVERS.items() if kind.linear)
        raise UsageError(
            f"flexcache {name} predicts along a path without fresh noise, and sampler "
            f"{spec.defaults.sampler} takes some at each step; use flexcache teacache, or infer.sampler = "
            f"{linear}",
            field="flexcache",
        )


def parse_seeds(text: str | None) -> list[int] | None:
    """`7` -> [7]; `7..9` -> [7, 8, 9]; None -> None.

    Raises:
        UsageError: neither a number nor a rising range of at most 1000.
    """
    if text is None:
        return None
    first, dots, last = text.partition("..")
    if _is_seed(first) and (not dots or _is_seed(last)):
        low = int(first)
        high = int(last or first)
        if low <= high < low + 1000:
            return list(range(low, high + 1))
    raise UsageError(
        f"--seed {text}: use a whole number from 0 to {MAX_SEED} (42), or a rising range of at most 1000 "
        "(42..45)",
        field="seed",
    )


def _is_seed(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 20 and int(text) <= MAX_SEED
