"""Metrics as Prometheus reads them: every promised name and label, of processes that have ended, too; and the
dashboard and the alerts, which ask for nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from fronts import client_of, make_front
from job_stores import FakeClock
from prometheus_client.parser import text_string_to_metric_families
from supervising import new_job, settings_of, supervised, until

from chitu_diffusion.service.counters import series
from chitu_diffusion.service.figures import SupervisorFigures, resume_reason
from chitu_diffusion.service.front import Front
from chitu_diffusion.service.jobs import JobEvent, JobFailure, WorkerInfo
from chitu_diffusion.service.store import JobStore

PROMISED = {
    "chitu_jobs": ("counter", {"state", "code"}),
    "chitu_queue_jobs": ("gauge", {"state"}),
    "chitu_queue_oldest_seconds": ("gauge", set()),
    "chitu_queue_wait_seconds": ("histogram", {"model"}),
    "chitu_job_seconds": ("histogram", {"model"}),
    "chitu_stage_seconds": ("histogram", {"model", "stage"}),
    "chitu_step_seconds": ("histogram", {"model"}),
    "chitu_steps": ("counter", {"kind"}),
    "chitu_resumes": ("counter", {"reason", "exact"}),
    "chitu_steps_lost": ("counter", set()),
    "chitu_worker_deaths": ("counter", {"signal"}),
    "chitu_worker_starts": ("counter", {"reason"}),
    "chitu_forkserver_starts": ("counter", set()),
    "chitu_workers": ("gauge", {"model", "state"}),
    "chitu_worker_ready": ("gauge", {"model"}),
    "chitu_worker_rss_bytes": ("gauge", {"worker"}),
    "chitu_gpu_memory_bytes": ("gauge", {"worker"}),
    "chitu_lease_lost": ("counter", set()),
    "chitu_checkpoint_seconds": ("histogram", {"model"}),
    "chitu_checkpoint_bytes": ("histogram", {"model"}),
    "chitu_memory_level_raised": ("counter", {"model"}),
    "chitu_eta_error_ratio": ("histogram", {"model"}),
    "chitu_sse_streams": ("gauge", set()),
    "chitu_webhook": ("counter", {"result"}),
    "chitu_http_seconds": ("histogram", {"route", "code"}),
    "chitu_store_seconds": ("histogram", {"query"}),
    "chitu_disk_free_bytes": ("gauge", set()),
}
"""By family: what it is, and its labels."""
Found = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def scraped(front: Front) -> Found:
    """Samples by name and labels, read by Prometheus' own parser; whole families are checked on the way."""
    found: Found = {}
    families = list(text_string_to_metric_families(client_of(front).get("/metrics").text))
    kinds = {family.name: family.type for family in families if not family.name.endswith("_created")}
    assert kinds == {name: kind for name, (kind, _) in PROMISED.items()}
    for family in families:
        for sample in family.samples:
            key = (sample.name, tuple(sorted(sample.labels.items())))
            assert key not in found
            if not sample.name.endswith("_created"):
                assert set(sample.labels) - {"le"} == PROMISED[family.name][1], sample.name
                found[key] = sample.value
    return found


def value(found: Found, name: str, **labels: str) -> float:
    return found.get((name, tuple(sorted(labels.items()))), 0.0)


def test_every_promised_name_with_its_type_and_labels(front: Front) -> None:
    figures = SupervisorFigures()
    for each in vars(figures).values():
        if hasattr(each, "labels") and each._labelnames:
            each = each.labels(*each._labelnames)
        if hasattr(each, "observe"):
            each.observe(0.3)
        elif hasattr(each, "inc"):
            each.inc()
    front.store.workers.put(WorkerInfo("w", "here", 1, "wan-tiny", "busy", rss=7, gpu_bytes=8))
    front.metrics.webhooks.labels("ok").inc()
    client_of(front).get("/health")
    figures.flush(front.store.counters)
    found = scraped(front)
    told = {name for name, labels in found}
    for name, (kind, _) in PROMISED.items():
        ends = {"counter": ["_total"], "gauge": [""], "histogram": ["_bucket", "_count", "_sum"]}[kind]
        left_out = {"chitu_jobs"}  # nothing has ended yet
        assert name in left_out or {f"{name}{end}" for end in ends} <= told, name
    assert value(found, "chitu_worker_ready", model="wan-tiny") == 1
    assert value(found, "chitu_step_seconds_bucket", model="model", le="0.5") == 1


def test_what_workers_went_through_outlives_their_supervisor(tmp_path: Path) -> None:
    front = make_front(tmp_path)
    settings = settings_of(tmp_path)
    with supervised(settings, front.store):
        jobs = [front.store.submit(new_job(kill_at=4, steps=6)).job.id]
        jobs += [front.store.submit(new_job(failure={"code": "disk_full", "message": "full"})).job.id]
        until(lambda: front.store.job(jobs[0]).state.ended and front.store.job(jobs[1]).tries)
    front.store.cancel(jobs[1])
    found = scraped(front)
    assert value(found, "chitu_jobs_total", state="completed", code="") == 1
    assert value(found, "chitu_jobs_total", state="cancelled", code="") == 1
    assert value(found, "chitu_worker_deaths_total", signal="SIGKILL") == 1
    assert value(found, "chitu_worker_starts_total", reason="first") == 1
    assert value(found, "chitu_worker_starts_total", reason="lost") == 1
    assert value(found, "chitu_forkserver_starts_total") == 1
    assert value(found, "chitu_resumes_total", reason="worker_lost", exact="true") == 1
    computed = value(found, "chitu_steps_total", kind="computed")
    redone = value(found, "chitu_steps_total", kind="redone")
    assert computed + redone == value(found, "chitu_step_seconds_count", model="wan-tiny") >= 6
    assert value(found, "chitu_checkpoint_bytes_count", model="wan-tiny") >= 6
    assert value(found, "chitu_queue_wait_seconds_count", model="wan-tiny") == 2
    for name in ("chitu_job_seconds_count", "chitu_eta_error_ratio_count"):
        assert value(found, name, model="wan-tiny") == 1
    assert value(found, "chitu_stage_seconds_count", model="wan-tiny", stage="denoising") == 1
    front.store.close()


def test_steps_that_were_lost_and_done_again(front: Front) -> None:
    from dataclasses import replace

    from chitu_diffusion.service.figures import AttemptFigures

    figures = SupervisorFigures()
    job = replace(front.store.submit(new_job()).job, attempt=2, step=5)
    counts = AttemptFigures(figures, job)
    for step in range(4, 8):  # it went on from step 3
        counts.step(step=step, seconds=0.1, eta_s=1.0, saved=step == 7, stage="denoising")
    read = figures.registry.get_sample_value
    assert read("chitu_steps_lost_total") == 2
    assert [read("chitu_steps_total", {"kind": kind}) for kind in ("redone", "computed", "saved")] == [
        2,
        1,
        1,
    ]


def test_why_attempts_go_on() -> None:
    def reason(*kinds: str, **data: object) -> str:
        return resume_reason([JobEvent("j", n, 0.0, kind, data) for n, kind in enumerate(kinds)])

    assert reason("worker_lost", "queued", signal="SIGKILL") == "worker_lost"
    assert reason("step", "worker_lost", signal="lease_expired") == "lease_expired"
    assert reason("step", "parked") == "parked" and reason("held", "queued") == "held"
    assert reason("step", "queued", code="disk_full") == "retry" and reason("step") == "other"


def test_counters_of_many_processes_add_up(job_store: JobStore, fake_clock: FakeClock) -> None:
    key = series("chitu_x_total", {"b": "1", "a": "é"})
    assert key == series("chitu_x_total", {"a": "é", "b": "1"})
    figures = [SupervisorFigures(), SupervisorFigures()]
    for each in figures:
        each.steps_lost.inc(3)
        each.flush(job_store.counters)
    figures[0].steps_lost.inc()
    for _ in range(2):  # the second time nothing has grown
        figures[0].flush(job_store.counters)
    job_store.counters.add({key: 2.5})
    assert job_store.counters.all() == {
        "chitu_steps_lost_total": [({}, 7.0)],
        "chitu_x_total": [({"a": "é", "b": "1"}, 2.5)],
    }
    new = new_job()
    lease = None
    for _ in range(2):
        job_store.submit(new)
        claimed = job_store.leases.claim("w", [new.model])
        assert claimed is not None
        lease = claimed.lease
        job_store.leases.fail(lease, JobFailure("non_finite", "NaN"))
    ended = job_store.counters.all()["chitu_jobs_total"]
    assert ended == [({"code": "non_finite", "state": "failed"}, 2.0)]


def test_a_store_that_is_down_is_no_fault(tmp_path: Path) -> None:
    front = make_front(tmp_path)
    client = client_of(front)

    def down() -> Iterator[None]:
        from chitu_diffusion.service.jobs import StoreDownError

        raise StoreDownError("down")

    front.store.counters.all = down  # type: ignore[assignment, method-assign]
    assert client.get("/metrics").status_code == 503
    front.store.close()


def test_a_worker_that_is_replaced_did_not_die(tmp_path: Path) -> None:
    front = make_front(tmp_path)
    with supervised(settings_of(tmp_path, recycle={"jobs": 1}), front.store):
        front.store.submit(new_job(steps=1))
        until(lambda: "recycled" in str(front.store.counters.all().get("chitu_worker_starts_total")))
    found = scraped(front)
    assert value(found, "chitu_worker_starts_total", reason="recycled") == 1
    assert not any(name == "chitu_worker_deaths_total" for name, _ in found)
    front.store.close()
