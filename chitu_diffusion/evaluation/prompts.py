"""The held-out prompts that models are scored by, and the four words that each of them names.

`training.world` drew them once, from combinations that no training saw; they are kept as a file, so that two
models are asked the same and scoring needs no world. Knows words and sentences; no pixels and no engine.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from chitu_diffusion.errors import UsageError

ACTORS = ("cat", "dog", "rabbit", "bird", "fish", "car", "boat", "ball", "robot", "flower")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "white")
SCENES = ("grass", "beach", "night sky", "city", "snow", "sea")
MOTIONS = ("left", "right", "up", "down", "jumping", "circling", "growing", "spinning", "staying")

HELD_OUT = Path(__file__).parent.parent / "assets" / "prompts" / "held_out.json"
"""A set of 16 prompts and a set of 64; neither begins with the other."""


CHINESE = HELD_OUT.with_name("held_out_chinese.json")
"""The set of 64, said in Chinese."""

TAIL = "cinematic, 4k, highly detailed"
NEGATIVE = "blurry, low quality, watermark, deformed, ugly"
LONG = 60
"""Words of a long prompt."""

PICTURES = HELD_OUT.with_name("held_out_pictures.png")
"""First frames of drawn clips of the set of 64, a square each, in rows of eight."""

MANNERS = ("plain", "negative", "tail", "long", "chinese", "picture")
"""How a prompt is asked: as it is, with `NEGATIVE`, with `TAIL`, in `LONG` words, in Chinese, with the first
frame as a picture.
"""

_CLAUSES = (
    "seen through the eyes of a patient observer who has all the time in the world",
    "rendered in a cheerful manner that people of every age will recognise at once",
    "the light seems to come from nowhere and everywhere at the same time",
    "there is no hurry and no worry in what can be seen here",
    "its shape is easy to make out against what lies behind it",
    "a quiet and hopeful mood fills all of the picture until the very end",
)
"""None of them is among those of the training."""


@dataclass(frozen=True)
class Words:
    """What a clip shows: who, in which colour, where, doing what."""

    actor: str
    colour: str
    scene: str
    motion: str


def held_out_prompts(n: int) -> list[tuple[str, Words]]:
    """`n` prompts with their words, always the same: of the set of 16, or of the set of 64 where 16 are too
    few.

    Raises:
        UsageError: `n` is not 1 to 64.
    """
    if not 1 <= n <= 64:
        raise UsageError(
            f"--prompts {n}: use 1 to 64, or a text file with one prompt a line", field="prompts"
        )
    rows = json.loads(HELD_OUT.read_text(encoding="utf-8"))["16" if n <= 16 else "64"][:n]
    return [(row.pop("prompt"), Words(**row)) for row in rows]


def asked_in(manner: str, n: int) -> list[tuple[str, str, Words]]:
    """(prompt, negative prompt, its words) of `held_out_prompts`, in one of `MANNERS`; the manner "picture"
    takes them from the set of 64.
    """
    prompts = held_out_prompts(64)[:n] if manner == "picture" else held_out_prompts(n)
    if manner == "tail":
        return [(f"{prompt.rstrip('.!')}, {TAIL}", "", words) for prompt, words in prompts]
    if manner == "long":
        return [(lengthened(prompt, number), "", words) for number, (prompt, words) in enumerate(prompts)]
    if manner == "chinese":
        said = json.loads(CHINESE.read_text(encoding="utf-8"))["16" if n <= 16 else "64"][:n]
        return [(prompt, "", words) for prompt, (_, words) in zip(said, prompts, strict=True)]
    return [(prompt, NEGATIVE if manner == "negative" else "", words) for prompt, words in prompts]


def held_out_pictures(n: int) -> list[np.ndarray]:
    """The first frames that belong to `asked_in("picture", n)`, each [H, W, 3] uint8."""
    with Image.open(PICTURES) as sheet:
        pixels = np.asarray(sheet.convert("RGB"))
    side = pixels.shape[1] // 8
    places = [(side * (number // 8), side * (number % 8)) for number in range(n)]
    return [pixels[top : top + side, left : left + side] for top, left in places]


def lengthened(prompt: str, number: int) -> str:
    """A sentence of `LONG` words that begins with the prompt; `number` says with which clause it goes on."""
    words = prompt.rstrip(".!").split()
    while len(words) < LONG:
        words[-1] += ","
        words += _CLAUSES[number % len(_CLAUSES)].split()
        number += 1
    return " ".join(words[:LONG])
