"""What the text after a flag means: sizes, guidance, caches, layouts, settings, names of files.

Everything is checked here, before anything is loaded, and an error names the flag that was typed. Which flags
there are is known by `flags.py`.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from chitu_diffusion.errors import UsageError


def parse_text(text: str) -> str:
    """What was typed, read as UTF-8 where the locale's own encoding lacks it (LC_ALL=C)."""
    try:
        return os.fsencode(text).decode("utf-8")
    except UnicodeError:
        return text  # no text in either; the request says so


def parse_seeds(text: str) -> list[int] | None:
    """`7` -> [7]; `7..9` -> [7, 8, 9].

    Raises:
        UsageError: neither a number nor a rising range.
    """
    from chitu_diffusion.pipelines.request import parse_seeds as parse

    return parse(text)


def parse_size(text: str) -> tuple[int, int]:
    """`832x480` -> (832, 480), width first.

    Raises:
        UsageError: not two numbers.
    """
    width, times, height = text.lower().replace("×", "x").partition("x")
    if not (times and _is_number(width) and _is_number(height)):
        raise UsageError(f"--size {text}: use WIDTHxHEIGHT in pixels, such as 832x480", field="size")
    return int(width), int(height)


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 20


def parse_guidance(text: str) -> float | tuple[float, float]:
    """`5` -> 5.0; `4,3` -> (4.0, 3.0), high noise first.

    Raises:
        UsageError: not one or two numbers.
    """
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


def parse_cache(text: str) -> str | dict[str, Any] | None:
    """`teacache` -> "teacache"; `teacache:threshold=0.1` -> {"strategy": "teacache", "threshold": 0.1}; an
    empty text is None.

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


def parse_files(texts: Sequence[str]) -> list[str] | None:
    """Each as the request takes it; none at all is None, so that what else names some stands."""
    return list(texts) or None


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


def parse_parallel(text: str) -> dict[str, int | None]:
    """`u4` -> the three settings of a layout of ranks, by dotted name.

    Raises:
        UsageError: not such a word.
    """
    from chitu_diffusion.distributed.plan import parse_layout

    try:
        layout = parse_layout(text)
    except UsageError as error:
        raise UsageError(f"--parallel {str(error).removeprefix('parallel = ')}", field=error.field) from error
    names = {"cfg": "cfg_size", "cp": "cp_size", "ulysses": "ulysses_degree"}
    return {f"infer.diffusion.{names[name]}": value for name, value in layout.items()}


def parse_settings(texts: Sequence[str]) -> dict[str, str]:
    """["infer.attn_type=sdpa"] -> {"infer.attn_type": "sdpa"}.

    Raises:
        UsageError: a text that is not NAME=VALUE.
    """
    settings: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.strip():
            raise UsageError(f"--set {text}: use NAME=VALUE, such as infer.attn_type=sdpa", field="set")
        settings[name.strip()] = value.strip()
    return settings


def default_path(folder: str, seed: int) -> str:
    """A name that nobody has: FOLDER/<time>-seed<seed>.mp4. The prompt has no part in it."""
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    path = Path(folder) / f"{stamp}-seed{seed}.mp4"
    number = 1
    while path.exists():
        number += 1
        path = Path(folder) / f"{stamp}-seed{seed}-{number}.mp4"
    return str(path)


def path_for_seed(path: str, seed: int) -> str:
    """NAME.mp4 -> NAME-seed42.mp4, for one of several seeds."""
    if path.endswith("/"):
        return f"{path.rstrip('/')}-seed{seed}/"
    file = Path(path)
    return str(file.with_name(f"{file.stem}-seed{seed}{file.suffix}"))
