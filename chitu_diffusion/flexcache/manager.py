"""The cache of the running task: whether a step may reuse what an earlier one computed.

`FlexCacheManager` is lent by the backend and bound to one task's state at a time; the state is a plain dict that lies in
the task (`task.buffer.cache`), so that tasks can take turns. What is kept (the block stack's features) is opaque here.
This file knows no network, guidance or sampler.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from chitu_diffusion.errors import UsageError, nearest

CacheState = dict[str, Any]
"""strategy and its parameters; num_steps: of the task; computed_at: the step that made the features, or None;
features: what it left, or None; reused: how many steps were answered from it; key: what the features are valid for."""


@dataclass(frozen=True)
class IntervalPolicy:
    """Computes every `interval`-th step and reuses its features in between.

    Args:
        interval: steps from one computation to the next; 1 never reuses.
        warmup, cooldown: steps at the start and at the end that are always computed.
    """

    interval: int = 2
    warmup: int = 1
    cooldown: int = 1

    def __post_init__(self) -> None:
        for name, low in (("interval", 1), ("warmup", 0), ("cooldown", 0)):
            value = asdict(self)[name]
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise UsageError(f"flexcache {name} = {value!r}: a whole number from {low} would do", field="flexcache")

    def reuses(self, step: int, num_steps: int, computed_at: int) -> bool:
        """Whether `step` may reuse what step `computed_at` left."""
        inside = self.warmup <= step < num_steps - self.cooldown
        return inside and step - computed_at < self.interval


STRATEGIES: dict[str, Callable[..., IntervalPolicy]] = {"interval": IntervalPolicy}


def parse_flexcache(value: str | Mapping[str, Any] | None, num_steps: int) -> CacheState | None:
    """A request's `flexcache` as the state that its task begins with; None where no cache is asked for.

    Raises:
        UsageError: an unknown strategy or parameter (with the nearest known one), or a bad value.
    """
    if value is None:
        return None
    if not isinstance(value, str | Mapping):
        raise UsageError(f"flexcache = {value!r}: a strategy's name, or a table with 'strategy' in it", field="flexcache")
    asked = {"strategy": value} if isinstance(value, str) else dict(value)
    name = str(asked.pop("strategy", ""))
    if name.lower() not in STRATEGIES:
        raise UsageError(f"flexcache strategy = {name!r}.{nearest(name.lower(), STRATEGIES)}", field="flexcache")
    known = {field.name for field in fields(IntervalPolicy)}
    for key in asked:
        if key not in known:
            raise UsageError(f"flexcache '{name}' has no parameter '{key}'.{nearest(str(key), known)}", field="flexcache")
    policy = STRATEGIES[name.lower()](**asked)
    if policy.warmup + policy.cooldown > num_steps:
        raise UsageError(
            f"flexcache warmup + cooldown = {policy.warmup + policy.cooldown}: at most the task's {num_steps} steps would do",
            field="flexcache",
        )
    return {"strategy": name.lower(), "parameters": asdict(policy), "num_steps": num_steps, **_EMPTY}


_EMPTY: Mapping[str, Any] = {"computed_at": None, "features": None, "key": None, "reused": 0}


class FlexCacheManager:
    """Answers for the task that it is bound to; unbound, it never reuses and keeps nothing."""

    def __init__(self) -> None:
        self._state: CacheState | None = None
        self._step = 0

    @property
    def strategy(self) -> str | None:
        """Name of the bound task's strategy."""
        return None if self._state is None else str(self._state["strategy"])

    def bind(self, state: CacheState | None, key: object = None) -> None:
        """Turn to a task.

        Args:
            state: of `parse_flexcache`, or as an earlier binding left it; it is updated in place.
            key: what features must agree in to be reused (the expert, the number of guidance branches, the shape).
                Features of another key are dropped.
        """
        self._state = state
        if state is not None and state["key"] != key:
            state.update(_EMPTY, key=key, reused=state["reused"])

    def release(self) -> None:
        """Turn away from the task."""
        self._state = None

    def should_reuse(self, step_idx: int) -> bool:
        """Whether step `step_idx` (from 0) can do with the features that are held."""
        self._step = step_idx
        state = self._state
        if state is None or state["features"] is None:
            return False
        policy = STRATEGIES[state["strategy"]](**state["parameters"])
        return policy.reuses(step_idx, state["num_steps"], state["computed_at"])

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
