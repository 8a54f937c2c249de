"""`chitu eval compare`: its measures beside plain re-computations, and the files it leaves."""

from __future__ import annotations

import importlib.util
import json
import math

import numpy as np
import pytest
import torch

from chitu_diffusion.errors import UsageError
from chitu_diffusion.evaluation.compare import compare, contact_sheet, mean_interval, ssim
from chitu_diffusion.media.reading import read_frames


def videos(shape: tuple[int, ...] = (5, 24, 32, 3)) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    first = random.integers(0, 256, shape, dtype=np.uint8)
    noise = random.integers(-9, 10, shape)
    return first, (first + noise).clip(0, 255).astype(np.uint8)


def test_equal_videos_are_equal() -> None:
    first, _ = videos()
    found = compare(first, first)
    assert set(found.psnr) == {100.0} and found.ssim == pytest.approx([1.0] * 5)
    assert found.flicker[0] == found.flicker[1]
    assert (found.lpips is None) == (importlib.util.find_spec("lpips") is None)


def test_psnr_and_flicker_are_their_formulas() -> None:
    first, second = videos()
    found = compare(first, second)
    for frame in range(5):
        error = np.mean((first[frame].astype(float) - second[frame].astype(float)) ** 2)
        assert found.psnr[frame] == pytest.approx(10 * math.log10(255**2 / error))
    moved = np.abs(np.diff(first.astype(float), axis=0)).mean()
    assert found.flicker[0] == pytest.approx(moved)
    assert found.to_mapping()["flicker"]["difference"] == pytest.approx(found.flicker[1] - moved)


def test_ssim_is_its_formula_window_by_window() -> None:
    first, second = (
        torch.from_numpy(video[0]).permute(2, 0, 1)[None].double() / 255 for video in videos((1, 13, 12, 3))
    )
    line = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    weights = np.outer(line, line) / np.outer(line, line).sum()
    values = []
    for colour in range(3):
        for row in range(3):
            for column in range(2):
                a, b = (
                    video[0, colour, row : row + 11, column : column + 11].numpy()
                    for video in (first, second)
                )
                ma = (weights * a).sum()
                mb = (weights * b).sum()
                va = (weights * (a - ma) ** 2).sum()
                vb = (weights * (b - mb) ** 2).sum()
                cov = (weights * (a - ma) * (b - mb)).sum()
                values.append(
                    (2 * ma * mb + 1e-4) * (2 * cov + 9e-4) / ((ma**2 + mb**2 + 1e-4) * (va + vb + 9e-4))
                )
    assert ssim(first, second) == pytest.approx(np.mean(values), abs=1e-9)


def test_interval_is_of_the_mean() -> None:
    mean, low, high = mean_interval([1.0, 2.0, 3.0, 4.0])
    half = 1.96 * np.std([1, 2, 3, 4], ddof=1) / 2
    assert (mean, low, high) == pytest.approx((2.5, 2.5 - half, 2.5 + half))
    assert mean_interval([7.0]) == (7.0, 7.0, 7.0)


def test_contact_sheet_has_three_rows() -> None:
    first, second = videos((20, 8, 10, 3))
    sheet = contact_sheet(first, second)
    assert sheet.shape == (24, 60, 3) and np.array_equal(sheet[:8, :10], first[0])
    assert np.array_equal(sheet[8:16, -10:], second[-1])


def test_the_command_writes_figures_and_pictures(chitu, tmp_path) -> None:
    first, second = videos()
    np.save(tmp_path / "a.npy", first)
    np.save(tmp_path / "b.npy", second)
    code, out, err = chitu(
        "eval", "compare", tmp_path / "a.npy", tmp_path / "b.npy", "-o", tmp_path / "found"
    )
    assert code == 0, err
    assert "| PSNR, dB |" in out and "flicker" in out
    said = json.loads((tmp_path / "found" / "compare.json").read_text())
    assert said["frames"] == 5 and said["psnr"]["low"] <= said["psnr"]["mean"] <= said["psnr"]["high"]
    assert read_frames(tmp_path / "found" / "side_by_side.mp4").shape == (5, 24, 64, 3)
    assert (tmp_path / "found" / "contact.png").stat().st_size > 100
    code, out, _ = chitu(
        "eval", "compare", tmp_path / "a.npy", tmp_path / "a.npy", "-o", tmp_path / "same", "--json"
    )
    assert code == 0 and json.loads(out)["psnr"]["mean"] == 100.0


def test_what_cannot_be_compared_is_refused(chitu, tmp_path) -> None:
    first, second = videos()
    with pytest.raises(UsageError, match="equal frames, height and width"):
        compare(first, second[:3])
    np.save(tmp_path / "a.npy", first)
    code, _, err = chitu("eval", "compare", tmp_path / "a.npy", tmp_path / "no.npy")
    assert code == 2 and "there is no file" in err


@pytest.mark.parametrize(
    "words", [("compare", "a.npy", "b.npy"), ("adherence",), ("cache",)], ids=lambda words: words[0]
)
def test_a_folder_that_cannot_be_made_is_refused_before_the_work(chitu, tmp_path, words) -> None:
    (tmp_path / "file").write_text("")
    for name, frames in zip(("a.npy", "b.npy"), videos(), strict=True):
        np.save(name, frames)
    code, _, err = chitu("eval", *words, "-o", tmp_path / "file" / "found")
    assert code == 2 and "file/found: Not a directory; use another folder" in err
    assert "loading" not in err and "no file" not in err
