"""What an image encoder is shown of a picture: a square of a few hundred pixels, normalised. Knows
`preprocessor_config.json` and pixels; no network. numpy, Pillow and torch are imported when there is a
picture.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chitu_diffusion.errors import CheckpointError
from chitu_diffusion.media.image import LANCZOS, resized
from chitu_diffusion.models.limits import PREPROCESSING, check_limits

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

_STEPS = ("do_resize", "do_center_crop", "do_rescale", "do_normalize")
_WHITE = 255
_MOST_PIXELS = 2**25
"""That a resized picture may have in memory, before the middle is cut out of it."""


@dataclass(frozen=True)
class ImagePreprocessing:
    """As transformers' `CLIPImageProcessor`: resize by the shorter edge, cut out the middle, normalise.

    Attributes:
        edge: pixels of the shorter edge after resizing.
        side: of the square that is cut out of the middle.
        mean, std: of red, green and blue, in [0, 1].
        resample: number of Pillow's filter; 3 is bicubic.
    """

    edge: int = 224
    side: int = 224
    mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)
    resample: int = 3

    @classmethod
    def from_json(cls, config: Mapping[str, Any], file: Path) -> ImagePreprocessing:
        """Reads a `preprocessor_config.json`, already parsed; what it leaves out is CLIP's own.

        Args:
            file: where it stands, for errors.

        Raises:
            CheckpointError: steps or values that no such processor has.
        """
        flat = dict(config)
        for key, names in (("size", ("shortest_edge",)), ("crop_size", ("height", "width"))):
            value = flat.get(key, cls.edge)
            numbers = {value.get(name) for name in names} if isinstance(value, Mapping) else {value}
            flat[key] = numbers.pop() if len(numbers) == 1 else value  # a square has one number
        check_limits(flat, PREPROCESSING, file)
        done = all(flat.get(step, True) is True for step in _STEPS)
        if not done or abs(flat.get("rescale_factor", 1 / _WHITE) * _WHITE - 1) > 1e-6:
            raise CheckpointError(
                "an image processor that leaves out a step of CLIP's",
                file=file,
                expected=", ".join(_STEPS) + ": true, and rescale_factor 1/255",
            )
        if flat["crop_size"] > flat["size"]:
            raise CheckpointError(
                "the square is larger than the picture that it is cut out of",
                file=file,
                key="crop_size",
                expected=f"at most {flat['size']}",
                found=flat["crop_size"],
            )
        mean = tuple(flat.get("image_mean", cls.mean))
        std = tuple(flat.get("image_std", cls.std))
        return cls(flat["size"], flat["crop_size"], mean, std, flat.get("resample", cls.resample))

    def to_json(self) -> dict[str, Any]:
        """As transformers writes it into `preprocessor_config.json`."""
        return {
            "image_processor_type": "CLIPImageProcessor",
            "size": {"shortest_edge": self.edge},
            "crop_size": {"height": self.side, "width": self.side},
            "image_mean": list(self.mean),
            "image_std": list(self.std),
            "resample": self.resample,
            "rescale_factor": 1 / _WHITE,
            "do_convert_rgb": True,
            **dict.fromkeys(_STEPS, True),
        }

    def cropped(self, picture: NDArray[Any]) -> Tensor:
        """The middle of a picture, as transformers makes it; of a long one the ends are not seen.

        Args:
            picture: [H, W, 3], uint8, or floats in [0, 1], which are rounded to 8 bits.

        Returns:
            [1, 3, side, side] float32.
        """
        import numpy as np
        import torch

        if picture.dtype != np.uint8:
            picture = (picture * _WHITE).round().astype(np.uint8)
        sides = picture.shape[:2]
        whole = [self.edge * side // min(sides) for side in sides]
        pixels = torch.from_numpy(_middle(picture, whole, (self.side, self.side), self.resample))
        return self._normalised(pixels.permute(2, 0, 1)[None])

    def squashed(self, picture: NDArray[Any]) -> Tensor:
        """The whole picture, whatever its shape, as Wan's authors do it (wan/modules/clip.py): bicubic, from
        point to point.

        Args:
            picture: [H, W, 3], uint8, or floats in [0, 1].

        Returns:
            [1, 3, side, side] float32.
        """
        return self._normalised(bicubic(picture, self.side, self.side))

    def _normalised(self, pixels: Tensor) -> Tensor:
        mean, std = (pixels.new_tensor(each).view(3, 1, 1) for each in (self.mean, self.std))
        return (pixels - mean) / std


def covering(picture: NDArray[Any], height: int, width: int) -> Tensor:
    """The middle of a picture at the size at which it covers a frame, by Lanczos, as Wan2.2-TI2V-5B's authors
    do it (wan/textimage2video.py): its shape is kept, and what stands out is cut off.

    Args:
        picture: [H, W, 3], uint8, or floats in [0, 1].

    Returns:
        [1, 3, height, width] float32 in [0, 1].
    """
    import torch

    sides = picture.shape[:2]
    scale = max(height / sides[0], width / sides[1])
    pixels = _middle(picture, [round(side * scale) for side in sides], (height, width))
    return torch.from_numpy(pixels).permute(2, 0, 1)[None]


def _middle(
    picture: NDArray[Any], whole: Sequence[int], kept: Sequence[int], resample: int = LANCZOS
) -> NDArray[np.float32]:
    """What is in the middle of a picture after a resize to (height, width) `whole`: [*kept, 3] in [0, 1].

    Of a picture of one row, which may be a hundred million pixels long, the middle alone is computed; of any
    other all of it, for Pillow rounds between its two passes, and which comes first follows from the size.
    """
    import numpy as np

    sides = picture.shape[:2]
    top, left = begins = [(new - wanted) // 2 for new, wanted in zip(whole, kept, strict=True)]
    if whole[0] * whole[1] <= _MOST_PIXELS:
        pixels = resized(picture, whole[0], whole[1], resample=resample)
        return np.ascontiguousarray(pixels[top : top + kept[0], left : left + kept[1]])
    low, first = (begin * side / new for begin, side, new in zip(begins, sides, whole, strict=True))
    high, wide = (wanted * side / new for wanted, side, new in zip(kept, sides, whole, strict=True))
    box = (first, low, min(first + wide, sides[1]), min(low + high, sides[0]))
    return resized(picture, kept[0], kept[1], box=box, resample=resample)


def bicubic(picture: NDArray[Any], height: int, width: int) -> Tensor:
    """A picture at another size, from point to point without a filter, as Wan's authors do it
    (wan/image2video.py); may reach a little beyond [0, 1].

    Args:
        picture: [H, W, 3], uint8, or floats in [0, 1].

    Returns:
        [1, 3, height, width] float32.
    """
    import numpy as np
    import torch

    scale = _WHITE if picture.dtype == np.uint8 else 1
    pixels = torch.from_numpy(picture.astype(np.float32) / np.float32(scale)).permute(2, 0, 1)[None]
    return torch.nn.functional.interpolate(pixels, size=(height, width), mode="bicubic")
