"""Small files through one door, and the boundary around foreign readers."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from chitu_diffusion.errors import CheckpointError, UsageError
from chitu_diffusion.files.reading import cause, foreign_data, parse_json, read_bytes, read_json, read_text


@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "loop"])
def test_only_regular_files_are_read(kind: str, tmp_path: Path) -> None:
    """A pipe without a writer would hold its reader for ever, /dev/zero would fill the memory."""
    place = tmp_path / "a.json"
    if kind == "pipe":
        os.mkfifo(place)
    elif kind == "folder":
        place.mkdir()
    else:
        place.symlink_to("/dev/zero" if kind == "device" else place.name)
    with pytest.raises(OSError, match="regular file|symbolic links"):
        read_text(place)


def test_a_file_has_a_limit_of_bytes(tmp_path: Path) -> None:
    place = tmp_path / "a.txt"
    place.write_bytes(b"x" * 11)
    assert read_bytes(place, 11) == b"x" * 11
    with pytest.raises(ValueError, match="more than 10 bytes"):
        read_bytes(place, 10)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 200_000, "nested more than 64 deep"),
        ("[" * 65 + "]" * 65, "nested more than 64 deep"),
        ('{"a": 1' + "0" * 400 + "}", "401 digits"),
        ('{"a": "\\ud800"}', "half of a surrogate pair"),
        ('{"a": {"seed": 1, "b": 3, "seed": 2}}', "'seed' stands twice"),
        ("{", "Expecting"),
    ],
)
def test_json_has_limits(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parse_json(text)


def test_json_within_the_limits_is_json(tmp_path: Path) -> None:
    value = {"a": [1, 2.5, None, True, 2**63 - 1], "b": json.loads("[" * 60 + "]" * 60), "c": "猫 \U0001f642"}
    (tmp_path / "a.json").write_text(json.dumps(value))
    assert read_json(tmp_path / "a.json") == value


def test_text_of_another_encoding_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("größe".encode("latin-1"))
    with pytest.raises(ValueError, match="not UTF-8 text \\(byte 2\\)"):
        read_text(tmp_path / "a.txt")


class PanicException(BaseException):  # the name is a foreign library's
    """As a panic in Rust arrives."""


@pytest.mark.parametrize("raised", [RecursionError(), MemoryError(), EOFError(), PanicException("panic")])
def test_whatever_a_reader_raises_becomes_ours(raised: BaseException) -> None:
    with (
        pytest.raises(CheckpointError, match="cannot be read: .+; file: a.json"),
        foreign_data(lambda why: CheckpointError(f"cannot be read: {why}", file="a.json")),
    ):
        raise raised


@pytest.mark.parametrize("raised", [UsageError("ours"), KeyboardInterrupt(), SystemExit(3)])
def test_what_is_no_fault_of_a_file_passes(raised: BaseException) -> None:
    with pytest.raises(type(raised)) as caught, foreign_data(CheckpointError):
        raise raised
    assert caught.value is raised


def test_a_cause_is_one_short_line() -> None:
    assert cause(ValueError("a\n\n b " + "x" * 1000)) == ("a b " + "x" * 1000)[:297] + "..."
    assert cause(KeyError("dim")) == "'dim' is missing"
    assert cause(EOFError()) == "EOFError"
