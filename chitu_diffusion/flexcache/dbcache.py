"""The first blocks run and say whether the middle ones must. Knows block residuals.

First Block Cache (ParaAttention) and its generalisation DBCache (cache-dit): blocks 0 .. F-1 always run;
their residual r = h_F - h_0 is compared with that of the last full step, delta = mean|r - r'| / mean|r'|;
while delta < threshold the middle blocks are skipped and what they added at the last full step is added
again; the last B blocks always run. F = 1, B = 0 is First Block Cache. One number a step is fetched from the
device, from the prompt's branch; the other branch follows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from chitu_diffusion.flexcache.interface import Compute, Site, SiteInputs
from chitu_diffusion.flexcache.schedule import Schedule, Shapes
from chitu_diffusion.flexcache.strategy import (
    Plan,
    Strategy,
    StrategyState,
    check_choice,
    check_number,
    check_whole,
)

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class DBCache(Strategy):
    """Skips the middle blocks by the first ones' residual.

    Args:
        threshold: of the residual's relative change; 0 never skips.
        first_blocks, last_blocks: how many always run; at least 1, and 0.
        longest: skipped steps in a row; 0 has no limit.
    """

    LEVELS: ClassVar[tuple[str, ...]] = ("block",)

    warmup: int = 4
    threshold: float = 0.08
    first_blocks: int = 2
    last_blocks: int = 1
    longest: int = 3

    def check(self) -> None:
        """Numbers in their ranges."""
        check_number("threshold", self.threshold)
        check_whole("first_blocks", self.first_blocks, 1)
        check_whole("last_blocks", self.last_blocks)
        check_whole("longest", self.longest)
        check_choice("predictor", self.predictor, ("reuse", "taylor"))

    def plan(self, schedule: Schedule) -> Plan:
        """Asks at every step that is not protected."""
        never = self.threshold == 0
        return {"block": ["compute" if guarded or never else "ask" for guarded in self.protected(schedule)]}

    def span(self, depth: int) -> tuple[int, int]:
        """The middle; empty where first and last take all."""
        return self.first_blocks, depth - 1 - self.last_blocks

    def kept_bytes(self, shapes: Shapes) -> int:
        """The middle's residuals, and the first blocks' own."""
        return super().kept_bytes(shapes) + shapes.stream

    def blocks(self, site: Site, compute: Compute, inputs: SiteInputs, state: StrategyState) -> Tensor:
        """The first blocks compute, the last of them decides, the rest follow."""
        first, last = self.span(site.depth)
        if site.block >= first or first > last:
            return super().blocks(site, compute, inputs, state)
        if site.block == 0:
            state.scratch["start"] = inputs.entering
        value = compute()
        if site.block == first - 1:
            self._decide(value - state.scratch.pop("start"), state)
        return value

    def _decide(self, residual: Tensor, state: StrategyState) -> None:
        prompt = state.info.of_prompt(residual)
        if state.decided is None:
            asked = state.action("block") == "ask"
            state.record_decision(asked and self._may_skip(prompt, state))
            state.notes["run"] = state.notes.get("run", 0) + 1 if state.decided else 0
        if not state.decided:
            state.notes["full"] = True
            if prompt is not None:
                state.notes["first"] = prompt

    def _may_skip(self, prompt: Tensor | None, state: StrategyState) -> bool:
        if not state.notes.get("full") or (self.longest and state.notes["run"] >= self.longest):
            return False
        change = None
        if prompt is not None:
            known = state.notes["first"].float()
            change = float((prompt.float() - known).abs().mean() / known.abs().mean())
        return state.all_reduce_max(change) < self.threshold


@dataclass(frozen=True)
class FBCache(DBCache):
    """First Block Cache: one block decides, all others follow."""

    first_blocks: int = 1
    last_blocks: int = 0
    longest: int = 0
