"""Previews: near what the decoder makes, no influence on the video, few files, and gone when the job ends."""

from __future__ import annotations

import queue
import socket
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image

from chitu_diffusion.config import EngineConfig
from chitu_diffusion.engine import Engine
from chitu_diffusion.models.spec import LatentGeometry
from chitu_diffusion.pipelines.vae import decode
from chitu_diffusion.service import previews, worker
from chitu_diffusion.service.pipe import LineChannel, Message
from chitu_diffusion.service.previews import PreviewWriter, fit_colours, frames_of
from chitu_diffusion.service.settings import PreviewSettings
from chitu_diffusion.service.worker import JobRunner
from chitu_diffusion.task import DiffusionTask, DiffusionUserParams

ALWAYS = PreviewSettings(every_s=1e-9)
ASKED = {
    "prompt": "a red cube",
    "height": 48,
    "width": 64,
    "num_frames": 17,
    "num_inference_steps": 4,
    "seed": 3,
}
COLOURS = torch.zeros(5, 3)


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine(EngineConfig(infer={"device": "cpu", "dtype": "float32", "threads": 1})) as found:
        yield found


@pytest.fixture(scope="module")
def colours(engine: Engine) -> torch.Tensor:
    return fit_colours(partial(decode, engine.backend), engine.backend.spec.geometry, engine.backend.device)


def test_a_linear_decoder_is_found_again() -> None:
    generator = torch.Generator().manual_seed(1)
    weight = 0.02 * torch.randn(48, 3, generator=generator)

    def linear(latent: torch.Tensor) -> torch.Tensor:
        pixels = torch.einsum("bcthw,cd->btdhw", latent, weight) + 0.5
        return pixels.repeat_interleave(16, -1).repeat_interleave(16, -2)

    found = fit_colours(linear, LatentGeometry((4, 16, 16), 48), torch.device("cpu"))
    torch.testing.assert_close(found[:-1], weight, rtol=0, atol=1e-5)
    torch.testing.assert_close(found[-1], torch.full((3,), 0.5), rtol=0, atol=1e-5)


def test_a_preview_is_near_the_video(engine: Engine, colours: torch.Tensor) -> None:
    latents = []
    engine.generate(
        **ASKED | {"height": 128, "width": 128, "num_inference_steps": 8, "prompt": "a cat walks by the sea"},
        callback_on_step_end=lambda *_: latents.append(_[3]["clean"]()),
    )
    video = decode(engine.backend, latents[-1])[0, ::4]  # the last frame of each latent's
    cells = torch.nn.functional.avg_pool2d(video, 8).permute(0, 2, 3, 1)
    found = torch.from_numpy(frames_of(latents[-1][0], colours, 16)).float() / 255
    error = (found - cells).square().mean().item()
    plain = (cells.mean(dim=(0, 1, 2)) - cells).square().mean().item()
    assert found.shape == (5, 16, 16, 3) and error < plain / 2


def ran(
    engine: Engine, folder: Path, name: str, make: Any = None, **command: Any
) -> tuple[list[Message], bytes]:
    """What a worker says of a job, and the video's pictures."""
    ours, theirs = socket.socketpair()
    runner = JobRunner(engine, LineChannel(theirs), queue.SimpleQueue(), make)
    runner.run({"job": name, "fence": 1, "params": ASKED, "checkpoints": [], **command})
    theirs.close()
    said = list(LineChannel(ours).messages())
    ours.close()
    file = folder / "jobs" / name / "1" / "video.mp4"
    frames = b""
    if file.exists():
        with av.open(str(file)) as video:
            frames = b"".join(bytes(packet) for packet in video.demux(video=0))
    return said, frames


def test_a_worker_tells_of_previews_and_the_video_is_the_same(
    engine: Engine, colours: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(previews, "_COST", 0)
    make = partial(PreviewWriter, colours, 8, ALWAYS)
    watched, frames = ran(engine, tmp_path, "watched", make)
    plain, same = ran(engine, tmp_path, "plain")
    assert frames == same != b""
    steps = [message["step"] for message in watched if message["kind"] == "preview"]
    order = [message["kind"] for message in watched if message["kind"] in ("progress", "preview")]
    assert steps == [1, 2, 3, 4] and order[:3] == ["progress", "progress", "preview"]
    assert not [message for message in plain if message["kind"] == "preview"]
    assert not list(tmp_path.rglob("preview-*"))
    held, _ = ran(engine, tmp_path, "held", make, hold_at_step=3)
    assert held[-1]["kind"] == "held"
    kept = sorted((tmp_path / "jobs" / "held" / "1").glob("preview-*"))
    assert [file.name for file in kept] == ["preview-2.webp", "preview-3.webp"]
    with Image.open(kept[-1]) as picture:
        assert (picture.format, picture.size) == ("WEBP", (4 * 64, 48))
    assert kept[-1].stat().st_size < 2**16


def test_what_a_worker_logs_of_a_job_lies_beside_its_files(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    def broken(*_: object) -> None:
        raise ZeroDivisionError("in the decoder")

    monkeypatch.setattr("chitu_diffusion.pipelines.stages.decode", broken)
    said, _ = ran(engine, tmp_path, "broken")
    assert said[-1]["state"] == "failed" and "decoder" not in str(said[-1])
    log = (tmp_path / "jobs" / "broken" / "log-1.jsonl").read_text(encoding="utf-8")
    assert "Traceback" in log and "in broken" in log and "in the decoder" in log


def test_previews_can_be_off_and_a_decoder_that_fails_turns_them_off(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert worker._previews_of(engine, PreviewSettings(every_s=0)) is None
    assert worker._previews_of(engine, PreviewSettings()) is not None

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(worker, "decode", full)
    assert worker._previews_of(engine, PreviewSettings()) is None


def given(latent: torch.Tensor, asked: list[int]) -> dict[str, Any]:
    def clean() -> torch.Tensor:
        asked.append(1)
        return latent

    return {"clean": clean, "task": DiffusionTask.from_user_request(DiffusionUserParams(prompt="x"))}


def test_nothing_is_computed_before_it_is_due(tmp_path: Path) -> None:
    asked: list[int] = []
    latent = torch.zeros(1, 4, 2, 4, 4)
    rarely = PreviewWriter(COLOURS, 8, PreviewSettings(every_s=60), tmp_path)
    rarely(None, 0, 1000.0, given(latent, asked))
    assert not asked and rarely.take_fresh() is None
    writer = PreviewWriter(COLOURS, 8, ALWAYS, tmp_path)
    writer(None, 0, 1000.0, given(latent, asked))
    assert writer.take_fresh() == 1 and writer.take_fresh() is None
    began = time.monotonic()
    writer(None, 1, 900.0, given(latent, asked))  # a hundred times what the first one took is not over
    assert writer.take_fresh() is None and len(asked) == 1 and time.monotonic() - began < 0.05


def test_a_full_disk_costs_no_job(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    writer = PreviewWriter(COLOURS, 8, ALWAYS, tmp_path / "file")
    writer(None, 0, 1000.0, given(torch.zeros(1, 4, 2, 4, 4), []))
    assert writer.take_fresh() is None


def test_frames_are_spread_and_wide_enough() -> None:
    latent = torch.zeros(1, 9, 2, 3)
    latent[0] = torch.arange(9.0)[:, None, None] / 8
    colours = torch.tensor([[1.0, 0.5, 0.0], [0.0, 0.0, 2.0]])
    frames = frames_of(latent, colours, 4)
    assert np.array_equal(frames[:, 0, 0], [[0, 0, 255], [64, 32, 255], [159, 80, 255], [255, 128, 255]])
    assert previews.strip_of(frames, 8).size == (4 * 24, 16)
    assert previews.strip_of(frames[:1], 100).size == (160, 107)


def test_a_worker_tells_which_steps_a_cache_saved(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    cached = {**ASKED, "num_inference_steps": 6, "flexcache": {"strategy": "interval", "interval": 2}}
    said, _ = ran(engine, tmp_path, "cached", params=cached)
    steps = {
        line["step"]: line["saved"]
        for line in said
        if line["kind"] == "progress" and line["stage"] == "denoising"
    }
    assert len(steps) == 6 and not steps[1] and any(steps.values())
