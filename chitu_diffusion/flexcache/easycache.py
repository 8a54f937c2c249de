"""Steps are skipped while the latent's way says that the velocity has hardly changed. Knows latents and
velocities.

EasyCache, "Training-Free Video Diffusion Acceleration via Runtime-Adaptive Caching" (arXiv:2507.02860): at
the last full step the network turned a change of its input into a change of its output at the rate k =
mean|v_t - v_p| / mean|x_t - x_p|, p the step before it. A step adds k mean|x_t - x_p| / mean|v_p| to its
error; it is skipped while the sum is below the threshold, and then v_t = x_t + (v - x of the last full step).
The first `warmup` steps are full.

x is shared by both branches and v is the prompt's, so that one number decides for all; it is the only thing
that is fetched from the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from chitu_diffusion.flexcache.interface import ComputeBranches
from chitu_diffusion.flexcache.schedule import Schedule, Shapes
from chitu_diffusion.flexcache.strategy import Plan, Strategy, StrategyState, check_choice, check_number

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class EasyCache(Strategy):
    """Skips by the latent's way.

    Args:
        threshold: of the accumulated error; 0 never skips.
        fill: what a skipped step takes: "offset", v - x of the last full step added to x as in the paper, or
            "predictor", the velocity that `predictor` gives.
    """

    LEVELS: ClassVar[tuple[str, ...]] = ("velocity",)

    warmup: int = 10
    threshold: float = 0.05
    fill: str = "offset"

    def check(self) -> None:
        """A threshold from 0."""
        check_number("threshold", self.threshold)
        check_choice("fill", self.fill, ("offset", "predictor"))

    def plan(self, schedule: Schedule) -> Plan:
        """Asks at every step that is not protected."""
        never = self.threshold == 0
        return {
            "velocity": ["compute" if guarded or never else "ask" for guarded in self.protected(schedule)]
        }

    def kept_bytes(self, shapes: Shapes) -> int:
        """Records, the last step's velocities, and two latents."""
        return (self.records_needed + 1) * shapes.velocity + self.latent_bytes(shapes) + 8 * shapes.latent

    def velocity(self, latent: Tensor, compute: ComputeBranches, state: StrategyState) -> Tensor:
        """Decides, then computes or stands in."""
        asks = "ask" in state.plan["velocity"][state.info.step :]
        place = state.place("velocity")
        if state.action("velocity") == "ask" and place in state.records:
            state.record_decision(self._may_skip(latent, state))
        if state.decided:
            value = self._stand_in(place, latent, state)
        else:
            value = compute(state.info.branches)
            if asks:
                self._note_full(place, value, latent, state)
        if asks:
            state.notes["last"] = (latent, value)
        return value

    def _may_skip(self, latent: Tensor, state: StrategyState) -> bool:
        if not state.notes.get("rated"):
            return False
        before, velocity = state.notes["last"]
        prompt = state.info.of_prompt(velocity)
        error = None
        if prompt is not None:
            error = float(state.notes["rate"] * (latent - before).abs().mean() / prompt.float().abs().mean())
        state.notes["error"] += state.all_reduce_max(error)
        return bool(state.notes["error"] < self.threshold)

    def _note_full(self, place: str, value: Tensor, latent: Tensor, state: StrategyState) -> None:
        if "last" in state.notes:
            before, velocity = state.notes["last"]
            now = state.info.of_prompt(value)
            then = state.info.of_prompt(velocity)
            state.notes["rated"] = True
            if now is not None and then is not None:
                state.notes["rate"] = (now.float() - then.float()).abs().mean() / (
                    latent - before
                ).abs().mean()
        state.notes.update(error=0.0, anchor=latent)
        self.keep(place, value, latent, state)

    def _stand_in(self, place: str, latent: Tensor, state: StrategyState) -> Tensor:
        if self.fill == "predictor":
            return self.predicted(place, state)
        record = state.records[place][-1]
        moved = (latent - state.notes["anchor"]).repeat(len(state.info.branches), 1, 1, 1, 1)
        value: Tensor = record["value"] + moved.to(record["value"].dtype)
        return value
