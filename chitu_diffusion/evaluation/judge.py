"""A small classifier that says which actor, colour, scene and motion a clip of the drawn world shows.

It is trained on drawn clips only (`training.judging`) and never sees a generated one. This file
holds the network and its weights' place; it knows nothing of engines or prompts.
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from chitu_diffusion.errors import ModelMissingError
from chitu_diffusion.evaluation.prompts import ACTORS, COLOURS, MOTIONS, SCENES, Words

FRAMES = 9
SIDE = 64
WEIGHTS = Path(__file__).parent.parent / "assets" / "judge" / "judge.safetensors"
CARD = WEIGHTS.with_suffix(".json")
CLASSES = {"actor": ACTORS, "colour": COLOURS, "scene": SCENES, "motion": MOTIONS}


class Judge(nn.Module):
    """Frames through a shared 2D network, then frames together through convolutions over time.

    Two channels of coordinates let the network say where the actor is, which is what motion is made of.
    """

    def __init__(self) -> None:
        super().__init__()
        widths = [5, 16, 32, 64, 96]
        self.stages = nn.ModuleList(
            nn.Sequential(
                *(nn.Conv2d(a, b, 3, stride=2, padding=1), nn.GroupNorm(8, b), nn.GELU()),
                *(nn.Conv2d(b, b, 3, padding=1), nn.GroupNorm(8, b), nn.GELU()),
            )
            for a, b in pairwise(widths)
        )
        self.flat = nn.Linear(widths[-1] * (SIDE // 16) ** 2, 192)
        self.time = nn.Sequential(
            nn.Conv1d(192, 192, 3, padding=1), nn.GELU(), nn.Conv1d(192, 96, 3, padding=1), nn.GELU()
        )
        self.heads = nn.ModuleDict(
            {name: nn.Linear(96 * FRAMES + 192, len(names)) for name, names in CLASSES.items()}
        )

    def forward(self, video: Tensor) -> dict[str, Tensor]:
        """video [B, T, 3, H, W] in [0, 1], any T, H, W -> logits [B, classes] by name ("actor", ...)."""
        x = prepare(video)  # [B, FRAMES, 3, SIDE, SIDE]
        batch = x.shape[0]
        line = torch.linspace(-1, 1, SIDE, device=x.device, dtype=x.dtype)
        place = torch.stack(torch.meshgrid(line, line, indexing="ij")).expand(batch * FRAMES, 2, SIDE, SIDE)
        x = torch.cat([x.flatten(0, 1) * 2 - 1, place], dim=1)
        for stage in self.stages:
            x = stage(x)
        frames = F.gelu(self.flat(x.flatten(1))).unflatten(0, (batch, FRAMES))  # [B, FRAMES, 192]
        moved = self.time(frames.transpose(1, 2)).flatten(1)
        features = torch.cat([moved, frames.mean(dim=1)], dim=1)
        return {name: head(features) for name, head in self.heads.items()}


def prepare(video: Tensor) -> Tensor:
    """Any clip [B, T, 3, H, W] -> [B, FRAMES, 3, SIDE, SIDE]: frames evenly spread, area-averaged."""
    index = torch.linspace(0, video.shape[1] - 1, FRAMES, device=video.device).round().long()
    picked = video[:, index]
    small = F.interpolate(picked.flatten(0, 1).float(), size=(SIDE, SIDE), mode="area")
    return small.unflatten(0, (video.shape[0], FRAMES))


def load_judge(path: Path = WEIGHTS) -> Judge:
    """The shipped judge.

    Raises:
        ModelMissingError: its weights are not there.
    """
    if not path.exists():
        raise ModelMissingError(
            f"the judge's weights are missing: {path}; train them with 'python -m training --stages judge'"
        )
    judge = Judge()
    judge.load_state_dict({name: value.float() for name, value in load_file(path).items()})
    return judge.eval().requires_grad_(False)


def judge_accuracy() -> tuple[dict[str, float], int]:
    """How often the shipped judge is right, as its training measured: share by part, and clips drawn."""
    card = json.loads(CARD.read_text(encoding="utf-8"))
    return card["accuracy"], card["test_clips"]


@torch.no_grad()
def name_parts(judge: Judge, video: Tensor) -> list[Words]:
    """What the judge sees in clips [B, T, 3, H, W] in [0, 1]."""
    logits = judge(video)
    best = {part: logits[part].argmax(1).tolist() for part in CLASSES}
    return [Words(**{part: CLASSES[part][best[part][row]] for part in CLASSES}) for row in range(len(video))]
