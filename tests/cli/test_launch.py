"""`chitu generate --gpus N`: the launcher, one file, one voice; and layouts that are refused before anything
starts.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import Chitu
from listening import ports_of
from tiny_model import write_tiny_model

from benchmarks.faults import Lines, alive, fault, ranks_of, steps_of, waits_for
from chitu_diffusion.cli.launch import RankEnd, _serve, _signals, exit_code, without_gpus
from chitu_diffusion.distributed.stores import StoreServer
from chitu_diffusion.errors import RankLostError

ROOT = Path(__file__).parents[2]


def test_two_workers_make_one_video(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "tiny")
    words = [
        "generate",
        "A cat walking on grass",
        "--model",
        str(model),
        "--gpus",
        "2",
        "--parallel",
        "u2",
        "--seed",
        "1",
    ]
    command = [sys.executable, "-m", "chitu_diffusion", *words, "--device", "cpu", "-o", "cat.npy"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "cat.npy\n"), done.stderr
    assert done.stderr.count("done in") == 1
    assert (tmp_path / "cat.npy").exists()


SCRIPT = """
import json, sys
from pathlib import Path
from chitu_diffusion import (
    DiffusionTask, DiffusionTaskPool, DiffusionUserParams, EngineConfig, chitu_generate, chitu_init,
    chitu_start, chitu_terminate,
)
from chitu_diffusion.config import rank_place

folder, out = sys.argv[1:]
args = EngineConfig(models={"name": folder}, output={"dir": out}, infer={"device": "cpu", "threads": 1})
chitu_init(args)
chitu_start()
for seed in (1, 2):
    params = DiffusionUserParams(prompt="A cat walking on grass", num_inference_steps=2, seed=seed,
    task_id=f"cat-{seed}")
    DiffusionTaskPool.add(DiffusionTask.from_user_request(params))
turns = 0
while not DiffusionTaskPool.all_finished():
    chitu_generate()
    turns += 1
seen = [[task.task_id, str(task.status), task.current_step] for task in DiffusionTaskPool]
Path(out, f"{rank_place().rank}.json").write_text(json.dumps({"turns": turns, "tasks": seen}))
chitu_terminate()
"""


def test_the_page_loop_is_right_on_every_rank_under_torchrun(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "tiny")
    script = tmp_path / "loop.py"
    script.write_text(SCRIPT)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    paths = os.pathsep.join(path for path in (str(ROOT), os.environ.get("PYTHONPATH", "")) if path)
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*torchrun, str(script), str(model), str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    assert first["tasks"] == [["cat-1", "finished", 2], ["cat-2", "finished", 2]]
    assert sorted(file.name for file in tmp_path.glob("*.mp4")) == ["cat-1.mp4", "cat-2.mp4"]


def test_a_layout_that_cannot_be_is_refused_at_once(
    chitu: Chitu, tiny_folder: Path, nothing_loads: None
) -> None:
    code, _, err = chitu("generate", "a cat", "--model", tiny_folder, "--gpus", "4", "--parallel", "u4")
    assert code == 2 and "use ulysses 2 x ring 2" in err
    code, _, err = chitu("generate", "a cat", "--model", tiny_folder, "--parallel", "both")
    assert code == 2 and "cfg2u2r2" in err


def test_a_size_with_fewer_tokens_than_ranks_is_refused_at_once(
    chitu: Chitu, tiny_folder: Path, nothing_loads: None
) -> None:
    words = ("--model", tiny_folder, "--frames", 1, "--gpus", 2, "--dry-run")
    Path("p.txt").write_text("a cat\n")
    for command in (("generate", "a cat"), ("batch", "p.txt")):
        code, _, err = chitu(*command, *words, "--size", "16x16", "--parallel", "u2")
        assert code == 2 and "cannot be shared by 2 ranks; use 32x16 or larger" in err, err
        assert chitu(*command, *words, "--size", "32x16", "--parallel", "u2")[0] == 0
        code, _, err = chitu(*command, *words, "--size", "16x16")  # a branch each
        assert code == 0 and "ranks   2: cfg 2 x ulysses 1 x ring 1" in err


def test_workers_get_the_same_words() -> None:
    assert without_gpus(["generate", "cat", "--gpus", "2", "--gpus=3", "-o", "x.mp4"]) == [
        "generate",
        "cat",
        "-o",
        "x.mp4",
    ]


@pytest.mark.parametrize(("kind", "rank"), [("SIGKILL", 0), ("SIGKILL", 1), ("SIGTERM", 1)])
def test_the_command_says_what_became_of_a_rank(kind: str, rank: int, tmp_path: Path) -> None:
    """The launcher ends the other ranks at once when one has ended; they tell of it first."""
    found = fault("cpu", "u2", kind, rank, tmp_path)
    assert found["seconds"] is not None and found["seconds"] < 15, found
    assert found["left behind"] == []
    if kind == "SIGTERM":
        assert found["code"] == 130 and "interrupted" in found["said"][0]
    else:
        assert found["code"] == 1 and len(found["said"]) == 1, found
        assert f"rank {rank} of 2 (" in found["said"][0] and "is lost, last heard of in " in found["said"][0]
        assert "denoising, step" in found["said"][0]


@pytest.mark.parametrize(
    ("ends", "asked", "said"),
    [
        ({1: -9, 0: 130}, False, "rank 1 of 2 (process 71) was ended by SIGKILL"),
        ({1: -9, 0: -15}, False, "rank 1 of 2 (process 71) was ended by SIGKILL"),
        ({1: -9, 0: 1}, False, 1),
        ({0: 130, 1: 130}, False, 130),
        ({0: 130, 1: -9}, True, 130),
        ({0: 0, 1: 0}, True, 0),
    ],
)
def test_a_rank_that_was_ended_is_told_of_when_the_others_could_not(
    ends: dict[int, int], asked: bool, said: str | int
) -> None:
    """Before its first sign of life the others only know that they were to end, too."""
    found = {rank: RankEnd(70 + rank, code) for rank, code in ends.items()}
    if isinstance(said, int):
        assert exit_code(found, asked=asked) == said
        return
    with pytest.raises(RankLostError) as caught:
        exit_code(found, asked=asked)
    assert str(caught.value).startswith(said)


def test_ranks_that_end_at_once_get_no_signals() -> None:
    """Their numbers may be anybody's once they are buried."""
    processes = []
    for code in (3, 4):
        process = os.fork()
        if process == 0:
            os._exit(code)
        processes.append(process)
    time.sleep(0.2)
    left = list(processes)
    with _signals() as signals:
        ends, asked = _serve(StoreServer(), left, signals)
    assert [end.code for end in ends.values()] == [3, 4] and not asked and not left
    assert [end.process for end in ends.values()] == processes


def leftover(**more: str) -> dict[str, str]:
    return {"RANK": "0", "WORLD_SIZE": "2", **more}


UNSET = "'unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT'"
ONE_MACHINE = leftover(LOCAL_RANK="0", LOCAL_WORLD_SIZE="2")


@pytest.mark.parametrize(
    ("variables", "code", "said"),
    [
        (leftover(), 2, ("RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE = 0, 2, , :",)),
        (leftover(LOCAL_RANK="x", LOCAL_WORLD_SIZE="2"), 2, ("0, 2, x, 2:",)),
        (leftover(RANK="7", LOCAL_RANK="0", LOCAL_WORLD_SIZE="2"), 2, ("7, 2, 0, 2:",)),
        (ONE_MACHINE, 2, ("MASTER_ADDR and MASTER_PORT must say",)),
        (ONE_MACHINE | {"MASTER_ADDR": "localhost", "MASTER_PORT": "99999"}, 2, ("MASTER_PORT must say",)),
        (ONE_MACHINE | {"CHITU_RANKS_SOCKET": "77"}, 2, ("unset CHITU_RANKS_SOCKET",)),
        (ONE_MACHINE | {"MASTER_ADDR": "127.0.0.1"}, 1, ("has waited 0.5 s for rank 1 of 2",)),
        (
            ONE_MACHINE | {"RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1"},
            1,
            ("rank 1: ", "has waited 0.5 s for rank 0 of 2 at 127.0.0.1:"),
        ),
        (
            leftover(LOCAL_RANK="0", LOCAL_WORLD_SIZE="1", MASTER_ADDR="127.0.0.1"),
            2,
            ("need a secret", "CHITU_RANKS_SECRET_FILE=ranks.secret torchrun"),
        ),
    ],
    ids=str,
)
def test_variables_of_another_tool_are_named(
    variables: dict[str, str],
    code: int,
    said: tuple[str, ...],
    chitu: Chitu,
    tiny_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    if "MASTER_ADDR" in variables:
        variables = {"MASTER_PORT": str(port), **variables}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    words = ("generate", "a cat", "--model", tiny_folder, "--device", "cpu", "--set", "ranks.timeout=0.5")
    found, _, err = chitu(*words)
    assert found == code and "Traceback" not in err, err
    assert all(words in err for words in (*said, UNSET)), err


def test_a_mistake_is_told_by_a_process_that_nobody_launched(
    chitu: Chitu, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    code, _, err = chitu("generate", "a cat", "--frames", "6")
    assert code == 2 and "--frames" in err
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    assert chitu("generate", "a cat", "--frames", "6") == (2, "", "")


@pytest.mark.parametrize("kind", ["SIGTERM", "SIGINT", "SIGHUP", "SIGKILL"])
def test_ranks_end_with_their_launcher_and_listen_to_nobody_else(
    kind: str, tiny_folder: Path, tmp_path: Path
) -> None:
    words = ["generate", "a cat", "--model", str(tiny_folder), "--gpus", "2", "--parallel", "u2", "--json"]
    command = [
        sys.executable,
        "-m",
        "chitu_diffusion",
        *words,
        "--steps",
        "1000",
        "-o",
        str(tmp_path / "x.npy"),
    ]
    environment = {**os.environ, "CHITU_CACHE_DIR": str(tmp_path), "RANK": "3", "WORLD_SIZE": "9"}
    launcher = subprocess.Popen(
        [*command, "--device", "cpu"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    said = Lines(launcher.stdout)
    told = Lines(launcher.stderr)
    assert waits_for(lambda: any(steps_of(line) >= 2 for line in said.lines)), told.lines
    ranks = ranks_of(launcher.pid)
    assert sorted(ranks) == [0, 1]
    assert not ports_of([launcher.pid])
    ports = ports_of(ranks.values())
    assert {host for host, _ in ports} == {"127.0.0.1"}  # gloo's
    for rank in ranks.values():
        words_of = Path(f"/proc/{rank}/cmdline").read_bytes() + Path(f"/proc/{rank}/environ").read_bytes()
        assert b"SECRET" not in words_of
    began = time.monotonic()
    launcher.send_signal(getattr(signal, kind))
    assert waits_for(lambda: launcher.poll() is not None and not any(alive(rank) for rank in ranks.values()))
    assert time.monotonic() - began < 20
    if kind == "SIGKILL":
        assert waits_for(lambda: any("the launcher is lost" in line for line in said.lines + told.lines))
    else:
        assert launcher.returncode == 130
        assert waits_for(
            lambda: any('"saved"' in line or "saved" in line for line in said.lines + told.lines)
        )


def test_ranks_begin_anew_where_cuda_was_asked_before_the_fork(tiny_folder: Path, tmp_path: Path) -> None:
    text = (
        "import sys, torch\n"
        "torch.cuda._is_in_bad_fork = lambda: True\n"  # as torch says it in such a fork
        "from chitu_diffusion.cli.app import run\n"
        "sys.exit(run(sys.argv[1:]))\n"
    )
    words = [
        "generate",
        "a cat",
        "--model",
        str(tiny_folder),
        "--gpus",
        "2",
        "--steps",
        "1",
        "--device",
        "cpu",
    ]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", "")))}
    done = subprocess.run(
        [sys.executable, "-c", text, *words, "-o", str(tmp_path / "cat.npy")],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
    )
    assert done.returncode == 0 and (tmp_path / "cat.npy").exists(), done.stderr
