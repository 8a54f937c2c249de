"""Text for people: times, prompts, tables and errors as they stand in a terminal.

Knows the two streams (results on stdout, everything else on stderr) and nothing of the work.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any

from chitu_diffusion.errors import ChituError, StageError, UsageError
from chitu_diffusion.task.events import EVENT_SCHEMA

_QUIET = ContextVar("quiet", default=False)
_LOGGER = logging.getLogger("chitu_diffusion")

WIDEST = 10_000
"""Columns of a line in a file or a pipe."""


def say(text: str) -> None:
    """A line on stderr, at once; none after `--quiet`."""
    if not _QUIET.get():
        complain(text)


def complain(text: str) -> None:
    """An error's line on stderr, at once, quiet or not."""
    print(text, file=sys.stderr, flush=True)


def be_quiet() -> None:
    """Nothing but errors is told from now on; `one_command` ends it."""
    _QUIET.set(True)
    _LOGGER.setLevel(logging.ERROR)


def is_quiet() -> bool:
    """Whether the command was told `--quiet`."""
    return _QUIET.get()


@contextmanager
def one_command() -> Iterator[None]:
    """What a command says of quiet is its own."""
    level = _LOGGER.level
    token = _QUIET.set(False)
    try:
        yield
    finally:
        _QUIET.reset(token)
        _LOGGER.setLevel(level)


def emit(event: str, at: float | None = None, **values: Any) -> None:
    """One JSON event on one line of stdout, at once; `docs/events.md` lists them.

    Args:
        at: when it was, in seconds since 1970; None is now.
    """
    when = datetime.fromtimestamp(time.time() if at is None else at, UTC)
    stamp = when.isoformat(timespec="milliseconds").replace("+00:00", "Z")
    line = {"event": event, "schema": EVENT_SCHEMA, "time": stamp, **values}
    print(json.dumps(line, default=str), flush=True)


def emit_document(document: Any) -> None:
    """A whole answer as indented JSON on stdout."""
    print(json.dumps(document, indent=2, default=str), flush=True)


def emit_error(error: BaseException, message: str, exit_code: int) -> None:
    """An error as a JSON event."""
    field = error.field if isinstance(error, UsageError) else None
    emit("error", kind=type(error).__name__, message=message, field=field, exit_code=exit_code)


def exit_code_of(error: BaseException) -> int:
    """0 to 4, see `errors.py`; a failed stage has its cause's; 1 for an error that is not ours."""
    if isinstance(error, StageError):
        error = error.cause
    return error.exit_code if isinstance(error, ChituError) else 1


def duration(seconds: float) -> str:
    """`0.42 s`, `12.3 s`, `2 min 05 s`, `1 h 02 min`."""
    if seconds < 9.95:
        return f"{seconds:.2f} s"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"


def time_left(seconds: float) -> str:
    """`12.3 s left`; never none, while something is still to be done."""
    return f"{duration(seconds)} left" if seconds >= 0.05 else "a moment left"


def size(number: float) -> str:
    """Bytes as `512 B`, `1.5 MiB`, `27.3 GiB`."""
    if number < 1024:
        return f"{number:.0f} B"
    for unit in ("KiB", "MiB", "GiB"):
        number /= 1024
        if number < 1024:
            return f"{number:.1f} {unit}"
    return f"{number / 1024:.1f} TiB"


def printable(text: str) -> str:
    """Text without anything that could steer a terminal."""
    return "".join(c if c.isprintable() else " " for c in text)


def quoted(prompt: str, width: int = 60) -> str:
    """A prompt on one short line."""
    text = printable(prompt)
    return f'"{text if len(text) <= width else text[: width - 3] + "..."}"'


def table(titles: Sequence[str], rows: Sequence[Sequence[object]], *, to_stderr: bool = False) -> None:
    """Columns, as wide as the terminal allows; never cut when the output is not a terminal."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    grid = Table(box=box.SIMPLE, pad_edge=False)
    for title in titles:
        grid.add_column(title, overflow="fold")
    for row in rows:
        grid.add_row(*(Text(printable(str(cell))) for cell in row))
    console = Console(stderr=to_stderr)
    if not console.is_terminal:
        console = Console(stderr=to_stderr, width=Console(width=WIDEST).measure(grid).maximum)
    console.print(grid)
