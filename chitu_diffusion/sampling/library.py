"""Solvers that are diffusers' schedulers: multistep ones, and the schedules that come with them.

What a scheduler remembers between steps is taken out after each step and put back before the next, so that
nothing lies in it. On a GPU a step is a sum of the tensors that it knows, with weights that the scheduler
itself gives, for these solvers are linear. Knows tensors and a checkpoint's `scheduler_config.json`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from chitu_diffusion.errors import CheckpointError, UsageError
from chitu_diffusion.files.reading import foreign_data
from chitu_diffusion.sampling import unipc
from chitu_diffusion.sampling.registry import LibraryScheduler

SamplerState = dict[str, Any]
"""sampler: its name, and whether it runs on a list; schedule: number of steps in the whole schedule; index:
the step that comes next; shift: of the schedule; timesteps [schedule]; sigmas [schedule + 1]; seed, stream:
of fresh noise; history: what the solver remembers (tensors, numbers, lists of tensors)."""


Weights = tuple[float, ...]

SCHEDULER_FILE = "scheduler/scheduler_config.json"
_MOST_TIMESTEPS = 10_000


def shift_of(config: Mapping[str, Any]) -> float:
    """The timestep shift that a `scheduler_config.json` asks for, under either of its names; 1 where it has
    none.

    Raises:
        CheckpointError: it is not a number above 0.
    """
    for key in ("flow_shift", "shift"):
        shift = config.get(key)
        if shift is None:
            continue
        if isinstance(shift, bool) or not isinstance(shift, int | float) or not 0 < shift < 1000:
            raise CheckpointError(
                "the scheduler's config cannot be used",
                file=SCHEDULER_FILE,
                key=key,
                expected="a number above 0",
                found=shift,
            )
        return float(shift)
    return 1.0


def _train_timesteps(config: Mapping[str, Any]) -> int:
    steps = config.get("num_train_timesteps", 1000)
    if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= _MOST_TIMESTEPS:
        raise CheckpointError(
            "the scheduler's config cannot be used",
            file=SCHEDULER_FILE,
            key="num_train_timesteps",
            expected=f"a whole number from 1 to {_MOST_TIMESTEPS}",
            found=steps,
        )
    return steps


class LibrarySolver:
    """A scheduler with a checkpoint's settings.

    Args:
        kind: which.
        config: the checkpoint's `scheduler_config.json`, parsed. If it belongs to the same class it is used
            whole, as diffusers would; for another its shift and number of training steps are carried over.

    Raises:
        UsageError: a config that draws noise of its own.
        CheckpointError: a config that no scheduler can be made of.
    """

    def __init__(self, kind: LibraryScheduler, config: Mapping[str, Any]) -> None:
        self._kind = kind
        self._own = config.get("_class_name", "UniPCMultistepScheduler") == kind.class_name
        if self._own and config.get("stochastic_sampling"):
            raise UsageError(
                "the checkpoint's scheduler draws noise at each step (stochastic_sampling); use "
                "infer.sampler = renoise",
                field="infer.sampler",
            )
        self._train_timesteps = _train_timesteps(config)
        self._settings = self._settings_from(config)
        self._made: dict[tuple[int, float], Any] = {}  # of the steps and the shift that were last asked for
        with foreign_data(
            lambda cause: CheckpointError(
                f"the scheduler's config cannot be used: {cause}", file=SCHEDULER_FILE
            )
        ):
            self._scheduler(2, shift_of(config))

    def _settings_from(self, config: Mapping[str, Any]) -> dict[str, Any]:
        carried = {"num_train_timesteps": self._train_timesteps, self._kind.shift_key: shift_of(config)}
        flow = dict(self._kind.flow)
        if not self._own:
            return carried | flow
        own = {key: value for key, value in config.items() if not key.startswith("_")}
        return flow | own | {key: value for key, value in carried.items() if own.get(key) is None}

    def schedule(self, steps: int, shift: float) -> tuple[Tensor, Tensor]:
        """Timesteps [steps] and sigmas [steps + 1], on the CPU."""
        scheduler = self._scheduler(steps, shift)
        return scheduler.timesteps.clone(), scheduler.sigmas.clone()

    def step(
        self, state: SamplerState, velocity: Tensor, latent: Tensor, noise: Callable[[], Tensor]
    ) -> tuple[Tensor, dict[str, Any]]:
        """The next latent, and what is remembered then."""
        solve = self._solved if latent.device.type == "cpu" else self._weighed
        return solve(state, velocity, latent)

    def _solved(self, state: SamplerState, velocity: Tensor, latent: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """The library's own step: the next latent, and what the solver remembers then."""
        scheduler = self._scheduler(state["schedule"], state["shift"])
        scheduler.set_begin_index(state["index"])
        for name, value in state["history"].items():
            setattr(scheduler, name, list(value) if isinstance(value, list) else value)
        # the solver's own arithmetic stays in float32 whatever autocast is on around the network
        with torch.autocast(device_type=latent.device.type, enabled=False):
            moved = scheduler.step(velocity, state["timesteps"][state["index"]], latent, return_dict=False)[0]
        return moved, {name: getattr(scheduler, name) for name in self._kind.history}

    def _weighed(
        self, state: SamplerState, velocity: Tensor, latent: Tensor
    ) -> tuple[Tensor, dict[str, Any]]:
        """`_solved` for tensors on a device that works by itself, without ever waiting for it; equal within
        rounding.

        The library moves each coefficient to the device and solves there for some of them, and every time the
        device runs empty. But a step is linear in the velocity, the latent and the remembered tensors. So the
        library takes its step on the CPU with unit vectors in their place, and what comes out are the weights
        of the sums to take on the device.
        """
        known = list(
            {id(tensor): tensor for tensor in (velocity, latent, *_latents_in(state["history"]))}.values()
        )
        moved, history = self._weights(state, velocity, latent, known)
        sums: dict[Weights, Tensor] = {}

        def sum_of(weights: Weights) -> Tensor:
            if weights not in sums:
                sums[weights] = _weighted(weights, known)
            return sums[weights]

        return sum_of(moved), _exchanged(history, tuple, sum_of)

    def _weights(
        self, state: SamplerState, velocity: Tensor, latent: Tensor, known: Sequence[Tensor]
    ) -> tuple[Weights, dict[str, Any]]:
        """What `_solved` gives, with each tensor as its weights over the known ones. On the CPU alone."""
        # [1, known] each
        units = {id(tensor): unit for tensor, unit in zip(known, torch.eye(len(known)).split(1), strict=True)}
        history = _exchanged(state["history"], Tensor, lambda tensor: units[id(tensor)])
        moved, kept = self._solved({**state, "history": history}, units[id(velocity)], units[id(latent)])
        return tuple(moved[0].tolist()), _exchanged(kept, Tensor, lambda row: tuple(row[0].tolist()))

    def _scheduler(self, steps: int, shift: float) -> Any:
        """One that has taken no step. Schedulers set their fields anew, and change only lists in place: a
        copy of one that was made costs a hundredth of another.
        """
        made = self._made.get((steps, shift)) or self._new_scheduler(steps, shift)
        self._made = {(steps, shift): made}
        scheduler = copy.copy(made)
        for name, value in vars(scheduler).items():
            if isinstance(value, list):
                setattr(scheduler, name, list(value))
        return scheduler

    def _new_scheduler(self, steps: int, shift: float) -> Any:
        if self._kind.class_name == "UniPCMultistepScheduler" and unipc.suits(self._settings):
            return unipc.UniPC(steps, shift, self._train_timesteps)
        import diffusers

        settings = {**self._settings, self._kind.shift_key: shift}
        scheduler = getattr(diffusers, self._kind.class_name).from_config(settings)
        if self._kind.class_name == "FlowMatchEulerDiscreteScheduler" and not self._own:
            # the flow schedule that the multistep solvers use, so that all solvers pass through the same
            # noise levels; left to itself this class would apply the shift a second time at the low end
            sigmas = np.linspace(1, 1 / self._train_timesteps, steps + 1)[:-1]
            scheduler.set_timesteps(sigmas=sigmas.tolist())
        else:
            scheduler.set_timesteps(steps)
        return scheduler


def _latents_in(history: Mapping[str, Any]) -> list[Tensor]:
    """The tensors of a latent's shape that a solver remembers. The times that it remembers are scalars."""
    found: list[Tensor] = []
    _exchanged(history, Tensor, found.append)
    return found


def _exchanged(history: Mapping[str, Any], kind: type, other: Callable[[Any], Any]) -> dict[str, Any]:
    """A solver's memory with whatever stands for a latent, of that kind, exchanged for `other` of it."""

    def exchange(value: Any) -> Any:
        if isinstance(value, list):
            return [exchange(entry) for entry in value]
        scalar = isinstance(value, Tensor) and value.ndim == 0
        return other(value) if isinstance(value, kind) and not scalar else value

    return {name: exchange(value) for name, value in history.items()}


def _weighted(weights: Weights, tensors: Sequence[Tensor]) -> Tensor:
    """The sum of tensors of one shape, each times its weight; the very tensor where that is all there is."""
    terms = [(weight, tensor) for weight, tensor in zip(weights, tensors, strict=True) if weight]
    if len(terms) == 1 and terms[0][0] == 1:
        return terms[0][1]
    total = torch.zeros_like(tensors[0])
    for weight, tensor in terms:
        total.add_(tensor, alpha=weight)
    return total
