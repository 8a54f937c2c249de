"""The supervisor with workers that compute nothing: every fault of a process, and what becomes of the job."""

from __future__ import annotations

import hashlib
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from job_stores import MakeUrl, migrate
from supervising import FAKE, new_job, settings_of, supervised, until

from chitu_diffusion.service.answers import data_of
from chitu_diffusion.service.jobs import Artifact, Job, JobCheckpoint, JobState, NewJob, StoreDownError
from chitu_diffusion.service.launcher import WorkerLauncher
from chitu_diffusion.service.settings import ServiceConfig
from chitu_diffusion.service.store import JobStore, open_store
from chitu_diffusion.service.sweeper import sweep


@pytest.fixture
def settings(tmp_path: Path) -> ServiceConfig:
    return settings_of(tmp_path)


@pytest.fixture
def store(settings: ServiceConfig) -> Iterator[JobStore]:
    found = open_store(settings.store_url())
    yield found
    found.close()


def submit(store: JobStore, new: NewJob) -> str:
    return store.submit(new).job.id


def at_step(store: JobStore, job_id: str, step: int) -> Job:
    return until(lambda: (job := store.job(job_id)).checkpoint and job.checkpoint.step >= step and job)


def ended(store: JobStore, job_id: str) -> Job:
    return until(lambda: (job := store.job(job_id)).state.ended and job)


def kinds(store: JobStore, job_id: str) -> list[str]:
    return [event.kind for event in store.events(job_id)]


def worker_pid(store: JobStore) -> int:
    """Of the one worker that is busy."""
    return until(lambda: next((row.pid for row in store.workers.all() if row.state == "busy"), None))


def is_alive(pid: int) -> bool:
    """A zombie is not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def undisturbed(seed: int = 3, steps: int = 10) -> str:
    state = str(seed)
    for step in range(1, steps + 1):
        state = hashlib.sha256(f"{state} {step}".encode()).hexdigest()
    return state


def video_of(settings: ServiceConfig, store: JobStore, job_id: str) -> str:
    artifact = store.artifacts(job_id)["video"]
    text = (Path(settings.data) / artifact.path).read_text(encoding="utf-8")
    assert hashlib.sha256(text.encode()).hexdigest() == artifact.sha256
    return text


def test_a_job_runs_and_its_steps_are_events(settings: ServiceConfig, store: JobStore) -> None:
    with supervised(settings, store):
        job = ended(store, submit(store, new_job(previews=True)))
        assert video_of(settings, store, job.id) == undisturbed()
        assert (job.state, job.step, job.fraction, job.seconds) == ("completed", 10, 1.0, {"denoising": 1.0})
        row = until(lambda: next((row for row in store.workers.all() if row.state == "ready"), None))
        assert (row.model, row.layout) == ("wan-tiny", "fake")
    steps = [event.data["step"] for event in store.events(job.id) if event.kind == "step"]
    previews = [data_of(event) for event in store.events(job.id) if event.kind == "preview"]
    assert previews[2] == {"step": 3, "url": f"/v1/videos/{job.id}/preview?step=3"} and len(previews) == 10
    assert steps[0] == 1 and steps[-1] == 10 and kinds(store, job.id)[:3] == ["queued", "started", "step"]
    assert store.workers.all() == ()


@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP])
def test_the_job_of_a_dead_or_frozen_worker_goes_on(
    settings: ServiceConfig, store: JobStore, fault: signal.Signals
) -> None:
    with supervised(settings, store):
        job_id = submit(store, new_job(step_s=0.1))
        at_step(store, job_id, 4)
        pid = worker_pid(store)
        began = time.monotonic()
        os.kill(pid, fault)
        until(lambda: store.job(job_id).attempt == 2)
        assert time.monotonic() - began < 4
        job = ended(store, job_id)
        until(lambda: not is_alive(pid))
    assert video_of(settings, store, job_id) == undisturbed()
    lost = next(event.data for event in store.events(job_id) if event.kind == "worker_lost")
    resumed = next(event.data for event in store.events(job_id) if event.kind == "resumed")
    assert lost["signal"] == ("SIGKILL" if fault == signal.SIGKILL else "frozen")
    assert resumed["from_step"] >= 4 and job.deaths == 1


def test_a_stuck_unit_costs_the_worker_its_patience(settings: ServiceConfig, store: JobStore) -> None:
    with supervised(settings, store):
        job = ended(store, submit(store, new_job(stick_at=5)))
    lost = next(event.data for event in store.events(job.id) if event.kind == "worker_lost")
    assert (job.state, lost["signal"], lost["step"]) == ("completed", "stuck", 5)
    assert video_of(settings, store, job.id) == undisturbed()


def test_a_poison_job_ends_and_its_neighbour_does_not(settings: ServiceConfig, store: JobStore) -> None:
    with supervised(settings, store):
        poison = submit(store, new_job(poison=True))
        neighbour = submit(store, new_job())
        bad = ended(store, poison)
        good = ended(store, neighbour)
    assert bad.error is not None and (bad.state, bad.error.code, bad.deaths) == ("failed", "worker_lost", 3)
    assert good.deaths == 0 and video_of(settings, store, neighbour) == undisturbed()


def test_stop_parks_the_job_and_the_next_supervisor_goes_on(settings: ServiceConfig, store: JobStore) -> None:
    job_id = submit(store, new_job(step_s=0.1))
    with supervised(settings, store) as stop:
        at_step(store, job_id, 3)
        pid = worker_pid(store)
        began = time.monotonic()
        stop()
        assert time.monotonic() - began < 3
        until(lambda: not is_alive(pid))
    job = store.job(job_id)
    assert job.state is JobState.QUEUED and kinds(store, job_id)[-1] == "parked"
    with supervised(settings, store):
        job = ended(store, job_id)
    assert (job.deaths, job.attempt) == (0, 2)
    assert video_of(settings, store, job_id) == undisturbed()


def test_a_job_that_does_not_park_in_time_is_given_back(settings: ServiceConfig, store: JobStore) -> None:
    settings.drain_s = 0.1
    job_id = submit(store, new_job(stick_at=2))
    with supervised(settings, store):
        at_step(store, job_id, 2)
    job = store.job(job_id)
    assert (job.state, job.deaths) == (JobState.QUEUED, 0)


def test_a_job_is_held_at_its_step_and_the_worker_is_free(settings: ServiceConfig, store: JobStore) -> None:
    with supervised(settings, store):
        new = new_job()
        held = store.submit(NewJob(**{**vars(new), "hold_at_step": 4})).job.id
        until(lambda: store.job(held).state is JobState.HELD)
        assert ended(store, submit(store, new)).state == "completed"
        checkpoint = store.job(held).checkpoint
        assert checkpoint is not None and checkpoint.step == 4
        store.release(held)
        ended(store, held)
    assert video_of(settings, store, held) == undisturbed()


@pytest.mark.parametrize("stuck", [False, True])
def test_a_cancelled_job_stops(settings: ServiceConfig, store: JobStore, stuck: bool) -> None:
    with supervised(settings, store):
        job_id = submit(store, new_job(steps=1000, **({"stick_at": 3} if stuck else {})))
        at_step(store, job_id, 3)
        began = time.monotonic()
        for _ in range(3):
            store.cancel(job_id)
        job = ended(store, job_id)
        assert time.monotonic() - began < 4
        assert ended(store, submit(store, new_job())).state == "completed"
    assert job.state == "cancelled" and kinds(store, job_id).count("cancel_requested") == 1


def test_a_deleted_job_stops_and_its_files_go(settings: ServiceConfig, store: JobStore) -> None:
    with supervised(settings, store):
        job_id = submit(store, new_job(steps=1000))
        at_step(store, job_id, 1)
        store.delete(job_id)
        until(lambda: any(row.state == "ready" for row in store.workers.all()))
    sweep(settings, store)
    assert not (Path(settings.data) / "jobs" / job_id).exists()


def test_a_fault_that_may_pass_is_tried_later(settings: ServiceConfig, store: JobStore) -> None:
    failure = {"code": "disk_full", "message": "there is no space left"}
    with supervised(settings, store):
        job_id = submit(store, new_job(failure=failure))
        job = until(lambda: (job := store.job(job_id)).tries == 1 and job)
    assert job.state is JobState.QUEUED and job.not_before is not None and job.not_before > store.now()


def test_a_dead_forkserver_costs_no_job(settings: ServiceConfig, store: JobStore) -> None:
    launcher = WorkerLauncher(FAKE)
    with supervised(settings, store, launcher):
        job_id = submit(store, new_job(step_s=0.05))
        at_step(store, job_id, 2)
        before = launcher.pid
        assert before is not None
        os.kill(before, signal.SIGKILL)
        assert ended(store, job_id).attempt == 1
        second = submit(store, new_job(kill_at=2))
        assert ended(store, second).state == "completed"
        lost = next(event.data for event in store.events(second) if event.kind == "worker_lost")
        assert lost["signal"] == "unknown" and launcher.pid != before


def test_a_store_that_is_away_for_a_while_is_told_all_later(
    settings: ServiceConfig, store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def down(*_: object, **__: object) -> None:
        raise StoreDownError("away")

    with supervised(settings, store):
        job_id = submit(store, new_job(step_s=0.05))
        at_step(store, job_id, 2)
        with monkeypatch.context() as away:
            away.setattr(store._database, "writing", down)
            time.sleep(2.5)  # longer than the lease and the job
            assert store.job(job_id).state is JobState.RUNNING
        job = ended(store, job_id)
    steps = [event.data["step"] for event in store.events(job_id) if event.kind == "checkpoint"]
    assert (job.state, job.attempt, steps) == ("completed", 1, list(range(1, 11)))


def stop_outside_transactions(process: subprocess.Popen[bytes], database: Path) -> None:
    """Inside one, all others would wait for it."""

    def stopped() -> bool:
        os.kill(process.pid, signal.SIGSTOP)
        try:
            with closing(sqlite3.connect(database, timeout=0.05)) as connection:
                connection.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError:
            os.kill(process.pid, signal.SIGCONT)
            return False
        return True

    until(stopped)


@contextmanager
def supervisor_process(settings: ServiceConfig) -> Iterator[subprocess.Popen[bytes]]:
    script = Path(__file__).with_name("supervising.py")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent.parent)}
    command = [sys.executable, script, settings.data, settings.store_url()]
    with subprocess.Popen(command, env=environment) as process:
        try:
            yield process
        finally:
            process.kill()


def test_a_killed_supervisor_takes_its_workers_along(settings: ServiceConfig, store: JobStore) -> None:
    settings.lease_s = 600
    job_id = submit(store, new_job(step_s=0.05, steps=40))
    with supervisor_process(settings) as process:
        at_step(store, job_id, 2)
        pid = worker_pid(store)
        process.kill()
        until(lambda: not is_alive(pid), 3)
    began = time.monotonic()
    with supervised(settings, store):  # of the same name, so that no lease need run out
        until(lambda: store.job(job_id).attempt == 2)
        assert time.monotonic() - began < 5
        ended(store, job_id)
    assert video_of(settings, store, job_id) == undisturbed(steps=40)


def test_a_supervisor_that_slept_past_its_lease_changes_nothing(
    settings: ServiceConfig, store: JobStore
) -> None:
    job_id = submit(store, new_job(steps=1000, step_s=0.1))
    with supervisor_process(settings) as process:
        at_step(store, job_id, 2)
        pid = worker_pid(store)
        os.kill(pid, signal.SIGSTOP)
        stop_outside_transactions(process, Path(settings.data) / "chitu.db")
        other = until(lambda: store.leases.claim("other", ["wan-tiny"]), 8)
        assert other.lease.fence == 2
        folder = Path(settings.data) / "jobs" / job_id
        (folder / "2").mkdir()
        video = Artifact("video", f"jobs/{job_id}/2/video.mp4", 1, "ab", "video/mp4")
        (folder / "2" / "video.mp4").write_text("x", encoding="utf-8")
        done = store.leases.complete(other.lease, [video])
        for each in (pid, process.pid):
            os.kill(each, signal.SIGCONT)
        until(lambda: any(row.state == "ready" for row in store.workers.all()))
        assert store.job(job_id) == done and len(store.events(job_id)) == done.events
    sweep(settings, store)
    assert [entry.name for entry in folder.iterdir()] == ["2"]


def test_another_supervisor_goes_on_when_a_lease_has_run_out(tmp_path: Path, fresh_url: MakeUrl) -> None:
    url = fresh_url()
    migrate(url)
    settings = settings_of(tmp_path, store=url)
    store = open_store(url)
    with supervisor_process(settings) as first:
        job_id = submit(store, new_job(step_s=0.05, steps=40))
        at_step(store, job_id, 2)
        with supervised(settings, store):
            until(lambda: any(row.state == "ready" for row in store.workers.all()))
            first.kill()
            began = time.monotonic()
            until(lambda: store.job(job_id).attempt == 2)
            assert time.monotonic() - began < settings.lease_s + 2
            job = ended(store, job_id)
    assert job.checkpoints == () and video_of(settings, store, job_id) == undisturbed(steps=40)
    events = {event.kind: event.data for event in store.events(job_id)}
    assert events["worker_lost"]["signal"] == "lease_expired" and events["resumed"]["from_step"] >= 2
    store.close()


def test_the_sweeper_leaves_what_a_row_names(settings: ServiceConfig, store: JobStore) -> None:
    job = store.submit(new_job()).job
    claimed = store.leases.claim("w", ["wan-tiny"])
    assert claimed is not None
    store.leases.checkpoint(claimed.lease, JobCheckpoint(f"jobs/{job.id}/1/step1", 1, "ab", 1))
    store.leases.park(claimed.lease)
    store.leases.claim("w", ["wan-tiny"])
    root = Path(settings.data) / "jobs"
    for name in (f"{job.id}/1", f"{job.id}/2", f"{job.id}/inputs", "video_gone/1"):
        (root / name).mkdir(parents=True)
    sweep(settings, store)
    assert sorted(str(place.relative_to(root)) for place in root.glob("*/*")) == [
        f"{job.id}/1",
        f"{job.id}/2",
        f"{job.id}/inputs",
    ]
    assert not (root / "video_gone").exists()


def test_two_supervisors_of_one_machine_have_names_of_their_own(
    settings: ServiceConfig, store: JobStore
) -> None:
    with supervised(settings, store), supervised(settings, store):
        rows = until(lambda: (rows := store.workers.all()) and len(rows) == 2 and rows)
        jobs = [submit(store, new_job()) for _ in range(6)]
        assert all(ended(store, job).attempt == 1 for job in jobs)
    assert len({row.id for row in rows}) == 2


def pids(store: JobStore, jobs: list[str]) -> list[str]:
    """Of the workers that ran them."""
    for job_id in jobs:
        assert ended(store, job_id).deaths == 0
    return [event.data["message"] for job in jobs for event in store.events(job) if event.kind == "note"]


def test_a_worker_is_replaced_after_so_many_jobs(settings: ServiceConfig, store: JobStore) -> None:
    settings.recycle.jobs = 2
    with supervised(settings, store):
        one, two, three, four, five = pids(
            store, [submit(store, new_job(steps=1, says_pid=True)) for _ in range(5)]
        )
        assert one == two != three == four != five != one
        until(lambda: not is_alive(int(one)) and not is_alive(int(three)))


def test_a_worker_that_has_grown_is_replaced(settings: ServiceConfig, store: JobStore) -> None:
    settings.recycle.grown_gb = 1
    with supervised(settings, store):
        grown = [8, 0.5, 0.25, 0.5, 0]  # GiB; the first job's own is what a worker needs
        jobs = [submit(store, new_job(steps=1, says_pid=True, grows=int(each * 2**30))) for each in grown]
        one, two, three, four, five = pids(store, jobs)
    assert one == two == three == four != five
