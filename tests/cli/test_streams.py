"""What cannot be printed is lost, or spelt out; the video is not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FULL = Path("/dev/full")
ROOT = Path(__file__).parents[2]
CAT = "a 猫 🐱"
needs_full = pytest.mark.skipif(not FULL.exists(), reason="no device that is always full")


def run(words: list[str], folder: Path, **options: object) -> subprocess.CompletedProcess[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **options.pop("env", {})}
    command = [sys.executable, "-m", "chitu_diffusion", *words]
    return subprocess.run(command, cwd=folder, env=environment, check=False, **options)


@needs_full
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


@needs_full
def test_an_answer_that_is_lost_is_a_failure(tmp_path: Path) -> None:
    with FULL.open("wb") as full:
        done = run(["config", "show"], tmp_path, stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 1
    assert b"stdout cannot be written to: No space left on device" in done.stderr
    assert b"Traceback" not in done.stderr and b"Exception" not in done.stderr


@pytest.mark.parametrize("gone", ["stdout", "stderr"])
def test_a_reader_that_went_stops_no_video(tmp_path: Path, tiny_folder: Path, gone: str) -> None:
    """As `| head -1`, at the worst moment: before the first line."""
    reading, writing = os.pipe()
    os.close(reading)
    words = ["generate", "a cat", "--model", str(tiny_folder), "--steps", "1", "--seed", "1..2", "--json"]
    try:
        done = run([*words, "-o", "v.npy"], tmp_path, **{gone: writing})
    finally:
        os.close(writing)
    assert done.returncode == 0
    assert {"v-seed1.npy", "v-seed2.npy"} <= set(os.listdir(tmp_path))


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&- <&-"])
def test_a_closed_stream_stops_no_video(tmp_path: Path, tiny_folder: Path, closed: str) -> None:
    words = f"generate cat --model {tiny_folder} --steps 1 -o v.npy"
    shell = ["sh", "-c", f"{sys.executable} -m chitu_diffusion {words} {closed}"]
    done = subprocess.run(shell, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False)
    assert done.returncode == 0
    assert (tmp_path / "v.npy").exists()


C_LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
PLACES = [
    C_LOCALE,
    {"LC_ALL": "POSIX"},
    *({"PYTHONIOENCODING": name} for name in ("cp1252", "ascii", "utf-16-le")),
]


@pytest.mark.parametrize("place", PLACES, ids=lambda place: " ".join(map("=".join, place.items())))
def test_what_can_be_printed_is(tmp_path: Path, tiny_folder: Path, place: dict[str, str]) -> None:
    """A prompt, a file's name and a recipe with signs that the terminal has no bytes for."""
    words = ["generate", CAT, "--negative-prompt", "été", "--model", str(tiny_folder), "--steps", "1"]
    name = CAT if place is not C_LOCALE else "v"
    made = run([*words, "-o", f"{name}.mp4"], tmp_path, env=place, capture_output=True)
    assert made.returncode == 0, made.stderr
    recipe = run(["info", f"{name}.mp4"], tmp_path, env=place, capture_output=True)
    assert recipe.returncode == 0, recipe.stderr
    # each of these encodings has "a"; the others are there, or spelt
    encoding = place.get("PYTHONIOENCODING", "utf-8")
    assert any(sign in recipe.stdout for sign in ("猫".encode(encoding, "backslashreplace"), b"\\u732b"))
    said = json.loads(run(["info", f"{name}.mp4", "--json"], tmp_path, capture_output=True).stdout)
    assert (said["prompt"], said["params"]["negative_prompt"]) == (CAT, "été")


def test_a_name_that_is_no_text_is_printed_as_its_bytes(tmp_path: Path, tiny_folder: Path) -> None:
    name = os.fsdecode(b"caf\xe9.npy")
    words = ["generate", "cat", "--model", str(tiny_folder), "--steps", "1", "-o", name]
    done = run(words, tmp_path, capture_output=True)
    assert (done.returncode, done.stdout) == (0, b"caf\xe9.npy\n")
    assert b"caf\xe9.npy" in os.listdir(os.fsencode(tmp_path))
