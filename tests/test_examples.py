"""The programs in `examples/`, run as a newcomer runs them."""

from __future__ import annotations

import os
import runpy
import signal
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from ranks import CONTEXT

from chitu_diffusion.media.reading import read_frames

EXAMPLES = Path(__file__).parent.parent / "examples"


def start(name: str, *words: str, folder: Path) -> BaseProcess:
    process = CONTEXT.Process(target=example, args=(name, words, str(folder)))
    process.start()
    return process


def run(name: str, *words: str, folder: Path) -> str:
    process = start(name, *words, folder=folder)
    process.join(300)
    assert process.exitcode == 0, (folder / "err").read_text()
    return (folder / "out").read_text()


def example(name: str, words: tuple[str, ...], folder: str) -> None:
    """`python examples/NAME WORDS` in a folder, in a process that has imported the engine already."""
    os.chdir(folder)
    os.environ["CHITU_CACHE_DIR"] = str(Path("cache").absolute())
    torch.set_num_threads(1)
    sys.argv = [name, *words]
    with Path("out").open("w", buffering=1) as sys.stdout, Path("err").open("w") as sys.stderr:
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")


@pytest.mark.parametrize(
    ("name", "after"),
    [("text_to_video.py", "denoising"), ("batch.py", "refused"), ("step_caches.py", "no cache")],
)
def test_ctrl_c_ends_in_words(tmp_path: Path, name: str, after: str) -> None:
    process = start(name, folder=tmp_path)
    deadline = time.monotonic() + 120
    while not ((tmp_path / "out").exists() and f"\n{after}" in "\n" + (tmp_path / "out").read_text()):
        assert process.is_alive() and time.monotonic() < deadline
        time.sleep(0.02)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGINT)
    process.join(60)
    told = (tmp_path / "err").read_text()
    assert process.exitcode == 130, told
    assert "interrupted; the same command" in told and "Traceback" not in told


def test_every_example_is_run_here() -> None:
    tested = {"text_to_video.py", "batch.py", "step_caches.py"}
    assert {file.name for file in EXAMPLES.glob("*.py")} == tested


def test_text_to_video(tmp_path: Path) -> None:
    told = run("text_to_video.py", "a blue bird flying upward", "bird.mp4", folder=tmp_path)
    assert "denoising: step 20 of 20" in told
    frames = read_frames(tmp_path / "bird.mp4")
    assert frames.shape == (17, 128, 128, 3)
    assert frames.std() > 10


@pytest.fixture(scope="module")
def batch(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("batch")
    return folder, run("batch.py", "videos", folder=folder)


def test_batch_makes_all_and_refuses_one(batch: tuple[Path, str]) -> None:
    folder, told = batch
    assert "refused: num_frames" in told or "refused: frames" in told
    assert {file.name for file in (folder / "videos").iterdir()} == {"rabbit.mp4", "fish.mp4", "robot.mp4"}
    assert told.count("finished") == 3


def test_a_second_batch_has_nothing_left_to_do(batch: tuple[Path, str]) -> None:
    folder, _ = batch
    made = {file: file.stat().st_mtime_ns for file in (folder / "videos").iterdir()}
    told = run("batch.py", "videos", folder=folder)
    assert "finished" not in told
    assert made == {file: file.stat().st_mtime_ns for file in (folder / "videos").iterdir()}


def test_step_caches(tmp_path: Path) -> None:
    told = run("step_caches.py", folder=tmp_path)
    lines = dict(line.split(": ") for line in told.splitlines())
    assert "inf dB" in lines["no cache"]
    plan = lines["a calibrated plan, half of the steps"]
    assert float(plan.split(", ")[1].split()[0]) > 30
