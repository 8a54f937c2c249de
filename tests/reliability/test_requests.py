"""What is accepted ends well, and what is refused names its field."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

from card import Card
from conftest import MakeConfig

from chitu_diffusion.engine import Engine
from chitu_diffusion.errors import UsageError, WillNotFitError
from chitu_diffusion.task import TaskStatus

VALUES: dict[str, tuple[Any, ...]] = {
    "height": (16, 24, 40, 8, 0, -16, 17, 10**9, 2.5),
    "width": (16, 24, 40, 8, 1, 15, 10**9, "16"),
    "num_frames": (1, 5, 9, 4, 0, -1, 10**9),
    "num_inference_steps": (1, 2, 3, 0, -5, 10**9, 1.5),
    "guidance_scale": (1.0, 5.0, 0.0, (4.0, 3.0), math.nan, math.inf, -3.0, 1e30),
    "fps": (8, 23.976, 0, -1, math.nan),
    "seed": (0, 7, -1, 2**63, 2**64, 1.5),
    "shift": (1.0, 12.0, 0.0, -1.0, math.inf),
    "flexcache": (None, "interval", "teacache", "pab:low=0", "none", {"strategy": "fbcache"}),
    "negative_prompt": ("", "a dog", "\ud800", "x" * 3000),
}  # fmt: skip


def test_what_is_accepted_ends_well(
    tiny_folder: Path, make_config: MakeConfig, tmp_path: Path, card: Card
) -> None:
    chance = random.Random(7)
    cases = card.rounds(120, 500)
    accepted = 0
    with Engine(make_config(tiny_folder)) as engine:
        for number in range(cases):
            usual = {"height": 16, "width": 16, "num_frames": 1, "num_inference_steps": 1, "seed": number}
            odd = {
                name: chance.choice(VALUES[name])
                for name in chance.sample(sorted(VALUES), chance.choice((1, 1, 2)))
            }
            path = tmp_path / "a.npy"
            said: UsageError | WillNotFitError | None = None
            try:
                task = engine.submit("a cat", save_path=str(path), **{**usual, **odd})
            except (UsageError, WillNotFitError) as error:
                said = error
            if said is not None:
                assert isinstance(said, WillNotFitError) or said.field, odd
                assert len(str(said)) > 10, odd
                continue
            engine.run_until_idle(raise_on_failure=False)
            assert task.status is TaskStatus.FINISHED, (odd, task.error_message)
            accepted += 1
    card.add(requests=cases, accepted=accepted, accepted_then_failed=0)
    assert cases // 8 < accepted < cases
