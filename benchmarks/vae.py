"""What decoding a video takes: ours, in each way of computing it, beside diffusers', on the same random
weights.

    python -m benchmarks.vae [--device cuda] [--frames 81 --height 480 --width 832] [--vae 2.2] [--budget 60]
    python -m benchmarks.vae --small --device cpu

Weights have the full size of Wan2.1's VAE, or Wan2.2's, and are random: speed and memory need no more. A
first call is timed apart, for it compiles kernels and lets cuDNN search; "seconds" is the median of the calls
after it. PSNR and relative errors are of a short clip against the same weights in float32 with TF32 off.
`--small` is for a CPU: narrow weights, and `wan-tiny`'s own VAE.
"""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from torch import Tensor

from benchmarks.measuring import GIB, TERA, relative_error, timed_ms
from benchmarks.networks import random_vae
from benchmarks.report import Report, Section, parser, report_for, run_sections
from chitu_diffusion.models.folder import read_folder
from chitu_diffusion.models.loading import load_vae
from chitu_diffusion.models.registry import ASSETS, TINY
from chitu_diffusion.models.spec import LatentGeometry
from chitu_diffusion.models.wan.vae import WanVAE
from chitu_diffusion.models.wan.vae_22 import VAE_22
from chitu_diffusion.models.wan.vae_layers import VaeOptions, best_options, searching_kernels
from chitu_diffusion.ops.vae_conv import (
    CONVOLUTIONS,
    phased_weight,
    upsample_nearest,
    upsample_phased,
    weight_for,
)
from chitu_diffusion.ops.vae_conv_gemm import flat_conv, flat_weight, suits_flat

TABLE = "Decode"


class VaeBenchmark:
    """The network, the latents, and what diffusers took.

    Args:
        device: where.
        config: of the network.
        shape: of the latent: T, H, W.
        small: narrow weights in float32.
        report: gets the rows.
    """

    def __init__(
        self,
        device: torch.device,
        config: Mapping[str, Any],
        shape: tuple[int, int, int],
        report: Report,
        *,
        small: bool,
    ):
        self.device = device
        self.shape = shape
        self.small = small
        self.report = report
        self.dtype = torch.float32 if small else torch.bfloat16
        vae = random_vae(config, device, torch.float32)
        self.base = vae.last_stage.channels
        self.network: Any = vae.network
        with torch.no_grad():
            self.network.decoder.conv_out.weight.mul_(0.3)  # so that few pixels are clipped
        channels = self.network.config.z_dim
        self.latent = torch.randn(1, channels, *shape, device=device)
        self.clip = torch.randn(1, channels, 3, *shape[1:], device=device)
        self.exact: Tensor | None = None
        self.diffusers_seconds: float | None = None

    def float32(self, report: Report) -> None:
        """The short clip by diffusers in float32, and ours beside it; then the weights are narrowed."""
        before = torch.backends.cudnn.allow_tf32
        torch.backends.cudnn.allow_tf32 = False
        try:
            self.exact = by_diffusers(self.network, self.clip)
            options = replace(best_options(self.device, 384), search=False)
            ours = WanVAE(self.network, ways=options).decode(self.clip)
        finally:
            torch.backends.cudnn.allow_tf32 = before
            self.network = self.network.to(self.dtype)
        name = "ours, float32, against diffusers, float32 (9 frames)"
        report.add(TABLE, {"name": name, **self.distance(ours)})
        report.note(f"standard deviation of the exact video: {float(self.exact.std()):.4g}")

    def distance(self, video: Tensor) -> dict[str, float]:
        """From the exact clip: PSNR, and the error relative to its deviation."""
        if self.exact is None:
            return {}
        difference = video.float() - self.exact
        squares = max(float(difference.square().mean()), 1e-20)
        relative = float(difference.norm() / (self.exact - self.exact.mean()).norm())
        return {"psnr_db": -10 * math.log10(squares), "relative_error": relative}

    def seconds(self, call: Callable[[], object]) -> float:
        """Of one call."""
        return timed_ms(call, self.device) / 1e3

    def measure(self, name: str, decode: Callable[[], Tensor], calls: int = 2, **more: Any) -> float:
        """A row: the first call, the median of the others, the most memory that any took; the median."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        first = self.seconds(decode)
        seconds = median(self.seconds(decode) for _ in range(calls)) if calls else first
        row: dict[str, Any] = {"name": name, "seconds": seconds, "first_seconds": first}
        if self.device.type == "cuda":
            row["peak_gib"] = torch.cuda.max_memory_allocated(self.device) / GIB
        if self.diffusers_seconds is not None:
            row["ratio_vs_diffusers"] = self.diffusers_seconds / seconds
        self.report.add(TABLE, {**row, **more})
        return seconds

    def diffusers(self, report: Report) -> None:
        """The whole clip at once."""
        found = self.distance(by_diffusers(self.network, self.clip.to(self.dtype)))
        decode = partial(by_diffusers, self.network, self.latent.to(self.dtype))
        self.diffusers_seconds = self.measure("diffusers", decode, 1, **found)

    def diffusers_tiled(self, report: Report) -> None:
        """The whole clip in diffusers' tiles."""
        self.network.enable_tiling()
        try:
            self.measure(
                "diffusers, tiled", partial(by_diffusers, self.network, self.latent.to(self.dtype)), 0
            )
        finally:
            self.network.disable_tiling()

    def ours(self, name: str, report: Report, **how: Any) -> None:
        """The whole clip in one of our ways.

        Args:
            name: of the row.
            how: `ways` or `frames_per_call` of `WanVAE`, or `tile_size`.
        """
        tile_size = how.pop("tile_size", None)
        vae = WanVAE(self.network, **how)
        decode = vae.decode if tile_size is None else partial(vae.decode_tiled, tile_size=tile_size)
        self.measure(name, lambda: decode(self.latent), **self.distance(decode(self.clip)))

    def convolutions(self, report: Report) -> None:
        """The layers that take the time, one by one, in each way: TFLOP/s of the useful products."""
        _, height, width = self.shape
        for factor, channels, frames in ((8, self.base, 16), (4, 2 * self.base, 16), (2, 4 * self.base, 8)):
            rows = factor * height
            columns = factor * width
            x = torch.randn(2 + frames, rows, columns, channels, device=self.device, dtype=self.dtype)
            weight = torch.randn(channels, channels, 3, 3, 3, device=self.device, dtype=self.dtype)
            layer = f"3x3x3, {channels} channels, {frames} x {rows} x {columns}"
            report.add("Convolutions alone, TFLOP/s", {"layer": layer, **self.one_layer(x, weight)})
        self.upsampling(report)

    def one_layer(self, x: Tensor, weight: Tensor) -> dict[str, Any]:
        """TFLOP/s of one layer, by way of computing it."""
        on_gpu = self.device.type == "cuda"
        calls: dict[str, tuple[Callable[[Tensor], Tensor], Tensor]] = {
            name: (partial(convolve, weight=weight_for(name, weight)), x)
            for name, convolve in CONVOLUTIONS.items()
        }
        if suits_flat(weight):
            bordered = F.pad(x, (0, 0, 1, 1, 1, 1)).contiguous()
            laid = flat_weight(weight)
            for rows in (128, 256):
                flat = partial(flat_conv, weight=laid, on_gpu=on_gpu, rows=rows)
                calls[f"flat, {rows} rows"] = flat, bordered
        exact = CONVOLUTIONS["conv3d"](x[:4].float(), weight.float())
        products = 2 * weight.numel() * (len(x) - 2) * x.shape[1] * x.shape[2] / TERA
        found: dict[str, Any] = {}
        for name, (call, given) in calls.items():
            for search in (False, True) if on_gpu and not name.startswith("flat") else (False,):
                key = f"{name}, search" if search else name
                try:
                    with searching_kernels(search):
                        call(given)
                        found[key] = products / min(self.seconds(partial(call, given)) for _ in range(3))
                        off = relative_error(call(given[:4]), exact)
                    print(list(x.shape), key, found[key], "TFLOP/s, relative error", off, flush=True)
                except Exception as failure:
                    traceback.print_exc()
                    found[key] = type(failure).__name__
        return found

    def upsampling(self, report: Report) -> None:
        """The last up-sampling both ways, over what the 3 x 3 convolution would multiply."""
        rows = 4 * self.shape[1]
        columns = 4 * self.shape[2]
        x = torch.randn(16, rows, columns, 2 * self.base, device=self.device, dtype=self.dtype)
        weight = torch.randn(self.base, 2 * self.base, 3, 3, device=self.device, dtype=self.dtype)
        nearest = weight.contiguous(memory_format=torch.channels_last)
        ways = {"phased": (upsample_phased, phased_weight(weight)), "nearest": (upsample_nearest, nearest)}
        for name, (upsample, laid) in ways.items():
            with searching_kernels(True):
                upsample(x, laid, None)
                seconds = min(self.seconds(partial(upsample, x, laid, None)) for _ in range(3))
            report.note(f"last up-sampling, {name}: {1e3 * seconds:.3f} ms for 16 frames")

    def wan_tiny(self, report: Report) -> None:
        """The shipped model's own VAE, 33 frames of 128 x 128 in float32."""
        vae = load_vae(read_folder(ASSETS / TINY), device=self.device, dtype=torch.float32)
        latent = torch.randn(1, 16, 9, 16, 16, device=self.device)
        error = relative_error(vae.decode(latent), by_diffusers(vae.network, latent))
        self.diffusers_seconds = None
        theirs = partial(by_diffusers, vae.network, latent)
        self.diffusers_seconds = self.measure("wan-tiny, diffusers", theirs)
        self.measure("wan-tiny, ours", lambda: vae.decode(latent), relative_error=error)


def by_diffusers(network: AutoencoderKLWan, latent: Tensor) -> Tensor:
    """Normalised latent -> video in [0, 1], as `WanPipeline` does it."""
    mean, deviation = (
        latent.new_tensor(values).view(1, -1, 1, 1, 1)
        for values in (network.config.latents_mean, network.config.latents_std)
    )
    with torch.no_grad():
        pixels = network.decode(latent * deviation + mean, return_dict=False)[0]
    return (pixels.float() / 2 + 0.5).clamp(0, 1).transpose(1, 2)


def decode_ways(device: torch.device) -> dict[str, VaeOptions]:
    """The fastest way, and each with one of its options changed."""
    best = best_options(device, 384)
    found = {f"ours, {'no ' if best.search else ''}cuDNN search": replace(best, search=not best.search)}
    for name in ("flat", *CONVOLUTIONS):
        if name != best.convolution:
            found[f"ours, convolution {name}"] = replace(best, convolution=name)
    if best.norm == "triton":
        found["ours, norm torch"] = replace(best, norm="torch")
    found["ours, upsample nearest"] = replace(best, upsample="nearest")
    other = "sdpa" if best.attention == "product" else "product"
    return {**found, f"ours, attention {other}": replace(best, attention=other)}


def section_list(found: VaeBenchmark) -> list[Section]:
    """What matters first; estimates are of one H200."""
    tile_size = max(2, min(32, found.shape[2] // 3))
    tiles = f"ours, tiles of {tile_size}"
    ways = decode_ways(found.device)
    first = [name for name in ("ours, convolution flat", "ours, convolution conv3d") if name in ways]
    rows: list[tuple[str, Callable[[Report], None], float]] = [
        ("float32", found.float32, 0),
        ("diffusers", found.diffusers, 0),
        ("ours", partial(found.ours, "ours"), 0),
        *((name, partial(found.ours, name, ways=ways[name]), 4) for name in first),
        (tiles, partial(found.ours, tiles, tile_size=tile_size), 4),
        ("convolutions", found.convolutions, 6),
        ("diffusers, tiled", found.diffusers_tiled, 8),
        *((name, partial(found.ours, name, ways=ways[name]), 6) for name in ways if name not in first),
    ]
    for frames in (1, 2, 4):
        name = f"ours, {frames} latent frames a call"
        rows.append((name, partial(found.ours, name, frames_per_call=frames), 5))
    rows.append(("wan-tiny", found.wan_tiny, 0))
    return [Section(name, "", 0 if found.small else estimate, run) for name, run, estimate in rows]


def main(words: list[str] | None = None) -> Report:
    """Reads the options, runs the sections."""
    options = parser(__doc__)
    options.set_defaults(budget=60.0)
    options.add_argument("--sections", nargs="+", default=[], metavar="NAME", help="a wrong name lists all")
    for name, default in (("frames", 81), ("height", 480), ("width", 832)):
        options.add_argument(f"--{name}", type=int, default=default)
    options.add_argument("--vae", choices=("2.1", "2.2"), default="2.1")
    asked = options.parse_args(words)
    config: dict[str, Any] = dict(VAE_22) if asked.vae == "2.2" else {"base_dim": 96}
    if asked.small:
        config |= {"base_dim": 16} | ({"decoder_base_dim": 16} if asked.vae == "2.2" else {})
    shape = LatentGeometry.of_vae(config).latent_shape(asked.frames, asked.height, asked.width)[1:]
    shape = (3, 4, 6) if asked.small else shape
    report = report_for("VAE decode", "vae", asked)
    report.note(f"VAE {asked.vae}, latent {shape}")
    torch.manual_seed(0)
    found = VaeBenchmark(torch.device(asked.device), config, shape, report, small=asked.small)
    run_sections(section_list(found), report, asked=asked.sections, budget=asked.budget)
    print(*report.write(), sep="\n")
    return report


if __name__ == "__main__":
    raise SystemExit(main().failed)
