"""What a benchmark found, kept in two files that are rewritten after every section, and the budget that
sections share; the command line's common part.

Knows JSON, Markdown, the clock and the machine; nothing of what is measured.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).resolve().parent / "results"
PACKAGES = ("torch", "triton", "diffusers", "torchao", "fa3-fwd", "transformers")


@dataclass(frozen=True)
class Section:
    """A part of a benchmark that can be asked for, skipped and fail by itself.

    Attributes:
        name: on the command line and as a heading.
        about: one line.
        estimate: seconds that it takes on one H200, from published or earlier figures.
        run: does it, writing into the report.
    """

    name: str
    about: str
    estimate: float
    run: Callable[[Report], None]


@dataclass
class Report:
    """Rows by table, notes, and the machine's facts; `write` puts all into one JSON and one Markdown file.

    Attributes:
        title: heading of the Markdown, and part of the files' names.
        facts: about the machine and the versions.
        folder: where the files go; None keeps none.
        name: the files' name without an ending.
    """

    title: str
    facts: Mapping[str, Any]
    folder: Path | None
    name: str
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    sections: dict[str, dict[str, Any]] = field(default_factory=dict)

    def add(self, table: str, row: Mapping[str, Any]) -> None:
        """A row at the end of a table."""
        self.tables.setdefault(table, []).append(dict(row))

    @property
    def failed(self) -> bool:
        """Whether a section did: the command's exit code."""
        return any(facts["outcome"] == "failed" for facts in self.sections.values())

    def note(self, text: str) -> None:
        """A sentence for the reader, also printed."""
        self.notes.append(text)
        print(f"note: {text}", flush=True)

    def write(self) -> tuple[Path, ...]:
        """Rewrites both files, each in one move; returns their paths."""
        if self.folder is None:
            return ()
        self.folder.mkdir(parents=True, exist_ok=True)
        whole = {
            "title": self.title,
            "facts": dict(self.facts),
            "sections": self.sections,
            "tables": self.tables,
            "notes": self.notes,
        }
        text = json.dumps(plain(whole), indent=1, ensure_ascii=False) + "\n"
        paths = self.folder / f"{self.name}.json", self.folder / f"{self.name}.md"
        for path, content in zip(paths, (text, self.markdown()), strict=True):
            beside = path.with_name(path.name + ".tmp")
            beside.write_text(content, encoding="utf-8")
            beside.replace(path)
        return paths

    def markdown(self) -> str:
        """Facts, tables, sections and notes, for people."""
        parts = [f"# {self.title}", "; ".join(f"{key} {value}" for key, value in self.facts.items())]
        parts += [f"## {name}\n\n{table_of(rows)}" for name, rows in self.tables.items() if rows]
        if self.sections:
            done = [{"section": name, **facts} for name, facts in self.sections.items()]
            parts.append(f"## Sections\n\n{table_of(done)}")
        if self.notes:
            parts.append("## Notes\n\n" + "\n".join(f"* {note}" for note in self.notes))
        return "\n\n".join(parts) + "\n"


def table_of(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown with a column for every key of any row, in the order of their first appearance; absent values
    stay empty.
    """
    columns = list(dict.fromkeys(key for row in rows for key in row))
    numeric = {
        key: all(isinstance(row[key], int | float) for row in rows if row.get(key) is not None)
        for key in columns
    }
    lines = [
        f"| {' | '.join(columns)} |",
        "|" + "|".join("---:" if numeric[key] else "---" for key in columns) + "|",
    ]
    lines += [f"| {' | '.join(shown(row.get(key)) for key in columns)} |" for row in rows]
    return "\n".join(lines)


def shown(value: Any) -> str:
    """A cell: four significant digits for a float, nothing for None, and no bar that would end the cell."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.0f}" if math.isfinite(value) and abs(value) >= 1000 else f"{value:.4g}"
    return str(value).replace("|", "/").replace("\n", " ")


def plain(value: Any) -> Any:
    """JSON's own values: what is not finite becomes its name, for JSON has none."""
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def run_sections(
    sections: Iterable[Section],
    report: Report,
    *,
    asked: Sequence[str] = (),
    budget: float = math.inf,
    clock: Callable[[], float] = time.monotonic,
    began: float | None = None,
) -> None:
    """Runs sections in their order; one that fails leaves its traceback in the report, and the next goes on.

    A section whose estimate does not fit what is left of the budget is left out with a note; a later, shorter
    one may still fit. Rows are printed and the files rewritten after each section.

    Args:
        sections: in the order of their importance.
        report: gets rows, notes, and for each section how it went.
        asked: names to run; none means all.
        budget: seconds for all of it.
        clock: gives seconds.
        began: the clock when the budget began; None is now.

    Raises:
        SystemExit: a name that no section has.
    """
    sections = list(sections)
    known = [section.name for section in sections]
    unknown = [name for name in asked if name not in known]
    if unknown:
        raise SystemExit(f"no section {', '.join(unknown)}; there are: {', '.join(known)}")
    began = clock() if began is None else began
    for section in sections:
        if asked and section.name not in asked:
            continue
        left = budget - (clock() - began)
        if section.estimate > left:
            report.sections[section.name] = {"outcome": "skipped", "estimate_s": section.estimate}
            seconds = f"about {section.estimate:.0f} s, and {max(left, 0):.0f} s are left"
            report.note(f"{section.name} was left out: {seconds}")
        else:
            print(f"== {section.name} (about {section.estimate:.0f} s): {section.about}", flush=True)
            started = clock()
            outcome = _outcome(section, report)
            facts = {"outcome": outcome, "seconds": clock() - started, "estimate_s": section.estimate}
            report.sections[section.name] = facts
        report.write()


def _outcome(section: Section, report: Report) -> str:
    """Runs it, prints the rows that it added, and frees the device's memory for the next."""
    before = {name: len(rows) for name, rows in report.tables.items()}
    outcome = "done"
    try:
        section.run(report)
    except Exception as error:
        outcome = "failed"
        report.note(f"{section.name} failed: {type(error).__name__}: {first_line(error)}")
        traceback.print_exc()
    for name, rows in report.tables.items():
        if len(rows) > before.get(name, 0):
            print(f"\n## {name}\n\n{table_of(rows[before.get(name, 0) :])}\n", flush=True)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return outcome


def first_line(error: BaseException) -> str:
    """What an error says, in one line of bearable length."""
    text = str(error).strip().splitlines()
    return text[0][:300] if text else "no message"


def file_name(kind: str, device: str, day: date | None = None) -> str:
    """'<date>-<kind>-<device>' with the device's name made fit for a file's."""
    words = "".join(letter if letter.isalnum() else " " for letter in device.lower()).split()
    return "-".join([(day or date.today()).isoformat(), kind, *words])


# -- the command line


def parser(about: str | None) -> argparse.ArgumentParser:
    """What every benchmark that writes a report takes: device, size, budget, folder."""
    found = argparse.ArgumentParser(
        prog=_module(), description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    found.add_argument("--small", action="store_true", help="tiny shapes: only to see that it works")
    found.add_argument("--budget", type=float, default=math.inf, metavar="SECONDS", help="for all of it")
    found.add_argument(
        "--out",
        type=results_folder,
        metavar="FOLDER",
        help="of JSON and Markdown; benchmarks/results by default, and none for --small",
    )
    return found


def results_folder(text: str) -> Path:
    """A folder that is there or can be made, which is found out before the work; nothing is made yet, for the
    command may still be refused.

    Raises:
        ArgumentTypeError: it cannot be made or written.
    """
    folder = Path(text)
    try:
        above = next(place for place in (folder, *folder.absolute().parents) if place.exists())
        with tempfile.TemporaryFile(dir=above):
            pass
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text}: {error.strerror}; use another folder") from None
    return folder


def kept_in(asked: argparse.Namespace) -> Path | None:
    """The folder of a command's results; a small run has none unless `--out` names it, for its figures mean
    nothing.

    Raises:
        SystemExit: the folder cannot be written.
    """
    if asked.out is not None or asked.small:
        return asked.out
    try:
        return results_folder(str(RESULTS))
    except argparse.ArgumentTypeError as error:
        raise SystemExit(f"{error}, by --out FOLDER") from None


def report_for(title: str, kind: str, asked: argparse.Namespace) -> Report:
    """An empty report in `kept_in(asked)`, named after the day, the kind and the device."""
    facts = machine(torch.device(asked.device))
    kind = f"{kind}-small" if asked.small else kind
    return Report(title, facts, kept_in(asked), file_name(kind, facts["device"]))


def machine(device: torch.device) -> dict[str, str]:
    """Day, commit, command, device and versions, for a report's head."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    facts = {"date": date.today().isoformat(), "commit": _commit(), "command": _command()}
    facts |= {"device": name, "threads": str(torch.get_num_threads()), "cores": str(os.cpu_count())}
    if device.type == "cuda":
        facts |= {"cuda": str(torch.version.cuda), "cudnn": str(torch.backends.cudnn.version())}
    for package in PACKAGES:
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            facts[package] = "absent"
    return facts


def _commit() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        said = subprocess.run(command, cwd=RESULTS.parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return said.stdout.strip()


def _command() -> str:
    """As it was typed, but for where the results go."""
    words = sys.argv[1:]
    if "--out" in words:
        place = words.index("--out")
        words = words[:place] + words[place + 2 :]
    return " ".join([_module(), *words])


def _module() -> str:
    """How this process was started."""
    spec = sys.modules["__main__"].__spec__
    return "python" if spec is None else f"python -m {spec.name.removesuffix('.__main__')}"
