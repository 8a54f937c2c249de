"""Whose step is next: policies as lists of ids."""

from collections import Counter

import pytest

from chitu_diffusion.errors import UsageError
from chitu_diffusion.scheduler import DiffusionScheduler
from chitu_diffusion.task import DiffusionTask, DiffusionTaskPool, DiffusionUserParams, TaskStatus


def pool_of(*tasks: tuple[str, str, int]) -> DiffusionTaskPool:
    pool = DiffusionTaskPool()
    for task_id, role, priority in tasks:
        params = DiffusionUserParams(prompt="a cat", role=role, priority=priority, task_id=task_id)
        pool.add(DiffusionTask.from_user_request(params))
    return pool


def turns(scheduler: DiffusionScheduler, pool: DiffusionTaskPool, steps_each: int) -> list[str]:
    left = Counter({task.task_id: steps_each for task in pool})
    order = []
    while (task_id := scheduler.schedule(pool)) is not None:
        order.append(task_id)
        left[task_id] -= 1
        if not left[task_id]:
            pool.pool[task_id].end(TaskStatus.FINISHED)
    return order


def test_fifo_runs_the_oldest_to_its_end():
    pool = pool_of(("a", "x", 0), ("b", "y", 9), ("c", "x", 0))
    assert turns(DiffusionScheduler(), pool, 2) == ["a", "a", "b", "b", "c", "c"]


def test_priority_and_preemption():
    pool = pool_of(("a", "x", 0), ("b", "y", 5), ("c", "x", 5))
    scheduler = DiffusionScheduler("priority")
    assert scheduler.schedule(pool) == "b"
    pool.add(DiffusionTask.from_user_request(DiffusionUserParams(prompt="now", priority=7, task_id="d")))
    assert turns(scheduler, pool, 2) == ["d", "d", "b", "b", "c", "c", "a", "a"]


def test_fair_shares_steps_over_roles_not_tasks():
    pool = pool_of(("a1", "a", 0), ("a2", "a", 0), ("a3", "a", 0), ("b1", "b", 0))
    order = turns(DiffusionScheduler("fair"), pool, 3)
    assert order[:6] == ["a1", "b1", "a1", "b1", "a1", "b1"]
    assert order[6:] == ["a2"] * 3 + ["a3"] * 3


def test_fair_lets_a_newcomer_in_at_once():
    pool = pool_of(("a", "a", 0), ("b", "b", 0))
    scheduler = DiffusionScheduler("fair")
    assert [scheduler.schedule(pool) for _ in range(3)] == ["a", "b", "a"]
    pool.add(DiffusionTask.from_user_request(DiffusionUserParams(prompt="hi", role="c", task_id="c")))
    assert [scheduler.schedule(pool) for _ in range(4)] == ["c", "b", "a", "c"]


def test_pending_count_and_empty_pool():
    scheduler = DiffusionScheduler("fair")
    assert scheduler.schedule(DiffusionTaskPool()) is None
    pool = pool_of(("a", "a", 0), ("b", "b", 0))
    pool.pool["a"].status = TaskStatus.DENOISING
    assert scheduler.get_pending_count(pool) == 1


def test_unknown_policy_names_the_nearest():
    with pytest.raises(UsageError, match="Did you mean 'fair'"):
        DiffusionScheduler("fare")


def test_a_subclass_may_choose():
    class Shortest(DiffusionScheduler):
        def schedule(self, pool):
            waiting = pool.unfinished()
            return min(waiting, key=lambda task: task.params.num_frames or 81).task_id if waiting else None

    pool = DiffusionTaskPool()
    for task_id, frames in (("long", 81), ("short", 5)):
        pool.add(
            DiffusionTask.from_user_request(
                DiffusionUserParams(prompt="a", num_frames=frames, task_id=task_id)
            )
        )
    assert turns(Shortest(), pool, 1) == ["short", "long"]
