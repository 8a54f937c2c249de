"""Heartbeats: every rank tells the others once a second where it is, and notices who no longer does.

Two threads: one talks to the store, the other only looks at the clock, for the store itself may freeze with
the rank it lies in. A lost rank is first an error that the main thread can raise; a main thread that cannot
(it hangs in an exchange with the lost one) is ended, with its stack on stderr. A rank that raised in the
middle of a unit has aborted: it lives, but the others' exchanges with it are cut short, for on a GPU nothing
else would wake them; so are exchanges that do not move. A process is only ended by a descriptor that was
taken while the rank in it gave signs of life. Knows ranks and their status in words; no task, no tensors.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from chitu_diffusion.distributed.host import Process, machine_id
from chitu_diffusion.distributed.stores import SignedStore
from chitu_diffusion.errors import RankLostError
from chitu_diffusion.executor.messages import without_controls

INTERVAL = 1.0
"""Seconds between two heartbeats."""
_QUICK = 10
"""So many heartbeats come quickly."""
_GLANCE = 0.25
_GRACE = 2.0
_STACK_AFTER = 3.0
_STACK_LINES = 8
EXIT_CODE = 1


class HeartbeatMonitor:
    """This rank's sign of life and its view of the others.

    Args:
        rank, size: ours, and how many there are.
        store: where the ranks meet; a connection of the monitor's own is made, and what strangers write over
            is mended.
        heartbeat_timeout: seconds of silence after which a rank is lost.
        timeout: seconds after which an exchange that does not move is cut short.
        cancel: (why, generation or None) cuts short the exchanges of that generation, or all; from another
            thread.
        waiting: seconds that an exchange has not moved.
        launched: the store lies with the launcher, not with rank 0.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        store: dist.Store,
        *,
        heartbeat_timeout: float,
        timeout: float,
        cancel: Callable[[str, int | None], None],
        waiting: Callable[[], float],
        launched: bool = False,
    ) -> None:
        self.rank = rank
        self.size = size
        self.host = socket.gethostname()
        self.lost: RankLostError | None = None
        self._store: dist.Store = store.clone()  # type: ignore[attr-defined]
        self._store.set_timeout(timedelta(seconds=INTERVAL))  # only ever asked for what is there
        self._heartbeat_timeout = heartbeat_timeout
        self._timeout = timeout
        self._cancel = cancel
        self._waiting = waiting
        self._launched = launched
        self._status = "starting"
        self._status_since = time.monotonic()
        self._in_critical = False
        self._main = threading.get_ident()
        now = time.monotonic()
        self._seen = dict.fromkeys((other for other in range(size) if other != rank), now)
        self._heartbeats: dict[int, dict[str, Any]] = {}
        self._processes: dict[int, _HeldProcess] = {}
        self._number = 0
        self._heard = now
        self._stop = threading.Event()
        self._wake = threading.Event()
        self._lock = threading.Lock()
        self._reason: str | None = None
        self._aborted: int | None = None
        self._heartbeat_thread = threading.Thread(
            target=self._heartbeat_loop, name="chitu-heartbeat", daemon=True
        )
        self._heartbeat_thread.start()
        threading.Thread(target=self._watch_clock, name="chitu-monitor", daemon=True).start()

    @contextmanager
    def critical(self, status: str) -> Iterator[None]:
        """The main thread works with the other ranks: should one be lost and this not end, the process
        does.
        """
        self.set_status(status)
        self._in_critical = True
        try:
            yield
        finally:
            self._in_critical = False

    def set_status(self, status: str) -> None:
        """Where the main thread is, in words."""
        self._status = status
        self._status_since = time.monotonic()

    def raise_if_lost(self) -> None:
        """Raise if a rank is lost.

        Raises:
            RankLostError: naming it, its host and where it was.
        """
        if self.lost is not None:
            raise self.lost

    def mark_failed(self, rank: int, why: str) -> None:
        """Take a rank for lost that gives signs of life but does nothing else."""
        self._mark_lost(rank, why)

    def mark_store_lost(self, why: str, frozen: bool = False) -> None:
        """Where the ranks meet is gone, and with it whoever has it: the launcher, or rank 0."""
        self._mark_lost(None if self._launched else 0, why, frozen)

    def report_abort(self, generation: int) -> None:
        """This rank raised and gave up the exchanges of that generation: the others need not wait for it."""
        self._aborted = generation
        self._wake.set()

    def describe(self, rank: int) -> str:
        """A rank as people know it: `rank 1 of 4 (HOST, process 123)`."""
        heartbeat = self._heartbeats.get(rank)
        known = f" ({heartbeat['host']}, process {heartbeat['pid']})" if heartbeat else ""
        return f"rank {rank} of {self.size}{known}"

    def leave(self, why: str | None = None) -> None:
        """Stop watching; with a reason, the others learn that this rank will not come back."""
        self._reason = why if self._reason is None else self._reason
        self._stop.set()
        self._wake.set()
        # its last word; a store that is gone or frozen will not hear it
        self._heartbeat_thread.join(INTERVAL)

    def on_sigterm(self, signum: int, frame: object) -> None:
        """For SIGTERM, which launchers send to all ranks when one has ended: then that is what is raised.

        A rank that has left is on its way out, and hears nothing more.

        Raises:
            RankLostError: another rank is lost.
            KeyboardInterrupt: none is.
        """
        if self._stop.is_set():
            return
        self._wake.set()
        deadline = time.monotonic() + _GRACE
        while self.lost is None and not self._stop.is_set() and time.monotonic() < deadline:
            time.sleep(_GLANCE / 5)
        self.raise_if_lost()
        raise KeyboardInterrupt(signal.Signals(signum).name)

    # -- threads

    def _heartbeat_loop(self) -> None:
        try:
            while True:
                self._wake.clear()
                leaving = self._stop.is_set()
                if isinstance(self._store, SignedStore):
                    self._store.mend()
                self._store.set(f"heartbeat/{self.rank}", json.dumps(self._heartbeat()))
                if leaving:
                    return
                unheard = [other for other in self._seen if not self._read_heartbeat(other)]
                for other in self._seen:
                    self._check_process(other)
                self._heard = time.monotonic()
                # oftener at first, for two make a process known, and where a stranger writes over them
                self._wake.wait(_GLANCE / 5 if unheard or self._number < _QUICK else INTERVAL)
        except RuntimeError as error:
            # the store went away with whoever had it: rank 0, or the launcher
            if not self._stop.is_set() and self.lost is None:
                self.mark_store_lost(f"its store is gone ({str(error).splitlines()[0]})")

    def _heartbeat(self) -> dict[str, Any]:
        stack = None
        frame = sys._current_frames().get(self._main)
        if frame is not None and time.monotonic() - self._status_since > _STACK_AFTER:
            stack = "".join(traceback.format_stack(frame)[-_STACK_LINES:])
        self._number += 1
        facts = {"host": self.host, "pid": os.getpid(), "machine": machine_id(), "aborted": self._aborted}
        facts |= {"reason": self._reason, "leaving": self._stop.is_set()}
        return {**facts, "number": self._number, "status": self._status, "stack": stack}

    def _read_heartbeat(self, other: int) -> bool:
        """Whether there is one, new or not."""
        before = self._heartbeats.get(other)
        try:
            if not self._store.check([f"heartbeat/{other}"]):
                return False
            heartbeat = without_controls(json.loads(self._store.get(f"heartbeat/{other}")))
            if before is not None and heartbeat["number"] <= before["number"]:
                return True  # the same, or one that somebody has put back
            if heartbeat["aborted"] is not None and (
                before is None or before["aborted"] != heartbeat["aborted"]
            ):
                self._cancel_exchanges(
                    f"{self.describe(other)} gave up in {heartbeat['status']}", heartbeat["aborted"]
                )
            reason = heartbeat["reason"]
            self._hold_process(other, heartbeat)
        except dist.DistStoreError:
            return False  # a stranger has written over it meanwhile
        except (ValueError, TypeError, KeyError) as error:
            self._mark_lost(other, f"its heartbeat cannot be read ({error}); use one version on all ranks")
            return True
        self._heartbeats[other] = heartbeat
        self._seen[other] = time.monotonic()
        if reason is not None and self.lost is None:
            self._mark_lost(other, f"it left: {reason}")
        return True

    def _hold_process(self, other: int, heartbeat: dict[str, Any]) -> None:
        """A rank that was heard before a descriptor was taken, and after, is the process behind it."""
        held = self._processes.get(other)
        if held is not None:
            held.verified = held.verified or held.number == heartbeat["pid"]
        elif heartbeat["machine"] is not None and heartbeat["machine"] == machine_id():
            self._processes[other] = _HeldProcess(heartbeat["pid"])

    def _check_process(self, other: int) -> None:
        """A rank of this machine whose process has ended, not in peace, need not be waited for."""
        for _ in range(2):  # it may have said goodbye after it was last heard
            heartbeat = self._heartbeats.get(other)
            if heartbeat is None or heartbeat["leaving"] or self.lost is not None:
                return
            if other not in self._processes or not self._processes[other].is_gone():
                return
            self._read_heartbeat(other)
        self._mark_lost(other, "its process has ended")

    def _cancel_exchanges(self, why: str, generation: int | None = None) -> None:
        # in a thread of its own: the monitor goes on if that should hang
        threading.Thread(
            target=self._cancel, args=(why, generation), name="chitu-cancel", daemon=True
        ).start()

    def _watch_clock(self) -> None:
        last = time.monotonic()
        while not self._stop.wait(_GLANCE) and self.lost is None:
            now = time.monotonic()
            if now - last > 1 + 4 * _GLANCE:
                # we ourselves were frozen, and know nothing about the others
                self._heard = now
                self._seen = dict.fromkeys(self._seen, now)
            last = now
            if self._waiting() > self._timeout:
                self._cancel_exchanges(f"an exchange has not moved for {self._timeout:g} s")
            if now - self._heard > self._heartbeat_timeout:
                self.mark_store_lost(
                    f"its store has not answered for {self._heartbeat_timeout:g} s", frozen=True
                )
            for other, seen in self._seen.items():
                # one that was never heard of may be reading its libraries from a slow disk
                patience = (
                    self._heartbeat_timeout
                    if other in self._heartbeats
                    else max(self._heartbeat_timeout, self._timeout)
                )
                if now - seen > patience and self.lost is None:
                    self._mark_lost(other, f"no sign of life for {patience:g} s", frozen=True)

    def _mark_lost(self, other: int | None, why: str, frozen: bool = False) -> None:
        heartbeat = {} if other is None else self._heartbeats.get(other, {})
        status = heartbeat.get("status", "starting")
        stack = heartbeat.get("stack")
        with self._lock:
            if self.lost is not None:
                return
            who = (
                "the launcher is lost"
                if other is None
                else f"{self.describe(other)} is lost, last heard of in {status}"
            )
            self.lost = RankLostError(self._report(who, why, stack))
        self._cancel_exchanges(str(self.lost))
        if frozen and other in self._processes:
            # it would keep its launcher waiting, and its memory; not before `lost` says why: its launcher now
            # ends this rank, too, see `on_sigterm`
            self._processes[other].kill_verified()
        deadline = time.monotonic() + _GRACE
        while self._in_critical and time.monotonic() < deadline:
            time.sleep(_GLANCE / 5)
        if self._in_critical:
            frame = sys._current_frames().get(self._main)
            stack = "".join(traceback.format_stack(frame)[-_STACK_LINES:]) if frame is not None else ""
            print(f"error: {self.lost}\nRank {self.rank} hangs here:\n{stack}", file=sys.stderr, flush=True)
            os._exit(EXIT_CODE)

    def _report(self, who: str, why: str, stack: str | None) -> str:
        tail = f"\nit was here:\n{stack.rstrip()}" if stack else ""
        return (
            f"{who}: {why}. Rank {self.rank} ({self.host}) was in {self._status}. The group ends; the same "
            f"command starts again{tail}"
        )


class _HeldProcess:
    """A rank's process on this machine.

    Attributes:
        number: its process number, as the rank says.
        verified: that rank was heard of since the descriptor was taken, so it is this process.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        self.verified = False
        self._process: Process | None = None
        self._ended = False
        try:
            self._process = Process(number)
        except ProcessLookupError:
            self._ended = True
        except OSError:
            return  # no descriptors here: silence tells

    def is_gone(self) -> bool:
        return self._ended if self._process is None else self._process.is_gone()

    def kill_verified(self) -> None:
        if self.verified and self._process is not None:
            self._process.kill()
