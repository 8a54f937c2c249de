"""A task as a file: safetensors for what is a tensor, JSON for the rest, and what it is valid for.

`save_task` and `load_task` are one file; `CheckpointFolder` is the last two of one task. A file that is
damaged, or was made by other weights or for another video, is told apart from one that can go on. No pickle.
Knows tasks and a backend; not who asks for a checkpoint, or when.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from chitu_diffusion.backend import DiffusionBackend
from chitu_diffusion.errors import CannotResumeError
from chitu_diffusion.files.atomic import new_file
from chitu_diffusion.files.faults import hit
from chitu_diffusion.flexcache.registry import emptied
from chitu_diffusion.pipelines.fingerprint import differences, fingerprint_of, is_exact
from chitu_diffusion.pipelines.finite_check import FiniteCheck
from chitu_diffusion.pipelines.recipe import device_name
from chitu_diffusion.task import (
    Conditioning,
    DiffusionTask,
    DiffusionUserParams,
    Resumed,
    TaskBuffer,
    TaskStatus,
)
from chitu_diffusion.task.params import INPUTS

FORMAT = 4
ENDING = ".safetensors"
_KEPT = 2
_MOST_TRIES = 3
"""How often a checkpoint is gone on from before the one before it is taken: it may be what ends the
process.
"""
_PLAIN = ("task_id", "seed", "num_inference_steps", "current_step", "cascade_stage", "expert", "created_at")
_OWN_FILE = re.compile(r"\.?rank(\d+)-(\d+)-step\d+\.(safetensors|safetensors\.[0-9a-f]{8}\.part|tries\d+)")
"""What a folder's files are called: rank, number, and whether it is a checkpoint, half of one, or counts how
often one was gone on from.
"""
_NOT_OF_THE_VIDEO = ("save_path", "task_id", "role", "priority")
"""Fields of a request: who asks, and where it goes."""
_UNREADABLE = (
    OSError,
    SafetensorError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    RecursionError,
)


def save_task(task: DiffusionTask, path: str | Path, backend: DiffusionBackend) -> int:
    """Write a task that has begun and not ended.

    A video that is decoded and not saved yet is not written: `load_task` decodes again. A cache above
    `checkpoint.cache_limit_mb` is left out.

    Args:
        path: of the file; it appears whole or not at all.
        backend: on which the task runs.

    Returns:
        its size in bytes.

    Raises:
        CannotResumeError: a task without any state, or one that has ended.
        NonFiniteError: the latent holds NaN or Inf.
        OSError: it cannot be written.
    """
    if (
        task.resolved is None
        or task.is_finished()
        or (task.buffer.conditioning is None and task.buffer.latent is None)
    ):
        raise CannotResumeError(f"task {task.task_id} is {task.status}: it has no state to save")
    if task.buffer.latent is not None:
        FiniteCheck(task.buffer.latent, "latent").require()
    status = TaskStatus.DECODING if task.status is TaskStatus.SAVING else task.status
    cache, left_out = _cache_to_save(task, backend)
    written = _Writer()
    values = {
        "format": FORMAT,
        "valid_for": _valid_for(backend, task),
        "kernel": backend.attn_backend.name,
        "status": str(status),
        "params": task.params.to_mapping(),
        "resolved": task.resolved.to_mapping(),
        "notes": task.notes,
        "seconds": {str(stage): seconds for stage, seconds in task.seconds.items()},
        "elapsed": task.get_elapsed_time(),
        "cache_left_out": left_out,
        **{name: vars(task)[name] for name in _PLAIN},
        "conditioning": written.node(task.buffer.conditioning and vars(task.buffer.conditioning)),
        "latent": written.node(task.buffer.latent),
        "sampler": written.node(task.buffer.sampler),
        "cache": written.node(cache),
    }
    text = json.dumps(values, default=_path_as_text)
    path = Path(path)
    try:
        with new_file(path) as part:
            save_file(written.tensors, part, {"task": text, "sha256": _digest(text, written.tensors)})
    except SafetensorError as error:
        raise OSError(str(error)) from error  # its word for a full disk
    return path.stat().st_size


def _path_as_text(value: Any) -> str:
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"a request holds a {type(value).__name__}, which is no plain value")


def load_task(path: str | Path, backend: DiffusionBackend) -> DiffusionTask:
    """The task in a file, ready to go on where it was, with `task.resumed` saying how.

    What must agree is the fingerprint (weights, sampler with its shift or list, dtype, quantisation, a lossy
    kernel) and, for a cache, the layout of ranks; the rest (device, kernels, versions, threads) changes
    results by rounding: `resumed.exact` is then false.

    Raises:
        CannotResumeError: a file that is missing, damaged, or was made by something else; says what.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            said = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
        text = said["task"]
        if said["sha256"] != _digest(text, tensors):
            raise ValueError("its contents do not fit their hash")
        values = json.loads(text)
        if values["format"] != FORMAT:
            raise ValueError(f"it has format {values['format']!r}, not {FORMAT}")
        task = _task_of(values, tensors, backend)
    except _UNREADABLE as error:
        raise CannotResumeError(f"the checkpoint {path} cannot be used: {error}") from error
    return _compared(task, values, backend)


def _valid_for(backend: DiffusionBackend, task: DiffusionTask) -> dict[str, dict[str, Any]]:
    """What a saved task is valid for: "must" agree, or the task starts over; where "should" differs, what
    follows may differ by rounding.
    """
    infer = backend.args.infer
    plan = backend.groups.plan
    asked = task.resolved or task.params
    made = fingerprint_of(backend, task.params.shift, asked.sampler_recipe)
    return {
        "must": {**made, "attention": "auto" if is_exact(made["attention"]) else made["attention"]},
        "should": {
            "device": device_name(backend.device),
            "torch": str(torch.__version__),
            "attention": infer.attn_type,
            "fused kernels": infer.fused,
            "compile": infer.compile,
            "layout": f"cfg{plan.cfg}u{plan.ulysses}r{plan.ring}",
            "threads": torch.get_num_threads() if backend.device.type == "cpu" else None,
        },
    }


def _compared(task: DiffusionTask, values: Mapping[str, Any], backend: DiffusionBackend) -> DiffusionTask:
    """The task, if it may go on here.

    Raises:
        CannotResumeError: it was made by other weights, or whatever else must agree.
    """
    saved = values["valid_for"]
    here = _valid_for(backend, task)
    broken = differences(saved["must"], here["must"])
    bent = differences(saved["should"], here["should"])
    if task.buffer.cache is not None and task.buffer.cache["records"]:
        broken += [said for said in bent if said.startswith("layout ")]
    if broken:
        raise CannotResumeError(f"it was made with {'; '.join(broken)}")
    if values["cache_left_out"]:
        bent.append("its cache was too large to keep and begins empty")
    task.resumed = Resumed(task.current_step, not bent, tuple(bent), values["kernel"])
    return task


def _video_of(task: DiffusionTask) -> dict[str, Any]:
    """What a task is to make, whoever asks and wherever it goes; inputs are known by their hashes."""
    values = (task.resolved or task.params).to_mapping()
    for name in INPUTS:
        values[name] = values[name] and values[name]["sha256"]
    kept = {name: value for name, value in values.items() if name not in _NOT_OF_THE_VIDEO}
    return {**json.loads(json.dumps(kept)), "seed": task.seed}


def _task_of(
    values: Mapping[str, Any], tensors: Mapping[str, Tensor], backend: DiffusionBackend
) -> DiffusionTask:
    read = _Reader(tensors, backend.device)
    conditioning = read.value(values["conditioning"])
    buffer = TaskBuffer(
        conditioning=None if conditioning is None else Conditioning(**conditioning),
        latent=read.value(values["latent"]),
        sampler=read.value(values["sampler"]),
        cache=read.value(values["cache"]),
    )
    return DiffusionTask(
        params=DiffusionUserParams.from_mapping(values["params"]),
        resolved=DiffusionUserParams.from_mapping(values["resolved"]),
        status=TaskStatus(values["status"]),
        buffer=buffer,
        notes=[str(said) for said in values["notes"]],
        seconds={TaskStatus(stage): float(seconds) for stage, seconds in values["seconds"].items()},
        started_at=time.time() - float(values["elapsed"]),  # the pause does not count
        **{name: values[name] for name in _PLAIN},
    )


def _cache_to_save(task: DiffusionTask, backend: DiffusionBackend) -> tuple[dict[str, Any] | None, bool]:
    """The cache's state, without what is kept in it where that is too much; and whether that was so."""
    cache = task.buffer.cache
    if cache is None:
        return None, False
    sizes = _Writer()
    sizes.node(cache)
    held = sum(tensor.numel() * tensor.element_size() for tensor in sizes.tensors.values())
    if held <= backend.args.checkpoint.cache_limit_mb * 2**20:
        return cache, False
    return {**cache, **emptied()}, True


# -- values with tensors in them


class _Writer:
    """Values as JSON, and the tensors in them by number. A tensor that stands twice is stored once."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._known: dict[int, dict[str, Any]] = {}
        self._alive: list[Tensor] = []  # an `id` is a tensor's own only as long as it lives

    def node(self, value: Any) -> Any:
        """A value as JSON values.

        Raises:
            TypeError: something else than numbers, texts, tensors, and lists, tuples and dicts of them.
        """
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if isinstance(value, Tensor):
            return self._tensor(value)
        if isinstance(value, list):
            return [self.node(each) for each in value]
        if isinstance(value, tuple):
            return {"tuple": [self.node(each) for each in value]}
        if isinstance(value, dict):
            return {"dict": [[self.node(key), self.node(each)] for key, each in value.items()]}
        raise TypeError(f"a task holds a {type(value).__name__}, which is no plain value")

    def _tensor(self, value: Tensor) -> dict[str, Any]:
        if id(value) not in self._known:
            name = f"{len(self.tensors):05d}"
            # as it lies in memory, for which kernels may look; of a view with gaps, as a copy would
            stride = list(torch.empty_like(value, device="meta").stride())
            self.tensors[name] = value.detach().to("cpu").contiguous().clone()
            place = {"tensor": name, "stride": stride, "on_cpu": value.device.type == "cpu"}
            self._known[id(value)] = place
            self._alive.append(value)
        return self._known[id(value)]


class _Reader:
    """The values back, each tensor where it was: on the device, or on the CPU beside it."""

    def __init__(self, tensors: Mapping[str, Tensor], device: torch.device) -> None:
        self._tensors = tensors
        self._device = device
        self._made: dict[str, Tensor] = {}

    def value(self, node: Any) -> Any:
        """What a node stands for."""
        if isinstance(node, list):
            return [self.value(each) for each in node]
        if not isinstance(node, dict):
            return node
        if "tensor" in node:
            return self._tensor(node)
        if "tuple" in node:
            return tuple(self.value(each) for each in node["tuple"])
        return {self.value(key): self.value(each) for key, each in node["dict"]}

    def _tensor(self, node: Mapping[str, Any]) -> Tensor:
        name = node["tensor"]
        if name not in self._made:
            stored = self._tensors[name]
            # times and other scalars stay on the CPU; saved on a CPU, all did
            stays = node["on_cpu"] and (self._device.type == "cpu" or stored.ndim <= 1)
            made = torch.empty_strided(stored.shape, node["stride"], dtype=stored.dtype).copy_(stored)
            self._made[name] = made if stays else made.to(self._device)
        return self._made[name]


def _digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


@dataclass(frozen=True)
class FoundCheckpoint:
    """A file that can go on, and its task."""

    file: Path
    task: DiffusionTask

    def digest(self) -> str:
        """The same on all ranks that can go on together: of the video, and how far it is."""
        task = self.task
        place = [task.current_step, task.cascade_stage, str(task.status)]
        return hashlib.sha256(json.dumps([_video_of(task), place]).encode()).hexdigest()


class CheckpointFolder:
    """The last checkpoints of one task on one rank. Whatever else lies in the folder is left alone.

    Args:
        folder: made with the first; all ranks of a machine share it.
        rank: whose.
    """

    def __init__(self, folder: str | Path, rank: int = 0) -> None:
        self.folder = Path(folder)
        self._rank = rank

    def save(self, task: DiffusionTask, backend: DiffusionBackend) -> None:
        """Write a checkpoint, and let go of all but the last two.

        Raises:
            CannotResumeError, NonFiniteError, OSError: as `save_task`; those before stay.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        # the step is in the name for people, the number says which is later
        number = max((number for number, _ in self._files(self._rank)), default=0) + 1
        name = f"rank{self._rank}-{number:06d}-step{task.current_step}{ENDING}"
        save_task(task, self.folder / name, backend)
        for _, old in self._files(self._rank)[:-_KEPT]:
            old.unlink(missing_ok=True)

    def usable(
        self, backend: DiffusionBackend, asked: DiffusionTask, notes: list[str]
    ) -> Iterator[FoundCheckpoint]:
        """The checkpoints that can go on, newest first; without a cache, those of rank 0 as well.

        Args:
            asked: the task that is to go on, with its request resolved. A seed that nobody asked for may be
                another.
            notes: is told why others cannot.
        """
        others = self._files(0) if self._rank else []
        for _, file in [*reversed(self._files(self._rank)), *reversed(others)]:
            try:
                task = load_task(file, backend)
                self._require(task, file, asked, backend)
            except CannotResumeError as error:
                notes.append(str(error))
            else:
                yield FoundCheckpoint(file, task)

    def _require(
        self, task: DiffusionTask, file: Path, asked: DiffusionTask, backend: DiffusionBackend
    ) -> None:
        """Refuse what would be another video, or what has been tried too often.

        Raises:
            CannotResumeError: says which.
        """
        saved = _video_of(task)
        here = _video_of(asked)
        if asked.params.seed is None:
            here["seed"] = task.seed
        if other := differences(saved, here):
            raise CannotResumeError(f"it is of another video: {'; '.join(other)}")
        if len(_count_of(self._tries(file))) >= _MOST_TRIES:
            raise CannotResumeError(f"the run ended {_MOST_TRIES} times after it went on from {file.name}")
        if (
            not file.name.startswith(f"rank{self._rank}-")
            and task.buffer.cache
            and task.buffer.cache["records"]
        ):
            raise CannotResumeError(f"{file.name} holds the cache of rank 0 alone")
        exact_only = backend.args.checkpoint.resume == "exact"
        if exact_only and task.resumed is not None and not task.resumed.exact:
            differs = "; ".join(task.resumed.differs)
            raise CannotResumeError(f"checkpoint.resume = exact, and it was made with {differs}")

    def count_try(self, found: FoundCheckpoint) -> None:
        """The task goes on from this one; after a few times that is no more to be."""
        with suppress(OSError), self._tries(found.file).open("ab") as stream:
            stream.write(b".")

    def clear(self) -> None:
        """The video stands: this rank's files go, on rank 0 every rank's, and the folder if that was all."""
        with suppress(OSError):
            for file in self.folder.iterdir():
                name = _OWN_FILE.fullmatch(file.name)
                if name is not None and self._rank in (0, int(name[1])):
                    hit("checkpoint.clear", file)
                    file.unlink(missing_ok=True)
            self.folder.rmdir()

    def _files(self, rank: int) -> list[tuple[int, Path]]:
        """The checkpoints of a rank with their numbers, oldest first."""
        found = []
        with suppress(OSError):
            for file in self.folder.glob(f"rank{rank}-*{ENDING}"):
                if (name := _OWN_FILE.fullmatch(file.name)) is not None:
                    found.append((int(name[2]), file))
        return sorted(found)

    def _tries(self, file: Path) -> Path:
        return file.with_suffix(f".tries{self._rank}")


def _count_of(file: Path) -> bytes:
    """A byte for each time; none where nothing can be read."""
    try:
        return file.read_bytes()
    except OSError:
        return b""
