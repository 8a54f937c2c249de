"""SHA-256 of files, by several threads, from descriptors that are open before anything is read from them.

What is hashed is what was loaded: a file that is replaced, moved or deleted later is another one, and the
descriptor still reads the old. Hashes are remembered between runs by path, size, times and inode; a memory
that cannot be read is as none. Knows files; no tensors, no models.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import Path
from typing import Any

from chitu_diffusion.errors import CheckpointError
from chitu_diffusion.files.atomic import write_text
from chitu_diffusion.files.reading import cause, read_json, require_regular

logger = logging.getLogger(__name__)

SHA256 = re.compile(r"[0-9a-f]{64}")
_THREADS = 4
_CHUNK = 4 * 2**20
_QUICK = 64 * 2**20
"""Bytes of all files together that are hashed while they are loaded, and waited for: a fraction of a second.
"""
_FIRST_WORD = 1.0
"""Seconds after which whoever waits says so."""
_NEXT_WORD = 5.0
_MEMORY_FILE = "weights-sha256.json"


@dataclass(frozen=True)
class ModelFiles:
    """Where a model's files lie, and what each of them is called in manifests and hashes.

    Attributes:
        path: the model's folder, in which files have their paths; or the first of files that lie apart.
        names: of files that lie apart: what they are called, wherever they lie.
    """

    path: Path
    names: Mapping[Path, str] = field(default_factory=dict)

    def name(self, file: Path) -> str:
        """What a file is called."""
        return self.names.get(file) or file.relative_to(self.path).as_posix()

    def file(self, name: str) -> Path:
        """Which file is called so."""
        return next((file for file, known in self.names.items() if known == name), self.path / name)

    def has(self, file: Path) -> bool:
        """Whether a file is one of these."""
        return file in self.names if self.names else file.is_relative_to(self.path)


@dataclass
class _OpenFile:
    path: Path
    stream: BufferedReader
    state: os.stat_result
    found: str | None = None

    def is_same(self, state: os.stat_result) -> bool:
        """Whether a file is this one, with what was in it when it was opened."""
        mine = self.state
        return (mine.st_dev, mine.st_ino, mine.st_size, mine.st_mtime_ns) == (
            state.st_dev,
            state.st_ino,
            state.st_size,
            state.st_mtime_ns,
        )

    def is_in_place(self) -> bool:
        """Whether its path still leads to it."""
        try:
            return self.is_same(os.stat(self.path))
        except OSError:
            return False


class FileHashes:
    """SHA-256 of some files, of their bytes when this object was made.

    Make it before the files are read, call `settle` after that. Nobody waits before `values` is asked for,
    but for files that are small together.

    Args:
        files: which.
        cache_dir: where hashes are remembered between runs; None: nowhere.
        on_found: called when all are found, with the hash of each, and whether they still lie where they lay.

    Raises:
        CheckpointError: a file that cannot be opened.
    """

    def __init__(
        self,
        files: Sequence[Path],
        cache_dir: Path | None = None,
        on_found: Callable[[Mapping[Path, str], bool], None] = lambda found, in_place: None,
    ) -> None:
        self._memory = None if cache_dir is None else cache_dir / _MEMORY_FILE
        self._on_found = on_found
        self._files: list[_OpenFile] = []
        self._lock = threading.Lock()
        self._done = 0
        self._running = 0
        self._stopped = False
        self._over = threading.Event()
        try:
            for path in files:
                require_regular(path)  # to open a pipe would be to wait for ever
                stream = path.open("rb")
                self._files.append(_OpenFile(path, stream, os.fstat(stream.fileno())))
        except OSError as error:
            self.close()
            raise CheckpointError(f"a weights file cannot be opened: {cause(error)}", file=path) from error
        self._total = sum(file.state.st_size for file in self._files)
        self._is_quick = self._total <= _QUICK
        self._recall()
        # the largest first, so that the threads end together
        self._waiting = sorted(
            (file for file in self._files if file.found is None), key=lambda file: file.state.st_size
        )
        if self._is_quick:
            self._start()

    def settle(self) -> None:
        """The files have been read.

        Raises:
            CheckpointError: one is not what it was when the reading began.
        """
        for file in self._files:
            if not file.is_in_place():
                raise CheckpointError(
                    "a weights file was replaced or changed while it was read",
                    file=file.path,
                    remedy="load the model again once nobody writes into its folder",
                )
        is_soon_over = self._is_quick or not self._waiting
        if not self._is_quick:
            self._start()
        if is_soon_over:
            self._over.wait()

    @property
    def is_known(self) -> bool:
        """Whether `values` would not wait."""
        return self._over.is_set()

    def values(self) -> Mapping[Path, str] | None:
        """The hash of each file, by path; None where they could not be found out, which a warning has told.
        Who waits longer than a second is told how far it is.
        """
        patience = _FIRST_WORD
        while not self._over.wait(patience):
            patience = _NEXT_WORD
            logger.warning(
                "waiting for the SHA-256 of the weights: %.0f %% of %.1f GiB",
                100 * self._done / max(1, self._total),
                self._total / 2**30,
            )
        found = {file.path: file.found for file in self._files if file.found is not None}
        return found if len(found) == len(self._files) else None

    def close(self) -> None:
        """Let go of the files; what is not known then stays unknown."""
        with self._lock:
            self._stopped = True
            if not self._running:
                self._let_go()

    def _start(self) -> None:
        count = min(_THREADS, len(self._waiting))
        self._running = max(1, count)
        for _ in range(self._running):
            threading.Thread(target=self._work, name="chitu-weights-hash", daemon=True).start()

    def _work(self) -> None:
        try:
            while (file := self._next()) is not None:
                self._hash(file)
        except (OSError, ValueError) as error:
            logger.warning("the weights in %s could not be hashed: %s", self._files[0].path.parent, error)
        finally:
            with self._lock:
                self._running -= 1
                last = not self._running
            if last:
                self._end()

    def _next(self) -> _OpenFile | None:
        with self._lock:
            return self._waiting.pop() if self._waiting and not self._stopped else None

    def _hash(self, file: _OpenFile) -> None:
        digest = hashlib.sha256()
        buffer = memoryview(bytearray(_CHUNK))
        file.stream.seek(0)
        while not self._stopped and (count := file.stream.readinto(buffer)):
            digest.update(buffer[:count])
            with self._lock:
                self._done += count
        if self._stopped:
            return
        if file.is_same(os.fstat(file.stream.fileno())):
            file.found = digest.hexdigest()
        else:
            logger.warning(
                "%s was written into after it was loaded: nobody can say any more what it held", file.path
            )

    def _end(self) -> None:
        found = {file.path: file.found for file in self._files if file.found is not None}
        try:
            if len(found) == len(self._files):
                in_place = all(file.is_in_place() for file in self._files)
                if in_place:
                    self._remember()
                self._on_found(found, in_place)
        finally:
            self._let_go()

    def _let_go(self) -> None:
        for file in self._files:
            file.stream.close()
        self._over.set()

    # -- the memory

    def _recall(self) -> None:
        known = {} if self._memory is None else _read_memory(self._memory)
        for file in self._files:
            entry = known.get(str(file.path.resolve()))
            if isinstance(entry, list) and entry[:-1] == _stamp(file.state):
                file.found = str(entry[-1])
                self._done += file.state.st_size

    def _remember(self) -> None:
        if self._memory is None:
            return
        fresh = {str(file.path.resolve()): [*_stamp(file.state), file.found] for file in self._files}
        known = _read_memory(self._memory)
        if known == (merged := {**known, **fresh}):
            return
        try:
            self._memory.parent.mkdir(parents=True, exist_ok=True)
            write_json(self._memory, merged)
        except OSError as error:
            # the next run hashes them once more
            logger.debug("cannot remember the weights' hashes in %s: %s", self._memory, error)


def hashes_of(files: Sequence[Path], cache_dir: Path | None = None) -> Mapping[Path, str]:
    """SHA-256 of files, waited for; see `FileHashes`.

    Raises:
        CheckpointError: one cannot be read, or is written into meanwhile.
    """
    hashes = FileHashes(files, cache_dir)
    hashes.settle()
    found = hashes.values()
    if found is None:
        raise CheckpointError("files could not be hashed", file=files[0].parent)
    return found


def write_json(file: Path, data: Mapping[str, Any]) -> Path:
    """Writes an object as JSON; returns the file."""
    return write_text(file, json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def _stamp(state: os.stat_result) -> list[int]:
    return [state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino]


def _read_memory(memory: Path) -> dict[str, Any]:
    try:
        data = read_json(memory)
    except (OSError, ValueError):
        return {}  # a spoilt memory costs one more hashing, nothing else
    entries = data.items() if isinstance(data, dict) else ()
    return {
        path: entry
        for path, entry in entries
        if isinstance(entry, list) and len(entry) == 5 and SHA256.fullmatch(str(entry[-1]))
    }
