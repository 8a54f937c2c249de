"""What happened to a job, and what its workers logged: an attempt's file is DATA/jobs/ID/log-N.jsonl.

The files stay as long as the job's row, whatever becomes of the attempt's folder. Knows files, events and
Python's logging; no workers, and no SQL, for those import it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from chitu_diffusion.service.store import JobStore

logger = logging.getLogger(__name__)
_PACKAGE = logging.getLogger("chitu_diffusion")
_NAME = "log-{}.jsonl"
_AT_ONCE = 1000


@dataclass(frozen=True)
class LogLine:
    """One line: seconds since 1970, who says it ("service" or "attempt N"), an event's kind or a level, and
    words.
    """

    at: float
    source: str
    kind: str
    text: str


class _JsonLine(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        text = record.getMessage()
        if record.exc_info:
            text += f"\n{self.formatException(record.exc_info)}"
        line = {"at": record.created, "level": record.levelname.lower(), "message": text}
        return json.dumps(line, ensure_ascii=False)


@contextmanager
def logged(job_id: str, fence: int, data: str | Path = ".") -> Iterator[None]:
    """Have all that the package logs meanwhile in a job's file, details too; elsewhere it logs as usual."""
    file = Path(data, "jobs", job_id, _NAME.format(fence))
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(file, encoding="utf-8", errors="backslashreplace")
    except OSError as error:  # the job runs without
        logger.warning("%s cannot be written: %s", file.name, error.strerror or error)
        yield
        return
    handler.setFormatter(_JsonLine())
    level = _PACKAGE.level
    usual = _PACKAGE.getEffectiveLevel()
    others = logging.getLogger().handlers[:]

    def is_usual(record: logging.LogRecord) -> bool:
        return record.levelno >= usual or not record.name.startswith(_PACKAGE.name)

    for other in others:
        other.addFilter(is_usual)
    _PACKAGE.addHandler(handler)
    _PACKAGE.setLevel(logging.DEBUG)
    try:
        yield
    finally:
        _PACKAGE.setLevel(level)
        _PACKAGE.removeHandler(handler)
        handler.close()
        for other in others:
            other.removeFilter(is_usual)


class JobLog:
    """A job's lines, each given once.

    Args:
        data: the folder of the jobs' files.
        job_id: of a job that there is.
    """

    def __init__(self, store: JobStore, data: str | Path, job_id: str) -> None:
        self._store = store
        self._job = job_id
        self._folder = Path(data, "jobs", job_id)
        self._events = 0
        self._read: dict[Path, int] = {}

    def fresh(self) -> list[LogLine]:
        """Those that have come since the last call, by time.

        Raises:
            StoreDownError
        """
        lines = [*self._from_events(), *self._from_files()]
        return sorted(lines, key=lambda line: line.at)

    def _from_events(self) -> Iterator[LogLine]:
        while events := self._store.events(self._job, self._events, _AT_ONCE):
            for event in events:
                said = ", ".join(f"{name} {value}" for name, value in event.data.items())
                yield LogLine(event.at, "service", event.kind, said)
            self._events = events[-1].n

    def _from_files(self) -> Iterator[LogLine]:
        for file in self._folder.glob(_NAME.format("*")):
            begin = self._read.get(file, 0)
            with file.open("rb") as stream:
                stream.seek(begin)
                whole, end, _ = stream.read().rpartition(b"\n")
            self._read[file] = begin + len(whole) + len(end)
            source = f"attempt {file.stem.partition('-')[2]}"
            for line in whole.splitlines():
                try:
                    said = json.loads(line)
                    yield LogLine(float(said["at"]), source, str(said["level"]), str(said["message"]))
                except (ValueError, KeyError, TypeError):  # half a line, of a process that was killed
                    continue
