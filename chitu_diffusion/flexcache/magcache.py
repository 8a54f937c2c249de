"""Steps are skipped while the residual's size is known to change little. Knows measured ratios; no latent.

MagCache, "Fast Video Generation with Magnitude-Aware Cache" (arXiv:2506.09045): gamma_t = mean|r_t| /
mean|r_{t-1}| of the block stack's residual r hardly depends on the prompt and is measured once. Over a run of
skipped steps the product of the gammas says how far the old residual is off; skip while sum |1 - prod gamma|
< threshold and the run is at most `longest`. The first `retention` of the schedule is always computed.

Ratios belong to the model (`models/wan/cache_coefficients.py`). A schedule of another length than the
measured run takes, for each step, the ratio of the nearest one, raised to the power of measured steps a step,
for the ratios of finer steps multiply up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from chitu_diffusion.errors import UsageError
from chitu_diffusion.flexcache.schedule import Schedule
from chitu_diffusion.flexcache.strategy import Strategy, check_number, check_numbers, check_whole


@dataclass(frozen=True)
class MagCache(Strategy):
    """Skips by measured magnitudes.

    Args:
        threshold: of the accumulated error; 0 never skips.
        longest: skipped steps in a row.
        retention: share of the schedule, from its start, that is always computed.
        ratios: one a step; empty takes the model's own.
    """

    cooldown: int = 0
    threshold: float = 0.12
    longest: int = 2
    retention: float = 0.2
    ratios: tuple[float, ...] = ()

    def check(self) -> None:
        """Numbers in their ranges."""
        check_number("threshold", self.threshold)
        check_whole("longest", self.longest)
        check_number("retention", self.retention, 0, 1)
        check_numbers("ratios", self.ratios)

    def check_measured(self, schedule: Schedule) -> None:
        """There are ratios."""
        if not self._ratios_for(schedule):
            raise UsageError(
                f"flexcache magcache: no ratios were measured on {schedule.model}; give ratios=, or use "
                "meancache or easycache, which need none",
                field="flexcache",
            )

    def _ratios_for(self, schedule: Schedule) -> tuple[float, ...]:
        return self.ratios or schedule.measured.get("magcache", ())

    def computed(self, schedule: Schedule) -> Sequence[bool]:
        """The published rule over the model's ratios.

        Raises:
            UsageError: nothing was measured on this model.
        """
        self.check_measured(schedule)
        count = schedule.num_steps
        held = [
            guarded or step < self.retention * count for step, guarded in enumerate(self.protected(schedule))
        ]
        return run_lengths(spread(self._ratios_for(schedule), count), held, self.threshold, self.longest)


def spread(ratios: Sequence[float], num_steps: int) -> list[float]:
    """Measured ratios on a schedule of another length."""
    if len(ratios) == num_steps:
        return list(ratios)
    scale = (len(ratios) - 1) / max(num_steps - 1, 1)
    return [float(ratios[round(step * scale)] ** scale) for step in range(num_steps)]


def run_lengths(
    ratios: Sequence[float], protected: Sequence[bool], threshold: float, longest: int
) -> list[bool]:
    """For each step, whether it is computed."""
    flags: list[bool] = []
    product = 1.0
    error = 0.0
    run = 0
    for ratio, guarded in zip(ratios, protected, strict=True):
        product = product * ratio
        run = run + 1
        error += abs(1 - product)
        flags.append(guarded or error >= threshold or run > longest)
        if flags[-1]:
            product = 1.0
            error = 0.0
            run = 0
    return flags
