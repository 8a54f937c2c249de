"""Files that others wrote, read as data: every small one through one door, and one boundary for what readers
raise.

A small file (JSON, CSV, TOML, text) is a regular file of bounded size; its JSON has bounded depth and
numbers. Knows no format of ours, no torch.
"""

from __future__ import annotations

import json
import os
import re
import stat
import tomllib
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from chitu_diffusion.errors import ChituError, UsageError

MOST_BYTES = 16 * 2**20
"""Of a small file. The largest that models bring, a tokenizer of 256,000 pieces, has 17 MB: it says so."""
_MOST_DEPTH = 64
_MOST_DIGITS = 40  # tokenizers have a length of 1e30
_LONGEST_CAUSE = 300
_LONGEST_NAME = 40
_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISSOCK, "a socket"),
)


def require_regular(path: str | Path) -> os.stat_result:
    """What the system says of a file whose reader opens it by name.

    Raises:
        OSError: it is not there, or is a pipe, a device or a folder, which a reader might wait on for ever.
        ValueError: a name that no file can have.
    """
    return _regular(os.stat(path))


def _regular(found: os.stat_result) -> os.stat_result:
    if not stat.S_ISREG(found.st_mode):
        kind = next((name for is_kind, name in _KINDS if is_kind(found.st_mode)), "no file")
        raise OSError(f"it is {kind}; use a regular file")
    return found


class HeldFile:
    """A file that stays open: what is read of it is what was opened, whatever takes its name meanwhile.

    Attributes:
        stream: from its beginning at first.
    """

    def __init__(self, path: Path) -> None:
        self.stream = path.open("rb")
        weakref.finalize(self, self.stream.close)
        self._state = self._now()

    def require_unchanged(self) -> None:
        """Whether nobody has written into it since.

        Raises:
            OSError: somebody has.
        """
        now = self._now()
        if now != self._state:
            change = "become shorter" if now[0] < self._state[0] else "been written into"
            raise OSError(f"the file has {change} since it was opened; start again")

    def has_name(self, path: Path) -> bool:
        """Whether a name still leads to it."""
        return path.exists() and os.path.samestat(os.stat(path), os.fstat(self.stream.fileno()))

    def read(self, start: int, count: int) -> bytearray:
        """Bytes from a place on.

        Raises:
            OSError: it has changed, or has not as many.
        """
        self.require_unchanged()
        data = bytearray(count)
        self.stream.seek(start)
        if self.stream.readinto(data) < count:
            raise OSError(f"the file ends before byte {start + count}")
        return data

    def _now(self) -> tuple[int, int]:
        found = os.fstat(self.stream.fileno())
        return found.st_size, found.st_mtime_ns


def read_bytes(path: str | Path, most: int = MOST_BYTES) -> bytes:
    """The whole of a regular file.

    Raises:
        OSError: it is not there, is none, or cannot be read.
        ValueError: it has more than `most` bytes.
    """
    # a pipe without a writer would hold an open without O_NONBLOCK
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        size = min(
            _regular(os.fstat(handle)).st_size, most
        )  # a read claims what it is asked for, however short the file is
        with os.fdopen(handle, "rb", closefd=False) as stream:
            data = stream.read(size + 1)
            data += stream.read(most - size) if len(data) > size else b""
    finally:
        os.close(handle)
    if len(data) > most:
        raise ValueError(f"it has more than {most} bytes; a file of this kind is smaller")
    return data


def read_text(path: str | Path, most: int = MOST_BYTES, encoding: str = "utf-8") -> str:
    """A text file.

    Raises:
        OSError, ValueError: as `read_bytes`; not text of that encoding.
    """
    data = read_bytes(path, most)
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 text (byte {error.start}); save it as UTF-8") from None


def parse_json(text: str | bytes, *, checks_text: bool = True) -> Any:
    """A JSON text of bounded depth and numbers; its strings are text that can be written again.

    Args:
        checks_text: False where whoever asks looks at each string, and can name its field.

    Raises:
        ValueError: it is no such text; says why.
    """
    try:
        value = json.loads(text, parse_int=_whole, object_pairs_hook=_without_doubles)
    except RecursionError:
        raise ValueError(f"it is nested more than {_MOST_DEPTH} deep") from None
    _check_depth(value)
    lone = b"\\ud" if isinstance(text, bytes) else "\\ud"
    if checks_text and lone in text.lower():  # type: ignore[operator]  # both are of one kind
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("a string in it is not valid text: half of a surrogate pair") from None
    return value


def read_json(path: str | Path, most: int = MOST_BYTES) -> Any:
    """What a JSON file says.

    Raises:
        OSError, ValueError: as `read_text` and `parse_json`.
    """
    return parse_json(read_text(path, most))


def read_toml(path: Path) -> dict[str, Any]:
    """A settings file. Raises UsageError: it cannot be read."""
    try:
        return tomllib.loads(read_text(path))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"cannot read the settings file {path}: {cause(error)}") from error


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice[:_LONGEST_NAME]!r} stands twice in one object; leave one of them")
    return found


def _whole(digits: str) -> int:
    if len(digits) > _MOST_DIGITS:
        raise ValueError(f"a number in it has {len(digits)} digits; use at most {_MOST_DIGITS}")
    return int(digits)


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(_MOST_DEPTH):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return
    raise ValueError(f"it is nested more than {_MOST_DEPTH} deep")


def cause(error: BaseException) -> str:
    """A foreign error as one short line."""
    text = re.sub(r"\[Errno -?\d+\] ", "", " ".join(str(error).split()))
    if isinstance(error, OSError) and error.strerror:
        text = error.strerror
    elif isinstance(error, KeyError):
        text = f"{text} is missing"
    elif isinstance(error, RecursionError):
        text = "it is nested too deeply"
    elif isinstance(error, MemoryError):
        text = "it asks for more memory than there is"
    text = text or type(error).__name__
    return text if len(text) <= _LONGEST_CAUSE else text[: _LONGEST_CAUSE - 3] + "..."


@contextmanager
def foreign_data(refused: Callable[[str], ChituError]) -> Iterator[None]:
    """The boundary around a reader of what others wrote: whatever it raises becomes an error of ours.

    Args:
        refused: makes it from the cause in words.

    Errors of ours pass unchanged.
    """
    try:
        yield
    except (ChituError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except Exception as error:
        raise refused(cause(error)) from error
    except BaseException as error:
        # a panic of a library in Rust is no Exception
        if type(error).__name__ != "PanicException":
            raise
        raise refused(cause(error)) from error
