"""A fixed schedule of fresh steps, with a velocity predictor between them. Knows step numbers only.

MeanCache, "From Instantaneous to Average Velocity for Accelerating Flow Matching Inference"
(arXiv:2601.19961): a skipped step takes the last velocity, corrected by v_hat = v_last - J (sigma_next -
sigma_now), where J comes from the mean velocity over the last fresh steps (`predictors`, "velocity"). Which
steps are fresh is listed beforehand: dense at the start, where the video's layout is decided, sparse in
the middle, and dense again at the very end.

The paper's implementation has hand-made lists for 50 steps and 30, 25, 17 or 10 fresh ones. Here each list is
read as a quantile function Q_s(u), the share of the schedule that is over when a share u of the fresh steps
is spent, for its share s = fresh / steps. Any other s takes the linear mix of its two neighbours (s = 1 is
Q(u) = u), and rounding to distinct steps gives a plan for any number of steps that equals the lists where
they exist.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from chitu_diffusion.errors import UsageError
from chitu_diffusion.flexcache.schedule import Schedule
from chitu_diffusion.flexcache.strategy import Strategy, check_numbers, check_whole

_LISTED_STEPS = 50
_LISTS: tuple[tuple[int, ...], ...] = (
    (0, 1, 3, 7, 14, 21, 28, 35, 42, 49),
    (*range(9), 10, 17, 24, 31, 38, 45, 48, 49),
    (*range(17), 24, 32, 40, 43, 45, 47, 48, 49),
    (*range(20), 24, 28, 32, 36, 40, 43, 45, 47, 48, 49),
)
_USUAL_SHARE = 0.6


@dataclass(frozen=True)
class MeanCache(Strategy):
    """Fresh steps by a plan, whole velocities predicted between them.

    Args:
        fresh: how many steps are computed; 0 takes 60 % of them, the setting published as nearly lossless.
        steps: which steps are computed, in place of a number: "0-19+24+28", or numbers; the first must be 0.
    """

    LEVELS: ClassVar[tuple[str, ...]] = ("velocity", "step")

    warmup: int = 0
    cooldown: int = 0
    predictor: str = "velocity"
    fresh: int = 0
    steps: str | tuple[int, ...] = ""

    def check(self) -> None:
        """Numbers from 0; a list that begins with 0."""
        check_whole("fresh", self.fresh)
        listed = self.listed()
        if listed and listed[0] != 0:
            raise UsageError(
                f"flexcache steps = {self.steps!r}: step 0 has nothing to stand on; begin with 0",
                field="flexcache",
            )

    def check_steps(self, num_steps: int) -> None:
        """No more fresh steps than there are."""
        super().check_steps(num_steps)
        asked = max((self.fresh, *(step + 1 for step in self.listed())))
        if asked > num_steps:
            raise UsageError(
                f"flexcache fresh = {asked}: use at most the task's {num_steps} steps", field="flexcache"
            )

    def computed(self, schedule: Schedule) -> Sequence[bool]:
        """The plan for this number of steps."""
        chosen = set(self.listed() or fresh_plan(schedule.num_steps, self.fresh))
        return [step in chosen for step in range(schedule.num_steps)]

    def listed(self) -> list[int]:
        """The steps that were asked for by number, sorted; none where a number of them was."""
        if not isinstance(self.steps, str):
            check_numbers("steps", self.steps)
            for step in self.steps:
                check_whole("steps", step)
            return sorted(set(self.steps))
        found: set[int] = set()
        for part in filter(None, self.steps.split("+")):
            first, _, last = part.strip().partition("-")
            if not first.isdigit() or not (last or first).isdigit():
                raise UsageError(
                    f"flexcache steps = {self.steps!r}: use numbers such as 0-19+24+28", field="flexcache"
                )
            found |= set(range(int(first), int(last or first) + 1))
        return sorted(found)


def fresh_plan(num_steps: int, fresh: int = 0) -> list[int]:
    """The fresh steps of a schedule, first and last among them: `fresh` (at least 1), or 60 % for 0."""
    fresh = fresh or max(1, round(_USUAL_SHARE * num_steps))
    if fresh == 1 or num_steps == 1:
        return [0]
    share = fresh / num_steps
    places = [_quantile(share, index / (fresh - 1)) * (num_steps - 1) for index in range(fresh)]
    steps: list[int] = []
    for place in places:
        steps.append(max(round(place), steps[-1] + 1 if steps else 0))
    for index in range(fresh):
        steps[index] = min(steps[index], num_steps - fresh + index)
    return steps


def _quantile(share: float, spent: float) -> float:
    """Share of the schedule that is over when a share `spent` of the fresh steps is."""
    shares = [len(steps) / _LISTED_STEPS for steps in _LISTS] + [1.0]
    share = min(max(share, shares[0]), 1.0)
    above = max(bisect_left(shares, share), 1)
    mix = (share - shares[above - 1]) / (shares[above] - shares[above - 1])
    return (1 - mix) * _listed_quantile(above - 1, spent) + mix * _listed_quantile(above, spent)


def _listed_quantile(index: int, spent: float) -> float:
    if index == len(_LISTS):
        return spent
    steps = _LISTS[index]
    place = spent * (len(steps) - 1)
    low = min(int(place), len(steps) - 2)
    between = steps[low] + (place - low) * (steps[low + 1] - steps[low])
    return between / (_LISTED_STEPS - 1)
