"""`python -m training --minutes 24`: the whole of `wan-tiny` from nothing, on one device.

The dial is `--minutes`; each stage takes its share. A run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable
from pathlib import Path

import torch

from chitu_diffusion.errors import UsageError
from chitu_diffusion.files.places import make_folder
from training import adapters, autoencoder, denoiser, export, glances, judging, latents, text

SHARES = {
    "vae": 0.2, "decoder": 0.1, "judge": 0.03, "latents": 0.08, "dit": 0.42, "student": 0.16, "style": 0.05
}  # fmt: skip
STAGES = ("text", "vae", "decoder", "judge", "dit", "look", "export", "student", "style")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m training", description=__doc__)
    parser.add_argument(
        "--minutes", type=float, default=24.0, help="the dial: device time of the stages asked for, in all"
    )
    parser.add_argument(
        "--run", type=Path, default=Path("runs/wan-tiny"), help="where checkpoints of the training lie"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("chitu_diffusion/assets/wan-tiny"), help="the finished folder"
    )
    parser.add_argument("--start", type=Path, help="a finished folder, whose weights the run begins with")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--small", action="store_true", help="tiny batches, to try the road on a CPU")
    parser.add_argument("--peak", type=float, default=1.0, help="a factor on the learning rates of 'dit'")
    parser.add_argument("--one-size", action="store_true", help="only the default size, for a short run")
    return parser.parse_args()


def roads(
    options: argparse.Namespace, device: torch.device, minutes: dict[str, float]
) -> dict[str, Callable[[], object]]:
    """What each stage does."""
    small = options.small
    clips = {"batch": 1, "size": 64, "frames": 17} if small else {"batch": 8, "size": 128, "frames": 33}
    return {
        "text": lambda: text.read_captions(options.run, 0.1 if small else 2.0),
        "vae": lambda: autoencoder.train(options.run, minutes["vae"], device, **clips),
        "decoder": lambda: autoencoder.train(
            options.run, minutes["decoder"], device, **clips, part="decoder"
        ),
        "judge": lambda: judging.train(
            options.run,
            minutes["judge"],
            device,
            batch=32,
            clips=64 if small else 16_000,
            test_clips=16 if small else 2048,
        ),
        "dit": lambda: denoiser.train(
            options.run,
            minutes["dit"],
            minutes["latents"],
            latents.ONE_SHAPE if options.one_size else latents.SHAPES,
            device,
            batch=4 if small else 256,
            encode_batch=2 if small else 64,
            peak=options.peak,
        ),
        "look": lambda: glances.look(options.run, device, prompts=2 if small else 64),
        "export": lambda: export.export(options.run, options.out),
        **{
            kind: functools.partial(
                adapters.train,
                options.run,
                kind,
                minutes.get(kind, 0.0),
                device,
                batch=4 if small else 256,
                encode_batch=2 if small else 64,
            )
            for kind in adapters.NAMES
        },
    }


def main() -> None:
    options = arguments()
    device = torch.device(options.device)
    try:  # before the work
        make_folder("--run", options.run)
        make_folder("--out", options.out)
    except UsageError as error:
        raise SystemExit(f"error: {error}") from None
    if options.start is not None:
        export.start_from(options.start, options.run)
    torch.backends.cudnn.benchmark = True
    torch._dynamo.config.recompile_limit = 64
    torch.set_float32_matmul_precision("high")
    wanted = [
        name for name in SHARES if name in options.stages or (name == "latents" and "dit" in options.stages)
    ]
    minutes = {
        name: options.minutes * SHARES[name] / sum(SHARES[other] for other in wanted) for name in wanted
    }
    steps = roads(options, device, minutes)
    for name in options.stages:
        start = time.monotonic()
        print(f"== {name}", flush=True)
        steps[name]()
        print(f"== {name}: {time.monotonic() - start:.0f}s", flush=True)


if __name__ == "__main__":
    main()
