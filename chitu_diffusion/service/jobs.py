"""A job of the service as plain data, its states and the rules between them; no SQL, no HTTP, no torch.

    queued ─claim→ running ─→ completed | failed | cancelled        ended stays ended
      ↑  ↑           │  │
      │  └─ park, ───┘  └─ hold → held ─ release → queued
      │     worker lost, retry
      submit

Times are seconds since 1970 by the store's clock. A fence is the number of a job's claim: whoever holds an
older one changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import Any

from chitu_diffusion.errors import ChituError, UsageError


class JobState(StrEnum):
    """Where a job is."""

    QUEUED = "queued"
    RUNNING = "running"
    HELD = "held"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def ended(self) -> bool:
        """Whether nothing can change it any more."""
        return self in ENDED


ENDED = frozenset({JobState.COMPLETED, JobState.FAILED, JobState.CANCELLED})
LIVE = frozenset(JobState) - ENDED
FOLLOWS = MappingProxyType(
    {
        JobState.QUEUED: frozenset({JobState.RUNNING, JobState.FAILED, JobState.CANCELLED}),
        JobState.RUNNING: frozenset(JobState),
        JobState.HELD: frozenset({JobState.QUEUED, JobState.CANCELLED}),
    }
)
"""The states that may follow each; none follows an end."""
MOST_DEATHS_WITHOUT_PROGRESS = 3
MOST_DEATHS = 20
RETRY_DELAYS_S = (5.0, 30.0, 120.0)
DELIVERY_DELAYS_S = (5.0, 30.0, 120.0, 600.0, 3600.0, 21600.0)
KEPT_CHECKPOINTS = 2


class StoreError(ChituError):
    """The store refuses or cannot; `code` is the HTTP front's word for why."""

    code = "store_down"


class StoreDownError(StoreError):
    """The database cannot be reached or answers with an error. Nothing was changed."""


class JobMissingError(StoreError):
    """No job of that id that this owner may see."""

    code = "not_found"


class JobEndedError(StoreError):
    """The job has ended, and an ended job is never changed; retry makes a new one."""

    code = "already_ended"


class JobBusyError(StoreError):
    """The job is in a state that this cannot be done in (such as a new priority for a running job)."""

    code = "not_ready"


class IdempotencyConflictError(StoreError):
    """The same idempotency key came with another body."""

    code = "idempotency_conflict"


class QueueFullError(StoreError):
    """The queue is full, or this owner's share of it; `code` is queue_full or key_queue_full."""

    def __init__(self, message: str, code: str) -> None:
        super().__init__(message)
        self.code = code


class LeaseLostError(StoreError):
    """The job is leased to another by now, or has ended: stop working on it, write nothing more."""

    code = "lease_lost"


class SchemaError(UsageError):
    """The database's tables are newer than this program, or older and not migrated."""


@dataclass(frozen=True)
class OwnerLimits:
    """What one owner may have at a time; None is no limit.

    Args:
        max_queued: jobs that wait (queued or held).
        max_running: jobs under lease.
        max_cost: sum of `cost` over jobs that have not ended.
    """

    max_queued: int | None = None
    max_running: int | None = None
    max_cost: float | None = None


@dataclass(frozen=True)
class NewJob:
    """A job to submit.

    Args:
        owner: whose it is; every read by an owner is limited to these.
        model: must be among the `models` of who claims it.
        request: as asked, JSON data.
        resolved: every field filled in, JSON data; what the worker runs.
        body_sha256: of the request's body, for retried creates.
        idempotency_key: the client's; unique for the owner.
        retried_within_s: take an earlier job of this owner with the same body that is younger than this (a
            client that repeats a create without a key); None never does.
        cost: what `OwnerLimits.max_cost` counts, such as tokens x steps.
        parent: the job that this one retries or remixes.
        webhook: where to say how it ended.
    """

    owner: str
    model: str
    request: Mapping[str, Any]
    resolved: Mapping[str, Any]
    body_sha256: str
    seed: int | None = None
    priority: int = 0
    notes: Sequence[str] = ()
    idempotency_key: str | None = None
    retried_within_s: float | None = None
    cost: float = 0.0
    hold_at_step: int | None = None
    parent: str | None = None
    webhook: str | None = None


@dataclass(frozen=True)
class JobProgress:
    """How far a job is: step k of n of a stage, the fraction of the whole, seconds a step, when it will end
    (seconds since 1970). None keeps what was there.
    """

    stage: str | None = None
    step: int | None = None
    steps: int | None = None
    fraction: float | None = None
    pace_s: float | None = None
    eta_at: float | None = None


@dataclass(frozen=True)
class JobCheckpoint:
    """A saved task's file.

    Args:
        path: relative to the data folder.
        step: steps done in all, which grows from checkpoint to checkpoint where there is progress.
        fingerprint: of what must be the same to go on from it.
        fence: of the lease it was saved under; the store sets it.
    """

    path: str
    step: int
    sha256: str
    bytes: int
    fingerprint: str = ""
    fence: int = 0


@dataclass(frozen=True)
class JobFailure:
    """Why a job failed: a code of the front's, and words without paths or prompts."""

    code: str
    message: str
    stage: str | None = None
    step: int | None = None
    rank: int | None = None
    cause: str | None = None
    next: str | None = None


@dataclass(frozen=True)
class Artifact:
    """A finished job's file. `variant`: video, thumbnail, spritesheet, preview or partial; `path` relative to
    the data folder.
    """

    variant: str
    path: str
    bytes: int
    sha256: str
    media_type: str


@dataclass(frozen=True)
class JobEvent:
    """The n-th thing that happened to a job: numbers count from 1, without gaps."""

    job: str
    n: int
    at: float
    kind: str
    data: Mapping[str, Any]


@dataclass(frozen=True)
class Job:
    """A job's row. `events` is the number of its last event; `attempt` counts claims; `checkpoints` has the
    newest first; `queued_at` is since when it waits, or did; `served_s` is how long workers were leased to
    it, in seconds times GPUs.
    """

    id: str
    owner: str
    idempotency_key: str | None
    body_sha256: str
    state: JobState
    priority: int
    model: str
    request: Mapping[str, Any]
    resolved: Mapping[str, Any]
    notes: tuple[str, ...]
    seed: int | None
    cost: float
    parent: str | None
    webhook: str | None
    created_at: float
    queued_at: float
    claimed_at: float | None
    ended_at: float | None
    expires_at: float | None
    not_before: float | None
    stage: str | None
    step: int | None
    steps: int | None
    fraction: float | None
    pace_s: float | None
    eta_at: float | None
    worker: str | None
    attempt: int
    fence: int
    lease_until: float | None
    charged_at: float | None
    gpus: int
    served_s: float
    deaths_without_progress: int
    deaths: int
    tries: int
    cancel_requested_at: float | None
    deleted_at: float | None
    hold_at_step: int | None
    checkpoints: tuple[JobCheckpoint, ...]
    error: JobFailure | None
    seconds: Mapping[str, float]
    events: int

    @property
    def checkpoint(self) -> JobCheckpoint | None:
        """The newest, if there is one."""
        return self.checkpoints[0] if self.checkpoints else None


@dataclass(frozen=True)
class JobLease:
    """The right to work on a job, until `until` unless it is beaten. Write files under the folder of `job`
    and `fence` only.
    """

    job: str
    fence: int
    worker: str
    until: float


@dataclass(frozen=True)
class Claimed:
    """What a claim gives: the lease, and the job as it is now (its newest checkpoint is where to go on)."""

    lease: JobLease
    job: Job


@dataclass(frozen=True)
class Beat:
    """A heartbeat's answer: the lease's new end, and what the clients wish meanwhile."""

    lease: JobLease
    cancel_requested: bool
    hold_at_step: int | None


@dataclass(frozen=True)
class Submitted:
    """A submit's answer; `created` is False where an earlier job is meant (idempotency, a retried create)."""

    job: Job
    created: bool


@dataclass(frozen=True)
class JobPage:
    """One page of a list; `has_more` after the last of these."""

    jobs: tuple[Job, ...]
    has_more: bool


@dataclass(frozen=True)
class Swept:
    """What a sweep ended: jobs that waited too long, that were held too long, and rows that went."""

    timed_out: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    deleted: tuple[str, ...] = ()


@dataclass(frozen=True)
class ApiKey:
    """A key's row; the secret itself is nowhere, `sha256` is of it. `limits` are its owner's."""

    id: str
    owner: str
    name: str
    sha256: str
    scopes: tuple[str, ...]
    limits: OwnerLimits = field(default_factory=OwnerLimits)
    max_priority: int = 0
    created_at: float = 0.0
    last_used_at: float | None = None
    revoked_at: float | None = None


@dataclass(frozen=True)
class WorkerInfo:
    """A worker's row. `state`: starting, ready, busy, draining or lost; `weights_sha256` is empty until
    they are hashed; `fits` is what its memory has room for: device, memory_bytes, tokens; `rss` and
    `gpu_bytes` are bytes.
    """

    id: str
    host: str
    pid: int
    model: str
    state: str
    layout: str = ""
    weights_sha256: str = ""
    fits: Mapping[str, Any] = field(default_factory=dict)
    rss: int = 0
    gpu_bytes: int = 0
    seen_at: float = 0.0


@dataclass(frozen=True)
class Delivery:
    """A webhook to send: `id` is the same at each attempt, `attempt` counts those that were begun."""

    id: str
    job: str
    n: int
    url: str
    body: Mapping[str, Any]
    attempt: int


def may_follow(state: JobState, after: JobState) -> bool:
    """Whether a job may go from a state to another."""
    return after in FOLLOWS.get(state, ())


def is_poison(deaths_without_progress: int, deaths: int) -> bool:
    """Whether a job has killed enough workers to be failed: one that goes on between deaths may have more."""
    return deaths_without_progress >= MOST_DEATHS_WITHOUT_PROGRESS or deaths >= MOST_DEATHS


def retry_delay(tries: int) -> float | None:
    """Seconds to wait after the `tries`-th (from 1) fault that may pass; None: it has failed."""
    return RETRY_DELAYS_S[tries - 1] if tries <= len(RETRY_DELAYS_S) else None


def delivery_delay(attempt: int) -> float | None:
    """Seconds to wait after a webhook's `attempt`-th (from 1) vain attempt; None: give it up."""
    return DELIVERY_DELAYS_S[attempt - 1] if attempt <= len(DELIVERY_DELAYS_S) else None


def keep_checkpoints(kept: Sequence[JobCheckpoint], new: JobCheckpoint) -> tuple[JobCheckpoint, ...]:
    """The newest first, no more than are kept."""
    return (new, *kept)[:KEPT_CHECKPOINTS]


def is_progress(kept: Sequence[JobCheckpoint], new: JobCheckpoint) -> bool:
    """Whether a checkpoint is beyond the earlier ones: the same step again does not clear a job of deaths."""
    return all(new.step > earlier.step for earlier in kept)
