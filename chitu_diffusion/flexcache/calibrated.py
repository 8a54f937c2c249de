"""The plan that costs the picture least for a number of computed steps. Knows what was measured on the model.

Which steps are computed, and by what linear combination of the last computed ones the others are predicted,
is calculated from full-compute runs of the model (`plan_search`), for whatever schedule the task has. All of
it is known before step 0: no sync, no memory but the last `order` velocities and one latent, and all ranks
agree.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from chitu_diffusion.errors import UsageError
from chitu_diffusion.flexcache.interface import ComputeBranches
from chitu_diffusion.flexcache.predictors import weighted
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

    from chitu_diffusion.flexcache.calibration import Calibration

_LONGEST = 6
"""Skipped steps in a row that a plan may have at the least, where many are computed."""


@dataclass(frozen=True)
class CalibratedPlan(Strategy):
    """Computed steps and predictions from `chitu calibrate`.

    Args:
        speedup: forwards of full compute over forwards of the plan, at least.
        fresh: how many steps are computed, in place of a speed.
        order: how many computed steps a prediction looks at, 1 to 4.
        longest: skipped steps in a row, at most; 0 is 2.5 times the plan's mean, and at least 6.
    """

    LEVELS: ClassVar[tuple[str, ...]] = ("velocity",)

    warmup: int = 0
    cooldown: int = 0
    order: int = 3
    speedup: float = 2.0
    fresh: int = 0
    longest: int = 0

    def check(self) -> None:
        """Numbers in their ranges; the predictor is its own."""
        check_number("speedup", self.speedup, 1)
        check_whole("fresh", self.fresh)
        check_whole("longest", self.longest)
        check_choice("predictor", self.predictor, ("reuse",))

    def check_steps(self, num_steps: int) -> None:
        """No more computed steps than there are."""
        super().check_steps(num_steps)
        if not self.fresh and self.speedup > num_steps:
            raise UsageError(
                f"speedup = {self.speedup:g}: of {num_steps} steps at least one is computed; use at most "
                f"{num_steps}",
                field="flexcache",
            )
        if self.fresh > num_steps:
            raise UsageError(
                f"flexcache fresh = {self.fresh}: use at most the task's {num_steps} steps", field="flexcache"
            )

    @property
    def needs_linear_solver(self) -> bool:
        """It was measured on one, and weighs errors by what the solver makes of them."""
        return True

    @property
    def records_needed(self) -> int:
        """Computed steps that a prediction looks at."""
        return self.order

    def latent_bytes(self, shapes: Shapes) -> int:
        """The newest computed step's, float32."""
        return 4 * shapes.latent

    def check_measured(self, schedule: Schedule) -> None:
        """There is a calibration, where steps are to be skipped."""
        if self._count(schedule.num_steps) < schedule.num_steps and schedule.calibration is None:
            raise _uncalibrated(schedule.model)

    def _count(self, num_steps: int) -> int:
        return self.fresh or max(1, math.floor(num_steps / self.speedup + 1e-9))

    def plan(self, schedule: Schedule) -> Plan:
        """The plan alone."""
        return self.build_plan(schedule)[0]

    def build_plan(self, schedule: Schedule) -> tuple[Plan, dict[int, Any]]:
        """The plan, and for each skipped step (computed steps looked at, weights [B, B * those + 1]).

        Raises:
            UsageError: the model was not calibrated, or with other weights, or no plan is that short.
        """
        count = self._count(schedule.num_steps)
        if count >= schedule.num_steps:
            return {"velocity": ["compute"] * schedule.num_steps}, {}
        calibration = _calibration_for(schedule)
        longest = self.longest or max(_LONGEST, math.ceil(2.5 * schedule.num_steps / count))
        required = tuple(step for step, guarded in enumerate(self.protected(schedule)) if guarded)
        asked = (
            schedule.sampler,
            schedule.sigmas,
            schedule.guidance,
            schedule.experts,
            required,
            count,
            self.order,
            longest,
        )
        if asked not in calibration.plans:
            calibration.plans[asked] = _calculated(
                calibration, schedule, required, count, self.order, longest
            )
        weights = calibration.plans[asked]
        return {
            "velocity": ["predict" if step in weights else "compute" for step in range(schedule.num_steps)]
        }, weights

    def velocity(self, latent: Tensor, compute: ComputeBranches, state: StrategyState) -> Tensor:
        """Computes, or combines what is kept; the combination is float32."""
        import torch

        place = state.place("velocity")
        records = state.records.get(place, [])
        by_step = {record["step"]: record for record in records}
        # a cache that was emptied on the way lacks what the plan counts on
        info = state.info
        if info.step in state.weights and not by_step.keys() >= set(state.weights[info.step][0]):
            return compute(info.branches)
        if info.step not in state.weights:
            value = compute(info.branches)
            if self.worth_keeping(state.plan["velocity"], info.step):
                self.keep(place, value, latent, state)
            return value
        steps, weights = state.weights[info.step]
        branches = len(info.branches)
        parts = [part.float() for step in steps for part in by_step[step]["value"].chunk(branches)]
        parts.append(by_step[steps[-1]]["latent"].float())
        return torch.cat([weighted(parts, row) for row in weights])

    def keep(self, place: str, value: Tensor, entering: Tensor, state: StrategyState) -> None:
        """Velocity and latent of a computed step; of those before it the velocity."""
        info = state.info
        older = [{**record, "latent": None} for record in state.records.get(place, [])]
        record = {"step": info.step, "at": info.sigma, "value": value, "latent": entering}
        state.records[place] = [*older, record][-self.order :]


def _calibration_for(schedule: Schedule) -> Calibration:
    """What was measured on the schedule's model.

    Raises:
        UsageError: it was not.
    """
    calibration = schedule.calibration
    if calibration is None:
        raise _uncalibrated(schedule.model)
    require_same_model(calibration, schedule.identity(), schedule.model)
    return calibration


def _uncalibrated(model: str) -> UsageError:
    remedy = f"'chitu calibrate --model {model}'"
    return UsageError(
        f"flexcache plan: {model} was not calibrated; {remedy} does that; meancache needs none",
        field="flexcache",
    )


def require_same_model(calibration: Calibration, here: Mapping[str, Any], model: str) -> None:
    """What was measured holds for this model.

    Args:
        here: see `Schedule.identity`. What is None here or there is left for later.
        model: its name.

    Raises:
        UsageError: it was another.
    """
    for name, value in here.items():
        found = calibration.about.get(name)
        if None not in (found, value) and found != value:
            what = name.removesuffix("_sha256").replace("config", "configs or tokenizer")
            raise UsageError(
                f"flexcache plan: {model} was calibrated with other {what} ({str(found)[:12]}, here "
                f"{str(value)[:12]}); 'chitu calibrate --model {model}' measures these",
                field="flexcache",
            )


def _calculated(
    calibration: Calibration,
    schedule: Schedule,
    required: Sequence[int],
    count: int,
    order: int,
    longest: int,
) -> dict[int, Any]:
    """Predictions of the best plan's skipped steps.

    Raises:
        UsageError: no plan computes so few steps.
    """
    from chitu_diffusion.flexcache import plan_search as planning

    traces = calibration.traces()
    switches = schedule.switches()
    steps = schedule.num_steps
    guidance = schedule.guidance or (1.0,) * steps
    if max(guidance) <= 1:
        traces = traces.of_prompt()
    widths = [after - before for before, after in zip(schedule.sigmas, schedule.sigmas[1:], strict=False)]
    weights = widths if schedule.response is None else schedule.response()
    traces = traces.resampled(schedule.sigmas, weights, guidance)
    plans = planning.best_plans(
        traces, count, order=order, longest=longest, required=required, switches=switches
    )
    if count not in plans:
        fewest = min(
            planning.best_plans(
                traces, steps, order=order, longest=longest, required=required, switches=switches
            )
        )
        raise UsageError(
            f"flexcache plan: no plan computes {count} of {steps} steps with at most {longest} skipped in a "
            f"row and {len(required)} protected; use fresh={fewest}",
            field="flexcache",
        )
    return planning.predictions(traces, plans[count].fresh, order, switches)
