"""The card says what holds, and also what does not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from card import Card

from benchmarks.reliability import CHECKS, card_of, matching

LINES: list[dict[str, Any]] = [
    {"test": f"tests/{name}", "outcome": "passed", "seconds": 0.1} for check in CHECKS for name in check.tests
]


def row_of(text: str, number: int) -> str:
    return next(line for line in text.splitlines() if line.startswith(f"| {number} |"))


def test_every_named_test_is_there() -> None:
    for check in CHECKS:
        for name in check.tests:
            file, _, function = name.partition("::")
            assert (Path(__file__).parents[1] / file).exists(), name
            assert not function or matching([name.partition("[")[0]]), name


def test_a_check_that_does_not_hold_is_in_the_card() -> None:
    assert " 0 of them" in card_of(LINES, {"commit": "x"}) and "| yes (1 tests) |" in row_of(
        card_of(LINES, {}), 8
    )
    assert "in part" in row_of(card_of(LINES, {}), 13) and "stacks" in row_of(card_of(LINES, {}), 13)
    broken = [line | {"outcome": "failed"} if "test_no_setting" in line["test"] else line for line in LINES]
    assert "**no**: 1 of 1 tests failed" in row_of(card_of(broken, {}), 8)
    absent = [line for line in LINES if "test_no_setting" not in line["test"]]
    assert "**not run**" in row_of(card_of(absent, {}), 8) and "1 of them" in card_of(absent, {})


def test_figures_are_counted_and_without_a_card_nothing_is_kept(tmp_path: Path) -> None:
    Card(None, "tests/x").add(points=1)
    file = tmp_path / "card.jsonl"
    for lost in ([0, 1], [4]):
        Card(str(file), "tests/reliability/test_crash_points.py::a").add(
            points=2, survived=2, steps_lost=lost
        )
    told = [json.loads(line) for line in file.read_text().splitlines()]
    text = card_of([*LINES, *told], {})
    assert "| fail points killed at, went on from | 4, 4 |" in text and "| 1, 4 |" in text
    assert "points 4; survived 4; steps lost median 1, most 4" in row_of(text, 2)
    assert Card(None, "x").rounds(1, 2) == 1 and Card(str(file), "x").rounds(1, 2) == 2
