"""What `Generator.denoise_loop` begins with: a latent of whole patches at the first step's noise, a solver's
state, a text of each branch; all that the caller leaves out is filled in.

Sizes. The network computes whole patches; a latent of another size is padded at its ends, with noise or,
where it is a clean one, with its last cells, and what was asked for is cut out after the loop.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from chitu_diffusion.backend import DiffusionBackend
from chitu_diffusion.errors import UsageError, plain_number
from chitu_diffusion.models.spec import ModelSpec
from chitu_diffusion.pipelines.conditioning import PreparedConditioning
from chitu_diffusion.pipelines.encoding import encode_text
from chitu_diffusion.pipelines.finite_check import FiniteCheck
from chitu_diffusion.pipelines.page_inputs import (
    MOST_PIXELS,
    Embeddings,
    Guidance,
    ModelChoice,
    check_embeddings,
    check_latent,
    expert_index,
    guided,
    read_guidance,
    require_integer,
)
from chitu_diffusion.sampling.library import SamplerState
from chitu_diffusion.sampling.noise import initial_noise, upsample_latent
from chitu_diffusion.task.params import LEAST_STRENGTH, MAX_SEED, check_frames

REFINE_STRENGTH = 0.5
"""Share of the noise schedule that refining a clean latent runs, where the caller names none: detail is made
anew, and what moves where stays.
"""
_PADDING_STREAM = -1
"""The noise around a latent that the caller made is none of those that a task draws."""

Cells = tuple[int, int, int]
"""Cells of a latent along (frames, rows, columns)."""


@dataclass(frozen=True)
class Beginning:
    """The latent that a loop is asked to begin with; see `Generator.denoise_loop`."""

    latent: Tensor | None
    init_latent: Tensor | None
    resolution: Sequence[int] | None
    num_frames: int | None
    strength: float | None
    seed: int

    def __post_init__(self) -> None:
        for name in ("resolution", "num_frames", "strength"):
            object.__setattr__(self, name, plain_number(vars(self)[name]))


@dataclass(frozen=True)
class LoopStart:
    """What the denoising loop begins with.

    Attributes:
        latent: [B, C, T, H, W] float32 on the device, of whole patches.
        state: of the solver, before its first step.
        text: one branch or two.
        scales: guidance of (high noise, low noise).
        expert: index into the model pool, or None for the one of each timestep.
        cells: what was asked for of `latent`; the rest fills up its last patches.
    """

    latent: Tensor
    state: SamplerState
    text: PreparedConditioning
    scales: tuple[float, float]
    expert: int | None
    cells: Cells

    def cut(self, latent: Tensor) -> Tensor:
        """What was asked for of a latent that the loop gave."""
        frames, rows, columns = self.cells
        return latent[:, :, :frames, :rows, :columns].contiguous()


def start_of_loop(
    backend: DiffusionBackend,
    asked: Beginning,
    embeddings: Embeddings | None,
    num_steps: int,
    guidance_scale: Guidance,
    model: ModelChoice,
) -> LoopStart:
    """All that `denoise_loop` needs; its arguments are described there.

    Raises:
        UsageError: what cannot be, or cannot be together.
        NonFiniteError: a latent or a text with NaN or Inf.
    """
    spec = backend.spec
    backend.use_adapters()
    num_steps = require_integer("num_steps", num_steps, 1, 1000)
    asked = replace(asked, seed=require_integer("seed", asked.seed, 0, MAX_SEED))
    scales = read_guidance(guidance_scale, spec)
    expert = None if model is None else expert_index(model, backend)
    if embeddings is not None:
        told = check_embeddings(embeddings, spec)
        FiniteCheck(told.text, "embeddings").require()
        for name in ("concat_latents", "first_frame", "control_latents"):
            if vars(told)[name] is not None:
                FiniteCheck(vars(told)[name], name).require()
    cells = _cells(asked, spec)
    stream = 0 if asked.init_latent is None else 1
    state = backend.sampler.begin(num_steps, _strength(asked), seed=asked.seed, stream=stream)
    latent = _first_latent(backend, asked, state, cells)
    given = encode_text(backend, [""]) if embeddings is None else embeddings
    conditioning = check_embeddings(given, spec, latent)
    text = guided(backend, conditioning, max(scales) if expert is None else scales[expert])
    return LoopStart(latent, state, PreparedConditioning(text, backend.device), scales, expert, cells)


def _cells(asked: Beginning, spec: ModelSpec) -> Cells:
    """Cells of the latent that is asked for, by whichever argument names its size."""
    if asked.latent is not None:
        for name in ("init_latent", "resolution", "num_frames"):
            if vars(asked)[name] is not None:
                raise UsageError(f"latent and {name} both say what to begin with; leave one out", field=name)
        frames, rows, columns = check_latent(asked.latent, spec).shape[2:]
        return frames, rows, columns
    defaults = spec.defaults
    check_frames(asked.num_frames)
    height, width = _pixels(asked.resolution, spec) or (defaults.height, defaults.width)
    _, frames, rows, columns = spec.geometry.latent_shape(
        asked.num_frames or defaults.num_frames, height, width
    )
    if asked.init_latent is None:
        return frames, rows, columns
    init = check_latent(asked.init_latent, spec, "init_latent").shape[2:]
    if asked.num_frames is not None and frames != init[0]:
        raise UsageError(
            f"num_frames = {asked.num_frames} are {frames} latent frames, init_latent has {init[0]}; leave "
            "num_frames out",
            field="num_frames",
        )
    return (init[0], init[1], init[2]) if asked.resolution is None else (init[0], rows, columns)


def _pixels(resolution: Sequence[int] | None, spec: ModelSpec) -> tuple[int, int] | None:
    if resolution is None:
        return None
    steps = spec.geometry.stride[1:]
    sizes = tuple(resolution) if isinstance(resolution, list | tuple) else ()
    whole = len(sizes) == 2 and all(type(size) is int for size in sizes)
    if not whole or any(
        size % step or not step <= size <= MOST_PIXELS for size, step in zip(sizes, steps, strict=True)
    ):
        raise UsageError(
            f"resolution = {resolution!r}: use (height, width) in pixels, multiples of {steps[0]} and "
            f"{steps[1]} up to {MOST_PIXELS}",
            field="resolution",
        )
    return sizes[0], sizes[1]


def _strength(asked: Beginning) -> float:
    strength = asked.strength
    if asked.init_latent is None:
        if strength is not None:
            raise UsageError(
                f"strength = {strength!r}: it is of an init_latent; hand one over, or leave strength out",
                field="strength",
            )
        return 1.0
    if strength is None:
        return REFINE_STRENGTH
    number = isinstance(strength, int | float) and not isinstance(strength, bool)
    if not number or not LEAST_STRENGTH <= strength <= 1:
        raise UsageError(
            f"strength = {strength!r}: must be a number from {LEAST_STRENGTH} to 1", field="strength"
        )
    return float(strength)


def _first_latent(backend: DiffusionBackend, asked: Beginning, state: SamplerState, cells: Cells) -> Tensor:
    """[B, C, T, H, W] float32 on the device, of whole patches, at the noise level of the first step."""
    spec = backend.spec
    padded = spec.whole_patches(cells)
    given = asked.init_latent if asked.latent is None else asked.latent

    def noise(stream: int) -> Tensor:
        shape = (1 if given is None else given.shape[0], spec.geometry.channels, *padded)
        return initial_noise(shape, asked.seed, stream).to(backend.device)

    if given is None:
        return backend.sampler.first_latent(state, (1, spec.geometry.channels, *padded)).to(backend.device)
    FiniteCheck(given, "latent" if asked.init_latent is None else "init_latent").require()
    given = given.to(backend.device, torch.float32)
    if asked.init_latent is None:
        if padded == cells:
            return given
        whole = noise(_PADDING_STREAM)
        whole[:, :, : cells[0], : cells[1], : cells[2]] = given
        return whole
    if given.shape[-2:] != cells[1:]:
        given = upsample_latent(given, cells[1], cells[2])
    more = [size - cell for size, cell in zip(padded, cells, strict=True)]
    clean = torch.nn.functional.pad(given, (0, more[2], 0, more[1], 0, more[0]), mode="replicate")
    return backend.sampler.renoise(state, clean)
