"""`chitu calibrate`: what step caches need to know of a model, measured on it and checked on other prompts.

Full-compute runs of some prompts give second moments, TeaCache's polynomial and MagCache's ratios; a few of
them are run on from a wrong step, to see how errors grow. Plans of several speeds are then really run on
prompts and seeds that the fits did not see, and compared with full compute on raw frames. Knows evaluation's
parts and the calibration; no command line.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np

from chitu_diffusion.backend import DiffusionBackend
from chitu_diffusion.config import EngineConfig
from chitu_diffusion.errors import UsageError
from chitu_diffusion.evaluation.compare import compare, mean_interval
from chitu_diffusion.evaluation.traces import Trace, trace
from chitu_diffusion.evaluation.videos import make_video
from chitu_diffusion.evaluation.workers import Workers
from chitu_diffusion.flexcache.calibration import Calibration, Verified, triangle
from chitu_diffusion.flexcache.plan_search import Array
from chitu_diffusion.pipelines.fingerprint import fingerprint_of
from chitu_diffusion.pipelines.recipe import device_name

if TYPE_CHECKING:
    from chitu_diffusion.media.video import Frames

SPEEDS = (1.25, 1.5, 1.6, 1.8, 2.0, 2.25, 2.5, 3.0, 3.5, 4.0, 5.0)
"""Of the plans that are checked."""
_PROBED = (0.03, 0.06, 0.1, 0.16, 0.25, 0.4, 0.6, 0.8, 0.94)
"""Where errors are made, as shares of the schedule: close together at its start, where they grow most."""
_PROBED_RUNS = 2
_DEGREE = 4
"""Of TeaCache's polynomial, as published."""

OnLine = Callable[[str], None]


@dataclass(frozen=True)
class CalibrationRun:
    """A video: prompt and seed."""

    prompt: str
    seed: int


def calibrate(
    config: EngineConfig,
    fitted_on: Sequence[CalibrationRun],
    checked_on: Sequence[CalibrationRun],
    *,
    settings: dict[str, Any] | None = None,
    speeds: Sequence[float] = SPEEDS,
    workers: int = 1,
    on_line: OnLine = lambda text: None,
) -> Calibration:
    """Measures a model.

    Args:
        fitted_on: runs from which everything is fitted.
        checked_on: runs on which plans are checked; none of the former.
        settings: fields of `DiffusionUserParams` that differ from the model's defaults.
        speeds: of the plans that are checked.
        workers: processes that share the device.
        on_line: called with a line for each step of the work.

    Raises:
        UsageError: nothing to fit on, or a number of steps that leaves nothing to skip.
        TaskError: a run failed.
    """
    settings = settings or {}
    if not fitted_on:
        raise UsageError("nothing to measure on: use at least two prompts", field="prompts")
    with Workers(config, workers) as processes:
        processes.submit(describe, settings)
        about = processes.result()[1]
        steps = int(about["steps"])
        if steps < 4:
            raise UsageError(
                f"num_inference_steps = {steps}: use at least 4; a cache has nothing to skip",
                field="num_inference_steps",
            )
        probes = sorted({min(max(2, round(share * steps)), steps - 1) for share in _PROBED})
        for number, job in enumerate(fitted_on):
            processes.submit(
                trace,
                {"prompt": job.prompt, "seed": job.seed, **settings},
                probes if number < _PROBED_RUNS else (),
            )
        exact: dict[tuple[str, int], Frames] = {}
        for job in checked_on:
            processes.submit(frames_of, job, settings)
        traces: list[Trace] = []
        while processes.waiting:
            arguments, found = processes.result()
            if isinstance(found, Trace):
                traces.append(found)
                on_line(f"run {len(traces)} of {len(fitted_on)} traced")
            else:
                exact[arguments[0].prompt, arguments[0].seed] = found
                on_line(f"full compute {len(exact)} of {len(checked_on)} for the check")
        about |= {"prompts": len({job.prompt for job in fitted_on}), "runs": len(fitted_on)}
        calibration = fit(traces, about)
        table = _checked(processes, calibration, checked_on, exact, settings, speeds, on_line)
    return replace(calibration, table=table)


def describe(backend: DiffusionBackend, settings: dict[str, Any]) -> dict[str, Any]:
    """What is measured on."""
    from chitu_diffusion.pipelines.request import guidance_pair, resolve_task
    from chitu_diffusion.task import DiffusionTask, DiffusionUserParams

    if not backend.sampler.linear:
        raise UsageError(
            f"calibrating {backend.spec.name} with sampler {backend.sampler.name}: it takes fresh noise at "
            "each step, so that no velocity follows from those before; use --sampler euler",
            field="infer.sampler",
        )
    task = DiffusionTask.from_user_request(DiffusionUserParams(prompt="-", **settings))
    resolved = resolve_task(task, backend.spec, output_dir="")
    return {
        "model": backend.spec.name,
        **fingerprint_of(backend, resolved.shift, resolved.sampler_recipe),
        "steps": resolved.num_inference_steps,
        "guidance": list(guidance_pair(resolved.guidance_scale)),
        "size": [resolved.width, resolved.height, resolved.num_frames],
        "device": device_name(backend.device),
        "versions": {name: version(name) for name in ("torch", "diffusers")},
    }


def frames_of(backend: DiffusionBackend, job: CalibrationRun, settings: dict[str, Any]) -> Frames:
    """A video's frames by full compute."""
    return make_video(backend, prompt=job.prompt, seed=job.seed, **settings).frames


def nearness(
    backend: DiffusionBackend,
    job: CalibrationRun,
    settings: dict[str, Any],
    speed: float,
    calibration: Calibration,
    exact: Frames,
) -> tuple[float, float]:
    """PSNR and SSIM, means over frames, of a video by the plan of a speed."""
    if backend.spec.calibration != calibration:
        backend.use_calibration(calibration)
    plan = {"strategy": "plan", "speedup": speed}
    made = make_video(backend, prompt=job.prompt, seed=job.seed, flexcache=plan, **settings)
    found = compare(exact, made.frames, backend.device)
    return float(np.mean(found.psnr)), float(np.mean(found.ssim))


def fit(traces: Sequence[Trace], about: dict[str, Any]) -> Calibration:
    """Everything but the check."""
    # in the order of their numbers, not of their arrival, so that workers change no bit
    ordered = sorted(traces, key=lambda found: float(found.moments[0, 0]))
    moments = np.mean([found.moments for found in ordered], axis=0)
    ratios = np.mean([found.ratios for found in ordered], axis=0)
    signals = np.concatenate([found.signals[1:] for found in ordered])
    changes = np.concatenate([found.changes[1:] for found in ordered])
    return Calibration(
        about=about,
        sigmas=tuple(float(sigma) for sigma in ordered[0].sigmas),
        moments=triangle(moments.tolist()),
        gain=tuple(
            round(float(gain), 6) for gain in growth(ordered[0].sigmas, [found.gains for found in ordered])
        ),
        measured={
            "teacache": tuple(float(f"{value:.9g}") for value in polynomial(signals, changes)),
            "magcache": tuple(round(float(ratio), 6) for ratio in ratios),
        },
    )


def polynomial(signals: Array, changes: Array, degree: int = _DEGREE) -> Array:
    """TeaCache's fit (arXiv:2411.19108): least squares of the residual's change over the signal's, highest
    power first.

    On Wan the signal depends on the step alone, so that runs share their places; of fewer places than
    coefficients, fewer powers are fitted.
    """
    places = len(np.unique(np.round(signals, 12)))
    found = np.polynomial.Polynomial.fit(signals, changes, min(degree, places - 1)).convert().coef
    return np.concatenate([np.zeros(degree + 1 - len(found)), found[::-1]])


def growth(sigmas: Array, gains: Sequence[dict[int, float]]) -> Array:
    """How an error at each step has grown at the end, [n]: geometric mean over runs, linear in between; 1 if
    not measured.
    """
    probed = sorted({step for found in gains for step in found})
    steps = np.arange(len(sigmas) - 1)
    if not probed:
        return np.ones(len(steps))
    logs = [
        np.mean([np.log(found[step]) for found in gains if found.get(step, 0) > 0] or [0.0])
        for step in probed
    ]
    return np.asarray(np.exp(np.interp(steps, probed, logs)))


def _checked(
    processes: Workers,
    calibration: Calibration,
    jobs: Sequence[CalibrationRun],
    exact: dict[tuple[str, int], Frames],
    settings: dict[str, Any],
    speeds: Sequence[float],
    on_line: OnLine,
) -> tuple[Verified, ...]:
    """Plans of these speeds against full compute."""
    steps = len(calibration.sigmas) - 1
    # of speeds that come to the same number of computed steps the slowest stays, for it promises no more than
    # it keeps
    counts = {int(steps / speed + 1e-9): float(speed) for speed in sorted(speeds, reverse=True)}
    near: dict[float, list[tuple[float, float]]] = {
        speed: [] for count, speed in sorted(counts.items())[::-1] if count > 1
    }
    for speed in near:
        for job in jobs:
            processes.submit(nearness, job, settings, speed, calibration, exact[job.prompt, job.seed])
    while processes.waiting:
        (_, _, speed, _, _), found = processes.result()
        near[speed].append(found)
        if len(near[speed]) == len(jobs):
            on_line(f"{speed:g}x: {np.mean([psnr for psnr, _ in near[speed]]):.1f} dB")
    table = []
    for speed, rows in near.items():
        psnr, ssim = (mean_interval(column) for column in zip(*rows, strict=True))
        reached = steps / int(steps / speed + 1e-9)
        table.append(Verified({"strategy": "plan", "speedup": speed}, reached, psnr, ssim, len(rows)))
    return tuple(table)
