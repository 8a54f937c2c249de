"""When Ctrl+C is raised: held back, at once, and where Python itself would drop it."""

from __future__ import annotations

import signal

import pytest

from chitu_diffusion.executor.interrupts import deferred_interrupts


class SignalsWhenDropped:
    def __del__(self) -> None:
        signal.raise_signal(signal.SIGINT)


def test_an_interrupt_waits_for_the_end_and_one_inside_another_for_the_outer_one() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), deferred_interrupts():
        with deferred_interrupts():
            signal.raise_signal(signal.SIGINT)
            done.append("inner")
        done.append("outer")
    assert done == ["inner", "outer"]


def test_an_interrupt_is_raised_at_once_where_it_may_be() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), deferred_interrupts() as at_once:
        signal.raise_signal(signal.SIGINT)
        done.append("held back")
        with at_once():
            done.append("not reached")
    assert done == ["held back"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_that_a_finalizer_drops_is_raised_at_the_end() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), deferred_interrupts() as at_once:
        with at_once():
            SignalsWhenDropped()
            done.append("dropped")
        done.append("whole")
    assert done == ["dropped", "whole"]


def test_what_was_caught_inside_is_not_raised_again() -> None:
    before = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    with deferred_interrupts() as at_once, pytest.raises(KeyboardInterrupt), at_once():
        signal.raise_signal(signal.SIGINT)
    assert {each: signal.getsignal(each) for each in before} == before
