"""Files and programs are read as UTF-8 whatever the locale is: the package leaves no encoding open."""

from __future__ import annotations

import ast
import re

import pytest
from test_house_rules import ours, report


def test_text_has_an_encoding() -> None:
    """Else the locale decides what a file says."""
    found = [
        f"{name}:{node.lineno} {ast.unparse(node.func)}"
        for name, tree, _ in ours()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and reads_by_locale(node)
    ]
    report(found, 'add encoding="utf-8"')


def reads_by_locale(call: ast.Call) -> bool:
    """Whether a call reads or writes text and leaves its encoding open."""
    words = {word.arg: ast.unparse(word.value) for word in call.keywords}
    called = ast.unparse(call.func)
    name = called.rpartition(".")[2]
    modes = [value.value for value in call.args if isinstance(value, ast.Constant)]
    mode = words.get("mode", "").strip("'") or next(
        (mode for mode in modes if isinstance(mode, str) and re.fullmatch("[rwxabt+]{1,3}", mode)), ""
    )
    text = (
        name in {"read_text", "write_text"}
        or (called in {"open", "os.fdopen", "io.open"} and "b" not in mode)
        or (name == "open" and bool(mode) and "b" not in mode)
        or "True" in (words.get("text"), words.get("universal_newlines"))
    )
    # files.reading's read_text and files.atomic's write_text are functions, and always UTF-8
    return text and "encoding" not in words and called not in {"read_text", "write_text", "av.open"}


@pytest.mark.parametrize(
    ("line", "open_"),
    [
        ("open(p)", True),
        ("open(p, 'rb')", False),
        ("Path(p).open('w')", True),
        ("p.open('ab')", False),
        ("p.read_text()", True),
        ("p.write_text(x, encoding='utf-8')", False),
        ("subprocess.run(x, text=True)", True),
        ("os.fdopen(h, 'wb')", False),
        ("groups.open()", False),
    ],
)
def test_text_without_an_encoding_is_found(line: str, open_: bool) -> None:
    assert reads_by_locale(ast.parse(line).body[0].value) is open_  # type: ignore[attr-defined]
