"""What encoding a video takes: ours, whole and in tiles, beside diffusers', on the same random weights.

    python -m benchmarks.vae_encode [--device cuda] [--frames 81 --height 480 --width 832]
    python -m benchmarks.vae_encode --small --device cpu

Of both full-size VAEs, Wan2.1's and Wan2.2-5B's. A first call is timed apart; "seconds" is the median of the
calls after it; memory is the most that any call took, weights and video included. Errors are of a short clip
against diffusers' in float32 with TF32 off.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.measuring import GIB, relative_error, timed_ms
from benchmarks.networks import random_vae
from benchmarks.report import Report, Section, parser, report_for, run_sections
from chitu_diffusion.models.wan.vae import WanVAE

TABLE = "Encode"
_RESIDUAL: Mapping[str, Any] = {
    "base_dim": 160,
    "decoder_base_dim": 256,
    "z_dim": 48,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "is_residual": True,
    "temperal_downsample": [False, True, True],
    "scale_factor_spatial": 16,
    "latents_mean": [0.0] * 48,
    "latents_std": [1.0] * 48,
}
NETWORKS: Mapping[str, Mapping[str, Any]] = {"Wan2.1": {}, "Wan2.2-5B": _RESIDUAL}


def by_diffusers(network: Any, video: Tensor) -> Tensor:
    """[B, T, 3, H, W] in [0, 1] -> the latent's mean as diffusers makes it, not normalised, float32."""
    pixels = (video.transpose(1, 2) * 2 - 1).to(next(network.parameters()).dtype)
    with torch.no_grad():
        found: Tensor = network.encode(pixels).latent_dist.mode().float()
    return found


def measure(
    name: str, config: Mapping[str, Any], shape: tuple[int, int, int], device: torch.device, report: Report
) -> None:
    """The rows of one network.

    Args:
        name: of the network.
        config: of diffusers' VAE.
        shape: frames, height, width of the video.
        device: where; on a CPU narrow weights in float32.
    """
    small = device.type == "cpu"
    if small:
        config = {**config, "base_dim": 16, "decoder_base_dim": 16}
    network: Any = random_vae(config, device, torch.float32).network
    frames, height, width = shape
    clip = torch.rand(1, min(9, frames), 3, height, width, device=device)
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    exact = by_diffusers(network, clip)
    torch.backends.cudnn.allow_tf32 = before
    network = network.to(torch.float32 if small else torch.bfloat16)
    video = torch.rand(1, frames, 3, height, width, device=device)
    vae = WanVAE(network)
    mean, deviation = vae._statistics(exact)

    def ours(given: Tensor, **how: Any) -> Tensor:
        return WanVAE(network, how.pop("frames_per_call", None)).encode(given, **how) * deviation + mean

    ways: dict[str, Callable[[Tensor], Tensor]] = {
        "diffusers": partial(by_diffusers, network),
        "ours": ours,
        "ours, tiles of 32": partial(ours, tile_size=32),
        **{f"ours, {n} latent frames a call": partial(ours, frames_per_call=n) for n in (1, 2, 4)},
    }
    theirs: float | None = None
    for way, call in ways.items():
        error = relative_error(call(clip), exact)
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        first, *rest = (timed_ms(partial(call, video), device) / 1e3 for _ in range(3))
        seconds = median(rest)
        theirs = theirs or seconds
        row: dict[str, Any] = {"network": name, "name": way, "seconds": seconds, "first_seconds": first}
        if device.type == "cuda":
            row["peak_gib"] = torch.cuda.max_memory_allocated(device) / GIB
        report.add(TABLE, {**row, "ratio_vs_diffusers": theirs / seconds, "relative_error": error})


def main(words: list[str] | None = None) -> Report:
    """Reads the options, runs the sections."""
    options = parser(__doc__)
    options.set_defaults(budget=90.0)
    options.add_argument("--sections", nargs="+", default=[], metavar="NAME", help="a wrong name lists all")
    for name, default in (("frames", 81), ("height", 480), ("width", 832)):
        options.add_argument(f"--{name}", type=int, default=default)
    asked = options.parse_args(words)
    shape = (9, 32, 64) if asked.small else (asked.frames, asked.height, asked.width)
    report = report_for("VAE encode", "vae-encode", asked)
    report.note(f"video {shape}")
    torch.manual_seed(0)
    rows = [
        Section(name, "", 0, partial(measure, name, config, shape, torch.device(asked.device)))
        for name, config in NETWORKS.items()
    ]
    run_sections(rows, report, asked=asked.sections, budget=asked.budget)
    print(*report.write(), sep="\n")
    return report


if __name__ == "__main__":
    raise SystemExit(main().failed)
