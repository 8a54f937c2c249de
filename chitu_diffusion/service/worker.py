"""A worker: an engine behind a pipe, one job at a time. Ends when the pipe closes.

Knows no SQL, HTTP or keys; of the service's modules the only one that imports the engine.
"""

from __future__ import annotations

import faulthandler
import hashlib
import json
import logging
import os
import queue
import shutil
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch

from chitu_diffusion.backend import DiffusionBackend
from chitu_diffusion.config import EngineConfig
from chitu_diffusion.engine import Engine
from chitu_diffusion.errors import RankLostError, UsageError
from chitu_diffusion.files.atomic import new_file
from chitu_diffusion.media.video import file_sha256
from chitu_diffusion.memory.device import total_memory
from chitu_diffusion.pipelines.admission import Admission
from chitu_diffusion.pipelines.fingerprint import fingerprint_of
from chitu_diffusion.pipelines.recipe import device_name
from chitu_diffusion.pipelines.vae import decode
from chitu_diffusion.service.failures import failure_of
from chitu_diffusion.service.job_log import logged
from chitu_diffusion.service.logs import logged_about, logs_to_stderr
from chitu_diffusion.service.pipe import LineChannel, Message
from chitu_diffusion.service.previews import PreviewWriter, fit_colours
from chitu_diffusion.service.settings import LogSettings, PreviewSettings
from chitu_diffusion.service.stills import write_stills
from chitu_diffusion.task import DiffusionTask, DiffusionUserParams, Progress, TaskStatus

logger = logging.getLogger(__name__)
MakePreviews = Callable[[Path], PreviewWriter]
TICK_S = 1.0
_VIDEO = "video.mp4"
_CHECKPOINTS = "checkpoints"
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def run_worker(end: socket.socket, about: Mapping[str, Any]) -> None:
    """A worker's whole life.

    Args:
        end: of the pipe to its supervisor.
        about: `engine` (settings), `data` (the folder of the jobs' files), `number` (among this machine's
            workers, which share its GPUs), `preview` (settings).
    """
    faulthandler.enable()  # on SIGABRT it says where it is stuck
    channel = LineChannel(end)
    channel.send("started", pid=os.getpid())
    commands: queue.SimpleQueue[Message] = queue.SimpleQueue()
    for beside in (lambda: _read(channel, commands), lambda: _tick(channel)):
        threading.Thread(target=beside, daemon=True).start()
    os.chdir(about["data"])  # what videos and checkpoints name lies inside it
    config = EngineConfig(**about["engine"])
    gpus = torch.cuda.device_count() if config.infer.device in ("auto", "cuda") else 0
    if gpus > 1:
        config.infer.device = f"cuda:{about['number'] % gpus}"
    logs = logs_to_stderr(LogSettings(**about["logs"]), worker=about["worker"])
    with logs, Engine(config) as engine:
        previews = _previews_of(engine, PreviewSettings(**about["preview"]))
        channel.send("ready", **_about(engine.backend))
        threading.Thread(target=_say_weights, args=(engine.backend, channel), daemon=True).start()
        runner = JobRunner(engine, channel, commands, previews)
        while True:
            command = commands.get()
            if command["kind"] == "run":  # else it is about a job that has just ended
                runner.run(command)
                _say_memory(channel)  # of which it depends whether this worker gets another


def _about(backend: DiffusionBackend) -> dict[str, Any]:
    """What a worker is, for its row."""
    plan = backend.groups.plan
    fits = {
        "device": device_name(backend.device),
        "memory_bytes": total_memory(backend.device),
        "tokens": Admission(backend).most_tokens(),
    }
    return {"layout": f"cfg{plan.cfg}u{plan.ulysses}r{plan.ring}", "fits": fits}


def _say_weights(backend: DiffusionBackend, channel: LineChannel) -> None:
    """Once they are hashed: which they are. No job waits for it."""
    while not backend.weights_are_hashed():
        time.sleep(TICK_S)
    with suppress(OSError):  # nobody is there any more
        channel.send("weights", weights_sha256=backend.weights_sha256() or "")


def _previews_of(engine: Engine, settings: PreviewSettings) -> MakePreviews | None:
    """What makes a job's previews; None: nothing does."""
    if not settings.every_s:
        return None
    backend = engine.backend
    geometry = backend.spec.geometry
    try:
        colours = fit_colours(partial(decode, backend), geometry, backend.device)
    except RuntimeError as error:  # such as memory that ran out
        logger.warning("there will be no previews: %s", error)
        return None
    return partial(PreviewWriter, colours, geometry.stride[1], settings)


def _read(channel: LineChannel, commands: queue.SimpleQueue[Message]) -> None:
    for message in channel.messages():
        commands.put(message)
    os._exit(1)  # in the middle of a unit, too: files appear whole or not at all


def _tick(channel: LineChannel) -> None:
    """Says that this process lives, whatever its main thread does."""
    done = threading.Event()
    while not done.wait(TICK_S):
        try:
            _say_memory(channel)
        except OSError:
            done.set()


def _say_memory(channel: LineChannel) -> None:
    resident = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * _PAGE_BYTES
    on_gpu = torch.cuda.memory_reserved() if torch.cuda.is_initialized() else 0
    channel.send("tick", rss=resident, gpu_bytes=on_gpu)


class JobRunner:
    """Runs jobs on an engine, and tells of them.

    Args:
        commands: what comes while a job runs: cancel or park.
        previews: makes what a job is watched by, in a folder.
    """

    def __init__(
        self,
        engine: Engine,
        channel: LineChannel,
        commands: queue.SimpleQueue[Message],
        previews: MakePreviews | None = None,
    ) -> None:
        self._engine = engine
        self._channel = channel
        self._commands = commands
        self._previews = previews

    def run(self, command: Message) -> None:
        """One job, to its end or until it is parked or held.

        Args:
            command: `job`, `fence`, `params` (of `DiffusionUserParams`), `checkpoints` (newest first; `path`,
                `step` and `sha256`) and `hold_at_step`. Paths are relative to the data folder.

        Raises:
            Exception: what the engine cannot go on after; the job's end was told.
        """
        job = _JobOnEngine(command, self._channel, self._previews)
        with logged_about(job=command["job"]), logged(command["job"], command["fence"]):
            try:
                task = job.begin(self._engine)
                self._drive(job, task, command.get("hold_at_step"))
            except UsageError as error:
                job.failed(error)
            except Exception as error:
                job.failed(error)
                raise
            finally:
                self._engine.pool.remove(command["job"])
                job.clear()

    def _drive(self, job: _JobOnEngine, task: DiffusionTask, hold_at: int | None) -> None:
        while not task.is_finished():
            wishes = self._wishes()
            held = (
                hold_at is not None and task.status is TaskStatus.DENOISING and task.current_step >= hold_at
            )
            if "cancel" in wishes:
                self._engine.cancel(task.task_id)
            elif held or wishes:
                began = time.time()
                self._engine.save_tasks()
                job.report_checkpoint(self._engine, task, began)
                self._engine.cancel(task.task_id)
                job.report("held" if held else "parked", step=task.current_step)
                return
            elif (event := self._engine.step()) is not None:
                job.advanced(event, task, self._engine.backend.low_mem_level)
                job.report_checkpoint(self._engine, task, event.time)
        if task.status is TaskStatus.FINISHED:
            job.completed(task)
        elif task.error is not None:
            job.failed(task.error)
            if isinstance(task.error, RankLostError):
                raise task.error
        else:
            job.report("ended", state="cancelled")

    def _wishes(self) -> set[str]:
        """The kinds of commands that came since the last unit."""
        return {self._commands.get()["kind"] for _ in range(self._commands.qsize())}


class _JobOnEngine:
    """One attempt at a job: its folder, and what the supervisor is told of it."""

    def __init__(self, command: Message, channel: LineChannel, previews: MakePreviews | None) -> None:
        self._command = command
        self._channel = channel
        self._folder = Path("jobs", command["job"], str(command["fence"]))
        self._reported: set[str] = set()
        self._memory_level = 0
        self._reused = 0
        self._previews = None if previews is None else previews(self._folder)
        self._has_ended = False

    def report(self, kind: str, **values: Any) -> None:
        self._has_ended |= kind == "ended"
        self._channel.send(kind, job=self._command["job"], fence=self._command["fence"], **values)

    def begin(self, engine: Engine) -> DiffusionTask:
        """Hand it to the engine, which goes on from a checkpoint that it can use."""
        command = self._command
        place = {"save_path": str(self._folder / _VIDEO), "task_id": command["job"]}
        params = DiffusionUserParams.from_mapping({**command["params"], **place})
        checkpoints = self._folder / _CHECKPOINTS
        notes = take_over(command["checkpoints"], checkpoints)
        self._reported = {file.name for file in _files_of(checkpoints)}
        self._memory_level = engine.backend.low_mem_level
        task = engine.submit(params, checkpoints=checkpoints, callback_on_step_end=self._previews)
        self._reused = 0 if task.buffer.cache is None else task.buffer.cache["reused"]
        if task.resumed is not None:
            differs = [*notes, *task.resumed.differs]
            self.report("resumed", from_step=task.resumed.step, exact=task.resumed.exact, differs=differs)
        elif notes:
            self.report("resumed", from_step=0, exact=True, differs=notes)
        return task

    def advanced(self, event: Progress, task: DiffusionTask, memory_level: int) -> None:
        reused = 0 if task.buffer.cache is None else task.buffer.cache["reused"]
        self.report(
            "progress",
            stage=str(event.stage),
            status=str(event.status),
            step=event.step,
            steps=event.total_steps,
            fraction=event.fraction,
            seconds=event.seconds,
            eta_s=event.eta,
            at=event.time,
            saved=reused > self._reused,  # by a cache
        )
        self._reused = reused
        if event.message is not None and event.status not in (TaskStatus.FINISHED, TaskStatus.FAILED):
            raised = {"memory_level": memory_level} if memory_level > self._memory_level else {}
            self.report("note", message=event.message, **raised)
        self._memory_level = memory_level
        if self._previews is not None and (step := self._previews.take_fresh()) is not None:
            self.report("preview", step=step)

    def report_checkpoint(self, engine: Engine, task: DiffusionTask, began: float) -> None:
        """Of a file that has come since; the newest has the largest number in its name.

        Args:
            began: when writing it began, in seconds since 1970.
        """
        seconds = max(0.0, time.time() - began)
        files = _files_of(self._folder / _CHECKPOINTS)
        if not files or files[-1].name in self._reported:
            return
        self._reported = {file.name for file in files}
        asked = task.resolved or task.params
        made = fingerprint_of(engine.backend, asked.shift, asked.sampler_recipe, asked.lora)
        text = json.dumps(made, sort_keys=True, default=str)
        self.report(
            "checkpoint",
            path=str(files[-1]),
            step=task.current_step,
            seconds=seconds,
            fingerprint=hashlib.sha256(text.encode()).hexdigest(),
            **_size_and_hash(files[-1]),
        )

    def completed(self, task: DiffusionTask) -> None:
        video = self._folder / _VIDEO
        files = {"video": (video, "video/mp4")}
        try:
            files |= {variant: (still, "image/webp") for variant, still in write_stills(video).items()}
        except OSError as error:  # the video stands
            logger.warning("job %s has no pictures: %s", self._command["job"], error)
        artifacts = [
            {"variant": variant, "path": str(file), "media_type": kind, **_size_and_hash(file)}
            for variant, (file, kind) in files.items()
        ]
        seconds = {str(stage): spent for stage, spent in task.seconds.items()}
        self.report("ended", state="completed", artifacts=artifacts, seconds=seconds)

    def clear(self) -> None:
        """Remove the previews of a job that has ended; one that is parked or held keeps them."""
        if self._previews is not None and self._has_ended:
            self._previews.clear()

    def failed(self, error: Exception) -> None:
        logger.warning("job %s: %s", self._command["job"], error)
        failure, may_pass = failure_of(error)
        self.report("ended", state="failed", failure=failure, may_pass=may_pass)


def take_over(saved: Sequence[Mapping[str, Any]], folder: Path) -> list[str]:
    """Put checkpoints of earlier attempts into this one's folder, where the engine looks for them.

    Args:
        saved: newest first; one whose hash is another is left out.

    Returns:
        in words, which newer ones than the newest taken over were left out, and why.
    """
    notes: list[str] = []
    for number, checkpoint in enumerate(reversed(saved), start=1):
        file = Path(checkpoint["path"])
        try:
            if file_sha256(file) != checkpoint["sha256"]:
                raise OSError("it is damaged")
            folder.mkdir(parents=True, exist_ok=True)
            _link(file, folder / f"rank0-{number:06d}-step{checkpoint['step']}{file.suffix}")
            notes.clear()
        except OSError as error:
            notes.append(f"the checkpoint of step {checkpoint['step']}: {error.strerror or error}")
    return notes[::-1]


def _link(file: Path, target: Path) -> None:
    try:
        os.link(file, target)
    except OSError:  # a file system without hard links
        with new_file(target) as part:
            shutil.copyfile(file, part)


def _files_of(folder: Path) -> list[Path]:
    """The checkpoints in a folder, the oldest first."""
    return sorted(folder.glob("rank0-*.safetensors"))


def _size_and_hash(file: Path) -> dict[str, Any]:
    return {"bytes": file.stat().st_size, "sha256": file_sha256(file)}
