"""`manifest.json`: the SHA-256 that each file of a model's folder should have, and where that is known from.

It is shipped, or written when a model is fetched, converted or first used: into the folder, or, where that
cannot be written to, into the cache folder. Of the hub's cache no manifest is needed: a large file's blob is
called by its SHA-256. Knows folders and hashes; not what is in the files.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from chitu_diffusion.errors import CheckpointError
from chitu_diffusion.files.reading import cause, read_json
from chitu_diffusion.weights.files import few
from chitu_diffusion.weights.hashing import SHA256, FileHashes, ModelFiles, hashes_of, write_json

logger = logging.getLogger(__name__)

MANIFEST_FILE = "manifest.json"
Origin = Literal["shipped", "pull", "convert", "first use"]
_FORMAT = 1
_WEIGHTS = (".safetensors", ".pth", ".gguf")
_OTHERS = (".json", ".model")
_LARGEST_OTHER = 64 * 2**20
_OWN = frozenset({MANIFEST_FILE, "chitu.json", "flexcache.json"})
"""What its owner may change."""
_BY_FIRST_USE = "first use"


@dataclass(frozen=True)
class Manifest:
    """What a folder's files should be.

    Attributes:
        files: SHA-256 by path within the folder, with '/' between its parts.
        origin: see `Origin`; "hub cache" for names of blobs.
        place: the file that says it, or the folder of the blobs.
    """

    files: Mapping[str, str]
    origin: str
    place: Path

    def differing(self, model: ModelFiles, found: Mapping[Path, str]) -> list[Path]:
        """The files whose hash is another than is said here."""
        return [file for file, value in found.items() if self.files.get(model.name(file), value) != value]


def read_manifest(model: ModelFiles, cache_dir: Path | None = None) -> Manifest | None:
    """A model's manifest; None where it has none.

    Args:
        model: where it lies.
        cache_dir: where manifests of folders lie that cannot be written to, and those of files.

    Raises:
        CheckpointError: it cannot be used.
    """
    own = [] if model.names else [model.path / MANIFEST_FILE]
    for place in [*own, *([] if cache_dir is None else [_cached(model, cache_dir)])]:
        try:
            data = read_json(place)
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            raise _unusable(place, cause(error)) from error
        if not isinstance(data, dict) or not {"format", "origin", "files"} <= data.keys():
            continue  # somebody else's file of that name
        files = data["files"]
        if data["format"] != _FORMAT or not isinstance(files, dict) or not all(map(_is_entry, files.items())):
            raise _unusable(place, "it is not as this version writes it")
        return Manifest(files, str(data["origin"])[:20], place)
    return _of_hub_cache(model.path)


def write_manifest(
    model: ModelFiles, origin: Origin, known: Mapping[Path, str] | None = None, cache_dir: Path | None = None
) -> Path | None:
    """Writes what a model's files are now; whole or not at all.

    Args:
        known: hashes that need not be found out.
        cache_dir: takes it where the folder cannot be written to, has another file of that name, or is none.

    Returns:
        the file; None where there is no place for it.

    Raises:
        CheckpointError: a file cannot be read.
    """
    folder = model.path
    known = {file: value for file, value in (known or {}).items() if model.has(file)}
    others = [
        file
        for file in listed_files(folder)
        # of whatever weights lie about, those that were used
        if file not in known and (origin != _BY_FIRST_USE or file.suffix not in _WEIGHTS)
    ]
    found = {**known, **(hashes_of(others) if others else {})}
    files = {model.name(file): value for file, value in sorted(found.items())}
    own = folder / MANIFEST_FILE
    places = [] if model.names or (own.exists() and origin == _BY_FIRST_USE) else [own]
    for place in [*places, *([] if cache_dir is None else [_cached(model, cache_dir)])]:
        try:
            if place != own:
                place.parent.mkdir(parents=True, exist_ok=True)
            return write_json(place, {"format": _FORMAT, "origin": origin, "files": files})
        except OSError as error:
            logger.debug("no manifest in %s: %s", place, error)
    return None


def downloaded(folder: Path) -> dict[Path, str]:
    """SHA-256 of the large files in a folder that the hub's client filled, as the hub gave them: the second
    line of its notes beside them.
    """
    notes = folder / ".cache" / "huggingface" / "download"
    found = {}
    for file in listed_files(folder):
        note = notes / f"{file.relative_to(folder).as_posix()}.metadata"
        lines = note.read_text(encoding="utf-8").split("\n") if note.is_file() else []
        if len(lines) > 1 and SHA256.fullmatch(lines[1].strip()):
            found[file] = lines[1].strip()
    return found


def listed_files(folder: Path) -> list[Path]:
    """What a manifest lists of a folder: weights, their indexes, configs and the tokenizer."""
    return sorted(
        file
        for file in folder.rglob("*")
        if file.suffix in (*_WEIGHTS, *_OTHERS)
        and not (file.parent == folder and file.name in _OWN)
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
        and file.is_file()
        and (file.suffix in _WEIGHTS or file.stat().st_size <= _LARGEST_OTHER)
    )


class LoadedFolder:
    """Which bytes the weights of a loaded model are: hashed from when they were opened, compared with the
    folder's manifest, which is written where there is none.

    Args:
        model: where it lies.
        files: those of its files that hold weights; opened here, so make this before they are read.
        cache_dir: the folder for remembered facts.

    Raises:
        CheckpointError: a file cannot be opened.
    """

    def __init__(self, model: ModelFiles, files: Sequence[Path], cache_dir: Path | None = None) -> None:
        self._model = model
        self._cache_dir = cache_dir
        self._manifest = _usable_manifest(model, cache_dir)
        self._hashes = FileHashes(files, cache_dir, self._record)

    def settle(self) -> None:
        """The weights have been read.

        Raises:
            CheckpointError: they changed meanwhile, or are not what the manifest says that came with them.
                Of large files that are hashed for the first time this is a warning, later.
        """
        self._hashes.settle()
        found = self._hashes.values() if self._hashes.is_known else None
        wrong = [] if self._manifest is None else self._manifest.differing(self._model, found or {})
        if wrong and self._manifest is not None and self._manifest.origin != _BY_FIRST_USE:
            raise CheckpointError(_differs(self._manifest), file=wrong[0], remedy=_remedy(self._manifest))

    @property
    def is_known(self) -> bool:
        """Whether `sha256` would not wait."""
        return self._hashes.is_known

    def sha256(self) -> str | None:
        """One hash of all weights, see `sha256_of`; None where they cannot be known any more."""
        found = self._hashes.values()
        return None if found is None else sha256_of(self._model, found)

    def close(self) -> None:
        """Let go of the files."""
        self._hashes.close()

    def _record(self, found: Mapping[Path, str], in_place: bool) -> None:
        if self._manifest is not None:
            for file in self._manifest.differing(self._model, found):
                logger.warning("%s: %s; %s", file, _differs(self._manifest), _remedy(self._manifest))
            return
        try:
            if in_place:
                write_manifest(self._model, "first use", found, self._cache_dir)
        except CheckpointError as error:
            logger.debug("no manifest of %s: %s", self._model, error)


def sha256_of(model: ModelFiles, found: Mapping[Path, str]) -> str:
    """One hash of several files: SHA-256 over their "name sha256" lines, in the order of their names as
    paths; see `ModelFiles.name`.
    """
    named = sorted((PurePosixPath(model.name(file)), value) for file, value in found.items())
    lines = (f"{name} {value}\n" for name, value in named)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def problem_with(model: ModelFiles, names: Sequence[str], manifest: Manifest) -> str | None:
    """What is wrong with files that a manifest names; None for nothing.

    Raises:
        CheckpointError: one cannot be read.
    """
    files = [model.file(name) for name in names]
    absent = [file for file in files if not file.is_file()]
    if absent:
        return f"{few(map(model.name, absent))}: missing; {manifest.place.name} names it"
    wrong = manifest.differing(model, hashes_of(files)) if files else []
    if not wrong:
        return None
    return f"{few(map(model.name, wrong))}: {_differs(manifest)}; {_remedy(manifest)}"


def _usable_manifest(model: ModelFiles, cache_dir: Path | None) -> Manifest | None:
    try:
        return read_manifest(model, cache_dir)
    except CheckpointError as error:
        logger.warning("%s", error)
        return None


def _differs(manifest: Manifest) -> str:
    return f"its SHA-256 is not the one in {manifest.place.name} (from {manifest.origin})"


def _remedy(manifest: Manifest) -> str:
    if manifest.origin == "hub cache":
        return "the file is damaged: delete it, and fetch it again with 'chitu models pull NAME'"
    return f"it is damaged: fetch the model again; or, if you changed it yourself, delete {manifest.place}"


def _cached(model: ModelFiles, cache_dir: Path) -> Path:
    """Of files that lie apart each choice has its own."""
    places = sorted(str(path.resolve()) for path in model.names or [model.path])
    digest = hashlib.sha256("\n".join(places).encode()).hexdigest()[:32]
    return cache_dir / "manifests" / f"{digest}.json"


def _of_hub_cache(folder: Path) -> Manifest | None:
    """The names of the blobs that a snapshot's links lead to; those of 64 digits are SHA-256."""
    blobs = folder.parent.parent / "blobs"
    if folder.parent.name != "snapshots" or not blobs.is_dir():
        return None
    targets = {file: file.resolve() for file in listed_files(folder) if file.is_symlink()}
    files = {
        file.relative_to(folder).as_posix(): target.name
        for file, target in targets.items()
        if target.parent.name == "blobs" and SHA256.fullmatch(target.name)
    }
    return Manifest(files, "hub cache", blobs) if files else None


def _is_entry(item: tuple[object, object]) -> bool:
    name, value = item
    path = PurePosixPath(str(name))
    plain = isinstance(name, str) and name.isprintable() and not path.is_absolute() and ".." not in path.parts
    return plain and isinstance(value, str) and SHA256.fullmatch(value) is not None


def _unusable(place: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"the manifest cannot be used: {reason}", file=place, remedy="delete the file; it is written again"
    )
