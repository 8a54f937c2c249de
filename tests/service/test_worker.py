"""The shipped model in workers of the real forkserver: killed, parked, held; the same video at the end."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import av
import pytest
from PIL import Image
from supervising import settings_of, supervised, until

from chitu_diffusion.config import EngineConfig
from chitu_diffusion.errors import NonFiniteError, OutputError, StageError, UsageError, WillNotFitError
from chitu_diffusion.service.failures import failure_of
from chitu_diffusion.service.jobs import JobState, NewJob
from chitu_diffusion.service.launcher import WorkerLauncher
from chitu_diffusion.service.slot import Patience
from chitu_diffusion.service.stills import write_stills
from chitu_diffusion.service.store import JobStore, open_store
from chitu_diffusion.service.worker import take_over

LOAD = 2
"""Times that tests beside this one may slow it."""
STEPS = 6
ASKED = {"prompt": "a red cube", "height": 32, "width": 32, "num_frames": 5, "num_inference_steps": STEPS}
NEW = NewJob("ann", "wan-tiny", {}, ASKED, "hash", seed=3)


@pytest.fixture(scope="module")
def launcher() -> Iterator[WorkerLauncher]:
    """One forkserver for all: it imports torch."""
    found = WorkerLauncher()
    yield found
    found.close()


def engine_of(**more: object) -> EngineConfig:
    infer = {"device": "cpu", "dtype": "float32", "threads": 1}
    return EngineConfig(infer=infer, checkpoint={"every_s": 0.0}, **more)


def video_of(data: Path, store: JobStore, job_id: str) -> bytes:
    """The encoded pictures, without the recipe, which holds how long each stage took."""
    with av.open(str(data / store.artifacts(job_id)["video"].path)) as video:
        return b"".join(bytes(packet) for packet in video.demux(video=0))


def test_a_killed_and_a_parked_job_make_the_video_of_an_undisturbed_one(
    tmp_path: Path, launcher: WorkerLauncher
) -> None:
    settings = settings_of(tmp_path, preview={"every_s": 0.001})
    store = open_store(settings.store_url())

    def at_step(job_id: str, step: int) -> None:
        until(lambda: (saved := store.job(job_id).checkpoint) and saved.step >= step, 60)

    def submit(**more: object) -> str:
        return store.submit(NewJob(**{**vars(NEW), **more})).job.id

    with supervised(settings, store, launcher, engine_of(), Patience()) as stop:
        whole = submit()
        killed = submit()
        at_step(killed, 3)
        pid = next(row.pid for row in store.workers.all())
        os.kill(pid, signal.SIGKILL)
        died = time.monotonic()
        until(lambda: any(row.pid != pid and row.state == "busy" for row in store.workers.all()))
        seconds = time.monotonic() - died
        until(lambda: store.job(killed).state.ended)
        parked = submit()
        at_step(parked, 2)
        stop()
    assert seconds < 1.5 * LOAD, f"a killed worker ran again after {seconds:.1f} s"
    assert store.job(parked).state is JobState.QUEUED
    with supervised(settings, store, launcher, engine_of(), Patience()):
        cancelled = submit(resolved={**ASKED, "num_inference_steps": 500})
        held = submit(hold_at_step=2)
        until(lambda: store.job(parked).state.ended)
        at_step(cancelled, 1)
        store.cancel(cancelled)
        until(lambda: store.job(held).state is JobState.HELD)
        store.release(held)
        until(lambda: store.job(held).state.ended)
    want = video_of(tmp_path, store, whole)
    for job_id, attempt in ((killed, 2), (parked, 2), (held, 2)):
        assert store.job(job_id).attempt == attempt
        resumed = [event.data for event in store.events(job_id) if event.kind == "resumed"]
        assert [said["exact"] for said in resumed] == [True] and resumed[0]["from_step"] >= 2
        assert video_of(tmp_path, store, job_id) == want
    for job_id in (whole, killed, held, cancelled):
        folder = tmp_path / "jobs" / job_id
        assert any(event.kind == "preview" for event in store.events(job_id))
        assert not list(folder.glob(f"{store.job(job_id).fence}/preview-*"))
        assert (folder / f"log-{store.job(job_id).fence}.jsonl").exists()
    assert store.job(cancelled).state is JobState.CANCELLED
    sizes = {"thumbnail": (32, 32), "spritesheet": (5 * 32, 32)}
    for variant, size in sizes.items():
        artifact = store.artifacts(killed)[variant]
        assert artifact.media_type == "image/webp"
        with Image.open(tmp_path / artifact.path) as picture:
            assert (picture.format, picture.size) == ("WEBP", size)
    store.close()


def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path: Path, launcher: WorkerLauncher) -> None:
    settings = settings_of(tmp_path)
    store = open_store(settings.store_url())
    with supervised(settings, store, launcher, engine_of(), Patience()) as stop:
        whole = store.submit(NEW).job.id
        until(lambda: store.job(whole).state.ended, 60)
        job_id = store.submit(NEW).job.id
        until(lambda: len(store.job(job_id).checkpoints) == 2 and store.job(job_id).step)
        stop()
    newest, before = store.job(job_id).checkpoints
    file = tmp_path / newest.path
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with supervised(settings, store, launcher, engine_of(), Patience()):
        bad = store.submit(NewJob(**{**vars(NEW), "resolved": {**ASKED, "image": "no-such.png"}})).job.id
        until(lambda: store.job(job_id).state.ended and store.job(bad).state.ended)
    resumed = next(event.data for event in store.events(job_id) if event.kind == "resumed")
    assert resumed["from_step"] == before.step
    assert resumed["differs"] == [f"the checkpoint of step {newest.step}: it is damaged"]
    assert video_of(tmp_path, store, job_id) == video_of(tmp_path, store, whole)
    failed = store.job(bad)
    assert failed.error is not None and (failed.state, failed.error.code) == ("failed", "bad_value")
    assert "no-such" not in failed.error.message and str(tmp_path) not in str(failed.error)
    store.close()


def test_neither_supervisor_nor_launcher_imports_torch() -> None:
    code = "import sys, chitu_diffusion.service.supervisor; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


def test_the_forkserver_has_no_threads_and_no_device(tmp_path: Path, launcher: WorkerLauncher) -> None:
    """A fork would have neither: of threads one goes on, and a CUDA context works in one process alone."""
    settings = settings_of(tmp_path)
    store = open_store(settings.store_url())
    with supervised(settings, store, launcher, engine_of(), Patience()):
        until(lambda: any(row.state == "ready" for row in store.workers.all()), 60)
        row = until(lambda: next((row for row in store.workers.all() if row.weights_sha256), None))
        assert len(row.weights_sha256) == 64 and row.fits["device"] == "cpu"
        # 33 frames of 128x128 take megabytes
        assert row.fits["tokens"] > 9 * 64 and row.fits["memory_bytes"] > 2**30
        process = Path(f"/proc/{launcher.pid}")
        assert len(list((process / "task").iterdir())) == 1
        assert not [file for file in (process / "fd").iterdir() if "nvidia" in os.readlink(file)]
    store.close()


def test_checkpoints_that_are_gone_are_said(tmp_path: Path) -> None:
    notes = take_over([{"path": str(tmp_path / "none"), "step": 4, "sha256": "ab"}], tmp_path / "own")
    assert (
        notes == ["the checkpoint of step 4: No such file or directory"] and not (tmp_path / "own").exists()
    )


@pytest.mark.parametrize(
    ("error", "code", "may_pass"),
    [
        (OSError(errno.ENOSPC, "No space left", "/data/secret"), "disk_full", True),
        (OSError(errno.ESTALE, "Stale", "/data/secret"), "storage", True),
        (WillNotFitError("secret"), "will_not_fit", False),
        (NonFiniteError("secret"), "non_finite", False),
        (UsageError("steps = 0: use 1 or more", field="num_inference_steps"), "bad_value", False),
        (UsageError("image = /data/secret: no such file", field="image"), "bad_value", False),
        (RuntimeError("secret"), "internal", False),
    ],
)
def test_a_failure_says_its_code_and_no_path(error: Exception, code: str, may_pass: bool) -> None:
    for raised in (error, StageError("denoising", 3, error), _output_error(error)):
        said, passes = failure_of(raised)
        assert (said["code"], passes) == (code, may_pass)
        assert "secret" not in str(said)
        if isinstance(raised, StageError):
            assert (said["stage"], said["step"]) == ("denoising", 3)


def _output_error(cause: Exception) -> Exception:
    try:
        raise OutputError("cannot write '/data/secret'") from cause
    except OutputError as error:
        return error


def test_a_video_that_cannot_be_read_has_no_pictures(tmp_path: Path) -> None:
    video = tmp_path / "video.mp4"
    video.write_bytes(b"no video")
    with pytest.raises(OSError, match="Invalid data"):
        write_stills(video)
    assert list(tmp_path.iterdir()) == [video]
