"""Time as the dial: how far a stage is, how fast it may learn now, and when to save.

Knows no networks. Progress is a share of minutes, so that the same command suits any device, and
it survives a restart because the seconds spent are part of the checkpoint.
"""

from __future__ import annotations

import math
import time


class Clock:
    """Counts the seconds of one stage.

    Args:
        minutes: the stage's share of the dial.
        spent: seconds spent before a restart.
    """

    def __init__(self, minutes: float, spent: float = 0.0) -> None:
        self.limit = minutes * 60.0
        self._before = spent
        self._start = time.monotonic()

    @property
    def spent(self) -> float:
        """Seconds over all starts."""
        return self._before + time.monotonic() - self._start

    @property
    def progress(self) -> float:
        """0.0 to 1.0."""
        return min(self.spent / self.limit, 1.0) if self.limit > 0 else 1.0

    @property
    def over(self) -> bool:
        return self.progress >= 1.0

    def restart(self) -> None:
        """Do not count what came before (compilation, say)."""
        self._start = time.monotonic()


class Every:
    """True once every so many seconds."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._next = time.monotonic() + seconds

    def __call__(self) -> bool:
        now = time.monotonic()
        if now < self._next:
            return False
        self._next = now + self.seconds
        return True


def learning_rate(progress: float, warmup: float = 0.02, hold: float = 0.45) -> float:
    """Share of the peak: a linear rise, a plateau, then a cosine to 0."""
    if progress < warmup:
        return progress / warmup
    if progress < hold:
        return 1.0
    return 0.5 * (1.0 + math.cos(math.pi * min((progress - hold) / (1.0 - hold), 1.0)))
