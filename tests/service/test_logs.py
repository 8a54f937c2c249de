"""Logs of front, supervisor and worker: as text or JSON, each line with the ids of what it is about."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
from fronts import client_of, make_front
from supervising import new_job, settings_of, supervised, until

from chitu_diffusion.service.logs import LogFormatter, logged_about, logs_to_stderr
from chitu_diffusion.service.settings import LogSettings
from chitu_diffusion.service.store import open_store


def lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().err.splitlines() if line.startswith("{")]


def test_a_line_has_time_level_message_ids_and_the_error() -> None:
    def formatted(as_json: bool) -> str:
        try:
            raise ValueError("é\nb")
        except ValueError:
            record = logging.LogRecord("a.b", 30, "f", 1, "said %d\nthings", (2,), sys.exc_info())
        record.created = 1.0005
        formatter = LogFormatter(as_json=as_json, process={"worker": "w0"})
        with logged_about(job="video_1"), logged_about(request=None, job="video_2"):
            return formatter.format(record)

    text = formatted(True)
    assert "\n" not in text
    found = json.loads(text)
    assert found.pop("error").endswith("ValueError: é\nb")
    assert found == {
        "time": "1970-01-01T00:00:01.000Z", "level": "warning", "logger": "a.b", "message": "said 2\nthings",
        "worker": "w0", "job": "video_2",
    }  # fmt: skip
    assert formatted(False).startswith(
        "1970-01-01T00:00:01.000Z WARNING said 2\nthings worker=w0 job=video_2\n"
    )


def test_supervisor_s_lines_name_worker_and_job(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = settings_of(tmp_path, logs={"format": "json", "level": "info"})
    store = open_store(settings.store_url())
    with logs_to_stderr(settings.logs), supervised(settings, store):
        job = store.submit(new_job(kill_at=2, steps=3)).job.id
        until(lambda: store.job(job).state.ended)
    store.close()
    said = lines(capsys)
    (worker,) = {line["worker"] for line in said if "worker" in line}
    about = [line["message"] for line in said if line.get("job") == job]
    assert "claimed, attempt 2" in about and "job completed" in about
    assert any(f"worker {worker} ended: SIGKILL" in line["message"] for line in said)


def test_front_s_lines_name_the_request_which_the_answer_names_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    front = make_front(tmp_path)
    client = client_of(front)
    with logs_to_stderr(LogSettings(format="json", level="info")):
        answer = client.post("/v1/videos", json={"prompt": "a secret cat"})
        job = answer.json()["id"]
        client.get(f"/v1/videos/{job}", headers={"x-request-id": "mine"})
        client.get("/v1/videos/%0A%22x")
    front.store.close()
    made, asked, odd = (line for line in lines(capsys) if line["logger"].endswith("limits"))
    assert made["request"] == answer.headers["x-request-id"] and re.fullmatch("[0-9a-f]{16}", made["request"])
    assert re.fullmatch(r"GET /v1/videos/\{video_id\}: 200 in \d\.\d+ s", asked["message"])
    assert asked["job"] == job and asked["request"] != made["request"] and "job" not in odd
    assert "secret" not in str((made, asked, odd))


def test_a_front_is_told_by_settings_how_to_log(tmp_path: Path) -> None:
    words = ["serve", "--workers", "none", "--port", "0", "--data", str(tmp_path)]
    environment = {"CHITU_SERVICE__LOGS__FORMAT": "json", "CHITU_SERVICE__LOGS__LEVEL": "info"}
    process = subprocess.Popen(
        [sys.executable, "-m", "chitu_diffusion", *words], stderr=subprocess.PIPE, text=True,
        env={**os.environ, **environment},
    )  # fmt: skip
    try:
        assert process.stderr is not None
        url = re.search(r"http://\S+", process.stderr.readline())
        assert url is not None
        identity = httpx.get(f"{url[0]}/health", timeout=10).headers["x-request-id"]
        process.send_signal(signal.SIGTERM)
        said = [json.loads(line) for line in process.stderr.read().splitlines()]
        assert process.wait(10) == 0
    finally:
        process.kill()
        process.wait()
    assert [line["message"][:18] for line in said if line.get("request") == identity] == [
        "GET /health: 200 i"
    ]
