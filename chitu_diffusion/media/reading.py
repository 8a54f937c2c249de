"""Frames and recipes out of files that `media.video` has written. Knows file formats; no task."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from chitu_diffusion.errors import UsageError
from chitu_diffusion.files.reading import foreign_data, parse_json, read_text, require_regular
from chitu_diffusion.media.video import _OUR_FRAME, FOLDER, RECIPE_FILE, _local, _sidecar

if TYPE_CHECKING:
    from chitu_diffusion.media.video import Frames

_T = TypeVar("_T")
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


def _read(path: str | os.PathLike[str], readers: Mapping[str, Callable[[Path], _T]]) -> _T:
    file = Path(path)
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


def _check_size(height: int, width: int, frames: int = 1) -> None:
    if max(height, width) > _MOST_SIDE or height * width * frames > _MOST_PIXELS:
        raise ValueError(
            f"{frames} frames of {width}x{height} are more than a video of ours has: {_MOST_PIXELS} pixels "
            f"in all, {_MOST_SIDE} a side"
        )


def _mp4_recipe(file: Path) -> str | None:
    import av

    with av.open(_local(file), format="mp4") as container:
        return container.metadata.get("comment")


@contextmanager
def _image(file: Path) -> Iterator[Any]:
    from PIL import Image

    try:
        require_regular(file)
        with Image.open(file, formats=("GIF", "PNG")) as image:
            _check_size(image.height, image.width)
            yield image
    except Image.DecompressionBombError as error:
        raise ValueError(str(error)) from error


def _gif_recipe(file: Path) -> str | None:
    with _image(file) as image:
        comment = image.info.get("comment")
    return comment.decode("utf-8", "replace") if isinstance(comment, bytes) else None


def _npy_recipe(file: Path) -> str | None:
    sidecar = _sidecar(file)
    return read_text(sidecar) if sidecar.exists() else None


def _folder_recipe(folder: Path) -> str | None:
    file = folder / RECIPE_FILE
    return read_text(file) if file.exists() else None


def _mp4_frames(file: Path) -> list[Frames]:
    import av
    import numpy as np

    with av.open(_local(file), format="mp4") as container:
        arrays: list[Frames] = []
        for frame in container.decode(video=0):
            _check_size(frame.height, frame.width, len(arrays) + 1)
            arrays.append(np.asarray(frame.to_ndarray(format="rgb24"), dtype=np.uint8))
    return arrays


def _gif_frames(file: Path) -> list[Frames]:
    import numpy as np
    from PIL import ImageSequence

    with _image(file) as image:
        frames: list[Frames] = []
        for frame in ImageSequence.Iterator(image):
            _check_size(frame.height, frame.width, len(frames) + 1)
            frames.append(np.asarray(frame.convert("RGB")))
        return frames


def _npy_frames(file: Path) -> Frames:
    import numpy as np

    # mapped: a header that claims more than the file has is refused before any memory is taken
    return np.array(np.load(file, mmap_mode="r", allow_pickle=False))


def _folder_frames(folder: Path) -> list[Frames]:
    import numpy as np

    files = sorted(entry for entry in folder.iterdir() if _OUR_FRAME.fullmatch(entry.name))
    if not files:
        raise UsageError(f"the folder '{folder}' holds no frames (00000.png, 00001.png, ...)", field="file")
    frames = []
    for entry in files:
        with _image(entry) as image:
            frames.append(np.asarray(image.convert("RGB")))
    return frames
