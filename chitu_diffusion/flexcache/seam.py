"""The one seam through which every cache meets a network.

A network names the places where work could be saved (a `Site`) and asks the cache it was handed; the cache either calls
`compute` or answers from what it holds. This file knows tensors and sites. It does not know which step, guidance branch
or task is running (whoever runs the loop tells that to the cache before the forward), and it holds no strategy.

What is asked at each level, and what the answer means:

    step        once a forward, around the whole block stack; answer: the tokens that leave the last block
    block       around each block; answer: the tokens that leave that block
    attention   a block's self-attention; answer: the module's output before its gate
    cross       a block's cross-attention; answer: the module's output
    ffn         a block's feed-forward; answer: the module's output before its gate

`step` and `block` answers are whole states, not residuals, so that "compute" hands back the very bits that an uncached
forward gives; a strategy that stores residuals subtracts `signal.entering` itself. Skipping a run of blocks a..b needs
nothing more: answer `signal.entering` at a..b-1 and the state (or `entering` + stored residual) at b.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

Level = Literal["step", "block", "attention", "cross", "ffn"]

MODULE_LEVELS: frozenset[Level] = frozenset({"attention", "cross", "ffn"})


@dataclass(frozen=True, slots=True)
class Site:
    """A named place in a network where a cache may answer instead of the computation.

    Attributes:
        level: how much work the site covers.
        block: index of the block it lies in; 0 at step level.
        depth: how many blocks the network has, so that a strategy can speak of "the last block" without asking.
    """

    level: Level
    block: int
    depth: int


@dataclass(frozen=True, slots=True)
class Signal:
    """What a strategy may look at when it decides. Nothing here is a copy: do not write into it.

    Attributes:
        entering: tokens that enter the site, [B, S, dim], the residual stream's dtype.
        time: the projected time embedding of this forward, [B, 6, dim] (TeaCache's signal on Wan).
    """

    entering: Tensor
    time: Tensor


class StepCache(Protocol):
    """What a network needs of a cache. Strategies implement it in `chitu_diffusion.flexcache`."""

    @property
    def levels(self) -> frozenset[Level]:
        """The levels at which this cache wants to be asked during the coming forward.

        A network asks at these and nowhere else, so a cache that looks at steps alone leaves compiled blocks whole.
        """
        ...

    def at(self, site: Site, compute: Callable[[], Tensor], signal: Signal) -> Tensor:
        """Answers for `site`: calls `compute` (at most once) or gives a reused or predicted tensor of that shape."""
        ...


@dataclass(frozen=True, slots=True)
class NoCache:
    """The cache that never saves anything: it is asked nowhere, and computes when asked all the same."""

    levels: frozenset[Level] = frozenset()

    def at(self, site: Site, compute: Callable[[], Tensor], signal: Signal) -> Tensor:
        """Computes."""
        return compute()


NO_CACHE = NoCache()
