"""`chitu generate`: one sentence, one video for each seed.

Knows how flags become requests and in which order things are checked: all of it before torch is
imported. The work itself is `runner.py`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from chitu_diffusion.cli import options
from chitu_diffusion.cli.console import say
from chitu_diffusion.cli.dry_run import find_model, print_plan, resolved_requests
from chitu_diffusion.cli.launch import check_layout, launch
from chitu_diffusion.errors import UsageError

if TYPE_CHECKING:
    from chitu_diffusion.config import EngineConfig
    from chitu_diffusion.task import DiffusionUserParams


def generate(
    prompt: Annotated[str, typer.Argument(help="What the video shows.", show_default=False)],
    output: options.OutputFile = None,
    model: options.Model = None,
    negative_prompt: options.NegativePrompt = None,
    size: options.Size = None,
    frames: options.Frames = None,
    fps: options.Fps = None,
    steps: options.Steps = None,
    guidance_scale: options.GuidanceScale = None,
    seed: Annotated[
        str | None, typer.Option("--seed", metavar="N | A..B", help="One seed, or one video for each.")
    ] = None,
    cache: options.Cache = None,
    fidelity: options.Fidelity = None,
    speedup: options.Speedup = None,
    low_mem_level: options.LowMemLevel = None,
    dtype: options.Dtype = None,
    quant: options.Quant = None,
    device: options.Device = None,
    quality: options.Quality = None,
    gpus: options.Gpus = None,
    parallel: options.Parallel = None,
    config: options.ConfigFile = None,
    set_: options.Set = None,
    profile: Annotated[
        Path | None, typer.Option("--profile", metavar="DIR", help="Write a Chrome trace, show top ops.")
    ] = None,
    dry_run: options.DryRun = False,
    json_: options.Json = False,
    context: typer.Context = None,  # type: ignore[assignment]
) -> int:
    """Make a video from a sentence.

    Example: chitu generate "A cat walking on grass" -o cat.mp4 --seed 42
    """
    engine_config, _ = options.settings(
        config=config,
        set_=set_,
        model=model,
        low_mem_level=low_mem_level,
        dtype=dtype,
        device=device,
        quality=quality,
        quant=quant,
        parallel=parallel,
    )
    width, height = options.parse_size(size)
    asked: dict[str, Any] = {
        "prompt": prompt,
        "negative_prompt": negative_prompt,
        "height": height,
        "width": width,
        "num_frames": frames,
        "fps": fps,
        "num_inference_steps": steps,
        "guidance_scale": options.parse_guidance(guidance_scale),
        "flexcache": options.parse_cache(cache),
    }
    if fidelity is not None or speedup is not None:
        asked["flexcache"] = picked_cache(engine_config, asked, fidelity, speedup)
    requests = requests_for_seeds(asked, options.parse_seeds(seed), output, engine_config.output.dir)
    spec, _ = find_model(engine_config)
    resolved_requests(spec, engine_config, requests)
    if gpus:
        check_layout(engine_config, spec, gpus)
    if dry_run:
        return print_plan(engine_config, requests, as_json=json_)
    options.make_folder("--profile", profile)
    if gpus and gpus > 1:
        return launch(context.find_root().obj, gpus, engine_config)
    return make_videos(engine_config, requests, profile=profile, as_json=json_)


def picked_cache(
    config: EngineConfig, asked: dict[str, Any], fidelity: str | None, speedup: float | None
) -> dict[str, Any]:
    """The calibrated setting for `--fidelity` or `--speedup`; says which it is and what to expect.

    Raises:
        UsageError: both, or a cache besides, or a model that was not calibrated, or more than it was found to
            keep.
    """
    if asked["flexcache"] is not None or None not in (fidelity, speedup):
        raise UsageError("--cache, --fidelity and --speedup: use one of them", field="flexcache")
    spec, _ = find_model(config)
    if spec.calibration is None:
        raise UsageError(
            f"{'--speedup' if fidelity is None else '--fidelity'}: {spec.name} was not calibrated; "
            f"'chitu calibrate --model {config.models.name}' does that",
            field="flexcache",
        )
    flexcache, expected, about = {}, None, spec.calibration.about
    if fidelity is not None:
        row = spec.calibration.for_fidelity(options.parse_fidelity(fidelity))
        flexcache, expected, speedup = dict(row.flexcache), row.psnr[0], row.speedup
    elif speedup is not None:
        flexcache, expected = spec.calibration.for_speedup(speedup)
    kept = "beyond what was checked" if expected is None else f"{expected:.1f} dB to expect"
    usual, videos = (
        (about.get("steps"), about.get("guidance")),
        max((row.videos for row in spec.calibration.table), default=0),
    )
    say(
        f"cache {setting_text(flexcache)}: {speedup:.3g} times fewer forwards, {kept} (PSNR against full "
        "compute, "
        f"mean over {videos} checked video(s) at {usual[0]} steps, guidance "
        f"{usual[1][0] if usual[1] else '-'})"
    )
    return flexcache


def setting_text(flexcache: dict[str, Any]) -> str:
    """As `--cache` takes it."""
    more = ",".join(
        f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}"
        for key, value in flexcache.items()
    )
    return f"{flexcache['strategy']}:{more.partition(',')[2]}".removesuffix(":")


def requests_for_seeds(
    asked: dict[str, Any], seeds: Sequence[int] | None, output: str | None, folder: str
) -> list[DiffusionUserParams]:
    """One checked request for each seed, each with a file name of its own.

    Raises:
        UsageError: a bad value or a name that cannot be written, naming the flag.
    """
    from chitu_diffusion.media.video import check_save_path
    from chitu_diffusion.task import DiffusionUserParams, draw_seed

    chosen = list(seeds) if seeds else [draw_seed()]
    requests = []
    with options.flags_named():
        for seed in chosen:
            path = output if output is not None else options.default_path(folder, seed)
            if output is not None and len(chosen) > 1:
                check_save_path(output)
                path = options.path_for_seed(output, seed)
            requests.append(DiffusionUserParams(**asked, seed=seed, save_path=path))
            check_save_path(path)
    return requests


def make_videos(
    config: EngineConfig, requests: list[DiffusionUserParams], *, profile: Path | None, as_json: bool
) -> int:
    """Run the requests; the paths go to stdout."""
    from chitu_diffusion.cli.progress import make_reporter
    from chitu_diffusion.cli.runner import exit_code_for, run_requests
    from chitu_diffusion.task import TaskStatus

    tasks = run_requests(config, requests, make_reporter(as_json=as_json), profile=profile)
    if not as_json:
        for task in tasks:
            if task.status is TaskStatus.FINISHED:
                print(task.buffer.save_path, flush=True)
    return exit_code_for(tasks)
