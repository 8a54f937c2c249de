"""The store of jobs on SQLite and PostgreSQL: every transition, under a clock that the test sets."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace

import pytest
from job_stores import FakeClock

from chitu_diffusion.service.jobs import (
    ApiKey,
    Artifact,
    Claimed,
    IdempotencyConflictError,
    JobBusyError,
    JobCheckpoint,
    JobEndedError,
    JobFailure,
    JobLease,
    JobMissingError,
    JobProgress,
    JobState,
    LeaseLostError,
    NewJob,
    OwnerLimits,
    QueueFullError,
    WorkerInfo,
)
from chitu_diffusion.service.store import JobStore

NEW = NewJob("ann", "wan", {"prompt": "猫"}, {"steps": 8}, "hash", webhook="https://example.com/hook")
VIDEO = Artifact("video", "jobs/x/1/video.mp4", 5, "ab", "video/mp4")
FAULT = JobFailure("disk_full", "no space")


def claim(store: JobStore, worker: str = "w") -> Claimed:
    claimed = store.leases.claim(worker, ["wan"], lease_s=30)
    assert claimed is not None
    return claimed


def kinds(store: JobStore, job_id: str) -> list[str]:
    events = store.events(job_id)
    assert [event.n for event in events] == list(range(1, len(events) + 1))
    return [event.kind for event in events]


def test_a_job_s_life(job_store: JobStore, fake_clock: FakeClock) -> None:
    job = job_store.submit(replace(NEW, seed=2**63 - 1, notes=("49 frames",))).job
    assert (job.state, job.request, job.notes) == (JobState.QUEUED, {"prompt": "猫"}, ("49 frames",))
    assert job_store.queue_position(job.id) == 0
    fake_clock.advance(7)
    lease = claim(job_store).lease
    running = job_store.job(job.id, "ann")
    assert (running.attempt, running.claimed_at, running.queued_at) == (1, fake_clock.now, fake_clock.now - 7)
    assert job_store.queue_position(job.id) is None
    fake_clock.advance(10)
    assert job_store.leases.beat(lease).lease.until == fake_clock.now + 30
    progress = JobProgress("denoising", 3, 8, 0.4, pace_s=0.5)
    assert job_store.leases.event(lease, "step", {"step": 3}, progress) == 3
    job_store.leases.event(lease, "step", {"step": 4}, JobProgress(step=4))
    job_store.leases.checkpoint(lease, JobCheckpoint("jobs/x/1/state", 4, "cd", 9, "f"))
    assert job_store.live_folders([job.id, "video_none"]) == {job.id: {1}}
    fake_clock.advance(5)
    done = job_store.leases.complete(lease, [VIDEO], seconds={"denoising": 4.0})
    assert (done.state, done.step, done.steps, done.served_s) == (JobState.COMPLETED, 4, 8, 15)
    assert done == job_store.job(job.id)
    assert done.expires_at == fake_clock.now + 1000
    assert job_store.artifacts(job.id) == {"video": VIDEO}
    assert kinds(job_store, job.id) == ["queued", "started", "step", "step", "checkpoint", "completed"]
    assert [event.n for event in job_store.events(job.id, after=4)] == [5, 6]
    assert job_store.last_events([job.id, "video_none"]) == {job.id: (6, JobState.COMPLETED)}
    for late in (job_store.leases.beat, job_store.leases.park, job_store.leases.cancelled):
        with pytest.raises(LeaseLostError):
            late(lease)
    with pytest.raises(JobEndedError):
        job_store.cancel(job.id)
    fake_clock.advance(1000)
    assert job_store.sweep(queue_ttl_s=1e6).deleted == (job.id,)
    assert job_store.live_folders([job.id]) == {}
    assert job_store.events(job.id) == ()
    assert job_store.artifacts(job.id) == {}


def test_a_late_worker_changes_nothing(job_store: JobStore, fake_clock: FakeClock) -> None:
    job = job_store.submit(NEW).job
    old = claim(job_store, "frozen").lease
    job_store.leases.checkpoint(old, JobCheckpoint("p", 2, "h", 1))
    assert job_store.leases.claim("other", ["wan"]) is None
    fake_clock.advance(31)
    new = claim(job_store, "other")
    assert (new.lease.fence, new.job.attempt, new.job.checkpoint) == (
        2,
        2,
        JobCheckpoint("p", 2, "h", 1, "", 1),
    )
    before = (job_store.job(job.id), job_store.events(job.id))
    late = job_store.leases
    for write in (
        lambda: late.beat(old),
        lambda: late.event(old, "step"),
        lambda: late.checkpoint(old, JobCheckpoint("q", 5, "h", 1)),
        lambda: late.park(old),
        lambda: late.worker_lost(old),
        lambda: late.retry(old, FAULT),
        lambda: late.hold(old),
        lambda: late.complete(old, [VIDEO]),
        lambda: late.fail(old, FAULT),
        lambda: late.cancelled(old),
    ):
        with pytest.raises(LeaseLostError, match="stop its work"):
            write()
    assert (job_store.job(job.id), job_store.events(job.id)) == before
    assert job_store.artifacts(job.id) == {}
    assert late.held_by("other") == (new.lease,)
    assert late.held_by("frozen") == ()
    assert job_store.live_folders([job.id]) == {job.id: {1, 2}}
    # a lease that ran out and that nobody took is its holder's still
    fake_clock.advance(31)
    assert late.beat(new.lease).lease.until == fake_clock.now + 30


@pytest.mark.parametrize(("steps", "deaths"), [([1, 1, 1], 3), (range(1, 30), 20)])
def test_a_poison_job_ends(job_store: JobStore, steps: Sequence[int], deaths: int) -> None:
    """Three deaths at one step; one that goes on between deaths may have twenty."""
    job = job_store.submit(NEW).job
    for step in steps:
        lease = claim(job_store).lease
        job_store.leases.checkpoint(lease, JobCheckpoint("p", step, "h", 1))
        after = job_store.leases.worker_lost(lease, signal="SIGKILL", stage="denoising", step=step)
        if after.state.ended:
            break
    assert (after.state, after.deaths) == (JobState.FAILED, deaths)
    assert after.error is not None and after.error.code == "worker_lost"
    assert kinds(job_store, job.id)[-2:] == ["worker_lost", "failed"]
    assert job_store.leases.claim("w", ["wan"]) is None


def test_idempotent_creates(job_store: JobStore, fake_clock: FakeClock) -> None:
    keyed = replace(NEW, idempotency_key="k")
    first = job_store.submit(keyed)
    assert first.created
    again = job_store.submit(keyed)
    assert (again.job.id, again.created) == (first.job.id, False)
    with pytest.raises(IdempotencyConflictError):
        job_store.submit(replace(keyed, body_sha256="other"))
    assert job_store.submit(replace(keyed, owner="bob")).created
    retried = replace(NEW, retried_within_s=600)
    assert job_store.submit(retried).job.id == first.job.id
    assert job_store.submit(replace(retried, body_sha256="z")).created
    assert job_store.submit(NEW).created
    fake_clock.advance(601)
    assert job_store.submit(retried).created


def test_retried_creates_at_once_make_one_job(job_store: JobStore) -> None:
    got: list[str] = []

    def create() -> None:
        for number in range(4):
            got.append(job_store.submit(replace(NEW, idempotency_key=f"k{number}")).job.id)

    threads = [threading.Thread(target=create) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 20
    assert len(set(got)) == 4 == job_store.counts()[JobState.QUEUED]


def test_five_claimers_share_and_never_double(job_store: JobStore) -> None:
    jobs = {job_store.submit(replace(NEW, owner=f"o{n % 3}")).job.id for n in range(30)}
    leases: list[JobLease] = []

    def work(name: str) -> None:
        while claimed := job_store.leases.claim(name, ["wan"]):
            leases.append(claimed.lease)
            job_store.leases.event(claimed.lease, "step")
            job_store.leases.complete(claimed.lease, [])

    threads = [threading.Thread(target=work, args=(f"w{n}",)) for n in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(lease.job for lease in leases) == sorted(jobs)
    assert all(lease.fence == 1 for lease in leases)
    for job in jobs:
        assert kinds(job_store, job) == ["queued", "started", "step", "completed"]


def test_leases_that_run_out_are_deaths(job_store: JobStore, fake_clock: FakeClock) -> None:
    """A job that takes its whole machine along each time ends, too."""
    job = job_store.submit(NEW).job
    for fence in (1, 2, 3):
        assert claim(job_store).lease.fence == fence
        fake_clock.advance(31)
    assert job_store.leases.claim("w", ["wan"]) is None
    assert job_store.job(job.id).state is JobState.FAILED
    assert job_store.job(job.id).served_s == 90  # no more than the leases were for


def test_faults_that_may_pass_are_tried_again(job_store: JobStore, fake_clock: FakeClock) -> None:
    job = job_store.submit(NEW).job
    for delay in (5, 30, 120):
        assert job_store.leases.retry(claim(job_store).lease, FAULT).not_before == fake_clock.now + delay
        assert job_store.leases.claim("w", ["wan"]) is None
        fake_clock.advance(delay)
    failed = job_store.leases.retry(claim(job_store).lease, FAULT)
    assert (failed.state, failed.error) == (JobState.FAILED, FAULT)
    assert job_store.job(job.id).deaths == 0


def test_parked_and_held_jobs_go_on_first(job_store: JobStore, fake_clock: FakeClock) -> None:
    older = job_store.submit(NEW).job
    job = job_store.submit(replace(NEW, priority=1, hold_at_step=4)).job
    lease = claim(job_store).lease
    assert job_store.leases.beat(lease).hold_at_step == 4
    assert job_store.leases.park(lease).deaths == 0
    lease = claim(job_store).lease
    assert lease.job == job.id
    with pytest.raises(JobBusyError):
        job_store.release(job.id)
    with pytest.raises(JobBusyError):
        job_store.set_priority(job.id, 3)
    assert job_store.leases.hold(lease).state is JobState.HELD
    assert job_store.set_priority(job.id, 0).priority == 0
    assert claim(job_store).lease.job == older.id
    newer = job_store.submit(replace(NEW, owner="bob")).job
    assert job_store.release(job.id).hold_at_step is None
    assert (job_store.queue_position(job.id), job_store.queue_position(newer.id)) == (0, 1)
    assert claim(job_store).lease.job == job.id
    assert kinds(job_store, job.id) == ["queued", "started", "parked", "started", "held", "queued", "started"]


def test_a_wish_to_cancel_decides_how_a_lease_ends(job_store: JobStore) -> None:
    ends = job_store.leases
    for end in (
        ends.park,
        ends.worker_lost,
        lambda lease: ends.retry(lease, FAULT),
        ends.hold,
        lambda lease: ends.complete(lease, [VIDEO]),
        lambda lease: ends.fail(lease, FAULT),
        ends.cancelled,
    ):
        job = job_store.submit(NEW).job
        lease = claim(job_store).lease
        for _ in range(3):
            assert job_store.cancel(job.id).state is JobState.RUNNING
        assert ends.beat(lease).cancel_requested
        assert end(lease).state is JobState.CANCELLED
        assert job_store.cancel(job.id).state is JobState.CANCELLED
        assert kinds(job_store, job.id).count("cancel_requested") == 1
        assert kinds(job_store, job.id).count("cancelled") == 1
        assert job_store.artifacts(job.id) == {}


def test_a_cancelled_job_whose_worker_went_silent(job_store: JobStore, fake_clock: FakeClock) -> None:
    job = job_store.submit(NEW).job
    claim(job_store)
    job_store.cancel(job.id)
    fake_clock.advance(31)
    assert job_store.leases.claim("w", ["wan"]) is None
    assert job_store.job(job.id).state is JobState.CANCELLED


def test_deleting(job_store: JobStore, fake_clock: FakeClock) -> None:
    queued = job_store.submit(NEW).job
    running = job_store.submit(replace(NEW, priority=1)).job
    lease = claim(job_store).lease
    for job in (queued, running):
        with pytest.raises(JobMissingError):
            job_store.delete(job.id, "bob")
        job_store.delete(job.id, "ann")
        for ask in (job_store.job, job_store.cancel, job_store.delete, job_store.release):
            with pytest.raises(JobMissingError):
                ask(job.id)
    assert job_store.jobs().jobs == ()
    assert job_store.live_folders([queued.id, running.id]) == {running.id: {1}}
    assert job_store.leases.beat(lease).cancel_requested
    job_store.leases.cancelled(lease)
    assert job_store.sweep(queue_ttl_s=1e6).deleted == (running.id,)
    assert job_store.counts() == dict.fromkeys(JobState, 0)


def test_waiting_too_long(job_store: JobStore, fake_clock: FakeClock) -> None:
    held = job_store.submit(replace(NEW, priority=1)).job
    job_store.leases.hold(claim(job_store).lease)
    late = job_store.submit(NEW).job
    assert job_store.oldest_queued_at() == fake_clock.now
    fake_clock.advance(101)
    young = job_store.submit(NEW).job
    swept = job_store.sweep(queue_ttl_s=100)
    assert (swept.timed_out, swept.dropped) == ((late.id,), (held.id,))
    failed = job_store.job(late.id)
    assert failed.error is not None and failed.error.code == "queue_timeout"
    assert job_store.job(held.id).state is JobState.CANCELLED
    assert job_store.job(young.id).state is JobState.QUEUED


def test_shares_and_limits(job_store: JobStore, fake_clock: FakeClock) -> None:
    limits = OwnerLimits(max_queued=3, max_running=2, max_cost=10)
    ann = []
    for _ in range(3):
        ann.append(job_store.submit(replace(NEW, cost=2), limits).job.id)
        fake_clock.advance(1)
    with pytest.raises(QueueFullError) as full:
        job_store.submit(replace(NEW, cost=2), limits)
    assert full.value.code == "key_queue_full"
    with pytest.raises(QueueFullError):
        job_store.submit(replace(NEW, cost=5), OwnerLimits(max_cost=10))
    with pytest.raises(QueueFullError) as full:
        for _ in range(60):
            job_store.submit(replace(NEW, owner="flood"))
    assert full.value.code == "queue_full"
    assert job_store.leases.claim("w", ["another"]) is None
    # one each in turn, though ann's came first; then her limit of two
    assert claim(job_store).lease.job == ann[0]
    assert job_store.job(claim(job_store).lease.job).owner == "flood"
    second = claim(job_store).lease
    assert second.job == ann[1]
    fake_clock.advance(10)
    for _ in range(3):
        assert job_store.job(claim(job_store).lease.job).owner == "flood"
    assert job_store.leases.complete(second, []).served_s == 10
    assert claim(job_store).lease.job == ann[2]


def test_the_least_served_owner_is_next(job_store: JobStore, fake_clock: FakeClock) -> None:
    for owner in ("ann", "bob"):
        for _ in range(4):
            job_store.submit(replace(NEW, owner=owner))
    served = {"ann": 0.0, "bob": 0.0, "new": 0.0}
    for number in range(10):
        claimed = claim(job_store)
        seconds = 20.0 if claimed.job.owner == "ann" else 5.0
        fake_clock.advance(seconds)
        served[claimed.job.owner] += seconds
        job_store.leases.complete(claimed.lease, [])
        if number == 4:  # who comes now has no credit for having been away
            for _ in range(2):
                job_store.submit(replace(NEW, owner="new"))
    assert served == {"ann": 80, "bob": 20, "new": 10}


def test_lists_have_cursors(job_store: JobStore, fake_clock: FakeClock) -> None:
    ids = []
    for number in range(7):
        ids.append(job_store.submit(replace(NEW, owner="ab"[number % 2])).job.id)
        fake_clock.advance(number % 3 == 0)  # some of one time
    everyone = [job.id for job in job_store.jobs(limit=100).jobs]
    assert sorted(everyone) == sorted(ids)
    for newest_first in (True, False):
        found: list[str] = []
        after = None
        while True:
            page = job_store.jobs(after=after, limit=2, newest_first=newest_first)
            found += [job.id for job in page.jobs]
            if not page.has_more:
                break
            after = found[-1]
        assert found == (everyone if newest_first else everyone[::-1])
    assert {job.owner for job in job_store.jobs("a").jobs} == {"a"}
    with pytest.raises(JobMissingError):
        job_store.jobs("a", after=ids[1])
    assert job_store.jobs(states=[JobState.RUNNING]).jobs == ()


def test_webhooks_wait_in_the_outbox(job_store: JobStore, fake_clock: FakeClock) -> None:
    job = job_store.submit(NEW).job
    assert job_store.outbox.claim() == ()
    job_store.leases.complete(claim(job_store).lease, [])
    (first,) = job_store.outbox.claim(lease_s=30)
    assert (first.id, first.attempt, first.body["type"]) == (f"{job.id}.3", 1, "video.completed")
    assert job_store.outbox.claim() == ()
    fake_clock.advance(31)  # its sender died
    (second,) = job_store.outbox.claim()
    assert (second.id, second.attempt) == (first.id, 2)
    job_store.outbox.done(first, 200)  # too late, another has it
    assert job_store.outbox.failed(second, 500) == 30
    for attempt, delay in ((3, 120), (4, 600), (5, 3600), (6, 21600), (7, None)):
        fake_clock.advance(21600)
        (again,) = job_store.outbox.claim()
        assert again.attempt == attempt
        assert job_store.outbox.failed(again, None) == delay
    fake_clock.advance(1e6)
    assert job_store.outbox.claim() == ()


def test_keys_and_workers(job_store: JobStore, fake_clock: FakeClock) -> None:
    key = job_store.keys.add(
        ApiKey("k1", "ann", "laptop", "ab", ("read", "submit"), OwnerLimits(5, None, 1.5), 2)
    )
    assert job_store.keys.get("k1") == key
    assert key.created_at == fake_clock.now
    fake_clock.advance(3)
    job_store.keys.touch("k1")
    assert job_store.keys.revoke("k1")
    fake_clock.advance(3)
    assert job_store.keys.revoke("k1")
    assert job_store.keys.all() == (
        replace(key, last_used_at=fake_clock.now - 3, revoked_at=fake_clock.now - 3),
    )
    assert job_store.keys.get("k2") is None
    assert not job_store.keys.revoke("k2")
    worker = WorkerInfo("w", "host", 7, "wan", "ready", fits={"tokens": 9}, gpu_bytes=2**40)
    job_store.workers.put(worker)
    fake_clock.advance(1)
    job_store.workers.put(replace(worker, state="busy"))
    assert job_store.workers.all() == (replace(worker, state="busy", seen_at=fake_clock.now),)
    job_store.workers.remove("w")
    assert job_store.workers.all() == ()
