"""One worker and the job that it runs: claimed, beaten, recorded in the store, watched by two clocks.

Knows the store and a pipe; one thread uses it. What the store must hear waits in order where the database
does not answer, and the worker goes on meanwhile.
"""

from __future__ import annotations

import dataclasses
import logging
import signal
import socket
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from chitu_diffusion.config import EngineConfig
from chitu_diffusion.errors import counted
from chitu_diffusion.service.figures import AttemptFigures, SupervisorFigures
from chitu_diffusion.service.jobs import (
    Artifact,
    Job,
    JobCheckpoint,
    JobFailure,
    JobLease,
    JobMissingError,
    JobProgress,
    LeaseLostError,
    StoreDownError,
    WorkerInfo,
)
from chitu_diffusion.service.launcher import WorkerLauncher, WorkerProcess
from chitu_diffusion.service.logs import logged_about
from chitu_diffusion.service.pipe import LineChannel, Message
from chitu_diffusion.service.settings import ServiceConfig
from chitu_diffusion.service.store import JobStore

logger = logging.getLogger(__name__)
_STEP_EVENTS_S = 0.25
_LOOK_S = 0.25
_CLAIM_S = 2.0
_WISH_S = 0.5
_DOWN_S = 1.0
_COUNT_S = 1.0
_LONGEST_WAIT_S = 30.0
_STACKS_S = 0.3
Write = Callable[[], object]


@dataclasses.dataclass(frozen=True)
class Patience:
    """How long a worker may be quiet.

    Args:
        silence_s: without a tick, which a thread of its own sends: then the process is frozen.
        unit_s: at least, without progress: then a unit is stuck.
        paces: times the longest unit of this stage and job so far.
        unknown_s: without progress where there is no such unit yet, and while the model loads.
    """

    silence_s: float = 8.0
    unit_s: float = 60.0
    paces: float = 10.0
    unknown_s: float = 1800.0

    def of(self, longest: float | None) -> float:
        """Seconds for a unit, by the longest one like it."""
        return self.unknown_s if longest is None else max(self.unit_s, self.paces * longest)


class WorkerSlot:
    """A worker that is kept running.

    Args:
        name: the worker's id in the store; this process alone has it.
        number: among the workers here.
        figures: that are counted; this puts them into the store.
    """

    def __init__(
        self,
        name: str,
        number: int,
        settings: ServiceConfig,
        engine: EngineConfig,
        store: JobStore,
        launcher: WorkerLauncher,
        patience: Patience,
        figures: SupervisorFigures,
    ) -> None:
        self.name = name
        self.state = "starting"
        self._number = number
        self._settings = settings
        self._engine = engine
        self._store = store
        self._launcher = launcher
        self._patience = patience
        self._figures = figures
        self._why_started = "first"
        self._channel: LineChannel | None = None
        self._process: WorkerProcess | None = None
        self._info = WorkerInfo(name, socket.gethostname(), 0, engine.models.name, "starting")
        self._runs: tuple[str, int] | None = None  # what the worker works on, leased still or not
        self._lease: JobLease | None = None
        self._counts: AttemptFigures | None = None
        self._stage: str | None = None
        self._step: int | None = None
        self._longest: dict[str, float] = {}
        self._is_cancelling = False
        self._draining = False
        self._vain_starts = 0
        self._ran = 0  # jobs of this process
        self._is_weighed = True  # whether it has told its memory since the last one
        self._base_rss = 0
        self._writes: deque[Write] = deque()
        self._heard = 0.0
        self._moved = 0.0
        self._due: dict[str, float] = {}

    @property
    def channel(self) -> LineChannel | None:
        """To wait for; None while there is no worker."""
        return self._channel

    @property
    def job(self) -> str | None:
        """The id of the job that is leased."""
        return None if self._lease is None else self._lease.job

    @property
    def is_idle(self) -> bool:
        """Whether it has no job, and the store knows all."""
        return self._lease is None and self._runs is None and not self._writes

    # -- what the worker says

    def read(self) -> None:
        """Take in what has come over the pipe; waits where nothing has."""
        if self._channel is None:
            return
        received = self._channel.receive()
        if not received:
            self._lost(None)
        for message in received:
            self._heard = time.monotonic()
            self._take(message)

    def _take(self, message: Message) -> None:
        kind = message.pop("kind")
        if kind == "started":
            self._process = WorkerProcess(message["pid"])
            self._info = dataclasses.replace(self._info, pid=message["pid"])
        elif kind == "ready":
            self._vain_starts = 0
            self._info = dataclasses.replace(self._info, **message)
            self._enter("draining" if self._draining else "ready")
        elif kind == "weights":
            self._info = dataclasses.replace(self._info, **message)
            self._due["row"] = 0.0
        elif kind == "tick":
            self._info = dataclasses.replace(self._info, **message)
            if self._ran == 0 or (self._ran == 1 and not self._is_weighed):
                self._base_rss = max(self._base_rss, self._info.rss)
            self._is_weighed = True
        else:
            self._of_job(kind, message)

    def _of_job(self, kind: str, message: Message) -> None:
        ends = kind in ("ended", "parked", "held")
        about = (message.pop("job"), message.pop("fence"))
        if ends and about == self._runs:
            self._runs = None
            self._ran += 1
            self._is_weighed = False
            self._enter("draining" if self._draining else "ready")
        lease = self._lease
        if lease is None or about != (lease.job, lease.fence):
            return
        self._moved = time.monotonic()
        leases = self._store.leases
        if kind == "progress":
            self._progress(lease, message)
        elif kind == "resumed":
            if self._counts is not None:
                self._writes.append(partial(self._counts.resumed, self._store.events, message["exact"]))
            self._writes.append(partial(leases.event, lease, kind, message))
        elif kind in ("note", "preview"):
            if "memory_level" in message:
                self._figures.memory_levels.labels(self._info.model).inc()
            self._writes.append(partial(leases.event, lease, kind, message))
        elif kind == "checkpoint":
            self._figures.checkpoint.labels(self._info.model).observe(message.pop("seconds"))
            self._figures.checkpoint_bytes.labels(self._info.model).observe(message["bytes"])
            self._writes.append(partial(leases.checkpoint, lease, JobCheckpoint(**message)))
        elif kind == "parked":
            self._end(partial(leases.park, lease))
        elif kind == "held":
            self._end(partial(leases.hold, lease))
        else:
            self._ended(lease, message)

    def _progress(self, lease: JobLease, said: Message) -> None:
        stage = said["stage"]
        self._longest[stage] = max(self._longest.get(stage, 0.0), said["seconds"])
        eta = said["eta_s"]
        progress = JobProgress(
            stage=said["status"],
            step=said["step"],
            steps=said["steps"],
            fraction=said["fraction"],
            pace_s=said["seconds"] if stage == "denoising" else None,
            eta_at=None if eta is None else said["at"] + eta,
        )
        if self._counts is not None and said["step"] != self._step and stage == "denoising":
            self._counts.step(**said)
        is_last = said["step"] == said["steps"]
        event = partial(self._store.leases.event, lease, progress=progress)
        if said["step"] != self._step and stage == "denoising" and (is_last or self._is_due("step")):
            self._due["step"] = time.monotonic() + _STEP_EVENTS_S
            told = {name: said[name] for name in ("step", "steps", "fraction", "eta_s")}
            self._writes.append(partial(event, "step", {**told, "pace_s": said["seconds"]}))
        if said["status"] != self._stage and said["status"] not in ("finished", "failed", "cancelled"):
            self._writes.append(partial(event, "stage", {"stage": said["status"]}))
        self._stage = said["status"]
        self._step = said["step"]

    def _ended(self, lease: JobLease, said: Message) -> None:
        leases = self._store.leases
        if said["state"] == "completed":
            artifacts = [Artifact(**each) for each in said["artifacts"]]
            complete = partial(leases.complete, lease, artifacts, seconds=said["seconds"])
            self._end(complete if self._counts is None else partial(self._counts.completed, complete))
        elif said["state"] == "failed":
            failure = JobFailure(**said["failure"])
            self._end(partial(leases.retry if said["may_pass"] else leases.fail, lease, failure))
        else:  # nobody but a client's wish ends it so
            self._end(partial(leases.cancelled, lease))

    # -- what is to be done by time

    def act(self) -> None:
        """Whatever is due: start, kill, beat, hear wishes, tell the store, claim. `read` first."""
        if self._channel is None:
            if not self._draining and self._is_due("start"):
                self._start()
        elif reason := self._overdue():
            self._kill(reason)
        if self._is_due("store"):
            try:
                self._talk_to_store()
            except StoreDownError as error:
                self._due["store"] = time.monotonic() + _DOWN_S
                logger.warning("worker %s: %s", self.name, error)

    def _talk_to_store(self) -> None:
        while self._writes:
            try:
                self._writes[0]()
            except LeaseLostError as error:
                self._drop_lease(str(error))
                break
            self._writes.popleft()
        if self._lease is not None:
            self._keep(self._lease)
        if self._is_due("row"):
            self._due["row"] = time.monotonic() + self._settings.beat_s
            self._store.workers.put(dataclasses.replace(self._info, state=self.state))
        if self._is_due("figures"):
            self._due["figures"] = time.monotonic() + max(_COUNT_S, self._settings.beat_s)
            self._figures.flush(self._store.counters)
        if self.state != "ready" or not self.is_idle or self._draining or not self._is_weighed:
            return
        if reason := self._worn():
            logger.info("worker %s is replaced %s", self.name, reason)
            self._end_process()
            self._why_started = "recycled"
            self._enter("starting")
        elif self._is_due("look"):
            self._due["look"] = time.monotonic() + _LOOK_S
            # a lease that ran out elsewhere is no job that waits
            if self._is_due("claim") or self._store.oldest_queued_at() is not None:
                self._due["claim"] = time.monotonic() + _CLAIM_S
                self._claim()

    def _keep(self, lease: JobLease) -> None:
        """Beat, and hear what clients wish."""
        now = time.monotonic()
        try:
            if self._is_due("beat"):
                self._due["beat"] = now + self._settings.beat_s
                wished = self._store.leases.beat(lease, lease_s=self._settings.lease_s).cancel_requested
            elif self._is_due("wish") and not self._is_cancelling:
                self._due["wish"] = now + _WISH_S
                wished = self._store.job(lease.job).cancel_requested_at is not None
            else:
                return
        except JobMissingError:  # deleted: it is to be cancelled
            wished = True
        except LeaseLostError as error:
            self._drop_lease(str(error))
            return
        if wished and not self._is_cancelling:
            self._is_cancelling = True
            self._command("cancel")

    def _claim(self) -> None:
        model = self._engine.models.name
        gpus = max(1, self._settings.gpus_per_worker)
        found = self._store.leases.claim(self.name, [model], lease_s=self._settings.lease_s, gpus=gpus)
        if found is None:
            return
        job = found.job
        self._lease = found.lease
        self._counts = AttemptFigures(self._figures, job)
        self._runs = (job.id, job.fence)
        self._stage = self._step = None
        self._longest = {}
        self._is_cancelling = False
        self._due["beat"] = time.monotonic() + self._settings.beat_s
        self._due["step"] = 0.0
        self._moved = time.monotonic()
        self._enter("busy")
        params = dict(job.resolved)
        if params.get("seed") is None:
            params["seed"] = job.seed
        checkpoints = [{"path": s.path, "step": s.step, "sha256": s.sha256} for s in job.checkpoints]
        order = {"job": job.id, "fence": job.fence, "params": params, "checkpoints": checkpoints}
        self._command("run", **order, hold_at_step=job.hold_at_step)
        with logged_about(job=job.id):
            logger.info("claimed, attempt %d", job.attempt)

    def drain(self) -> None:
        """Claim no more; the job that runs is to be parked."""
        self._draining = True
        self._enter("draining")
        if self._runs is not None:
            self._command("park")

    def close(self) -> None:
        """End the worker, whatever it does. A job that it still has is given back unharmed."""
        self._draining = True
        self._stop_worker()
        if (lease := self._lease) is not None:
            self._end(partial(self._store.leases.park, lease))
        self._due.clear()
        try:
            self._talk_to_store()
            self._figures.flush(self._store.counters)
            self._store.workers.remove(self.name)
        except StoreDownError as error:
            logger.warning("worker %s: %s", self.name, error)

    # -- the process

    def _start(self) -> None:
        about = {"engine": self._engine.model_dump(mode="json"), "number": self._number}
        about["preview"] = self._settings.preview.model_dump()
        about["data"] = str(Path(self._settings.data).absolute())
        about |= {"worker": self.name, "logs": self._settings.logs.model_dump()}
        self._vain_starts += 1
        self._ran = self._base_rss = 0
        self._is_weighed = True
        self._info = dataclasses.replace(self._info, weights_sha256="", fits={})
        try:
            self._channel = self._launcher.start(about)
            self._figures.starts.labels(self._why_started).inc()
            self._figures.count_forkservers(self._launcher.started)
        except OSError as error:
            logger.warning("worker %s cannot be started: %s", self.name, error)
            self._wait_to_start()
        self._heard = self._moved = time.monotonic()
        self._enter("starting")

    def _worn(self) -> str | None:
        """Why a worker without a job is to be replaced; None: it may go on."""
        limits = self._settings.recycle
        grown = (self._info.rss - self._base_rss) / 2**30
        if limits.jobs and self._ran >= limits.jobs:
            return f"after {counted(self._ran, 'job')}"
        if limits.grown_gb and grown > limits.grown_gb:
            return f"for it grew by {grown:.1f} GiB in {counted(self._ran, 'job')}"
        return None

    def _wait_to_start(self) -> None:
        """At once, and ever later where it never comes to be ready."""
        vain = max(0, self._vain_starts - 1)
        self._due["start"] = time.monotonic() + (min(_LONGEST_WAIT_S, 2.0**vain) if vain else 0.0)

    def _overdue(self) -> str | None:
        """Why the worker is to be killed; None: it is well."""
        now = time.monotonic()
        if self._process is None or self.state == "starting":
            return "no start" if now - self._moved > self._patience.unknown_s else None
        if now - self._heard > self._patience.silence_s:
            return "frozen"
        if self._runs is None:
            return None
        longest = self._longest.get(self._stage or "")
        return "stuck" if now - self._moved > self._patience.of(longest) else None

    def _kill(self, reason: str) -> None:
        logger.warning("worker %s is killed: %s", self.name, reason)
        if reason == "stuck" and self._process is not None:
            self._process.kill(signal.SIGABRT)  # it says where it is stuck
            time.sleep(_STACKS_S)
        self._lost(reason)

    def _lost(self, reason: str | None) -> None:
        """The worker is gone, or goes now."""
        code = self._end_process()
        reason = reason or _exit_in_words(code)
        self._runs = None
        self._why_started = "lost"
        self._figures.deaths.labels(reason).inc()
        self._enter("starting")
        self._wait_to_start()
        logger.warning("worker %s ended: %s", self.name, reason)
        if (lease := self._lease) is not None:
            lost = partial(self._store.leases.worker_lost, lease, signal=reason)
            self._end(partial(lost, stage=self._stage, step=self._step))

    def _end_process(self) -> int | None:
        """Stop the worker; its exit code. Exits that nobody asks for would fill the forkserver's socket."""
        pid = None if self._process is None else self._process.pid
        self._stop_worker()
        return None if pid is None else self._launcher.exit_of(pid)

    def _stop_worker(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.close()
            self._process = None
        if self._channel is not None:
            self._channel.close()
            self._channel = None

    # -- small things

    def _command(self, kind: str, **values: Any) -> None:
        try:
            if self._channel is not None:
                self._channel.send(kind, **values)
        except OSError:
            self._lost(None)

    def _enter(self, state: str) -> None:
        self.state = state
        self._due["row"] = 0.0

    def _is_due(self, what: str) -> bool:
        return time.monotonic() >= self._due.get(what, 0.0)

    def _end(self, write: Callable[[], Job]) -> None:
        """The write that gives the lease back."""

        def ending() -> None:
            job = write()
            self._lease = None
            logger.info("job %s", job.state)

        self._writes.append(ending)

    def _drop_lease(self, why: str) -> None:
        """The job is another's, or has ended: nothing more is written, and the worker is to let go of it."""
        logger.warning("worker %s: %s", self.name, why)
        self._figures.leases_lost.inc()
        self._writes.clear()
        self._lease = None
        if self._runs is not None:
            self._command("cancel")


def _exit_in_words(code: int | None) -> str:
    if code is None:
        return "unknown"
    names = {number.value: number.name for number in signal.Signals}
    return names.get(-code, f"signal {-code}") if code < 0 else f"exit {code}"
