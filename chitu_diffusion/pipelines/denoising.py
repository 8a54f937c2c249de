"""One evaluation of the velocity field: the right expert, both guidance branches, cached or not, on one rank
or many.

Knows the backend's networks, where they are and which ranks share the work; no stages, solver or saving. With
several ranks each runs its own branch over its own tokens: shared out once after the patch embedding,
gathered once after the output projection. Every rank gets the whole velocity. A velocity here is for one or
two guidance branches, stacked along the batch: the prompt's first. Guidance itself is "Classifier-Free
Diffusion Guidance", arXiv:2207.12598.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from chitu_diffusion.backend import DiffusionBackend
from chitu_diffusion.distributed.sharding import Shards, all_branches, own_branches, sharded_attention
from chitu_diffusion.errors import UsageError
from chitu_diffusion.flexcache.interface import NO_CACHE, StepCache
from chitu_diffusion.flexcache.schedule import Schedule
from chitu_diffusion.memory.offload import expert_part
from chitu_diffusion.models.wan.text_kv import TextKVCache, rows_that_differ
from chitu_diffusion.models.wan.transformer import BlockInputs, SharedCfgPrefix, WanTransformer
from chitu_diffusion.sampling.solvers import SamplerState

TRAINED_STEPS = 1000
"""Timesteps run from this to 0; an expert boundary is a share of it."""
_BATCH_UP_TO = 4096
"""Tokens a branch up to which two branches in one forward are faster than one after the other: longer
sequences fill the chip by themselves, and half the activations fit where all do not. Ranks that share a
sequence always batch: two shares are no more than one sequence, fill the chip as it does, and give exchanges
more to hide behind. Depends on shapes and layout alone, so that every memory level and every run does the
same arithmetic."""


def expert_at(timestep: Tensor, boundary: float | None) -> int:
    """Index of the expert for a timestep: 0, high noise, from the boundary upward; 1 below it."""
    return 0 if boundary is None or float(timestep) >= boundary * TRAINED_STEPS else 1


def active_branches(guidance_scale: float) -> tuple[int, ...]:
    """The guidance branches that a scale needs: both, or the prompt's alone for a scale of at most 1."""
    return (0, 1) if guidance_scale > 1 else (0,)


def apply_cfg(velocity: Tensor, guidance_scale: float) -> Tensor:
    """Guided velocity [B, C, T, H, W] float32 from stacked branches [B or 2B, ...]: u + s (c - u).

    A scale of at most 1 takes the prompt's branch as it is.
    """
    if guidance_scale <= 1:
        return velocity.float()
    conditional, unconditional = velocity.float().chunk(2)
    return unconditional + guidance_scale * (conditional - unconditional)


def uncached(branches: tuple[int, ...]) -> StepCache:
    """The cache of a forward that saves nothing."""
    return NO_CACHE


class TaskText:
    """A task's text, and what the networks made of it: projected rows and cross-attention keys, for all of
    its steps.

    Lies in the task, so that tasks can take turns; what it holds beyond `embeddings` can be dropped at any
    time and comes back by itself.

    Args:
        embeddings: [branches, L, D], the prompt's branch first.
    """

    def __init__(self, embeddings: Tensor) -> None:
        self.embeddings = embeddings
        self._rows = rows_that_differ(embeddings)
        self._prepared: dict[tuple[object, ...], TextKVCache] = {}

    def __len__(self) -> int:
        return self.embeddings.shape[0]

    @property
    def bytes(self) -> int:
        """Memory held beyond the embeddings; see `TextKVCache.bytes`."""
        return sum(prepared.bytes for prepared in self._prepared.values())

    def under(
        self, network: WanTransformer, expert: int, branches: tuple[int, ...], batch: int
    ) -> TextKVCache:
        """Some branches' text, each `batch` times, for one expert, whose weights are on the device now."""
        device = self.embeddings.device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        place = (expert, branches, batch, autocast)
        if place not in self._prepared:
            text = self.embeddings[list(branches)].repeat_interleave(batch, dim=0)
            self._prepared[place] = network.make_text_kv(text, self._rows)
        return self._prepared[place]


def predict_velocity(
    backend: DiffusionBackend,
    latent: Tensor,
    text: TaskText | Tensor,
    timestep: Tensor,
    *,
    expert: int,
    branches: tuple[int, ...] = (0, 1),
    cache_for: Callable[[tuple[int, ...]], StepCache] = uncached,
) -> Tensor:
    """The velocities of some guidance branches, [branches * B, C, T, H, W], branch by branch, the same on
    every rank.

    Args:
        latent: [B, C, T, H, W].
        text: of one or two branches, the prompt's first; each for all of the batch. A bare [branches, L, D]
            is prepared for this call alone.
        timestep: scalar on the CPU.
        expert: index into the model pool.
        branches: which of `text`'s branches run; those that `text` lacks are left out.
        cache_for: branches that share a forward -> the cache which that forward asks.
    """
    text = TaskText(text) if isinstance(text, Tensor) else text
    if len(text) > 2:
        shape = list(text.embeddings.shape)
        raise UsageError(
            f"embeddings are {shape}: use [1, L, D], or [2, L, D] with the prompt's branch first"
        )
    # here, where no rank is without a branch to run
    backend.choose_attention(tokens_of(backend, latent), expert)
    asked, peers = tuple(branch for branch in branches if branch < len(text)), backend.groups.branches
    own = own_branches(asked, peers)
    backend.offload.use(expert_part(expert))
    model = backend.model_pool[expert]
    backend.set_precision(expert, float(timestep))
    # filled in place: a copy from the CPU would wait for all that the device still has to do
    time = torch.full((1,), float(timestep), device=backend.device)
    start, found = SharedCfgPrefix() if len(own) > 1 else None, []
    for some in _as_batches(backend, latent, own):
        embedded = model.embed(latent, time, text.under(model, expert, some, latent.shape[0]))
        embedded = replace(embedded, start=embedded.start or start)
        found.append(_forward(backend, embedded, expert, cache_for(some)))
    return all_branches(found[0] if len(found) == 1 else torch.cat(found), len(asked), peers)


def schedule_of(
    backend: DiffusionBackend, state: SamplerState, guidance: tuple[float, float] = (1.0, 1.0)
) -> Schedule:
    """What is known of a task's steps before the first, for a cache's plan.

    Args:
        guidance: scale of (high noise, low noise).
    """
    timesteps = [state["timesteps"][step] for step in range(state["index"], state["schedule"])]
    experts = tuple(expert_at(timestep, backend.spec.boundary) for timestep in timesteps)

    def embed_time(step: int) -> tuple[Tensor, Tensor]:
        embedder = backend.model_pool[experts[step]].condition_embedder
        # wherever the weights lie now: at high memory levels that is not the device
        time, modulation = embedder.embed_time(
            timesteps[step].reshape(1).to(embedder.time_proj.weight.device)
        )
        return time[0], modulation[0].flatten()

    return Schedule(
        timesteps=tuple(float(timestep) for timestep in timesteps),
        sigmas=tuple(state["sigmas"][state["index"] :].tolist()),
        experts=experts,
        embed_time=embed_time,
        measured=backend.spec.measured,
        model=backend.spec.name,
        guidance=tuple(guidance[expert] for expert in experts),
        sampler=backend.sampler.name,
        response=partial(backend.sampler.response, state),
        calibration=backend.spec.calibration,
        weights_sha256=backend.weights_sha256,
    )


def _as_batches(
    backend: DiffusionBackend, latent: Tensor, branches: tuple[int, ...]
) -> list[tuple[int, ...]]:
    """Which branches share a forward."""
    mode = backend.args.infer.diffusion.cfg_batch
    pays = backend.groups.sequence.size > 1 or tokens_of(backend, latent) <= _BATCH_UP_TO
    if mode == "batched" or (mode == "auto" and pays):
        return [branches]
    return [(branch,) for branch in branches]


def tokens_of(backend: DiffusionBackend, latent: Tensor) -> int:
    """Tokens that each of a batch of latents [B, C, T, H, W] becomes."""
    patch = backend.spec.transformers[0].patch_size
    return latent[0, 0].numel() // (patch[0] * patch[1] * patch[2])


def _forward(backend: DiffusionBackend, embedded: BlockInputs, expert: int, cache: StepCache) -> Tensor:
    model, stream = backend.model_pool[expert], backend.offload.prefetched_blocks(expert_part(expert))
    own, shards = _own_tokens(backend, embedded)
    groups = backend.groups
    attention = sharded_attention(backend.attn_backend, groups.ulysses, groups.ring, shards.lengths)
    return _whole(
        backend, model, model.run_blocks(own, attention=attention, cache=cache, blocks=stream), own, shards
    )


def _own_tokens(backend: DiffusionBackend, embedded: BlockInputs) -> tuple[BlockInputs, Shards]:
    """This rank's tokens with the positions that they have in the whole."""
    shards = Shards.of(embedded.tokens.shape[1], backend.groups.sequence)
    cos, sin = (shards.take(part, 0) for part in embedded.rope)
    return replace(embedded, tokens=shards.take(embedded.tokens, 1), rope=(cos, sin)), shards


def _whole(
    backend: DiffusionBackend, model: WanTransformer, tokens: Tensor, own: BlockInputs, shards: Shards
) -> Tensor:
    """The velocity of the whole latent from this rank's tokens after the blocks."""
    return model.unpatchify(
        shards.gather(model.final_layer(tokens, own.time), backend.groups.sequence), own.grid
    )
