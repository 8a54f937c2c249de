"""`chitu generate --gpus N`: the launcher, one file, one voice; and layouts that are refused before anything starts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from conftest import Chitu
from tiny_model import write_tiny_model

from chitu_diffusion.cli.launch import without_gpus


def test_two_workers_make_one_video(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "tiny")
    words = ["generate", "A cat walking on grass", "--model", str(model), "--gpus", "2", "--parallel", "u2", "--seed", "1"]
    command = [sys.executable, "-m", "chitu_diffusion", *words, "--device", "cpu", "-o", "cat.npy"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "cat.npy\n"), done.stderr
    assert done.stderr.count("done in") == 1
    assert (tmp_path / "cat.npy").exists()


def test_a_layout_that_cannot_be_is_refused_at_once(chitu: Chitu, tiny_folder: Path, nothing_loads: None) -> None:
    code, _, err = chitu("generate", "a cat", "--model", tiny_folder, "--gpus", "4", "--parallel", "u4")
    assert code == 2 and "ulysses 2 x ring 2 would do" in err
    code, _, err = chitu("generate", "a cat", "--model", tiny_folder, "--parallel", "both")
    assert code == 2 and "cfg2u2r2" in err


def test_workers_get_the_same_words() -> None:
    assert without_gpus(["generate", "cat", "--gpus", "2", "--gpus=3", "-o", "x.mp4"]) == ["generate", "cat", "-o", "x.mp4"]
