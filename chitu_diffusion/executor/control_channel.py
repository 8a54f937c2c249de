"""What rank 0 says and how each rank did: small JSON words in the store where the ranks meet.

Nobody waits in an exchange for work to come, so ranks without work idle for as long as they like. Knows a
store and a watch; not what the words mean.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from chitu_diffusion.executor.heartbeat import Watch

Word = dict[str, Any]
_SHORTEST, _LONGEST = 0.0002, 0.05
"""Seconds between two looks into the store: quick at first, then at the cost of an idle process."""


class Orders:
    """Orders from rank 0 to all, and votes of all to all.

    Args:
        store: where the ranks meet.
        watch: says when waiting is in vain.
    """

    def __init__(self, store: dist.Store, watch: Watch) -> None:
        self._store, self._watch = store, watch
        self._rank, self._size = watch.rank, watch.size
        self._order = self._vote = self._kept = 0

    def say(self, order: Word) -> None:
        """Rank 0: the next order for all others."""
        self._ask(self._store.set, f"order/{self._order}", json.dumps(order, default=str))
        self._order += 1

    def hear(self, patience: float | None = None) -> Word | None:
        """The others: the next order; None if none came within `patience` seconds. None waits for as long as
        it takes.

        Raises:
            RankLostError: a rank is lost.
        """
        key = f"order/{self._order}"
        if not self._wait([key], patience):
            return None
        order: Word = json.loads(self._ask(self._store.get, key))
        # not before it is here: Ctrl+C may come in between, and the order must be heard then
        self._order += 1
        return order

    def vote(self, mine: Word, patience: float | None = None) -> list[Word]:
        """Everyone's word on the same question, by rank.

        Args:
            mine: ours.
            patience: seconds after which a rank that gives signs of life but no vote is lost, too; None waits
                on.

        Raises:
            RankLostError: a rank is lost.
        """
        now = self._vote
        self._vote += 1
        self._ask(self._store.set, f"vote/{now}/{self._rank}", json.dumps(mine, default=str))
        keys = [f"vote/{now}/{rank}" for rank in range(self._size)]
        if not self._wait(keys, patience):
            silent = next(rank for rank, key in enumerate(keys) if not self._store.check([key]))
            self._watch.accuse(silent, f"the others have waited {patience:g} s for it")
            self._watch.check()
        votes = [json.loads(self._ask(self._store.get, key)) for key in keys]
        self._forget(now)
        return votes

    def depart(self, mine: Word) -> None:
        """Vote for the last time, and do not wait for the others."""
        self._ask(self._store.set, f"vote/{self._vote}/{self._rank}", json.dumps(mine))

    def _wait(self, keys: list[str], patience: float | None) -> bool:
        began, pause = time.monotonic(), _SHORTEST
        while not self._ask(self._store.check, keys):
            self._watch.check()
            if patience is not None and time.monotonic() - began >= patience:
                return False
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST)
        return True

    def _ask(self, call: Callable[..., Any], *given: Any) -> Any:
        try:
            return call(*given)
        except RuntimeError as error:
            self._watch.lose_store(f"its store is gone ({str(error).splitlines()[0]})")
            self._watch.check()
            raise

    def _forget(self, now: int) -> None:
        # whoever votes has read every vote before, and rank 0's orders up to this question
        if now > 0:
            self._ask(self._store.delete_key, f"vote/{now - 1}/{self._rank}")
        if self._rank == 0:
            for order in range(self._kept, self._order):
                self._ask(self._store.delete_key, f"order/{order}")
            self._kept = self._order
