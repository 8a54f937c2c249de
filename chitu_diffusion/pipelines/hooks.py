"""What a caller wants to hear of a task while it runs. It lies beside the task, for a task is plain data.

Knows functions and what they may give back; not who keeps them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from chitu_diffusion.errors import UsageError
from chitu_diffusion.task import DiffusionTask

if TYPE_CHECKING:
    from chitu_diffusion.media.video import Frames

StepEnd = Callable[[Any, int, float, dict[str, Any]], Mapping[str, Any] | bool | None]
"""(engine, step from 0, timestep, {"latents": [1, C, T, H, W], "clean": ..., "task": ...}) -> None, what
`task.cancel()` gave, or {"latents": ...} for the next step to start from; diffusers' `callback_on_step_end`.
"""


class Interruptible(Protocol):
    """Where diffusers' callbacks say that they want no more steps."""

    _interrupt: bool


def step_hook(
    callback: StepEnd | None, engine: Interruptible
) -> Callable[[int, float, dict[str, Any]], Mapping[str, Any] | bool | None] | None:
    """A caller's `callback_on_step_end` without its engine; where it sets the engine's `_interrupt`, as in
    diffusers, its task is cancelled.

    Raises:
        UsageError: it cannot be called with what it will be given.
    """
    if callback is None:
        return None
    try:
        inspect.signature(callback).bind(engine, 0, 0.0, {})
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"callback_on_step_end = {callback!r} cannot be called: {error}; use a function "
            "(engine, step, timestep, kwargs), whose kwargs hold 'latents' and 'task'",
            field="callback_on_step_end",
        ) from None

    def hook(step: int, timestep: float, values: dict[str, Any]) -> Mapping[str, Any] | bool | None:
        task = values["task"]
        answer = callback(engine, step, timestep, values)
        if engine._interrupt:
            engine._interrupt = False
            task.cancel()
        return answer

    return hook


@dataclass(frozen=True)
class TaskHooks:
    """What to call.

    Attributes:
        on_step_end: (step, timestep, {"latents": ..., "clean": ..., "task": ...}) after each denoising step.
            The latents are a copy: what is done to them counts where they are given back. `clean()` gives
            the clean ones that the step points at, of which previews are made.
        on_video: (frames uint8 [T, H, W, 3], recipe) on rank 0, once the video is decoded. Where it is there,
            a task without a path writes no file.
    """

    on_step_end: Callable[[int, float, dict[str, Any]], Mapping[str, Any] | bool | None] | None = None
    on_video: Callable[[Frames, Mapping[str, Any]], None] | None = None

    def latent_after(
        self,
        task: DiffusionTask,
        step: int,
        timestep: float,
        latent: Tensor,
        clean: Callable[[], Tensor],
        *,
        world: int,
    ) -> Tensor:
        """The latent that the next step starts from: the one that it was given, or what the hook gives.

        Args:
            step, timestep: of the step that was taken.
            latent: after it, [1, C, T, H, W] float32.
            clean: gives the clean one that it points at.
            world: ranks; only rank 0 has hooks.

        Raises:
            UsageError: something else than latents of that shape, or latents where several ranks share the
                work.
        """
        if self.on_step_end is None:
            return latent
        shown = latent.clone()
        answer = self.on_step_end(step, timestep, {"latents": shown, "clean": clean, "task": task})
        if answer is None or isinstance(answer, bool):  # what `task.cancel()` gives
            return latent
        given = answer.get("latents", shown) if isinstance(answer, Mapping) else answer
        if given is shown and torch.equal(shown, latent):
            return latent
        floats = isinstance(given, Tensor) and given.is_floating_point() and given.layout == torch.strided
        if not floats or given.is_meta or given.shape != latent.shape:
            tensor = isinstance(given, Tensor)
            what = f"{given.dtype} {list(given.shape)}" if tensor else type(given).__name__
            raise UsageError(
                f"callback_on_step_end gave {what}: return None, or {{'latents': floats}} of shape "
                f"{list(latent.shape)}",
                field="callback_on_step_end",
            )
        if world > 1:
            raise UsageError(
                f"callback_on_step_end gave latents on one of {world} ranks, and the others keep the old: "
                "return None, or run on one rank",
                field="callback_on_step_end",
            )
        # a copy, for the caller's own may change or be a view of something large
        return given.detach().to(
            latent.device, torch.float32, copy=True, memory_format=torch.contiguous_format
        )
