"""Steps are skipped while the latent's way says that the velocity has hardly changed. Knows latents and
velocities.

EasyCache, "Training-Free Video Diffusion Acceleration via Runtime-Adaptive Caching" (arXiv:2507.02860): at
the last full step the network turned a change of its input into a change of its output at the rate k =
mean|v_t - v_p| / mean|x_t - x_p|, p the step before it. A step adds k mean|x_t - x_p| / mean|v_p| to its
error; it is skipped while the sum is below the
threshold, and then v_t = x_t + (v - x of the last full step). The first `warmup` steps are full.

x is shared by both branches and v is the prompt's, so that one number decides for all; it is the only thing
that is fetched from the device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from chitu_diffusion.flexcache.interface import Moment, Signal, Site
from chitu_diffusion.flexcache.schedule import Schedule, Shapes
from chitu_diffusion.flexcache.strategy import Kept, Plan, Strategy, check_choice, check_number, place_of

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class EasyCache(Strategy):
    """Skips by the latent's way.

    Args:
        threshold: of the accumulated error; 0 never skips.
        fill: what a skipped step takes: "offset", v - x of the last full step laid upon x as in the paper, or
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

    def velocity(
        self, moment: Moment, latent: Tensor, compute: Callable[[tuple[int, ...]], Tensor], kept: Kept
    ) -> Tensor:
        """Decides, then computes or stands in."""
        asks = "ask" in kept.plan["velocity"][moment.step :]
        place = place_of(Site("velocity", 0, 0), moment)
        if kept.action("velocity", moment.step) == "ask" and place in kept.records:
            kept.settle(moment.step, self._may_skip(moment, latent, kept))
        if kept.decided(moment.step):
            value = self._stand_in(moment, place, latent, kept)
        else:
            value = compute(moment.branches)
            if asks:
                self._note_full(moment, place, value, latent, kept)
        if asks:
            kept.notes["last"] = (latent, value)
        return value

    def _may_skip(self, moment: Moment, latent: Tensor, kept: Kept) -> bool:
        if not kept.notes.get("rated"):
            return False
        before, velocity = kept.notes["last"]
        prompt, error = moment.of_prompt(velocity), None
        if prompt is not None:
            error = float(kept.notes["rate"] * (latent - before).abs().mean() / prompt.float().abs().mean())
        kept.notes["error"] += kept.agree(error)
        return bool(kept.notes["error"] < self.threshold)

    def _note_full(self, moment: Moment, place: str, value: Tensor, latent: Tensor, kept: Kept) -> None:
        if "last" in kept.notes:
            before, velocity = kept.notes["last"]
            now, then = moment.of_prompt(value), moment.of_prompt(velocity)
            kept.notes["rated"] = True
            if now is not None and then is not None:
                kept.notes["rate"] = (now.float() - then.float()).abs().mean() / (
                    latent - before
                ).abs().mean()
        kept.notes.update(error=0.0, anchor=latent)
        self.keep(moment, place, value, Signal(latent), kept)

    def _stand_in(self, moment: Moment, place: str, latent: Tensor, kept: Kept) -> Tensor:
        if self.fill == "predictor":
            return self.predicted(moment, place, kept)
        record = kept.records[place][-1]
        repeats = len(moment.branches)
        value: Tensor = record["value"] + (latent - kept.notes["anchor"]).repeat(repeats, 1, 1, 1, 1).to(
            record["value"].dtype
        )
        return value
