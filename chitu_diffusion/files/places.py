"""Places that a person names: a home written as `~`, and whether anything can be written there.

Knows names and folders; no formats.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TypeVar

from chitu_diffusion.errors import UsageError

Place = TypeVar("Place")


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
