"""What is known of a task's steps before the first one: the ground on which plans are made.

Knows noise levels, timesteps, experts and what was measured on a model; no tensors that belong to a task, no
strategy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from chitu_diffusion.flexcache.calibration import Calibration

Measured = Mapping[str, tuple[float, ...]]
"""What was measured on a model, by name: "teacache" and "teacache_time" (polynomials, highest power first),
"magcache" (one ratio a step of the run on which they were measured)."""

NOTHING_MEASURED: Measured = MappingProxyType({})


@dataclass(frozen=True)
class Schedule:
    """A task's steps.

    Attributes:
        timesteps: what the network is told at each step.
        sigmas: noise levels, one more than steps.
        experts: which expert runs each step.
        embed_time: step -> (time embedding [dim], its projection [6 * dim]) of that step, or None where no
            network is at hand.
        measured: on this model.
        model: its name, for messages.
        guidance: scale at each step; at most 1 runs the prompt's branch alone. Empty is 1 throughout.
        sampler: its name.
        response: gives d(last latent) / d(velocity) of each step, the sampler's own weights; None where no
            sampler is at hand.
        calibration: full-compute runs of this model (`chitu calibrate`), or None.
        identity: gives what tells the model from others, by name, as in a calibration's `about`; None where
            something is not known, or not yet.
    """

    timesteps: tuple[float, ...]
    sigmas: tuple[float, ...]
    experts: tuple[int, ...]
    embed_time: Callable[[int], tuple[Tensor, Tensor]] | None = None
    measured: Measured = field(default_factory=lambda: NOTHING_MEASURED)
    model: str = "this model"
    guidance: tuple[float, ...] = ()
    sampler: str = ""
    response: Callable[[], tuple[float, ...]] | None = None
    calibration: Calibration | None = None
    identity: Callable[[], Mapping[str, Any]] = dict

    @classmethod
    def bare(cls, num_steps: int) -> Schedule:
        """Evenly spaced steps of one expert: where nothing but their number is known."""
        sigmas = tuple(1 - step / num_steps for step in range(num_steps + 1))
        return cls(tuple(1000 * sigma for sigma in sigmas[:-1]), sigmas, (0,) * num_steps)

    @property
    def num_steps(self) -> int:
        """How many there are."""
        return len(self.timesteps)

    def switches(self) -> list[int]:
        """Steps at which another expert takes over."""
        return [step for step in range(1, self.num_steps) if self.experts[step] != self.experts[step - 1]]


@dataclass(frozen=True)
class Shapes:
    """What a cache's memory is computed from.

    Attributes:
        tokens: of one video in the network.
        dim: width of the stream.
        layers: blocks of the network.
        item: bytes of a number in the stream.
        latent: numbers in one latent.
        branches: of guidance, 1 or 2.
    """

    tokens: int
    dim: int
    layers: int
    item: int
    latent: int
    branches: int

    @property
    def stream(self) -> int:
        """Bytes of one state of the stream, all branches."""
        return self.tokens * self.dim * self.item * self.branches

    @property
    def velocity(self) -> int:
        """Bytes of one step's velocities, all branches."""
        return self.latent * self.item * self.branches
