"""One video from a prompt to raw frames, with its denoising timed and its forwards counted.

Forwards are counted at the interface where caches are asked, so that a skipped step, branch, block or module
counts for what it is, whatever the strategy. Knows the generator and that interface; no strategy, no file.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from chitu_diffusion.attention import attention_kernel
from chitu_diffusion.backend import DiffusionBackend
from chitu_diffusion.errors import TaskError
from chitu_diffusion.flexcache.interface import Level, Site, SiteInputs, StepCache
from chitu_diffusion.flexcache.registry import strategy_of
from chitu_diffusion.generator import Generator
from chitu_diffusion.pipelines.denoising import schedule_of, tokens_of
from chitu_diffusion.pipelines.request import guidance_pair
from chitu_diffusion.pipelines.stages import to_frames
from chitu_diffusion.task import DiffusionTask, DiffusionUserParams, TaskStatus

if TYPE_CHECKING:
    from chitu_diffusion.media.video import Frames


@dataclass(frozen=True)
class Made:
    """A video and what it took.

    Attributes:
        frames: uint8 [T, H, W, 3].
        seconds: of denoising.
        forward_seconds: of these, in the transformer and the cache's sites inside it.
        work: forwards of one branch; a part of one counts by its multiplications.
    """

    frames: Frames
    seconds: float
    forward_seconds: float
    work: float


def make_video(backend: DiffusionBackend, *, kernel: str | None = None, **params: Any) -> Made:
    """Runs a request up to its frames; nothing is written.

    Args:
        kernel: name of the attention kernel; None is the backend's own.
        params: of `DiffusionUserParams`.

    Raises:
        ChituError: the request cannot be, or a stage of it failed.
    """
    task = DiffusionTask.from_user_request(DiffusionUserParams(**params))
    count = Count(backend)
    generator = Generator(backend, count)
    with _kernel(backend, kernel):
        _advance(generator, task)  # the text
        _plan(backend, task)
        began = _now(backend)
        while task.status is TaskStatus.DENOISING:
            _advance(generator, task)
        seconds = _now(backend) - began
    count.add_up()
    _advance(generator, task)  # the frames
    video = task.buffer.video
    if video is None:
        raise TaskError(f"'{task.params.prompt}' ended as {task.status} without frames")
    frames = to_frames(video)
    task.end(TaskStatus.FINISHED)
    return Made(frames, seconds, count.seconds, count.work)


def _plan(backend: DiffusionBackend, task: DiffusionTask) -> None:
    """Calculate a plan that the model keeps: only the first task of a process would pay for it."""
    steps = task.num_inference_steps
    resolved = task.resolved or task.params
    guidance = guidance_pair(resolved.guidance_scale)
    if task.buffer.cache is not None:
        schedule = schedule_of(backend, backend.sampler.begin(steps, shift=resolved.shift), guidance)
        strategy_of(task.buffer.cache).build_plan(schedule)


def _advance(generator: Generator, task: DiffusionTask) -> None:
    generator.generate_step(task)
    if task.error is not None:
        raise task.error


def _now(backend: DiffusionBackend) -> float:
    if backend.device.type == "cuda":
        torch.cuda.synchronize(backend.device)
    return time.perf_counter()


@contextmanager
def _kernel(backend: DiffusionBackend, name: str | None) -> Iterator[None]:
    if name is None:
        yield
        return
    usual = backend.attn_backend
    backend.attn_backend = attention_kernel(name, device=backend.device, dtype=backend.dtype)
    try:
        yield
    finally:
        backend.attn_backend = usual


class Count:
    """A probe: forwards of one branch that were run, and the seconds that went into them.

    Args:
        backend: whose forwards.

    Attributes:
        work: forwards; what a cache answered for is taken off.
        seconds: on a GPU only after `add_up`.
    """

    def __init__(self, backend: DiffusionBackend) -> None:
        self.work = 0.0
        self.seconds = 0.0
        self._backend = backend
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def forward(self, latent: Tensor, branches: tuple[int, ...]) -> Iterator[None]:
        """Counts and times what is inside; on a GPU by events, for which no step has to wait."""
        self.work += len(branches)
        if self._backend.device.type == "cuda":
            begun = torch.cuda.Event(enable_timing=True)
            ended = torch.cuda.Event(enable_timing=True)
            begun.record()
            yield
            ended.record()
            self._events.append((begun, ended))
        else:
            began = time.perf_counter()
            yield
            self.seconds += time.perf_counter() - began

    def watched(self, cache: StepCache, latent: Tensor, branches: tuple[int, ...]) -> StepCache:
        """The cache, which takes what it answers for off the count."""
        if not cache.levels:
            return cache
        return _Noting(cache, self, len(branches), self._shares(tokens_of(self._backend, latent)))

    def add_up(self) -> None:
        """Add what the GPU's events say; the device has done its work."""
        self.seconds += sum(begun.elapsed_time(ended) for begun, ended in self._events) / 1000
        self._events.clear()

    def _shares(self, tokens: int) -> dict[Level, float]:
        """Share of a forward's multiplications at one site of each level, before division by the depth."""
        spec = self._backend.spec
        config = spec.transformers[0]
        dim = config.dim
        text = spec.text_tokens
        attention = 4 * tokens * dim**2 + 2 * tokens**2 * dim
        cross = 2 * (tokens + text) * dim**2 + 2 * tokens * text * dim
        ffn = 2 * tokens * dim * config.ffn_dim
        whole = attention + cross + ffn
        return {
            "step": 1.0,
            "block": 1.0,
            "attention": attention / whole,
            "cross": cross / whole,
            "ffn": ffn / whole,
        }


@dataclass(frozen=True)
class _Noting:
    """A cache that takes what it answers for off the count."""

    inner: StepCache
    count: Count
    branches: int
    shares: dict[Level, float]

    @property
    def levels(self) -> frozenset[Level]:
        return self.inner.levels

    def at(self, site: Site, compute: Callable[[], Tensor], inputs: SiteInputs) -> Tensor:
        computed = False

        def noted() -> Tensor:
            nonlocal computed
            computed = True
            return compute()

        value = self.inner.at(site, noted, inputs)
        if not computed:
            parts = 1 if site.level == "step" else site.depth
            self.count.work -= self.branches * self.shares[site.level] / parts
        return value
