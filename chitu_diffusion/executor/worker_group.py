"""The ranks of a run together: where they meet, their process groups, heartbeats and control channel.

Knows processes, and how they are laid out; not how they meet (`meeting`), no network, no task.
"""

from __future__ import annotations

import itertools
import json
import signal
import threading
import time
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist

from chitu_diffusion.backend import pick_device
from chitu_diffusion.config import EngineConfig, RankPlace, rank_place, set_nccl_defaults
from chitu_diffusion.distributed.plan import ParallelPlan, plan_for
from chitu_diffusion.distributed.process_groups import ProcessGroups
from chitu_diffusion.errors import UsageError, require_kind
from chitu_diffusion.executor.control_channel import ControlChannel
from chitu_diffusion.executor.heartbeat import HeartbeatMonitor
from chitu_diffusion.executor.interrupts import as_ctrl_c
from chitu_diffusion.executor.meeting import check_secret, launchers_store, meet, ranks_secret
from chitu_diffusion.models.spec import ModelSpec

_GLANCE = 0.05
"""Seconds between two looks for ranks that have not come."""
_OWN_SETTINGS: Mapping[str, Any] = {
    "device": True,
    "threads": True,
    "diffusion": {"low_mem_level", "cache_memory_gb"},
}
"""Of `infer`: what each rank may have for itself, or takes from rank 0."""


def join_ranks(args: EngineConfig, spec: ModelSpec, place: RankPlace | None) -> WorkerGroup | None:
    """The ranks of a run, laid out as the settings say; None for a process that works by itself.

    Raises:
        UsageError: a layout that cannot be; names one that would fit. Several machines without a secret.
        RankLostError: another rank did not come.
    """
    if place is None or place.world == 1:
        return None
    if place.store is not None:
        require_kind("store", place.store, dist.Store, "torch.distributed.TCPStore(...)")
    elif rank_place() is None:
        raise UsageError(
            f"rank {place.rank} of {place.world} has no store to meet the others in; use RankPlace(rank, "
            "world, store=torch.distributed.TCPStore(...)), or start with torchrun",
            field="store",
        )
    secret = ranks_secret()
    check_secret(place, secret)
    asked = args.infer.diffusion
    plan = plan_for(
        place.world,
        spec.transformers[0].num_attention_heads,
        cfg=asked.cfg_size,
        cp=asked.cp_size,
        ulysses=asked.ulysses_degree,
        ranks_per_node=place.world if place.local_world is None else place.local_world,
    )
    device = pick_device(args.infer.device)
    local_rank = place.rank if place.local_rank is None else place.local_rank
    device = pick_device(f"cuda:{local_rank}") if device.type == "cuda" else device
    set_nccl_defaults(one_machine=place.local_world in (None, place.world))
    store = place.store
    if store is None:
        store, given = launchers_store(place, args.ranks)
        secret = given or secret
    return WorkerGroup(
        plan,
        place.rank,
        store,
        device=device,
        timeout=args.ranks.timeout,
        heartbeat_timeout=args.ranks.heartbeat_timeout,
        copies=args.ranks.copies,
        settings=args.infer.model_dump(exclude=dict(_OWN_SETTINGS)),
        secret=secret,
        launched=place.launched,
    )


class WorkerGroup:
    """This rank's place among the others.

    Args:
        plan: the layout.
        rank: ours.
        store: where all meet; strangers may write into it.
        device: of the networks.
        timeout: seconds without progress after which an exchange is given up.
        heartbeat_timeout: seconds of silence after which a rank is lost.
        copies: see `ProcessGroups`.
        settings: what every rank must say alike, for else they would go apart; JSON values.
        secret: of the ranks; None: all are on one machine, and make one.
        launched: the store lies with a launcher, not with rank 0.

    Raises:
        UsageError: another process has this rank, or another rank has other settings.
        RankLostError: another rank did not come, or was lost meanwhile.
        RuntimeError: the groups could not be made.
    """

    def __init__(
        self,
        plan: ParallelPlan,
        rank: int,
        store: dist.Store,
        *,
        device: torch.device,
        timeout: float = 60.0,
        heartbeat_timeout: float = 8.0,
        copies: bool = True,
        settings: Mapping[str, Any] = MappingProxyType({}),
        secret: bytes | None = None,
        launched: bool = False,
    ) -> None:
        self.rank = rank
        self.size = plan.world
        self.timeout = timeout
        meeting = meet(rank, plan.world, store, secret, timeout)
        self.groups = ProcessGroups(plan, rank, device, meeting, timeout, copies=copies)
        self.monitor = HeartbeatMonitor(
            rank,
            plan.world,
            meeting,
            heartbeat_timeout=heartbeat_timeout,
            timeout=timeout,
            cancel=self.groups.cancel,
            waiting=self.groups.waiting,
            launched=launched,
        )
        self.channel = ControlChannel(meeting, self.monitor)
        self._before = signal.getsignal(signal.SIGTERM)
        self._ends_on_term = threading.current_thread() is threading.main_thread() and (
            self._before in (signal.SIG_DFL, as_ctrl_c)
        )
        if self._ends_on_term:
            signal.signal(signal.SIGTERM, self.monitor.on_sigterm)
        try:
            with self.monitor.critical("meeting the other ranks"):
                self._meet(meeting, dict(settings))
                self.groups.open()
        except BaseException as error:
            self.monitor.leave(f"{type(error).__name__}: {error}")
            self.monitor.raise_if_lost()
            raise
        self.monitor.set_status("starting")

    def _meet(self, meeting: dist.Store, settings: Mapping[str, Any]) -> None:
        """Wait until every rank has said its settings, and compare them: ranks at odds would hang."""
        meeting.set(f"settings/{self.rank}", json.dumps(settings))
        deadline = time.monotonic() + self.timeout
        late = list(range(self.size))
        said: dict[int, dict[str, Any]] = {}
        while late and time.monotonic() < deadline:
            came = [rank for rank in late if meeting.check([f"settings/{rank}"])]
            said |= {rank: json.loads(meeting.get(f"settings/{rank}")) for rank in came}
            late = [rank for rank in late if rank not in said]
            for rank, name in itertools.product(said if 0 in said else (), settings):
                if said[rank].get(name) != said[0].get(name):
                    raise UsageError(
                        f"{name} = {said[rank].get(name)!r} on rank {rank}, {said[0].get(name)!r} on rank 0: "
                        "give all ranks the same settings",
                        field=name,
                    )
            self.monitor.raise_if_lost()
            if late:
                time.sleep(_GLANCE)
        if late:
            raise RuntimeError(
                f"the process groups were not made: ranks {late} did not come within {self.timeout:g} s"
            )

    def abort_exchanges(self) -> None:
        """Give up the exchanges under way and wake whoever waits in them. The groups can be opened again."""
        self.monitor.report_abort(self.groups.generation)
        self.groups.abort()

    def leave(self, why: str | None = None) -> None:
        """Go; with a reason, the others learn that the group is at its end."""
        self.monitor.leave(why)
        ends = why is None and self.monitor.lost is None
        # otherwise this rank has something to tell, and goes when it has
        if self._ends_on_term and ends and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._before)
        # in peace all come; alone, a rank would wait for the others' goodbye
        self.groups.abort() if self.monitor.lost is not None or why is not None else self.groups.close()
