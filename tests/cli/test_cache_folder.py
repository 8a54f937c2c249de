"""The cache folder is a memory and nothing more: whatever lies in it, and whoever else writes there, videos
are made, and are the same.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Chitu

ROOT = Path(__file__).parents[2]
WORDS = ("generate", "a cat", "--seed", "1", "--size", "32x32", "--frames", "5", "--steps", "2")


def _fifo(file: Path) -> None:
    os.mkfifo(file)


def _looped(file: Path) -> None:
    file.symlink_to(file.name)


SPOILT: dict[str, Callable[[Path], object]] = {
    "brackets": lambda file: file.write_text("[" * 1_000_000),
    "bytes": lambda file: file.write_bytes(bytes(range(256)) * 40),
    "empty": lambda file: file.write_bytes(b""),
    "wrong": lambda file: file.write_text(
        json.dumps({"format": 10**300, "files": [None], "a": {"b": "\x1b[31m"}})
    ),
    "folder": lambda file: file.mkdir(),
    "pipe": _fifo,
    "loop": _looped,
}


def files_in(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file() and file.suffix != ".lock")


@pytest.fixture
def model(tiny_folder: Path, tmp_path: Path) -> Path:
    """One that cannot be written into, so that its manifest goes into the cache."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    (folder / "manifest.json").unlink(missing_ok=True)
    (folder / "manifest.json").write_text('{"of": "somebody else"}')
    return folder


@pytest.mark.parametrize("how", SPOILT)
def test_no_file_of_the_cache_stops_a_video(
    how: str, chitu: Chitu, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setenv("CHITU_CACHE_DIR", str(cache))
    words = (*WORDS, "--model", model, "--overwrite", "--set", "checkpoint.every_s=0")
    assert chitu(*words, "-o", "a.npy")[0] == 0
    files = files_in(cache)
    assert {file.name for file in files} >= {"weights-sha256.json", "paces.json"}, files
    for file in files:
        file.unlink()
        SPOILT[how](file)
    code, _, err = chitu(*words, "-o", "b.npy")
    assert code == 0 and "Traceback" not in err and "unexpected" not in err, err
    assert Path("a.npy").read_bytes() == Path("b.npy").read_bytes()


def test_two_processes_share_one_cache(model: Path, tmp_path: Path) -> None:
    """Both end well, and each file is whole after them."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CHITU_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "chitu_diffusion", *WORDS, "--model", str(model)]
    runs = [
        subprocess.Popen(
            [*command, "-o", f"{name}.npy"], cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True
        )
        for name in "ab"
    ]
    for run in runs:
        said = run.communicate(timeout=120)[1]
        assert run.returncode == 0 and "warning" not in said.lower(), said
    assert (tmp_path / "a.npy").read_bytes() == (tmp_path / "b.npy").read_bytes()
    files = [file for file in files_in(tmp_path / "cache") if file.suffix == ".json"]
    assert len(files) >= 2
    for file in files:
        json.loads(file.read_text(encoding="utf-8"))
    assert not [file for file in files_in(tmp_path / "cache") if ".part" in file.name]
