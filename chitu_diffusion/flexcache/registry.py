"""Which cache strategies there are, and the way from a request's words to one of them.

Imports no torch, so that a request can be checked before anything is loaded. Knows names, parameters and
sizes; no task.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from types import MappingProxyType
from typing import Any

from chitu_diffusion.errors import UsageError, nearest
from chitu_diffusion.flexcache.blockdance import BlockDance
from chitu_diffusion.flexcache.calibrated import CalibratedPlan
from chitu_diffusion.flexcache.cfg_gate import CfgGate
from chitu_diffusion.flexcache.dbcache import DBCache, FBCache
from chitu_diffusion.flexcache.easycache import EasyCache
from chitu_diffusion.flexcache.interval import Interval
from chitu_diffusion.flexcache.magcache import MagCache
from chitu_diffusion.flexcache.meancache import MeanCache
from chitu_diffusion.flexcache.pab import PAB
from chitu_diffusion.flexcache.schedule import Shapes
from chitu_diffusion.flexcache.strategy import Strategy
from chitu_diffusion.flexcache.taylorseer import TaylorSeer
from chitu_diffusion.flexcache.teacache import TeaCache

STRATEGIES: Mapping[str, type[Strategy]] = MappingProxyType(
    {
        "blockdance": BlockDance,
        "cfg_gate": CfgGate,
        "dbcache": DBCache,
        "easycache": EasyCache,
        "fbcache": FBCache,
        "interval": Interval,
        "magcache": MagCache,
        "meancache": MeanCache,
        "pab": PAB,
        "plan": CalibratedPlan,
        "taylorseer": TaylorSeer,
        "teacache": TeaCache,
    }
)

CacheState = dict[str, Any]
"""A task's cache, as plain data. strategy and its parameters; num_steps: of the task; timesteps, sigmas: of
its schedule; plan: per level the action of each step, or None before it is made; weights: what a
skipped step is made of, where the strategy says so; records: fresh values by place, oldest first; notes: what
else the strategy remembers; key: what both are valid for; reused: how many steps did less than a whole
forward; features, computed_at: what the page's `update_cache` was given, and at which step."""

_EMPTY: Mapping[str, Any] = MappingProxyType(
    {"plan": None, "weights": None, "timesteps": (), "sigmas": (), "key": None, "reused": 0}
)


def parse_setting(text: str) -> str | dict[str, Any]:
    """`teacache` -> "teacache"; `teacache:threshold=0.1` -> {"strategy": "teacache", "threshold": 0.1}.

    Raises:
        UsageError: a part that is not KEY=VALUE.
    """
    name, colon, rest = text.partition(":")
    if not colon:
        return name
    chosen: dict[str, Any] = {"strategy": name}
    for part in rest.split(","):
        key, equals, value = part.partition("=")
        if not equals or not key:
            raise UsageError(f"{text}: use NAME:KEY=VALUE,KEY=VALUE", field="flexcache")
        chosen[key.strip()] = _number_or_text(value.strip())
    return chosen


def _number_or_text(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def parse_strategy(value: str | Mapping[str, Any]) -> tuple[str, Strategy]:
    """A request's `flexcache` as the strategy's name and the strategy.

    Raises:
        UsageError: an unknown strategy or parameter (with the nearest known one), or a bad value.
    """
    if not isinstance(value, str | Mapping):
        raise UsageError(
            f"flexcache = {value!r}: a strategy's name, or a table with 'strategy' in it", field="flexcache"
        )
    asked = {"strategy": value} if isinstance(value, str) else dict(value)
    given = str(asked.pop("strategy", ""))
    name = given.lower()
    if name not in STRATEGIES:
        raise UsageError(
            f"flexcache strategy = {given!r}: no cache of that name.{nearest(name, STRATEGIES)}",
            field="flexcache",
        )
    known = {field.name for field in fields(STRATEGIES[name])}
    for key in asked:
        if key not in known:
            raise UsageError(
                f"flexcache '{name}' has no parameter '{key}'.{nearest(str(key), known)}", field="flexcache"
            )
    values: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in asked.items()
    }
    return name, STRATEGIES[name](**values)


def parse_flexcache(value: str | Mapping[str, Any] | None, num_steps: int) -> CacheState | None:
    """A request's `flexcache` as the state that its task begins with; None where no cache is asked for.

    Raises:
        UsageError: as `parse_strategy`, or parameters that this number of steps cannot have.
    """
    if value is None:
        return None
    name, strategy = parse_strategy(value)
    strategy.check_steps(num_steps)
    return {"strategy": name, "parameters": asdict(strategy), "num_steps": num_steps, **_EMPTY, **emptied()}


def emptied() -> CacheState:
    """The part of a state that is valid for one key alone, with nothing in it."""
    return {"records": {}, "notes": {}, "features": None, "computed_at": None}


def strategy_of(state: CacheState) -> Strategy:
    """The strategy that a state belongs to."""
    return STRATEGIES[state["strategy"]](**state["parameters"])


def cache_bytes(value: str | Mapping[str, Any] | None, shapes: Shapes, limit_gb: float | None = None) -> int:
    """Bytes that a request's cache keeps at the most; 0 where none is asked for.

    Args:
        value: a request's `flexcache`.
        limit_gb: refuse more than this, in GiB; a `cache_memory_gb` of the request's own counts before it.

    Raises:
        UsageError: more than the limit, with the figure and what to use.
    """
    if value is None:
        return 0
    name, strategy = parse_strategy(value)
    needed = strategy.kept_bytes(shapes)
    limit = limit_gb if strategy.cache_memory_gb is None else strategy.cache_memory_gb
    if limit is not None and needed > limit * 2**30:
        branch = f" ({needed / 2**30 / shapes.branches:.2f} GiB a branch)" if shapes.branches > 1 else ""
        raise UsageError(
            f"flexcache {name} would keep {needed / 2**30:.2f} GiB{branch}, above cache_memory_gb = "
            f"{limit:g}; {_smaller(name, strategy, shapes)}",
            field="flexcache",
        )
    return needed


def _smaller(name: str, strategy: Strategy, shapes: Shapes) -> str:
    others = [
        (f"{name} with level={level}", type(strategy)(level=level))
        for level in strategy.LEVELS
        if level != strategy.where
    ]
    kept = [(other.kept_bytes(shapes), said) for said, other in [*others, ("meancache", MeanCache())]]
    return " and ".join(f"{said} would keep {needed / 2**30:.2f} GiB" for needed, said in sorted(kept))
