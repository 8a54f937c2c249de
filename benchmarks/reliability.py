"""The reliability card: runs the tests that hold each promise, with long loops, and writes what they counted.

    python -m benchmarks.reliability            # docs/reliability.md; `make card` is the same
    python -m benchmarks.reliability --out card.md

Knows which tests hold which check, and how a table looks; nothing of what is tested. A check whose tests
fail, or were not run, stands in the card as such.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.report import machine, shown, table_of

ROOT = Path(__file__).resolve().parents[1]
CRASHES = "reliability/test_crash_points.py"
FAULTS = "reliability/test_fault_points.py::test_a_fault_at_every_point_costs_one_task_at_most"
NEIGHBOURS = "reliability/test_neighbours.py"
STRANGERS = "reliability/test_strangers_data.py"
RANKS = "executor/test_distributed_executor.py"
CHECKPOINTS = "pipelines/test_checkpoint.py"


@dataclass(frozen=True)
class Check:
    """A promise, and the tests that hold it.

    Attributes:
        number: of the check among the thirty; those that need a server have no row.
        fault: what goes wrong.
        promise: what happens then.
        tests: beginnings of names, from the folder of tests.
        lacks: what of the check is not so.
    """

    number: int
    fault: str
    promise: str
    tests: tuple[str, ...]
    lacks: str = ""


CHECKS = (
    Check(
        1,
        "SIGKILL while denoising",
        "the same command goes on to the same frames",
        ("cli/test_resume.py::test_the_same_command_goes_on[('SIGKILL'", CRASHES),
    ),
    Check(2, "SIGKILL at every fail point", "the same video, nothing half written, nothing left", (CRASHES,)),
    Check(
        3,
        "cut short while a cache is at work",
        "the same bytes, for every strategy",
        (f"{NEIGHBOURS}::test_every_cache", f"{CHECKPOINTS}::test_a_task_that_is_cut"),
    ),
    Check(
        4,
        "a checkpoint of another model, solver or seed; damaged",
        "refused with what differs; the one before",
        (
            f"{CHECKPOINTS}::test_whatever_a_file_holds",
            f"{CHECKPOINTS}::test_what_must_agree",
            f"{CHECKPOINTS}::test_other_weights",
            f"{CHECKPOINTS}::test_a_damaged",
            "executor/test_task_checkpoints.py::test_another_video",
        ),
    ),
    Check(
        5,
        "memory runs out at every fail point, and while loading",
        "the next memory level, the same video",
        (
            f"{FAULTS}[out of memory]",
            "test_engine.py::test_out_of_memory_raises",
            "test_engine.py::test_loading_climbs",
        ),
    ),
    Check(
        6,
        "a NaN in the text, the noise, a velocity, the video",
        "that task fails and names the step; no other",
        (f"{FAULTS}[nan]", "test_generator.py::test_nan_fails"),
        "black or constant frames are not looked for",
    ),
    Check(
        7,
        "an error at every point of every stage",
        "that task fails; the others equal their solo runs",
        (f"{FAULTS}[raise]", "test_engine.py::test_poisoned_tasks_fail_alone"),
    ),
    Check(
        8, "a task with other settings before", "equal to the task alone", (f"{NEIGHBOURS}::test_no_setting",)
    ),
    Check(
        9,
        "a shard cut, flipped, missing, misshapen",
        "refused with file, key and command",
        (
            "weights/test_weights.py::test_a_faulty_checkpoint",
            "weights/test_identity.py::test_verify_finds",
            "weights/test_identity.py::test_a_flipped_bit",
        ),
    ),
    Check(
        10,
        "pickles, remote code, bombs",
        "refused, and nothing is run",
        (
            f"{STRANGERS}::test_no_payload",
            "models/test_folder_is_data.py::test_no_code",
            "weights/test_weights.py::test_a_faulty_pth",
        ),
    ),
    Check(
        11,
        "hostile bytes between ranks; in files",
        "not heard; refused in words",
        (
            "executor/test_strangers.py",
            "files/test_fuzz.py",
            "test_house_rules.py::test_nothing_runs_what_it_reads",
        ),
    ),
    Check(
        12,
        "SIGKILL of a rank",
        "the group ends and names it; the same command goes on",
        (
            f"{RANKS}::test_a_lost_rank",
            "cli/test_launch.py::test_the_command_says",
            "cli/test_resume.py::test_two_ranks",
        ),
        "no rank is started again by itself",
    ),
    Check(
        13,
        "SIGSTOP of a rank",
        "noticed by its heartbeat, named with its place",
        (f"{RANKS}::test_a_lost_rank",),
        "stacks are not saved",
    ),
    Check(
        14,
        "an error or no memory on one rank alone",
        "the task fails or is tried again on all; the group lives",
        (f"{RANKS}::test_an_exception_on_one", f"{RANKS}::test_memory_that_runs_out"),
    ),
    Check(
        15,
        "killed while a file is written",
        "the older or the newer, whole",
        ("files/test_atomic.py::test_killed_at", "media/test_video.py::test_killed_while", CRASHES),
    ),
    Check(
        16,
        "a full disk at every write",
        "the task fails in words, or goes on without a checkpoint; nothing is left",
        (
            f"{FAULTS}[full disk]",
            "media/test_video.py::test_no_room",
            "executor/test_task_checkpoints.py::test_a_full_disk",
        ),
    ),
    Check(
        18,
        "cancelled three times at every fail point",
        "it ends once; no file, no tensor is left",
        ("reliability/test_fault_points.py::test_cancelled", "test_engine.py::test_cancel_and_close"),
    ),
    Check(
        19,
        "Ctrl+C at every fail point; SIGTERM, SIGHUP",
        "no step that was done is lost",
        (
            "reliability/test_fault_points.py::test_ctrl_c",
            "cli/test_resume.py::test_the_same_command_goes_on",
            "executor/test_ranks_resume.py::test_ctrl_c",
        ),
    ),
    Check(
        24,
        "names that lead elsewhere",
        "nothing is written outside",
        (
            f"{STRANGERS}::test_no_name",
            "media/test_video.py::test_names_that",
            "cli/test_cli.py::test_a_prompt_never",
        ),
    ),
    Check(
        26,
        "sizes, frames, steps that cannot be",
        "refused with the field; what is accepted ends well",
        ("reliability/test_requests.py", "test_engine.py::test_what_the_model_cannot_do"),
    ),
    Check(
        29,
        "hundreds of tasks, cancelled and failed ones too",
        "memory, files and threads stay flat",
        (f"{NEIGHBOURS}::test_nothing_grows",),
    ),
    Check(
        30,
        "1, 2, 4 ranks; another number after a cut",
        "the same video, within rounding",
        (
            "distributed/test_layouts.py::test_every_layout",
            "executor/test_ranks_resume.py::test_one_rank_clears",
            "executor/test_strangers.py::test_ranks_do_not_hear",
        ),
    ),
    Check(
        31,
        "noise on every port of a whole run on two ranks",
        "an equal video; loopback alone",
        (f"{STRANGERS}::test_noise",),
    ),
)


def held_by(check: Check, lines: Sequence[Mapping[str, Any]]) -> tuple[str, list[Mapping[str, Any]]]:
    """ "yes", "no" or "not run" with how many tests; and what these tests told."""
    told = [line for line in lines if any(line["test"].startswith(f"tests/{name}") for name in check.tests)]
    ends = [line["outcome"] for line in told if "outcome" in line]
    bare = [
        name
        for name in check.tests
        if not any("outcome" in line and line["test"].startswith(f"tests/{name}") for line in told)
    ]
    failed = sum(end == "failed" for end in ends)
    passed = sum(end == "passed" for end in ends)
    if failed or bare:
        return (
            f"**no**: {failed} of {failed + passed} tests failed"
            if failed
            else f"**not run**: tests/{bare[0]}",
            told,
        )
    return ("in part" if check.lacks else "yes") + f" ({passed} tests)", told


def figures_of(told: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """All figures of some tests: numbers added up, lists joined."""
    found: dict[str, Any] = {}
    for name, value in (item for line in told for item in line.get("figures", {}).items()):
        if isinstance(value, bool):
            found[name] = found.get(name, True) and value
        else:
            found[name] = found[name] + value if name in found else value
    return found


def in_words(figures: Mapping[str, Any]) -> str:
    """For a cell."""
    said = []
    for name, value in figures.items():
        if isinstance(value, list):
            value = f"median {shown(median(value))}, most {shown(max(value))}" if value else "none"
        said.append(f"{name.replace('_', ' ')} {shown(value)}")
    return "; ".join(said)


def headlines(lines: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The figures that people ask for first."""

    def of(*tests: str) -> dict[str, Any]:
        return figures_of(line for line in lines if any(test in line["test"] for test in tests))

    crashes = of(CRASHES)
    all_faults = of(CRASHES, "test_fault_points.py")
    again = crashes.get("seconds_again", [])
    lost = crashes.get("steps_lost", [])
    fuzz = of("files/test_fuzz.py")
    rows = {
        "faults injected, survived": [all_faults.get("points"), all_faults.get("survived")],
        "fail points killed at, went on from": [crashes.get("points"), crashes.get("survived")],
        "steps lost in a crash: median, most": [median(lost), max(lost)] if lost else [None],
        "seconds of the command that goes on, imports apart: median, most": [median(again), max(again)]
        if again
        else [None],
        "fuzz cases, raw errors": [fuzz.get("cases"), fuzz.get("raw_errors")],
        "payloads, run": [of(STRANGERS).get("payloads"), of(STRANGERS).get("executed")],
        "ports of a run on two ranks, beyond loopback": [
            of(STRANGERS).get("ports"),
            of(STRANGERS).get("ports_beyond_loopback"),
        ],
        "pairs of neighbours, changed": [of(NEIGHBOURS).get("pairs"), of(NEIGHBOURS).get("changed")],
        "caches, resumable to the bit": [of(NEIGHBOURS).get("strategies"), of(NEIGHBOURS).get("resumable")],
        "names tried, escapes": [of(STRANGERS).get("names"), of(STRANGERS).get("escapes")],
    }
    return [
        {
            "what": name,
            "found": ", ".join("not counted" if value is None else shown(value) for value in values),
        }
        for name, values in rows.items()
    ]


def card_of(lines: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]) -> str:
    """The card as Markdown."""
    rows = []
    for check in CHECKS:
        held, told = held_by(check, lines)
        rows.append(
            {
                "#": check.number,
                "goes wrong": check.fault,
                "then": check.promise,
                "holds": held,
                "counted": in_words(figures_of(told)),
                "lacks": check.lacks,
                "tests": ", ".join(f"`tests/{name}`" for name in check.tests),
            }
        )
    bad = sum("**" in row["holds"] for row in rows)
    parts = [
        "# Reliability card",
        "Written by `make card`; " + "; ".join(f"{key} {value}" for key, value in facts.items()),
        f"{len(rows)} checks, {bad} of them without a pass. Everything runs on a CPU with small random "
        "models, through the real engine, command line, checkpoints and files.",
        table_of(headlines(lines)),
        "## Checks\n\nNumbers as in the project's list of thirty; those that are missing need a server.",
        table_of(rows),
    ]
    return "\n\n".join(parts) + "\n"


def run_tests(file: Path) -> int:
    """The tests of all checks, which tell the file; returns pytest's exit code."""
    named = sorted({name.partition("::")[0] for check in CHECKS for name in check.tests})
    functions = sorted({name.partition("[")[0] for check in CHECKS for name in check.tests if "::" in name})
    whole = [name for name in named if any(name in check.tests for check in CHECKS)]
    words = [f"tests/{name}" for name in whole]
    words += [f"tests/{name}" for name in matching(functions) if name.partition("::")[0] not in whole]
    command = [sys.executable, "-m", "pytest", "--card", str(file), "--timeout", "900", *words]
    return subprocess.run(command, cwd=ROOT, check=False).returncode


def matching(beginnings: Iterable[str]) -> list[str]:
    """Names of test functions, FILE::NAME, that begin so."""
    found = []
    for beginning in beginnings:
        file, _, name = beginning.partition("::")
        text = (ROOT / "tests" / file).read_text(encoding="utf-8")
        names = [line[4:].partition("(")[0] for line in text.splitlines() if line.startswith(f"def {name}")]
        found += [f"{file}::{each}" for each in names]
    return sorted(set(found))


def main(words: Sequence[str] | None = None) -> int:
    """The command line; the exit code is pytest's."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reliability", description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "reliability.md", metavar="FILE")
    asked = parser.parse_args(words)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "card.jsonl")
        file.touch()
        code = run_tests(file)
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    facts = {name: value for name, value in machine(torch.device("cpu")).items() if value != "absent"}
    asked.out.write_text(card_of(lines, facts), encoding="utf-8")
    print(f"{asked.out}: {len(lines)} lines of {len(CHECKS)} checks")
    return code


if __name__ == "__main__":
    sys.exit(main())
