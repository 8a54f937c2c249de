"""The options that several commands share, and their way from text to request and settings.

Knows flags, `DiffusionUserParams` and `EngineConfig`; everything is checked here, before anything
is loaded, and an error names the flag that was typed.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from chitu_diffusion.errors import UsageError
from chitu_diffusion.task import parse_seeds as parse_seeds

if TYPE_CHECKING:
    from chitu_diffusion.config import EngineConfig, Origins

OutputFile = Annotated[
    str | None,
    typer.Option(
        "-o", "--output", metavar="FILE", help="NAME.mp4, .gif, .npy, or NAME/ for a folder of png frames."
    ),
]
Model = Annotated[
    str | None, typer.Option("--model", help="A name ('chitu models ls'), a Hugging Face id, or a folder.")
]
NegativePrompt = Annotated[
    str | None, typer.Option("--negative-prompt", help="What the video should not be.")
]
Size = Annotated[str | None, typer.Option("--size", metavar="WxH", help="Pixels, multiples of 16: 832x480.")]
Frames = Annotated[int | None, typer.Option("--frames", help="Length in frames, 4n+1: 33, 81.")]
Fps = Annotated[int | None, typer.Option("--fps", help="Frames per second of the file.")]
Steps = Annotated[int | None, typer.Option("--steps", help="Denoising steps.")]
GuidanceScale = Annotated[
    str | None,
    typer.Option(
        "--guidance-scale", metavar="G", help="Weight of the prompt: 5; or HIGH,LOW for two experts."
    ),
]
Cache = Annotated[
    str | None,
    typer.Option(
        "--cache", metavar="NAME[:KEY=VALUE,..]", help="A lossy feature cache: teacache:threshold=0.1."
    ),
]
Fidelity = Annotated[
    str | None,
    typer.Option("--fidelity", metavar="DB", help="The fastest calibrated plan that keeps this PSNR: 35dB."),
]
Speedup = Annotated[
    float | None, typer.Option("--speedup", metavar="X", help="The calibrated plan of this speed: 2.")
]
LowMemLevel = Annotated[
    int | None,
    typer.Option(
        "--low-mem-level", help="0 all resident .. 4 blocks streamed; each level needs less memory."
    ),
]
Dtype = Annotated[str | None, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")]
Quant = Annotated[
    str | None, typer.Option("--quant", help="none, or fp8: linear layers in 8 bits, faster and lossy.")
]
Device = Annotated[str | None, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")]
Quality = Annotated[
    int | None, typer.Option("--quality", help="Of the mp4: 0 smallest .. 10 no visible loss.")
]
Gpus = Annotated[
    int | None, typer.Option("--gpus", min=1, metavar="N", help="Share the work over N local processes.")
]
Parallel = Annotated[
    str | None,
    typer.Option(
        "--parallel", metavar="LAYOUT", help="auto, or cfg2, u4, r2, cfg2u2r2 (CFG x Ulysses x ring)."
    ),
]
ConfigFile = Annotated[
    Path | None, typer.Option("--config", metavar="FILE", help="Settings from a TOML file.")
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="A.B=C", help="Any setting ('chitu config show'); repeatable."),
]
Json = Annotated[bool, typer.Option("--json", help="One JSON event a line on stdout.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything, print the plan, make nothing.")]

FLAG_OF_FIELD: Mapping[str, str] = {
    "prompt": "PROMPT",
    "negative_prompt": "--negative-prompt",
    "height": "--size height",
    "width": "--size width",
    "num_frames": "--frames",
    "fps": "--fps",
    "num_inference_steps": "--steps",
    "guidance_scale": "--guidance-scale",
    "seed": "--seed",
    "save_path": "-o",
    "flexcache": "--cache",
    "models.name": "--model",
    "infer.diffusion.low_mem_level": "--low-mem-level",
    "infer.dtype": "--dtype",
    "infer.quant": "--quant",
    "infer.device": "--device",
    "output.quality": "--quality",
    "parallel": "--parallel",
}


@contextmanager
def flags_named() -> Iterator[None]:
    """An error about a field names the flag that was typed instead."""
    try:
        yield
    except UsageError as error:
        flag = FLAG_OF_FIELD.get(error.field or "")
        message, start = str(error), f"{error.field} = "
        if flag is None:
            raise
        text = message.removeprefix(start)
        joint = " " if text is not message and message.startswith(start) else ": "
        raise UsageError(f"{flag}{joint}{text}", field=error.field) from error


def settings(
    *,
    config: Path | None,
    set_: list[str] | None,
    model: str | None = None,
    low_mem_level: int | None = None,
    dtype: str | None = None,
    quant: str | None = None,
    device: str | None = None,
    quality: int | None = None,
    parallel: str | None = None,
) -> tuple[EngineConfig, Origins]:
    """Settings from all four places, and where each came from.

    Raises:
        UsageError: an unknown name or a bad value, naming the flag.
    """
    from chitu_diffusion.config import load_config

    flags: dict[str, Any] = {
        "models.name": model,
        "infer.diffusion.low_mem_level": low_mem_level,
        "infer.dtype": dtype,
        "infer.quant": quant,
        "infer.device": device,
        "output.quality": quality,
    }
    if parallel is not None:
        from chitu_diffusion.distributed.plan import parse_layout

        with flags_named():
            layout = parse_layout(parallel)
        names = {"cfg": "cfg_size", "cp": "cp_size", "ulysses": "ulysses_degree"}
        flags |= {f"infer.diffusion.{names[name]}": value for name, value in layout.items()}
    for text in set_ or ():
        name, equals, value = text.partition("=")
        if not equals or not name.strip():
            raise UsageError(f"--set {text}: use NAME=VALUE, such as infer.attn_type=sdpa", field="set")
        flags[name.strip()] = value.strip()
    with flags_named():
        return load_config(config, flags)


def parse_size(text: str | None) -> tuple[int | None, int | None]:
    """`832x480` -> (832, 480), width first; None -> (None, None).

    Raises:
        UsageError: not two numbers.
    """
    if text is None:
        return None, None
    width, times, height = text.lower().replace("×", "x").partition("x")
    if not (times and _is_number(width) and _is_number(height)):
        raise UsageError(f"--size {text}: use WIDTHxHEIGHT in pixels, such as 832x480", field="size")
    return int(width), int(height)


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 20


def parse_guidance(text: str | None) -> float | tuple[float, float] | None:
    """`5` -> 5.0; `4,3` -> (4.0, 3.0), high noise first.

    Raises:
        UsageError: not one or two numbers.
    """
    if text is None:
        return None
    try:
        scales = [float(part) for part in text.split(",")]
    except ValueError:
        scales = []
    if len(scales) == 1:
        return scales[0]
    if len(scales) == 2:
        return scales[0], scales[1]
    raise UsageError(
        f"--guidance-scale {text}: a number (5), or two (4,3) for a model with two experts",
        field="guidance_scale",
    )


def parse_cache(text: str | None) -> str | dict[str, Any] | None:
    """`teacache` -> "teacache"; `teacache:threshold=0.1` -> {"strategy": "teacache", "threshold": 0.1}.

    Raises:
        UsageError: a part that is not KEY=VALUE.
    """
    from chitu_diffusion.flexcache.registry import parse_setting

    if not text:
        return None
    try:
        return parse_setting(text)
    except UsageError as error:
        raise UsageError(f"--cache {error}", field=error.field) from error


def parse_fidelity(text: str) -> float:
    """`35dB` or `35` -> 35.0.

    Raises:
        UsageError: not a number of decibels.
    """
    number = text.lower().removesuffix("db").strip()
    try:
        return float(number)
    except ValueError:
        raise UsageError(f"--fidelity {text}: use decibels, such as 35dB", field="fidelity") from None


def default_path(folder: str, seed: int) -> str:
    """A name that nobody has: FOLDER/<time>-seed<seed>.mp4. The prompt has no part in it."""
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    path, number = Path(folder) / f"{stamp}-seed{seed}.mp4", 1
    while path.exists():
        number += 1
        path = Path(folder) / f"{stamp}-seed{seed}-{number}.mp4"
    return str(path)


def make_folder(flag: str, folder: Path | None) -> None:
    """The folder that a flag names, made before any work is done; None makes none.

    Raises:
        UsageError: it cannot be made or written to, naming the flag.
    """
    if folder is None:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"{flag} {folder}: {error.strerror or error}; use another folder", field="profile"
        ) from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UsageError(
            f"{flag} {folder}: no permission to write into it; use another folder", field="profile"
        )


def path_for_seed(path: str, seed: int) -> str:
    """NAME.mp4 -> NAME-seed42.mp4, for one of several seeds."""
    if path.endswith("/"):
        return f"{path.rstrip('/')}-seed{seed}/"
    file = Path(path)
    return str(file.with_name(f"{file.stem}-seed{seed}{file.suffix}"))
