"""What cannot be printed is lost; the video is not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FULL = Path("/dev/full")
ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not FULL.exists(), reason="no device that is always full")


def run(words: list[str], folder: Path, **streams: object) -> subprocess.CompletedProcess[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "chitu_diffusion", *words]
    return subprocess.run(command, cwd=folder, env=environment, check=False, **streams)


@pytest.mark.parametrize("more", [[], ["--json"]])
def test_a_video_counts_though_nothing_can_be_printed(
    tmp_path: Path, tiny_folder: Path, more: list[str]
) -> None:
    (tmp_path / "p.txt").write_text("a cat\n")
    words = ["batch", "p.txt", "-o", "out", "--model", str(tiny_folder), "--steps", "1", *more]
    with FULL.open("wb") as full:
        done = run(words, tmp_path, stdout=full, stderr=full)
    assert done.returncode == 0
    assert [name[-4:] for name in os.listdir(tmp_path / "out")] == [".mp4"]


def test_an_answer_that_is_lost_is_a_failure(tmp_path: Path) -> None:
    with FULL.open("wb") as full:
        done = run(["config", "show"], tmp_path, stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 1
    assert b"stdout cannot be written to: No space left on device" in done.stderr
    assert b"Traceback" not in done.stderr and b"Exception" not in done.stderr
