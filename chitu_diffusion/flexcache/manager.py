"""The cache of the running task: whether a step may reuse what earlier ones computed, and what they left.

`FlexCacheManager` is lent by the backend and bound to one task's state at a time; the state is plain data
that lies in the task (`task.buffer.cache`), so that tasks can take turns. It has two faces. The loop's:
`velocity` around a step, `cache_for` for each forward in it; every strategy works there. The API page's:
`should_reuse`, `get_cache`, `update_cache`, for whoever runs the network by hand and hands whole features
over; it follows plans that skip whole block stacks or velocities, with plain reuse. This file knows no
network, guidance or sampler.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from chitu_diffusion.errors import UsageError, plain_number
from chitu_diffusion.flexcache.interface import (
    NO_CACHE,
    AllReduceMax,
    Compute,
    ComputeBranches,
    Level,
    Site,
    SiteInputs,
    StepCache,
    StepInfo,
    single_rank_max,
)
from chitu_diffusion.flexcache.registry import CacheState, emptied, parse_flexcache, strategy_of
from chitu_diffusion.flexcache.schedule import Schedule
from chitu_diffusion.flexcache.strategy import Strategy, StrategyState

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["CacheState", "FlexCacheManager", "fork", "parse_flexcache"]

_WHOLE: tuple[Level, ...] = ("step", "velocity")
"""Levels at which a saved step needs no block."""


def fork(state: CacheState) -> CacheState:
    """A copy that can be written to while the original stays. Tensors are shared: nobody writes into them."""
    return {**state, "records": dict(state["records"]), "notes": dict(state["notes"])}


@dataclass(frozen=True)
class ForwardCache:
    """What a network is handed for one forward: the strategy at a step, over the task's state."""

    strategy: Strategy
    state: StrategyState

    @property
    def levels(self) -> frozenset[Level]:
        """Where this forward wants to be asked."""
        return self.strategy.levels(self.state)

    def at(self, site: Site, compute: Compute, inputs: SiteInputs) -> Tensor:
        """The strategy's answer."""
        return self.strategy.answer(site, compute, inputs, self.state)


class FlexCacheManager:
    """Answers for the task that it is bound to; unbound, it never reuses and keeps nothing.

    Args:
        all_reduce_max: makes a number that a decision rests on common to all ranks.
    """

    def __init__(self, all_reduce_max: AllReduceMax = single_rank_max) -> None:
        self._all_reduce_max = all_reduce_max
        self._state: CacheState | None = None
        self._strategy: Strategy | None = None
        self._step = 0

    @property
    def strategy(self) -> str | None:
        """Name of the bound task's strategy."""
        return None if self._state is None else str(self._state["strategy"])

    @property
    def num_steps(self) -> int | None:
        """Of the bound task."""
        return None if self._state is None else int(self._state["num_steps"])

    def bind(self, state: CacheState | None, key: object = None, schedule: Schedule | None = None) -> None:
        """Turn to a task.

        Args:
            state: of `parse_flexcache`, or as an earlier binding left it; it is updated in place.
            key: what must agree for anything kept to be valid (the expert, the number of guidance branches,
                the shape). What was kept under another key is dropped.
            schedule: the task's steps, looked at the first time, when the plan is made; None: evenly spaced
                ones.

        Raises:
            UsageError: the strategy's plan needs more than is known.
        """
        self._state = state
        if state is None:
            self._strategy = None
            return
        self._strategy = strategy_of(state)
        if state["plan"] is None:
            schedule = schedule or Schedule.bare(state["num_steps"])
            plan, weights = self._strategy.build_plan(schedule)
            state.update(plan=plan, weights=weights, timesteps=schedule.timesteps, sigmas=schedule.sigmas)
        if state["key"] != key:
            state.update(emptied(), key=key)

    def release(self) -> None:
        """Turn away from the task."""
        self._state = None
        self._strategy = None

    # -- the loop's face

    def velocity(
        self, step_idx: int, latent: Tensor, branches: tuple[int, ...], compute: ComputeBranches
    ) -> Tensor:
        """The velocities [branches * B, C, T, H, W] of a step.

        Args:
            step_idx: from 0.
            latent: [B, C, T, H, W], shared by the branches.
            branches: those of this rank, in the order of the stack.
            compute: runs the forwards of some of them, each with `cache_for`; stacked in the order asked.

        Raises:
            UsageError: a step that the bound task does not have.
        """
        self._checked_step(step_idx)
        if self._strategy is None or self._state is None:
            return compute(branches)
        state = self._strategy_state(self._state, step_idx, branches)
        value = self._strategy.velocity(latent, compute, state)
        self._state["reused"] += any(state.saves(level) for level in state.plan)
        return value

    def cache_for(self, step_idx: int, branches: tuple[int, ...]) -> StepCache:
        """The cache that a network asks during one forward.

        Args:
            step_idx: from 0.
            branches: the guidance branches stacked along this forward's batch.
        """
        if self._strategy is None or self._state is None:
            return NO_CACHE
        return ForwardCache(self._strategy, self._strategy_state(self._state, step_idx, branches))

    # -- the page's face

    def should_reuse(self, step_idx: int) -> bool:
        """Whether step `step_idx` (from 0) can do with the features that were handed over.

        Raises:
            UsageError: a step that the bound task does not have.
        """
        self._step = self._checked_step(step_idx)
        state = self._state
        if state is None or state["features"] is None:
            return False
        plan = state["plan"] or {}
        return any(plan[level][step_idx] in ("reuse", "predict") for level in _WHOLE if level in plan)

    def get_cache(self) -> Any:
        """The features that are held; None if there are none. Counts as a reuse."""
        if self._state is None:
            return None
        self._state["reused"] += 1
        return self._state["features"]

    def update_cache(self, features: Any) -> None:
        """Keep what the step that was last asked about has computed."""
        if self._state is not None:
            self._state.update(features=features, computed_at=self._step)

    # -- small parts

    def _checked_step(self, step: int) -> int:
        last = None if self._state is None else self._state["num_steps"] - 1
        step = plain_number(step)
        if type(step) is not int or step < 0 or (last is not None and step > last):
            steps = "0 on" if last is None else f"0 to {last}, as the bound task has"
            raise UsageError(f"step_idx = {step!r}: use a whole number from {steps}", field="step_idx")
        return step

    def _strategy_state(self, state: CacheState, step: int, branches: tuple[int, ...]) -> StrategyState:
        sigmas = state["sigmas"]
        return StrategyState(
            StepInfo(
                step, state["num_steps"], state["timesteps"][step], sigmas[step], sigmas[step + 1], branches
            ),
            state["plan"] or {},
            state["records"],
            state["notes"],
            self._all_reduce_max,
            state["weights"] or {},
        )
