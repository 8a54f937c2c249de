"""Videos that others made: containers, orientation, rates, and what is refused within limits."""

from __future__ import annotations

import struct
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from chitu_diffusion.errors import UsageError
from chitu_diffusion.media import clips
from chitu_diffusion.media.clips import clip_facts, clip_frames
from chitu_diffusion.media.input_video import InputVideo
from chitu_diffusion.media.video import write_video


def film(frames: int = 6, height: int = 32, width: int = 64) -> np.ndarray:
    """The left half is dark, and each frame lighter."""
    clip = np.full((frames, height, width, 3), 200, np.uint8)
    clip[:, :, : width // 2] = 20 + 10 * np.arange(frames, dtype=np.uint8)[:, None, None, None]
    return clip


def encoded(path: Path, codec: str, frames: np.ndarray, rate: Fraction) -> Path:
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize(
    ("name", "codec"), [("a.mp4", "mpeg4"), ("a.mov", "mpeg4"), ("a.mkv", "mpeg4"), ("a.webm", "libvpx")]
)
def test_containers_of_others_are_read(tmp_path, name, codec):
    path = encoded(tmp_path / name, codec, film(), Fraction(30000, 1001))
    count, height, width, rate = clip_facts(path)
    assert (count, height, width) == (6, 32, 64) and abs(rate - 29.97) < 0.01
    found = np.stack(list(clip_frames(path)))
    assert found.shape == (6, 32, 64, 3)
    assert abs(found[..., :24, :].mean(axis=(1, 2, 3)) - film()[..., :24, :].mean(axis=(1, 2, 3))).max() < 8
    assert InputVideo.of(path).fps == Fraction(30000, 1001)


@pytest.mark.parametrize(("turns", "matrix"), [(1, (0, -1, 1, 0)), (2, (-1, 0, 0, -1)), (3, (0, 1, -1, 0))])
def test_a_phone_s_orientation_is_followed(tmp_path, turns, matrix):
    """The note lies in the track's header: a matrix of fixed point numbers (ISO 14496-12, 8.3.2)."""
    path = encoded(tmp_path / "a.mp4", "mpeg4", film(), Fraction(10))
    data = bytearray(path.read_bytes())
    start = data.index(b"tkhd") + 4 + 40
    a, b, c, d = (65536 * value for value in matrix)
    data[start : start + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    video = InputVideo.of(path)
    assert (video.height, video.width) == ((64, 32) if turns % 2 else (32, 64))
    turned = np.rot90(film()[0], turns)
    assert abs(next(clip_frames(path)).astype(int) - turned).mean() < 8


def test_a_gif_s_rate_is_that_of_its_durations(tmp_path):
    write_video(film(), tmp_path / "a.gif", fps=20)
    assert InputVideo.of(tmp_path / "a.gif").fps == 20


def test_pictures_of_any_name_are_a_folder(tmp_path):
    for number, frame in enumerate(film(3)):
        Image.fromarray(frame).save(tmp_path / f"shot_{number:03d}.PNG")
    (tmp_path / "notes.txt").write_text("-")
    video = InputVideo.of(tmp_path)
    assert video.frames == 3 and np.array_equal(np.stack(list(clip_frames(tmp_path))), film(3))
    Image.fromarray(film(1, 16, 64)[0]).save(tmp_path / "shot_001.PNG")
    with pytest.raises(UsageError, match="a frame has .16, 64. pixels and the first .32, 64."):
        list(clip_frames(tmp_path))
    with pytest.raises(UsageError, match="has changed since the request"):
        list(video.resized(1, 32, 64))


def test_pictures_of_16_bits_keep_their_upper_8(tmp_path):
    grey = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000
    Image.fromarray(grey).save(tmp_path / "0.png")
    assert np.array_equal(next(clip_frames(tmp_path))[..., 0], grey >> 8)


def test_a_film_of_many_frames_is_counted_up_to_a_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(clips, "MOST_FRAMES", 4)
    assert clip_facts(encoded(tmp_path / "a.mp4", "mpeg4", film(), Fraction(10)))[0] == 4
    np.save(tmp_path / "a.npy", film())
    assert clip_facts(tmp_path / "a.npy")[0] == 4


def broken(tmp_path: Path, name: str, data: bytes) -> Path:
    path = tmp_path / name
    path.write_bytes(data)
    return path


def test_what_is_no_video_is_refused_in_words(tmp_path):
    whole = encoded(tmp_path / "whole.mp4", "mpeg4", film(), Fraction(10)).read_bytes()
    np.save(tmp_path / "flat.npy", np.zeros((3, 4), np.uint8))
    np.save(tmp_path / "large.npy", np.full((1, 4, 4, 3), 2.0))
    (tmp_path / "empty").mkdir()
    for path, words in (
        (broken(tmp_path, "text.mp4", b"#EXTM3U\nhttp://example.org/a.ts"), "cannot be read"),
        (broken(tmp_path, "cut.mp4", whole[: len(whole) // 2]), "cannot be read"),
        (broken(tmp_path, "empty.gif", b""), "cannot be read"),
        (tmp_path / "flat.npy", r"it holds uint8 \[3, 4\]"),
        (tmp_path / "empty", "holds no .png files"),
        (tmp_path / "none.mp4", "No such file"),
    ):
        with pytest.raises(UsageError, match=words):
            InputVideo.of(path)
    with pytest.raises(UsageError, match="below 0 or above 1"):
        list(clip_frames(tmp_path / "large.npy"))


def test_a_video_of_which_nothing_can_be_decoded_is_refused_in_words(tmp_path, monkeypatch):
    path = encoded(tmp_path / "a.mp4", "mpeg4", film(), Fraction(10))
    monkeypatch.setattr("chitu_diffusion.media.clips._upright", lambda frames: iter(()))
    with pytest.raises(UsageError, match="no picture in it can be decoded"):
        InputVideo.of(path)


def test_more_bytes_or_pixels_than_the_limits_are_refused(tmp_path, monkeypatch):
    path = encoded(tmp_path / "a.mp4", "mpeg4", film(), Fraction(10))
    np.lib.format.open_memmap(tmp_path / "wide.npy", "w+", np.uint8, (1, 1, 9000, 3))
    with pytest.raises(UsageError, match="more than a video of ours has"):
        InputVideo.of(tmp_path / "wide.npy")
    monkeypatch.setattr(clips, "_MOST_BYTES", 100)
    with pytest.raises(UsageError, match="more than 100 bytes; cut out"):
        InputVideo.of(path)


def test_a_file_that_lost_its_end_is_noticed(tmp_path):
    path = encoded(tmp_path / "a.mp4", "mpeg4", film(), Fraction(10))
    video = InputVideo.of(path)
    claimed = InputVideo(video.path, video.sha256, 9, video.width, video.height)
    with pytest.raises(UsageError, match="to have 9 frames, and 6 can be decoded"):
        list(claimed.resized(9, 32, 64))
