"""`chitu serve` and `chitu keys` as a person gives them: start, stop, addresses, keys, settings."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from chitu_diffusion.cli.app import run
from chitu_diffusion.errors import UsageError
from chitu_diffusion.service.settings import load_service

MOST_CPU_S = 3.0
"""Of a front, from nothing to its first answer: 1.3 s, and twice that where its cores are shared."""


@contextmanager
def served(data: Path, *words: object) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A front without workers, and its URL."""
    command = [sys.executable, "-m", "chitu_diffusion", "serve", "--workers", "none", "--port", "0"]
    process = subprocess.Popen(
        [*command, "--data", str(data), *map(str, words)], stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stderr is not None
        found = re.search(r"http://\S+", process.stderr.readline())
        assert found is not None
        yield process, found[0]
    finally:
        process.kill()
        process.wait()


def test_it_starts_soon_answers_and_ends_in_order(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("ck_abc_0123456789abcdefghijklmn\n")
    with served(tmp_path, "--key-file", keys) as (process, url):
        answer = httpx.get(f"{url}/health", timeout=10)
        assert answer.status_code == 200
        spent = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        assert sum(map(int, spent[11:13])) / os.sysconf("SC_CLK_TCK") < MOST_CPU_S
        assert httpx.get(f"{url}/v1/videos").status_code == 401
        key = {"authorization": f"Bearer {keys.read_text().strip()}"}
        video = httpx.post(f"{url}/v1/videos", json={"prompt": "a ball"}, headers=key).json()["id"]
        with httpx.stream("GET", f"{url}/v1/videos/{video}/events", headers=key, timeout=10) as stream:
            lines = stream.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            began = time.monotonic()
            list(lines)
        assert process.wait(10) == 0 and time.monotonic() - began < 5
    with served(tmp_path) as (_, url):
        assert httpx.get(f"{url}/v1/videos/{video}", headers=key).json()["status"] == "queued"
        assert httpx.get(f"{url}/health", headers={"x": "y" * 20000}).status_code in (400, 431)


def test_keys_are_shown_once_listed_and_revoked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = ["--data", str(tmp_path)]
    assert run(["keys", "add", "phone", "--owner", "ann", "--scopes", "read", *data]) == 0
    key = capsys.readouterr().out.strip()
    assert re.fullmatch(r"ck_[0-9a-f]{12}_[\w-]{43}", key)
    assert run(["keys", "list", "--json", *data]) == 0
    (listed,) = json.loads(capsys.readouterr().out)
    assert (listed["owner"], listed["scopes"], listed["revoked"]) == ("ann", "read", False)
    assert key.split("_", 2)[2] not in (tmp_path / "chitu.db").read_bytes().decode("latin1")
    assert run(["keys", "revoke", listed["id"], *data]) == 0
    assert run(["keys", "revoke", "nobody", *data]) == 2
    assert run(["keys", "add", "x", "--scopes", "write", *data]) == 2
    capsys.readouterr()
    assert run(["keys", "list", *data]) == 0 and "True" in capsys.readouterr().out


def test_addresses_that_others_reach_need_a_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["serve", "--host", "0.0.0.0", "--port", "0", "--data", str(tmp_path)]) == 2
    assert "chitu keys add" in capsys.readouterr().err
    with served(tmp_path) as (_, url):
        port = url.rpartition(":")[2]
        assert run(["serve", "--port", port, "--workers", "none", "--data", str(tmp_path)]) == 2
        assert "another --port" in capsys.readouterr().err


def test_settings_of_the_service_beside_the_engine_s(tmp_path: Path) -> None:
    from chitu_diffusion.config import load_config

    file = tmp_path / "chitu.toml"
    file.write_text("[service]\nport = 9\n[service.queue]\nmax = 5\n[infer]\nthreads = 1\n")
    environment = {"CHITU_SERVICE__QUEUE__MAX": "7", "CHITU_SERVICE__STORE": "none"}
    service, engine = load_service(file, {"service.port": 10}, environment)
    assert (service.port, service.queue.max, service.store, engine.infer.threads) == (10, 7, None, 1)
    config, origins = load_config(file, None, environment)
    assert config.infer.threads == 1 and not any(name.startswith("service") for name in origins)
    assert load_service(None, {"service.data": "~/jobs"}, {"HOME": "/none"})[0].store_url() == (
        f"sqlite:///{Path.home()}/jobs/chitu.db"
    )
    with pytest.raises(UsageError, match=r"service.prt.*'port'"):
        load_service(None, {"service.prt": 1}, {})
    with pytest.raises(UsageError, match="CHITU_SERVICE__PRT"):
        load_service(None, None, {"CHITU_SERVICE__PRT": "1"})


def test_a_supervisor_that_cannot_go_on_ends_the_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fronts import make_front

    from chitu_diffusion.service import supervisor
    from chitu_diffusion.service.serving import serve

    def run_and_fail(*_: object, **__: object) -> None:
        time.sleep(0.3)
        raise RuntimeError("no forkserver")

    monkeypatch.setattr(supervisor, "run", run_and_fail)
    front = make_front(tmp_path)
    with pytest.raises(RuntimeError, match="no forkserver"):
        serve(front, front.planner.engine, on_bound=lambda _: None)
    assert front.draining.is_set()
