"""The denoising loop, and one evaluation of the velocity field: the right expert, both guidance branches,
cached or not, on one rank or many.

Knows the backend's networks, where they are and which ranks share the work; no task, stage or file. With
several ranks each runs its own branch over its own tokens: shared out once after the patch embedding,
gathered once after the output projection. Every rank gets the whole velocity. A velocity here is for one or
two guidance branches, stacked along the batch: the prompt's first.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from chitu_diffusion.backend import DiffusionBackend
from chitu_diffusion.distributed.sharding import Shards, all_branches, own_branches, sharded_attention
from chitu_diffusion.files.faults import hit
from chitu_diffusion.flexcache.interface import NO_CACHE, StepCache
from chitu_diffusion.flexcache.schedule import Schedule
from chitu_diffusion.models.kinds import EXPERT_ROLES
from chitu_diffusion.models.wan.block_inputs import BlockInputs, SharedCfgPrefix
from chitu_diffusion.models.wan.transformer import WanTransformer
from chitu_diffusion.pipelines.conditioning import PreparedConditioning
from chitu_diffusion.pipelines.fingerprint import identity_of
from chitu_diffusion.pipelines.finite_check import FiniteCheck
from chitu_diffusion.pipelines.guidance import active_branches, apply_cfg, expert_at
from chitu_diffusion.sampling.library import SamplerState
from chitu_diffusion.task import Conditioning

_BATCH_UP_TO = 4096
"""Tokens a branch up to which two branches in one forward are faster than one after the other: longer
sequences fill the chip by themselves, and half the activations fit where all do not. Ranks that share a
sequence always batch: two shares are no more than one sequence, fill the chip as it does, and give exchanges
more to hide behind. Depends on shapes and layout alone, so that every memory level and every run does the
same arithmetic.
"""

CacheFor = Callable[[tuple[int, ...]], StepCache]
"""Branches that share a forward -> the cache which that forward asks."""
Predict = Callable[[Tensor, Tensor, int, tuple[int, ...]], Tensor]
"""(latent, timestep, expert, branches) -> velocity [branches * B, C, T, H, W]."""


class Probe(Protocol):
    """Watches the forwards of a task from outside, as a measurement does."""

    def forward(self, latent: Tensor, branches: tuple[int, ...]) -> AbstractContextManager[None]:
        """Around the forwards of some branches."""
        ...

    def watched(self, cache: StepCache, latent: Tensor, branches: tuple[int, ...]) -> StepCache:
        """The cache that a forward asks, in whose place it shall ask another."""
        ...


@dataclass(frozen=True)
class Step:
    """A denoising step that was taken.

    Attributes:
        expert: whose it was.
        latent: after it, [B, C, T, H, W] float32.
        clean: gives the clean latent that it points at, likewise.
        state: of the solver, after it.
        check: whether `latent` is finite, where that is not known yet.
    """

    expert: int
    latent: Tensor
    clean: Callable[[], Tensor]
    state: SamplerState
    check: FiniteCheck | None


def denoise(
    backend: DiffusionBackend,
    latent: Tensor,
    state: SamplerState,
    scales: tuple[float, float],
    predict: Predict,
    *,
    branches: int = 2,
    expert: int | None = None,
    check: FiniteCheck | None = None,
) -> Iterator[Step]:
    """The denoising loop: yields after each step that is left.

    Args:
        latent: [B, C, T, H, W] before the first of them.
        state: of the solver, likewise.
        scales: guidance of (high noise, low noise).
        predict: gives the velocities of a step.
        branches: how many there are: 1 runs the prompt's alone, whatever the scale.
        expert: index into the model pool; None leaves it to the timestep.
        check: of `latent`, if its answer is still on its way.

    Raises:
        NonFiniteError: NaN or Inf appeared; on a GPU it is found a step late, but before the last step is
            yielded.
    """
    sampler = backend.sampler_for(state["recipe"])
    while not sampler.is_done(state):
        timestep = sampler.timestep(state)
        chosen = expert_at(timestep, sampler.boundary) if expert is None else expert
        active = active_branches(scales[chosen])[:branches]
        velocity = predict(latent, timestep, chosen, active)
        hit("denoise.velocity", velocity)
        velocity = apply_cfg(velocity, scales[chosen] if len(active) > 1 else 1.0)
        clean = partial(sampler.clean, state, velocity, latent)
        latent, state = sampler.step(state, velocity, latent)
        asked = FiniteCheck(latent, "latent")
        if check is not None:
            check.require()  # while the device works on this step
        check = asked
        if asked.is_known or sampler.is_done(state):
            asked.require()
            check = None
        yield Step(chosen, latent, clean, state, check)


def predictor(backend: DiffusionBackend, text: PreparedConditioning, num_steps: int | None = None) -> Predict:
    """What `denoise` asks where nothing is cached.

    Args:
        num_steps: of the whole, of which the first call is the first; None tells the attention no step.
    """
    steps = itertools.count()

    def predict(latent: Tensor, timestep: Tensor, expert: int, branches: tuple[int, ...]) -> Tensor:
        step = None if num_steps is None else next(steps)
        return predict_velocity(
            backend, latent, text, timestep, expert=expert, branches=branches, step=step, num_steps=num_steps
        )

    return predict


def cached_predictor(
    backend: DiffusionBackend,
    text: PreparedConditioning,
    step_idx: int,
    num_steps: int | None = None,
    probe: Probe | None = None,
    state: SamplerState | None = None,
) -> Predict:
    """What `denoise` asks at one step of the task that the cache manager is bound to.

    Args:
        step_idx: of the task, from 0.
        num_steps: of the task; None where nobody knows.
        probe: is told of every forward.
        state: of the task's solver, for its schedule; None is the model's own.
    """
    manager = backend.flexcache_manager

    def predict(latent: Tensor, timestep: Tensor, expert: int, branches: tuple[int, ...]) -> Tensor:
        latent = text.composed(latent)  # a cache looks at what the network sees

        def cache_for(some: tuple[int, ...]) -> StepCache:
            cache = manager.cache_for(step_idx, some)
            return cache if probe is None else probe.watched(cache, latent, some)

        def compute(some: tuple[int, ...]) -> Tensor:
            with nullcontext() if probe is None else probe.forward(latent, some):
                return predict_velocity(
                    backend,
                    latent,
                    text,
                    timestep,
                    expert=expert,
                    branches=some,
                    cache_for=cache_for,
                    step=step_idx,
                    num_steps=num_steps,
                    state=state,
                )

        return manager.velocity(step_idx, latent, branches, compute)

    return predict


def uncached(branches: tuple[int, ...]) -> StepCache:
    """The cache of a forward that saves nothing."""
    return NO_CACHE


def predict_velocity(
    backend: DiffusionBackend,
    latent: Tensor,
    text: PreparedConditioning | Conditioning | Tensor,
    timestep: Tensor,
    *,
    expert: int,
    branches: tuple[int, ...] = (0, 1),
    cache_for: CacheFor = uncached,
    step: int | None = None,
    num_steps: int | None = None,
    state: SamplerState | None = None,
) -> Tensor:
    """The velocities of some guidance branches, [branches * B, C, T, H, W], branch by branch, the same on
    every rank.

    Args:
        latent: [B, C, T, H, W].
        text: of one or two branches, the prompt's first; each for all of the batch. A bare [branches, L, D]
            is used for this call alone.
        timestep: scalar on the CPU.
        expert: index into the model pool.
        branches: which of `text`'s branches run; those that `text` lacks are left out.
        cache_for: see `CacheFor`.
        step, num_steps: the task's step, from 0, and how many it has, for the attention; None where nobody
            knows.
        state: as for `cached_predictor`.
    """
    text = text if isinstance(text, PreparedConditioning) else PreparedConditioning(text, backend.device)
    # here, where no rank is without a branch to run
    backend.choose_attention(tokens_of(backend, latent), expert)
    asked = tuple(branch for branch in branches if branch < len(text))
    group = backend.groups.branches
    own = own_branches(asked, group)
    backend.offload.use(EXPERT_ROLES[expert])
    model = backend.model_pool[expert]
    backend.set_precision(expert, float(timestep), state)
    # filled in place: a copy from the CPU would wait for all that the device still has to do
    time = torch.full((1,), float(timestep), device=backend.device)
    start = SharedCfgPrefix() if len(own) > 1 else None
    found = []
    for some in _as_batches(backend, latent, own):
        kv = text.kv_for(model, expert, some, latent.shape[0])
        embedded = model.embed(
            text.model_input(latent), kv, time, text.first_timestep, text.control, text.control_scale
        )
        embedded = replace(embedded, start=embedded.start or start, step=step, num_steps=num_steps)
        found.append(_forward(backend, embedded, expert, cache_for(some)))
    return all_branches(found[0] if len(found) == 1 else torch.cat(found), len(asked), group)


def schedule_of(
    backend: DiffusionBackend, state: SamplerState, guidance: tuple[float, float] = (1.0, 1.0)
) -> Schedule:
    """What is known of a task's steps before the first, for a cache's plan.

    Args:
        guidance: scale of (high noise, low noise).
    """
    sampler = backend.sampler_for(state["recipe"])
    timesteps = [state["timesteps"][step] for step in range(state["index"], state["schedule"])]
    experts = tuple(expert_at(timestep, sampler.boundary) for timestep in timesteps)

    def embed_time(step: int) -> tuple[Tensor, Tensor]:
        embedder = backend.model_pool[experts[step]].condition_embedder
        # wherever the weights lie now: at high memory levels that is not the device
        device = embedder.time_proj.weight.device
        time, modulation = embedder.embed_time(timesteps[step].reshape(1).to(device))
        return time[0], modulation[0].flatten()

    return Schedule(
        timesteps=tuple(float(timestep) for timestep in timesteps),
        sigmas=tuple(state["sigmas"][state["index"] :].tolist()),
        experts=experts,
        embed_time=embed_time,
        measured=backend.spec.measured,
        model=backend.spec.name,
        guidance=tuple(guidance[expert] for expert in experts),
        sampler=sampler.name,
        response=partial(sampler.response, state),
        calibration=backend.spec.calibration,
        identity=partial(identity_of, backend),
    )


def tokens_of(backend: DiffusionBackend, latent: Tensor) -> int:
    """Tokens that each of a batch of latents [B, C, T, H, W] becomes."""
    patch = backend.spec.transformers[0].patch_size
    return latent[0, 0].numel() // (patch[0] * patch[1] * patch[2])


def _as_batches(
    backend: DiffusionBackend, latent: Tensor, branches: tuple[int, ...]
) -> list[tuple[int, ...]]:
    """Which branches share a forward."""
    mode = backend.args.infer.diffusion.cfg_batch
    pays = backend.groups.sequence.size > 1 or tokens_of(backend, latent) <= _BATCH_UP_TO
    if mode == "batched" or (mode == "auto" and pays):
        return [branches]
    return [(branch,) for branch in branches]


def _forward(backend: DiffusionBackend, embedded: BlockInputs, expert: int, cache: StepCache) -> Tensor:
    model = backend.model_pool[expert]
    blocks = backend.offload.prefetched_blocks(EXPERT_ROLES[expert])
    own, shards = _own_tokens(backend, embedded)
    groups = backend.groups
    attention = sharded_attention(backend.attention, groups.ulysses, groups.ring, shards.lengths)
    tokens = model.run_blocks(own, attention=attention, cache=cache, blocks=blocks)
    return _whole(backend, model, tokens, own, shards)


def _own_tokens(backend: DiffusionBackend, embedded: BlockInputs) -> tuple[BlockInputs, Shards]:
    """This rank's tokens with the positions that they have in the whole."""
    shards = Shards.of(embedded.tokens.shape[1], backend.groups.sequence)
    return embedded.of_tokens(*shards.own), shards


def _whole(
    backend: DiffusionBackend, model: WanTransformer, tokens: Tensor, own: BlockInputs, shards: Shards
) -> Tensor:
    """The velocity of the whole latent from this rank's tokens after the blocks."""
    parts = model.final_layer(tokens, own.time)
    return model.unpatchify(shards.gather(parts, backend.groups.sequence), own.grid)
