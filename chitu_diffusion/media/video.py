"""Finished frames in, a file out; `reading` is the way back.

Knows file formats, what a name may be, and how much a video takes on the disk. Does not know prompts, models
or tasks: the recipe that it stores beside the frames is any JSON mapping. PyAV, Pillow and numpy are imported
when they are needed, so that a name can be checked (`check_save_path`) before anything else happens.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chitu_diffusion.errors import OutputError, UsageError
from chitu_diffusion.files.atomic import (
    folder_lock,
    free_space,
    is_in_progress,
    new_file,
    new_folder,
    write_text,
)
from chitu_diffusion.files.faults import hit
from chitu_diffusion.files.places import expand_home, require_writable
from chitu_diffusion.files.reading import read_json
from chitu_diffusion.media.frame_rate import Rate, frame_rate

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Frames = NDArray[np.uint8]

Recipe = Mapping[str, Any]

FORMATS = (".mp4", ".gif", ".npy")
FOLDER = "folder"
RECIPE_FILE = "recipe.json"
RECIPE_KEY = "recipe"
BY_HASH = "recipes by SHA-256"
"""In the file beside an array while it is being replaced: the recipes of the older and the newer."""
_OUR_FRAME = re.compile(r"\d{5,}\.png")
_STEERING = ("Cc", "Zl", "Zp")
"""Unicode's categories of what steers a terminal or breaks a line."""
_TURNING = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
"""What turns the direction of the text after it."""
_MP4_BYTES = 0.15
"""Of a pixel at quality 8, of usual videos; three steps of quality double it, as x264's crf does."""
_RECIPE_BYTES = 16_384
_LONGEST_NAME = 240
"""Bytes; file systems allow 255, and the endings for a name in progress need room."""


def check_save_path(path: str | os.PathLike[str]) -> str:
    """Whether a video can be saved under this name, before any work is done.

    Args:
        path: ends in .mp4, .gif or .npy; a path that ends in '/' or has no ending is a folder of png frames.

    Returns:
        the kind: ".mp4", ".gif", ".npy" or "folder".

    Raises:
        UsageError: an unknown ending, a name that cannot be, a file where a folder should be (or the
            other way round), a folder that cannot be written to, or a folder with other things in it.
    """
    path = expand_home(path)
    kind = _kind(path)
    try:
        _check_place(kind, Path(path))
    except OSError as error:
        raise _refused(path, f"{error.strerror or error}; choose another place") from error
    return kind


def _check_place(kind: str, target: Path) -> None:
    if target.name == "-":
        raise _refused(target, "videos are not written to stdout; name a file, such as cat.mp4")
    if kind == FOLDER and target.is_dir():
        _check_ours(target)
    elif kind == FOLDER and os.path.lexists(target):
        raise _refused(
            target,
            "a file or a broken link of that name is here already; name a folder, or a file that ends in "
            ".mp4",
        )
    elif kind != FOLDER and target.is_dir():
        raise _refused(target, "a folder of that name is here already; choose another name")
    elif kind == ".npy" and sidecar_of(target).is_dir():
        raise _refused(target, f"its recipe goes to '{sidecar_of(target)}', a folder; choose another name")
    _check_parent(target)


def _refused(path: object, why: str) -> UsageError:
    return UsageError(f"save_path = {str(path)!r}: {why}", field="save_path")


def _kind(path: str | os.PathLike[str]) -> str:
    text = os.fspath(path) if isinstance(path, str | os.PathLike) else ""
    if not isinstance(text, str) or not text or "\0" in text:
        raise _refused(path, "must be a file or folder name")
    name = Path(text).name
    try:
        length = len(os.fsencode(name))
    except UnicodeEncodeError as error:
        raise _refused(path, f"is not valid text: {error.reason}") from None
    if length > _LONGEST_NAME:
        raise _refused(name[:40] + "...", f"the name is too long: use at most {_LONGEST_NAME} bytes")
    if any(unicodedata.category(c) in _STEERING or c in _TURNING for c in text):
        raise _refused(path, "holds a control character; use letters, digits and plain signs")
    if is_in_progress(name):
        raise _refused(path, "such names are for files in progress; use another")
    if name in ("", ".."):
        raise _refused(path, "name a new folder inside it, or a file that ends in .mp4")
    if text.endswith(("/", os.sep)):
        return FOLDER
    if name.lower() in FORMATS:
        raise _refused(path, f"put a name before '{name}'")
    ending = Path(text).suffix.lower()
    if ending in FORMATS:
        return ending
    if ending:
        raise _refused(
            path,
            f"'{ending}' is not a format; use .mp4, .gif or .npy, or a name that ends in '/' for a folder "
            "of png frames",
        )
    return FOLDER


def _check_ours(folder: Path) -> None:
    """A folder is replaced only if nothing lies in it but frames and a recipe."""
    for entry in folder.iterdir():
        named_so = entry.name == RECIPE_FILE or _OUR_FRAME.fullmatch(entry.name)
        if not named_so or entry.is_dir():
            raise _refused(
                folder, f"that folder holds other things ('{entry.name}'); choose a new or empty folder"
            )


def _check_parent(target: Path) -> None:
    parent = target.absolute().parent
    while not os.path.lexists(parent):
        parent = parent.parent
    if not parent.is_dir():
        raise _refused(target, f"'{parent}' is a file or a broken link, not a folder; choose another place")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise _refused(target, f"no permission to write into '{parent}'; choose another place")
    try:
        require_writable(parent)
    except OSError as error:
        why = f"nothing can be written into '{parent}' ({error.strerror or error}); choose another place"
        raise _refused(target, why) from error


def check_space(videos: Iterable[tuple[str, int, int, int]], quality: int) -> None:
    """Whether the disks have twice the room that videos are expected to take, before any work is done.

    Args:
        videos: path, frames, height and width of each.
        quality: of mp4, see `write_video`.

    Raises:
        UsageError: a disk that has not.
    """
    needed: dict[int, int] = {}
    for path, frames, height, width in videos:
        try:
            free, folder, disk = free_space(Path(path).absolute().parent)
        except OSError:
            continue  # the disk does not tell; a full one is told when writing
        needed[disk] = needed.get(disk, 0) + 2 * forecast_bytes(path, frames, height, width, quality)
        if needed[disk] > free:
            raise _refused(
                path,
                f"{needed[disk] / 2**20:.1f} MiB are needed so far (twice the forecast), and '{folder}' has "
                f"{free / 2**20:.1f} MiB free; free some space, or choose another disk with '-o'",
            )


def forecast_bytes(path: str, frames: int, height: int, width: int, quality: int) -> int:
    """What a video will take on the disk, recipe included, by its kind."""
    kind = _kind(path)
    share = _MP4_BYTES * 2 ** ((quality - 8) / 3) if kind == ".mp4" else 1 if kind == ".gif" else 3
    return round(frames * height * width * share) + _RECIPE_BYTES


def write_video(
    frames: Frames, path: str | os.PathLike[str], *, fps: Rate, quality: int = 8, recipe: Recipe | None = None
) -> Path:
    """Write frames so that the final name appears only when the file is whole.

    Until then what stood there stays (`files.atomic`); a link to a folder stays, too. Missing folders are
    made. H.264 needs even sizes: an odd row or column is doubled at the edge. Pillow merges neighbouring gif
    frames that are equal, and holds them longer.

    Args:
        frames: uint8 [T, H, W, 3], RGB.
        path: see `check_save_path`.
        fps: frames per second; 23.976 and its like mean 24000/1001, see `frame_rate`.
        quality: of H.264, 0 (smallest) to 10 (no visible loss); the other formats do not use it.
        recipe: JSON values stored in the file: the container's comment (.mp4), the comment (.gif),
            NAME.npy.json beside it (.npy), the first frame's text chunk and recipe.json (folder).

    Returns:
        the final path.

    Raises:
        UsageError: a path, shape, fps or quality that cannot be.
        OutputError: the disk is full, the folder is gone, permission is missing.
    """
    path = expand_home(path)
    kind = check_save_path(path)
    _check_frames(frames)
    rate = Fraction(frame_rate(fps)) if 0 < fps <= 1000 else None
    if rate is None:
        raise UsageError(f"fps = {fps!r}: must be above 0 and at most 1000", field="fps")
    if type(quality) is not int or not 0 <= quality <= 10:
        raise UsageError(f"quality = {quality!r}: must be a whole number from 0 to 10", field="quality")
    # a link to a folder stays and its folder is replaced; a link to a file is replaced
    target = Path(os.path.realpath(path)) if kind == FOLDER else Path(path)
    text = json.dumps(dict(recipe), default=str) if recipe is not None else None
    with _errors_in_words(target):
        if kind == FOLDER:
            with new_folder(target) as part:
                _write_folder(part, frames, text)
        else:
            around = partial(_recipe_beside, target, recipe) if kind == ".npy" else None
            with new_file(target, around=around) as part:
                _write_file(kind, part, frames, rate, quality, text)
    return Path(path)


def _check_frames(frames: Frames) -> None:
    shape = tuple(frames.shape)
    dtype = str(frames.dtype)
    if len(shape) != 4 or shape[-1] != 3 or 0 in shape or dtype != "uint8":
        raise UsageError(
            f"frames have shape {list(shape)} and type {dtype}: use uint8 [T, H, W, 3]", field="frames"
        )


@contextmanager
def _errors_in_words(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(f"cannot write the video '{target}': {_cause(error, target)}") from error


def _cause(error: OSError, target: Path) -> str:
    folder = target.parent
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return (
            f"the disk is full or a size limit was reached ({_free_space(folder)} free in '{folder}'); free "
            "some space, or choose another disk with '-o'"
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"no permission to write into '{folder}'; choose another place with '-o'"
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return f"the folder '{folder}' is gone or is not a folder; make it, or choose another place with '-o'"
    return f"{error.strerror or error}; choose another place with '-o'"


def _free_space(folder: Path) -> str:
    try:
        return f"{shutil.disk_usage(folder).free / 2**20:.0f} MiB"
    except OSError:
        return "unknown space"


def _write_file(kind: str, part: Path, frames: Frames, fps: Fraction, quality: int, text: str | None) -> None:
    if kind == ".mp4":
        _write_mp4(part, frames, fps, quality, text)
    elif kind == ".gif":
        _write_gif(part, frames, fps, text)
    else:
        _write_npy(part, frames)


def _write_mp4(part: Path, frames: Frames, fps: Fraction, quality: int, text: str | None) -> None:
    """H.264, yuv420p, BT.709, index first, so that browsers and phones play it."""
    import av
    import numpy as np
    from av.video.reformatter import Colorspace

    _, height, width, _ = frames.shape
    padded = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    options = {"movflags": "+faststart+use_metadata_tags"}
    try:
        with av.open(local_name(part), "w", format="mp4", options=options) as container:
            if text is not None:
                container.metadata["comment"] = text
            # without its macroblock tree the encoder gives the same bytes each time, with it 996 times in
            # 1,000
            options = {"crf": str(34 - 2 * quality), "preset": "medium", "x264-params": "mbtree=0"}
            stream = container.add_stream("libx264", rate=fps, options=options)
            stream.height, stream.width = padded.shape[1:3]
            stream.pix_fmt = "yuv420p"
            context = stream.codec_context
            context.colorspace = context.color_primaries = context.color_trc = Colorspace.ITU709
            for array in padded:
                hit("mux.frame", part)
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(array), format="rgb24")
                yuv = frame.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709)
                container.mux(stream.encode(yuv))
            container.mux(stream.encode(None))
    except av.FFmpegError as error:
        raise OSError(error.errno, f"H.264 encoding failed: {error.strerror}") from error


def local_name(file: Path) -> str:
    """A name that FFmpeg takes for a file, not for an address such as "http:x.mp4"."""
    return str(file.absolute())


def gif_durations(count: int, fps: Rate) -> list[int]:
    """Milliseconds of each frame. Gif counts in hundredths of a second: the remainder is spread, so that the
    length stays right.
    """
    ticks = [round(index * 100 / fps) for index in range(count + 1)]
    return [10 * max(after - before, 1) for before, after in zip(ticks, ticks[1:], strict=False)]


def _write_gif(part: Path, frames: Frames, fps: Fraction, text: str | None) -> None:
    from PIL import Image

    images = [Image.fromarray(frame).quantize(256) for frame in frames]
    comment = {"comment": text.encode()} if text is not None else {}
    with part.open("wb") as file:
        images[0].save(
            file,
            format="GIF",
            save_all=True,
            append_images=images[1:],
            duration=gif_durations(len(frames), fps),
            loop=0,
            disposal=1,
            **comment,
        )


def _write_npy(part: Path, frames: Frames) -> None:
    import numpy as np

    whole = np.ascontiguousarray(frames)
    with part.open("wb") as file:
        # not np.save: its error on a full disk does not say that the disk is full
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(whole))
        file.write(whole.data)


def sidecar_of(array: Path) -> Path:
    """Where the recipe of an array lies."""
    return array.with_name(array.name + ".json")


@contextmanager
def _recipe_beside(target: Path, recipe: Recipe | None, part: Path) -> Iterator[None]:
    """While an array is renamed, both recipes lie beside it, by what they are of: each look finds the one
    that belongs to the array. Writers of one folder take turns.
    """
    sidecar = sidecar_of(target)
    with folder_lock(target.parent):
        both: dict[str, Any] = {} if recipe is None else {file_sha256(part): dict(recipe)}
        older = recipe_beside(target) if target.is_file() else None  # one left over is nobody's
        if older is not None:
            both.setdefault(file_sha256(target), older)
        if both:
            write_text(sidecar, json.dumps({BY_HASH: both}, default=str))
        try:
            yield
        except BaseException:
            _put_recipe(sidecar, older)
            raise
        _put_recipe(sidecar, recipe)


def _put_recipe(sidecar: Path, recipe: Recipe | None) -> None:
    if recipe is None:
        sidecar.unlink(missing_ok=True)
    else:
        write_text(sidecar, json.dumps(dict(recipe), default=str))


def recipe_beside(array: Path) -> dict[str, Any] | None:
    """The recipe of an array; None where there is none that can be read.

    Raises:
        OSError: the file beside it is there and cannot be read.
    """
    try:
        recipe = read_json(sidecar_of(array))
        if isinstance(recipe, dict) and set(recipe) == {BY_HASH}:
            recipe = recipe[BY_HASH].get(file_sha256(array))
    except (FileNotFoundError, IsADirectoryError, ValueError, AttributeError):
        return None
    return recipe if isinstance(recipe, dict) else None


def file_sha256(file: Path) -> str:
    """Of all its bytes."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _write_folder(part: Path, frames: Frames, text: str | None) -> None:
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    for index, frame in enumerate(frames):
        info = PngInfo()
        if text is not None and index == 0:
            info.add_text(RECIPE_KEY, text)
        Image.fromarray(frame).save(part / f"{index:05d}.png", pnginfo=info)
    if text is not None:
        (part / RECIPE_FILE).write_text(text, encoding="utf-8")
