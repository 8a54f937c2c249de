"""Reads the Dockerfile, and runs those of its steps that need neither Docker nor root nor its own index.

`python tests/dockerfile.py FOLDER` does the first stage in an empty folder, its absolute paths inside that
folder, and then runs the entry point as the last stage would. What it leaves out it names.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parent.parent
INDEX = re.compile(r"\$index\b")


@dataclass
class Stage:
    """One `FROM`: its name or number, and its (instruction, argument) pairs in order."""

    name: str
    steps: list[tuple[str, str]] = field(default_factory=list)

    def all(self, instruction: str) -> list[str]:
        return [argument for name, argument in self.steps if name == instruction]


def stages_of(text: str) -> list[Stage]:
    """The stages of a Dockerfile whose lines may end in a backslash and whose comments stand alone."""
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    stages: list[Stage] = []
    for line in re.sub(r"\\\n", "", "\n".join(lines)).splitlines():
        instruction, _, argument = line.partition(" ")
        if instruction == "FROM":
            _, _, name = argument.partition(" AS ")
            stages.append(Stage(name or str(len(stages))))
        stages[-1].steps.append((instruction, argument.strip()))
    return stages


def variables_of(stage: Stage) -> dict[str, str]:
    """What `ARG` and `ENV` set, with earlier ones filled in."""
    values: dict[str, str] = {}
    for argument in (words for name, words in stage.steps if name in ("ARG", "ENV")):
        for word in shlex.split(argument):
            name, _, value = word.partition("=")
            values[name] = re.sub(r"\$(\w+)", lambda match: values.get(match[1], os.environ[match[1]]), value)
    return values


def run_build(stage: Stage, folder: Path) -> None:
    """The first stage's COPY, WORKDIR and RUN steps, with `/opt` and `/src` inside `folder`."""
    environment = {**os.environ, **variables_of(stage)}
    here = folder
    for instruction, argument in stage.steps:
        inside = re.sub(r"(?<![\w/.:])/(opt|src)\b", rf"{folder}/\1", argument)
        began = time.monotonic()
        if instruction == "WORKDIR":
            here = Path(inside)
            here.mkdir(parents=True)
        elif instruction == "COPY":
            *sources, target = argument.split()
            for source in sources:
                copy(ROOT / source, here / target)
        elif instruction == "RUN":
            if INDEX.search(inside):
                print("left out: the index of packages; pip's own is asked", flush=True)
            subprocess.run(["sh", "-c", INDEX.sub("", inside)], cwd=here, env=environment, check=True)
        print(f"{time.monotonic() - began:6.1f} s  {instruction} {argument[:80]}", flush=True)


def copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", "*.part"))
    else:
        shutil.copy(source, target)


def main(folder: Path) -> None:
    build, last = stages_of((ROOT / "Dockerfile").read_text(encoding="utf-8"))
    folder.mkdir(parents=True)
    folder = folder.resolve()
    run_build(build, folder)
    for line in last.all("RUN"):
        print(f"left out, needs root: {line[:80]}")
    environment = {**os.environ, **variables_of(last)}
    for name, value in environment.items():
        environment[name] = re.sub(r"(?<![\w/.])/(opt/chitu|cache)\b", rf"{folder}/\1", value)
    videos = folder / "videos"
    videos.mkdir()
    for words in (["--version"], ["generate", "A cat walking on grass", "--steps", "4", "-o", "cat.mp4"]):
        program = shutil.which("chitu", path=environment["PATH"])
        subprocess.run([str(program), *words], cwd=videos, env=environment, check=True)
    print(f"{(videos / 'cat.mp4').stat().st_size} bytes of video by {program}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
