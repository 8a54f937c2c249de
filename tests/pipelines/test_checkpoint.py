"""A task as a file: it goes on anywhere to the very same video, and a file that cannot go on says why."""

from __future__ import annotations

import dataclasses
import json
import random
import secrets
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import WAN_TINY, MakeConfig
from running import run_to_end, task_for
from tiny_model import write_tiny_model
from torch import Tensor

from chitu_diffusion.backend import DiffusionBackend
from chitu_diffusion.errors import CannotResumeError, NonFiniteError
from chitu_diffusion.generator import Generator
from chitu_diffusion.media.reading import read_recipe
from chitu_diffusion.pipelines.checkpoint import CheckpointFolder, _Reader, _Writer, load_task, save_task
from chitu_diffusion.task import CascadeStage, DiffusionTask, TaskStatus

SEED = secrets.randbelow(2**31)
STEPS = 8
IMAGE = np.random.default_rng().random((24, 40, 3))
CASCADE = (CascadeStage(32, 32, 4), CascadeStage(48, 48, 4, strength=0.5))


@pytest.fixture(scope="module")
def backends(
    tiny_folder, two_experts_folder, image_folder, frames_folder, tmp_path_factory
) -> dict[str, DiffusionBackend]:
    from running import config_for

    out = tmp_path_factory.mktemp("out")
    folders = {"one": tiny_folder, "two": two_experts_folder, "wan-tiny": WAN_TINY, "image": image_folder}
    folders["both"] = write_tiny_model(out / "both", token_times=True, seed=4)
    folders["frames"] = frames_folder
    return {name: DiffusionBackend(config_for(folder, out)) for name, folder in folders.items()}


SMALL = {"height": 64, "width": 64, "num_frames": 5}
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "no cache": ("one", {}),
    "easycache": ("one", {"flexcache": {"strategy": "easycache", "warmup": 2, "threshold": 5.0}}),
    "dbcache": (
        "one",
        {"flexcache": {"strategy": "dbcache", "first_blocks": 1, "last_blocks": 0, "threshold": 5.0}},
    ),
    "taylorseer": ("one", {"flexcache": {"strategy": "taylorseer", "order": 2}}),
    "pab": ("one", {"flexcache": {"strategy": "pab", "low": 100.0, "high": 990.0}}),
    "teacache": ("wan-tiny", {"flexcache": {"strategy": "teacache", "threshold": 0.4}, **SMALL}),
    "a calibrated plan": ("wan-tiny", {"flexcache": {"strategy": "plan", "speedup": 1.6}, **SMALL}),
    "a cascade": ("one", {"cascade": CASCADE, "num_inference_steps": None}),
    "two experts": ("two", {"flexcache": {"strategy": "interval", "interval": 3}}),
    "two experts, no guidance": ("two", {"guidance_scale": 1.0}),
    "a first frame": ("both", {"image": IMAGE, "flexcache": {"strategy": "taylorseer", "order": 2}}),
    "an image": ("image", {"image": IMAGE, "flexcache": {"strategy": "interval", "interval": 3}}),
    "two images": ("frames", {"image": IMAGE, "last_image": IMAGE[::-1]}),
}


def task_of(more: dict[str, Any], folder: Path) -> DiffusionTask:
    return task_for(
        **{"num_inference_steps": STEPS, "seed": SEED, "save_path": str(folder / "a.npy"), **more}
    )


def frames_of(task: DiffusionTask) -> bytes:
    assert task.status is TaskStatus.FINISHED, task.error_message
    return np.load(task.buffer.save_path).tobytes()


@pytest.mark.parametrize("name", RUNS)
def test_a_task_that_is_cut_short_after_any_unit_ends_in_the_same_bytes(backends, name, tmp_path) -> None:
    which, more = RUNS[name]
    backend = backends[which]
    task = task_of(more, tmp_path)
    saved = []
    for unit, _ in enumerate(run_to_end(Generator(backend), task)):
        if not task.is_finished():
            saved.append(tmp_path / f"{unit}.safetensors")
            save_task(task, saved[-1], backend)
    expected = frames_of(task)
    if task.params.flexcache is not None:
        assert "saved work in 0 of" not in "; ".join(task.notes), "the cache never did anything"
    assert len(saved) == STEPS + 2  # the text, the steps, and decoded frames that are not saved yet
    for unit, file in enumerate(saved):
        found = load_task(file, backend)
        assert found.current_step == min(unit, STEPS) and found.resumed.exact
        other = Generator(backend)
        while not found.is_finished():
            other.generate_step(found)
        assert frames_of(found) == expected, f"{name}, cut after unit {unit}, seed {SEED}"


def interrupted_at(line: int):
    """A trace function that raises Ctrl+C at a line of the stages' own code, counted as they run."""
    left = [line]

    def trace(frame, event, argument):
        if not frame.f_code.co_filename.endswith(
            ("stages.py", "chitu_diffusion/task.py", "pipelines/denoising.py")
        ):
            return None
        if event == "line":
            left[0] -= 1
            if left[0] == 0:
                raise KeyboardInterrupt
        return trace

    return trace


@pytest.mark.parametrize("name", ["easycache", "a cascade"])
def test_ctrl_c_at_any_line_loses_no_step_and_repeats_none(backends, name, tmp_path) -> None:
    which, more = RUNS[name]
    backend = backends[which]
    whole = task_of(more, tmp_path)
    for _ in run_to_end(Generator(backend), whole):
        pass
    expected = frames_of(whole)
    drawn = random.Random(SEED)
    caught = 0
    task = task_of(more, tmp_path)
    generator = Generator(backend)
    while not task.is_finished():
        # the first unit is cut, and of the others every other one at the least is let through
        line = drawn.randrange(1, 260) if caught else drawn.randrange(1, 20)
        sys.settrace(interrupted_at(line) if not caught or drawn.random() < 0.5 else None)
        try:
            generator.generate_step(task)
        except KeyboardInterrupt:
            caught += 1
            sys.settrace(None)
            if task.resolved is not None and not task.is_finished():
                # as another process finds it
                save_task(task, tmp_path / "cut.safetensors", backend)
                task = load_task(tmp_path / "cut.safetensors", backend)
        finally:
            sys.settrace(None)
    assert caught and frames_of(task) == expected, SEED


def plain(value: Any) -> Iterator[Any]:
    """Whatever is no plain value in a value."""
    if isinstance(value, dict):
        for key, each in value.items():
            yield from plain(key)
            yield from plain(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from plain(each)
    elif not isinstance(value, Tensor | int | float | str | bool | None):
        yield value


@pytest.mark.parametrize("name", RUNS)
def test_a_running_task_holds_plain_values_alone(backends, name, tmp_path) -> None:
    which, more = RUNS[name]
    task = task_of(more, tmp_path)
    for _ in run_to_end(Generator(backends[which]), task):
        for part in (task, task.buffer):
            own = {field.name: vars(part)[field.name] for field in dataclasses.fields(part)}
            for known in ("params", "resolved", "buffer", "error", "resumed"):
                own.pop(known, None)
            own["conditioning"] = own.get("conditioning") and vars(own["conditioning"])
            assert not list(plain(own))


# -- the values


def test_values_come_back_as_they_were() -> None:
    shared = torch.randn(2, 3)
    turned = torch.randn(4, 5).t()
    value = {
        "a": [1, 2.5, None, True, "x", (1, (2, shared))],
        3: shared,
        (0, 1): {"b": turned, "half": torch.randn(3).bfloat16(), "scalar": torch.tensor(7)},
        "gaps": torch.randn(6, 6)[::2, ::3],
        "whole": torch.zeros(0, 4),
        "wide": torch.randn(1, 5).expand(3, 5),
        "inf": [float("inf"), -0.0],
    }
    writer = _Writer()
    node = writer.node(value)
    found = _Reader(writer.tensors, torch.device("cpu")).value(json.loads(json.dumps(node)))
    assert found["a"][:5] == value["a"][:5] and found["a"][5][0] == 1 and isinstance(found["a"][5], tuple)
    assert found[3] is found["a"][5][1][1], "what stood twice stands twice"
    assert len(writer.tensors) == 7
    for ours, theirs in [(found[3], shared), (found[(0, 1)]["b"], turned), (found["gaps"], value["gaps"])]:
        assert torch.equal(ours, theirs)
    assert found[(0, 1)]["b"].stride() == turned.stride()
    assert torch.equal(found["wide"], value["wide"]) and found[(0, 1)]["half"].dtype == torch.bfloat16
    assert str(found["inf"]) == "[inf, -0.0]"
    with pytest.raises(TypeError, match="object"):
        writer.node({"a": object()})


# -- files that cannot go on


@pytest.fixture
def begun(backends, tmp_path) -> tuple[DiffusionTask, CheckpointFolder]:
    """A task after 4 steps, with checkpoints after 3 and 4."""
    backend = backends["one"]
    task = task_of({"flexcache": "interval"}, tmp_path)
    folder = CheckpointFolder(tmp_path / "kept")
    generator = Generator(backend)
    for _ in range(5):
        generator.generate_step(task)
        folder.save(task, backend)
    return task, folder


def newest(
    begun: tuple[DiffusionTask, CheckpointFolder], backend: DiffusionBackend
) -> tuple[DiffusionTask | None, list[str]]:
    """What the same request finds, and why not newer ones."""
    task, folder = begun
    notes: list[str] = []
    found = next(folder.usable(backend, task, notes), None)
    return found and found.task, notes


def test_the_last_two_are_kept(begun, backends) -> None:
    _, folder = begun
    assert [file.name for file in sorted(folder.folder.iterdir())] == [
        "rank0-000004-step3.safetensors",
        "rank0-000005-step4.safetensors",
    ]
    task, notes = newest(begun, backends["one"])
    assert task.current_step == 4 and not notes
    folder.clear()
    assert not folder.folder.exists()


def test_the_pause_between_two_runs_is_no_time_of_the_task(begun, backends, monkeypatch) -> None:
    task, _ = begun
    spent = task.get_elapsed_time()
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 86400)
    again, _ = newest(begun, backends["one"])
    assert 0 < again.get_elapsed_time() <= spent
    assert again.created_at == task.created_at


def test_a_damaged_checkpoint_leaves_the_one_before_and_then_nothing(begun, backends) -> None:
    _, folder = begun
    older, newer = sorted(folder.folder.glob("*.safetensors"))
    data = bytearray(newer.read_bytes())
    data[-100] ^= 0x40
    newer.write_bytes(data)
    task, notes = newest(begun, backends["one"])
    assert task.current_step == 3 and "do not fit their hash" in notes[0]
    older.write_bytes(older.read_bytes()[:1000])
    task, notes = newest(begun, backends["one"])
    assert task is None and len(notes) == 2


def test_whatever_a_file_holds_it_is_refused_in_words(begun, backends, tmp_path) -> None:
    _, folder = begun
    good = sorted(folder.folder.glob("*.safetensors"))[-1].read_bytes()
    drawn = random.Random(SEED)
    file = tmp_path / "mutated.safetensors"
    for _ in range(300):
        data = bytearray(good)
        kind = drawn.randrange(4)
        if kind == 0:
            del data[drawn.randrange(len(data)) :]
        elif kind == 1:
            at = drawn.randrange(len(data) - 8)
            del data[at : at + drawn.randrange(1, 8)]
        else:
            # mostly in the header, where the words are
            end = len(data) if kind == 2 else 6000
            for _ in range(drawn.randrange(1, 4)):
                data[drawn.randrange(end)] ^= 1 << drawn.randrange(8)
        file.write_bytes(data)
        with pytest.raises(CannotResumeError):
            load_task(file, backends["one"])
    for data in (b"", b"\0" * 100, b"{}", (2**62).to_bytes(8, "little") + b"{}"):
        file.write_bytes(data)
        with pytest.raises(CannotResumeError):
            load_task(file, backends["one"])
    with pytest.raises(CannotResumeError):
        load_task(tmp_path / "nowhere", backends["one"])


def test_a_checkpoint_that_ends_the_process_is_not_tried_for_ever(begun, backends) -> None:
    task, folder = begun
    steps = []
    for _ in range(8):
        found = next(folder.usable(backends["one"], task, []), None)
        steps.append(0 if found is None else found.task.current_step)
        if found is not None:
            folder.count_try(found)
    assert steps == [4, 4, 4, 3, 3, 3, 0, 0]


def test_who_only_looks_uses_up_no_try(begun, tiny_folder, backends, make_config: MakeConfig) -> None:
    other = DiffusionBackend(make_config(tiny_folder, infer__sampler="euler"))
    for _ in range(5):
        assert newest(begun, other)[0] is None
        assert newest(begun, backends["one"])[0].current_step == 4


@pytest.mark.parametrize(
    ("setting", "value", "said"),
    [
        ("infer__sampler", "euler", "sampler unipc, here euler"),
        ("infer__dtype", "bfloat16", "dtype float32, here bfloat16"),
        ("infer__quant", "fp8", "quant"),
    ],
)
def test_what_must_agree(begun, tiny_folder, make_config: MakeConfig, setting, value, said) -> None:
    backend = DiffusionBackend(make_config(tiny_folder, infer__quant_keep="", **{setting: value}))
    task, notes = newest(begun, backend)
    assert task is None and all(said in note for note in notes), notes


def test_other_weights_are_told(begun, two_experts_folder, make_config: MakeConfig) -> None:
    task, notes = newest(begun, DiffusionBackend(make_config(two_experts_folder)))
    assert task is None and "weights" in notes[0] and "shift 3.0, here 12.0" in notes[0]


def test_another_kernel_goes_on_and_says_so(begun, tiny_folder, make_config: MakeConfig, tmp_path) -> None:
    config = make_config(tiny_folder, infer__attn_type="math")
    backend = DiffusionBackend(config)
    found, _ = newest(begun, backend)
    assert not found.resumed.exact and found.resumed.differs == ("attention auto, here math",)
    for _ in run_to_end(Generator(backend), found):
        pass
    recipe = read_recipe(found.buffer.save_path)
    assert recipe["resumed"]["exact"] is False and recipe["resumed"]["step"] == 4
    assert "attention kernel sdpa, here math" in recipe["resumed"]["differs"]
    config.checkpoint.resume = "exact"
    found, notes = newest(begun, DiffusionBackend(config))
    assert found is None and "checkpoint.resume = exact" in notes[0]


def test_a_nan_never_becomes_a_checkpoint(begun, backends, tmp_path) -> None:
    task, folder = begun
    before = sorted(folder.folder.iterdir())
    task.buffer.latent[0, 0, 0, 0, 0] = torch.nan
    with pytest.raises(NonFiniteError):
        folder.save(task, backends["one"])
    assert sorted(folder.folder.iterdir()) == before
    task.end(TaskStatus.FAILED)
    with pytest.raises(CannotResumeError, match="no state"):
        save_task(task, tmp_path / "x", backends["one"])


def test_a_large_cache_stays_out_and_that_is_said(tiny_folder, make_config: MakeConfig, tmp_path) -> None:
    backend = DiffusionBackend(make_config(tiny_folder, checkpoint__cache_limit_mb=0.001))
    for flexcache in ("taylorseer", {"strategy": "pab", "low": 100.0, "high": 990.0}):
        task = task_of({"flexcache": flexcache}, tmp_path)
        generator = Generator(backend)
        for _ in range(6):
            generator.generate_step(task)
        save_task(task, tmp_path / "a.safetensors", backend)
        found = load_task(tmp_path / "a.safetensors", backend)
        assert not found.resumed.exact and "begins empty" in found.resumed.differs[0]
        for _ in run_to_end(Generator(backend), found):
            pass
        assert found.status is TaskStatus.FINISHED, found.error_message


def test_a_plan_goes_on_with_an_empty_cache(backends, tmp_path) -> None:
    backend = backends["wan-tiny"]
    task = task_of(
        {"flexcache": {"strategy": "plan", "speedup": 2.0}, **SMALL, "num_inference_steps": 16}, tmp_path
    )
    generator = Generator(backend)
    while not task.is_finished():
        generator.generate_step(task)
        if task.status is TaskStatus.DENOISING and task.current_step % 3 == 2:
            task.buffer.cache["records"] = {}
    assert task.status is TaskStatus.FINISHED, task.error_message


def test_only_checkpoints_are_cleared(begun, backends) -> None:
    _, folder = begun
    foreign = ["thesis.txt", "rank0-1x-step2.safetensors", "model.safetensors", "rank0.txt"]
    for name in foreign:
        (folder.folder / name).write_text("years of work")
    (folder.folder / "rank0-000001-step1.safetensors.d").mkdir()
    for name in ("rank1-000007-step3.safetensors", ".rank0-000006-step5.safetensors.0123abcd.part"):
        (folder.folder / name).write_text("a run on two ranks that was cut short")
    found = next(folder.usable(backends["one"], begun[0], []))
    folder.count_try(found)
    CheckpointFolder(folder.folder, rank=1).clear()
    assert not list(folder.folder.glob("rank1-*")) and newest(begun, backends["one"])[0] is not None
    folder.clear()
    assert sorted(file.name for file in folder.folder.iterdir()) == sorted(
        [*foreign, "rank0-000001-step1.safetensors.d"]
    )
