"""The arithmetic of layouts: what fits, what is refused and with which advice, and who talks to whom."""

from __future__ import annotations

import pytest

from chitu_diffusion.distributed.plan import ParallelPlan, auto_plan, parse_layout, plan_for, shard_lengths
from chitu_diffusion.errors import UsageError


@pytest.mark.parametrize(
    ("world", "heads", "node", "plan"),
    [
        (1, 12, None, (1, 1, 1)),
        (2, 12, None, (2, 1, 1)),
        (3, 12, None, (1, 3, 1)),
        (4, 12, None, (2, 2, 1)),
        (5, 12, None, (1, 1, 5)),
        (8, 12, None, (2, 4, 1)),
        (8, 40, None, (2, 4, 1)),
        (16, 12, 8, (2, 4, 2)),
        (16, 40, 8, (2, 8, 1)),
        (32, 40, 4, (2, 4, 4)),
    ],
)
def test_auto_takes_cfg_then_ulysses_within_the_node_then_ring(world, heads, node, plan) -> None:
    assert auto_plan(world, heads, node) == ParallelPlan(*plan)
    assert ParallelPlan(*plan).world == world


@pytest.mark.parametrize(
    ("asked", "advice"),
    [
        ({"world": 8, "heads": 12, "cp": 8, "ulysses": 8}, "use ulysses 4 x ring 2"),
        ({"world": 4, "heads": 12, "cfg": 2, "cp": 4}, "use cfg 2 x ulysses 2 x ring 1"),
        ({"world": 1, "heads": 12, "cfg": 2}, "start 2 with --gpus or torchrun"),
        ({"world": 6, "heads": 12, "cp": 6, "ulysses": 4}, "use ulysses 2 x ring 3"),
    ],
)
def test_what_cannot_be_is_refused_with_what_would_fit(asked, advice) -> None:
    with pytest.raises(UsageError, match=advice):
        plan_for(**asked)


def test_explicit_settings_are_followed() -> None:
    assert plan_for(8, 12, cfg=2, cp=4) == ParallelPlan(2, 4, 1)
    assert plan_for(8, 12, cp=8) == ParallelPlan(1, 4, 2)
    assert plan_for(4, 12, **parse_layout("u2r2")) == ParallelPlan(1, 2, 2)
    assert plan_for(2, 12, **parse_layout("u2")) == ParallelPlan(1, 2, 1)
    assert plan_for(2, 12, **parse_layout("auto")) == ParallelPlan(2, 1, 1)
    for word in ("", "u", "r2u2", "cfg2x"):
        with pytest.raises(UsageError, match="cfg2u2r2"):
            parse_layout(word)


def test_groups_of_a_layout() -> None:
    plan = ParallelPlan(2, 2, 2)
    assert plan.branch_groups() == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert plan.sequence_groups() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert plan.ulysses_groups() == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert plan.ring_groups() == [[0, 2], [1, 3], [4, 6], [5, 7]]


def test_shards_are_even_and_whole() -> None:
    assert shard_lengths(27, 4) == (7, 7, 7, 6)
    assert shard_lengths(32, 4) == (8, 8, 8, 8)
    assert shard_lengths(2, 4) == (1, 1, 0, 0)
