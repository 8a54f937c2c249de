"""Messages from rank 0 to all, and reports of all to all: small JSON values in the store where the ranks
meet.

Nobody waits in an exchange for work to come, so ranks without work idle for as long as they like. Knows a
store and a monitor; not what the messages mean.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from chitu_diffusion.executor.heartbeat import HeartbeatMonitor
from chitu_diffusion.executor.messages import without_controls

Values = dict[str, Any]
_SHORTEST = 0.0002
_LONGEST = 0.05
"""Seconds between two looks into the store: quick at first, then at the cost of an idle process."""


class ControlChannel:
    """The channel from rank 0 to all, and the round in which all report to all.

    Args:
        store: where the ranks meet.
        monitor: says when waiting is in vain.
    """

    def __init__(self, store: dist.Store, monitor: HeartbeatMonitor) -> None:
        self._store = store
        self._monitor = monitor
        self._rank = monitor.rank
        self._size = monitor.size
        self._message = 0
        self._round = 0
        self._kept = 0

    def publish(self, message: Values) -> None:
        """Rank 0: the next message for all others."""
        self._ask(self._store.set, f"message/{self._message}", json.dumps(message, default=str))
        self._message += 1

    def receive(self, patience: float | None = None) -> Values | None:
        """The others: the next message, the same until it is acknowledged; None if none came within
        `patience` seconds. None waits for as long as it takes.

        Raises:
            RankLostError: a rank is lost.
        """
        key = f"message/{self._message}"
        if not self._wait([key], patience):
            return None
        message: Values = json.loads(self._ask(self._store.get, key))
        return message

    def acknowledge(self) -> None:
        """The others: the message that was received is done with, and the next one may come."""
        self._message += 1

    def gather_status(self, kind: str, mine: Values, patience: float | None = None) -> list[Values]:
        """Everyone's report of the same round, by rank.

        Args:
            kind: what is reported of; a rank that reports of something else is lost, too.
            mine: ours.
            patience: seconds after which a rank that gives signs of life but no report is lost, too; None
                waits on.

        Raises:
            RankLostError: a rank is lost.
        """
        now = self._round
        self._round += 1
        self._ask(self._store.set, f"status/{now}/{self._rank}", json.dumps([kind, mine], default=str))
        keys = [f"status/{now}/{rank}" for rank in range(self._size)]
        if not self._wait(keys, patience):
            silent = next(rank for rank, key in enumerate(keys) if not self._store.check([key]))
            self._monitor.mark_failed(silent, f"the others have waited {patience:g} s for it")
            self._monitor.raise_if_lost()
        found = [without_controls(json.loads(self._ask(self._store.get, key))) for key in keys]
        for rank, (other, _) in enumerate(found):
            if other != kind:
                self._monitor.mark_failed(
                    rank, f"it reported of '{other}', and rank {self._rank} of '{kind}'"
                )
                self._monitor.raise_if_lost()
        self._forget(now)
        return [report for _, report in found]

    def leave(self, kind: str) -> None:
        """Report for the last time, and do not wait for the others."""
        self._ask(self._store.set, f"status/{self._round}/{self._rank}", json.dumps([kind, {}]))

    def _wait(self, keys: list[str], patience: float | None) -> bool:
        began = time.monotonic()
        pause = _SHORTEST
        # one by one: a stranger may write over one while we wait for another
        while keys := [key for key in keys if not self._ask(self._store.check, [key])]:
            self._monitor.raise_if_lost()
            if patience is not None and time.monotonic() - began >= patience:
                return False
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST)
        return True

    def _ask(self, call: Callable[..., Any], *given: Any) -> Any:
        try:
            return call(*given)
        except RuntimeError as error:
            self._monitor.mark_store_lost(f"its store is gone ({str(error).splitlines()[0]})")
            self._monitor.raise_if_lost()
            raise

    def _forget(self, now: int) -> None:
        # whoever reports has read every report before, and rank 0's messages up to this round
        if now > 0:
            self._ask(self._store.delete_key, f"status/{now - 1}/{self._rank}")
        if self._rank == 0:
            for message in range(self._kept, self._message):
                self._ask(self._store.delete_key, f"message/{message}")
            self._kept = self._message
