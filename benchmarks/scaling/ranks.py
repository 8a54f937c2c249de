"""The processes of a scaling run: sections that fail on all ranks or on none, clocks that agree, results on
disk.

Knows ranks, groups, clocks and JSON; not what is measured.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.measuring import synchronise, timed_ms
from chitu_diffusion.config import RankPlace, set_nccl_defaults
from chitu_diffusion.distributed.plan import ParallelPlan
from chitu_diffusion.distributed.process_groups import ProcessGroups
from chitu_diffusion.executor.control_channel import ControlChannel
from chitu_diffusion.executor.heartbeat import HeartbeatMonitor

PATIENCE = 90.0
"""Seconds that a rank waits for the others' word at the end of a section."""
_LAST = 60.0
"""Seconds after the budget at which a run that hangs is ended; what was found by then is on disk."""
INNER = 16
"""Calls for one reading of the clock, for what is short."""
Work = Callable[[], object]


class Ranks:
    """This process among those of the run.

    Args:
        place: where torchrun put it.
        device: of its tensors.
        out: the results, rewritten by rank 0 after each section; None keeps none.
        budget: seconds from now; sections that would begin later, or not fit, are skipped.
    """

    def __init__(self, place: RankPlace, device: torch.device, out: Path | None, budget: float) -> None:
        set_nccl_defaults()
        self.rank = place.rank
        self.world = place.world
        self.device = device
        self.out = out
        self.results: dict[str, Any] = {}
        self.broken: list[str] = []
        self._began = time.monotonic()
        self._budget = budget
        self._section = 0
        self._layouts = 0
        self._store = dist.PrefixStore("scaling", next(iter(dist.rendezvous("env://")))[0])
        self._groups = ProcessGroups()
        self.monitor = HeartbeatMonitor(
            self.rank,
            self.world,
            self._store,
            heartbeat_timeout=30,
            timeout=PATIENCE / 2,
            cancel=self._cancel,
            waiting=lambda: self._groups.waiting(),
        )
        self._channel = ControlChannel(self._store, self.monitor)
        last = threading.Timer(budget + _LAST, self._end)
        last.daemon = True
        last.start()

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._began

    def layout(self, plan: ParallelPlan, **options: Any) -> ProcessGroups:
        """The groups of a layout, with options of `ProcessGroups`; those of the one before are closed."""
        self._groups.close()
        self._layouts += 1
        store = dist.PrefixStore(f"layout/{self._layouts}", self._store)
        self._groups = ProcessGroups(plan, self.rank, self.device, store, timeout=PATIENCE, **options)
        self._groups.open()
        return self._groups

    def gathered(self, value: Any) -> list[Any]:
        """Everyone's value, JSON, by rank."""
        return [vote["value"] for vote in self._channel.gather_status("value", {"value": value}, PATIENCE)]

    def section(self, name: str, work: Callable[[], dict[str, Any]], estimate: float) -> None:
        """Run a part of the benchmark on all ranks.

        Args:
            name: of its results.
            work: the same on every rank; rank 0's result is kept.
            estimate: seconds that it takes.
        """
        self._section += 1
        if self.gathered(self.elapsed)[0] + estimate > self._budget:
            self._keep(
                name, {"skipped": f"{estimate:g} s more would not fit the budget of {self._budget:g} s"}
            )
            return
        began = self.elapsed
        found = {}
        error = None
        try:
            with self.monitor.critical(f"section {name}"):
                found = work()
                synchronise(self.device)
            if self._groups.broken is not None:
                error = f"cut short: {self._groups.broken}"
        except Exception as raised:
            error = f"{type(raised).__name__}: {raised}"
            print(f"rank {self.rank}, section {name}:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
            raised.__traceback__ = None
        if error is not None:
            self.fall()
        errors = self.gathered(error)
        if any(errors):
            self._groups.abort()
            self.broken.append(name)
            found = {"failed": {rank: said for rank, said in enumerate(errors) if said}}
        self._groups.close()
        self._groups = ProcessGroups()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self._keep(name, {**found, "section_seconds": round(self.elapsed - began, 2)})

    def timed(self, work: Work, repeats: int) -> dict[str, Any]:
        """Seconds of `work` on the slowest rank: the first call, and the median of `repeats` more; and each
        rank's peak.

        All ranks begin together; on a GPU its own events are the clock. The peak is of bytes allocated,
        with those that other ranks write; 0 on a CPU.
        """
        peers = self._groups.world
        tick = torch.zeros(1, device=self.device)
        cuda = self.device.type == "cuda"
        times = []
        if cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
        for _ in range(repeats + 1):
            peers.all_gather(tick)
            times.append(timed_ms(work, self.device) / 1e3)
        peak = self._groups.held_bytes + (torch.cuda.max_memory_allocated(self.device) if cuda else 0)
        everyone = self.gathered({"times": times, "peak": peak})
        slowest = [max(column) for column in zip(*(rank["times"] for rank in everyone), strict=True)]
        found = {"first": slowest[0], "seconds": median(slowest[1:]), "all": slowest[1:]}
        return {**found, "peak_bytes": [rank["peak"] for rank in everyone]}

    def each(self, work: Work, times: int = INNER) -> float:
        """Seconds of one call of many in a row."""
        return float(self.timed(lambda: [work() for _ in range(times)], 3)["seconds"] / times)

    def fall(self) -> None:
        """This rank gives the section's exchanges up; the others' are cut short."""
        self.monitor.report_abort(self._section)
        self._groups.abort()

    def close(self) -> None:
        """Go, all together."""
        self._groups.close()
        self.gathered(None)
        self.monitor.leave()

    def _keep(self, name: str, found: dict[str, Any]) -> None:
        self.results[name] = found
        if self.rank == 0:
            print(f"{self.elapsed:6.1f} s  {name}: {json.dumps(found)[:2000]}", flush=True)
            if self.out is not None:
                self.out.parent.mkdir(parents=True, exist_ok=True)
                self.out.write_text(json.dumps(self.results, indent=1) + "\n")

    def _cancel(self, why: str, generation: int | None) -> None:
        if generation in (None, self._section):
            self._groups.cancel(why)

    def _end(self) -> None:
        print(
            f"rank {self.rank} is ended in section {self._section}, {_LAST:g} s after the budget",
            file=sys.stderr,
            flush=True,
        )
        os._exit(3)


def in_processes(module: str, ranks: int, words: list[str]) -> int:
    """This module in `ranks` processes of this machine, through torch's own launcher; its exit code."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return subprocess.run([*launcher, "-m", module, *words], check=False).returncode
