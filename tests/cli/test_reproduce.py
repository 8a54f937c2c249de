"""`chitu reproduce`: the same video from its recipe, and what is said where it is another."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import Chitu
from PIL import Image

from chitu_diffusion.attention import KERNELS, sdpa
from chitu_diffusion.attention.kernels import dense, math_with_lse
from chitu_diffusion.cli.reproduce import NOT_THE_SAME, compare_frames, differences
from chitu_diffusion.media.reading import read_frames, read_recipe
from chitu_diffusion.media.video import write_video

NAMES = ("cat.npy", "cat.mp4", "cat.gif", "frames/")


def make(chitu: Chitu, folder: Path, name: str, *more: object) -> None:
    chitu(
        "generate",
        "a red cat",
        "--model",
        folder,
        "--seed",
        4,
        "-o",
        name,
        "--device",
        "cpu",
        "--size",
        "64x64",
        *more,
    )


def reports(out: str) -> dict:
    return json.loads(out.splitlines()[-1])


@pytest.mark.parametrize("name", NAMES)
def test_the_same_video_again(chitu: Chitu, tiny_folder: Path, name: str) -> None:
    make(chitu, tiny_folder, name, "--steps", 3, "--quality", 6, "--set", "infer.sampler=euler")
    before = sorted(path.name for path in Path().rglob("*"))
    code, out, err = chitu("reproduce", name, "--model", tiny_folder, "--check")
    assert (code, out.splitlines()[0]) == (0, "the same: 5 frames, each identical"), err
    assert sorted(path.name for path in Path().rglob("*")) == before, "--check writes nothing"
    code, out, _ = chitu("reproduce", name, "--model", tiny_folder)
    again = Path(out.splitlines()[-1])
    assert code == 0 and again.name == Path(name).stem + "-again" + Path(name).suffix
    assert np.array_equal(read_frames(again), read_frames(name))
    assert read_recipe(again)["sampler"]["name"] == "euler"


@pytest.mark.parametrize("after", ["50%", "2"])
def test_a_later_kernel_is_taken_from_the_recipe(chitu: Chitu, tiny_folder: Path, after: str) -> None:
    make(chitu, tiny_folder, "cat.npy", "--attn-schedule", f"math@{after}")
    code, out, err = chitu("reproduce", "cat.npy", "--model", tiny_folder, "--check")
    assert code == 0 and "attn_schedule" not in out, err


def test_two_workers_make_it_again(chitu: Chitu, tiny_folder: Path) -> None:
    make(chitu, tiny_folder, "cat.npy", "--dtype", "float32")
    words = ["reproduce", "cat.npy", "--model", str(tiny_folder), "--device", "cpu", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "chitu_diffusion", *words, "--gpus", "2"],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    told = reports(done.stdout)
    assert done.returncode == (0 if told["same"] else NOT_THE_SAME), done.stderr
    assert told["same"] or told["psnr"] > 40, "a rank's share of the sums rounds otherwise"
    assert len(read_frames("cat-again.npy")) == 5


def test_another_video_is_told_with_its_reason(chitu: Chitu, tiny_folder: Path) -> None:
    make(chitu, tiny_folder, "cat.npy")
    code, out, _ = chitu(
        "reproduce", "cat.npy", "--model", tiny_folder, "--set", "infer.sampler=euler", "--check"
    )
    assert code == NOT_THE_SAME and "not the same: PSNR" in out and "differs is 0 of 5" in out
    assert "sampler.name: unipc in the file, euler here" in out and "seconds" not in out


def test_other_weights_are_named(chitu: Chitu, tiny_folder: Path, two_experts_folder: Path) -> None:
    make(chitu, tiny_folder, "cat.npy", "--guidance-scale", 1)
    code, out, _ = chitu("reproduce", "cat.npy", "--model", two_experts_folder, "--check", "--json")
    told = reports(out)
    assert code == NOT_THE_SAME and not told["same"] and told["path"] is None and told["psnr"] < 60
    assert told["differs"]["weights_sha256"]["file"] != told["differs"]["weights_sha256"]["here"]


@pytest.mark.parametrize("name", ["cat.npy", "cat.mp4"])
def test_one_changed_frame_is_found(chitu: Chitu, tiny_folder: Path, name: str) -> None:
    make(chitu, tiny_folder, name)
    frames = read_frames(name).copy()
    frames[3] ^= 128
    write_video(frames, name, fps=8, recipe=read_recipe(name))
    code, out, _ = chitu("reproduce", name, "--model", tiny_folder, "--check", "--json")
    told = reports(out)
    assert code == NOT_THE_SAME and told["differs"] == {}
    # an encoder hands its loss on to the frames beside
    assert told["first_differing_frame"] == 3 if name == "cat.npy" else told["first_differing_frame"] <= 3


def test_a_file_of_other_length(chitu: Chitu, tiny_folder: Path) -> None:
    make(chitu, tiny_folder, "cat.npy")
    write_video(read_frames("cat.npy")[:3], "cat.npy", fps=8, recipe=read_recipe("cat.npy"))
    code, out, _ = chitu("reproduce", "cat.npy", "--model", tiny_folder, "--check")
    assert code == NOT_THE_SAME and "[3, 64, 64, 3] in the file, [5, 64, 64, 3] here" in out


def test_a_kernel_that_does_not_run_here(chitu: Chitu, tiny_folder: Path) -> None:
    make(chitu, tiny_folder, "cat.npy")
    recipe = read_recipe("cat.npy") | {"attention": "fa3", "device": "NVIDIA H100"}
    write_video(read_frames("cat.npy"), "cat.npy", fps=8, recipe=recipe)
    code, out, err = chitu("reproduce", "cat.npy", "--model", tiny_folder, "--device", "cpu", "--check")
    assert code == 0 and "fa3 cannot run here" in err
    assert "attention: fa3 in the file" in out and "device: NVIDIA H100 in the file, cpu here" in out


@pytest.mark.parametrize("schedule", ["flat@2", "flat@28%", "flat@0.5%"])
def test_a_kernel_that_took_over_late_does_so_again(
    chitu: Chitu, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, schedule: str
) -> None:
    """28 % of 25 steps are 7, and not 8, as the nearest float would have it."""
    flat = replace(sdpa, name="flat", exact=False, run=dense(lambda q, k, v: math_with_lse(0.5 * q, k, v)[0]))
    monkeypatch.setitem(KERNELS, "flat", flat)
    late = ("--set", f"infer.attn_schedule={schedule}")
    make(chitu, tiny_folder, "cat.npy", "--steps", 25 if "28" in schedule else 3, *late)
    code, out, err = chitu("reproduce", "cat.npy", "--model", tiny_folder, "--check")
    assert (code, len(out.splitlines())) == (0, 1), out + err
    monkeypatch.delitem(KERNELS, "flat")
    code, out, err = chitu("reproduce", "cat.npy", "--model", tiny_folder, "--check")
    assert code == NOT_THE_SAME and "flat cannot run here" in err
    assert "attn_schedule.kernel: flat in the file, None here" in out


def test_a_picture_that_is_not_there_is_missed_before_the_model_loads(
    chitu: Chitu, image_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a.png", "b.png"):
        Image.fromarray(np.random.default_rng(1).integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(name)
    make(chitu, image_folder, "cat.npy", "--image", "a.png", "--last-image", "b.png")
    code, out, err = chitu("reproduce", "cat.npy", "--model", image_folder, "--check")
    assert code == 0, out + err
    Path("b.png").rename("moved.png")
    moved = ("reproduce", "cat.npy", "--model", image_folder, "--last-image", "moved.png", "--check")
    code, out, err = chitu(*moved)
    assert (code, len(out.splitlines())) == (0, 1), out + err
    monkeypatch.setattr("chitu_diffusion.cli.reproduce._make", None)
    Path("b.png").write_bytes(b"another")
    code, _, err = chitu("reproduce", "cat.npy", "--model", image_folder, "--check")
    assert code == 2 and "last_image = " in err and "b.png': the file has changed" in err
    Path("b.png").unlink()
    code, _, err = chitu("reproduce", "cat.npy", "--model", image_folder, "--check")
    assert code == 2 and "b.png': there is no such file" in err
    recipe = read_recipe("cat.npy")
    recipe["params"]["image"]["path"] = None
    write_video(read_frames("cat.npy"), "cat.npy", fps=8, recipe=recipe)
    code, _, err = chitu("reproduce", "cat.npy", "--model", image_folder, "--check")
    assert code == 2 and "it was given in memory" in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("missing.mp4",), "there is no file"),
        (("bare.npy",), "holds no recipe"),
        (("cat.npy", "--check", "-o", "x.npy"), "--check writes nothing"),
        (("cat.npy", "-o", "cat.npy"), "the video itself"),
        (("cat.npy", "-o", "cat.avi"), "not a format"),
        (("cat.npy",), "no 'params'"),
    ],
)
def test_what_cannot_be_is_refused_first(
    chitu: Chitu, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], said: str
) -> None:
    monkeypatch.setattr("chitu_diffusion.cli.reproduce._make", None)
    frames = np.zeros((1, 4, 4, 3), np.uint8)
    write_video(frames, "bare.npy", fps=8)
    write_video(frames, "cat.npy", fps=8, recipe={"model": "wan-tiny", "seed": 1})
    code, _, err = chitu("reproduce", *words)
    assert code == 2 and said in err


def test_how_frames_are_compared() -> None:
    a = np.random.default_rng(0).integers(0, 256, (4, 6, 8, 3), dtype=np.uint8)
    b = a.copy()
    b[2, 0, 0, 0] ^= 16
    mse = 16.0**2 / a.size
    found = compare_frames(a, b)
    assert found["psnr"] == pytest.approx(10 * np.log10(255**2 / mse), abs=0.01)
    assert found["first_differing_frame"] == 2 and not found["same"]
    assert compare_frames(a, a) == {
        "same": True,
        "frames": [4, 4],
        "psnr": None,
        "first_differing_frame": None,
    }


def test_how_recipes_are_compared() -> None:
    old = {"seed": 1, "seconds": {"denoising": 3}, "params": {"guidance_scale": [4, 3], "task_id": "a"}}
    new = {"seed": 1, "seconds": {"denoising": 4}, "params": {"guidance_scale": (4, 3), "task_id": "b"}}
    assert differences(old, new) == {}
    assert differences(old, {**new, "dtype": "float16"}) == {"dtype": {"file": None, "here": "float16"}}
