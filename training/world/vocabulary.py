"""How clips are drawn at random from the four word lists of `chitu_diffusion.evaluation.prompts`.

A clip is named by four words: who (actor), in which colour, where (scene) and doing what (motion). Beside the
words it has a handful of random numbers (where exactly, how large, which hills). This file knows
combinations of words, and which of them are kept back from training; it knows nothing of pixels or
sentences.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from chitu_diffusion.evaluation.prompts import ACTORS, COLOURS, MOTIONS, SCENES, Words

SPLITS = ("train", "held_out", "all")

VARIATIONS = 16
"""How many random numbers a clip has. Poses use the first eight, scenes the last eight."""

_MASK = 0xFFFFFFFF


@dataclass(frozen=True)
class WorldSpecs:
    """A batch of clips to draw: word numbers, int64 `[B]`, and `variation`, float32 `[B, VARIATIONS]` in [0,
    1).
    """

    actor: Tensor
    colour: Tensor
    scene: Tensor
    motion: Tensor
    variation: Tensor

    def __len__(self) -> int:
        return self.actor.shape[0]

    def __getitem__(self, index: slice | Tensor) -> WorldSpecs:
        """The clips that a slice, a boolean mask or an index tensor picks."""
        return WorldSpecs(*(part[index] for part in self._parts()))

    def to(self, device: torch.device | str) -> WorldSpecs:
        """The same clips with their tensors on `device`."""
        return WorldSpecs(*(part.to(device) for part in self._parts()))

    def words(self) -> list[Words]:
        """Each clip's four words, in order."""
        rows = torch.stack((self.actor, self.colour, self.scene, self.motion), dim=1).tolist()
        return [Words(ACTORS[a], COLOURS[c], SCENES[s], MOTIONS[m]) for a, c, s, m in rows]

    def _parts(self) -> tuple[Tensor, ...]:
        return (self.actor, self.colour, self.scene, self.motion, self.variation)


def specs_for(words: list[Words], generator: torch.Generator) -> WorldSpecs:
    """Clips of the given words, with fresh variations."""
    return WorldSpecs(
        actor=torch.tensor([ACTORS.index(w.actor) for w in words], dtype=torch.long),
        colour=torch.tensor([COLOURS.index(w.colour) for w in words], dtype=torch.long),
        scene=torch.tensor([SCENES.index(w.scene) for w in words], dtype=torch.long),
        motion=torch.tensor([MOTIONS.index(w.motion) for w in words], dtype=torch.long),
        variation=torch.rand(len(words), VARIATIONS, generator=generator),
    )


def every_combination() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All combinations as four int64 tensors (actor, colour, scene, motion)."""
    axes = [torch.arange(len(values)) for values in (ACTORS, COLOURS, SCENES, MOTIONS)]
    actor, colour, scene, motion = torch.cartesian_prod(*axes).unbind(dim=1)
    return actor, colour, scene, motion


def is_held_out(actor: Tensor, colour: Tensor, scene: Tensor, motion: Tensor) -> Tensor:
    """Which combinations training never sees: bool, shaped like the inputs; about one in ten.

    A fixed integer hash decides, so the answer depends on nothing but the four numbers.
    """
    code = ((actor * len(COLOURS) + colour) * len(SCENES) + scene) * len(MOTIONS) + motion
    mixed = code + 0x9E3779B9
    for factor in (0x045D9F3B, 0x119DE1F3):
        mixed = ((mixed ^ (mixed >> 16)) * factor) & _MASK
    return (mixed ^ (mixed >> 16)) % 10 == 0


def sample_specs(n: int, generator: torch.Generator, split: str = "train") -> WorldSpecs:
    """`n` clips with words drawn evenly from a split ('train', 'held_out' or 'all'), on the CPU."""
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; it must be one of {', '.join(SPLITS)}")
    rows = torch.empty(0, 4, dtype=torch.long)
    while len(rows) < n:
        columns = [
            torch.randint(len(values), (2 * n + 64,), generator=generator)
            for values in (ACTORS, COLOURS, SCENES, MOTIONS)
        ]
        held_out = is_held_out(*columns)
        keep = {"train": ~held_out, "held_out": held_out, "all": torch.ones_like(held_out)}[split]
        rows = torch.cat((rows, torch.stack(columns, dim=1)[keep]))
    actor, colour, scene, motion = rows[:n].unbind(dim=1)
    return WorldSpecs(actor, colour, scene, motion, torch.rand(n, VARIATIONS, generator=generator))


def sample_pairs(n: int, generator: torch.Generator) -> tuple[WorldSpecs, WorldSpecs]:
    """`n` times two clips of one scene, of the split 'train'."""
    first = sample_specs(n, generator)
    scenes = first.scene
    second = sample_specs(n, generator)
    while True:
        second = replace(second, scene=scenes)
        bad = is_held_out(second.actor, second.colour, second.scene, second.motion)
        bad |= second.actor == first.actor
        if not bad.any():
            return first, second
        fresh = sample_specs(n, generator)
        parts = zip(second._parts(), fresh._parts(), strict=True)
        second = WorldSpecs(*(torch.where(bad.view(-1, *[1] * (a.ndim - 1)), b, a) for a, b in parts))
