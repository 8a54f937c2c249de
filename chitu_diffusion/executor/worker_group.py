"""The ranks of a run together: where they meet, their groups, their signs of life, their orders.

torchrun's own rendezvous brings them together, on one node or many. Knows processes; no network, no task.
"""

from __future__ import annotations

import signal
import threading

import torch
import torch.distributed as dist

from chitu_diffusion.distributed.plan import ParallelPlan
from chitu_diffusion.distributed.process_groups import RankGroups
from chitu_diffusion.executor.control_channel import Orders
from chitu_diffusion.executor.heartbeat import Watch


class Crew:
    """This rank's place among the others.

    Args:
        plan: the layout.
        rank: ours.
        store: where all meet; None takes torchrun's.
        device: of the networks.
        timeout: seconds without progress after which an exchange is given up.
        lost_after: seconds of silence after which a rank is lost.
        copies: see `RankGroups`.

    Raises:
        RankLostError: another rank was lost meanwhile.
        RuntimeError: the others did not come.
    """

    def __init__(
        self,
        plan: ParallelPlan,
        rank: int,
        store: dist.Store | None = None,
        *,
        device: torch.device,
        timeout: float = 60.0,
        lost_after: float = 8.0,
        copies: bool = True,
    ) -> None:
        self.rank, self.size, self.timeout = rank, plan.world, timeout
        meeting = dist.PrefixStore(
            "chitu", store if store is not None else next(iter(dist.rendezvous("env://")))[0]
        )
        self.groups = RankGroups(plan, rank, device, meeting, timeout, copies=copies)
        self.watch = Watch(
            rank,
            plan.world,
            meeting,
            lost_after=lost_after,
            timeout=timeout,
            interrupt=self.groups.interrupt,
            waiting=self.groups.waiting,
            launched=store is None and dist.is_torchelastic_launched(),
        )
        self.orders = Orders(meeting, self.watch)
        self._ends_on_term = threading.current_thread() is threading.main_thread() and (
            signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        )
        if self._ends_on_term:
            signal.signal(signal.SIGTERM, self.watch.terminated)
        try:
            with self.watch.busy("meeting the other ranks"):
                self.groups.open()
        except BaseException as error:
            self.watch.leave(f"{type(error).__name__}: {error}")
            self.watch.check()
            raise
        self.watch.at("starting")

    def fall(self) -> None:
        """Give up the exchanges that are under way, and wake whoever waits in them. The groups can be opened
        again.
        """
        self.watch.fell(self.groups.generation)
        self.groups.abandon()

    def leave(self, why: str | None = None) -> None:
        """Go; with a reason, the others learn that the group is at its end."""
        self.watch.leave(why)
        ends = why is None and self.watch.lost is None
        # otherwise this rank has something to tell, and goes when it has
        if self._ends_on_term and ends and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        # in peace all come; alone, a rank would wait for the others' goodbye
        self.groups.abandon() if self.watch.lost is not None or why is not None else self.groups.close()
