"""`chitu calibrate`: measure a model for its caches. Knows flags; measuring is `evaluation.calibrate`'s."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from chitu_diffusion.cli import options
from chitu_diffusion.cli.console import say
from chitu_diffusion.cli.dry_run import find_model
from chitu_diffusion.errors import UsageError

PROMPTS = (
    "A cat walking on grass",
    "A red fish swims left in the sea",
    "A yellow bird flies to the right over snow",
    "A blue car drives left through a desert",
    "A white boat on the sea, moving up",
    "An orange ball jumping on a road",
    "A green tree growing under a starry sky",
    "A purple flower spinning on grass",
    "A black dog runs to the right on sand",
    "A pink star falls through the night",
    "A brown horse stands still in the snow",
    "A red balloon rises over a road",
)
"""Of the shipped model's world, and understood by any other."""


def calibrate(
    model: options.Model = None,
    prompts: Annotated[
        Path | None, typer.Option("--prompts", metavar="FILE", help="One prompt a line, twelve or so.")
    ] = None,
    seeds: Annotated[str, typer.Option("--seeds", metavar="A..B", help="Of the runs that are fitted.")] = "0",
    steps: options.Steps = None,
    size: options.Size = None,
    frames: options.Frames = None,
    guidance_scale: options.GuidanceScale = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    workers: Annotated[
        int, typer.Option("--workers", min=1, max=64, help="Processes that share the device.")
    ] = 1,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="DIR", help="Not beside the model, but here.")
    ] = None,
    set_: options.Set = None,
    json_: options.Json = False,
) -> None:
    """Measure how a model's steps resemble each other, find the plans that skip them best, and check these.

    The last quarter of the prompts, with another seed, is for the check. The result is flexcache.json beside
    the weights.
    """
    config, _ = options.settings(config=None, set_=set_, model=model, dtype=dtype, device=device)
    _, folder = find_model(config)
    width, height = options.parse_size(size)
    asked: dict[str, Any] = {
        "num_inference_steps": steps,
        "width": width,
        "height": height,
        "num_frames": frames,
        "guidance_scale": options.parse_guidance(guidance_scale),
    }
    numbers = options.parse_seeds(seeds) or [0]
    options.make_folder("-o", output)
    from chitu_diffusion.evaluation.cache_table import read_prompts
    from chitu_diffusion.evaluation.calibrate import Job
    from chitu_diffusion.evaluation.calibrate import calibrate as measure
    from chitu_diffusion.flexcache.calibration import write_calibration

    sentences = list(PROMPTS) if prompts is None else read_prompts(prompts)
    if len(sentences) < 2:
        raise UsageError(
            f"--prompts {prompts}: one prompt; use at least two, one to check on", field="prompts"
        )
    kept = max(1, len(sentences) // 4)
    fitted_on = [Job(prompt, seed) for seed in numbers for prompt in sentences[:-kept]]
    checked_on = [Job(prompt, max(numbers) + 1) for prompt in sentences[-kept:]]
    settings = {name: value for name, value in asked.items() if value is not None}
    say(f"{config.models.name}: {len(fitted_on)} runs to fit on, {len(checked_on)} to check on")
    with options.flags_named():
        found = measure(config, fitted_on, checked_on, settings=settings, workers=workers, tell=say)
    path = write_calibration(found, output or folder)
    if json_:
        from chitu_diffusion.cli.console import emit

        emit("calibration", path=path, table=[dict(vars(row)) for row in found.table])
        return
    say("| forwards saved | times fewer | PSNR, dB | SSIM |\n|---:|---:|---:|---:|")
    for row in found.table:
        psnr, ssim = row.psnr, row.ssim
        say(
            f"| {1 - 1 / row.speedup:.1%} | {row.speedup:.2f} | {psnr[0]:.1f} ({psnr[1]:.1f} to "
            f"{psnr[2]:.1f}) "
            f"| {ssim[0]:.4f} ({ssim[1]:.4f} to {ssim[2]:.4f}) |"
        )
    print(path)
