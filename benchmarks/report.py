"""What a benchmark found, kept in two files that are rewritten after every section, and the budget that
sections share.

Knows JSON, Markdown and the clock; nothing of what is measured.
"""

from __future__ import annotations

import json
import math
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"


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
        folder: where the files go.
        name: the files' name without an ending.
    """

    title: str
    facts: Mapping[str, Any]
    folder: Path
    name: str
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    sections: dict[str, dict[str, Any]] = field(default_factory=dict)

    def add(self, table: str, row: Mapping[str, Any]) -> None:
        """A row at the end of a table."""
        self.tables.setdefault(table, []).append(dict(row))

    def note(self, text: str) -> None:
        """A sentence for the reader, also printed."""
        self.notes.append(text)
        print(f"note: {text}", flush=True)

    def write(self) -> tuple[Path, Path]:
        """Rewrites both files, each in one move; returns their paths."""
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


def ratios(times: Mapping[str, float], peer: str = "diffusers") -> dict[str, dict[str, float]]:
    """How many times faster each entry is than each of the peer's: {name: {"ratio_vs_diffusers_eager": 1.3,
    ...}}.

    Args:
        times: name -> time, the peer's entries being called "PEER_VARIANT"; they get no ratios of their own.
        peer: the prefix.
    """
    theirs = {
        name.removeprefix(f"{peer}_"): value for name, value in times.items() if name.startswith(f"{peer}_")
    }
    ours = {name: value for name, value in times.items() if not name.startswith(f"{peer}_")}
    return {
        name: {f"ratio_vs_{peer}_{variant}": other / value for variant, other in theirs.items()}
        for name, value in ours.items()
    }


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
    one may still fit. The files are rewritten after each section.

    Args:
        sections: in the order of their importance.
        report: gets rows, notes, and for each section how it went.
        asked: names to run; none means all.
        budget: seconds for all of it.
        clock: gives seconds.
        began: the clock when the budget began; None is now.

    Raises:
        ValueError: a name that no section has.
    """
    sections = list(sections)
    known = [section.name for section in sections]
    unknown = [name for name in asked if name not in known]
    if unknown:
        raise ValueError(f"no section {', '.join(unknown)}; there are: {', '.join(known)}")
    began = clock() if began is None else began
    for section in sections:
        if asked and section.name not in asked:
            continue
        left = budget - (clock() - began)
        if section.estimate > left:
            report.sections[section.name] = {"outcome": "skipped", "estimate_s": section.estimate}
            report.note(
                f"{section.name} was left out: about {section.estimate:.0f} s, and {max(left, 0):.0f} s are "
                "left"
            )
            report.write()
            continue
        print(f"== {section.name}: {section.about} (about {section.estimate:.0f} s)", flush=True)
        started, outcome = clock(), "done"
        try:
            section.run(report)
        except Exception as error:
            outcome = "failed"
            report.note(f"{section.name} failed: {type(error).__name__}: {first_line(error)}")
            traceback.print_exc()
        facts = {"outcome": outcome, "seconds": clock() - started, "estimate_s": section.estimate}
        report.sections[section.name] = facts
        report.write()


def first_line(error: BaseException) -> str:
    """What an error says, in one line of bearable length."""
    text = str(error).strip().splitlines()
    return text[0][:300] if text else "no message"


def file_name(kind: str, device: str, day: date | None = None) -> str:
    """'<date>-<kind>-<device>' with the device's name made fit for a file's."""
    words = "".join(letter if letter.isalnum() else " " for letter in device.lower()).split()
    return "-".join([(day or date.today()).isoformat(), kind, *words])
