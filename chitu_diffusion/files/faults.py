"""Named fail points: places where a test has the work go wrong, one after the other.

A point does nothing unless code of this process has put a handler in; no setting and no variable can, so that
nothing outside a process breaks it. What a fault is, and at which point it happens, is the handler's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

FailHandler = Callable[[str, Any], None]
"""(point, value): raises, ends the process, writes into a tensor, or lets the work go on."""


class _Installed:
    def __init__(self) -> None:
        self.handler: FailHandler | None = None


_installed = _Installed()


def hit(point: str, value: Any = None) -> None:
    """The work has come to a point.

    Args:
        point: its name, such as "denoise.before".
        value: what the point is about: the number of a step, the path of a file, or a tensor with which the
            work goes on.
    """
    if _installed.handler is not None:
        _installed.handler(point, value)


@contextmanager
def fail_points(handler: FailHandler) -> Iterator[None]:
    """Every `hit` of this process, in whichever thread, goes to the handler while the block lasts."""
    _installed.handler = handler
    try:
        yield
    finally:
        _installed.handler = None
