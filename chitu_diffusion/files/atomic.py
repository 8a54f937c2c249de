"""Files and folders that appear whole or not at all; every file of the package is written through here.

Knows names in progress, whose they are, and how the newer takes the older's place: in one rename, or one
exchange. Two writers of one name need no lock: each look finds the whole of one of them. Knows no formats.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path

from chitu_diffusion.files.faults import hit

_IN_PROGRESS = re.compile(r"\.(?P<name>.+)\.[0-9a-f]{8}\.(part|old)", re.DOTALL)
_OLD = ".old"
"""Ending of a folder that stepped aside where a file system cannot exchange two of them."""
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
"""Of Linux's renameat2."""


@contextmanager
def new_file(
    target: str | os.PathLike[str], *, around: Callable[[Path], AbstractContextManager[None]] | None = None
) -> Iterator[Path]:
    """A file to fill, which takes the target's name when the block ends well.

    Until then what stands at that name stays, and after an error nothing else is left. Missing folders are
    made. A link of that name is replaced, not followed.

    Args:
        target: the final name.
        around: is entered with the filled file before it takes its name, and left after.

    Raises:
        OSError: it cannot be written.
    """
    target = Path(target)
    with _in_progress(target, folder=False) as part:
        yield part
        hit("file.filled", target)
        _sync(part)
        with around(part) if around else nullcontext():
            hit("file.rename", target)
            os.replace(part, target)
            hit("file.renamed", target)
        _sync_names(target.parent)


@contextmanager
def new_folder(target: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder to fill, likewise: it takes the place of the folder of that name, which then goes.

    Raises:
        OSError: it cannot be written, or a file has that name.
    """
    target = Path(target)
    with _in_progress(target, folder=True) as part:
        yield part
        for place in sorted(part.rglob("*"), reverse=True):
            _sync(place)
        hit("file.filled", target)
        _sync(part)
        hit("file.rename", target)
        _put_folder(part, target)
        hit("file.renamed", target)
        _sync_names(target.parent)


def write_text(target: str | os.PathLike[str], text: str) -> Path:
    """A whole file of UTF-8 text; returns its path.

    Raises:
        OSError: it cannot be written.
    """
    with new_file(target) as part:
        part.write_text(text, encoding="utf-8")
    return Path(target)


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Alone among those who ask for the same, where the file system has locks."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def free_space(place: str | os.PathLike[str]) -> tuple[int, Path, int]:
    """Bytes free where a file or folder would be made, the folder that is there, and its device's number.

    Raises:
        OSError: it cannot be asked.
    """
    folder = Path(place).absolute()
    while not folder.is_dir():
        folder = folder.parent
    return shutil.disk_usage(folder).free, folder, folder.stat().st_dev


def is_in_progress(name: str) -> bool:
    """Whether a name is one of those that only this module gives."""
    return _IN_PROGRESS.fullmatch(name) is not None


@contextmanager
def _in_progress(target: Path, *, folder: bool) -> Iterator[Path]:
    missing = [place for place in target.absolute().parents if not place.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _sweep(target)
        part, handle = _claim(target, folder=folder)
        try:
            hit("file.begin", target)
            yield part
        finally:
            with suppress(OSError):
                _remove(part)  # of an error; or, after an exchange, the older folder
            os.close(handle)
    except BaseException:
        for place in missing:
            with suppress(OSError):
                place.rmdir()
        raise


def _claim(target: Path, *, folder: bool) -> tuple[Path, int]:
    """A name that nobody has, and a lock on it, which goes with this process however that ends."""
    while True:
        part = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
        try:
            if folder:
                part.mkdir()
            flags = os.O_RDONLY if folder else os.O_CREAT | os.O_EXCL | os.O_RDWR
            handle = os.open(part, flags, 0o666)
        except FileExistsError:
            continue
        if _lock(handle) and _is_at(handle, part):
            return part, handle
        os.close(handle)  # a sweeper was quicker than the lock


def _lock(handle: int) -> bool:
    """False where another one has it; file systems without locks count as having given it."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def _is_at(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.lstat(path))
    except FileNotFoundError:
        return False


def _sweep(target: Path) -> None:
    """Remove what a killed writer left of a target; a living one's is locked. An older folder that stepped
    aside comes back if nothing stands in its place.
    """
    with os.scandir(target.parent) as entries:
        names = [entry.name for entry in entries]
    for name in names:
        found = _IN_PROGRESS.fullmatch(name)
        if found is None or found["name"] != target.name:
            continue
        path = target.with_name(name)
        with suppress(OSError):
            handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if path.suffix == _OLD and not os.path.lexists(target):
                    os.rename(path, target)
                elif _is_at(handle, path):
                    _remove(path)
            finally:
                os.close(handle)


def _put_folder(part: Path, target: Path) -> None:
    """The folder `part` is at `target`; what stood there is at `part`."""
    while True:
        try:
            os.rename(part, target)  # where nothing stands, or an empty folder
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        with suppress(FileNotFoundError):  # what stood there went meanwhile
            if not _exchange(part, target):
                _step_aside(part, target)
            return


def _exchange(a: Path, b: Path) -> bool:
    """Two names change places at once; False where the system or the file system cannot do that."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:
        return False
    if rename(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number), str(b))


def _step_aside(part: Path, target: Path) -> None:
    """`_exchange` in three renames: killed after the first, `_sweep` brings the older back."""
    old = part.with_suffix(_OLD)
    handle = os.open(target, os.O_RDONLY)
    try:
        _lock(handle)
        os.rename(target, old)
        try:
            os.rename(part, target)
        except BaseException:
            os.rename(old, target)
            raise
        os.rename(old, part)
    finally:
        os.close(handle)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Everything of a file (or a folder's list of names) is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sync_names(folder: Path) -> None:
    with suppress(OSError):  # the new one stands already
        _sync(folder)
