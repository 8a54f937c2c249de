"""The store of jobs on SQLite and PostgreSQL: every transition, under a clock that the test sets."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace

import pytest
from databases import FakeClock

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


def test_a_job_s_life(store: JobStore, clock: FakeClock) -> None:
    job = store.submit(replace(NEW, seed=2**63 - 1, notes=("49 frames",))).job
    assert (job.state, job.request, job.notes) == (JobState.QUEUED, {"prompt": "猫"}, ("49 frames",))
    assert store.queue_position(job.id) == 0
    clock.advance(7)
    lease, running = claim(store).lease, store.job(job.id, "ann")
    assert (running.attempt, running.claimed_at, running.queued_at) == (1, clock.now, clock.now - 7)
    assert store.queue_position(job.id) is None
    clock.advance(10)
    assert store.leases.beat(lease).lease.until == clock.now + 30
    progress = JobProgress("denoising", 3, 8, 0.4, pace_s=0.5)
    assert store.leases.event(lease, "step", {"step": 3}, progress) == 3
    store.leases.event(lease, "step", {"step": 4}, JobProgress(step=4))
    store.leases.checkpoint(lease, JobCheckpoint("jobs/x/1/state", 4, "cd", 9, "f"))
    assert store.live_folders([job.id, "video_none"]) == {job.id: {1}}
    clock.advance(5)
    done = store.leases.complete(lease, [VIDEO], seconds={"denoising": 4.0})
    assert (done.state, done.step, done.steps, done.served_s) == (JobState.COMPLETED, 4, 8, 15)
    assert done == store.job(job.id)
    assert done.expires_at == clock.now + 1000
    assert store.artifacts(job.id) == {"video": VIDEO}
    assert kinds(store, job.id) == ["queued", "started", "step", "step", "checkpoint", "completed"]
    assert [event.n for event in store.events(job.id, after=4)] == [5, 6]
    assert store.last_events([job.id, "video_none"]) == {job.id: (6, JobState.COMPLETED)}
    for late in (store.leases.beat, store.leases.park, store.leases.cancelled):
        with pytest.raises(LeaseLostError):
            late(lease)
    with pytest.raises(JobEndedError):
        store.cancel(job.id)
    clock.advance(1000)
    assert store.sweep(queue_ttl_s=1e6).deleted == (job.id,)
    assert store.live_folders([job.id]) == {}
    assert store.events(job.id) == ()
    assert store.artifacts(job.id) == {}


def test_a_late_worker_changes_nothing(store: JobStore, clock: FakeClock) -> None:
    job = store.submit(NEW).job
    old = claim(store, "frozen").lease
    store.leases.checkpoint(old, JobCheckpoint("p", 2, "h", 1))
    assert store.leases.claim("other", ["wan"]) is None
    clock.advance(31)
    new = claim(store, "other")
    assert (new.lease.fence, new.job.attempt, new.job.checkpoint) == (
        2,
        2,
        JobCheckpoint("p", 2, "h", 1, "", 1),
    )
    before = (store.job(job.id), store.events(job.id))
    late = store.leases
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
    assert (store.job(job.id), store.events(job.id)) == before
    assert store.artifacts(job.id) == {}
    assert late.held_by("other") == (new.lease,)
    assert late.held_by("frozen") == ()
    assert store.live_folders([job.id]) == {job.id: {1, 2}}
    # a lease that ran out and that nobody took is its holder's still
    clock.advance(31)
    assert late.beat(new.lease).lease.until == clock.now + 30


@pytest.mark.parametrize(("steps", "deaths"), [([1, 1, 1], 3), (range(1, 30), 20)])
def test_a_poison_job_ends(store: JobStore, steps: Sequence[int], deaths: int) -> None:
    """Three deaths at one step; one that goes on between deaths may have twenty."""
    job = store.submit(NEW).job
    for step in steps:
        lease = claim(store).lease
        store.leases.checkpoint(lease, JobCheckpoint("p", step, "h", 1))
        after = store.leases.worker_lost(lease, signal="SIGKILL", stage="denoising", step=step)
        if after.state.ended:
            break
    assert (after.state, after.deaths) == (JobState.FAILED, deaths)
    assert after.error is not None and after.error.code == "worker_lost"
    assert kinds(store, job.id)[-2:] == ["worker_lost", "failed"]
    assert store.leases.claim("w", ["wan"]) is None


def test_idempotent_creates(store: JobStore, clock: FakeClock) -> None:
    keyed = replace(NEW, idempotency_key="k")
    first = store.submit(keyed)
    assert first.created
    again = store.submit(keyed)
    assert (again.job.id, again.created) == (first.job.id, False)
    with pytest.raises(IdempotencyConflictError):
        store.submit(replace(keyed, body_sha256="other"))
    assert store.submit(replace(keyed, owner="bob")).created
    retried = replace(NEW, retried_within_s=600)
    assert store.submit(retried).job.id == first.job.id
    assert store.submit(replace(retried, body_sha256="z")).created
    assert store.submit(NEW).created
    clock.advance(601)
    assert store.submit(retried).created


def test_retried_creates_at_once_make_one_job(store: JobStore) -> None:
    got: list[str] = []

    def create() -> None:
        for number in range(4):
            got.append(store.submit(replace(NEW, idempotency_key=f"k{number}")).job.id)

    threads = [threading.Thread(target=create) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 20
    assert len(set(got)) == 4 == store.counts()[JobState.QUEUED]


def test_five_claimers_share_and_never_double(store: JobStore) -> None:
    jobs = {store.submit(replace(NEW, owner=f"o{n % 3}")).job.id for n in range(30)}
    leases: list[JobLease] = []

    def work(name: str) -> None:
        while claimed := store.leases.claim(name, ["wan"]):
            leases.append(claimed.lease)
            store.leases.event(claimed.lease, "step")
            store.leases.complete(claimed.lease, [])

    threads = [threading.Thread(target=work, args=(f"w{n}",)) for n in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(lease.job for lease in leases) == sorted(jobs)
    assert all(lease.fence == 1 for lease in leases)
    for job in jobs:
        assert kinds(store, job) == ["queued", "started", "step", "completed"]


def test_leases_that_run_out_are_deaths(store: JobStore, clock: FakeClock) -> None:
    """A job that takes its whole machine along each time ends, too."""
    job = store.submit(NEW).job
    for fence in (1, 2, 3):
        assert claim(store).lease.fence == fence
        clock.advance(31)
    assert store.leases.claim("w", ["wan"]) is None
    assert store.job(job.id).state is JobState.FAILED
    assert store.job(job.id).served_s == 90  # no more than the leases were for


def test_faults_that_may_pass_are_tried_again(store: JobStore, clock: FakeClock) -> None:
    job = store.submit(NEW).job
    for delay in (5, 30, 120):
        assert store.leases.retry(claim(store).lease, FAULT).not_before == clock.now + delay
        assert store.leases.claim("w", ["wan"]) is None
        clock.advance(delay)
    failed = store.leases.retry(claim(store).lease, FAULT)
    assert (failed.state, failed.error) == (JobState.FAILED, FAULT)
    assert store.job(job.id).deaths == 0


def test_parked_and_held_jobs_go_on_first(store: JobStore, clock: FakeClock) -> None:
    older = store.submit(NEW).job
    job = store.submit(replace(NEW, priority=1, hold_at_step=4)).job
    lease = claim(store).lease
    assert store.leases.beat(lease).hold_at_step == 4
    assert store.leases.park(lease).deaths == 0
    lease = claim(store).lease
    assert lease.job == job.id
    with pytest.raises(JobBusyError):
        store.release(job.id)
    with pytest.raises(JobBusyError):
        store.set_priority(job.id, 3)
    assert store.leases.hold(lease).state is JobState.HELD
    assert store.set_priority(job.id, 0).priority == 0
    assert claim(store).lease.job == older.id
    newer = store.submit(replace(NEW, owner="bob")).job
    assert store.release(job.id).hold_at_step is None
    assert (store.queue_position(job.id), store.queue_position(newer.id)) == (0, 1)
    assert claim(store).lease.job == job.id
    assert kinds(store, job.id) == ["queued", "started", "parked", "started", "held", "queued", "started"]


def test_a_wish_to_cancel_decides_how_a_lease_ends(store: JobStore) -> None:
    ends = store.leases
    for end in (
        ends.park,
        ends.worker_lost,
        lambda lease: ends.retry(lease, FAULT),
        ends.hold,
        lambda lease: ends.complete(lease, [VIDEO]),
        lambda lease: ends.fail(lease, FAULT),
        ends.cancelled,
    ):
        job = store.submit(NEW).job
        lease = claim(store).lease
        for _ in range(3):
            assert store.cancel(job.id).state is JobState.RUNNING
        assert ends.beat(lease).cancel_requested
        assert end(lease).state is JobState.CANCELLED
        assert store.cancel(job.id).state is JobState.CANCELLED
        assert kinds(store, job.id).count("cancel_requested") == 1
        assert kinds(store, job.id).count("cancelled") == 1
        assert store.artifacts(job.id) == {}


def test_a_cancelled_job_whose_worker_went_silent(store: JobStore, clock: FakeClock) -> None:
    job = store.submit(NEW).job
    claim(store)
    store.cancel(job.id)
    clock.advance(31)
    assert store.leases.claim("w", ["wan"]) is None
    assert store.job(job.id).state is JobState.CANCELLED


def test_deleting(store: JobStore, clock: FakeClock) -> None:
    queued = store.submit(NEW).job
    running = store.submit(replace(NEW, priority=1)).job
    lease = claim(store).lease
    for job in (queued, running):
        with pytest.raises(JobMissingError):
            store.delete(job.id, "bob")
        store.delete(job.id, "ann")
        for ask in (store.job, store.cancel, store.delete, store.release):
            with pytest.raises(JobMissingError):
                ask(job.id)
    assert store.jobs().jobs == ()
    assert store.live_folders([queued.id, running.id]) == {running.id: {1}}
    assert store.leases.beat(lease).cancel_requested
    store.leases.cancelled(lease)
    assert store.sweep(queue_ttl_s=1e6).deleted == (running.id,)
    assert store.counts() == dict.fromkeys(JobState, 0)


def test_waiting_too_long(store: JobStore, clock: FakeClock) -> None:
    held = store.submit(replace(NEW, priority=1)).job
    store.leases.hold(claim(store).lease)
    late = store.submit(NEW).job
    assert store.oldest_queued_at() == clock.now
    clock.advance(101)
    young = store.submit(NEW).job
    swept = store.sweep(queue_ttl_s=100)
    assert (swept.timed_out, swept.dropped) == ((late.id,), (held.id,))
    failed = store.job(late.id)
    assert failed.error is not None and failed.error.code == "queue_timeout"
    assert store.job(held.id).state is JobState.CANCELLED
    assert store.job(young.id).state is JobState.QUEUED


def test_shares_and_limits(store: JobStore, clock: FakeClock) -> None:
    limits = OwnerLimits(max_queued=3, max_running=2, max_cost=10)
    ann = []
    for _ in range(3):
        ann.append(store.submit(replace(NEW, cost=2), limits).job.id)
        clock.advance(1)
    with pytest.raises(QueueFullError) as full:
        store.submit(replace(NEW, cost=2), limits)
    assert full.value.code == "key_queue_full"
    with pytest.raises(QueueFullError):
        store.submit(replace(NEW, cost=5), OwnerLimits(max_cost=10))
    with pytest.raises(QueueFullError) as full:
        for _ in range(60):
            store.submit(replace(NEW, owner="flood"))
    assert full.value.code == "queue_full"
    assert store.leases.claim("w", ["another"]) is None
    # one each in turn, though ann's came first; then her limit of two
    assert claim(store).lease.job == ann[0]
    assert store.job(claim(store).lease.job).owner == "flood"
    second = claim(store).lease
    assert second.job == ann[1]
    clock.advance(10)
    for _ in range(3):
        assert store.job(claim(store).lease.job).owner == "flood"
    assert store.leases.complete(second, []).served_s == 10
    assert claim(store).lease.job == ann[2]


def test_the_least_served_owner_is_next(store: JobStore, clock: FakeClock) -> None:
    for owner in ("ann", "bob"):
        for _ in range(4):
            store.submit(replace(NEW, owner=owner))
    served = {"ann": 0.0, "bob": 0.0, "new": 0.0}
    for number in range(10):
        claimed = claim(store)
        seconds = 20.0 if claimed.job.owner == "ann" else 5.0
        clock.advance(seconds)
        served[claimed.job.owner] += seconds
        store.leases.complete(claimed.lease, [])
        if number == 4:  # who comes now has no credit for having been away
            for _ in range(2):
                store.submit(replace(NEW, owner="new"))
    assert served == {"ann": 80, "bob": 20, "new": 10}


def test_lists_have_cursors(store: JobStore, clock: FakeClock) -> None:
    ids = []
    for number in range(7):
        ids.append(store.submit(replace(NEW, owner="ab"[number % 2])).job.id)
        clock.advance(number % 3 == 0)  # some of one time
    everyone = [job.id for job in store.jobs(limit=100).jobs]
    assert sorted(everyone) == sorted(ids)
    for newest_first in (True, False):
        found: list[str] = []
        after = None
        while True:
            page = store.jobs(after=after, limit=2, newest_first=newest_first)
            found += [job.id for job in page.jobs]
            if not page.has_more:
                break
            after = found[-1]
        assert found == (everyone if newest_first else everyone[::-1])
    assert {job.owner for job in store.jobs("a").jobs} == {"a"}
    with pytest.raises(JobMissingError):
        store.jobs("a", after=ids[1])
    assert store.jobs(states=[JobState.RUNNING]).jobs == ()


def test_webhooks_wait_in_the_outbox(store: JobStore, clock: FakeClock) -> None:
    job = store.submit(NEW).job
    assert store.outbox.claim() == ()
    store.leases.complete(claim(store).lease, [])
    (first,) = store.outbox.claim(lease_s=30)
    assert (first.id, first.attempt, first.body["type"]) == (f"{job.id}.3", 1, "video.completed")
    assert store.outbox.claim() == ()
    clock.advance(31)  # its sender died
    (second,) = store.outbox.claim()
    assert (second.id, second.attempt) == (first.id, 2)
    store.outbox.done(first, 200)  # too late, another has it
    assert store.outbox.failed(second, 500) == 30
    for attempt, delay in ((3, 120), (4, 600), (5, 3600), (6, 21600), (7, None)):
        clock.advance(21600)
        (again,) = store.outbox.claim()
        assert again.attempt == attempt
        assert store.outbox.failed(again, None) == delay
    clock.advance(1e6)
    assert store.outbox.claim() == ()


def test_keys_and_workers(store: JobStore, clock: FakeClock) -> None:
    key = store.keys.add(
        ApiKey("k1", "ann", "laptop", "ab", ("read", "submit"), OwnerLimits(5, None, 1.5), 2)
    )
    assert store.keys.get("k1") == key
    assert key.created_at == clock.now
    clock.advance(3)
    store.keys.touch("k1")
    assert store.keys.revoke("k1")
    clock.advance(3)
    assert store.keys.revoke("k1")
    assert store.keys.all() == (replace(key, last_used_at=clock.now - 3, revoked_at=clock.now - 3),)
    assert store.keys.get("k2") is None
    assert not store.keys.revoke("k2")
    worker = WorkerInfo("w", "host", 7, "wan", "ready", fits={"tokens": 9}, gpu_bytes=2**40)
    store.workers.put(worker)
    clock.advance(1)
    store.workers.put(replace(worker, state="busy"))
    assert store.workers.all() == (replace(worker, state="busy", seen_at=clock.now),)
    store.workers.remove("w")
    assert store.workers.all() == ()
