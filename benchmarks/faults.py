"""The engine itself on two ranks: the same video on every layout, and how it ends when a rank is killed,
frozen or stopped.

    python -m benchmarks.faults                  two GPUs, or two processes where there is none
    python -m benchmarks.faults --device cpu

Every row is a `chitu generate --gpus 2` of the shipped model. First the videos: each layout's against one
rank's, float32. Then the faults: once steps are done a signal goes to one rank, and the seconds are counted
until no process is left.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.report import Report, Section, parser, report_for, run_sections

PROMPT = "A red ball rolls on grass"
LAYOUTS = ("cfg2", "u2", "r2")
FAULTS = (("SIGKILL", 1), ("SIGSTOP", 1), ("SIGKILL", 0), ("SIGINT", 1))
PATIENCE = 60.0


def command(device: str, layout: str | None, steps: int, out: Path) -> list[str]:
    """A `chitu generate` of two ranks, or of one."""
    words = f"-m chitu_diffusion generate --seed 1 --steps {steps} --device {device} --dtype float32 --json"
    ranks = [] if layout is None else ["--gpus", "2", "--parallel", layout]
    return [sys.executable, *words.split(), "-o", str(out), *ranks, PROMPT]


def videos(device: str, steps: int, folder: Path, report: Report) -> None:
    """PSNR of each layout's frames against one rank's, in dB."""
    alone = np.empty(0)
    for layout in (None, *LAYOUTS):
        out = folder / f"{layout}.npy"
        began = time.monotonic()
        done = subprocess.run(
            command(device, layout, steps, out), capture_output=True, text=True, timeout=4 * PATIENCE
        )
        row: dict[str, Any] = {"layout": layout or "one rank", "seconds": round(time.monotonic() - began, 1)}
        if done.returncode:
            report.add("The same video", {**row, "failed": done.stderr[-600:]})
            continue
        frames = np.load(out).astype(np.float64)
        if layout is None:
            alone = frames
        else:
            error = float(np.mean((frames - alone) ** 2))
            row["psnr"] = round(10 * np.log10(float(np.ptp(alone)) ** 2 / error), 1) if error else "identical"
        report.add("The same video", row)


def fault(device: str, layout: str, name: str, rank: int, folder: Path) -> dict[str, Any]:
    """A signal to one rank in the middle of many steps."""
    words = command(device, layout, 1000, folder / "never.npy")
    process = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    row: dict[str, Any] = {"signal": name, "rank": rank, "layout": layout}
    said = Lines(process.stdout)
    told = Lines(process.stderr)
    if (
        not waits_for(lambda: process.poll() is not None or any(steps_of(line) >= 3 for line in said.lines))
        or process.poll()
    ):
        process.kill()
        return {**row, "failed": told.lines[-5:]}
    workers = ranks_of(process.pid)
    began = time.monotonic()
    os.kill(workers[rank], getattr(signal, name))
    ended = waits_for(
        lambda: process.poll() is not None and not any(alive(worker) for worker in workers.values())
    )
    row["seconds"] = round(time.monotonic() - began, 1) if ended else None
    for worker in [] if ended else [process.pid, *workers.values()]:
        os.kill(worker, signal.SIGKILL)
    words_of = [line[:400] for line in (*said.lines, *told.lines) if "lost" in line or "interrupted" in line]
    return {
        **row,
        "code": process.wait(),
        "said": words_of[:2],
        "left behind": [file.name for file in folder.glob("*never*")],
    }


class Lines:
    """What a process says, kept as it comes, so that its pipe never fills."""

    def __init__(self, pipe: Any) -> None:
        self.lines: list[str] = []
        threading.Thread(target=lambda: self.lines.extend(iter(pipe.readline, "")), daemon=True).start()


def steps_of(line: str) -> int:
    """Steps that an event tells of."""
    return int(json.loads(line).get("step", 0)) if line.startswith("{") else 0


def waits_for(condition: Callable[[], bool]) -> bool:
    """Whether it came true in time."""
    began = time.monotonic()
    while not (met := condition()) and time.monotonic() - began < PATIENCE:
        time.sleep(0.05)
    return met


def ranks_of(launcher: int) -> dict[int, int]:
    """Process number by rank, of a launcher's workers."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
            name = (folder / "comm").read_text().strip()
        except OSError:
            continue
        if parent == launcher and name.startswith("chitu-rank-"):
            found[int(name.rpartition("-")[2])] = int(folder.name)
    return found


def alive(process: int) -> bool:
    """Whether it runs, or could; one that is dead and not yet buried does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def main(words: list[str] | None = None) -> Report:
    """The command line."""
    options = parser(__doc__)
    options.add_argument("--sections", nargs="+", default=[], metavar="NAME", help="a wrong name lists all")
    options.add_argument("--layout", default="u2", help="of the faults")
    options.add_argument("--steps", type=int, default=20, help="of the videos")
    asked = options.parse_args(words)
    report = report_for("The engine itself on two ranks", "faults", asked)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        steps = 2 if asked.small else asked.steps
        table = [Section("videos", "each layout's", 0, partial(videos, asked.device, steps, folder))]
        for signal_name, rank in FAULTS:
            run = partial(told, asked.device, asked.layout, signal_name, rank, folder)
            table.append(Section(f"{signal_name}-{rank}", "to a rank", 0, run))
        run_sections(table, report, asked=asked.sections, budget=asked.budget)
    print(*report.write(), sep="\n")
    return report


def told(device: str, layout: str, name: str, rank: int, folder: Path, report: Report) -> None:
    """A fault's row."""
    report.add("When a rank fails", fault(device, layout, name, rank, folder))


if __name__ == "__main__":
    raise SystemExit(main().failed)
