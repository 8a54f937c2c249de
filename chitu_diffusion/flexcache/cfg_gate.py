"""The branch without the prompt is left out in a window of the schedule. Knows branches and step numbers.

Classifier-free guidance (arXiv:2207.12598) runs two branches, c with the prompt and u without, and takes u +
s (c - u). Late steps change the difference c - u little ("Adaptive Guidance", arXiv:2312.12487; FasterCache's
CFG-Cache, arXiv:2410.19355). In the window only every `interval`-th step runs both; the others run c alone
and take u = c - (c - u of the last full step) (`fill=difference`), or u = c, no guidance at all
(`fill=drop`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from chitu_diffusion.flexcache.interface import Action, ComputeBranches, Level
from chitu_diffusion.flexcache.interval import fresh_every
from chitu_diffusion.flexcache.schedule import Schedule
from chitu_diffusion.flexcache.strategy import (
    Strategy,
    StrategyState,
    check_choice,
    check_number,
    check_whole,
)

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class CfgGate(Strategy):
    """Leaves out the second branch.

    Args:
        start, end: the window, shares of the schedule.
        interval: inside it, steps from one full computation to the next; 0 has none.
        fill: what stands in for the second branch: "difference" or "drop".
    """

    LEVELS: ClassVar[tuple[str, ...]] = ("velocity",)

    start: float = 0.5
    end: float = 1.0
    interval: int = 5
    fill: str = "difference"

    def check(self) -> None:
        """Shares in 0 to 1; the predictor is reuse or Taylor."""
        check_number("start", self.start, 0, 1)
        check_number("end", self.end, self.start, 1)
        check_whole("interval", self.interval)
        check_choice("fill", self.fill, ("difference", "drop"))
        check_choice("predictor", self.predictor, ("reuse", "taylor"))

    def computed(self, schedule: Schedule) -> Sequence[bool]:
        """Outside of the window, and every `interval`-th step inside it."""
        count = schedule.num_steps
        low = round(self.start * count)
        high = round(self.end * count)
        outside = [guarded or not low <= step < high for step, guarded in enumerate(self.protected(schedule))]
        return outside if self.interval == 0 else fresh_every(self.interval, outside)

    def work_left(self, actions: Mapping[Level, Action]) -> float:
        """One branch of two."""
        return 0.5 if actions else 1.0

    def velocity(self, latent: Tensor, compute: ComputeBranches, state: StrategyState) -> Tensor:
        """Both branches, or the prompt's and a stand-in for the other."""
        import torch

        branches = state.info.branches
        place = state.place("velocity")
        if branches != (0, 1):
            return compute(branches)
        if not state.saves("velocity") or place not in state.records:
            value = compute(branches)
            if self.worth_keeping(state.plan["velocity"], state.info.step):
                prompt, other = value.chunk(2)
                self.keep(place, prompt - other, latent, state)
            return value
        prompt = compute((0,))
        other = prompt if self.fill == "drop" else prompt - self.predicted(place, state)
        return torch.cat([prompt, other])
