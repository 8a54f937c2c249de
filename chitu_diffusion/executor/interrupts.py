"""Signals that end a run: which they are, and when they are raised."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import FrameType

_INTERRUPTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

AtOnce = Callable[[], AbstractContextManager[None]]
"""Makes a context in which interrupts are raised where they come, and one that was held back before it."""


@contextmanager
def deferred_interrupts() -> Iterator[AtOnce]:
    """Ctrl+C and the like are raised when this is over, for what is inside must be whole. Where this is
    inside another, they wait for the end of that one. Gives an `AtOnce`, for a part that may be cut short.
    """
    if threading.current_thread() is not threading.main_thread():
        yield nullcontext
        return
    came: list[int] = []
    raised: list[int] = []
    held = [True]
    before = {each: handler for each in _INTERRUPTS if callable(handler := signal.getsignal(each))}

    def raise_first() -> None:
        if came:
            number = signal.Signals(came[0])
            came.clear()
            raised[:] = [number]
            before[number](number, None)
            raised.clear()

    def on_signal(number: int, frame: FrameType | None) -> None:
        came.append(number)
        if not held[0]:
            raise_first()

    @contextmanager
    def at_once() -> Iterator[None]:
        held[0] = False
        try:
            raise_first()
            yield
        except BaseException:
            raised.clear()
            raise
        finally:
            held[0] = True
            came.extend(raised)  # Python drops what is raised in a finalizer or a weakref's callback

    for each in before:
        signal.signal(each, on_signal)
    try:
        yield at_once
    finally:
        held[0] = False  # one that comes now is raised at once, by a handler that is not put back yet, too
        for each, handler in before.items():
            signal.signal(each, handler)
        raise_first()


def as_ctrl_c(number: int, frame: FrameType | None) -> None:
    """A handler: what is computed is saved, nothing half-written stays.

    Raises:
        KeyboardInterrupt: always.
    """
    raise KeyboardInterrupt(signal.Signals(number).name)


@contextmanager
def signals_as_ctrl_c() -> Iterator[None]:
    """SIGTERM and SIGHUP end what is inside as Ctrl+C does, where nobody else handles or ignores them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    own = [each for each in _INTERRUPTS if signal.getsignal(each) is signal.SIG_DFL]
    for each in own:
        signal.signal(each, as_ctrl_c)
    try:
        yield
    finally:
        for each in own:
            signal.signal(each, signal.SIG_DFL)
