"""Files spoilt at random, from a fixed seed, and a limit of time for each."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

ODD_VALUES: tuple[Any, ...] = (
    None,
    True,
    0,
    -1,
    1,
    3,
    100_000,
    2**31,
    2**63,
    10**400,
    0.5,
    -0.0,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "x",
    "a" * 5000,
    "../../etc/passwd",
    "\x1b[31m",
    "\ud800",
    "\0",
    [],
    [[]],
    [1] * 1000,
    [10**400],
    [None],
    {},
    {"a": {}},
)


@contextmanager
def within(seconds: float, case: str) -> Iterator[None]:
    """Fails what takes longer, wherever it waits."""

    def late(_: int, __: FrameType | None) -> None:
        raise AssertionError(f"{case}: not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def most_memory() -> int:
    """Bytes of memory that this process has ever had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def changed(value: Any, chance: random.Random) -> Any:
    """A JSON value with one thing in it changed: a value, a field more or less, a number scaled."""
    if isinstance(value, dict) and value and chance.random() < 0.85:
        key = chance.choice(sorted(value))
        how = chance.random()
        if how < 0.1:
            return {name: inner for name, inner in value.items() if name != key}
        if how < 0.15:
            return {**value, chance.choice(("", "x", "auto_map", "a" * 300)): chance.choice(ODD_VALUES)}
        return {**value, key: changed(value[key], chance)}
    if isinstance(value, list) and value and chance.random() < 0.6:
        place = chance.randrange(len(value))
        return [*value[:place], changed(value[place], chance), *value[place + 1 :]]
    if isinstance(value, int | float) and chance.random() < 0.3:
        return value * chance.choice((-1, 0, 2, 1000, 1e9))
    return chance.choice(ODD_VALUES)


def spoil_json(file: Path, chance: random.Random) -> str:
    """Changes one thing in a JSON file."""
    file.write_text(json.dumps(changed(json.loads(file.read_text()), chance)))
    return f"{file.name} changed"


def spoil_bytes(file: Path, chance: random.Random) -> str:
    """Cuts a file, flips bits in its first part, or puts noise, HTML or nothing in its place."""
    data = bytearray(file.read_bytes())
    how = chance.choice(("cut", "flip", "noise", "html", "deep", "empty", "longer", "header"))
    if how == "cut":
        data = data[: chance.randrange(len(data) + 1)]
    elif how in ("flip", "header"):
        for _ in range(chance.randint(1, 8)):
            data[chance.randrange(min(len(data), 16 if how == "header" else 2000))] = chance.randrange(256)
    else:
        data = {
            "noise": bytearray(chance.randbytes(500)),
            "html": bytearray(b"<html>404</html>"),
            "deep": bytearray(b"[" * 200_000),
            "empty": bytearray(),
            "longer": data + b"\0" * 100,
        }[how]
    file.write_bytes(data)
    return f"{file.name}: {how}"


def spoil_place(file: Path, chance: random.Random) -> str:
    """Puts a pipe, a device, a folder, a bad link or nothing where a file was, or takes its permission."""
    how = chance.choice(("pipe", "device", "folder", "loop", "nothing", "permission", "dangling"))
    if how == "permission":
        file.chmod(0)
        return f"{file.name}: {how}"
    file.unlink()
    if how == "pipe":
        os.mkfifo(file)
    elif how == "folder":
        file.mkdir()
    elif how != "nothing":
        file.symlink_to({"device": "/dev/zero", "loop": file.name, "dangling": "gone"}[how])
    return f"{file.name}: {how}"


def spoil(file: Path, chance: random.Random, *, is_json: bool) -> str:
    """One of the three above; says what was done."""
    how = chance.random()
    if is_json and how < 0.65:
        return spoil_json(file, chance)
    return spoil_bytes(file, chance) if how < 0.85 else spoil_place(file, chance)


def linked_copy(source: Path, target: Path, file: str) -> Path:
    """A folder like `source`, whose one file is its own and may be spoilt; the others are links."""
    for entry in source.rglob("*"):
        place = target / entry.relative_to(source)
        if entry.is_dir():
            continue
        place.parent.mkdir(parents=True, exist_ok=True)
        if str(entry.relative_to(source)) == file:
            shutil.copyfile(entry, place)
        else:
            place.symlink_to(entry)
    return target / file
