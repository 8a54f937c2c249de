"""What a full-compute run passes through, as the few numbers that caches are fitted on.

A run is taken step by step with the networks' own velocity and sampler. Kept of it: inner products
of all velocities and latents (`flexcache.plan_search.Traces`), the block stack's residual for TeaCache and
MagCache, and, where asked, how an error that is made at one step has grown at the end. Knows the networks and
the sampler; no cache strategy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from chitu_diffusion.backend import DiffusionBackend
from chitu_diffusion.flexcache.interface import Level, Site, SiteInputs, StepCache
from chitu_diffusion.flexcache.plan_search import Array
from chitu_diffusion.flexcache.predictors import taylor_weights, weighted
from chitu_diffusion.flexcache.teacache import embedding_changes
from chitu_diffusion.generator import Generator
from chitu_diffusion.pipelines import denoising
from chitu_diffusion.pipelines.request import guidance_pair, resolve_request
from chitu_diffusion.sampling.solvers import SamplerState, initial_noise
from chitu_diffusion.task import DiffusionUserParams

_PIECE = 2**18
"""Numbers of a latent that are float64 at a time: a long video's runs take gigabytes as they are."""


@dataclass(frozen=True)
class Trace:
    """One run.

    Attributes:
        sigmas: [n + 1].
        moments: inner products over the numbers of a latent, [(B + 1) n, (B + 1) n].
        changes: mean|r_t - r_{t-1}| / mean|r_{t-1}| of the prompt's block residual r, [n]; 0 at the first
            step.
        ratios: mean|r_t| / mean|r_{t-1}|, [n]; 1 at the first step.
        signals: the same change of the modulation that blocks get, [n].
        gains: for each probed step, |error at the end| / |error that was made|.
    """

    sigmas: Array
    moments: Array
    changes: Array
    ratios: Array
    signals: Array
    gains: dict[int, float]


@dataclass
class _Residuals:
    """A cache that computes always and watches the prompt's block residual."""

    branches: tuple[int, ...]
    seen: list[tuple[float, float]]
    last: list[Tensor]
    levels: frozenset[Level] = frozenset({"step"})

    def at(self, site: Site, compute: Callable[[], Tensor], inputs: SiteInputs) -> Tensor:
        """Computes."""
        value = compute()
        if 0 in self.branches:
            rows = (value - inputs.entering).chunk(len(self.branches))[self.branches.index(0)].float()
            changed = float((rows - self.last[0]).abs().mean()) if self.last else 0.0
            self.last[:] = [rows]
            self.seen.append((float(rows.abs().mean()), changed))
        return value


@torch.no_grad()
def trace(backend: DiffusionBackend, params: dict[str, Any], probes: Sequence[int] = ()) -> Trace:
    """Runs a request's denoising in full.

    Args:
        params: of `DiffusionUserParams`, with a seed.
        probes: steps at which an error is made, each in a run of its own from there on.
    """
    run = _Run(backend, params)
    state, latent = run.begin()
    velocities, latents, states = [], [], []
    for _ in range(run.steps):
        velocity = run.velocity(latent, state, watched=True)
        velocities.append(velocity)
        latents.append(latent)
        states.append(state)
        latent, state = backend.sampler.step(state, run.guided(velocity, state), latent)
    by_branch = [
        torch.stack(branch).flatten(1)
        for branch in zip(*(v.chunk(run.branches) for v in velocities), strict=True)
    ]
    rows = torch.cat([*by_branch, torch.stack(latents).flatten(1)])
    products = rows.new_zeros(len(rows), len(rows), dtype=torch.float64)
    for piece in rows.split(_PIECE, dim=1):
        products += piece.double() @ piece.double().T
    moments = (products / rows.shape[1]).cpu().numpy()
    gains = {step: run.gain(step, velocities, latents[step], states, latent) for step in probes}
    sizes, changed = (np.array(column) for column in zip(*run.residuals, strict=True))
    signals = embedding_changes(denoising.schedule_of(backend, states[0]), "modulation")
    before = np.concatenate([sizes[:1], sizes[:-1]])
    return Trace(
        states[0]["sigmas"].double().numpy(),
        moments,
        changed / before,
        sizes / before,
        np.array(signals),
        gains,
    )


class _Run:
    """A request's denoising by hand."""

    def __init__(self, backend: DiffusionBackend, params: dict[str, Any]) -> None:
        self.backend = backend
        asked = DiffusionUserParams(**params)
        resolved = resolve_request(asked, backend.spec, seed=asked.seed or 0, task_id="trace", output_dir="")
        self.steps = resolved.num_inference_steps or 1
        self.scales = guidance_pair(resolved.guidance_scale)
        prompts = [resolved.prompt] + ([resolved.negative_prompt or ""] if max(self.scales) > 1 else [])
        self.branches = len(prompts)
        self.text = denoising.TaskText(Generator(backend).encode_text(prompts).to(backend.device))
        self.residuals: list[tuple[float, float]] = []
        self._last: list[Tensor] = []
        frames, height, width = resolved.num_frames or 1, resolved.height or 0, resolved.width or 0
        self._shape = (1, *backend.spec.geometry.latent_shape(frames, height, width))
        self._seed = asked.seed or 0

    def begin(self) -> tuple[SamplerState, Tensor]:
        """The sampler's state and the latent before the first step."""
        return self.backend.sampler.begin(self.steps), initial_noise(self._shape, self._seed).to(
            self.backend.device
        )

    def expert(self, state: SamplerState) -> int:
        """Which network runs the coming step."""
        return denoising.expert_at(self.backend.sampler.timestep(state), self.backend.spec.boundary)

    def velocity(self, latent: Tensor, state: SamplerState, *, watched: bool = False) -> Tensor:
        """All branches' velocities, float32."""

        def watching(branches: tuple[int, ...]) -> StepCache:
            return _Residuals(branches, self.residuals, self._last)

        cache_for = watching if watched else denoising.uncached
        time, expert = self.backend.sampler.timestep(state), self.expert(state)
        every = tuple(range(self.branches))
        return denoising.predict_velocity(
            self.backend, latent, self.text, time, expert=expert, branches=every, cache_for=cache_for
        ).float()

    def guided(self, velocity: Tensor, state: SamplerState) -> Tensor:
        """Branches combined at the coming step's scale."""
        return denoising.apply_cfg(velocity, self.scales[self.expert(state)] if self.branches == 2 else 1.0)

    def gain(
        self,
        step: int,
        velocities: Sequence[Tensor],
        latent: Tensor,
        states: Sequence[SamplerState],
        exact: Tensor,
    ) -> float:
        """|error of the last latent| / |error| where one step takes a line through the two before it, as a
        cache would.

        The error that is made is what the sampler hands to the last latent if no later velocity answers to
        it.
        """
        sampler, state, sigmas = self.backend.sampler, states[step], states[0]["sigmas"].tolist()
        known = [index for index in (step - 1, step - 2) if index >= 0]
        weights = taylor_weights([sigmas[index] for index in known], sigmas[step], 1)
        wrong = weighted([velocities[index] for index in known], weights)
        made = self.guided(wrong, state) - self.guided(velocities[step], state)
        size = float(made.double().norm()) * abs(sampler.response(states[0])[step])
        latent, state = sampler.step(state, self.guided(wrong, state), latent)
        while not sampler.is_done(state):
            latent, state = sampler.step(state, self.guided(self.velocity(latent, state), state), latent)
        return float((latent - exact).double().norm()) / size
