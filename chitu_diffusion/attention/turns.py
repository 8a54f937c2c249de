"""Attention in three steps, so that two sequences can take turns: while one computes, the other's exchanges travel.

The guidance branches of a step know nothing of each other. Where their attention is spread over ranks, one branch's exchange
is hidden behind the other's work: `begin` sends, `attend` waits for what the others sent, computes and sends back, `finish`
waits for what comes back. Knows no rank and no kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

from torch import Tensor

Finish = Callable[[], Tensor]
"""Waits for the result and gives it, [B, S, H, D]."""
Attend = Callable[[], Finish]


@runtime_checkable
class TurnTaking(Protocol):
    """An attention whose calls can overlap."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """All three steps at once."""
        ...

    def begin(self, q: Tensor, k: Tensor, v: Tensor) -> Attend:
        """Sends what the others need; every rank takes the steps of its calls in the same order."""
        ...
