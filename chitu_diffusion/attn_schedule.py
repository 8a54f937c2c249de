"""What `infer.attn_schedule` says. Imports no torch."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from typing import Any


@dataclass(frozen=True)
class AttnSchedule:
    """A kernel that takes over the self-attention late in a task, as `infer.attn_schedule` says it.

    Attributes:
        kernel: its name.
        after: so many steps run before, of a task's steps of all stages.
        of_share: whether `after` is a share of the task's steps, 0 to 1.
    """

    kernel: str
    after: Fraction
    of_share: bool

    @classmethod
    def from_text(cls, text: str | None) -> AttnSchedule | None:
        """`sage@10`: after 10 steps; `fa3_fp8@25%`: after a quarter of them; None: None.

        Raises:
            ValueError: another text.
        """
        if text is None:
            return None
        found = re.fullmatch(
            r"(?P<kernel>[\w-]+)@(?P<after>[0-9]+(?:\.[0-9]+)?)(?P<percent>%?)", text.strip()
        )
        of_share = found is not None and bool(found["percent"])
        after = Fraction(0) if found is None else Fraction(found["after"]) / (100 if of_share else 1)
        if found is None or (after > 1 if of_share else after.denominator > 1) or found["kernel"] == "auto":
            raise ValueError(
                "use KERNEL@STEPS or KERNEL@PERCENT%, such as fa3_fp8@10 (attn_type for 10 steps, then "
                "fa3_fp8) or fa3_fp8@25%"
            )
        return cls(found["kernel"], after, of_share)

    @classmethod
    def from_recipe(cls, said: Mapping[str, Any]) -> str:
        """The setting's text, from what a recipe says of it; a share as the decimal number that it was."""
        if "after_share" not in said:
            return f"{said.get('kernel')}@{said.get('after_steps', 0):.0f}"
        return f"{said.get('kernel')}@{Decimal(str(said['after_share'])) * 100:f}%"

    def begins(self, num_steps: int | None) -> int | None:
        """The kernel's first step, from 0, in a task of so many; None for a share of a number not known."""
        if not self.of_share:
            return int(self.after)
        return None if num_steps is None else math.ceil(self.after * num_steps)

    def describe(self, num_steps: int) -> str:
        """In words, for a task of so many steps."""
        first = self.begins(num_steps) or 0
        never = "" if first < num_steps else ": never reached"
        return f"{self.kernel} attention after {first} of {num_steps} steps{never}"
