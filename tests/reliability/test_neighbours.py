"""Hundreds of tasks in one engine: none changes the next, nothing grows, and caches go on."""

from __future__ import annotations

import gc
import itertools
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from card import Card
from conftest import WAN_TINY, MakeConfig
from injecting import files_below, frames_sha256

from chitu_diffusion.engine import Engine
from chitu_diffusion.flexcache.registry import STRATEGIES
from chitu_diffusion.task import CascadeStage, TaskStatus

SETTINGS: tuple[dict[str, Any], ...] = (
    {},
    {"flexcache": "interval"},
    {"flexcache": {"strategy": "pab", "low": 0.0, "high": 1000.0}},
    {"height": 48, "width": 64},
    {"guidance_scale": 1.0, "negative_prompt": "a dog"},
    {
        "cascade": (CascadeStage(32, 32, 2), CascadeStage(48, 48, 2, strength=0.5)),
        "num_inference_steps": None,
    },
)


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waiting for the disk is most of the time here."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def test_no_setting_of_one_task_reaches_the_next(
    tiny_folder: Path, make_config: MakeConfig, tmp_path: Path, card: Card
) -> None:
    """Every ordered pair of settings in one engine, beside each in an engine of its own."""

    def video(engine: Engine, more: dict[str, Any]) -> str:
        path = tmp_path / "a.npy"
        asked = {"seed": 1, "num_inference_steps": 5, "save_path": str(path), **more}
        engine.submit("a cat", **asked)
        engine.run_until_idle()
        return frames_sha256(path)

    alone = []
    for more in SETTINGS:
        with Engine(make_config(tiny_folder)) as engine:
            alone.append(video(engine, more))
    assert len(set(alone)) == len(alone)
    pairs = list(itertools.product(range(len(SETTINGS)), repeat=2))
    with Engine(make_config(tiny_folder)) as engine:
        changed = [
            (before, after)
            for before, after in pairs
            if [video(engine, SETTINGS[each]) for each in (before, after)] != [alone[before], alone[after]]
        ]
    card.add(pairs=len(pairs), changed=len(changed))
    assert not changed


def memory_kib() -> int:
    """What this process holds."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 1024


def test_nothing_grows_over_many_tasks(
    tiny_folder: Path, make_config: MakeConfig, tmp_path: Path, card: Card
) -> None:
    """Of ten tasks eight make a video, one is cancelled and one fails."""
    jobs = card.rounds(80, 650)
    path = tmp_path / "out" / "a.npy"
    (tmp_path / "gone").write_text("a file where a folder should be")
    measured = []
    with Engine(make_config(tiny_folder, checkpoint__every_s=0, scheduler__keep_ended=3)) as engine:
        for number in range(jobs):
            more: dict[str, Any] = {"seed": number, "num_inference_steps": 1}
            task = engine.submit(
                f"cat {number % 70}", save_path=str(path), checkpoints=tmp_path / "k", **more
            )
            engine.step()
            if number % 10 == 3:
                task.cancel()
            if number % 10 == 7:
                task.buffer.conditioning.text.fill_(torch.nan)
            engine.run_until_idle(raise_on_failure=False)
            expected = {3: TaskStatus.CANCELLED, 7: TaskStatus.FAILED}.get(number % 10, TaskStatus.FINISHED)
            assert task.status is expected, task.error_message
            if number % 10 == 9:
                files = len(os.listdir("/proc/self/fd"))
                measured.append((memory_kib(), files, threading.active_count(), len(files_below(tmp_path))))
    half = measured[len(measured) // 2 :]
    growth = (half[-1][0] - half[0][0]) / (10 * (len(half) - 1))
    card.add(jobs=jobs, kib_a_job=round(growth, 2), open_files=half[-1][1] - half[0][1])
    assert growth < 100  # of a task's own tensors, some 1000 KiB
    assert {each[1:] for each in half} == {half[0][1:]}
    assert files_below(tmp_path / "out") == ["a.npy", "a.npy.json"]


CACHES: dict[str, dict[str, Any]] = {
    "blockdance": {"start": 0.2, "boundary": 0.5},
    "cfg_gate": {"interval": 3},
    "dbcache": {"threshold": 9.0, "first_blocks": 1, "last_blocks": 0, "warmup": 2},
    "easycache": {"threshold": 0.6, "warmup": 2},
    "fbcache": {"threshold": 9.0, "warmup": 2},
    "interval": {"interval": 2},
    "magcache": {"ratios": [1.0, *[0.97] * 7]},
    "meancache": {"fresh": 5},
    "pab": {"low": 0.0, "high": 1000.0},
    "plan": {"speedup": 1.6},
    "taylorseer": {"warmup": 1},
    "teacache": {"threshold": 1.2},
}


def test_every_cache_goes_on_where_it_was_cut(make_config: MakeConfig, tmp_path: Path, card: Card) -> None:
    """Another engine goes on after 4 of 8 steps, to the bytes of a run that was not cut."""
    assert set(CACHES) == set(STRATEGIES)
    config = make_config(WAN_TINY, checkpoint__every_s=0)
    asked = {"seed": 5, "num_inference_steps": 8, "height": 32, "width": 32, "num_frames": 5}
    exact = []
    with Engine(config) as one, Engine(config) as other:
        for name, more in CACHES.items():
            own = {**asked, "flexcache": {"strategy": name, **more}}
            kept = tmp_path / name
            one.submit("a red cat", save_path=str(tmp_path / "whole.npy"), **own)
            one.run_until_idle()
            cut = one.submit("a red cat", checkpoints=kept, save_path=str(tmp_path / "cut.npy"), **own)
            for _ in range(5):
                one.step()
            one.cancel(cut.task_id)
            task = other.submit("a red cat", checkpoints=kept, save_path=str(tmp_path / "cut.npy"), **own)
            assert task.resumed is not None and task.resumed.step == 4, name
            other.run_until_idle()
            if (tmp_path / "cut.npy").read_bytes() == (tmp_path / "whole.npy").read_bytes():
                exact.append(name)
    card.add(strategies=len(CACHES), resumable=len(exact))
    assert exact == list(CACHES)
