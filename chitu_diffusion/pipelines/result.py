"""A finished video in memory: what `Engine.generate` gives. Knows frames, their recipe and the task."""

from __future__ import annotations

import base64
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from chitu_diffusion.errors import UsageError, counted, names_checked
from chitu_diffusion.media.frame_rate import Rate
from chitu_diffusion.media.video import write_video
from chitu_diffusion.task import DiffusionTask

if TYPE_CHECKING:
    from PIL.Image import Image

    from chitu_diffusion.media.video import Frames

_PREVIEW_SIDE = 512
"""Pixels of the longer side of what a notebook shows, at the most: its file keeps all that is shown."""
_PREVIEW_QUALITY = 5


@names_checked
class VideoResult:
    """A video, and all that is known of it.

    Attributes:
        frames: uint8 [T, H, W, 3], RGB; none ([0, 0, 0, 3]) where the task was cancelled, and on ranks but
            the first.
        recipe: what makes it again, as JSON values; empty where there are no frames.
        task: the request on its way, ended.
    """

    def __init__(self, task: DiffusionTask, *, quality: int) -> None:
        self.task = task
        self.frames: Frames = np.empty((0, 0, 0, 3), np.uint8)
        self.recipe: Mapping[str, Any] = {}
        self._quality = quality

    @property
    def seed(self) -> int:
        """Of the starting noise; the same seed and request give the same video."""
        return self.task.seed

    @property
    def fps(self) -> Rate:
        """Frames per second."""
        return (self.task.resolved or self.task.params).fps or 1

    def receive(self, frames: Frames, recipe: Mapping[str, Any]) -> None:
        """Take in the decoded video."""
        self.frames = frames
        self.recipe = recipe

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Frames:
        """`np.asarray(result)`: the frames."""
        return np.array(self.frames, dtype=dtype, copy=True if copy else None)

    def to_pil(self) -> list[Image]:
        """The frames as Pillow's images, RGB."""
        from PIL import Image

        return [Image.fromarray(frame) for frame in self.frames]

    def save(self, path: str | os.PathLike[str], *, quality: int | None = None) -> Path:
        """Write the video with its recipe.

        Args:
            path: .mp4, .gif, .npy, or a folder for png frames, as `save_path` of a request.
            quality: of H.264, 0 (smallest) to 10 (no visible loss); None: the engine's.

        Returns:
            the path.

        Raises:
            UsageError: there are no frames, or no video can have that name.
            OutputError: it cannot be written.
        """
        if not len(self.frames):
            raise UsageError(
                f"task {self.task.task_id} is {self.task.status} and has no frames here to save"
                f"{'; of several ranks the first has them' if self.task.status == 'finished' else ''}",
                field="frames",
            )
        if not isinstance(path, str | os.PathLike):
            raise UsageError(
                f"path = {path!r}: use a file's name, such as result.save('cat.mp4')", field="path"
            )
        quality = self._quality if quality is None else quality
        return write_video(self.frames, path, fps=self.fps, quality=quality, recipe=self.recipe)

    def __repr__(self) -> str:
        count, height, width, _ = self.frames.shape
        prompt = self.task.params.prompt
        found = f"{counted(count, 'frame')} of {width}x{height}" if count else f"none, {self.task.status}"
        return f"<VideoResult {prompt[:60]!r}, seed {self.seed}: {found}>"

    def _repr_html_(self) -> str | None:
        """For a notebook: a small mp4 inside the page."""
        if not len(self.frames):
            return None
        stride = -(-max(self.frames.shape[1:3]) // _PREVIEW_SIDE)
        small = np.ascontiguousarray(self.frames[:, ::stride, ::stride])
        with tempfile.TemporaryDirectory() as folder:
            file = write_video(small, Path(folder, "preview.mp4"), fps=self.fps, quality=_PREVIEW_QUALITY)
            text = base64.b64encode(file.read_bytes()).decode()
        source = f"data:video/mp4;base64,{text}"
        return f'<video controls loop autoplay muted width="{small.shape[2]}" src="{source}"></video>'
