"""Solvers of the flow's differential equation, as functions of a plain state.

A `Sampler` remembers nothing: the whole of a run's solver is one dict (`SamplerState`). This file knows
tensors, a checkpoint's `scheduler_config.json` and explicit lists of noise levels; no network, request or
task.

A step takes the velocity v = noise - data of a latent x at noise level sigma, x = (1 - sigma) data + sigma
noise ("Flow Matching for Generative Modeling", arXiv:2210.02747). `unipc` is UniPC (arXiv:2302.04867),
`dpm++` DPM-Solver++ (arXiv:2211.01095), both multistep; the updates of the others are in `registry`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from chitu_diffusion.errors import UsageError, nearest, plain_number
from chitu_diffusion.sampling.library import LibrarySolver, SamplerState, shift_of
from chitu_diffusion.sampling.noise import initial_noise, nth_noise, on_device, step_noise
from chitu_diffusion.sampling.noise_levels import NoiseLevels, whole_steps
from chitu_diffusion.sampling.recipes import RECIPES
from chitu_diffusion.sampling.registry import SOLVERS, Update

MOST_STEPS = 1000


class Solver(Protocol):
    """A schedule, and a rule for one step. What it remembers between steps is plain data."""

    def schedule(self, steps: int, shift: float) -> tuple[Tensor, Tensor]:
        """Timesteps [steps] and sigmas [steps + 1], on the CPU."""
        ...

    def step(
        self, state: SamplerState, velocity: Tensor, latent: Tensor, noise: Callable[[], Tensor]
    ) -> tuple[Tensor, dict[str, Any]]:
        """The next latent, and what is remembered then.

        Args:
            velocity, latent: float32 or float64, of one shape.
            noise: gives this step's fresh noise, of the same shape, in the dtype that latents are kept in.
        """
        ...


@dataclass(frozen=True)
class UpdateSolver:
    """A solver that remembers nothing.

    Attributes:
        update: of a step.
        levels: an explicit schedule; None is even steps, shifted.
    """

    update: Update
    levels: NoiseLevels | None

    def schedule(self, steps: int, shift: float) -> tuple[Tensor, Tensor]:
        """Timesteps [steps] and sigmas [steps + 1], float32 on the CPU."""
        levels = self.levels or NoiseLevels.even(steps, shift)
        return torch.tensor(levels.timesteps), torch.tensor([*levels.sigmas, 0.0])

    def step(
        self, state: SamplerState, velocity: Tensor, latent: Tensor, noise: Callable[[], Tensor]
    ) -> tuple[Tensor, dict[str, Any]]:
        """The next latent; nothing is remembered."""
        sigma, following = state["sigmas"][state["index"] : state["index"] + 2].tolist()
        return self.update(latent, velocity, sigma, following, noise), {}


class Sampler:
    """One solver with a checkpoint's settings. Remembers nothing: every call takes the state and gives the
    next one.

    Args:
        name: of `registry.SOLVERS`.
        config: the checkpoint's `scheduler_config.json`, parsed; see `LibrarySolver`.
        levels: an explicit schedule; None is the solver's own, by number of steps and the config's shift.
        recipe: name of the row of `RECIPES` that name and levels are of, for the rest of it; None for none.
        boundary: of two experts, the share of the 1000 timesteps below which the second takes over.

    Attributes:
        recipe, boundary: as given.
        shift: the config's, for tasks that ask for none.
        linear: see `SolverKind`.

    Raises:
        UsageError: an unknown name, a solver that takes no list, or a config whose schedule depends on the
            size of the video (`use_dynamic_shifting`) or that draws noise of its own.
        CheckpointError: a config that no scheduler can be made of.
    """

    def __init__(
        self,
        name: str,
        config: Mapping[str, Any],
        levels: NoiseLevels | None = None,
        recipe: str | None = None,
        boundary: float | None = None,
    ) -> None:
        if name not in SOLVERS:
            raise UsageError(f"sampler = {name!r}.{nearest(name, SOLVERS)}", field="infer.sampler")
        if levels is None and config.get("use_dynamic_shifting"):
            raise UsageError(
                "the checkpoint's scheduler uses dynamic shifting; Wan models have a fixed one",
                field="infer.sampler",
            )
        kind = SOLVERS[name]
        self.name = name
        self.linear = kind.linear
        self.levels = levels
        self.recipe = recipe
        self.boundary = boundary
        row = None if recipe is None else RECIPES[recipe]
        self._kept: torch.dtype = torch.float32 if row is None else getattr(torch, row.latent)
        self._worked = torch.float32 if self._kept == torch.float32 else torch.float64
        self._one_generator = row is not None and row.one_generator
        self._scales_start = row is not None and row.scales_start
        self.shift = shift_of(config)
        self._solver: Solver
        if kind.library is not None and levels is None:
            self._solver = LibrarySolver(kind.library, config)
        elif kind.update is not None:
            self._solver = UpdateSolver(kind.update, levels)
        else:
            able = " or ".join(other for other, its in SOLVERS.items() if its.takes_list)
            raise UsageError(
                f"sampler = {name!r} takes no list of noise levels; use {able}", field="infer.sampler"
            )
        self._begun_by = name if levels is None else f"{name} on a list"

    def begin(
        self, steps: int, strength: float = 1.0, *, seed: int = 0, stream: int = 0, shift: float | None = None
    ) -> SamplerState:
        """The state before the first step.

        Args:
            steps: steps that will be taken.
            strength: share of the noise schedule that they cover, from its end; in (0, 1]. The whole schedule
                then has round(steps / strength) steps, of which the last `steps` are run (SDEdit,
                arXiv:2108.01073).
            seed: of the task; of interest where a step takes fresh noise.
            stream: its cascade stage, likewise.
            shift: of the noise schedule; None is the checkpoint's. An explicit list stands as it is.

        Raises:
            UsageError: no steps, a strength outside (0, 1], or steps that do not fit an explicit list.
        """
        steps = plain_number(steps)
        if type(steps) is not int or not 1 <= steps <= MOST_STEPS:
            raise UsageError(
                f"num_inference_steps = {steps!r}: use at least 1 and at most {MOST_STEPS}, a whole number",
                field="num_inference_steps",
            )
        if not 0 < strength <= 1:
            raise UsageError(f"strength = {strength}: must be in (0, 1]", field="cascade")
        if self.levels is not None:
            self.levels.require_steps(steps, strength)
        whole = whole_steps(steps, strength)
        shift = self.shift if shift is None else shift
        timesteps, sigmas = self._solver.schedule(whole, shift)
        return {
            "sampler": self._begun_by,
            "recipe": self.recipe,
            "schedule": whole,
            "shift": shift,
            "index": whole - steps,
            "timesteps": timesteps,
            "sigmas": sigmas,
            "seed": seed,
            "stream": stream,
            "history": {},
        }

    def first_latent(self, state: SamplerState, shape: Sequence[int]) -> Tensor:
        """The latent before a whole schedule's first step, [B, C, T, H, W] on the CPU: noise of the state's
        seed and stream.
        """
        noise = self._noise(shape, state, 0).to(self._kept)
        return self.sigma(state) * noise if self._scales_start else noise

    def _noise(self, shape: Sequence[int], state: SamplerState, number: int) -> Tensor:
        """The starting noise (0) of a run, or what follows after so many steps."""
        seed = state["seed"]
        stream = state["stream"]
        if self._one_generator:
            return nth_noise(shape, seed, stream, number, self._kept)
        return step_noise(shape, seed, stream, number - 1) if number else initial_noise(shape, seed, stream)

    def timestep(self, state: SamplerState) -> Tensor:
        """The time of the coming step, a scalar on the CPU: what the network is told."""
        timestep: Tensor = state["timesteps"][state["index"]]
        return timestep

    def sigma(self, state: SamplerState) -> float:
        """The noise level before the coming step, 0 to 1."""
        return float(state["sigmas"][state["index"]])

    def is_done(self, state: SamplerState) -> bool:
        """Whether every step has been taken."""
        return bool(state["index"] >= state["schedule"])

    def step(self, state: SamplerState, velocity: Tensor, latent: Tensor) -> tuple[Tensor, SamplerState]:
        """One step of the solver.

        Args:
            state: as the step before left it; it is not changed.
            velocity: the network's (guided) velocity at `latent`, of its shape, any dtype.
            latent: [B, C, T, H, W], as `first_latent` or the step before gave it.

        Returns:
            the next latent, float32 unless the recipe keeps another, and the next state.

        Raises:
            UsageError: a state of another solver, or one with no step left.
        """
        if state["sampler"] != self._begun_by:
            raise UsageError(
                f"this latent was begun with sampler '{state['sampler']}', not '{self._begun_by}'",
                field="infer.sampler",
            )
        if self.is_done(state):
            raise UsageError(f"all {state['schedule']} steps are taken", field="num_inference_steps")
        latent = latent.to(self._worked)

        def noise() -> Tensor:
            fresh = self._noise(latent.shape, state, state["index"] + 1)
            return on_device(fresh, latent.device).to(self._kept)

        moved, history = self._solver.step(state, velocity.to(self._worked), latent, noise)
        return moved.to(self._kept), {**state, "index": state["index"] + 1, "history": history}

    def clean(self, state: SamplerState, velocity: Tensor, latent: Tensor) -> Tensor:
        """The data that a velocity points at, x0 = x - sigma v, [B, C, T, H, W] float32, whatever the solver;
        after the last `step` its latent. Arguments as there.
        """
        return (latent.to(self._worked) - self.sigma(state) * velocity.to(self._worked)).float()

    def response(self, state: SamplerState) -> tuple[float, ...]:
        """d(last latent) / d(velocity) of each step that is left.

        Raises:
            UsageError: the solver is not linear.
        """
        if not self.linear:
            raise UsageError(
                f"sampler = {self.name!r} takes fresh noise: its last latent does not follow from the "
                "velocities alone",
                field="infer.sampler",
            )
        steps = state["schedule"] - state["index"]
        latent = torch.zeros(1, steps, 1, 1, 1)
        for step in range(steps):
            # one channel for each step: its velocity is 1 at that step and 0 at the others
            velocity = torch.zeros_like(latent)
            velocity[:, step] = 1
            latent, state = self.step(state, velocity, latent)
        return tuple(latent.flatten().tolist())

    def renoise(self, state: SamplerState, latent: Tensor, noise: Tensor | None = None) -> Tensor:
        """Bring a clean latent [B, C, T, H, W] to the noise level of the coming step; of the latent's device.

        Args:
            noise: None is the starting noise of the state's seed and stream.
        """
        sigma = self.sigma(state)
        noise = self._noise(latent.shape, state, 0) if noise is None else noise
        mixed = (1.0 - sigma) * latent.to(self._worked) + sigma * noise.to(latent.device, self._worked)
        return mixed.to(self._kept)
