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
from chitu_diffusion.pipelines.conditioning import PreparedConditioning
from chitu_diffusion.pipelines.denoising import denoise, predict_velocity, predictor, schedule_of
from chitu_diffusion.pipelines.guidance import apply_cfg
from chitu_diffusion.pipelines.registry import pipeline_of
from chitu_diffusion.pipelines.request import guidance_pair, resolve_task
from chitu_diffusion.sampling.library import SamplerState
from chitu_diffusion.task import DiffusionTask, DiffusionUserParams

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
    latents = [run.noise]
    states = [run.state]
    for step in denoise(backend, run.noise, run.state, run.scales, run.watched, branches=run.branches):
        latents.append(step.latent)
        states.append(step.state)
    exact = latents.pop()
    by_branch = [
        torch.stack(branch).flatten(1)
        for branch in zip(*(v.chunk(run.branches) for v in run.velocities), strict=True)
    ]
    rows = torch.cat([*by_branch, torch.stack(latents).flatten(1)])
    products = rows.new_zeros(len(rows), len(rows), dtype=torch.float64)
    for piece in rows.split(_PIECE, dim=1):
        products += piece.double() @ piece.double().T
    moments = (products / rows.shape[1]).cpu().numpy()
    gains = {step: run.gain(step, latents[step], states[step], exact) for step in probes}
    sizes, changed = (np.array(column) for column in zip(*run.residuals, strict=True))
    signals = embedding_changes(schedule_of(backend, run.state), "modulation")
    before = np.concatenate([sizes[:1], sizes[:-1]])
    sigmas = run.state["sigmas"].double().numpy()
    return Trace(sigmas, moments, changed / before, sizes / before, np.array(signals), gains)


class _Run:
    """A request's denoising: what it starts from, and all branches' velocities, [n] of [B branches, C, T, H,
    W] float32, once `watched` has been asked for them.
    """

    def __init__(self, backend: DiffusionBackend, params: dict[str, Any]) -> None:
        task = DiffusionTask.from_user_request(DiffusionUserParams(**params))
        resolved = resolve_task(task, backend.spec, output_dir="")
        self.scales = guidance_pair(resolved.guidance_scale)
        self.state = backend.sampler.begin(
            resolved.num_inference_steps or 1, seed=task.seed, shift=resolved.shift
        )
        frames = resolved.num_frames or 1
        shape = backend.spec.latent_shape(frames, resolved.height or 0, resolved.width or 0)
        self.noise = backend.sampler.first_latent(self.state, (1, *shape)).to(backend.device)
        self.velocities: list[Tensor] = []
        self.residuals: list[tuple[float, float]] = []
        self._last: list[Tensor] = []
        self._backend = backend
        self._text = PreparedConditioning(
            pipeline_of(backend.spec).condition(backend, resolved), backend.device
        )
        self.branches = len(self._text)

    def watched(self, latent: Tensor, timestep: Tensor, expert: int, branches: tuple[int, ...]) -> Tensor:
        """A predictor for `denoise` that runs every branch, and watches the prompt's block residual."""

        def watching(some: tuple[int, ...]) -> StepCache:
            return _Residuals(some, self.residuals, self._last)

        every = tuple(range(self.branches))
        velocity = predict_velocity(
            self._backend, latent, self._text, timestep, expert=expert, branches=every, cache_for=watching
        )
        self.velocities.append(velocity.float())
        return self.velocities[-1][: len(branches)]

    def gain(self, step: int, latent: Tensor, state: SamplerState, exact: Tensor) -> float:
        """|error of the last latent| / |error| where one step takes a line through the two before it, as a
        cache would.

        The error that is made is what the sampler hands to the last latent if no later velocity answers to
        it.
        """
        sigmas = self.state["sigmas"].tolist()
        known = [index for index in (step - 1, step - 2) if index >= 0]
        weights = taylor_weights([sigmas[index] for index in known], sigmas[step], 1)
        wrong = weighted([self.velocities[index] for index in known], weights)
        truth = self.velocities[step]
        computed = predictor(self._backend, self._text)
        errors: list[Tensor] = []

        def predict(latent: Tensor, timestep: Tensor, expert: int, branches: tuple[int, ...]) -> Tensor:
            if errors:
                return computed(latent, timestep, expert, branches)
            scale = self.scales[expert] if len(branches) > 1 else 1.0
            own = slice(len(branches))
            errors.append(apply_cfg(wrong[own], scale) - apply_cfg(truth[own], scale))
            return wrong[own]

        for taken in denoise(self._backend, latent, state, self.scales, predict, branches=self.branches):
            latent = taken.latent
        size = float(errors[0].double().norm()) * abs(self._backend.sampler.response(self.state)[step])
        return float((latent - exact).double().norm()) / size
