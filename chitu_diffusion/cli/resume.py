"""Where a command's unfinished videos lie, so that the same command goes on with them.

Checkpoints lie in the cache folder, in one folder for each request, named by a hash of all that was asked and
of the path. Several runs of one command that names no seed are several videos, so a folder is one run's at a
time. Knows names and locks; what a checkpoint is knows `pipelines.checkpoint`. Imports no torch.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from chitu_diffusion.config import EngineConfig
    from chitu_diffusion.task import DiffusionTask, DiffusionUserParams

_OLDEST = 14 * 86400.0
"""Seconds after which a checkpoint that nobody went on from is let go."""
_MOST_RUNS = 64
"""Of one command at once."""


@dataclass(frozen=True)
class VideoJob:
    """A task and what the command knows of it.

    Attributes:
        key: the name of its checkpoints.
        named_in: the folder for a file that is named by its seed; None for one that has a name.
        place: its number among all that were asked for, done ones too, and of how many; None: of this run.
    """

    task: DiffusionTask
    key: str
    named_in: str | None = None
    place: tuple[int, int] | None = None


def job_key(params: DiffusionUserParams, drawn: Sequence[str], config: EngineConfig) -> str:
    """The name of a request's checkpoints.

    Args:
        params: the request.
        drawn: fields that nobody asked for, and which are therefore others at each run.
        config: names the folder of files without a name.
    """
    asked = {name: value for name, value in params.to_mapping().items() if name not in drawn}
    path = params.save_path if "save_path" not in drawn else config.output.dir
    asked["save_path"] = str(Path(str(path)).absolute())
    return hashlib.sha256(json.dumps(asked, sort_keys=True, default=str).encode()).hexdigest()[:32]


def run_key(words: Sequence[str]) -> str:
    """The name of a command's own folder, by what tells it from others."""
    return hashlib.sha256(json.dumps(list(words)).encode()).hexdigest()[:32]


@contextmanager
def checkpoint_root(key: str | None, cache: Path | None) -> Iterator[Path | None]:
    """A folder for the checkpoints of a command's requests, this run's alone while it lasts; None where there
    can be none.

    Args:
        key: of `run_key`; None for none.
        cache: the folder for remembered facts.
    """
    if key is None or cache is None:
        yield None
        return
    root = cache / "checkpoints"
    try:
        root.mkdir(parents=True, exist_ok=True)
        _sweep(root)
        places = (root / f"{key}-{number}.lock" for number in range(_MOST_RUNS))
        lock = next((lock for place in places if (lock := _locked(place))), None)
    except OSError:
        lock = None  # a folder that cannot be written to: the video is made without
    if lock is None:
        yield None
        return
    stream, place = lock
    folder = place.with_suffix("")
    try:
        yield folder
    finally:
        with suppress(OSError):
            folder.rmdir()  # of no use once it is empty
        if not folder.exists():
            place.unlink(missing_ok=True)
        stream.close()


def _locked(place: Path) -> tuple[BinaryIO, Path] | None:
    """A lock that nobody has, taken; it goes with the process, however that ends."""
    stream = place.open("ab")
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        stream.close()
        return None
    return stream, place


def _sweep(root: Path) -> None:
    """Let go of folders that are old and nobody's."""
    for folder in root.glob("*-*"):
        with suppress(OSError):
            if not folder.is_dir() or time.time() - folder.stat().st_mtime < _OLDEST:
                continue
            place = folder.with_name(f"{folder.name}.lock")
            if (lock := _locked(place)) is not None:
                shutil.rmtree(folder)
                place.unlink(missing_ok=True)
                lock[0].close()
