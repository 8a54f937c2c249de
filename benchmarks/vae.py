"""What decoding a video takes: ours, in each way of computing it, beside diffusers', on the same random
weights.

    python benchmarks/vae.py [--device cuda] [--frames 81 --height 480 --width 832] [--seconds 60] [--small]
    [--out FOLDER]

Weights have the full size of Wan2.1's VAE and are random: speed and memory need no more. A first call is
timed apart, for it compiles kernels and lets cuDNN search; "seconds" is the median of the calls after it.
PSNR and relative errors are of a short clip against the same weights in float32 with TF32 off. A section that
fails says so in the results, and the next one goes on; results are written after each. `--small` is for a
CPU: narrow weights, and `wan-tiny`'s own VAE.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from torch import Tensor

from chitu_diffusion.models.folder import read_folder
from chitu_diffusion.models.loading import load_vae
from chitu_diffusion.models.wan.vae import WanVAE
from chitu_diffusion.models.wan.vae_decoder import DecodeOptions, best_options, searching_kernels
from chitu_diffusion.ops.vae_conv import (
    CONVOLUTIONS,
    phased_weight,
    upsample_nearest,
    upsample_phased,
    weight_for,
)
from chitu_diffusion.ops.vae_conv_gemm import flat_conv, flat_weight, suits_flat

WAN_TINY = Path(__file__).parent.parent / "chitu_diffusion" / "assets" / "wan-tiny"
ROW = (
    "name",
    "seconds",
    "first_seconds",
    "peak_gib",
    "ratio_vs_diffusers",
    "psnr_db",
    "relative_error",
    "error",
)


@dataclass
class Bench:
    """The machine, the sizes, and the rows found so far."""

    device: torch.device
    shape: tuple[int, int, int]  # of the latent: T, H, W
    small: bool
    deadline: float
    file: Path
    rows: list[dict[str, Any]] = field(default_factory=list)
    convolutions: list[dict[str, Any]] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)
    diffusers_seconds: float | None = None

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.small else torch.bfloat16

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def timed(self, call: Callable[[], Any]) -> float:
        self.synchronize()
        start = time.perf_counter()
        call()
        self.synchronize()
        return time.perf_counter() - start

    def section(self, name: str, call: Callable[[], None], needs: float = 0.0) -> None:
        """Runs a part unless time is short; its failure becomes a row."""
        if time.monotonic() + needs > self.deadline:
            self.rows.append({"name": name, "error": "not run: out of time"})
        else:
            try:
                call()
            except Exception as failure:
                traceback.print_exc()
                self.rows.append({"name": name, "error": f"{type(failure).__name__}: {str(failure)[:200]}"})
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self.write()

    def measure(self, name: str, decode: Callable[[], Tensor], calls: int = 2, **more: Any) -> dict[str, Any]:
        """A row: the first call, the median of the others, the most memory that any took."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        first = self.timed(decode)
        seconds = statistics.median(self.timed(decode) for _ in range(calls)) if calls else first
        row: dict[str, Any] = {"name": name, "seconds": seconds, "first_seconds": first, **more}
        if self.device.type == "cuda":
            row["peak_gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30
        if self.diffusers_seconds is not None:
            row["ratio_vs_diffusers"] = self.diffusers_seconds / seconds
        self.rows.append(row)
        print(json.dumps(row), flush=True)
        return row

    def write(self) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        result = {"notes": self.notes, "rows": self.rows, "convolutions": self.convolutions}
        self.file.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
        self.file.with_suffix(".md").write_text(markdown(self))


def markdown(bench: Bench) -> str:
    """The same as tables."""

    def table(columns: tuple[str, ...], rows: list[dict[str, Any]]) -> list[str]:
        lines = ["| " + " | ".join(columns) + " |", "| " + " | ".join("---" for _ in columns) + " |"]
        return [
            *lines,
            *("| " + " | ".join(shown(row.get(column)) for column in columns) + " |" for row in rows),
        ]

    def shown(value: object) -> str:
        return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)

    lines = [
        "# VAE decode",
        "",
        *(f"- {key}: {value}" for key, value in bench.notes.items()),
        "",
        *table(ROW, bench.rows),
        "",
    ]
    if bench.convolutions:
        columns = tuple(dict.fromkeys(key for row in bench.convolutions for key in row))
        lines += ["## Convolutions alone, TFLOP/s", "", *table(columns, bench.convolutions), ""]
    return "\n".join(lines)


def random_network(bench: Bench) -> AutoencoderKLWan:
    """Wan2.1's VAE with random weights, of sensible range and every one of weight."""
    torch.manual_seed(0)
    with bench.device:
        network = AutoencoderKLWan(base_dim=16 if bench.small else 96).eval()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.ndim > 1 and "gamma" not in name:
                parameter.normal_(0, parameter[0].numel() ** -0.5)
        network.decoder.conv_out.weight.mul_(0.3)
    return network


def by_diffusers(network: AutoencoderKLWan, latent: Tensor) -> Tensor:
    """Normalised latent -> video in [0, 1], as `WanPipeline` does it."""
    mean, deviation = (
        latent.new_tensor(values).view(1, -1, 1, 1, 1)
        for values in (network.config.latents_mean, network.config.latents_std)
    )
    with torch.no_grad():
        pixels = network.decode(latent * deviation + mean, return_dict=False)[0]
    return (pixels.float() / 2 + 0.5).clamp(0, 1).transpose(1, 2)


class Fidelity:
    """A short clip in float32 by diffusers, and how far others are from it."""

    def __init__(self, bench: Bench, network: AutoencoderKLWan) -> None:
        _, height, width = bench.shape
        self.latent = torch.randn(1, 16, 3, height, width, device=bench.device)
        before = torch.backends.cudnn.allow_tf32
        torch.backends.cudnn.allow_tf32 = False
        try:
            self.exact = by_diffusers(network, self.latent)
            ours = WanVAE(network, ways=replace(best_options(bench.device, 384), search=False)).decode(
                self.latent
            )
        finally:
            torch.backends.cudnn.allow_tf32 = before
        bench.rows.append({"name": "ours, float32, against diffusers, float32 (9 frames)", **self.of(ours)})
        bench.notes["standard deviation of the exact video"] = float(self.exact.std())

    def of(self, video: Tensor) -> dict[str, float]:
        difference = video.float() - self.exact
        relative = float(difference.norm() / (self.exact - self.exact.mean()).norm())
        return {
            "psnr_db": float(-10 * difference.square().mean().clamp_min(1e-20).log10()),
            "relative_error": relative,
        }


def variants(device: torch.device) -> dict[str, DecodeOptions]:
    """The fastest ways, and each with one of them changed."""
    best = best_options(device, 384)
    found = {"ours": best}
    found[f"ours, {'no ' if best.search else ''}cuDNN search"] = replace(best, search=not best.search)
    for name in ("flat", *CONVOLUTIONS):
        if name != best.convolution:
            found[f"ours, convolution {name}"] = replace(best, convolution=name)
    if best.norm == "triton":
        found["ours, norm torch"] = replace(best, norm="torch")
    found["ours, upsample nearest"] = replace(best, upsample="nearest")
    other = "sdpa" if best.attention == "product" else "product"
    return {**found, f"ours, attention {other}": replace(best, attention=other)}


def whole(bench: Bench, network: AutoencoderKLWan, fidelity: list[Fidelity]) -> None:
    """Sections over the whole clip: diffusers, ours in each way, tiles, frames a call."""
    latent = torch.randn(1, 16, *bench.shape, device=bench.device)
    narrow = latent.to(bench.dtype)

    def accuracy(decode: Callable[[Tensor], Tensor]) -> dict[str, float]:
        return fidelity[0].of(decode(fidelity[0].latent)) if fidelity else {}

    def diffusers_whole() -> None:
        found = accuracy(lambda x: by_diffusers(network, x.to(bench.dtype)))
        bench.diffusers_seconds = bench.measure(
            "diffusers", lambda: by_diffusers(network, narrow), 1, **found
        )["seconds"]
        bench.rows[-1]["ratio_vs_diffusers"] = 1.0

    def diffusers_tiled() -> None:
        network.enable_tiling()
        try:
            bench.measure("diffusers, tiled", lambda: by_diffusers(network, narrow), 0)
        finally:
            network.disable_tiling()

    def ours(name: str, vae: WanVAE, tile_size: int | None = None) -> Callable[[], None]:
        decode = vae.decode if tile_size is None else lambda x: vae.decode_tiled(x, tile_size)
        return lambda: void(bench.measure(name, lambda: decode(latent), **accuracy(decode)))

    ways = variants(bench.device)
    tile_size = max(2, min(32, bench.shape[2] // 3))
    first = ["ours, convolution flat", "ours, convolution conv3d"]
    bench.section("diffusers", diffusers_whole)
    bench.section("ours", ours("ours", WanVAE(network)))
    for name in (name for name in first if name in ways):
        bench.section(name, ours(name, WanVAE(network, ways=ways[name])), 4)
    bench.section("ours, tiled", ours(f"ours, tiles of {tile_size}", WanVAE(network), tile_size), 4)
    bench.section("convolutions", lambda: convolutions(bench), 6)
    bench.section("diffusers, tiled", diffusers_tiled, 8)
    for name in list(ways)[1:]:
        if name not in first:
            bench.section(name, ours(name, WanVAE(network, ways=ways[name])), 6)
    for frames in (1, 2, 4):
        name = f"ours, {frames} latent frames a call"
        bench.section(name, ours(name, WanVAE(network, frames)), 5)


def void(_row: object) -> None:
    """Drops a result."""


def convolutions(bench: Bench) -> None:
    """The layers that take the time, one by one, in each way: TFLOP/s of the useful products."""
    _, height, width = bench.shape
    wide = 16 if bench.small else 96
    for factor, channels, frames in ((8, wide, 16), (4, 2 * wide, 16), (2, 4 * wide, 8)):
        rows, columns = factor * height, factor * width
        x = torch.randn(2 + frames, rows, columns, channels, device=bench.device, dtype=bench.dtype)
        weight = torch.randn(channels, channels, 3, 3, 3, device=bench.device, dtype=bench.dtype)
        row: dict[str, Any] = {"layer": f"3x3x3, {channels} channels, {frames} x {rows} x {columns}"}
        row |= one_layer(bench, x, weight)
        bench.convolutions.append(row)
        bench.write()
    upsampling(bench, wide)


def one_layer(bench: Bench, x: Tensor, weight: Tensor) -> dict[str, Any]:
    """TFLOP/s of one layer, by way of computing it."""
    calls: dict[str, Callable[[Tensor], Tensor]] = {}
    for name, convolve in CONVOLUTIONS.items():
        calls[name] = partial(convolve, weight=weight_for(name, weight))
    bordered = None
    if suits_flat(weight):
        bordered = F.pad(x, (0, 0, 1, 1, 1, 1)).contiguous()
        for rows in (128, 256):
            on_gpu = bench.device.type == "cuda"
            calls[f"flat, {rows} rows"] = partial(
                flat_conv, weight=flat_weight(weight), on_gpu=on_gpu, rows=rows
            )
    exact = CONVOLUTIONS["conv3d"](x[:4].float(), weight.float())
    products = 2 * weight.numel() * (len(x) - 2) * x.shape[1] * x.shape[2] / 1e12
    found: dict[str, Any] = {}
    for name, call in calls.items():
        given = x if bordered is None or not name.startswith("flat") else bordered
        searches = (False, True) if bench.device.type == "cuda" and not name.startswith("flat") else (False,)
        for search in searches:
            key = f"{name}, search" if search else name
            try:
                with searching_kernels(search):
                    call(given)
                    found[key] = products / min(bench.timed(partial(call, given)) for _ in range(3))
                    off = float((call(given[:4]).float() - exact).norm() / exact.norm())
                print(list(x.shape), key, found[key], "TFLOP/s, relative error", off, flush=True)
            except Exception as failure:
                traceback.print_exc()
                found[key] = type(failure).__name__
    return found


def upsampling(bench: Bench, wide: int) -> None:
    """The last up-sampling both ways, over what the 3 x 3 convolution would multiply."""
    frames, rows, columns = 16, 4 * bench.shape[1], 4 * bench.shape[2]
    x = torch.randn(frames, rows, columns, 2 * wide, device=bench.device, dtype=bench.dtype)
    weight = torch.randn(wide, 2 * wide, 3, 3, device=bench.device, dtype=bench.dtype)
    channels_last = weight.contiguous(memory_format=torch.channels_last)
    ways = {"phased": (upsample_phased, phased_weight(weight)), "nearest": (upsample_nearest, channels_last)}
    for name, (upsample, laid) in ways.items():
        with searching_kernels(True):
            upsample(x, laid, None)
            seconds = min(bench.timed(partial(upsample, x, laid, None)) for _ in range(3))
        bench.notes[f"last up-sampling, {name}, ms for 16 frames"] = round(1e3 * seconds, 3)


def wan_tiny(bench: Bench) -> None:
    """The shipped model's own VAE, 33 frames of 128 x 128 in float32."""
    vae = load_vae(read_folder(WAN_TINY), device=bench.device, dtype=torch.float32)
    latent = torch.randn(1, 16, 9, 16, 16, device=bench.device)
    expected = by_diffusers(vae.network, latent)
    found = vae.decode(latent)
    bench.diffusers_seconds = None
    theirs = bench.measure("wan-tiny, diffusers", lambda: by_diffusers(vae.network, latent))
    bench.diffusers_seconds = theirs["seconds"]
    relative = float((found - expected).norm() / expected.norm())
    bench.measure("wan-tiny, ours", lambda: vae.decode(latent), relative_error=relative)


def main() -> None:
    """Reads the options, runs the sections."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    for name, default in (("frames", 81), ("height", 480), ("width", 832)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--seconds", type=float, default=60.0, help="start no section after this")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    given = parser.parse_args()
    device = torch.device(given.device)
    shape = (3, 4, 6) if given.small else ((given.frames - 1) // 4 + 1, given.height // 8, given.width // 8)
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    file = given.out / f"{date.today()}-vae-{'small-' if given.small else ''}{kind.lower().replace(' ', '-')}"
    bench = Bench(device, shape, given.small, time.monotonic() + given.seconds, file)
    bench.notes |= {"device": kind, "torch": torch.__version__, "threads": torch.get_num_threads()}
    bench.notes |= {"latent": list(shape), "dtype": str(bench.dtype)}
    network, fidelity = random_network(bench), []
    bench.section("float32", lambda: fidelity.append(Fidelity(bench, network)))
    network = network.to(bench.dtype)
    bench.section("whole", lambda: whole(bench, network, fidelity))
    bench.section("wan-tiny", lambda: wan_tiny(bench))
    print(markdown(bench))


if __name__ == "__main__":
    main()
