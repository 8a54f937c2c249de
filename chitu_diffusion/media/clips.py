"""Frames out of videos that others made: which containers, how many frames, within which limits. Knows file
formats; no request.

FFmpeg is told the container and never guesses one: some of its readers follow addresses that a file names.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from chitu_diffusion.errors import UsageError
from chitu_diffusion.files.reading import foreign_data, require_regular
from chitu_diffusion.media.image import bytes_of, decoded
from chitu_diffusion.media.reading import check_size, image_in, mapped_array
from chitu_diffusion.media.video import FOLDER, local_name

if TYPE_CHECKING:
    from numpy.typing import NDArray

MOST_FRAMES = 4001
"""That are counted, and that a request may take."""
_MOST_BYTES = 4 * 2**30
_CONTAINERS: Mapping[str, str] = MappingProxyType(
    {".mp4": "mp4", ".m4v": "mp4", ".mov": "mp4", ".webm": "matroska", ".mkv": "matroska"}
)
"""By a file's ending, FFmpeg's name of its reader."""
ENDINGS = (*_CONTAINERS, ".gif", ".npy")

Facts = tuple[int, int, int, Any]
"""Frames, height, width, frames per second or None."""


def clip_sha256(path: Path) -> str:
    """Of a file's bytes, or of all frames of a folder, with their names.

    Raises:
        OSError: it is not there, or is no file.
        ValueError: it has too many bytes.
    """
    digest = hashlib.sha256()
    files = _pngs(path) if path.is_dir() else [path]
    if sum(require_regular(file).st_size for file in files) > _MOST_BYTES:
        raise ValueError(f"it has more than {_MOST_BYTES} bytes; cut out what shall be taken")
    for file in files:
        if file != path:
            digest.update(f"{file.name}\n".encode())
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def clip_facts(path: str | os.PathLike[str], name: str = "video") -> Facts:
    """What a video has; of its frames only the first is decoded.

    Args:
        name: of the field, for errors.

    Raises:
        UsageError: nothing of that name, or what cannot be read.
    """
    readers: dict[str, Callable[[Path], Facts]] = {".gif": _gif_facts, ".npy": _npy_facts, FOLDER: _png_facts}
    with _reading(path, name) as (file, kind):
        return readers.get(kind, _movie_facts)(file)


def clip_frames(path: str | os.PathLike[str], name: str = "video") -> Iterator[NDArray[Any]]:
    """Its frames in order, [H, W, 3] uint8, or float32 in [0, 1] from an array of floats.

    Raises:
        UsageError: as `clip_facts`; frames of several sizes.
    """
    readers: dict[str, Callable[[Path], Iterator[NDArray[Any]]]] = {
        ".gif": _gif_frames,
        ".npy": _npy_frames,
        FOLDER: _png_frames,
    }
    first: tuple[int, ...] | None = None
    with _reading(path, name) as (file, kind):
        for frame in readers.get(kind, _movie_frames)(file):
            first = first or frame.shape
            if frame.shape != first:
                raise ValueError(f"a frame has {frame.shape[:2]} pixels and the first {first[:2]}")
            yield frame


@contextmanager
def _reading(path: str | os.PathLike[str], name: str) -> Iterator[tuple[Path, str]]:
    """The file and its kind; what its reader raises becomes an error of ours."""
    file = Path(path)
    kind = FOLDER if file.is_dir() else file.suffix.lower()
    with foreign_data(lambda cause: UsageError(f"{name} = '{file}' cannot be read: {cause}", field=name)):
        if kind != FOLDER:
            require_regular(file)
            if kind not in ENDINGS:
                raise ValueError(f"use {', '.join(ENDINGS)}, or a folder of png frames")
        yield file, kind


@contextmanager
def _movie(file: Path) -> Iterator[tuple[Any, Any]]:
    """A container and its first stream of pictures."""
    import av

    with av.open(local_name(file), format=_CONTAINERS[file.suffix.lower()]) as container:
        if not container.streams.video:
            raise ValueError("there is no picture in it")
        stream = container.streams.video[0]
        check_size(stream.height or 0, stream.width or 0)
        yield container, stream


def _movie_facts(file: Path) -> Facts:
    with _movie(file) as (container, stream):
        first = next(_upright(container.decode(stream)), None)
        if first is None:
            raise ValueError("no picture in it can be decoded; it may be cut off")
        height, width = first.shape[:2]
        rate = stream.average_rate
    with _movie(file) as (container, stream):
        count = 0
        for packet in container.demux(stream):
            count += bool(packet.size) and not packet.is_corrupt and not packet.is_discard
            if count == MOST_FRAMES:
                break
    return count, height, width, rate


def _movie_frames(file: Path) -> Iterator[NDArray[Any]]:
    with _movie(file) as (container, stream):
        yield from _upright(container.decode(stream))


def _upright(frames: Iterator[Any]) -> Iterator[NDArray[Any]]:
    """As they are shown: a phone's film lies on its side, with a note beside it."""
    import numpy as np

    for frame in frames:
        check_size(frame.height, frame.width)
        turned = np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90))
        yield np.ascontiguousarray(turned)


def _gif_facts(file: Path) -> Facts:
    from PIL import ImageSequence

    with image_in(file) as image:
        count = min(image.n_frames, MOST_FRAMES)
        shown = [
            frame.info.get("duration", 0)
            for frame, _ in zip(ImageSequence.Iterator(image), range(count), strict=False)
        ]
        rate = 1000 * count / sum(shown) if sum(shown) else None
        return count, image.height, image.width, rate


def _gif_frames(file: Path) -> Iterator[NDArray[Any]]:
    import numpy as np
    from PIL import ImageSequence

    with image_in(file) as image:
        for frame in ImageSequence.Iterator(image):
            yield np.asarray(frame.convert("RGB"))


def _npy_facts(file: Path) -> Facts:
    array = _video_array(file)
    if array.dtype.kind == "f":
        for _ in _npy_frames(file):  # whose numbers are looked at
            pass
    return min(len(array), MOST_FRAMES), array.shape[1], array.shape[2], None


def _npy_frames(file: Path) -> Iterator[NDArray[Any]]:
    import numpy as np

    for frame in _video_array(file):
        if frame.dtype == np.uint8:
            yield np.array(frame)
        else:
            if not ((frame >= 0) & (frame <= 1)).all():
                raise ValueError("it has numbers below 0 or above 1, or NaN")
            yield frame.astype(np.float32)


def _video_array(file: Path) -> NDArray[Any]:
    import numpy as np

    array = mapped_array(file)
    if array.ndim != 4 or array.shape[-1] != 3 or not (array.dtype == np.uint8 or array.dtype.kind == "f"):
        raise ValueError(f"it holds {array.dtype} {list(array.shape)}, not uint8 or floats [T, H, W, 3]")
    check_size(*array.shape[1:3])
    return array


def _pngs(folder: Path) -> list[Path]:
    files = sorted(entry for entry in folder.iterdir() if entry.suffix.lower() == ".png")[:MOST_FRAMES]
    if not files:
        raise ValueError("the folder holds no .png files")
    return files


def _png_facts(folder: Path) -> Facts:
    height, width = next(_png_frames(folder)).shape[:2]
    return len(_pngs(folder)), height, width, None


def _png_frames(folder: Path) -> Iterator[NDArray[Any]]:
    for file in _pngs(folder):
        yield decoded("video", bytes_of("video", file), repr(str(file)))[0]
