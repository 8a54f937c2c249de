"""Whether a model can do a request, asked before it is taken in. Knows sizes and memory; runs nothing.

What it rests on is read once, so that any thread may ask at any time, whatever becomes of the backend
meanwhile.
"""

from __future__ import annotations

import logging
from bisect import bisect_right

from chitu_diffusion.adapters.merging import check_adapters
from chitu_diffusion.attn_schedule import AttnSchedule
from chitu_diffusion.backend import DiffusionBackend
from chitu_diffusion.errors import WillNotFitError, counted
from chitu_diffusion.files.places import identity
from chitu_diffusion.media.video import check_save_path, check_space
from chitu_diffusion.memory.device import top_useful_level, total_memory, usable_memory
from chitu_diffusion.memory.offload import TOP_LEVEL
from chitu_diffusion.pipelines.request import (
    check_cache,
    check_tokens,
    computed_frames,
    resolve_task,
    stages_of,
    steps_of,
)
from chitu_diffusion.task import DiffusionTask, DiffusionUserParams

logger = logging.getLogger(__name__)
_VIDEO_BYTES = 3 * 4
"""Of a pixel of a finished video in main memory: float32."""
_MOST_FRAMES = 1 << 14
"""Of a latent: no video is longer."""


class Admission:
    """What a loaded model can do.

    Args:
        backend: the model.
    """

    def __init__(self, backend: DiffusionBackend) -> None:
        self._spec = backend.spec
        self._estimate = backend.memory_estimate()
        self._device = backend.device
        self._item = backend.dtype.itemsize
        self._sharing = backend.groups.plan.sequence
        self._output_dir = backend.args.output.dir
        self._schedule = AttnSchedule.from_text(backend.args.infer.attn_schedule)
        self._quality = backend.args.output.quality
        self._cache_limit = backend.args.infer.diffusion.cache_memory_gb

    def admit(self, task: DiffusionTask, *, in_memory: bool = False) -> None:
        """Resolve a task's request, and refuse what cannot be.

        Args:
            in_memory: without a path of its own it is not written to a file.

        Raises:
            UsageError: a value that this model cannot do.
            WillNotFitError: more memory than there is, at every memory level.
        """
        resolved = resolve_task(task, self._spec, None if in_memory else self._output_dir)
        check_adapters(resolved.lora or (), self._spec.transformers)
        check_tokens(resolved, self._spec, self._sharing)
        cache = check_cache(resolved, self._spec, self._item, self._cache_limit)
        if resolved.save_path is not None:
            check_save_path(resolved.save_path)
            task.replaces = identity(resolved.save_path)
            place = (resolved.save_path, resolved.num_frames or 1, resolved.height or 0, resolved.width or 0)
            check_space([place], self._quality)
        more = computed_frames(resolved, self._spec) - (resolved.num_frames or 1)
        for stage in stages_of(resolved):
            self._check_memory(
                resolved.num_frames or 1, stage.height, stage.width, cache, resolved.flexcache, more
            )
        task.resolved = resolved
        steps = steps_of(resolved)
        if self._schedule is not None and (self._schedule.begins(steps) or 0) >= steps:
            logger.warning("infer.attn_schedule: %s", self._schedule.describe(steps))

    @property
    def top_level(self) -> int:
        """The last memory level that saves anything."""
        return top_useful_level(self._device)

    def bytes_needed(self, resolved: DiffusionUserParams, level: int) -> tuple[int, int]:
        """Bytes at the worst moment of a resolved request: on the device, and in main memory beside it."""
        frames = resolved.num_frames or 1
        pixels = max(stage.height * stage.width for stage in stages_of(resolved))
        peak = max(
            self._estimate.peak(
                level,
                self._spec.tokens(computed_frames(resolved, self._spec), stage.height, stage.width),
                frames,
                stage.height,
                stage.width,
            )
            for stage in stages_of(resolved)
        )
        cache = check_cache(resolved, self._spec, self._item, self._cache_limit)
        return peak + cache, self._estimate.at_home(level) + frames * pixels * _VIDEO_BYTES

    def most_tokens(self) -> int:
        """Tokens of the longest video of the model's own size that the device's whole memory has room for; 0
        where it has none for a picture.
        """
        own = self._spec.defaults
        stride = self._spec.geometry.stride[0]
        total = total_memory(self._device)
        count = bisect_right(
            range(_MOST_FRAMES), total, key=lambda n: self._peak(stride * n + 1, own.height, own.width, 0)
        )
        return self._spec.tokens(stride * (count - 1) + 1, own.height, own.width) if count else 0

    def _check_memory(
        self, frames: int, height: int, width: int, cache: int, flexcache: object, more: int
    ) -> None:
        total = usable_memory(self._device)
        peak = self._peak(frames, height, width, more)
        if peak > total:
            raise WillNotFitError(
                f"{width}x{height} with {frames} frames needs about {peak / 2**30:.1f} GiB at the highest "
                f"memory level; {self._device} has {total / 2**30:.1f} GiB; "
                f"{self._largest(frames, height, width, total, more)}"
            )
        if peak + cache > total:
            raise WillNotFitError(
                f"flexcache {flexcache} would keep {cache / 2**30:.1f} GiB beside the {peak / 2**30:.1f} "
                f"GiB that the video needs; {self._device} has {total / 2**30:.1f} GiB; use flexcache "
                "meancache"
            )

    def _peak(self, frames: int, height: int, width: int, more: int) -> int:
        """`more` frames are computed and not decoded."""
        tokens = self._spec.tokens(frames + more, height, width)
        return self._estimate.peak(TOP_LEVEL, tokens, frames, height, width)

    def _largest(self, frames: int, height: int, width: int, total: int, more: int) -> str:
        """The longest video of this size that the estimate lets through, or the largest size."""
        for shorter in range(frames - 4, 0, -4):
            if self._peak(shorter, height, width, more) <= total:
                return f"use {counted(shorter, 'frame')} of this size"
        while height > 32 and width > 32:
            height = height // 32 * 16
            width = width // 32 * 16
            if self._peak(1, height, width, more) <= total:
                return f"use {width}x{height}"
        return "this model has no size that fits"


def smaller(task: DiffusionTask) -> str:
    """What to try in place of a request that ran out of memory."""
    resolved = task.resolved or task.params
    if resolved.num_frames is None or resolved.height is None or resolved.width is None:
        return "use fewer frames or a smaller size"
    frames = max(1, (resolved.num_frames // 2) // 4 * 4 + 1)
    height, width = (max(16, side * 3 // 4 // 16 * 16) for side in (resolved.height, resolved.width))
    return f"try num_frames={frames}, or {width}x{height} in place of {resolved.width}x{resolved.height}"
