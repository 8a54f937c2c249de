"""Faults at named points: the n-th is one thing that goes wrong, for n = 1, 2, 3 ... until none is left."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from chitu_diffusion.media.reading import read_frames


class FailAt:
    """A handler of fail points that does something at one of those that it counts.

    Args:
        number: which, from 0; beyond the last it only counts.
        act: what it does, given the point and its value.
        counts: which points count; all, if not given.
    """

    def __init__(
        self,
        number: int,
        act: Callable[[str, Any], None],
        counts: Callable[[str, Any], bool] = lambda point, value: True,
    ) -> None:
        self._number = number
        self._act = act
        self._counts = counts
        self._lock = threading.Lock()
        self.seen: list[str] = []
        """The points that were counted, by their labels."""
        self.steps = 0
        """Denoising steps that were done."""

    @property
    def at(self) -> str | None:
        """Where it acted; None where there are fewer points."""
        return self.seen[self._number] if self._number < len(self.seen) else None

    def __call__(self, point: str, value: Any) -> None:
        with self._lock:
            self.steps += point == "denoise.after"
            if not self._counts(point, value):
                return
            due = len(self.seen) == self._number
            self.seen.append(label(point, value))
        if due:
            self._act(point, value)


def label(point: str, value: Any) -> str:
    """A point with the file or step that it is about."""
    if isinstance(value, Path):
        return f"{point} {value.name}"
    return f"{point} {value}" if isinstance(value, int) else point


def frames_sha256(path: Path) -> str:
    """Of a video's frames, which must be readable; timings in its recipe make the file's own differ."""
    frames = read_frames(path)
    return hashlib.sha256(repr(frames.shape).encode() + frames.tobytes()).hexdigest()


def files_below(folder: Path) -> list[str]:
    """Every file and folder in a folder, as paths within it."""
    return sorted(place.relative_to(folder).as_posix() for place in folder.rglob("*"))
