"""Random histories of the store, on both databases and under a fake clock, hold what a client may rely on."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)
from job_stores import FakeClock, MakeUrl, migrate

from chitu_diffusion.service.jobs import (
    Artifact,
    Job,
    JobCheckpoint,
    JobEndedError,
    JobFailure,
    JobLease,
    JobMissingError,
    JobState,
    LeaseLostError,
    NewJob,
    OwnerLimits,
    StoreError,
    may_follow,
)
from chitu_diffusion.service.store import JobStore, open_store

LEASE_S = 30.0
ENDS = {state.value for state in JobState if state.ended}
END = 2e6
"""Long after the last of the clock's readings."""
OWNERS = ("ann", "bob")
MOST_RUNNING = 2
"""Of each owner."""


class Histories(RuleBasedStateMachine):
    """Clients, workers that live, freeze and come back, and time, in any order.

    Every lease that was ever given stays in the bundle: most of those drawn are old, as a frozen worker's is.
    """

    make_url: MakeUrl
    leases = Bundle("leases")
    jobs = Bundle("jobs")

    @initialize()
    def begin(self) -> None:
        url = self.make_url()  # a database of its own: a history is the same each time
        migrate(url)
        self.clock = FakeClock()
        self.store: JobStore = open_store(url, clock=self.clock, most_queued=1000, retention_s=500)
        self.seen: dict[str, Job] = {}
        self.states: dict[str, JobState] = {}
        self.fences: dict[str, int] = {}
        self.ended: set[str] = set()
        self.deleted: set[str] = set()

    @rule(
        target=jobs,
        owner=st.sampled_from(OWNERS),
        number=st.integers(1, 4),
        priority=st.integers(0, 1),
        hook=st.booleans(),
    )
    def submit(self, owner: str, number: int, priority: int, hook: bool) -> Any:
        new = NewJob(owner, "wan", {}, {}, "b", priority=priority, webhook="https://h" if hook else None)
        made = []
        for _ in range(number):
            self.clock.advance(0.25)  # ids are random, so no two may tie: a history is the same each time
            made.append(self.store.submit(new, OwnerLimits(max_running=MOST_RUNNING)).job.id)
            self.states[made[-1]] = JobState.QUEUED
            self.fences[made[-1]] = 0
        return multiple(*made)

    @rule(target=leases, workers=st.integers(1, 4))
    def claim(self, workers: int) -> Any:
        taken = [self.claim_one(f"w{number}") for number in range(workers)]
        return multiple(*(lease for lease in taken if lease is not None))

    def claim_one(self, worker: str) -> JobLease | None:
        claimed = self.store.leases.claim(worker, ["wan"], lease_s=LEASE_S)
        if claimed is None:
            return None
        until = self.seen[claimed.job.id].lease_until
        assert until is None or until < self.clock.now, "a live lease was taken"
        assert claimed.lease.fence == self.fences[claimed.job.id] + 1
        self.fences[claimed.job.id] = claimed.lease.fence
        own = [
            job for job in self.everyone() if job.state is JobState.RUNNING and job.owner == claimed.job.owner
        ]
        assert len(own) <= MOST_RUNNING
        return claimed.lease

    @rule(lease=leases, what=st.integers(0, 9), step=st.integers(0, 5))
    def work(self, lease: JobLease, what: int, step: int) -> None:
        """Whatever a worker says under an old fence changes nothing at all."""
        do = self.store.leases
        fault = JobFailure("disk_full", "no space")
        calls = (
            lambda: do.beat(lease, lease_s=LEASE_S),
            lambda: do.event(lease, "step", {"step": step}),
            lambda: do.checkpoint(lease, JobCheckpoint("p", step, "h", 1)),
            lambda: do.park(lease),
            lambda: do.worker_lost(lease),
            lambda: do.retry(lease, fault),
            lambda: do.hold(lease),
            lambda: do.complete(lease, [video_of(lease)]),
            lambda: do.fail(lease, fault),
            lambda: do.cancelled(lease),
        )
        if lease.job in self.deleted:  # one that ran when it was deleted, and is heard until it has stopped
            with suppress(LeaseLostError):
                calls[what]()
            assert self.rows() == self.seen
            return
        held = self.seen.get(lease.job)
        mine = held is not None and held.state is JobState.RUNNING and held.fence == lease.fence
        if mine:
            calls[what]()
        else:
            with pytest.raises(LeaseLostError):
                calls[what]()
            assert self.rows() == self.seen

    @rule(job=jobs, what=st.sampled_from(["cancel", "release", "delete", "priority"]), n=st.integers(0, 1))
    def ask(self, job: str, what: str, n: int) -> None:
        try:
            if what == "priority":
                self.store.set_priority(job, n)
            else:
                getattr(self.store, what)(job)
                self.deleted |= {job} if what == "delete" else set()
        except JobMissingError:
            assert job in self.deleted or job not in self.seen
        except JobEndedError:
            assert self.states[job].ended
        except StoreError:
            pass

    @rule(seconds=st.sampled_from([1.0, 6.0, 14.0, 31.0, 200.0]))
    def wait(self, seconds: float) -> None:
        self.clock.advance(seconds)

    @rule()
    def sweep(self) -> None:
        self.store.sweep(queue_ttl_s=300)

    def everyone(self) -> tuple[Job, ...]:
        return self.store.jobs(limit=1000).jobs

    def rows(self) -> dict[str, Job]:
        return {job.id: job for job in self.everyone()}

    @invariant()
    def holds(self) -> None:
        now = self.rows()
        for job in now.values():
            if self.seen.get(job.id) != job:
                self.check(job)
        self.seen = now

    def check(self, job: Job) -> None:
        """A job that has changed since the last look."""
        assert job.id not in self.ended, "an end was changed"
        before = self.states[job.id]
        assert job.state == before or may_follow(before, job.state), (before, job.state)
        self.states[job.id] = job.state
        events = self.store.events(job.id)
        assert [event.n for event in events] == list(range(1, job.events + 1)), "a gap in the events"
        running = job.state is JobState.RUNNING
        assert running == (job.lease_until is not None) == (job.worker is not None)
        assert job.fence == self.fences[job.id]
        if job.state.ended:
            self.ended.add(job.id)
            assert events[-1].kind == job.state.value
            assert [event.kind for event in events[:-1] if event.kind in ENDS] == []
            files = self.store.artifacts(job.id)
            assert bool(files) == (job.state is JobState.COMPLETED)
            assert all(f"/{job.fence}/" in file.path for file in files.values())

    def teardown(self) -> None:
        """Under a worker that does its work, every job that was taken in ends."""
        if not self.states:
            return
        for job in self.everyone():
            if job.state is JobState.HELD:
                self.store.release(job.id)
        self.holds()
        while live := [job for job in self.seen.values() if not job.state.ended]:
            assert self.clock.advance(130) < END, live
            if claimed := self.store.leases.claim("fair", ["wan"], lease_s=LEASE_S):
                self.fences[claimed.job.id] = claimed.lease.fence
                self.holds()
                self.store.leases.complete(claimed.lease, [video_of(claimed.lease)])
            self.holds()
        self.store.close()


def video_of(lease: JobLease) -> Artifact:
    return Artifact("video", f"jobs/{lease.job}/{lease.fence}/video.mp4", 1, "h", "video/mp4")


def test_random_histories(fresh_url: MakeUrl) -> None:
    machine = type("HistoriesHere", (Histories,), {"make_url": staticmethod(fresh_url)})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=12,
            stateful_step_count=25,
            deadline=None,
            derandomize=True,
            phases=(Phase.generate, Phase.shrink),
            suppress_health_check=list(HealthCheck),
        ),
    )
