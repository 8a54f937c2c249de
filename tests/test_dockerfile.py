"""The Dockerfile as far as it can be read without Docker; `make docker-steps` runs what can be run."""

from __future__ import annotations

import json
import subprocess
import tomllib
from pathlib import Path

import pytest
from dockerfile import ROOT, stages_of, variables_of

BUILD, LAST = stages_of((ROOT / "Dockerfile").read_text(encoding="utf-8"))


def test_what_is_copied_is_there_and_let_through() -> None:
    ignore = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    through = {line.removeprefix("!") for line in ignore if line.startswith("!")}
    copied = {source for line in BUILD.all("COPY") for source in line.split()[:-1]}
    assert copied == through
    assert all((ROOT / source).exists() for source in copied)
    (line,) = LAST.all("COPY")
    assert line.startswith(f"--from={BUILD.name} ")


def test_what_the_build_reads_is_copied() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    copied = {source for line in BUILD.all("COPY") for source in line.split()[:-1]}
    assert {"pyproject.toml", "setup.py", "README.md", "chitu_diffusion", *project["license-files"]} <= copied


def test_it_runs_chitu_as_a_user_with_a_cache_of_its_own() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (entry,) = LAST.all("ENTRYPOINT")
    assert json.loads(entry)[0] in project["scripts"]
    (user,) = LAST.all("USER")
    assert user not in ("root", "0")
    assert any(f"--create-home {user}" in line for line in LAST.all("RUN"))
    (cache,) = LAST.all("VOLUME")
    values = variables_of(LAST)
    assert all(values[name].startswith(cache) for name in ("HF_HOME", "XDG_CACHE_HOME", "TRITON_CACHE_DIR"))


@pytest.mark.parametrize("stage", [BUILD, LAST], ids=["build", "last"])
def test_its_shell_parses(stage: object) -> None:
    assert isinstance(stage, type(BUILD))
    for line in stage.all("RUN"):
        subprocess.run(["sh", "-n", "-c", line], check=True)


def test_another_build_of_torch_is_refused_in_words(tmp_path: Path) -> None:
    (line,) = (line for line in BUILD.all("RUN") if "index" in line)
    done = subprocess.run(
        ["sh", "-c", line], env={"TORCH": "rocm"}, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (1, "TORCH=rocm: use cpu or cuda\n")
    assert variables_of(BUILD)["TORCH"] == variables_of(LAST)["TORCH"] == "cpu"
