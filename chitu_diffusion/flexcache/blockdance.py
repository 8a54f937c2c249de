"""The first blocks are skipped every other step in a window; the last ones always run. Knows block and step
numbers.

BlockDance, "Reuse Structurally Similar Spatio-Temporal Features to Accelerate Diffusion Transformers"
(arXiv:2503.15927): shallow and middle blocks, which make structure, change little once it stands. Between 25
and 95 % of the schedule, steps come in groups; the first of a group is computed, and the others begin at the
state after block `boundary`. The paper hands on that state h itself; `form=residual` hands on what blocks
0..boundary added, h - tokens, and lays it upon the present tokens, so that the present latent still counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from chitu_diffusion.flexcache.schedule import Schedule
from chitu_diffusion.flexcache.strategy import Strategy, check_choice, check_number, check_whole


@dataclass(frozen=True)
class BlockDance(Strategy):
    """Skips blocks 0..boundary inside groups of steps.

    Args:
        boundary: share of the blocks that are skipped, in (0, 1]; 0.6 is 18 of 30.
        group: steps of a group; 1 never skips.
        start, end: the window, shares of the schedule.
        form: what is handed on: "state" as in the paper, or "residual".
    """

    LEVELS: ClassVar[tuple[str, ...]] = ("block",)

    boundary: float = 0.6
    group: int = 2
    start: float = 0.25
    end: float = 0.9
    form: str = "state"

    def check(self) -> None:
        """Shares in 0 to 1, groups from 1."""
        check_number("boundary", self.boundary, 0, 1)
        check_whole("group", self.group, 1)
        check_number("start", self.start, 0, 1)
        check_number("end", self.end, self.start, 1)
        check_choice("form", self.form, ("state", "residual"))
        check_choice("predictor", self.predictor, ("reuse", "taylor"))

    def span(self, depth: int) -> tuple[int, int]:
        """Blocks 0 .. the boundary."""
        return 0, max(round(self.boundary * depth), 1) - 1

    def computed(self, schedule: Schedule) -> Sequence[bool]:
        """Outside of the window, and the first of each group inside it."""
        count = schedule.num_steps
        guarded = self.protected(schedule)
        low = round(self.start * count)
        high = round(self.end * count)
        flags = []
        run = 0
        for step in range(count):
            inside = low <= step < high and not guarded[step]
            flags.append(not inside or run % self.group == 0)
            run = run + 1 if inside else 0
        return flags

    @property
    def residual(self) -> bool:
        """By `form`."""
        return self.form == "residual"
