"""`chitu generate --gpus N`: the launcher, one file, one voice; and layouts that are refused before anything
starts.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Chitu
from tiny_model import write_tiny_model

from benchmarks.faults import fault
from chitu_diffusion.cli.launch import RankEnd, exit_code, without_gpus
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
