"""Features are forecast between computed steps. Knows step numbers; the forecast itself is in `predictors`.

TaylorSeer, "From Reusable to Forecasting: Accelerating Diffusion Models with TaylorSeers" (arXiv:2503.06923):
every `interval`-th step is computed, in between each module's output is a Taylor sum of its backward
differences, F(x) = sum_i F_i x^i / i!. Order 0 is plain reuse.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from chitu_diffusion.flexcache.interval import fresh_every
from chitu_diffusion.flexcache.schedule import Schedule
from chitu_diffusion.flexcache.strategy import Strategy, check_choice, check_whole


@dataclass(frozen=True)
class TaylorSeer(Strategy):
    """Forecasts at module level as in the paper, or whole block stacks or velocities.

    Args:
        interval: steps from one computation to the next; 1 never forecasts.
        order: 0 to 2.
    """

    LEVELS: ClassVar[tuple[str, ...]] = ("module", "step", "velocity")

    warmup: int = 3
    predictor: str = "taylor"
    interval: int = 2

    def check(self) -> None:
        """`interval` is at least 1; the predictor is its own."""
        check_choice("predictor", self.predictor, ("taylor",))
        check_whole("order", self.order, 0, 2)
        check_whole("interval", self.interval, 1)

    def computed(self, schedule: Schedule) -> Sequence[bool]:
        """Every `interval`-th step, counted from the last computed one."""
        return fresh_every(self.interval, self.protected(schedule))
