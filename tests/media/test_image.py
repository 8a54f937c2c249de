"""Pictures that come in, in every form that people have them: what is read, and what is said of the rest."""

from __future__ import annotations

import struct
import tracemalloc
import zlib
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


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("ending", ["png", "jpg", "webp"])
def test_each_of_a_camera_s_eight_turns_is_followed(tmp_path: Path, turn: int, ending: str) -> None:
    """Stored as the note says, shown as it was: EXIF's own table of where row 0 and column 0 lie."""
    grey = np.repeat(np.repeat(np.float32([[0, 80], [160, 240]]), 16, axis=0), 24, axis=1)  # [32, 48]
    stored = {
        1: grey,
        2: grey[:, ::-1],
        3: grey[::-1, ::-1],
        4: grey[::-1],
        5: grey.T,
        6: grey.T[::-1],
        7: grey.T[::-1, ::-1],
        8: grey.T[:, ::-1],
    }[turn]
    exif = Image.Exif()
    exif[274] = turn
    file = tmp_path / f"turned.{ending}"
    Image.fromarray(stored.astype(np.uint8)).convert("RGB").save(file, exif=exif, quality=95)
    found = pixels_of(file)
    assert found.shape == (32, 48, 3) and np.abs(found[..., 0] - grey / 255).max() < 0.02  # of JPEG


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, rows: bytes, bits: int = 8, *more: bytes) -> bytes:
    """A file of RGB as it stands in the standard, whatever the rows are."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, 2, 0, 0, 0))
    return b"".join(
        [b"\x89PNG\r\n\x1a\n", header, *more, chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    )


def bmp(width: int, height: int) -> bytes:
    about = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 100, 0, 0, 54) + about + bytes(50)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("huge.png", png(60_000, 60_000, bytes(100))),
        ("wide.png", png(2**31 - 1, 1, bytes(100))),
        ("large.png", png(12_000, 9_000, bytes(100))),
        ("huge.bmp", bmp(60_000, 60_000)),
        ("huge.gif", b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0, 0, 0) + b";"),
        ("hollow.png", png(9_000, 9_000, bytes(100))),  # few enough, but they are not there
        # 90 MB of text
        ("text.png", png(1, 1, bytes(4), 8, chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(90 << 20))))),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_header_that_promises_too_much_takes_no_memory(tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / name).write_bytes(data)
    tracemalloc.start()
    with pytest.raises(UsageError, match="pixels|cannot be read as a picture"):
        InputImage.of("image", tmp_path / name)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20 * 2**20, f"{peak / 2**20:.0f} MiB"  # of Python; Pillow's pixels are its own


def test_a_file_of_16_bits_a_colour_keeps_its_upper_8(tmp_path: Path) -> None:
    deep = (RGB.astype(np.uint16) * 256 + 255).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in deep)
    (tmp_path / "deep.png").write_bytes(png(16, 12, rows, 16))
    assert np.array_equal(pixels_of(tmp_path / "deep.png"), RGB / np.float32(255))


@pytest.mark.parametrize("mode", ["CMYK", "L", "RGB"])
def test_a_printer_s_jpeg_has_the_colours_of_a_screen_s(tmp_path: Path, mode: str) -> None:
    smooth = np.add.outer(np.arange(32), np.arange(48))[..., None] + np.uint8([0, 60, 120])
    Image.fromarray(smooth.astype(np.uint8)).convert(mode).save(tmp_path / "a.jpg", quality=98)
    expected = np.asarray(Image.fromarray(smooth.astype(np.uint8)).convert(mode).convert("RGB")) / 255
    assert np.abs(pixels_of(tmp_path / "a.jpg") - expected).mean() < 0.02


def test_a_single_pixel_is_a_picture(tmp_path: Path) -> None:
    Image.new("RGB", (1, 1), (10, 20, 30)).save(tmp_path / "one.png")
    image = InputImage.of("image", tmp_path / "one.png")
    assert image is not None
    assert np.allclose(image.resized(16, 24) * 255, (10, 20, 30))
