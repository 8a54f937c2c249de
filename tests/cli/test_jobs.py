"""`chitu jobs` and `chitu worker` on a store of their own."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from chitu_diffusion.service.job_log import logged
from chitu_diffusion.service.jobs import JobFailure, JobProgress, NewJob, WorkerInfo
from chitu_diffusion.service.store import open_store


def test_jobs_are_listed_shown_explained_and_cancelled(chitu, tmp_path: Path) -> None:
    Path("chitu-data").mkdir()
    store = open_store("sqlite:///chitu-data/chitu.db")
    waits = store.submit(NewJob("ann", "wan-tiny", {"prompt": "x"}, {"steps": 8}, "hash")).job.id
    failed = store.submit(NewJob("bob", "wan-tiny", {}, {}, "hash2", priority=1)).job.id
    claimed = store.leases.claim("w", ["wan-tiny"])
    assert claimed is not None and claimed.job.id == failed
    store.leases.fail(claimed.lease, JobFailure("non_finite", "NaN appeared", next="try another seed"))
    rows = json.loads(chitu("jobs", "ls", "--json")[1])
    assert [row["id"] for row in rows] == [failed, waits]
    assert waits in chitu("jobs", "ls", "--state", "queued")[1]
    assert chitu("jobs", "ls", "--state", "sleeping")[0] == 2
    shown = json.loads(chitu("jobs", "show", failed, "--json")[1])
    assert [event["kind"] for event in shown["happened"]] == ["queued", "started", "failed"]
    assert "NaN appeared" in chitu("jobs", "show", failed)[1]
    why = chitu("jobs", "why", failed)[1]
    assert "NaN appeared (non_finite)" in why and "try another seed" in why
    assert "no worker serves wan-tiny" in chitu("jobs", "why", waits)[1]
    store.workers.put(WorkerInfo("x", "host", 1, "wan2.1-t2v-14b", "ready"))
    assert "those here serve wan2.1-t2v-14b" in chitu("jobs", "why", waits)[1]
    store.workers.put(WorkerInfo("y", "host", 2, "wan-tiny", "starting"))
    store.workers.put(WorkerInfo("z", "host", 3, "wan-tiny", "busy", weights_sha256="ab"))
    loads = chitu("jobs", "why", waits)[1]
    assert "1 busy" in loads and "1 worker of them still loads the model" in loads and "differ" not in loads
    store.workers.put(WorkerInfo("y", "host", 2, "wan-tiny", "busy", weights_sha256="cd"))
    assert "their weights differ (ab, cd)" in chitu("jobs", "why", waits)[1]
    assert chitu("jobs", "cancel", waits)[0] == 0 and store.job(waits).state == "cancelled"
    assert chitu("jobs", "cancel", "video_none")[0] == 1
    store.close()


def test_a_job_s_events_and_its_workers_lines_are_told_in_order(
    chitu, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Path("chitu-data").mkdir()
    store = open_store("sqlite:///chitu-data/chitu.db")
    job = store.submit(NewJob("ann", "wan-tiny", {}, {}, "hash")).job.id
    claimed = store.leases.claim("w", ["wan-tiny"])
    assert claimed is not None
    log = logging.getLogger("chitu_diffusion.somewhere")
    with logged(job, 1, "chitu-data"):
        try:
            raise ValueError("a \x1b[31mcause")
        except ValueError:
            log.debug("it broke", exc_info=True)
        log.warning("slow")
    log.debug("of no job")
    with Path("chitu-data", "jobs", job, "log-1.jsonl").open("a", encoding="utf-8") as half:
        half.write('{"at": 1')
    store.leases.event(claimed.lease, "note", {"message": "slow"})
    told = [json.loads(line) for line in chitu("jobs", "logs", job, "--json")[1].splitlines()]
    kinds = [(line["source"], line["kind"]) for line in told]
    service = "service"
    assert kinds == [
        (service, "queued"),
        (service, "started"),
        ("attempt 1", "debug"),
        ("attempt 1", "warning"),
        (service, "note"),
    ]
    assert caplog.messages == ["slow"], "elsewhere details are no more than before"
    assert told[2]["text"].startswith("it broke\nTraceback")
    shown = chitu("jobs", "logs", job)[1]
    assert "ValueError: a  [31mcause" in shown and "message slow" in shown and "of no job" not in shown

    def end() -> None:
        store.leases.event(claimed.lease, "note", {"message": "later"})
        store.leases.cancelled(claimed.lease)

    ending = threading.Timer(0.2, end)
    ending.start()
    followed = chitu("jobs", "logs", job, "--follow")[1].splitlines()
    assert followed[-1].split()[3] == "cancelled" and sum("later" in line for line in followed) == 1
    assert chitu("jobs", "logs", "../..")[0] == 1
    store.close()


def test_a_held_job_is_resumed(chitu, tmp_path: Path) -> None:
    Path("chitu-data").mkdir()
    store = open_store("sqlite:///chitu-data/chitu.db")
    job = store.submit(NewJob("ann", "wan-tiny", {}, {}, "hash")).job.id
    code, _, said = chitu("jobs", "resume", job)
    assert code == 1 and "only a held job" in said
    claimed = store.leases.claim("w", ["wan-tiny"])
    assert claimed is not None
    store.leases.event(claimed.lease, "step", progress=JobProgress(step=3))
    store.leases.hold(claimed.lease)
    assert "goes on from step 3" in chitu("jobs", "resume", job)[2] and store.job(job).state == "queued"
    store.cancel(job)
    assert "retry makes a new job" in chitu("jobs", "resume", job)[2]
    store.close()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_worker_runs_until_a_signal_and_exits_with_0(tmp_path: Path, number: signal.Signals) -> None:
    root = str(Path(__file__).parent.parent.parent)
    command = [sys.executable, "-m", "chitu_diffusion", "worker", "--data", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": root}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        alarm = threading.Timer(30, process.kill)
        alarm.start()
        assert process.stderr is not None and "running jobs of wan-tiny" in process.stderr.readline()
        process.send_signal(number)
        assert process.wait() == 0
        alarm.cancel()


def test_the_store_of_the_settings_is_migrated(
    chitu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CHITU_SERVICE__DATA", str(tmp_path / "elsewhere"))
    assert chitu("keys", "add", "ann")[0] == 0
    code, _, said = chitu("store", "migrate")
    assert code == 0 and "as before" in said
    assert [file.name for file in tmp_path.iterdir()] == ["elsewhere"]
    (tmp_path / "file").touch()
    code, _, said = chitu("keys", "add", "ann", "--data", tmp_path / "file" / "data")
    assert code == 2 and "use another folder" in said


@pytest.mark.parametrize("words", [("jobs", "ls"), ("jobs", "show", "video_0"), ("keys", "list")])
def test_a_wrong_folder_is_no_empty_store(chitu, words: tuple[str, ...], tmp_path: Path) -> None:
    wrong = tmp_path / "wrong"
    code, out, err = chitu(*words, "--data", str(wrong))
    assert code == 2 and f"there is no {wrong}" in out + err and not wrong.exists()


@pytest.mark.parametrize("words", [("",), (" ",), ("ann", "--scopes", ""), ("ann", "--scopes", ",")])
def test_a_key_of_nobody_or_for_nothing_is_refused(chitu, words: tuple[str, ...], tmp_path: Path) -> None:
    assert chitu("keys", "add", *words, "--data", str(tmp_path))[0] == 2
