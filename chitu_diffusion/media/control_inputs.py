"""What steers a controlled video beside a control video: its mask, and pictures of what it shall show. Knows
no model.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chitu_diffusion.errors import UsageError
from chitu_diffusion.files.places import expand_home
from chitu_diffusion.media.clips import ENDINGS
from chitu_diffusion.media.image import InputImage
from chitu_diffusion.media.input_video import InputVideo

MOST_IMAGES = 16


@dataclass(frozen=True)
class InputImages:
    """Pictures that a request brings together, in their order."""

    images: tuple[InputImage, ...]

    @classmethod
    def of(cls, name: str, value: Any) -> InputImages | None:
        """Pictures in whichever form they come; None and an empty list are none.

        Args:
            name: of the field, for errors.
            value: one, or a list of them, each as `InputImage.of` takes it; or what `to_mapping` gave.

        Raises:
            UsageError: something else, too many, or a file that cannot be read.
        """
        if value is None or isinstance(value, cls):
            return value
        if isinstance(value, Mapping) and isinstance(value.get("images"), list):
            value = value["images"]
        given = list(value) if isinstance(value, list | tuple) else [value]
        if len(given) > MOST_IMAGES:
            raise UsageError(f"{name} has {len(given)} pictures; use at most {MOST_IMAGES}", field=name)
        images = [image for each in given if (image := InputImage.of(name, each)) is not None]
        if len(images) < len(given):
            raise UsageError(f"{name} has None in it; use pictures", field=name)
        return cls(tuple(images)) if images else None

    @property
    def sha256(self) -> str:
        """Over the pictures' own."""
        return hashlib.sha256(" ".join(image.sha256 for image in self.images).encode()).hexdigest()

    def to_mapping(self) -> dict[str, Any]:
        """Plain JSON values: not the pixels."""
        return {"sha256": self.sha256, "images": [image.to_mapping() for image in self.images]}

    def require_unchanged(self, name: str) -> None:
        """Checks each as `InputImage.require_unchanged`."""
        for image in self.images:
            image.require_unchanged(name)

    def __len__(self) -> int:
        return len(self.images)


def mask_of(value: Any) -> InputImage | InputVideo | None:
    """A mask in whichever form it comes: a video, or a picture for all frames; None stays None.

    Args:
        value: a name of a file or folder; a list of pictures, an array [T, H, W, 3] or a tensor [T, 3, H, W]
            for a video; else as `InputImage.of`; or what `to_mapping` gave.

    Raises:
        UsageError: something else, or a file that cannot be read.
    """
    if value is None or isinstance(value, InputImage | InputVideo):
        return value
    return InputVideo.of(value, "mask") if _is_video(value) else InputImage.of("mask", value)


def _is_video(value: Any) -> bool:
    import numpy as np

    if isinstance(value, Mapping):
        return "frames" in value
    if isinstance(value, str | os.PathLike):
        path = Path(os.fsdecode(expand_home(value)))
        return path.suffix.lower() in ENDINGS or path.is_dir()
    torch = sys.modules.get("torch")
    if isinstance(value, np.ndarray) or (torch is not None and isinstance(value, torch.Tensor)):
        return bool(value.ndim == 4)
    return isinstance(value, list | tuple)
