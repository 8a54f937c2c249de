"""Explicit schedules: the noise levels that step-distilled weights are sampled on, one by one.

Imports no torch, so that a model's folder and a request can be checked before anything is loaded. Knows
numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from chitu_diffusion.errors import UsageError
from chitu_diffusion.sampling.registry import SOLVERS

TRAINED_STEPS = 1000
"""The network's timestep at noise level 1."""


@dataclass(frozen=True)
class NoiseLevels:
    """One entry a step.

    Attributes:
        sigmas: noise before the step, falling, above 0 and at most 1; after the last step it is 0.
        timesteps: what the network is told.
    """

    sigmas: tuple[float, ...]
    timesteps: tuple[float, ...]

    @classmethod
    def listed(
        cls, sigmas: Sequence[float] | None, timesteps: Sequence[float] | None, shift: float
    ) -> NoiseLevels | None:
        """What a model says of its steps; None where it says nothing.

        Args:
            sigmas: noise levels. The network is told `timesteps`, or 1000 sigma where these are None.
            timesteps: without sigmas, places on the grid of 1000 steps before its shift: at shift 5, 750 is
                noise level 0.9375, and the network is told 937.5.
            shift: of that grid; not of sigmas, which are taken as they stand.
        """
        if sigmas is None and timesteps is None:
            return None
        if sigmas is None:
            sigmas = [shifted(step / TRAINED_STEPS, shift) for step in timesteps or ()]
            timesteps = None
        told = timesteps or [TRAINED_STEPS * sigma for sigma in sigmas]
        return cls(tuple(map(float, sigmas)), tuple(map(float, told)))

    @classmethod
    def even(cls, steps: int, shift: float) -> NoiseLevels:
        """Steps that are even before the shift, from noise level 1 on."""
        sigmas = tuple(shifted((steps - step) / steps, shift) for step in range(steps))
        return cls(sigmas, tuple(TRAINED_STEPS * sigma for sigma in sigmas))

    def time_after(self, share: float) -> float:
        """The timestep at and below which this share of the steps, or a little more, is taken."""
        taken = math.ceil(share * len(self.timesteps))
        return self.timesteps[taken] if taken < len(self.timesteps) else 0.0

    def require_steps(self, steps: int, strength: float, owner: str = "this model") -> None:
        """Checks that some steps, and the share of the schedule that they cover, fit the list.

        Args:
            owner: whose list it is, for the error.

        Raises:
            UsageError: they do not; says what does.
        """
        count = len(self.sigmas)
        whole = whole_steps(steps, strength)
        if whole == count:
            return
        if strength == 1:
            free = " or ".join(name for name, kind in SOLVERS.items() if not kind.takes_list)
            raise UsageError(
                f"num_inference_steps = {steps}: {owner} is sampled on a list of {count} noise levels; "
                f"use {count}, or infer.sampler = {free}, which take any number",
                field="num_inference_steps",
            )
        end = min(max(1, round(count * strength)), count)
        raise UsageError(
            f"cascade: {steps} steps at strength {strength:g} are the end of {whole}, and {owner} is "
            f"sampled on a list of {count} noise levels; use {end} steps at strength {end / count:g}",
            field="cascade",
        )


def levels_as_lists(levels: NoiseLevels | None) -> dict[str, Any]:
    """For a recipe: sigmas and timesteps as lists; both None for a solver's own schedule."""
    return {
        "sigmas": None if levels is None else list(levels.sigmas),
        "timesteps": None if levels is None else list(levels.timesteps),
    }


def whole_steps(steps: int, strength: float) -> int:
    """Steps of the whole schedule of which `steps` cover the last share `strength` (SDEdit,
    arXiv:2108.01073).
    """
    return max(steps, round(steps / strength))


def is_falling(values: Any, most: float) -> bool:
    """Whether a value is a list of numbers above 0, from `most` or less downward."""
    if not isinstance(values, list | tuple) or not values:
        return False
    if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        return False
    after = (*values[1:], 0)
    return values[0] <= most and all(a > b for a, b in zip(values, after, strict=True))


def shifted(share: float, shift: float) -> float:
    return shift * share / (1 + (shift - 1) * share)
