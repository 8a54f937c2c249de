"""The held-out prompts that models are scored by, and the four words that each of them names.

`training.world` drew them once, from combinations that no training saw; they are kept as a file, so that two
models are asked the same and scoring needs no world. Knows words and sentences; no pixels and no engine.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from chitu_diffusion.errors import UsageError

ACTORS = ("cat", "dog", "rabbit", "bird", "fish", "car", "boat", "ball", "robot", "flower")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "white")
SCENES = ("grass", "beach", "night sky", "city", "snow", "sea")
MOTIONS = ("left", "right", "up", "down", "jumping", "circling", "growing", "spinning", "staying")

HELD_OUT = Path(__file__).parent.parent / "assets" / "prompts" / "held_out.json"
"""A set of 16 prompts and a set of 64; neither begins with the other."""


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
