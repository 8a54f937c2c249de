"""Whose step is next. Knows tasks by their role, priority and order of arrival; no tensors, no networks.

The engine asks before every step, so that tasks can take turns at any of their steps. A policy of one's own
is a subclass that overrides `schedule`; hand an instance of it to `Engine(args, scheduler=...)`.
"""

from __future__ import annotations

from collections.abc import Callable

from chitu_diffusion.errors import UsageError, nearest
from chitu_diffusion.task import DiffusionTask, DiffusionTaskPool


class DiffusionScheduler:
    """Names the task that goes on.

    Args:
        policy: "fifo" runs the oldest task to its end; "priority" the one of the largest priority (the oldest
            of these), at once when a more urgent one arrives; "fair" gives each role one step in turn, within
            a role the oldest task.

    Raises:
        UsageError: an unknown policy.
    """

    def __init__(self, policy: str = "fifo") -> None:
        policies: dict[str, Callable[[list[DiffusionTask]], DiffusionTask]] = {
            "fifo": self._oldest,
            "priority": self._most_urgent,
            "fair": self._next_role,
        }
        if policy not in policies:
            raise UsageError(
                f"scheduler policy = {policy!r}.{nearest(policy, policies)}", field="scheduler.policy"
            )
        self.policy = policy
        self._choose = policies[policy]
        self._turn = 0
        self._served: dict[str, int] = {}  # role -> the turn in which it last went

    def schedule(self, pool: DiffusionTaskPool) -> str | None:
        """The id of the task whose step is next; None when no task has work left."""
        waiting = pool.unfinished()
        return self._choose(waiting).task_id if waiting else None

    def get_pending_count(self, pool: DiffusionTaskPool) -> int:
        """How many tasks have not begun."""
        return len(pool.get_pending_tasks())

    def _oldest(self, waiting: list[DiffusionTask]) -> DiffusionTask:
        return waiting[0]

    def _most_urgent(self, waiting: list[DiffusionTask]) -> DiffusionTask:
        # max() keeps the first of equals, and the pool is in order of arrival
        return max(waiting, key=lambda task: task.params.priority)

    def _next_role(self, waiting: list[DiffusionTask]) -> DiffusionTask:
        oldest: dict[str, DiffusionTask] = {}
        for task in waiting:
            oldest.setdefault(task.params.role, task)
        # roles without work are forgotten, so that this dict stays as small as the queue
        self._served = {role: turn for role, turn in self._served.items() if role in oldest}
        role = min(oldest, key=lambda name: self._served.get(name, -1))
        self._turn += 1
        self._served[role] = self._turn
        return oldest[role]
