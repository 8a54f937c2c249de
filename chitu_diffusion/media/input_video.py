"""Videos that come in: from a file or from memory, checked once, known by their hash. Knows no model.

Frames are taken as they come, from the first on: no rate is converted.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chitu_diffusion.errors import UsageError
from chitu_diffusion.files.places import expand_home
from chitu_diffusion.files.reading import cause
from chitu_diffusion.media.clips import clip_facts, clip_frames, clip_sha256
from chitu_diffusion.media.frame_rate import Rate, frame_rate
from chitu_diffusion.media.image import InputImage, resized

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_MOST_SIDE = 8192
_MOST_BYTES = 16 * 2**30
"""Of frames in memory."""
_KINDS = {"path": (str, type(None)), "sha256": (str,), "frames": (int,), "width": (int,), "height": (int,)}


@dataclass(frozen=True)
class InputVideo:
    """A video that a request brings.

    Attributes:
        path: of its file or folder, absolute; None for one from memory.
        sha256: of the file's bytes; from memory, of the pixels.
        frames: how many there are; of more than `clips.MOST_FRAMES` that many.
        width, height: pixels, as it is shown (a camera's note of its orientation is followed).
        fps: frames per second; None where nothing tells.
        pixels: [T, H, W, 3], uint8, or float32 in [0, 1]; None where they are in the file, or on another
            machine.
    """

    path: str | None
    sha256: str
    frames: int
    width: int
    height: int
    fps: Rate | None = None
    pixels: NDArray[Any] | None = field(default=None, compare=False, repr=False)

    @classmethod
    def of(cls, value: Any, name: str = "video") -> InputVideo | None:
        """A video in whichever form it comes; None stays None.

        Args:
            value: name of a video file (.mp4, .mov, .webm, .mkv, .gif, .npy) or of a folder of png frames; a
                list of pictures in any form that `InputImage.of` takes, of one size; an array [T, H, W, 3] or
                a tensor [T, 3, H, W], uint8 or floats in [0, 1]; or what `to_mapping` gave.
            name: of the field, for errors.

        Raises:
            UsageError: something else, or a file that cannot be read.
        """
        if value is None or isinstance(value, cls):
            return value
        if isinstance(value, Mapping):
            return _from_mapping(value, name)
        if isinstance(value, str) or (isinstance(value, os.PathLike) and isinstance(os.fspath(value), str)):
            return _from_file(Path(expand_home(value)), name)
        pixels = _pixels_of(value, name)
        count, height, width = pixels.shape[:3]
        digest = hashlib.sha256(f"{pixels.dtype} {pixels.shape}".encode())
        digest.update(pixels.data)
        return cls(None, digest.hexdigest(), count, width, height, pixels=pixels)

    def to_mapping(self) -> dict[str, Any]:
        """Plain JSON values: not the pixels."""
        fps = self.fps if isinstance(self.fps, int | None) else str(self.fps)
        return {name: vars(self)[name] for name in _KINDS} | {"fps": fps}

    def notes(self, num_frames: int, height: int, width: int) -> list[str]:
        """In words, which of its frames are taken, and that its shape is another than a size's (by over
        2 %).
        """
        notes = []
        if num_frames != self.frames:
            notes.append(f"video: its first {num_frames} of {self.frames} frames are taken")
        if abs(self.width * height / (self.height * width) - 1) > 0.02:
            notes.append(f"video of {self.width}x{self.height} is stretched to {width}x{height}")
        return notes

    def resized(
        self, num_frames: int, height: int, width: int, name: str = "video"
    ) -> Iterator[NDArray[np.float32]]:
        """Its first frames, [height, width, 3] float32 in [0, 1] each, stretched by Lanczos.

        Args:
            name: of the field, for errors.

        Raises:
            UsageError: its file is not there any more or has changed, it was in another process's memory, or
                fewer frames can be decoded than it says to have.
        """
        if self.pixels is None:
            self.require_unchanged(name)
        source = iter(self.pixels) if self.pixels is not None else clip_frames(str(self.path), name)
        count = 0
        for frame in itertools.islice(source, num_frames):
            count += 1
            yield resized(frame, height, width)
        if count < num_frames:
            raise UsageError(
                f"{name} = {self.path!r}: it is to have {self.frames} frames, and {count} can be decoded; "
                "save it anew, or ask for fewer",
                field=name,
            )

    def require_unchanged(self, name: str = "video") -> None:
        """Checks that its file is there and the one that was asked for.

        Args:
            name: of the field, for errors.

        Raises:
            UsageError: as `resized`.
        """
        if self.path is None:
            raise UsageError(
                f"{name}: it was given in memory, and only its hash is kept; give it again", field=name
            )
        if _hashed(Path(self.path), name) != self.sha256:
            raise UsageError(
                f"{name} = {self.path!r}: it has changed since the request; give it again", field=name
            )


def _from_mapping(values: Mapping[str, Any], name: str) -> InputVideo:
    good = set(values) == {*_KINDS, "fps"} and all(isinstance(values[key], _KINDS[key]) for key in _KINDS)
    if not good:
        raise UsageError(f"{name} = {dict(values)!r}: use a file's name", field=name)
    return InputVideo(**{**values, "fps": frame_rate(values["fps"])})


def _from_file(path: Path, name: str) -> InputVideo:
    path = path.absolute()
    digest = _hashed(path, name)
    frames, height, width, fps = clip_facts(path, name)
    if not frames or not height or not width:
        raise UsageError(f"{name} = {str(path)!r}: it has no frames", field=name)
    return InputVideo(str(path), digest, frames, width, height, frame_rate(fps))


def _hashed(path: Path, name: str) -> str:
    try:
        return clip_sha256(path)
    except (OSError, ValueError) as error:
        raise UsageError(f"{name} = {str(path)!r}: it cannot be read: {cause(error)}", field=name) from error


def _pixels_of(value: Any, name: str) -> NDArray[Any]:
    """A video in memory as [T, H, W, 3], a copy."""
    import numpy as np

    torch = sys.modules.get("torch")
    if isinstance(value, Sequence) and len(value):
        return _stacked([InputImage.of(name, frame) for frame in value], name)
    expected = "[T, H, W, 3]"
    if torch is not None and isinstance(value, torch.Tensor):
        expected = "[T, 3, H, W]"
        if value.is_meta or value.layout != torch.strided:
            raise UsageError(f"{name} is a tensor on meta, or not dense; use one with values", field=name)
        found = list(value.shape)
        value = value.detach().cpu()
        value = (value.float() if value.is_floating_point() else value).numpy()
        value = np.moveaxis(value, 1, -1) if value.ndim == 4 else value
    elif isinstance(value, np.ndarray):
        value = np.asarray(value)
        found = list(value.shape)
    else:
        raise UsageError(
            f"{name} is a {type(value).__name__}: use a file's name, a list of pictures, an array or a "
            "tensor",
            field=name,
        )
    if value.ndim != 4 or value.shape[-1] != 3 or not value.size or max(value.shape[1:3]) > _MOST_SIDE:
        raise UsageError(f"{name} is {found}; expected {expected}, up to {_MOST_SIDE} a side", field=name)
    if value.nbytes > _MOST_BYTES:
        raise UsageError(f"{name} is {found}: use fewer frames, or a file", field=name)
    frames = [InputImage.of(name, frame) for frame in value]  # checks its values
    return _stacked(frames, name)


def _stacked(frames: Sequence[InputImage | None], name: str) -> NDArray[Any]:
    import numpy as np

    pixels = [
        frame.reread(name) if frame.pixels is None else frame.pixels for frame in frames if frame is not None
    ]
    kinds = {(each.shape, str(each.dtype)) for each in pixels}
    if len(kinds) != 1 or len(pixels) != len(frames):
        raise UsageError(
            f"{name}: its frames have {len(kinds)} different sizes or kinds; use one", field=name
        )
    return np.stack(pixels)
