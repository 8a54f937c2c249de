"""`chitu calibrate`: measure a model for its caches. Knows flags; measuring is `evaluation.calibrate`'s."""

from __future__ import annotations

from chitu_diffusion.cli.console import emit, say
from chitu_diffusion.cli.dry_run import find_model, task_for
from chitu_diffusion.cli.flags import Args, takes_flags
from chitu_diffusion.errors import UsageError, counted
from chitu_diffusion.files.places import make_folder

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


@takes_flags
def calibrate(args: Args) -> None:
    """Measure how a model's steps resemble each other, find the plans that skip them best, and check these.

    The last quarter of the prompts, with another seed, is for the check. The result is flexcache.json beside
    the weights.
    """
    from chitu_diffusion.task import DiffusionUserParams

    config, _ = args.load_config()
    model = find_model(config, args)
    if model.required().layout == "files":
        raise UsageError(
            f"--model {config.models.name}: what is measured lies in a model's folder, and this is a file; "
            f"make one with 'chitu models convert {config.models.name} FOLDER'",
            field="models.name",
        )
    output = args["output"]
    asked = args.request_fields()
    with args.named():
        task_for(model, config, DiffusionUserParams(**{"prompt": "-", **asked}))
    make_folder("-o", output)
    from chitu_diffusion.evaluation.cache_table import read_prompts
    from chitu_diffusion.evaluation.calibrate import CalibrationRun
    from chitu_diffusion.evaluation.calibrate import calibrate as measure
    from chitu_diffusion.flexcache.calibration import write_calibration

    file = args["prompts"]
    seeds = args["seeds"]
    sentences = list(PROMPTS) if file is None else read_prompts(file)
    if len(sentences) < 2:
        raise UsageError(f"--prompts {file}: one prompt; use at least two, one to check on", field="prompts")
    kept = max(1, len(sentences) // 4)
    fitted_on = [CalibrationRun(prompt, seed) for seed in seeds for prompt in sentences[:-kept]]
    checked_on = [CalibrationRun(prompt, max(seeds) + 1) for prompt in sentences[-kept:]]
    say(f"{config.models.name}: {counted(len(fitted_on), 'run')} to fit on, {len(checked_on)} to check on")
    with args.named():
        found = measure(config, fitted_on, checked_on, settings=asked, workers=args["workers"], on_line=say)
    path = write_calibration(found, output or model.required().path)
    if args["json"]:
        emit("calibration", path=path, table=[dict(vars(row)) for row in found.table])
        return
    say("| forwards saved | times fewer | PSNR, dB | SSIM |\n|---:|---:|---:|---:|")
    for row in found.table:
        psnr = row.psnr
        ssim = row.ssim
        say(
            f"| {1 - 1 / row.speedup:.1%} | {row.speedup:.2f} | {psnr[0]:.1f} ({psnr[1]:.1f} to "
            f"{psnr[2]:.1f}) | {ssim[0]:.4f} ({ssim[1]:.4f} to {ssim[2]:.4f}) |"
        )
    if not args["quiet"]:
        print(path)
