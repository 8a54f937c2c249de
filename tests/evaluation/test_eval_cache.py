"""`chitu eval cache`: rows that are kept, sums by hand, forwards counted for what they are, and words for bad
settings.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from running import config_for

from chitu_diffusion.backend import DiffusionBackend
from chitu_diffusion.errors import TaskError
from chitu_diffusion.evaluation import cache_table
from chitu_diffusion.evaluation.cache_rows import FULL, Video, VideoRow
from chitu_diffusion.evaluation.cache_table import (
    SETTINGS,
    check_settings,
    evaluate,
    sum_up,
    table,
    write_results,
)
from chitu_diffusion.evaluation.videos import make_video
from chitu_diffusion.evaluation.workers import Workers

STEPS = 6


@pytest.fixture(scope="module")
def backend(tiny_folder, tmp_path_factory):
    return DiffusionBackend(config_for(tiny_folder, tmp_path_factory.mktemp("outputs")))


@pytest.mark.parametrize(
    ("cache", "saved"),
    [
        (None, 0.0),
        ({"strategy": "meancache", "steps": "0+2+5"}, 3 / 6),
        ({"strategy": "meancache", "steps": "0+2+5", "level": "step", "predictor": "reuse"}, 3 / 6),
        ({"strategy": "cfg_gate", "start": 0.5, "interval": 0, "cooldown": 0}, 3 / 12),
        ({"strategy": "blockdance", "start": 0.0, "end": 1.0, "boundary": 0.5, "cooldown": 0}, None),
    ],
    ids=str,
)
def test_work_is_counted_for_what_it_is(backend, cache, saved) -> None:
    made = make_video(backend, prompt="a cat", seed=1, num_inference_steps=STEPS, flexcache=cache)
    if saved is None:  # one of two blocks in some steps
        skipped = 2 * STEPS - made.work
        assert skipped > 0 and skipped == pytest.approx(round(skipped))
    else:
        assert made.work == pytest.approx(2 * STEPS * (1 - saved))
    assert made.frames.shape == (5, 32, 32, 3) and made.frames.dtype == np.uint8
    assert 0 < made.forward_seconds < made.seconds


def test_modules_count_by_their_multiplications(backend) -> None:
    every = {"strategy": "interval", "interval": 2, "level": "module", "warmup": 1, "cooldown": 0}
    made = make_video(backend, prompt="a cat", seed=1, num_inference_steps=STEPS, flexcache=every)
    assert made.work == pytest.approx(2 * STEPS / 2)  # all modules of every second step


def test_an_evaluation_goes_on_where_it_stopped(tiny_folder, tmp_path, monkeypatch) -> None:
    config = config_for(tiny_folder, tmp_path)
    videos = [Video("a cat", 0), Video("a dog", 1)]
    chosen = ["steps=3", "interval:interval=2,warmup=1", "plan:speedup=2"]
    own = {"num_inference_steps": STEPS}
    seen = []
    work = tmp_path / "work"
    first, about = evaluate(
        config, videos, work, chosen=chosen, settings=own, on_row=lambda *said: seen.append(said)
    )
    assert [done for done, _, _ in seen] == list(range(1, 9)) and {total for _, total, _ in seen} == {8}
    lines = {line.setting: line for line in first}
    assert lines["steps=3"].fewer == pytest.approx(2) and lines["steps=3"].psnr is not None
    assert lines["plan:speedup=2"].videos == 0 and "chitu calibrate" in lines["plan:speedup=2"].error
    assert about["steps"] == STEPS

    # what is there is not made again; what failed is tried again
    made = []
    monkeypatch.setattr("chitu_diffusion.evaluation.cache_rows._warm", lambda *_: None)
    monkeypatch.setattr(
        "chitu_diffusion.evaluation.cache_rows.make_video", lambda *_, **asked: made.append(asked) or 1 / 0
    )
    with pytest.raises(ZeroDivisionError):
        evaluate(config, videos, work, chosen=chosen, settings=own)
    assert [asked["flexcache"] for asked in made] == [{"strategy": "plan", "speedup": 2}]
    again, _ = evaluate(config, videos, work, chosen=chosen[:2], settings=own)
    assert [line.psnr for line in again] == [line.psnr for line in first[:3]]

    # a row that a dying machine left empty is made again
    next(
        file for file in work.glob("*.json") if json.loads(file.read_text())["setting"] == "steps=3"
    ).write_text("")
    with pytest.raises(ZeroDivisionError):
        evaluate(config, videos, work, chosen=chosen[:2], settings=own)
    assert made[-1]["num_inference_steps"] == 3


def row(setting: str, prompt: str = "a", **values) -> VideoRow:
    return VideoRow(setting, prompt, 0, **values)


def test_lines_are_the_sums_of_their_rows() -> None:
    full = {"seconds": 10.0, "forward_seconds": 8.0, "work": 100.0, "right": 1.0}
    near = {"ssim": 0.9, "flicker": (2.0, 2.5), "right": 0.75}
    rows = [
        row(FULL, **full),
        row(FULL, "b", **full),
        row("pab", psnr=30.0, seconds=6.0, work=50.0, **near),
        row("pab", "b", psnr=34.0, seconds=6.4, work=50.0, **near),
        row("plan:speedup=1.5", psnr=45.0, seconds=7.0, work=100 / 1.5, **near),
        row("plan:speedup=4", psnr=25.0, seconds=3.0, work=25.0, **near),
        row("fbcache", error="UsageError: no"),
    ]
    lines = {
        line.setting: line for line in sum_up(rows, ["pab", "plan:speedup=1.5", "plan:speedup=4", "fbcache"])
    }
    pab = lines["pab"]
    assert pab.psnr[0] == 32 and pab.psnr[1] < 32 < pab.psnr[2] and pab.saved == pytest.approx(0.5)
    assert pab.faster == pytest.approx(20 / 12.4) and pab.adherence == 0.75 and pab.flicker == 0.5
    assert pab.kept_of_saving == pytest.approx(7.6 / 8)
    assert pab.above == pytest.approx(45 - (2 - 1.5) / 2.5 * 20 - 32)
    assert lines["fbcache"].error == "UsageError: no" and lines[FULL].psnr is None
    assert "| `fbcache` | UsageError: no |" in table(list(lines.values()))
    with pytest.raises(TaskError, match="full compute failed: oh"):
        sum_up([row(FULL, error="oh")], [])


NEAR = {"pab": 30.0, "plan:speedup=2": 40.0, "kernel=math": 90.0}


def test_results_are_three_files(tmp_path) -> None:
    from PIL import Image

    rows = [row(FULL, seconds=1.0, forward_seconds=1.0, work=10.0)]
    rows += [row(name, psnr=value, ssim=0.9, seconds=0.5, work=5.0) for name, value in NEAR.items()]
    lines = sum_up(rows, list(NEAR))
    about = {
        "model": "m",
        "steps": 50,
        "guidance": [5.0, 5.0],
        "size": [32, 32, 5],
        "device": "cpu",
        "dtype": "float32",
    }
    about["workers"] = 1
    write_results(lines, about, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache.json", "cache.md", "cache.png"]
    said = json.loads((tmp_path / "cache.json").read_text())
    assert said["lines"][2]["fewer"] == pytest.approx(2) and said["lines"][2]["psnr"][0] == 40
    picture = np.asarray(Image.open(tmp_path / "cache.png"))
    assert (picture == (200, 40, 40)).all(-1).any() and picture.shape[1] > 1000


def test_every_setting_is_one() -> None:
    check_settings(SETTINGS)


def test_every_strategy_stands_in_the_table() -> None:
    from chitu_diffusion.flexcache.registry import STRATEGIES

    assert {setting.partition(":")[0] for setting in SETTINGS} >= set(STRATEGIES)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--settings", "pap"), "Did you mean 'pab'"),
        (("--settings", "steps=x"), "use steps=30"),
        (("--settings", "kernel=mat"), "Did you mean 'math'"),
        (("--prompts", "none.txt"), "--prompts none.txt"),
        (("--prompts", "0"), "use 1 to 64, or a text file"),
        (("--prompts", "65"), "use 1 to 64, or a text file"),
        (("-o", __file__), f"-o {__file__}: "),
        (("--work", __file__), f"--work {__file__}: "),
        (("--seeds", "3..1"), "a rising range"),
    ],
)
def test_bad_settings_are_told_before_anything_is_loaded(chitu, monkeypatch, tmp_path, flags, said) -> None:
    monkeypatch.setattr(cache_table, "Workers", None)
    monkeypatch.chdir(tmp_path)
    code, _, err = chitu("eval", "cache", *flags)
    assert code == 2 and said in err, err


def test_the_command_with_two_processes(chitu, tiny_folder, tmp_path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    own = (
        "--model",
        folder,
        "--prompts",
        1,
        "--seeds",
        "0..1",
        "--steps",
        4,
        "--settings",
        "steps=2",
        "--workers",
        2,
    )
    code, out, err = chitu("eval", "cache", *own, "-o", "found", "--work", "kept", "--device", "cpu")
    assert code == 0 and "| `steps=2` | 50.0% | 2.00x |" in out, err
    assert sorted(path.name for path in (tmp_path / "found").iterdir()) == [
        "cache.json",
        "cache.md",
        "cache.png",
    ]
    line = json.loads((tmp_path / "found" / "cache.json").read_text())["lines"][1]
    assert line["adherence"] is not None and dataclasses.asdict(Video("a", 0))["words"] is None


def test_workers_do_not_choose_kernels_by_timing(tiny_folder, tmp_path, monkeypatch) -> None:
    """Two processes that time on a shared device might choose differently."""
    asked = []
    monkeypatch.setattr(
        "chitu_diffusion.attention.autotune.candidates", lambda *_, **__: asked.append(1) or []
    )
    with Workers(config_for(tiny_folder, tmp_path)) as workers:
        workers.submit(DiffusionBackend.choose_attention, 77)
        workers.result()
    assert not asked


def test_no_worker_outlives_a_killed_parent(tiny_folder) -> None:
    """Each would hold its model in the device's memory for good. They share the parent's stdout, which ends
    with the last.
    """
    code = (
        "import sys, time; from chitu_diffusion.config import load_config; "
        "from chitu_diffusion.evaluation.workers import Workers; "
        "workers = Workers(load_config(flags={'models.name': sys.argv[1], 'infer.device': 'cpu'})[0], 2); "
        "print('begun', flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, str(tiny_folder)], stdout=subprocess.PIPE)
    assert parent.stdout is not None and parent.stdout.readline() == b"begun\n"
    parent.kill()
    try:
        assert parent.communicate(timeout=30)[0] == b""
    finally:
        parent.stdout.close()
