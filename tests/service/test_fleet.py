"""A fleet on a real Ray of several nodes, with PostgreSQL; without Ray its plan, agents and refusals."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import grimp
import psutil
import pytest
from job_stores import MISSING, make_database, migrate
from supervising import until

from chitu_diffusion.cli.app import run
from chitu_diffusion.service.fleet import FleetNode, FleetSpec, WorkerAgent, plan
from chitu_diffusion.service.jobs import JobState, NewJob
from chitu_diffusion.service.store import JobStore, open_store

SPEC = FleetSpec("wan-tiny", "/data", "/secret", None, 0, 1)
STEPS = 60
ASKED = {"prompt": "a red cube", "height": 64, "width": 64, "num_frames": 17, "num_inference_steps": STEPS}
CONFIG = """
[infer]
device = "cpu"
dtype = "float32"
threads = 1
[checkpoint]
every_s = 0.0
[service]
lease_s = 3.0
beat_s = 0.3
"""

QUICK = {"RAY_NUM_REDIS_GET_RETRIES": "1"}


def test_where_workers_have_room() -> None:
    big = FleetNode("a", "a", 16, 4)
    small = FleetNode("b", "b", 2, 8)
    head = FleetNode("c", "c", 0, 0)
    assert plan([big, small, head], 5, 1, 1) == ({"a": 4, "b": 1, "c": 0}, 0)
    assert plan([big, small, head], 9, 2, 1) == ({"a": 2, "b": 2, "c": 0}, 5)
    assert plan([big, small], 3, 0, 8) == ({"a": 2, "b": 0}, 1)
    assert plan([], 2, 1, 1) == ({}, 2)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["up"], "--workers"),
        (["up", "--workers", "0"], "greater than or equal to 1"),
        (["up", "--workers", "1"], "use --store-file FILE"),
        (["up", "--workers", "1", "--store-file", "missing"], "No such file"),
        (["up", "--workers", "1", "--store-file", "empty"], "it is empty"),
        (["up", "--workers", "1", "--store-file", "sqlite"], "a fleet needs PostgreSQL"),
        (["scale", "--", "-1"], "greater than or equal to 0"),
    ],
)
def test_what_no_fleet_can_be_made_of(
    words: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").write_text("\n")
    Path("sqlite").write_text("sqlite:///x.db")
    assert run(["fleet", *words]) == 2
    assert said in capsys.readouterr().err


def test_the_url_goes_by_the_name_of_its_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = SPEC.words()
    assert words[words.index("--store-file") + 1] == "/secret" and "--config" not in words
    url = tmp_path / "url"
    url.write_text("sqlite:///x.db\n")
    assert run(["worker", "--store-file", str(url), "--store", "sqlite:///y.db"]) == 2
    assert "use one" in capsys.readouterr().err


def test_an_agent_starts_its_worker_again_and_ends_it() -> None:
    last_words = "import sys; print('no database', file=sys.stderr); sys.exit(2)"
    agent = WorkerAgent(SPEC, [sys.executable, "-c", last_words])
    until(lambda: agent._starts == 2 and agent._process and agent._process.poll() == 2)
    agent.stop(5)
    assert agent._starts == 2
    assert agent._ended == "exit 2: no database"
    deaf = "import signal, time; signal.signal(15, signal.SIG_IGN); print('', file=__import__('sys').stderr)"
    agent = WorkerAgent(SPEC, [sys.executable, "-c", f"{deaf}; time.sleep(60)"])
    until(lambda: agent._process)
    time.sleep(0.5)
    began = time.monotonic()
    agent.stop(0.2)
    assert agent._ended.startswith("exit -") and time.monotonic() - began < 5 and agent._starts == 1


def test_only_the_fleet_knows_ray_and_nothing_but_its_command_knows_the_fleet() -> None:
    graph = grimp.build_graph("chitu_diffusion", include_external_packages=True, cache_dir=None)
    assert graph.find_modules_that_directly_import("ray") == {"chitu_diffusion.service.fleet"}
    assert graph.find_modules_that_directly_import("chitu_diffusion.service.fleet") == {
        "chitu_diffusion.cli.fleet"
    }


def fleet(*words: str, code: int = 0, **variables: str) -> str:
    """What the command says, on both streams."""
    done = subprocess.run(
        [sys.executable, "-m", "chitu_diffusion", "fleet", *words],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**os.environ, **variables},
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def submit(store: JobStore) -> str:
    return store.submit(NewJob("ann", "wan-tiny", {}, ASKED, "hash", seed=3)).job.id


def ready(store: JobStore, number: int) -> None:
    """So many workers have been heard of within two seconds, their model loaded."""

    def they_are() -> bool:
        rows = [row for row in store.workers.all() if row.state in ("ready", "busy")]
        return sum(store.now() - row.seen_at < 2 for row in rows) == number

    until(they_are, 90)


def kill_node_of(pid: int) -> None:
    """As if its machine lost power: all that its raylet started, and the raylet."""
    raylet = next(each for each in psutil.Process(pid).parents() if "raylet" in each.name())
    for process in [raylet, *raylet.children(recursive=True)]:
        if process.is_running():
            os.kill(process.pid, signal.SIGKILL)


def ask_for_token(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's variables, for this process and all that it starts."""
    token = folder / "token"
    token.write_text(secrets.token_hex(32))
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    monkeypatch.setenv("RAY_TMPDIR", tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # a socket's path is short


def test_a_fleet_outlives_a_node(
    tmp_path: Path, postgres: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from test_worker import video_of

    if postgres is None:
        pytest.skip(MISSING)
    ask_for_token(tmp_path, monkeypatch)
    from ray import cluster_utils  # which reads the variables

    url = make_database(postgres, f"t{secrets.token_hex(4)}")
    migrate(url)
    (tmp_path / "url").write_text(url)
    (tmp_path / "config.toml").write_text(CONFIG)
    store = open_store(url)
    cluster = cluster_utils.Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "num_gpus": 0, "include_dashboard": False}
    )
    try:
        for _ in range(2):
            cluster.add_node(num_cpus=1, num_gpus=0)
        at = ["--address", cluster.address]
        config = ["--config", str(tmp_path / "config.toml")]
        about = [*at, *config, "--data", str(tmp_path), "--store-file", str(tmp_path / "url")]
        (tmp_path / "wrong").write_text(secrets.token_hex(32))
        said = fleet("status", *at, code=2, RAY_AUTH_TOKEN_PATH=str(tmp_path / "wrong"), **QUICK)
        assert "refuses this machine's token" in said, said
        assert "1 worker without a place" in fleet("up", "--workers", "3", "--dry-run", *about)
        assert "1 worker started" in fleet("up", "--workers", "1", *about)
        assert "2 workers started" in fleet("scale", "2", *at, *config)
        ready(store, 2)
        whole = submit(store)
        until(lambda: store.job(whole).state.ended, 90)
        cut = submit(store)
        until(lambda: (saved := store.job(cut).checkpoint) and saved.step >= 5, 60)
        kill_node_of(next(row.pid for row in store.workers.all() if row.state == "busy"))
        killed = time.monotonic()
        until(lambda: store.job(cut).attempt == 2, 60)
        seconds = time.monotonic() - killed
        until(lambda: store.job(cut).state.ended, 90)
        assert [store.job(job).state for job in (whole, cut)] == [JobState.COMPLETED] * 2
        resumed = next(event.data for event in store.events(cut) if event.kind == "resumed")
        assert resumed["exact"] and resumed["from_step"] >= 5
        assert video_of(tmp_path, store, cut) == video_of(tmp_path, store, whole)
        assert seconds < 20, f"the other node went on after {seconds:.1f} s"
        cluster.add_node(num_cpus=1, num_gpus=0)
        ready(store, 2)  # Ray started it there, unasked
        parked = submit(store)
        until(lambda: (saved := store.job(parked).checkpoint) and saved.step >= 3, 60)
        assert "2 workers parked and ended" in fleet("drain", *at, *config)
        assert store.job(parked).state is JobState.QUEUED and store.job(parked).checkpoint
        assert "1 worker started" in fleet("up", "--workers", "1", *about)
        until(lambda: store.job(parked).state.ended, 90)
        assert video_of(tmp_path, store, parked) == video_of(tmp_path, store, whole)
        said = fleet("status", *at)
        assert "jobs: 3 completed" in said and "worker-0" in said and "versions: python" in said, said
        assert url not in said
        assert "1 worker ended" in fleet("down", *at)
        ready(store, 0)
    finally:
        store.close()
        cluster.shutdown()
        shutil.rmtree(os.environ["RAY_TMPDIR"], ignore_errors=True)
