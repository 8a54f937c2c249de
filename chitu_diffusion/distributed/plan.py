"""How many ranks share what: cfg x ulysses x ring = world. Arithmetic only; no torch, no process.

Classifier-free guidance splits first, because two branches are halves without any exchange inside the
network. Ulysses (arXiv:2309.14509) trades heads for tokens and must divide the heads; ring attention
(arXiv:2310.01889) takes the rest. Their composition is that of USP (arXiv:2405.07719): Ulysses inside, on
neighbouring ranks, the ring outside.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from chitu_diffusion.errors import UsageError

_LAYOUT = re.compile(r"(?:cfg(?P<cfg>\d+))?(?:u(?P<ulysses>\d+))?(?:r(?P<ring>\d+))?")


@dataclass(frozen=True)
class ParallelPlan:
    """A layout of ranks. Rank = (cfg index * ring + ring index) * ulysses + ulysses index.

    Attributes:
        cfg: ranks that share the guidance branches, 1 or 2.
        ulysses: ranks that trade heads for tokens.
        ring: ranks that pass keys and values on.
    """

    cfg: int = 1
    ulysses: int = 1
    ring: int = 1

    @property
    def sequence(self) -> int:
        """Ranks that share one sequence."""
        return self.ulysses * self.ring

    @property
    def world(self) -> int:
        """All ranks."""
        return self.cfg * self.sequence

    def branch_groups(self) -> list[list[int]]:
        """Ranks that hold the same tokens of different branches."""
        return [
            [index + branch * self.sequence for branch in range(self.cfg)] for index in range(self.sequence)
        ]

    def sequence_groups(self) -> list[list[int]]:
        """Ranks that share one branch's sequence, in the order of their tokens."""
        return [
            [branch * self.sequence + index for index in range(self.sequence)] for branch in range(self.cfg)
        ]

    def ulysses_groups(self) -> list[list[int]]:
        """Neighbours that trade heads for tokens."""
        return [
            [first + index for index in range(self.ulysses)] for first in range(0, self.world, self.ulysses)
        ]

    def ring_groups(self) -> list[list[int]]:
        """Ranks with the same heads and different tokens."""
        return [
            [ranks[0] + index + hop * self.ulysses for hop in range(self.ring)]
            for ranks in self.sequence_groups()
            for index in range(self.ulysses)
        ]

    def __str__(self) -> str:
        return f"cfg {self.cfg} x ulysses {self.ulysses} x ring {self.ring}"


def plan_for(
    world: int,
    heads: int,
    *,
    cfg: int = 1,
    cp: int = 1,
    ulysses: int | None = None,
    ranks_per_node: int | None = None,
) -> ParallelPlan:
    """The layout for a number of ranks.

    Args:
        world: ranks that were started.
        heads: of the network's self-attention.
        cfg: ranks that share the guidance branches.
        cp: ranks that share one sequence. cfg and cp both 1 leave the layout to `auto_plan`.
        ulysses: degree inside cp; None takes the largest that heads and node allow.
        ranks_per_node: None for one node.

    Raises:
        UsageError: a layout that cannot be; names one that would fit.
    """
    if cfg == cp == 1 and ulysses is None:
        return auto_plan(world, heads, ranks_per_node)
    if cfg not in (1, 2):
        raise UsageError(
            f"cfg_size = {cfg}: there are two guidance branches; use 1 or 2", field="infer.diffusion.cfg_size"
        )
    if cfg * cp != world:
        raise UsageError(
            f"cfg_size {cfg} x cp_size {cp} = {cfg * cp}, but {world} rank(s) were started; use "
            f"{auto_plan(world, heads, ranks_per_node)}, or start {cfg * cp} with --gpus or torchrun",
            field="infer.diffusion.cp_size",
        )
    chosen = math.gcd(cp, heads, ranks_per_node or world) if ulysses is None else ulysses
    if cp % chosen or heads % chosen:
        fitting = math.gcd(chosen, cp, heads)
        raise UsageError(
            f"ulysses_degree = {chosen} with {heads} heads and cp_size {cp}: it must divide both; use "
            f"ulysses {fitting} x ring {cp // fitting}",
            field="infer.diffusion.ulysses_degree",
        )
    return ParallelPlan(cfg, chosen, cp // chosen)


def auto_plan(world: int, heads: int, ranks_per_node: int | None = None) -> ParallelPlan:
    """CFG first, for it halves exactly; then Ulysses in a node, up to a divisor of the heads; then ring."""
    cfg = 2 if world % 2 == 0 else 1
    ulysses = math.gcd(world // cfg, heads, ranks_per_node or world)
    return ParallelPlan(cfg, ulysses, world // cfg // ulysses)


def parse_layout(text: str) -> dict[str, int | None]:
    """`auto`, or parts in this order: `cfg2u2r2`, `cfg2`, `u4`, `r2`; as keywords `cfg`, `cp`, `ulysses` of
    `plan_for`.

    Raises:
        UsageError: not such a word.
    """
    if text == "auto":
        return {"cfg": 1, "cp": 1, "ulysses": None}
    found = _LAYOUT.fullmatch(text.lower())
    if not text or found is None:
        raise UsageError(
            f"parallel = {text!r}: 'auto', or parts such as cfg2, u4, r2, cfg2u2r2", field="parallel"
        )
    cfg, ulysses, ring = (max(1, int(found[name] or 1)) for name in ("cfg", "ulysses", "ring"))
    return {"cfg": cfg, "cp": ulysses * ring, "ulysses": ulysses}


def shard_lengths(total: int, parts: int) -> tuple[int, ...]:
    """`total` things over `parts` ranks, as evenly as can be, the longer shards first: nothing is padded."""
    short, longer = divmod(total, parts)
    return tuple(short + (index < longer) for index in range(parts))
