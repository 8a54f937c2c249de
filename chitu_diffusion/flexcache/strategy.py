"""What every cache strategy has: protected steps, a plan, a predictor, and a rule for its sites.

A strategy is frozen parameters; whatever it remembers of a task lies in the task, handed to it as
`StrategyState`. A new strategy says which steps are fresh (`computed`), at which levels it saves work
(`levels_used`), and, only where that is not all, answers by itself (`answer`, `velocity`). Knows sites,
moments and predictors; no networks, tasks or devices.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, cast

from chitu_diffusion.errors import UsageError, nearest
from chitu_diffusion.flexcache.interface import (
    MODULE_LEVELS,
    Action,
    AllReduceMax,
    Compute,
    ComputeBranches,
    Level,
    Site,
    SiteInputs,
    StepInfo,
)
from chitu_diffusion.flexcache.predictors import PREDICTORS, Record, predict, records_needed
from chitu_diffusion.flexcache.schedule import Schedule, Shapes

if TYPE_CHECKING:
    from torch import Tensor

Plan = dict[Level, list[Action]]
"""For each level at which a strategy saves work, the action of every step."""
_SAVED: Mapping[Level, float] = MappingProxyType(
    {"velocity": 0.99, "step": 0.97, "block": 0.5, "attention": 0.4, "cross": 0.1, "ffn": 0.4}
)
"""Shares of a step's work, roughly, that an answer at a level spares."""


@dataclass
class StrategyState:
    """A task's state as a strategy sees it: the plan, records by place, and numbers of its own.

    Attributes:
        info: the step that is being made.
        plan: see `Plan`.
        records: by `place`, oldest first. Replace a list, never write into it; tensors likewise.
        notes: whatever else a strategy remembers between steps: numbers, tensors.
        all_reduce_max: makes a number common to all ranks.
        weights: what a plan takes in a skipped step's place, where it says so itself; made with it, see
            `Strategy.build_plan`.
        scratch: for one forward; nothing of it stays.
    """

    info: StepInfo
    plan: Plan
    records: dict[str, list[Record]]
    notes: dict[str, Any]
    all_reduce_max: AllReduceMax
    weights: Mapping[int, Any] = field(default_factory=dict)
    scratch: dict[str, Any] = field(default_factory=dict)

    def action(self, level: Level) -> Action:
        """The plan for this step; at a level that it does not name, to compute."""
        return self.plan[level][self.info.step] if level in self.plan else "compute"

    def record_decision(self, may_reuse: bool) -> None:
        """Note what was decided for an "ask" step, for the other branch and for whoever counts."""
        self.notes["decided"] = [self.info.step, may_reuse]

    @property
    def decided(self) -> bool | None:
        """Whether an "ask" step may reuse; None while nobody has decided."""
        last = self.notes.get("decided")
        return bool(last[1]) if last is not None and last[0] == self.info.step else None

    def saves(self, level: Level) -> bool:
        """Whether this step does without the computation at a level."""
        action = self.action(level)
        return bool(self.decided) if action == "ask" else action != "compute"

    def place(self, level: Level, block: int | str = 0) -> str:
        """Under which name records of a site and this forward's branches are kept."""
        return f"{level}.{block}.{''.join(map(str, self.info.branches))}"


@dataclass(frozen=True)
class Strategy:
    """Parameters that every strategy takes.

    Args:
        warmup, cooldown: steps at the start and at the end that are always computed in full.
        switch: full steps after another expert took over; the one before it is full too, and what was kept is
            dropped.
        predictor: what stands in for a value that is not computed, see `predictors`.
        order: of the Taylor sum; for "velocity", how many fresh steps its mean spans.
        level: where work is saved: "velocity" skips everything, "step" the blocks (patch embedding and head
            still see the present latent), "module" the attentions and the feed-forward inside the blocks.
            Empty is the strategy's own.
        cache_memory_gb: refuse the request if the cache would keep more than this, in GiB.
    """

    LEVELS: ClassVar[tuple[str, ...]] = ("step", "velocity")
    """Values of `level` that the strategy can do; the first is its own."""

    warmup: int = 1
    cooldown: int = 1
    switch: int = 2
    predictor: str = "reuse"
    order: int = 1
    level: str = ""
    cache_memory_gb: float | None = None

    def __post_init__(self) -> None:
        check_whole("warmup", self.warmup)
        check_whole("cooldown", self.cooldown)
        check_whole("switch", self.switch)
        check_choice("predictor", self.predictor, PREDICTORS)
        check_whole("order", self.order, 0 if self.predictor == "taylor" else 1, 4)
        check_choice("level", self.where, self.LEVELS)
        if self.cache_memory_gb is not None:
            check_number("cache_memory_gb", self.cache_memory_gb)
        if self.predictor == "velocity" and self.where != "velocity":
            would = "level=velocity" if "velocity" in self.LEVELS else "predictor=taylor"
            raise UsageError(
                f"flexcache predictor = 'velocity' predicts whole velocities; use {would}", field="flexcache"
            )
        self.check()

    @property
    def where(self) -> str:
        """`level`, or the strategy's own where it is empty."""
        return self.level or self.LEVELS[0]

    @property
    def needs_linear_solver(self) -> bool:
        """Whether it counts on a path without fresh noise, on which latents follow from velocities."""
        return self.predictor == "velocity"

    # -- for a strategy to say

    def check(self) -> None:
        """Checks the strategy's own parameters.

        Raises:
            UsageError: a value that cannot be.
        """

    def check_steps(self, num_steps: int) -> None:
        """Checks the parameters against a number of steps.

        Raises:
            UsageError: the number of steps is too small for them.
        """
        if self.warmup + self.cooldown > num_steps:
            raise UsageError(
                f"flexcache warmup + cooldown = {self.warmup + self.cooldown}: use at most the task's "
                f"{num_steps} steps",
                field="flexcache",
            )

    def check_measured(self, schedule: Schedule) -> None:
        """Checks that what was measured on the model is enough.

        Args:
            schedule: of its fields `num_steps`, `measured`, `calibration` and `model` alone are looked at.

        Raises:
            UsageError: something was not measured; says how to have it.
        """

    def computed(self, schedule: Schedule) -> Sequence[bool]:
        """For each step, whether it must be computed, protected steps aside."""
        raise NotImplementedError

    def levels_used(self) -> tuple[Level, ...]:
        """The levels at which the plan holds."""
        if self.where == "module":
            return ("attention", "cross", "ffn")
        return (cast(Level, self.where),)

    def plan(self, schedule: Schedule) -> Plan:
        """What every step does, from the schedule alone."""
        saved: Action = "reuse" if self.predictor == "reuse" else "predict"
        flags = zip(self.computed(schedule), self.protected(schedule), strict=True)
        actions: list[Action] = ["compute" if fresh or guarded else saved for fresh, guarded in flags]
        return {level: list(actions) for level in self.levels_used()}

    def build_plan(self, schedule: Schedule) -> tuple[Plan, dict[int, Any]]:
        """The plan, and for each step what the strategy needs besides it, as plain data; nothing for most."""
        return self.plan(schedule), {}

    def work_left(self, actions: Mapping[Level, Action]) -> float:
        """The share of a step's work that is done under these actions, roughly: for forecasts of time."""
        saved = (_SAVED[level] / (2 if action == "ask" else 1) for level, action in actions.items())
        return max(1 - sum(saved), 0.01)

    def span(self, depth: int) -> tuple[int, int]:
        """First and last block that a saved step skips; of interest at level "block" alone."""
        return 0, depth - 1

    @property
    def residual(self) -> bool:
        """Whether a run of blocks hands on what it added, or (False) the state that leaves it."""
        return True

    def kept_bytes(self, shapes: Shapes) -> int:
        """Bytes that the cache keeps at the most."""
        return self.records_needed * sum(
            level_bytes(level, shapes) for level in self.levels_used()
        ) + self.latent_bytes(shapes)

    # -- what follows from it

    @property
    def records_needed(self) -> int:
        """How many fresh values the predictor looks at."""
        return records_needed(self.predictor, self.order)

    def latent_bytes(self, shapes: Shapes) -> int:
        """Bytes of the latents that the predictor looks at, float32."""
        return 4 * shapes.latent * self.records_needed if self.predictor == "velocity" else 0

    def protected(self, schedule: Schedule) -> list[bool]:
        """For each step, whether it is computed in any case: start, end, around the experts' switch."""
        count = schedule.num_steps
        guarded = [step < self.warmup or step >= count - self.cooldown for step in range(count)]
        for switch in schedule.switches():
            for step in range(switch - 1, min(switch + self.switch, count)):
                guarded[step] = True
        return guarded

    def worth_keeping(self, actions: Sequence[Action], step: int) -> bool:
        """Whether a value computed at `step` may be asked for before `records_needed` newer ones exist."""
        following = list(actions[step + 1 : step + 1 + self.records_needed])
        return any(action != "compute" for action in following)

    def levels(self, state: StrategyState) -> frozenset[Level]:
        """The levels at which this step wants to be asked: where something is saved, or kept for later."""
        return frozenset(
            level
            for level, actions in state.plan.items()
            if actions[state.info.step] != "compute" or self.worth_keeping(actions, state.info.step)
        )

    def velocity(self, latent: Tensor, compute: ComputeBranches, state: StrategyState) -> Tensor:
        """The velocities [branches * B, C, T, H, W] of a step.

        Args:
            latent: [B, C, T, H, W].
            state: its step's `branches` are all of this rank's.
        """
        branches = state.info.branches
        if "velocity" not in self.levels(state):
            return compute(branches)
        return self.whole(Site("velocity", 0, 0), lambda: compute(branches), SiteInputs(latent), state)

    def answer(self, site: Site, compute: Compute, inputs: SiteInputs, state: StrategyState) -> Tensor:
        """The answer at a site inside the network."""
        if site.level == "block":
            return self.blocks(site, compute, inputs, state)
        return self.whole(site, compute, inputs, state)

    def whole(self, site: Site, compute: Compute, inputs: SiteInputs, state: StrategyState) -> Tensor:
        """A site answered by itself; the stream's levels keep what was added, the others the value."""
        place = state.place(site.level, site.block)
        residual = site.level == "step"
        if state.saves(site.level) and place in state.records:
            value = self.predicted(place, state)
            return inputs.entering + value if residual else value
        value = compute()
        if self.worth_keeping(state.plan[site.level], state.info.step):
            self.keep(place, value - inputs.entering if residual else value, inputs.entering, state)
        return value

    def blocks(self, site: Site, compute: Compute, inputs: SiteInputs, state: StrategyState) -> Tensor:
        """A run of blocks, `span`, that is answered as one: the residual over it is kept."""
        first, last = self.span(site.depth)
        if not first <= site.block <= last:
            return compute()
        place = state.place("block", f"{first}-{last}")
        if state.saves("block") and place in state.records:
            if site.block < last:
                return inputs.entering
            value = self.predicted(place, state)
            return inputs.entering + value if self.residual else value
        if site.block == first:
            state.scratch["entered"] = inputs.entering
        value = compute()
        if site.block == last and self.worth_keeping(state.plan["block"], state.info.step):
            entered = state.scratch.pop("entered")
            self.keep(place, value - entered if self.residual else value, inputs.entering, state)
        return value

    def predicted(self, place: str, state: StrategyState) -> Tensor:
        """What the predictor gives at a place that has records."""
        info = state.info
        records = state.records[place]
        at = self.place_in_time(info)
        return predict(
            self.predictor, self.order, records, at=at, sigma=info.sigma, next_sigma=info.next_sigma
        )

    def keep(self, place: str, value: Tensor, entering: Tensor, state: StrategyState) -> None:
        """Remember a fresh value, and forget those that nobody will look at again."""
        info = state.info
        latent = entering if self.predictor == "velocity" else None
        record = {"step": info.step, "at": self.place_in_time(info), "value": value, "latent": latent}
        state.records[place] = [*state.records.get(place, []), record][-self.records_needed :]

    def place_in_time(self, info: StepInfo) -> float:
        """A step on the predictor's axis: velocities vary with the noise level, features with the step."""
        return info.sigma if self.where == "velocity" else float(info.step)


def level_bytes(level: Level, shapes: Shapes) -> int:
    """Bytes of one record at every site of a level."""
    if level == "velocity":
        return shapes.velocity
    return shapes.stream * (shapes.layers if level in MODULE_LEVELS else 1)


def check_whole(name: str, value: object, low: int = 0, high: int | None = None) -> None:
    """A whole number in a range.

    Raises:
        UsageError: it is none.
    """
    if (
        isinstance(value, bool)
        or not isinstance(value, int)
        or value < low
        or (high is not None and value > high)
    ):
        until = "" if high is None else f" to {high}"
        raise UsageError(
            f"flexcache {name} = {value!r}: use a whole number from {low}{until}", field="flexcache"
        )


def check_number(name: str, value: object, low: float = 0.0, high: float = math.inf) -> None:
    """A number in a range.

    Raises:
        UsageError: it is none.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        until = "" if high == math.inf else f" to {high:g}"
        raise UsageError(f"flexcache {name} = {value!r}: use a number from {low:g}{until}", field="flexcache")


def check_numbers(name: str, values: object) -> None:
    """Several finite numbers.

    Raises:
        UsageError: something else.
    """
    if not isinstance(values, tuple) or not all(
        isinstance(value, int | float) and math.isfinite(value) for value in values
    ):
        raise UsageError(f"flexcache {name} = {values!r}: use a list of numbers", field="flexcache")


def check_choice(name: str, value: object, known: Sequence[str]) -> None:
    """One of a few words.

    Raises:
        UsageError: it is none; the nearest is named.
    """
    if value not in known:
        raise UsageError(f"flexcache {name} = {value!r}.{nearest(str(value), known)}", field="flexcache")
