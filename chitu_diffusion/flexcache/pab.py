"""Attention outputs are broadcast to the next steps inside a window of timesteps. Knows timesteps only.

PAB, "Real-Time Video Generation with Pyramid Attention Broadcast" (arXiv:2408.12588): differences between
steps are large at both ends of the schedule and small between, least for cross-attention. Inside the window
low < timestep < high, counted from its first step, self-attention is computed every `self_range` steps and
cross-attention every `cross_range`; all else always. The paper's window is 450 to 930 of 1000; its spatial
and temporal attention are one here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from chitu_diffusion.flexcache.interface import Action, Level
from chitu_diffusion.flexcache.schedule import Schedule
from chitu_diffusion.flexcache.strategy import Plan, Strategy, check_choice, check_number, check_whole


@dataclass(frozen=True)
class PAB(Strategy):
    """Broadcasts by module.

    Args:
        self_range, cross_range, ffn_range: steps from one computation to the next; 1 always computes.
        low, high: the window, in timesteps.
    """

    LEVELS: ClassVar[tuple[str, ...]] = ("module",)

    self_range: int = 2
    cross_range: int = 3
    ffn_range: int = 1
    low: float = 450.0
    high: float = 930.0

    def check(self) -> None:
        """Ranges from 1, a window inside 0 to 1000."""
        for name, value in (
            ("self_range", self.self_range),
            ("cross_range", self.cross_range),
            ("ffn_range", self.ffn_range),
        ):
            check_whole(name, value, 1)
        check_number("low", self.low, 0, 1000)
        check_number("high", self.high, self.low, 1000)
        check_choice("predictor", self.predictor, ("reuse", "taylor"))

    def ranges(self) -> dict[Level, int]:
        """Steps from one computation to the next, by level; a level that is always computed is left out."""
        ranges: dict[Level, int] = {
            "attention": self.self_range,
            "cross": self.cross_range,
            "ffn": self.ffn_range,
        }
        return {level: steps for level, steps in ranges.items() if steps > 1}

    def levels_used(self) -> tuple[Level, ...]:
        """Those that broadcast."""
        return tuple(self.ranges())

    def plan(self, schedule: Schedule) -> Plan:
        """Each level by its own range, from the window's first step on; a protected step computes all."""
        inside = [
            self.low < time < self.high and not guarded
            for time, guarded in zip(schedule.timesteps, self.protected(schedule), strict=True)
        ]
        saved: Action = "reuse" if self.predictor == "reuse" else "predict"
        plan: Plan = {}
        for level, steps in self.ranges().items():
            actions: list[Action] = []
            count = 0
            for within in inside:
                actions.append(saved if within and count % steps else "compute")
                count = count + 1 if within else 0
            plan[level] = actions
        return plan
