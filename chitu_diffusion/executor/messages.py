"""What rank 0 tells its workers, and what ranks report of a unit. Plain values; JSON on the way."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True)
class AddTask:
    """A task for all ranks: its id, its seed, and the request, as asked and as resolved, as
    `DiffusionUserParams.to_mapping` has it; and the folder of its checkpoints.
    """

    task_id: str
    seed: int
    params: Mapping[str, Any]
    resolved: Mapping[str, Any] | None
    checkpoints: str | None = None


@dataclass(frozen=True)
class ExecuteUnit:
    """One work unit of a task, at a memory level."""

    task_id: str
    low_mem_level: int


@dataclass(frozen=True)
class SaveTask:
    """Every rank writes a checkpoint of its own of a task."""

    task_id: str


@dataclass(frozen=True)
class EndTask:
    """A task ended between two units, with a status and the words of an error."""

    task_id: str
    status: str
    error: str | None = None


@dataclass(frozen=True)
class Idle:
    """No task has work left."""


@dataclass(frozen=True)
class Shutdown:
    """Rank 0 closes."""


Message = AddTask | ExecuteUnit | SaveTask | EndTask | Idle | Shutdown

_KINDS: Mapping[str, type[Message]] = MappingProxyType(
    {kind.__name__: kind for kind in (AddTask, ExecuteUnit, SaveTask, EndTask, Idle, Shutdown)}
)


def to_json(message: Message) -> dict[str, Any]:
    """A message as JSON values, under the name of its kind."""
    return {"kind": type(message).__name__, **dataclasses.asdict(message)}


def from_json(values: Mapping[str, Any]) -> Message:
    """The message that `to_json` was given."""
    return _KINDS[values["kind"]](**{name: value for name, value in values.items() if name != "kind"})


def without_controls(value: Any) -> Any:
    """JSON values of another rank, without what could steer a terminal in their texts; line ends stay."""
    if isinstance(value, str):
        return "".join(c if c.isprintable() or c == "\n" else " " for c in value)
    if isinstance(value, list):
        return [without_controls(each) for each in value]
    if isinstance(value, dict):
        return {name: without_controls(each) for name, each in value.items()}
    return value


class Outcome(StrEnum):
    """How a work unit went on one rank."""

    DONE = "done"
    FAILED = "failed"
    INTERRUPTED = "interrupted"
    OUT_OF_MEMORY = "out_of_memory"


@dataclass(frozen=True)
class UnitReport:
    """One rank's word on a work unit.

    Attributes:
        outcome: how it went.
        error: what was raised, in words.
        in_exchange: whether that says only that other ranks could not be reached: somebody else's failure,
            most likely.
    """

    outcome: Outcome
    error: str | None = None
    in_exchange: bool = False
