"""What follows from the time of a sequence's tokens: one row for all or, where the first latent frame is
known (Wan2.2-TI2V-5B), one for its tokens and one for the others. Never a row for each token.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class TimeRows(NamedTuple):
    """The rows, and which tokens have which.

    Attributes:
        rows: [B or 1, R, ...]; R is 1, or 2.
        split: of two rows, how many of the sequence's tokens have the first; 0 where there is one.
    """

    rows: Tensor
    split: int = 0

    @property
    def latest(self) -> Tensor:
        """[B or 1, ...], of the tokens that are not known."""
        return self.rows[:, -1]

    def of_tokens(self, low: int, high: int) -> TimeRows:
        """The rows of a part of the sequence."""
        first = min(max(self.split - low, 0), high - low)
        if self.rows.shape[1] == 1 or 0 < first < high - low:
            return TimeRows(self.rows, first)
        return TimeRows(self.rows[:, 1:] if first == 0 else self.rows[:, :1])

    def repeated(self, copies: int) -> TimeRows:
        """The rows of as many branches; those common to a batch stay one."""
        if len(self.rows) == 1:
            return self
        return TimeRows(self.rows.repeat(copies, *[1] * (self.rows.ndim - 1)), self.split)

    def of_branch(self, copies: int) -> TimeRows:
        """Those of the first of `copies` branches."""
        one = self.rows if len(self.rows) == 1 else self.rows[: len(self.rows) // copies]
        return TimeRows(one, self.split)
