"""What the service's processes log: as text, or a JSON object a line, with the ids of what it is about. Knows
logging; no jobs.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime

from chitu_diffusion.service.settings import LogSettings

_ABOUT: ContextVar[dict[str, str]] = ContextVar("chitu_log_about", default={})  # noqa: B039 (never changed)


@contextmanager
def logged_about(**ids: str | None) -> Iterator[None]:
    """What is logged inside is about these: job, worker, request."""
    known = {name: value for name, value in ids.items() if value}
    token = _ABOUT.set({**_ABOUT.get(), **known})
    try:
        yield
    finally:
        _ABOUT.reset(token)


class LogFormatter(logging.Formatter):
    """Lines of a record: with `time` (UTC), `level`, `logger`, `message`, the ids, and `error` (a traceback).

    Args:
        as_json: else as text, the ids after the message.
        process: ids of the whole process.
    """

    def __init__(self, *, as_json: bool, process: dict[str, str]) -> None:
        super().__init__()
        self._as_json = as_json
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        """One line of JSON, or text."""
        ids = {**self._process, **_ABOUT.get()}
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")[:-6] + "Z"
        error = self.formatException(record.exc_info) if record.exc_info else None
        message = record.getMessage()
        if self._as_json:
            fields = {
                "time": time,
                "level": record.levelname.lower(),
                "logger": record.name,
                "message": message,
            }
            return json.dumps(fields | ids | ({} if error is None else {"error": error}), ensure_ascii=False)
        said = "".join(f" {name}={value}" for name, value in ids.items())
        return f"{time} {record.levelname} {message}{said}" + ("" if error is None else f"\n{error}")


@contextmanager
def logs_to_stderr(settings: LogSettings, **process: str) -> Iterator[None]:
    """What is logged meanwhile goes to stderr, libraries' warnings included.

    Args:
        process: ids of the whole process, such as its worker.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LogFormatter(as_json=settings.format == "json", process=process))
    root = logging.getLogger()
    own = logging.getLogger("chitu_diffusion")
    before = own.level
    root.addHandler(handler)
    own.setLevel(settings.level.upper())
    try:
        yield
    finally:
        own.setLevel(before)
        root.removeHandler(handler)
