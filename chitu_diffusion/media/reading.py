"""Frames and recipes out of files that `media.video` has written, and whether those are whole. Knows file
formats; no task.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

from chitu_diffusion.errors import UsageError
from chitu_diffusion.files.places import expand_home
from chitu_diffusion.files.reading import foreign_data, parse_json, read_text, require_regular
from chitu_diffusion.media.frame_rate import Rate
from chitu_diffusion.media.video import (
    _OUR_FRAME,
    FOLDER,
    RECIPE_FILE,
    gif_durations,
    local_name,
    recipe_beside,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from chitu_diffusion.media.video import Frames

_T = TypeVar("_T")
_PNG_END = b"IEND\xaeB`\x82"
_MAGIC = MappingProxyType({".mp4": (4, b"ftyp"), ".gif": (0, b"GIF8"), ".npy": (0, b"\x93NUMPY")})
"""What files begin with, and at which byte."""
_MOST_LOOKS = 100
"""At a folder that is replaced again and again."""
_MOST_SIDE = 8192
_MOST_PIXELS = 2**33
"""Of a video: 24 GiB of frames; a small file may claim any number."""


def read_recipe(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The recipe that `write_video` stored in a file or folder.

    Raises:
        UsageError: nothing of that name, an unreadable file, or no recipe in it.
    """
    text = _read(
        path, {".mp4": _mp4_recipe, ".gif": _gif_recipe, ".npy": _npy_recipe, FOLDER: _folder_recipe}
    )
    try:
        recipe = parse_json(text or "null")
    except ValueError:
        recipe = None
    if not isinstance(recipe, dict):
        raise UsageError(
            f"'{path}' holds no recipe: it was not written by chitu, or another program rewrote it",
            field="file",
        )
    return recipe


def read_frames(path: str | os.PathLike[str]) -> Frames:
    """All frames of a file or folder, uint8 [T, H, W, 3], RGB.

    Raises:
        UsageError: nothing of that name, or an unreadable file.
    """
    import numpy as np

    frames = _read(
        path, {".mp4": _mp4_frames, ".gif": _gif_frames, ".npy": _npy_frames, FOLDER: _folder_frames}
    )
    result = np.asarray(frames)
    if result.ndim != 4 or result.shape[-1] != 3 or result.dtype != np.uint8:
        raise UsageError(
            f"'{path}' holds {result.dtype} {list(result.shape)}, not uint8 [T, H, W, 3]", field="file"
        )
    return result


def is_whole(path: str | os.PathLike[str], count: int, fps: Rate) -> bool:
    """Whether a file or folder holds all of a video, without decoding it.

    Args:
        path: of the video.
        count: its frames.
        fps: frames per second; a gif tells only how long it lasts.

    Raises:
        UsageError: nothing of that name, or an unreadable file.
    """
    return _read(
        path,
        {
            ".mp4": lambda file: _mp4_packets(file) == count,
            ".gif": lambda file: _gif_length(file) == sum(gif_durations(count, fps)),
            ".npy": lambda file: _npy_length(file) == count,
            FOLDER: lambda file: _whole_pngs(file) == count,
        },
    )


def is_cut(path: str | os.PathLike[str]) -> bool:
    """Whether a file begins as a video of its kind and cannot be opened: what a broken copy leaves. So does
    an empty folder.

    Raises:
        OSError: it cannot be looked at.
    """
    file = Path(expand_home(path))
    if file.is_dir():
        return not any(file.iterdir())
    with file.open("rb") as stream:
        head = stream.read(16)
    start, magic = _MAGIC.get(file.suffix.lower(), (0, b""))
    if not magic.startswith(head[start : start + len(magic)]):
        return False
    try:
        _read(path, {".mp4": _mp4_recipe, ".gif": _gif_recipe, ".npy": _npy_opens})
    except UsageError:
        return True
    return False


def _read(path: str | os.PathLike[str], readers: Mapping[str, Callable[[Path], _T]]) -> _T:
    file = Path(expand_home(path))
    if not os.path.lexists(file):
        raise UsageError(f"there is no file '{path}'", field="file")
    kind = FOLDER if file.is_dir() else file.suffix.lower()
    if kind not in readers:
        raise UsageError(
            f"'{path}' is not a video of ours: use .mp4, .gif, .npy or a folder of png frames", field="file"
        )
    with foreign_data(lambda cause: UsageError(f"'{path}' cannot be read: {cause}", field="file")):
        if kind != FOLDER:
            require_regular(file)
        return readers[kind](file)


def check_size(height: int, width: int, frames: int = 1) -> None:
    """Raises ValueError for more pixels than a video may have."""
    if max(height, width) > _MOST_SIDE or height * width * frames > _MOST_PIXELS:
        raise ValueError(
            f"{frames} frames of {width}x{height} are more than a video of ours has: {_MOST_PIXELS} pixels "
            f"in all, {_MOST_SIDE} a side"
        )


def _mp4_recipe(file: Path) -> str | None:
    import av

    with av.open(local_name(file), format="mp4") as container:
        return container.metadata.get("comment")


@contextmanager
def image_in(file: Path) -> Iterator[Any]:
    """A gif or png as Pillow opens it.

    Raises:
        OSError, ValueError: it cannot be read, or is too large.
    """
    from PIL import Image

    try:
        require_regular(file)
        with Image.open(file, formats=("GIF", "PNG")) as image:
            check_size(image.height, image.width)
            yield image
    except Image.DecompressionBombError as error:
        raise ValueError(str(error)) from error


def _gif_recipe(file: Path) -> str | None:
    with image_in(file) as image:
        comment = image.info.get("comment")
    return comment.decode("utf-8", "replace") if isinstance(comment, bytes) else None


def _npy_recipe(file: Path) -> str | None:
    return json.dumps(recipe_beside(file))


def _folder_recipe(folder: Path) -> str | None:
    file = folder / RECIPE_FILE
    return read_text(file) if file.exists() else None


def _mp4_frames(file: Path) -> list[Frames]:
    import av
    import numpy as np

    with av.open(local_name(file), format="mp4") as container:
        arrays: list[Frames] = []
        for frame in container.decode(video=0):
            check_size(frame.height, frame.width, len(arrays) + 1)
            arrays.append(np.asarray(frame.to_ndarray(format="rgb24"), dtype=np.uint8))
    return arrays


def _mp4_packets(file: Path) -> int:
    """Packets that are there to their last byte."""
    import av

    size = file.stat().st_size
    with av.open(local_name(file), format="mp4") as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
        return sum((packet.pos or 0) + packet.size <= size and not packet.is_corrupt for packet in packets)


def _gif_length(file: Path) -> int:
    """Milliseconds; 0 where the end is missing."""
    from PIL import ImageSequence

    with file.open("rb") as stream:
        stream.seek(-1, os.SEEK_END)
        if stream.read() != b";":
            return 0
    with image_in(file) as image:
        return sum(frame.info.get("duration", 0) for frame in ImageSequence.Iterator(image))


def _npy_length(file: Path) -> int:
    with file.open("rb") as stream:
        return _npy_shape(stream)[0]


def _npy_shape(stream: BinaryIO) -> tuple[int, ...]:
    """What an array's header says, if the file has as many bytes: none is read or made room for before."""
    shape, dtype = _npy_header(stream)
    if not shape or str(dtype) != "uint8" or min(shape) < 0:
        raise ValueError(f"it holds {dtype} {list(shape)}, not uint8 [T, H, W, 3]")
    return shape


def _npy_header(stream: BinaryIO) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and kind of any array that is not cut."""
    import numpy as np

    version = np.lib.format.read_magic(stream)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in readers:
        return (), np.dtype("O")  # somebody else's
    shape, _, dtype = readers[version](stream)
    left = os.fstat(stream.fileno()).st_size - stream.tell()
    if not dtype.hasobject and left < math.prod(shape) * dtype.itemsize:
        raise ValueError("it ends before its last frame")
    return shape, dtype


def _npy_opens(file: Path) -> None:
    with file.open("rb") as stream:
        _npy_header(stream)


def _whole_pngs(folder: Path) -> int:
    """Frames from 00000.png on, as far as each is there to its end."""
    count = 0
    while (file := folder / f"{count:05d}.png").exists():
        with file.open("rb") as stream:
            stream.seek(-min(len(_PNG_END), file.stat().st_size), os.SEEK_END)
            if stream.read() != _PNG_END:
                break
        count += 1
    return count


def _gif_frames(file: Path) -> list[Frames]:
    import numpy as np
    from PIL import ImageSequence

    with image_in(file) as image:
        frames: list[Frames] = []
        for frame in ImageSequence.Iterator(image):
            check_size(frame.height, frame.width, len(frames) + 1)
            frames.append(np.asarray(frame.convert("RGB")))
        return frames


def _npy_frames(file: Path) -> Frames:
    import numpy as np

    with file.open("rb") as stream:  # one descriptor: another file may take its place meanwhile
        _npy_shape(stream)
        stream.seek(0)
        return np.asarray(np.load(stream, allow_pickle=False))


def mapped_array(file: Path) -> NDArray[Any]:
    """The array in a .npy file, mapped: a header that claims more than the file has is refused before any
    memory is taken.

    Raises:
        OSError, ValueError: it cannot be read.
    """
    import numpy as np

    array: NDArray[Any] = np.load(file, mmap_mode="r", allow_pickle=False)
    return array


def _folder_frames(folder: Path) -> list[Frames]:
    """Of one folder, though another takes its place meanwhile."""
    for _ in range(_MOST_LOOKS):
        before = _identity(folder)
        try:
            frames = _frames_in(folder)
        except FileNotFoundError:
            continue
        if _identity(folder) == before:
            return frames
    raise OSError("it changes while it is being read")


def _identity(folder: Path) -> tuple[int, int, int]:
    state = folder.stat()
    return state.st_dev, state.st_ino, state.st_mtime_ns


def _frames_in(folder: Path) -> list[Frames]:
    import numpy as np

    files = sorted(entry for entry in folder.iterdir() if _OUR_FRAME.fullmatch(entry.name))
    if not files:
        raise UsageError(f"the folder '{folder}' holds no frames (00000.png, 00001.png, ...)", field="file")
    frames = []
    for entry in files:
        with image_in(entry) as image:
            frames.append(np.asarray(image.convert("RGB")))
    return frames
