"""Pictures that come in: from a file or from memory, checked once, known by their hash. Knows no model.

numpy and Pillow are imported when there is a picture.
"""

from __future__ import annotations

import hashlib
import io
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chitu_diffusion.errors import UsageError
from chitu_diffusion.files.places import expand_home
from chitu_diffusion.files.reading import cause, read_bytes

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image

_MOST_BYTES = 256 * 2**20
_MOST_PIXELS = 100_000_000
LANCZOS = 1
"""Number of Pillow's filter."""
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
"""What Pillow decodes by itself: for some others, such as EPS, it starts another program."""


@dataclass(frozen=True)
class InputImage:
    """A picture that a request brings.

    Attributes:
        path: of its file, absolute; None for one from memory.
        sha256: of the file's bytes; from memory, of the pixels.
        width, height: pixels, as it is shown (a camera's note of its orientation is followed).
        pixels: [H, W, 3], uint8, or float32 in [0, 1]; None where it is in the file, or on another machine.
        transparent: some of it was; the colours that are stored there are taken, as diffusers does.
    """

    path: str | None
    sha256: str
    width: int
    height: int
    pixels: NDArray[Any] | None = field(default=None, compare=False, repr=False)
    transparent: bool = field(default=False, compare=False)

    @classmethod
    def of(cls, name: str, value: Any) -> InputImage | None:
        """A picture in whichever form it comes; None stays None.

        Args:
            name: of the field, for errors.
            value: a file's name; a PIL image; an array [H, W, 3] or [H, W] or a tensor [3, H, W] or
                [1, 3, H, W], uint8 or floats in [0, 1]; or what `to_mapping` gave. Grey of 16 bits keeps its
                upper 8.

        Raises:
            UsageError: something else, or a file that cannot be read.
        """
        if value is None or isinstance(value, cls):
            return value
        if isinstance(value, Mapping):
            return _from_mapping(name, value)
        if isinstance(value, str) or (isinstance(value, os.PathLike) and isinstance(os.fspath(value), str)):
            return _from_file(name, expand_home(Path(value)))
        pixels, transparent = _pixels_of(name, value)
        height, width = pixels.shape[:2]
        digest = hashlib.sha256(f"{pixels.dtype} {pixels.shape}".encode())
        digest.update(pixels.tobytes())
        return cls(None, digest.hexdigest(), width, height, pixels, transparent)

    def to_mapping(self) -> dict[str, Any]:
        """Plain JSON values: not the pixels."""
        return {"path": self.path, "sha256": self.sha256, "width": self.width, "height": self.height}

    def notes(self, height: int, width: int, name: str = "image", *, is_cut: bool = False) -> list[str]:
        """In words, that its shape is another than a size's (by over 2 %), and that it was transparent.

        Args:
            name: what they call it.
            is_cut: it keeps its shape, and what stands out is cut off.
        """
        notes = []
        if abs(self.width * height / (self.height * width) - 1) > 0.02:
            change = "is cut to the shape of" if is_cut else "is stretched to"
            notes.append(f"{name} of {self.width}x{self.height} {change} {width}x{height}")
        if self.transparent:
            notes.append(
                f"{name} has transparent pixels: the colours stored in them are taken, and no background; "
                "for another one, save it on that"
            )
        return notes

    def resized(self, height: int, width: int, name: str = "image") -> NDArray[np.float32]:
        """[height, width, 3] float32 in [0, 1], stretched by Lanczos, as diffusers' `VideoProcessor` does.

        Args:
            name: of the field, for errors.

        Raises:
            UsageError: its file is not there any more or has changed, or it was in another process's memory.
        """
        return resized(self.original(name), height, width)

    def original(self, name: str = "image") -> NDArray[Any]:
        """[H, W, 3], uint8, or float32 in [0, 1]: the picture as it is.

        Args:
            name: of the field, for errors.

        Raises:
            UsageError: as `resized`.
        """
        return self.pixels if self.pixels is not None else self.reread(name)

    def require_unchanged(self, name: str) -> None:
        """Checks that its file is there and the one that was asked for.

        Raises:
            UsageError: as `resized`.
        """
        self.reread(name)

    def reread(self, name: str) -> NDArray[np.uint8]:
        """[H, W, 3] from its file.

        Raises:
            UsageError: as `resized`.
        """
        if self.path is None:
            raise UsageError(
                f"{name}: it was given in memory, and only its hash is kept; give it again", field=name
            )
        data = bytes_of(name, Path(self.path))
        if hashlib.sha256(data).hexdigest() != self.sha256:
            raise UsageError(
                f"{name} = {self.path!r}: the file has changed since the request; give it again", field=name
            )
        return decoded(name, data, repr(self.path))[0]


def resized(
    pixels: NDArray[Any],
    height: int,
    width: int,
    *,
    box: tuple[float, float, float, float] | None = None,
    resample: int = LANCZOS,
) -> NDArray[np.float32]:
    """Pixels [H, W, 3], uint8 or float32 in [0, 1], as [height, width, 3] float32 in [0, 1], stretched.

    Args:
        box: (left, top, right, bottom) of what is taken; None for all.
        resample: number of Pillow's filter.
    """
    import numpy as np
    from PIL import Image

    def larger(plane: NDArray[Any]) -> NDArray[Any]:
        image = Image.fromarray(plane)
        return np.asarray(image.resize((width, height), Image.Resampling(resample), box))

    same = box is None and pixels.shape[:2] == (height, width)
    if pixels.dtype == np.uint8:
        return (pixels if same else larger(pixels)).astype(np.float32) / np.float32(255)
    if same:
        return pixels
    return np.stack([larger(pixels[..., channel]) for channel in range(3)], axis=-1).clip(0, 1)


def _from_mapping(name: str, values: Mapping[str, Any]) -> InputImage:
    kinds = {"path": (str, type(None)), "sha256": (str,), "width": (int,), "height": (int,)}
    if set(values) != set(kinds) or not all(isinstance(values[key], kinds[key]) for key in kinds):
        raise UsageError(f"{name} = {dict(values)!r}: use a file's name", field=name)
    return InputImage(**values)


def _from_file(name: str, path: Path) -> InputImage:
    try:
        path = path.expanduser().absolute()
    except RuntimeError:  # no such user's home
        raise UsageError(f"{name} = {str(path)!r}: there is no such file", field=name) from None
    data = bytes_of(name, path)
    pixels, transparent = decoded(name, data, repr(str(path)))
    height, width = pixels.shape[:2]
    digest = hashlib.sha256(data).hexdigest()
    return InputImage(str(path), digest, width, height, transparent=transparent)


def bytes_of(name: str, path: Path) -> bytes:
    """A picture's file.

    Raises:
        UsageError: it is not there, cannot be read, or is too large; begins with `name`.
    """
    try:
        if not path.is_file():
            raise UsageError(f"{name} = {str(path)!r}: there is no such file", field=name)
        return read_bytes(path, _MOST_BYTES)
    except (OSError, ValueError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"{name} = {str(path)!r}: it cannot be read: {cause(error)}", field=name) from error


def decoded(name: str, data: bytes, source: str) -> tuple[NDArray[np.uint8], bool]:
    """[H, W, 3], and whether some of it is transparent; of a moving picture the first frame.

    Args:
        name, source: of the field and the file, for errors.

    Raises:
        UsageError: it is no picture.
    """
    from PIL import Image

    def opened() -> Image.Image:
        return Image.open(io.BytesIO(data), formats=_FORMATS)

    return _upright(name, opened, source)


def _upright(name: str, opened: Callable[[], Image.Image], source: str) -> tuple[NDArray[np.uint8], bool]:
    """[H, W, 3] as it is shown, and whether some of it is transparent; Pillow reads the pixels when they are
    asked for, and may fail only then.
    """
    import numpy as np
    from PIL import Image, ImageOps

    try:
        image = opened()
        _check_size(name, image.height, image.width)
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16"):  # Pillow's own conversion would cut at 255
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        if image.mode in ("I", "F"):
            raise UsageError(
                f"{name}: its pixels have mode {image.mode}, whose white nobody knows; use mode RGB, L or "
                "I;16, or an array of floats from 0 to 1",
                field=name,
            )
        transparent = image.has_transparency_data and np.asarray(image.convert("RGBA"))[..., 3].min() < 255
        return np.array(image.convert("RGB")), bool(transparent)
    except UsageError:
        raise
    except Image.DecompressionBombError as error:
        raise UsageError(
            f"{name} = {source}: by its header it has more than {_MOST_PIXELS} pixels; use a smaller picture",
            field=name,
        ) from error
    except Exception as error:  # Pillow has many words for a file that is no picture
        raise UsageError(
            f"{name} = {source}: it cannot be read as a picture ({type(error).__name__}); use a PNG, JPEG or "
            "WebP file",
            field=name,
        ) from error


def _check_size(name: str, height: int, width: int) -> None:
    if not height or not width or height * width > _MOST_PIXELS:
        raise UsageError(
            f"{name}: it has {width}x{height} pixels; use 1 to {_MOST_PIXELS} of them", field=name
        )


def _pixels_of(name: str, value: Any) -> tuple[NDArray[Any], bool]:
    """A picture in memory as [H, W, 3], a copy, and whether some of it is transparent."""
    import numpy as np
    from PIL import Image

    if isinstance(value, Image.Image):
        return _upright(name, lambda: value, f"the {type(value).__name__}")
    torch = sys.modules.get("torch")
    given = "an array"
    expected = "[H, W, 3] or [H, W]"
    if torch is not None and isinstance(value, torch.Tensor):
        given = "a tensor"
        expected = "[3, H, W] or [H, W]"
        if value.is_meta or value.layout != torch.strided:
            raise UsageError(f"{name} is a tensor on meta, or not dense; use one with values", field=name)
        value = value.detach().cpu()
        value = (value.float() if value.is_floating_point() else value).numpy()
        found = list(value.shape)
        value = value[0] if value.ndim == 4 and len(value) == 1 else value
        value = np.moveaxis(value, 0, -1) if value.ndim == 3 else value
    elif isinstance(value, np.ndarray):
        value = np.asarray(value)  # of whichever subclass
        found = list(value.shape)
    else:
        raise UsageError(
            f"{name} is a {type(value).__name__}: use a file's name, a PIL image, an array or a tensor",
            field=name,
        )
    value = np.repeat(value[..., None], 3, axis=-1) if value.ndim == 2 else value
    if value.ndim != 3 or value.shape[-1] != 3:
        raise UsageError(f"{name} is {given} of {found}; expected {expected}", field=name)
    _check_size(name, *value.shape[:2])
    if value.dtype == np.uint8:
        return value.copy(), False
    if not np.issubdtype(value.dtype, np.floating):
        raise UsageError(f"{name} is {given} of {value.dtype}: use uint8, or floats from 0 to 1", field=name)
    if not ((value >= 0) & (value <= 1)).all():
        raise UsageError(
            f"{name} is {given} with values from {value.min():g} to {value.max():g}: use floats from 0 to 1, "
            "or uint8",
            field=name,
        )
    return value.astype(np.float32), False
