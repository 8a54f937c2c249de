"""Solvers of the flow's differential equation.

The solvers are diffusers' schedulers; what they remember between steps is taken out after each step and put
back before the next, so that the whole of a run's solver is one plain dict (`SamplerState`) and a `Sampler`
itself remembers nothing. This file knows tensors and a checkpoint's `scheduler_config.json`; no network,
request or task.

A step takes the velocity v = noise - data of a latent x at noise level sigma, x = (1 - sigma) data + sigma
noise ("Flow Matching for Generative Modeling", arXiv:2210.02747). `unipc` is UniPC (arXiv:2302.04867),
`dpm++` DPM-Solver++ (arXiv:2211.01095), both multistep; `euler` the first-order rule.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from chitu_diffusion.errors import CheckpointError, UsageError, nearest

SamplerState = dict[str, Any]
"""sampler: its name; schedule: number of steps in the whole schedule; index: the step that comes next;
timesteps [schedule]; sigmas [schedule + 1]; history: what the solver remembers (tensors, numbers, lists of
tensors)."""

Weights = tuple[float, ...]

SCHEDULER_FILE = "scheduler/scheduler_config.json"
_MOST_TIMESTEPS = 10_000


@dataclass(frozen=True)
class _Solver:
    """A diffusers scheduler: its class, what it remembers, and the settings that make it solve a flow."""

    class_name: str
    shift_key: str
    history: tuple[str, ...] = ()
    flow: tuple[tuple[str, Any], ...] = ()


_FLOW_SETTINGS = (("prediction_type", "flow_prediction"), ("use_flow_sigmas", True))
_SOLVERS: dict[str, _Solver] = {
    "unipc": _Solver(
        "UniPCMultistepScheduler",
        "flow_shift",
        ("model_outputs", "timestep_list", "last_sample", "lower_order_nums", "this_order"),
        _FLOW_SETTINGS,
    ),
    "dpm++": _Solver(
        "DPMSolverMultistepScheduler", "flow_shift", ("model_outputs", "lower_order_nums"), _FLOW_SETTINGS
    ),
    "euler": _Solver("FlowMatchEulerDiscreteScheduler", "shift"),
}
SAMPLERS = tuple(_SOLVERS)


def sampler_names() -> tuple[str, ...]:
    """The solvers there are."""
    return SAMPLERS


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


class Sampler:
    """One solver with a checkpoint's settings. Remembers nothing: every call takes the state and gives the
    next one.

    Args:
        name: "unipc", "euler" or "dpm++".
        config: the checkpoint's `scheduler_config.json`, parsed. If it belongs to the chosen solver it is
            used whole, as diffusers would; for another solver its shift and number of training steps are
            carried over.

    Raises:
        UsageError: an unknown name, or a config whose schedule depends on the size of the video
            (`use_dynamic_shifting`).
        CheckpointError: a config that no scheduler can be made of.
    """

    def __init__(self, name: str, config: Mapping[str, Any]) -> None:
        if name not in _SOLVERS:
            raise UsageError(f"sampler = {name!r}.{nearest(name, _SOLVERS)}", field="infer.sampler")
        if config.get("use_dynamic_shifting"):
            raise UsageError(
                "the checkpoint's scheduler uses dynamic shifting; Wan models have a fixed one",
                field="infer.sampler",
            )
        self.name = name
        self._solver = _SOLVERS[name]
        self._own = config.get("_class_name", "UniPCMultistepScheduler") == self._solver.class_name
        self.train_timesteps = _train_timesteps(config)
        self.shift = shift_of(config)
        self._settings = self._settings_from(config)
        try:
            self._scheduler(2)
        except (ValueError, TypeError, KeyError, RuntimeError, AttributeError) as error:
            raise CheckpointError(
                f"the scheduler's config cannot be used: {error}", file=SCHEDULER_FILE
            ) from error

    def _settings_from(self, config: Mapping[str, Any]) -> dict[str, Any]:
        carried = {"num_train_timesteps": self.train_timesteps, self._solver.shift_key: self.shift}
        flow = dict(self._solver.flow)
        if not self._own:
            return carried | flow
        own = {key: value for key, value in config.items() if not key.startswith("_")}
        return flow | own | {key: value for key, value in carried.items() if own.get(key) is None}

    def begin(self, steps: int, strength: float = 1.0) -> SamplerState:
        """The state before the first step.

        Args:
            steps: steps that will be taken.
            strength: share of the noise schedule that they cover, from its end; in (0, 1]. The whole schedule
                then has round(steps / strength) steps, of which the last `steps` are run (SDEdit,
                arXiv:2108.01073).

        Raises:
            UsageError: no steps, or a strength outside (0, 1].
        """
        if steps < 1:
            raise UsageError(f"num_inference_steps = {steps}: use at least 1", field="num_inference_steps")
        if not 0 < strength <= 1:
            raise UsageError(f"strength = {strength}: must be in (0, 1]", field="cascade")
        whole = max(steps, round(steps / strength))
        scheduler = self._scheduler(whole)
        return {
            "sampler": self.name,
            "schedule": whole,
            "index": whole - steps,
            "timesteps": scheduler.timesteps.clone(),
            "sigmas": scheduler.sigmas.clone(),
            "history": {},
        }

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
            latent: [B, C, T, H, W] float32.

        Returns:
            the next latent, float32, and the next state.

        Raises:
            UsageError: a state of another solver, or one with no step left.
        """
        if state["sampler"] != self.name:
            raise UsageError(
                f"this latent was begun with sampler '{state['sampler']}', not '{self.name}'",
                field="infer.sampler",
            )
        if self.is_done(state):
            raise UsageError(f"all {state['schedule']} steps are taken", field="num_inference_steps")
        solve = self._solved if latent.device.type == "cpu" else self._weighed
        moved, history = solve(state, velocity.float(), latent.float())
        return moved, {**state, "index": state["index"] + 1, "history": history}

    def _solved(self, state: SamplerState, velocity: Tensor, latent: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """The library's own step: the next latent, and what the solver remembers then."""
        scheduler = self._scheduler(state["schedule"])
        scheduler.set_begin_index(state["index"])
        for name, value in state["history"].items():
            setattr(scheduler, name, list(value) if isinstance(value, list) else value)
        # the solver's own arithmetic stays in float32 whatever autocast is on around the network
        with torch.autocast(device_type=latent.device.type, enabled=False):
            moved = scheduler.step(velocity, self.timestep(state), latent, return_dict=False)[0]
        return moved, {name: getattr(scheduler, name) for name in self._solver.history}

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

    def response(self, state: SamplerState) -> tuple[float, ...]:
        """d(last latent) / d(velocity) of each step that is left: a solver is linear in its velocities."""
        timesteps = state["timesteps"][state["index"] :]
        scheduler = self._scheduler(state["schedule"])
        scheduler.set_begin_index(state["index"])
        latent = torch.zeros(1, len(timesteps), 1, 1, 1)
        for step, timestep in enumerate(timesteps):
            # one channel for each step: its velocity is 1 at that step and 0 at the others
            velocity = torch.zeros_like(latent)
            velocity[:, step] = 1
            latent = scheduler.step(velocity, timestep, latent, return_dict=False)[0]
        return tuple(latent.flatten().tolist())

    def renoise(self, state: SamplerState, latent: Tensor, noise: Tensor) -> Tensor:
        """Bring a clean latent [B, C, T, H, W] to the noise level of the coming step: float32."""
        sigma = self.sigma(state)
        return (1.0 - sigma) * latent.float() + sigma * noise.to(latent.device, torch.float32)

    def _scheduler(self, steps: int) -> Any:
        import diffusers

        scheduler = getattr(diffusers, self._solver.class_name).from_config(self._settings)
        if self.name == "euler" and not self._own:
            # the flow schedule that the multistep solvers use, so that all solvers pass through the same
            # noise levels; left to itself this class would apply the shift a second time at the low end
            sigmas = np.linspace(1, 1 / self.train_timesteps, steps + 1)[:-1]
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
