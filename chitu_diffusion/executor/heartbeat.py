"""Signs of life: every rank tells the others once a second where it is, and notices who no longer does.

Two threads: one talks to the store, the other only looks at the clock, for the store itself may freeze with
the rank it lies in. A lost rank is first an error that the main thread can raise; a main thread that cannot
(it hangs in an exchange with the lost one) is ended, with its stack on stderr. A rank that raised in the
middle of a unit has fallen: it lives, but the others' exchanges with it are cut short, for on a GPU nothing
else would wake them; so are exchanges that do not move. Knows ranks and places in words; no task, no tensors.
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
from typing import Any

import torch.distributed as dist

from chitu_diffusion.distributed.host import is_gone, machine
from chitu_diffusion.errors import RankLostError

BEAT = 1.0
_GLANCE = 0.25
_GRACE = 2.0
_STACK_AFTER = 3.0
_STACK_LINES = 8
EXIT_CODE = 1


class Watch:
    """This rank's sign of life and its view of the others.

    Args:
        rank, size: ours, and how many there are.
        store: where the ranks meet; a connection of the watch's own is made.
        lost_after: seconds of silence after which a rank is lost.
        timeout: seconds after which an exchange that does not move is cut short.
        interrupt: (why, generation or None) cuts short the exchanges of that generation, or all; from another
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
        lost_after: float,
        timeout: float,
        interrupt: Callable[[str, int | None], None],
        waiting: Callable[[], float],
        launched: bool = False,
    ) -> None:
        self.rank, self.size = rank, size
        self.host = socket.gethostname()
        self.lost: RankLostError | None = None
        self._store, self._lost_after, self._timeout = store.clone(), lost_after, timeout  # type: ignore[attr-defined]
        self._interrupt, self._waiting, self._launched = interrupt, waiting, launched
        self._place, self._arrived, self._busy = "starting", time.monotonic(), False
        self._main = threading.get_ident()
        now = time.monotonic()
        self._seen = dict.fromkeys((other for other in range(size) if other != rank), now)
        self._beats: dict[int, dict[str, Any]] = {}
        self._heard = now
        self._stop, self._speak, self._lock = threading.Event(), threading.Event(), threading.Lock()
        self._left: str | None = None
        self._fallen: int | None = None
        self._talking = threading.Thread(target=self._talk, name="chitu-signs-of-life", daemon=True)
        self._talking.start()
        threading.Thread(target=self._look, name="chitu-watch", daemon=True).start()

    @contextmanager
    def busy(self, place: str) -> Iterator[None]:
        """The main thread works with the other ranks: should one be lost and this not end, the process
        does.
        """
        self.at(place)
        self._busy = True
        try:
            yield
        finally:
            self._busy = False

    def at(self, place: str) -> None:
        """Where the main thread is, in words."""
        self._place, self._arrived = place, time.monotonic()

    def check(self) -> None:
        """Raise if a rank is lost.

        Raises:
            RankLostError: naming it, its host and where it was.
        """
        if self.lost is not None:
            raise self.lost

    def accuse(self, rank: int, why: str) -> None:
        """Take a rank for lost that gives signs of life but does nothing else."""
        self._lose(rank, why)

    def lose_store(self, why: str, frozen: bool = False) -> None:
        """Where the ranks meet is gone, and with it whoever has it: the launcher, or rank 0."""
        self._lose(None if self._launched else 0, why, frozen)

    def fell(self, generation: int) -> None:
        """This rank raised and gave up the exchanges of that generation: the others shall not wait for it in
        them.
        """
        self._fallen = generation
        self._speak.set()

    def describe(self, rank: int) -> str:
        """A rank as people know it: `rank 1 of 4 (HOST, process 123)`."""
        beat = self._beats.get(rank)
        known = f" ({beat['host']}, process {beat['pid']})" if beat else ""
        return f"rank {rank} of {self.size}{known}"

    def leave(self, why: str | None = None) -> None:
        """Stop watching; with a reason, the others learn that this rank will not come back."""
        self._left = why if self._left is None else self._left
        self._stop.set()
        self._speak.set()
        self._talking.join(BEAT)  # its last word; a store that is gone or frozen will not hear it

    def terminated(self, signum: int, frame: object) -> None:
        """For SIGTERM, which launchers send to all ranks when one has ended: then that is what is raised.

        A rank that has left is on its way out, and hears nothing more.

        Raises:
            RankLostError: another rank is lost.
            KeyboardInterrupt: none is.
        """
        if self._stop.is_set():
            return
        self._speak.set()
        deadline = time.monotonic() + _GRACE
        while self.lost is None and not self._stop.is_set() and time.monotonic() < deadline:
            time.sleep(_GLANCE / 5)
        self.check()
        raise KeyboardInterrupt(signal.Signals(signum).name)

    # -- threads

    def _talk(self) -> None:
        try:
            while True:
                self._speak.clear()
                leaving = self._stop.is_set()
                self._store.set(f"beat/{self.rank}", json.dumps(self._beat()))
                if leaving:
                    return
                for other in self._seen:
                    self._listen(other)
                    self._mourn(other)
                self._heard = time.monotonic()
                self._speak.wait(BEAT)
        except RuntimeError as error:
            # the store went away with whoever had it: rank 0, or the launcher
            if not self._stop.is_set() and self.lost is None:
                self.lose_store(f"its store is gone ({str(error).splitlines()[0]})")

    def _beat(self) -> dict[str, Any]:
        stack = None
        frame = sys._current_frames().get(self._main)
        if frame is not None and time.monotonic() - self._arrived > _STACK_AFTER:
            stack = "".join(traceback.format_stack(frame)[-_STACK_LINES:])
        now = time.monotonic()
        facts = {"host": self.host, "pid": os.getpid(), "machine": machine(), "fallen": self._fallen}
        facts |= {"left": self._left, "leaving": self._stop.is_set()}
        return {**facts, "beat": now, "place": self._place, "stack": stack}

    def _listen(self, other: int) -> None:
        if not self._store.check([f"beat/{other}"]):
            return
        beat = json.loads(self._store.get(f"beat/{other}"))
        before = self._beats.get(other)
        self._beats[other] = beat
        if before is None or before["beat"] != beat["beat"]:
            self._seen[other] = time.monotonic()
        if beat["fallen"] is not None and (before is None or before["fallen"] != beat["fallen"]):
            self._cut_short(f"{self.describe(other)} gave up in {beat['place']}", beat["fallen"])
        if beat["left"] is not None and self.lost is None:
            self._lose(other, f"it left: {beat['left']}")

    def _mourn(self, other: int) -> None:
        """A rank of this machine whose process has ended, not in peace, need not be waited for."""
        for _ in range(2):  # it may have said goodbye after it was last heard
            beat = self._beats.get(other)
            if beat is None or beat["leaving"] or self.lost is not None:
                return
            if beat["machine"] is None or beat["machine"] != machine() or not is_gone(beat["pid"]):
                return
            self._listen(other)
        self._lose(other, "its process has ended")

    def _cut_short(self, why: str, generation: int | None = None) -> None:
        # in a thread of its own: the watch goes on if that should hang
        threading.Thread(
            target=self._interrupt, args=(why, generation), name="chitu-interrupt", daemon=True
        ).start()

    def _look(self) -> None:
        last = time.monotonic()
        while not self._stop.wait(_GLANCE) and self.lost is None:
            now = time.monotonic()
            if now - last > 1 + 4 * _GLANCE:
                # we ourselves were frozen, and know nothing about the others
                self._heard = now
                self._seen = dict.fromkeys(self._seen, now)
            last = now
            if self._waiting() > self._timeout:
                self._cut_short(f"an exchange has not moved for {self._timeout:g} s")
            if now - self._heard > self._lost_after:
                self.lose_store(f"its store has not answered for {self._lost_after:g} s", frozen=True)
            for other, seen in self._seen.items():
                # one that was never heard of may be reading its libraries from a slow disk
                patience = self._lost_after if other in self._beats else max(self._lost_after, self._timeout)
                if now - seen > patience and self.lost is None:
                    self._lose(other, f"no sign of life for {patience:g} s", frozen=True)

    def _lose(self, other: int | None, why: str, frozen: bool = False) -> None:
        beat = {} if other is None else self._beats.get(other, {})
        place, stack = beat.get("place", "starting"), beat.get("stack")
        with self._lock:
            if self.lost is not None:
                return
            who = (
                "the launcher is lost"
                if other is None
                else f"{self.describe(other)} is lost, last heard of in {place}"
            )
            self.lost = RankLostError(self._report(who, why, stack))
        self._cut_short(str(self.lost))
        if frozen:
            # not before `lost` says why: its launcher now ends this rank, too, see `terminated`
            _end_frozen(beat)
        deadline = time.monotonic() + _GRACE
        while self._busy and time.monotonic() < deadline:
            time.sleep(_GLANCE / 5)
        if self._busy:
            frame = sys._current_frames().get(self._main)
            stack = "".join(traceback.format_stack(frame)[-_STACK_LINES:]) if frame is not None else ""
            print(f"error: {self.lost}\nRank {self.rank} hangs here:\n{stack}", file=sys.stderr, flush=True)
            os._exit(EXIT_CODE)

    def _report(self, who: str, why: str, stack: str | None) -> str:
        tail = f"\nit was here:\n{stack.rstrip()}" if stack else ""
        return (
            f"{who}: {why}. Rank {self.rank} ({self.host}) was in {self._place}. "
            f"The group ends; the same command starts again{tail}"
        )


def _end_frozen(beat: dict[str, Any]) -> None:
    """A rank that is frozen on this machine would keep its launcher waiting, and its memory."""
    if beat and beat["machine"] is not None and beat["machine"] == machine():
        try:
            os.kill(beat["pid"], signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            return
