"""How long units of work took on this machine, remembered between runs in one small file.

Nothing depends on the file: one that cannot be read is as none, and one that cannot be written is left out.
Knows kinds of units, their work and seconds; no tasks, no models, no torch, so that `--dry-run` can ask it.
"""

from __future__ import annotations

import json
import logging
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chitu_diffusion.files.atomic import write_text
from chitu_diffusion.files.reading import read_json

logger = logging.getLogger(__name__)

_FILE = "paces.json"
_LARGEST_FILE = 2**20
_ASKED = "asked"
_KEPT = 8
"""Measurements of one kind in one setup; of as many setups as `_SETUPS`, the newest stay."""
_SETUPS = 64
_NEAR = 1.2
"""Factor within which works count as alike."""


@dataclass(frozen=True)
class Unit:
    """A unit of work, as far as its time goes.

    Attributes:
        kind: units of one kind take a time in proportion to their work, roughly.
        work: multiply-adds of an encoding, and of a denoising step in full; pixels of all frames for a
            decoding or a saving.
        share: of that work that is done, where a step cache answers the rest: a guess, for what was never
            measured.
    """

    kind: str
    work: float
    share: float = 1.0

    @property
    def stage(self) -> str:
        """The stage that it belongs to."""
        return self.kind.partition(" ")[0]


class Paces:
    """What was measured in one setup.

    Args:
        folder: where the file lies; None keeps it in memory.
        setup: in words, what a pace depends on beside the unit: model, device, dtype, threads and so on.
        asked: the same as the settings have it ("auto"), by which `of_settings` finds this setup.
    """

    def __init__(self, folder: Path | None, setup: str, asked: str = "") -> None:
        self._file = None if folder is None else folder / _FILE
        self._setup = setup
        self._asked = asked
        self._known = _checked(_read(self._file).get(setup))

    @classmethod
    def of_settings(cls, folder: Path | None, asked: str) -> Paces:
        """Of the setup that these settings came to when they ran last."""
        found = _read(None if folder is None else folder / _FILE)
        here = [
            name for name, kinds in found.items() if isinstance(kinds, dict) and kinds.get(_ASKED) == asked
        ]
        return cls(folder, here[-1] if here else asked, asked)

    def seconds(self, unit: Unit) -> float | None:
        """Of a unit: by the median pace of those whose work was nearest to its own; None where none was
        measured."""
        far = self._distances(unit)
        if not far:
            return None
        nearest = min(distance for distance, _ in far)
        return unit.work * statistics.median(pace for distance, pace in far if distance <= nearest * _NEAR)

    def seconds_near(self, unit: Unit) -> float | None:
        """`seconds`, where one of about its work was measured; else None."""
        is_near = any(distance <= _NEAR for distance, _ in self._distances(unit))
        return self.seconds(unit) if is_near else None

    def _distances(self, unit: Unit) -> list[tuple[float, float]]:
        """By how much each measured unit's work was larger or smaller, as a factor from 1, and its pace."""
        measured = self._known.get(unit.kind, [])
        return [(max(work / unit.work, unit.work / work), seconds / work) for work, seconds in measured]

    def add(self, unit: Unit, seconds: float) -> None:
        """A unit was measured."""
        if seconds > 0:
            older = self._known.get(unit.kind, [])
            self._known[unit.kind] = [*older, (unit.work, seconds)][-_KEPT:]

    def save(self) -> None:
        """Into the file, where there is one that can be written."""
        if self._file is None:
            return
        setups = _read(self._file)
        setups.pop(self._setup, None)
        setups[self._setup] = {**self._known, _ASKED: self._asked}
        try:
            write_text(self._file, json.dumps(dict(list(setups.items())[-_SETUPS:])))
        except (OSError, ValueError) as error:
            logger.debug("cannot remember paces in %s: %s", self._file, error)


def _read(file: Path | None) -> dict[str, Any]:
    """What the file holds, by setup; nothing where it cannot be read."""
    try:
        found = {} if file is None else read_json(file, _LARGEST_FILE)
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _checked(kinds: Any) -> dict[str, list[tuple[float, float]]]:
    """Those measurements of a setup that can be: (work, seconds), by kind."""
    known: dict[str, list[tuple[float, float]]] = {}
    for kind, pairs in kinds.items() if isinstance(kinds, dict) else ():
        good = [pair for pair in pairs if _is_measurement(pair)] if isinstance(pairs, list) else []
        if good:
            known[kind] = [(pair[0], pair[1]) for pair in good[-_KEPT:]]
    return known


def _is_measurement(pair: Any) -> bool:
    return (
        isinstance(pair, list)
        and len(pair) == 2
        and all(type(value) in (int, float) and 1e-9 < value < 1e30 for value in pair)
    )
