"""Every n-th step is computed, the rest stand on it. Knows step numbers only.

FORA, "Fast-Forward Caching in Diffusion Transformer Acceleration" (arXiv:2407.01425): step t is computed iff
t mod n = 0. The paper keeps the outputs of attention and feed-forward (level "module"); the default here
keeps what the whole block stack adds (level "step"), which costs one state in place of three a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from chitu_diffusion.flexcache.schedule import Schedule
from chitu_diffusion.flexcache.strategy import Strategy, check_whole


@dataclass(frozen=True)
class Interval(Strategy):
    """Computes every `interval`-th step.

    Args:
        interval: steps from one computation to the next; 1 never reuses.
    """

    LEVELS: ClassVar[tuple[str, ...]] = ("step", "velocity", "module")

    interval: int = 2

    def check(self) -> None:
        """`interval` is at least 1."""
        check_whole("interval", self.interval, 1)

    def computed(self, schedule: Schedule) -> Sequence[bool]:
        """Counted from the last computed step, so that protected steps start the count anew."""
        return fresh_every(self.interval, self.protected(schedule))


def fresh_every(interval: int, protected: Sequence[bool]) -> list[bool]:
    """For each step, whether it lies `interval` steps after the last computed one, or is protected."""
    flags: list[bool] = []
    last = -interval
    for step, guarded in enumerate(protected):
        flags.append(guarded or step - last >= interval)
        last = step if flags[-1] else last
    return flags
