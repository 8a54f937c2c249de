"""Files of frames: round trips, recipes, names that cannot be, and nothing half-written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import suppress
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from chitu_diffusion.errors import OutputError, UsageError
from chitu_diffusion.media.reading import is_whole, read_frames, read_recipe
from chitu_diffusion.media.video import check_save_path, write_video
from chitu_diffusion.task import DiffusionUserParams

ROOT = Path(__file__).parents[2]
RECIPE = {"prompt": '猫 "walks"\non grass 😀 \x00', "seed": 7, "params": {"guidance_scale": [4.0, 3.0]}}
NAMES = ["a.mp4", "a.gif", "a.npy", "frames/", "frames"]


def moving_square(count: int = 9, height: int = 48, width: int = 64) -> np.ndarray:
    frames = np.full((count, height, width, 3), (30, 144, 255), np.uint8)
    for index in range(count):
        frames[index, 8:24, 3 * index : 3 * index + 16] = (220, 40, 30)
    return frames


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    error = np.mean((a.astype(float) - b.astype(float)) ** 2)
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))


@pytest.mark.parametrize("name", NAMES)
def test_round_trip(tmp_path: Path, name: str) -> None:
    frames = moving_square()
    path = write_video(frames, f"{tmp_path}/new/folder/{name}", fps=16, recipe=RECIPE)
    back = read_frames(path)
    assert back.shape == frames.shape
    assert back.dtype == np.uint8
    assert psnr(back, frames) > (25 if name.endswith(".mp4") else 60)  # 4:2:0 blurs the edges' colour
    assert read_recipe(path) == RECIPE
    assert not list(tmp_path.rglob("*.part"))


def test_mp4_keeps_colours_and_rate(tmp_path: Path) -> None:
    import av

    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (128, 128, 128), (30, 144, 255)]
    frames = np.zeros((5, 32, 16 * len(colours), 3), np.uint8)
    for index, colour in enumerate(colours):
        frames[:, :, 16 * index : 16 * index + 16] = colour
    path = write_video(frames, tmp_path / "c.mp4", fps=12, quality=10)
    middle = read_frames(path)[2, 16, 8::16].astype(int)
    assert np.abs(middle - np.array(colours)).max() <= 4
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert stream.average_rate == 12
        assert stream.codec_context.name == "h264"
        assert stream.codec_context.pix_fmt == "yuv420p"
        assert int(stream.codec_context.colorspace) == 1  # BT.709, and says so


def test_mp4_has_its_index_first(tmp_path: Path) -> None:
    data = write_video(moving_square(), tmp_path / "a.mp4", fps=16).read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")


@pytest.mark.parametrize("name", NAMES)
def test_one_frame(tmp_path: Path, name: str) -> None:
    path = write_video(moving_square(1), f"{tmp_path}/{name}", fps=16, recipe=RECIPE)
    assert read_frames(path).shape == (1, 48, 64, 3)
    assert read_recipe(path) == RECIPE


def test_odd_sizes_are_padded_for_mp4_only(tmp_path: Path) -> None:
    frames = moving_square(5, 33, 47)
    assert read_frames(write_video(frames, tmp_path / "a.mp4", fps=8)).shape == (5, 34, 48, 3)
    assert read_frames(write_video(frames, tmp_path / "a.npy", fps=8)).shape == (5, 33, 47, 3)


def test_better_quality_is_closer_and_larger(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (5, 64, 64, 3), dtype=np.uint8)
    paths = [
        write_video(noise, tmp_path / f"{quality}.mp4", fps=8, quality=quality) for quality in (0, 5, 10)
    ]
    sizes = [path.stat().st_size for path in paths]
    closeness = [psnr(read_frames(path), noise) for path in paths]
    assert sizes == sorted(sizes)
    assert closeness == sorted(closeness)


def test_gif_lasts_as_long_as_the_video(tmp_path: Path) -> None:
    from PIL import Image, ImageSequence

    path = write_video(moving_square(17), tmp_path / "a.gif", fps=16)
    with Image.open(path) as image:
        milliseconds = sum(frame.info["duration"] for frame in ImageSequence.Iterator(image))
    assert abs(milliseconds - 17 / 16 * 1000) <= 10


@pytest.mark.parametrize(
    ("written", "exact"),
    [
        (23.976, Fraction(24000, 1001)),
        ("23.98", Fraction(24000, 1001)),
        (np.float32(29.97), Fraction(30000, 1001)),
        ("60000/1001", Fraction(60000, 1001)),
        (12.5, Fraction(25, 2)),
        (24.0, 24),
        (np.int64(25), 25),
    ],
)
def test_frames_per_second_are_exact_in_request_file_and_recipe(
    tmp_path: Path, written: object, exact: Fraction
) -> None:
    import av

    params = DiffusionUserParams("a cat", fps=written)
    assert params.fps == exact and isinstance(params.fps, int | Fraction)
    plain = json.loads(json.dumps(params.to_mapping()))
    assert plain["fps"] == (str(exact) if isinstance(exact, Fraction) else exact)
    assert DiffusionUserParams.from_mapping(plain) == params
    with av.open(str(write_video(moving_square(5), tmp_path / "a.mp4", fps=params.fps))) as container:
        assert container.streams.video[0].average_rate == exact


@pytest.mark.parametrize(
    "written", [0, -1, 241, 0.5, "fast", "1e3", "25,0", "1/0", True, float("nan"), float("inf"), "9" * 99]
)
def test_frames_per_second_that_cannot_be(written: object) -> None:
    with pytest.raises(UsageError, match="number from 1 to 240"):
        DiffusionUserParams("a cat", fps=written)


def test_numbers_of_numpy_and_pandas_are_taken() -> None:
    given = {"seed": np.int64(3), "num_frames": 5.0, "height": np.float64(64), "priority": np.uint8(1)}
    params = DiffusionUserParams("a cat", guidance_scale=np.float32(2.5), **given)
    assert [type(value) for value in (params.seed, params.num_frames, params.height, params.priority)] == (
        [int] * 4
    )
    assert params.guidance_scale == 2.5 and type(params.guidance_scale) is float
    for seed in (-1, 2**64, 3.5, True, float("nan"), 2.0**53 * 3):
        with pytest.raises(UsageError, match=f"from 0 to {2**63 - 1}"):
            DiffusionUserParams("a cat", seed=seed)


def test_same_frames_same_bytes(tmp_path: Path) -> None:
    frames = moving_square()
    first, second = (
        write_video(frames, tmp_path / name, fps=16, recipe=RECIPE).read_bytes()
        for name in ("a.mp4", "b.mp4")
    )
    assert first == second


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("a.avi", "use .mp4, .gif or .npy"),
        ("a.tar.gz", "use .mp4"),
        ("a.mp4.part", "'.part' is not a format"),
        (".mp4", "put a name before"),
        ("", "must be a file or folder name"),
        ("a\0.mp4", "must be a file or folder name"),
        ("x" * 300 + ".mp4", "too long"),
        ("x" * 300 + "/a.mp4", "too long"),
        ("x/" * 2500 + "a.mp4", "too long"),
        ("\ud800.mp4", "not valid text"),
        ("a\x1b[2J.mp4", "a control character"),
        ("a\nb/c.mp4", "a control character"),
        ("gpj\u202e4pm.exe/", "a control character"),
        (".a.mp4.0123abcd.part/", "files in progress"),
        ("./", "name a new folder"),
        ("x/..", "name a new folder"),
    ],
)
def test_names_that_cannot_be(tmp_path: Path, name: str, hint: str) -> None:
    with pytest.raises(UsageError, match=hint) as caught:
        check_save_path(f"{tmp_path}/{name}" if name not in ("", "./") and "\0" not in name else name)
    assert caught.value.field == "save_path"


def test_kinds() -> None:
    assert [check_save_path(name) for name in ("a.MP4", "a.gif", "x/y.npy", "some.dir/", "plain")] == [
        ".mp4",
        ".gif",
        ".npy",
        "folder",
        "folder",
    ]


def test_what_stands_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "d.mp4").mkdir()
    (tmp_path / "a.npy.json").mkdir()
    for name, hint in (
        ("a.npy", "its recipe goes to"),
        ("file", "a file or a broken link of that name"),
        ("d.mp4", "a folder of that name"),
        ("file/a.mp4", "is a file or a broken link, not a folder"),
    ):
        with pytest.raises(UsageError, match=hint):
            check_save_path(f"{tmp_path}/{name}")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_with_other_things_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "diary.txt").write_text("dear diary")
    with pytest.raises(UsageError, match="diary.txt"):
        write_video(moving_square(), f"{tmp_path}/mine/", fps=8)
    assert (tmp_path / "mine" / "diary.txt").read_text() == "dear diary"


def test_a_folder_of_frames_is_replaced_whole(tmp_path: Path) -> None:
    write_video(moving_square(9), f"{tmp_path}/f/", fps=8, recipe=RECIPE)
    path = write_video(moving_square(5), f"{tmp_path}/f/", fps=8)
    assert sorted(os.listdir(path)) == [f"{index:05d}.png" for index in range(5)]
    assert os.listdir(tmp_path) == ["f"]


@pytest.mark.parametrize(
    "frames", [np.zeros((3, 8, 8)), np.zeros((8, 8, 3), np.uint8), np.zeros((0, 8, 8, 3), np.uint8)]
)
def test_frames_that_cannot_be(tmp_path: Path, frames: np.ndarray) -> None:
    with pytest.raises(UsageError, match="T, H, W, 3"):
        write_video(frames, tmp_path / "a.mp4", fps=8)
    assert not list(tmp_path.iterdir())


def test_rate_and_quality_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="fps = 0"):
        write_video(moving_square(), tmp_path / "a.mp4", fps=0)
    with pytest.raises(UsageError, match="quality = 11"):
        write_video(moving_square(), tmp_path / "a.mp4", fps=8, quality=11)


SMALL_DISK = """
import resource, sys
import numpy as np
from chitu_diffusion.errors import OutputError
from chitu_diffusion.media.video import write_video
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
noise = np.random.default_rng(0).integers(0, 255, (9, 128, 128, 3), dtype=np.uint8)
try:
    write_video(noise, sys.argv[1], fps=8, quality=10)
except OutputError as error:
    print(error)
"""


@pytest.mark.parametrize("name", ["a.mp4", "a.gif", "a.npy", "f/"])
def test_no_room_on_the_disk(tmp_path: Path, name: str) -> None:
    """A limit on the size of files stands in for a full disk: the same road through the code."""
    done = subprocess.run(
        [sys.executable, "-c", SMALL_DISK, f"{tmp_path}/{name}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "the disk is full or a size limit was reached" in done.stdout
    assert "free some space" in done.stdout
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["a.mp4", "a.gif", "a.npy", "f/"])
def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_video(moving_square(5), f"{tmp_path}/{name}", fps=8, recipe=RECIPE)
    before = read_frames(path)

    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("chitu_diffusion.files.atomic._sync", refuse)
    with pytest.raises(OutputError, match="no permission to write into"):
        write_video(moving_square(9), f"{tmp_path}/{name}", fps=8, recipe={"other": 1})
    monkeypatch.undo()
    assert np.array_equal(read_frames(path), before)
    assert read_recipe(path) == RECIPE
    assert sorted(os.listdir(tmp_path)) == sorted({path.name, *([] if name != "a.npy" else ["a.npy.json"])})


def test_hostile_files_are_refused_in_words(tmp_path: Path) -> None:
    write_video(moving_square(5), tmp_path / "a.npy", fps=8)
    (tmp_path / "a.npy.json").write_text("[" * 100_000)
    with pytest.raises(UsageError, match="holds no recipe"):
        read_recipe(tmp_path / "a.npy")
    with pytest.raises(UsageError, match="there is no file"):
        read_recipe(tmp_path / ("a" * 300 + ".mp4"))
    bomb = write_video(moving_square(5), tmp_path / "a.gif", fps=8)
    data = bytearray(bomb.read_bytes())
    data[6:10] = b"\xff" * 4  # the width and height of the whole
    bomb.write_bytes(data)
    with pytest.raises(UsageError, match="cannot be read"):
        read_recipe(bomb)


def test_links_and_leftovers_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "a.npy.part").symlink_to("mine")
    (tmp_path / "nowhere").symlink_to("gone")
    write_video(moving_square(5), tmp_path / "a.npy", fps=8)
    assert (tmp_path / "mine").read_text() == "mine"
    assert not (tmp_path / "a.npy").is_symlink()
    for name in ("nowhere/", "nowhere/a.mp4"):
        with pytest.raises(UsageError, match="broken link"):
            check_save_path(f"{tmp_path}/{name}")


def test_a_link_to_a_folder_of_frames_stays_a_link(tmp_path: Path) -> None:
    write_video(moving_square(9), f"{tmp_path}/f/", fps=8)
    (tmp_path / "link").symlink_to("f")
    write_video(moving_square(5), f"{tmp_path}/link/", fps=8)
    assert (tmp_path / "link").is_symlink()
    assert len(read_frames(tmp_path / "f")) == 5
    assert sorted(os.listdir(tmp_path)) == ["f", "link"]


def test_a_recipe_left_over_from_an_array_is_replaced(tmp_path: Path) -> None:
    frames = np.zeros((1, 16, 16, 3), np.uint8)
    for number in range(2):
        (tmp_path / "a.npy").unlink(missing_ok=True)
        write_video(frames, tmp_path / "a.npy", fps=8, recipe={"number": number})
        assert read_recipe(tmp_path / "a.npy") == {"number": number}


@pytest.mark.parametrize(
    ("name", "beside"), [("a.mp4", "a.mp4.part"), ("f/", "f.part"), ("a.npy", "a.npy.part")]
)
def test_names_in_progress_are_nobody_s(tmp_path: Path, name: str, beside: str) -> None:
    (tmp_path / beside).mkdir()
    (tmp_path / beside / "diary.txt").write_text("dear diary")
    for _ in range(2):
        write_video(moving_square(5), f"{tmp_path}/{name}", fps=8, recipe=RECIPE)
    assert (tmp_path / beside / "diary.txt").read_text() == "dear diary"


@pytest.mark.parametrize("name", ["http:x.mp4", "file:y.mp4", "pipe:1.mp4", "concat:a|b.mp4"])
def test_a_name_is_never_an_address(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_video(moving_square(5), name, fps=8, recipe=RECIPE)
    assert os.listdir(tmp_path) == [name]
    assert read_recipe(name) == RECIPE


KILLED = """
import os, sys
import numpy as np
from chitu_diffusion.files import atomic
from chitu_diffusion.media.video import write_video
atomic._sync = lambda path: os.kill(os.getpid(), 9)
write_video(np.zeros((5, 32, 32, 3), np.uint8), sys.argv[1], fps=8)
"""


@pytest.mark.parametrize("name", ["a.mp4", "a.npy", "f"])
def test_killed_while_writing(tmp_path: Path, name: str) -> None:
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / name)], cwd=ROOT, check=False)
    assert not (tmp_path / name).exists()
    path = write_video(moving_square(5), tmp_path / name, fps=8)  # the rest of the killed one is no obstacle
    assert len(read_frames(path)) == 5
    assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize("name", NAMES)
def test_a_video_cut_anywhere_is_not_whole(tmp_path: Path, name: str) -> None:
    """Of a folder its last frame is cut."""
    path = write_video(moving_square(), f"{tmp_path}/{name}", fps=8, recipe=RECIPE)
    assert is_whole(path, 9, 8)
    assert not is_whole(path, 13, 8)
    file = max(path.glob("*.png")) if path.is_dir() else path
    data = file.read_bytes()
    end = len(data)
    for length in (0, 1, min(500, end // 2), *(end * part // 100 for part in (5, 30, 60, 90, 99)), end - 1):
        file.write_bytes(data[:length])
        with suppress(UsageError):  # it may be that it cannot even be opened
            assert not is_whole(path, 9, 8), length
        with suppress(UsageError):
            read_recipe(path)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "bad.mp4").write_bytes(b"not a video")
    (tmp_path / "bad.npy").write_bytes(b"not an array")
    (tmp_path / "bad.gif").write_bytes(b"GIF89a")
    (tmp_path / "empty").mkdir()
    for name in ("bad.mp4", "bad.npy", "bad.gif", "empty", "nothing.mp4"):
        with pytest.raises(UsageError, match=name):
            read_frames(tmp_path / name)
    for name in ("bad.mp4", "bad.npy", "bad.gif", "empty", "nothing.mp4"):
        with pytest.raises(UsageError, match=name):
            read_recipe(tmp_path / name)


def test_no_recipe_says_so(tmp_path: Path) -> None:
    for name in NAMES:
        path = write_video(moving_square(), f"{tmp_path}/{name}", fps=8)
        with pytest.raises(UsageError, match="holds no recipe"):
            read_recipe(path)


def test_an_old_recipe_does_not_outlive_its_frames(tmp_path: Path) -> None:
    write_video(moving_square(), tmp_path / "a.npy", fps=8, recipe=RECIPE)
    path = write_video(moving_square(), tmp_path / "a.npy", fps=8)
    with pytest.raises(UsageError, match="holds no recipe"):
        read_recipe(path)


def test_npy_never_unpickles(tmp_path: Path) -> None:
    np.save(tmp_path / "evil.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(UsageError, match="cannot be read"):
        read_frames(tmp_path / "evil.npy")


def test_png_carries_the_recipe_itself(tmp_path: Path) -> None:
    from PIL import Image

    path = write_video(moving_square(), f"{tmp_path}/f/", fps=8, recipe=RECIPE)
    with Image.open(path / "00000.png") as image:
        assert json.loads(image.text["recipe"]) == RECIPE


@pytest.mark.parametrize("name", ["list.mp4", "post.gif", "frames"])
def test_a_file_is_read_as_what_its_name_says(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A list of files would have FFmpeg open what it names, and Pillow gives PostScript to another
    program.
    """
    from PIL import EpsImagePlugin, Image

    def ghostscript(*_: object, **__: object) -> None:
        raise AssertionError("another program would run")

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", ghostscript)
    place = tmp_path / name
    if name == "list.mp4":
        write_video(np.zeros((5, 32, 32, 3), np.uint8), tmp_path / "other.mp4", fps=8)
        place.write_text("ffconcat version 1.0\nfile other.mp4\n")
    else:
        if name == "frames":
            place.mkdir()
            place = place / "00000.png"
        Image.new("RGB", (8, 8)).save(place, format="EPS")
    with pytest.raises(UsageError, match="cannot be read"):
        read_frames(tmp_path / name)


def test_what_a_small_file_claims_takes_no_memory(tmp_path: Path) -> None:
    """A header of 2.7 TiB, a cut video, a pipe: refused in words, at once."""
    write_video(moving_square(5), tmp_path / "a.npy", fps=8)
    data = (tmp_path / "a.npy").read_bytes()
    (tmp_path / "a.npy").write_bytes(data.replace(b"(5, ", b"(999999999, ").replace(b"        \n", b"\n"))
    write_video(moving_square(5), tmp_path / "a.mp4", fps=8)
    os.truncate(tmp_path / "a.mp4", 500)
    os.mkfifo(tmp_path / "b.mp4")
    (tmp_path / "f").mkdir()
    os.mkfifo(tmp_path / "f" / "00000.png")
    for name in ("a.npy", "a.mp4", "b.mp4", "f"):
        with pytest.raises(UsageError, match="cannot be read"):
            read_frames(tmp_path / name)
