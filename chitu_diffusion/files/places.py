"""Places that a person names: a home written as `~`, and whether anything can be written there.

Knows names and folders; no formats.
"""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from chitu_diffusion.errors import UsageError
from chitu_diffusion.files.atomic import new_file

Place = TypeVar("Place")
_PROBE_BYTES = 4096


def expand_home(place: Place) -> Place:
    """A file's or folder's name with the home for its `~`, as a shell has it; anything else as it is."""
    return type(place)(os.path.expanduser(str(place))) if isinstance(place, str | Path) else place


def require_writable(folder: Path) -> None:
    """Whether a file can be made in a folder that is there: one without a name is, and goes at once. Access
    rights alone do not tell: root has them in /proc, too.

    Raises:
        OSError: it cannot.
    """
    with tempfile.TemporaryFile(dir=folder):
        pass


def make_folder(flag: str, folder: Path | None) -> None:
    """The folder that a flag names, made before any work is done; None makes none.

    Raises:
        UsageError: it cannot be made or written to, naming the flag.
    """
    if folder is None:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        require_writable(folder)
    except OSError as error:
        raise UsageError(
            f"{flag} {folder}: {error.strerror or error}; use another folder", field=flag
        ) from error


class _Enough(Exception):
    """A file could be written, and is not wanted."""


def why_not_writable(folder: Path) -> str | None:
    """Why no file can be made in a folder, which may be made for it; None where one can. Nothing stays."""
    try:
        with suppress(_Enough), new_file(folder / "probe") as part:
            part.write_bytes(bytes(_PROBE_BYTES))
            raise _Enough
    except (OSError, ValueError) as error:
        return (error.strerror if isinstance(error, OSError) else None) or str(error)
    return None


def made_folder(folder: Path) -> Path | None:
    """A folder, made if need be; None where it cannot."""
    with suppress(OSError, ValueError):
        folder.mkdir(parents=True, exist_ok=True)
    return folder if folder.is_dir() else None


def temporary_folder() -> Path | None:
    """Where files lie that nobody keeps; None where there is no such place, as in a read-only container."""
    try:
        return Path(tempfile.gettempdir())
    except FileNotFoundError:
        return None


def identity(place: str | os.PathLike[str]) -> tuple[int, ...] | None:
    """What tells the file or folder at a name from any other that may stand there; None where none does."""
    try:
        state = os.lstat(place)
    except OSError:
        return None
    return state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns
