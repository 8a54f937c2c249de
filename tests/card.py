"""The lines of the reliability card: what tests tell it, and how each of them ended. Without `--card` nothing
is kept, and loops are short.
"""

from __future__ import annotations

import itertools
import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


class Card:
    """Figures of one test.

    Args:
        file: takes a line of JSON for each; None for none.
        test: whose they are.
    """

    def __init__(self, file: str | None, test: str) -> None:
        self._file = file
        self._test = test

    def add(self, **figures: Any) -> None:
        """Figures by name: numbers, truths, short texts, lists of numbers."""
        write_line(self._file, {"test": self._test, "figures": figures})

    def every_point(self) -> Iterator[int]:
        """Numbers of fail points, from the first on without end; where no card is written every third alone,
        from another start each time.
        """
        stride = self.rounds(3, 1)
        first = secrets.randbelow(stride)
        print("fail points from", first)  # shown when a test fails
        return itertools.count(first, stride)

    def rounds(self, quick: T, long: T) -> T:
        """What a loop takes: `long` where a card is written."""
        return quick if self._file is None else long


def write_line(file: str | None, values: dict[str, Any]) -> None:
    """At the end of the file, in one write: several processes may."""
    if file is not None:
        handle = os.open(Path(file), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            os.write(handle, json.dumps(values).encode() + b"\n")
        finally:
            os.close(handle)
