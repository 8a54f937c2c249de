"""The process is killed at the first fail point, at the second, ... until none is left; each time the same
command, given again, goes on to the very same video and leaves nothing else behind.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from card import Card
from injecting import FailAt, files_below, frames_sha256
from ranks import CONTEXT
from tiny_model import write_tiny_model


def run_in_fork(words: list[str], number: int, told: Path) -> tuple[int, float]:
    """`chitu WORDS` in a fork of this process that is killed at a point; what it said and saw goes to files.

    Returns:
        what `waitpid` says, and the seconds from the fork to its end.
    """
    from chitu_diffusion.cli.app import run
    from chitu_diffusion.files.faults import fail_points

    began = time.monotonic()
    child = os.fork()
    if child == 0:
        code = 70
        try:
            sys.stdout = sys.stderr = told.with_suffix(".said").open("w", buffering=1)

            def kill(point: str, value: Any) -> None:
                told.write_text(json.dumps({"at": at.seen[-1], "steps": at.steps}))
                os.kill(os.getpid(), signal.SIGKILL)

            at = FailAt(number, kill)
            with fail_points(at):
                code = run(words)
            told.with_suffix(".modules").write_text("\n".join(list(sys.modules)))
        finally:
            os._exit(code)
    status = os.waitpid(child, 0)[1]
    return status, time.monotonic() - began


def kill_at_every_point(folder: str, words: list[str], name: str, numbers: Iterator[int]) -> None:
    """The loop, in a process with everything imported and no model; what came of each point goes to
    `rows.json`.
    """
    out = Path(folder, "out")
    cache = Path(folder, "cache")
    model = Path(folder, "model")
    os.environ["CHITU_CACHE_DIR"] = str(cache)
    os.fsync = lambda handle: None  # what the kernel has outlives a process that is killed
    words = [*words, "--model", str(model), "--set", "checkpoint.every_s=0", "-o", f"{out / name}"]
    words += ["--set", "infer.threads=1", "--device", "cpu"]
    told = Path(folder, "told.json")
    of_the_model = files_below(model)
    rows: list[dict[str, Any]] = []
    expected = ""
    while True:
        for place in (out, cache):
            shutil.rmtree(place, ignore_errors=True)
        (model / "manifest.json").unlink(missing_ok=True)
        if not expected:
            assert run_in_fork(words, 10**6, told)[0] == 0, told.with_suffix(".said").read_text()
            for module in told.with_suffix(".modules").read_text().split("\n"):
                with suppress(ImportError):
                    importlib.import_module(module)  # once, and not in every fork
            expected = frames_sha256(out / name)
            standing = [files_below(place) for place in (out, cache)]
            continue
        status, _ = run_in_fork(words, next(numbers), told)
        if status == 0:
            break
        assert status == signal.SIGKILL, told.with_suffix(".said").read_text()
        row = json.loads(told.read_text())
        if (out / name).exists():
            assert frames_sha256(out / name) == expected, row
        status, row["seconds"] = run_in_fork(words, 10**6, told)
        said = told.with_suffix(".said").read_text()
        assert status == 0, (row, said)
        went_on = said.partition("going on at step ")[2].split(" ")[0]
        row["lost"] = row["steps"] - int(went_on or 0)
        row["equal"] = frames_sha256(out / name) == expected
        row["left"] = sorted(
            {*files_below(out), *files_below(cache), *files_below(model)}
            ^ {*standing[0], *standing[1], *of_the_model, "manifest.json"}
        )
        rows.append(row)
    Path(folder, "rows.json").write_text(json.dumps(rows))


QUICK = {"mp4": ("a.mp4", ())}
LONG = {
    "npy": ("a.npy", ()),
    "gif": ("a.gif", ()),
    "folder": ("frames/", ()),
    "easycache": ("a.mp4", ("--cache", "easycache:warmup=1,threshold=5")),
    "more steps": ("a.npy", ("--steps", "8")),
}


@pytest.mark.parametrize("kind", [*QUICK, *LONG])
def test_killed_at_every_point_the_same_command_makes_the_same_video(
    kind: str, card: Card, tmp_path: Path
) -> None:
    if kind not in card.rounds(QUICK, QUICK | LONG):
        pytest.skip("a long loop: make card")
    name, more = (QUICK | LONG)[kind]
    write_tiny_model(tmp_path / "model")
    words = ["generate", "a cat", "--seed", "7", "--steps", "2", *more]
    process = CONTEXT.Process(
        target=kill_at_every_point, args=(str(tmp_path), words, name, card.every_point())
    )
    process.start()
    process.join(250)
    assert process.exitcode == 0
    rows = json.loads((tmp_path / "rows.json").read_text())
    card.add(
        points=len(rows),
        survived=sum(row["equal"] and not row["left"] for row in rows),
        kinds=len({row["at"].split(" ")[0] for row in rows}),
        steps_lost=[row["lost"] for row in rows],
        seconds_again=[round(row["seconds"], 3) for row in rows],
    )
    assert len(rows) > card.rounds(10, 30)
    assert not [row for row in rows if not row["equal"] or row["left"]]
    assert max(row["lost"] for row in rows) <= 1 and median(row["lost"] for row in rows) == 0
