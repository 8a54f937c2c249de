"""Pictures that come in, in every form that people have them: what is read, and what is said of the rest."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from chitu_diffusion.errors import UsageError
from chitu_diffusion.media.image import InputImage

RGB = np.random.default_rng(3).integers(0, 256, (12, 16, 3), dtype=np.uint8)
GREY = RGB[..., 0]
DEEP = GREY.astype(np.uint16) * 257


def pixels_of(value: object) -> np.ndarray:
    """float32 in [0, 1], at the picture's own size."""
    image = InputImage.of("image", value)
    assert image is not None
    return image.resized(image.height, image.width)


def test_grey_of_16_bits_is_not_cut_at_255(tmp_path: Path) -> None:
    expected = np.repeat(GREY[..., None], 3, axis=-1) / np.float32(255)
    Image.fromarray(DEEP).save(tmp_path / "deep.png")
    with Image.open(tmp_path / "deep.png") as opened:
        for value in (Image.fromarray(DEEP), opened, tmp_path / "deep.png"):
            assert np.array_equal(pixels_of(value), expected)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "YCbCr", "1"])
def test_a_pillow_mode_is_read_as_pillow_shows_it(tmp_path: Path, mode: str) -> None:
    image = Image.fromarray(RGB).convert(mode)
    assert np.array_equal(pixels_of(image), np.asarray(image.convert("RGB")) / np.float32(255))


def test_names_and_arrays_of_other_classes(tmp_path: Path) -> None:
    class Place:
        def __fspath__(self) -> str:
            return str(tmp_path / "own.png")

    Image.fromarray(RGB).save(tmp_path / "own.png")
    for value in (Place(), RGB.view(np.ma.MaskedArray), np.asfortranarray(RGB), RGB[::-1][::-1]):
        assert np.array_equal(pixels_of(value), RGB / np.float32(255))


def closed(folder: Path) -> Image.Image:
    Image.fromarray(RGB).save(folder / "closed.png")
    image = Image.open(folder / "closed.png")
    image.close()
    return image


def truncated(folder: Path) -> Image.Image:
    Image.fromarray(RGB).save(folder / "whole.png")
    data = (folder / "whole.png").read_bytes()
    (folder / "half.png").write_bytes(data[: len(data) // 2])
    return Image.open(folder / "half.png")


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (closed, "the PngImageFile: it cannot be read as a picture"),
        (truncated, "the PngImageFile: it cannot be read as a picture"),
        (lambda _: Image.fromarray(GREY.astype(np.float32) / 255), "mode F.*I;16, or an array of floats"),
        (lambda _: Image.fromarray(DEEP.astype(np.int32)), "mode I,"),
        (lambda _: torch.zeros(12, 16, 3), r"a tensor of \[12, 16, 3\]; expected \[3, H, W\]"),
        (lambda _: torch.zeros(1, 12, 16), r"a tensor of \[1, 12, 16\]"),
        (lambda _: torch.zeros(2, 3, 12, 16), r"a tensor of \[2, 3, 12, 16\]"),
        (lambda _: torch.zeros(3, 12, 16, device="meta"), "on meta, or not dense"),
        (lambda _: torch.zeros(3, 12, 16).to_sparse(), "on meta, or not dense"),
        (lambda _: RGB.transpose(2, 0, 1), r"an array of \[3, 12, 16\]; expected \[H, W, 3\]"),
        (lambda _: RGB.astype(np.float32), "values from 0 to 255: use floats from 0 to 1, or uint8"),
        (lambda _: torch.full((3, 12, 16), -1.0), "a tensor with values from -1 to -1"),
        (lambda _: DEEP, "an array of uint16"),
        (lambda _: RGB.tobytes(), "is a bytes: use a file's name"),
    ],
)
def test_what_is_no_picture_is_refused_in_words(tmp_path: Path, make, said: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        InputImage.of("last_image", make(tmp_path))
    assert caught.value.field == "last_image" and str(caught.value).startswith("last_image")


def test_the_one_of_two_files_that_has_gone_is_named(tmp_path: Path) -> None:
    Image.fromarray(RGB).save(tmp_path / "gone.png")
    image = InputImage.of("last_image", tmp_path / "gone.png")
    assert image is not None
    (tmp_path / "gone.png").write_bytes(b"another")
    with pytest.raises(UsageError, match="^last_image = .*has changed since the request"):
        image.resized(8, 8, "last_image")
    (tmp_path / "gone.png").unlink()
    with pytest.raises(UsageError, match="^last_image = .*no such file"):
        image.resized(8, 8, "last_image")
