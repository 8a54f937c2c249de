"""What a caller hands to a method of the generator: refused in words before anything is computed, and filled
in where it is left out.

Knows a backend's networks and their sizes; runs none of them but the text encoder, for the branches of a text
that the caller leaves out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from chitu_diffusion.backend import DiffusionBackend
from chitu_diffusion.errors import UsageError, plain_number
from chitu_diffusion.models.spec import ModelSpec
from chitu_diffusion.models.wan.forward_inputs import (
    check_control,
    read_timestep,
    require_floats,
    require_image,
)
from chitu_diffusion.models.wan.transformer import WanTransformer
from chitu_diffusion.pipelines.encoding import encode_text
from chitu_diffusion.pipelines.guidance import expert_at
from chitu_diffusion.pipelines.request import guidance_pair, resolve_guidance
from chitu_diffusion.sampling.noise import upsample_latent
from chitu_diffusion.task import Conditioning, DiffusionTask
from chitu_diffusion.task.params import check_guidance, check_integer, check_text

MOST_PIXELS = 8192
"""Along one axis."""
_CPU = torch.device("cpu")

Embeddings = Tensor | Conditioning
"""A text [branches, L, D]; for an image-to-video model with what `encode_keyframes` gives."""
Guidance = float | tuple[float, float] | None
"""One scale, or (high noise, low noise); None is the model's own."""
Timestep = Tensor | float
"""0 to 1000: a number, a scalar or [1], on any device."""
ModelChoice = WanTransformer | int | None
"""One of a backend's model pool, or its index; None leaves it to the timestep."""


class ForwardInputs(NamedTuple):
    """What a single forward runs on: latent [B, C, T, H, W] on the device, what goes beside it, the time as a
    scalar on the CPU, the index of the expert.
    """

    latent: Tensor
    conditioning: Conditioning
    timestep: Tensor
    expert: int


def forward_inputs(
    backend: DiffusionBackend,
    latent: Tensor,
    embeddings: Embeddings,
    timestep: Timestep,
    model: ModelChoice = None,
) -> ForwardInputs:
    """What a forward by hand is given; raises UsageError for what cannot be."""
    spec = backend.spec
    backend.use_adapters()
    check_latent(latent, spec, whole=True)
    conditioning = check_embeddings(embeddings, spec, latent)
    at = scalar_timestep(timestep)
    expert = expert_at(at, spec.boundary) if model is None else expert_index(model, backend)
    return ForwardInputs(latent.to(backend.device), conditioning, at, expert)


def guided(backend: DiffusionBackend, conditioning: Conditioning, scale: float) -> Conditioning:
    """A conditioning with the text of each branch that a guidance scale needs.

    Args:
        conditioning: its text is [2, L, D], or [1, L, D], whose other branch is the model's own negative
            prompt.
    """
    embeddings = conditioning.text.to(backend.device)
    if scale <= 1 or embeddings.shape[0] == 2:
        return conditioning
    rows = backend.text_encoder.max_tokens
    if embeddings.shape[1] != rows:
        raise UsageError(
            f"embeddings have {embeddings.shape[1]} rows, the model's negative prompt {rows}; use what "
            "encode_text gives, or [2, L, D] with a branch of your own",
            field="embeddings",
        )
    both = torch.cat([embeddings, encode_text(backend, [backend.spec.defaults.negative_prompt])])
    return replace(conditioning, text=both)


def upsampled(latent: Tensor, scale: float, spec: ModelSpec) -> Tensor:
    """A latent [B, C, T, H, W] at `scale` times its rows and columns, bicubic by frame; float32.

    Raises:
        UsageError: another shape, or a scale that leaves no cell or more than there may be.
    """
    latent = check_latent(latent, spec)
    scale = plain_number(scale)
    most = MOST_PIXELS // min(spec.geometry.stride[1:])
    number = isinstance(scale, int | float) and not isinstance(scale, bool) and math.isfinite(scale)
    rows, columns = (round(size * scale) if number else 0 for size in latent.shape[-2:])
    if not 1 <= min(rows, columns) <= max(rows, columns) <= most:
        raise UsageError(
            f"scale = {scale!r}: use a number such as 2 that makes 1 to {most} cells of each of "
            f"{list(latent.shape[-2:])}",
            field="scale",
        )
    return upsample_latent(latent, rows, columns)


def read_prompts(prompt: str | Sequence[str]) -> list[str]:
    """A prompt, or several, as a list; the empty text is one too. Raises UsageError for anything else."""
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(prompts, list | tuple) or not prompts:
        raise UsageError(f"prompt = {prompt!r}: use a text, or a list of them", field="prompt")
    for text in prompts:
        check_text("prompt", text)
    return list(prompts)


def check_task(task: DiffusionTask) -> DiffusionTask:
    """The task; raises UsageError for what is none."""
    if not isinstance(task, DiffusionTask):
        raise UsageError(
            f"task is a {type(task).__name__}; use DiffusionTask.from_user_request(DiffusionUserParams(...))",
            field="task",
        )
    return task


def check_values(tensor: Tensor, name: str) -> Tensor:
    """The tensor; raises UsageError for what is none, or has no values."""
    if not isinstance(tensor, Tensor) or tensor.is_meta:
        kind = "on meta, and holds no values" if isinstance(tensor, Tensor) else f"a {type(tensor).__name__}"
        raise UsageError(f"{name} is {kind}; use a tensor with values", field=name)
    return tensor


def check_latent(latent: Tensor, spec: ModelSpec, name: str = "latent", *, whole: bool = False) -> Tensor:
    """The latent; raises UsageError for what is not floats [B, C, T, H, W] of the model's channels, and of
    whole patches where these are wanted.
    """
    channels = spec.geometry.channels
    latent = check_values(require_floats(latent, name, f"[B, {channels}, T, H, W]"), name)
    if latent.ndim != 5 or latent.shape[1] != channels or 0 in latent.shape:
        raise UsageError(f"{name} is {list(latent.shape)}; use [B, {channels}, T, H, W]", field=name)
    if whole and spec.whole_patches(latent.shape[2:]) != tuple(latent.shape[2:]):
        raise UsageError(
            f"{name} axes {list(latent.shape[2:])} are not multiples of the patch "
            f"{list(spec.transformers[0].patch_size)}; pad them, or use denoise_loop, which does",
            field=name,
        )
    return latent


def check_embeddings(given: Embeddings, spec: ModelSpec, latent: Tensor | None = None) -> Conditioning:
    """The text, and what goes behind a latent's channels; raises UsageError for what is not floats [1 or 2,
    L, D] of the model's width, or does not fit the latent.
    """
    conditioning = given if isinstance(given, Conditioning) else Conditioning(given)
    shape = f"[1, L, {spec.text_dim}], or [2, L, {spec.text_dim}] with the prompt's branch first"
    embeddings = check_values(require_floats(conditioning.text, "embeddings", shape), "embeddings")
    fits = embeddings.ndim == 3 and embeddings.shape[0] in (1, 2) and embeddings.shape[2] == spec.text_dim
    if not fits or not embeddings.shape[1]:
        raise UsageError(
            f"embeddings are {list(embeddings.shape)}; use {shape}, as encode_text gives", field="embeddings"
        )
    channels = spec.transformers[0].in_channels - spec.geometry.channels
    found = conditioning.concat_latents
    if found is not None:
        check_values(require_floats(found, "concat_latents", f"[1, {channels}, T, H, W]"), "concat_latents")
    if (found is not None or channels) and (found is None or found.shape[:2] != (1, channels)):
        raise UsageError(
            f"{spec.name} takes {channels} channels behind the latent's, and embeddings bring "
            f"{'none' if found is None else list(found.shape)}; use Conditioning(text, concat_latents) with "
            "what "
            "pipelines.encoding.encode_keyframes gives"
            if channels
            else f"{spec.name} takes no concat_latents; use the text alone",
            field="embeddings",
        )
    if found is not None and latent is not None and found.shape[2:] != latent.shape[2:]:
        raise UsageError(
            f"concat_latents are {list(found.shape)} and latent {list(latent.shape)}; use the same frames, "
            "rows "
            "and columns",
            field="embeddings",
        )
    if conditioning.first_frame is not None:
        _check_first_frame(conditioning.first_frame, spec, latent)
    require_image(conditioning.image, spec.transformers[0], 1)
    _check_control(conditioning, spec, latent)
    return conditioning


def _check_control(conditioning: Conditioning, spec: ModelSpec, latent: Tensor | None) -> None:
    found = conditioning.control_latents
    config = spec.transformers[0]
    if found is None and spec.kind.takes_control:
        raise UsageError(
            f"{spec.name} is always told of a control; use Conditioning(text, control_latents=...) with what "
            "pipelines.controlled_video.encode_control gives",
            field="embeddings",
        )
    if found is not None:
        shape = [1, config.vace_in_channels, *found.shape[2:]]
        check_values(require_floats(found, "control_latents", f"{shape}"), "control_latents")
        cells = (found if latent is None else latent).shape[2:]
        like = torch.empty([1, 1, *cells], device="meta")
        check_control(found.to("meta"), conditioning.control_scale, config, like)


def _check_first_frame(found: Tensor, spec: ModelSpec, latent: Tensor | None) -> None:
    shape = f"[1, {spec.geometry.channels}, 1, H, W]"
    if not spec.kind.token_times:
        raise UsageError(f"{spec.name} takes no first_frame; use the text alone", field="embeddings")
    check_values(require_floats(found, "first_frame", shape), "first_frame")
    cells = found.shape[3:] if latent is None else latent.shape[3:]
    if found.shape != (1, spec.geometry.channels, 1, *cells):
        raise UsageError(
            f"first_frame is {list(found.shape)}; use {shape} with the latent's rows and columns, as "
            "pipelines.encoding.encode_first_frame gives",
            field="embeddings",
        )


def scalar_timestep(timestep: Timestep) -> Tensor:
    """A time as a scalar on the CPU; raises UsageError for what is none from 0 to 1000."""
    if isinstance(timestep, Tensor):
        timestep = check_values(timestep, "timestep").cpu()
    return read_timestep(timestep, 1, _CPU)[0]


def read_guidance(scale: Guidance, spec: ModelSpec) -> tuple[float, float]:
    """A guidance scale, or the model's own for None, as (high noise, low noise).

    Raises:
        UsageError: a value that no scale can have, or more scales than the model has transformers.
    """
    scale = plain_number(scale)
    check_guidance(scale)
    return guidance_pair(resolve_guidance(scale, spec))


def expert_index(model: WanTransformer | int, backend: DiffusionBackend) -> int:
    """Index of a network in its backend's model pool; raises UsageError for what is neither."""
    pool = backend.model_pool
    for index, network in enumerate(pool):
        if network is model:
            return index
    if type(model) is int and 0 <= model < len(pool):
        return model
    found = type(model).__name__ if isinstance(model, torch.nn.Module) else repr(model)
    raise UsageError(
        f"model = {found}: use one of backend.model_pool, which has {len(pool)}, or its index from 0",
        field="model",
    )


def require_integer(name: str, value: Any, low: int, high: int) -> int:
    """The number; raises UsageError for what is no whole one from `low` to `high`, None among it."""
    number: int | None = plain_number(value)
    if number is None:
        raise UsageError(f"{name} = None: must be a whole number from {low} to {high}", field=name)
    check_integer(name, number, low, high)
    return number
