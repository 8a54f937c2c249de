"""Why a job is as it is, in words: from its row, the queue and the workers' rows. No HTTP."""

from __future__ import annotations

from chitu_diffusion.errors import counted
from chitu_diffusion.service.jobs import Job, JobState
from chitu_diffusion.service.store import JobStore

_UNHEARD_S = 30.0


def reasons(store: JobStore, job: Job) -> list[str]:
    """Sentences, what matters most first.

    Raises:
        StoreDownError
    """
    now = store.now()
    if job.state is JobState.QUEUED:
        return _waits(store, job, now)
    if job.state is JobState.HELD:
        return [f"it was to be held, and is since {now - job.queued_at:.0f} s, at step {job.step or 0}"]
    if job.state is JobState.RUNNING:
        return _runs(job, now)
    if job.error is not None:
        at = "" if job.stage is None else f" in {job.stage}, step {job.step or 0}"
        said = [f"it failed{at}: {job.error.message} ({job.error.code})"]
        return said + ([job.error.next] if job.error.next else [])
    return [f"it is {job.state} since {now - (job.ended_at or now):.0f} s"]


def _waits(store: JobStore, job: Job, now: float) -> list[str]:
    found = []
    workers = store.workers.all()
    serving = [row for row in workers if row.model == job.model]
    heard = [row for row in serving if now - row.seen_at < _UNHEARD_S]
    if not serving:
        others = ", ".join(sorted({row.model for row in workers}))
        has = f"; those here serve {others}" if others else ""
        found.append(f"no worker serves {job.model}: start one with 'chitu worker --model {job.model}'{has}")
    elif not heard:
        seen = min(now - row.seen_at for row in serving)
        found.append(f"no worker of {job.model} was heard of for {seen:.0f} s")
    if job.not_before is not None and job.not_before > now:
        found.append(f"it is tried again in {job.not_before - now:.0f} s, for the {job.tries}. time")
    before = store.queue_position(job.id) or 0
    busy = sum(row.state == "busy" for row in heard)
    if before:
        found.append(f"{counted(before, 'job')} before it")
    if heard:
        found.append(f"of {counted(len(heard), 'worker')} of {job.model}, {busy} busy")
    weights = sorted({row.weights_sha256[:12] for row in heard if row.weights_sha256})
    if len(weights) > 1:
        found.append(f"their weights differ ({', '.join(weights)}): which one takes it decides the video")
    loading = sum(row.state == "starting" for row in heard)
    if loading:
        found.append(
            f"{counted(loading, 'worker')} of them still load{'s' if loading == 1 else ''} the model"
        )
    if heard and not before and busy < len(heard) and not found[:-1]:
        found.append("a worker takes it at once, unless its owner has as many running jobs as it may have")
    if job.deaths:
        found.append(f"{counted(job.deaths, 'worker')} died of it, or with it")
    return found


def _runs(job: Job, now: float) -> list[str]:
    place = f"{job.stage or 'begin'}, step {job.step or 0} of {job.steps or '?'}"
    found = [f"worker {job.worker} runs it: {place}, attempt {job.attempt}"]
    if job.lease_until is not None and job.lease_until < now:
        found.append(f"its lease is over since {now - job.lease_until:.0f} s: the next free worker goes on")
    if job.cancel_requested_at is not None:
        found.append("it is to be cancelled: that is seen after the step that runs")
    return found
