"""The one interface through which every cache meets a forward.

A network names the places where work could be saved (a `Site`) and asks the cache it was handed; the cache
either calls `compute` or answers from what it holds. The loop around the network names one place more, the
whole velocity of a step. This file knows tensors, sites and moments; it holds no strategy and no task.

What is asked at each level, and what the answer means:

    velocity    once a step, by the loop, around the forwards of all guidance branches; answer: their stacked
                velocities
    step        once a forward, around the whole block stack; answer: the tokens that leave the last block
    block       around each block; answer: the tokens that leave that block
    attention   a block's self-attention; answer: the module's output before its gate
    cross       a block's cross-attention; answer: the module's output
    ffn         a block's feed-forward; answer: the module's output before its gate

`step` and `block` answers are whole states, not residuals, so that "compute" hands back the very bits that an
uncached forward gives; a strategy that stores residuals subtracts `inputs.entering` itself. Skipping a run of
blocks a..b needs nothing more: answer `inputs.entering` at a..b-1 and the state (or `entering` + stored
residual) at b.

What a strategy answers is an `Action`. Those that follow from the schedule alone are written
before step 0 (a plan), and cost nothing at run time; "ask" marks a step whose action depends on data. Such a
decision is one number, taken from the prompt's branch, and goes through one function (`AllReduceMax`), so
that every rank and every branch follows the same answer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    from torch import Tensor

Level = Literal["velocity", "step", "block", "attention", "cross", "ffn"]
Action = Literal["compute", "reuse", "predict", "ask"]

MODULE_LEVELS: frozenset[Level] = frozenset({"attention", "cross", "ffn"})

Compute = Callable[[], "Tensor"]
"""What a site would compute."""
ComputeBranches = Callable[[tuple[int, ...]], "Tensor"]
"""Runs the forwards of some guidance branches; their velocities [branches * B, C, T, H, W] in the order
asked.
"""
AllReduceMax = Callable[[float | None], float]
"""One number that a decision rests on, made common to all ranks: the largest of theirs. A rank that does not
run the prompt's branch has none to give (None) and takes the others'."""


def single_rank_max(value: float | None) -> float:
    """`AllReduceMax` where one process runs everything.

    Raises:
        ValueError: nobody gave a number.
    """
    if value is None:
        raise ValueError("no rank runs the prompt's branch, from which the cache decides")
    return value


@dataclass(frozen=True, slots=True)
class StepInfo:
    """Where a forward stands in its task.

    Attributes:
        step, num_steps: counted from 0.
        timestep: what the network is told, 1000 to 0.
        sigma, next_sigma: noise level now and after this step, 1 to 0.
        branches: the guidance branches stacked along this forward's batch, in order; 0 is the prompt's.
    """

    step: int
    num_steps: int
    timestep: float
    sigma: float
    next_sigma: float
    branches: tuple[int, ...]

    def of_prompt(self, stacked: Tensor) -> Tensor | None:
        """The rows of `stacked` [branches * B, ...] of the prompt's branch; None if it is not among them."""
        if 0 not in self.branches:
            return None
        return stacked.chunk(len(self.branches))[self.branches.index(0)]


@dataclass(frozen=True, slots=True)
class Site:
    """A named place in a network where a cache may answer instead of the computation.

    Attributes:
        level: how much work the site covers.
        block: index of the block it lies in; 0 at step level.
        depth: how many blocks the network has, so that a strategy can speak of "the last block" without
            asking.
    """

    level: Level
    block: int
    depth: int


@dataclass(frozen=True, slots=True)
class SiteInputs:
    """What a strategy may look at when it decides. Nothing here is a copy: do not write into it.

    Attributes:
        entering: tokens that enter the site, [B, S, dim], the residual stream's dtype; at level "velocity"
            the latent [B, C, T, H, W], which all branches share.
        time: the projected time embedding of this forward, [B, 6, dim] (TeaCache's signal on Wan), [1, 6,
            dim] where it is common to the batch; that of the unknown frames where the first is known; None at
            level "velocity".
    """

    entering: Tensor
    time: Tensor | None = None


class StepCache(Protocol):
    """What a network needs of a cache. Strategies implement it in `chitu_diffusion.flexcache`."""

    @property
    def levels(self) -> frozenset[Level]:
        """The levels at which this cache wants to be asked during the coming forward.

        A network asks at these and nowhere else, so a cache that looks at steps alone leaves
        compiled blocks whole.
        """
        ...

    def at(self, site: Site, compute: Compute, inputs: SiteInputs) -> Tensor:
        """Answers for `site`: calls `compute` (at most once) or gives a tensor of that shape in its place."""
        ...


@dataclass(frozen=True, slots=True)
class NoCache:
    """The cache that never saves anything: it is asked nowhere, and computes when asked all the same."""

    levels: frozenset[Level] = frozenset()

    def at(self, site: Site, compute: Compute, inputs: SiteInputs) -> Tensor:
        """Computes."""
        return compute()


NO_CACHE = NoCache()
