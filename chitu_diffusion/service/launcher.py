"""Starts workers through a forkserver, and knows how they ended. Knows processes; no jobs."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from chitu_diffusion.service.pipe import LineChannel

FORKSERVER = (sys.executable, "-m", "chitu_diffusion.service.forkserver")
_EXIT_TOLD_S = 0.5


class WorkerLauncher:
    """The supervisor's side of a forkserver, which is started when it is needed, and again where it died;
    workers live on without it.

    Args:
        command: starts it; the number of its socket is added.

    Attributes:
        started: forkservers so far.
    """

    def __init__(self, command: Sequence[str] = FORKSERVER) -> None:
        self._command = command
        self.started = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._exits: dict[int, int] = {}

    @property
    def pid(self) -> int | None:
        """Of the forkserver that was started last; None: none was."""
        return None if self._process is None else self._process.pid

    def start(self, about: Mapping[str, Any]) -> LineChannel:
        """A worker, which runs once the forkserver has imported all; its first line tells its `pid`.

        Args:
            about: what it is to know, as JSON values.
        """
        ours, theirs = socket.socketpair()
        with theirs:
            message = json.dumps(about).encode()
            try:
                socket.send_fds(self._running(), [message], [theirs.fileno()])
            except ConnectionError:  # it died just now
                socket.send_fds(self._running(), [message], [theirs.fileno()])
        channel = LineChannel(ours)
        channel.limit_sends()
        return channel

    def _running(self) -> socket.socket:
        if self._process is not None and self._process.poll() is not None:
            self.close()
        if self._control is None:
            self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with theirs:
                handle = theirs.fileno()
                self._process = subprocess.Popen(
                    [*self._command, str(handle)], pass_fds=[handle], stdin=subprocess.DEVNULL
                )
            self.started += 1
        return self._control

    def exit_of(self, pid: int) -> int | None:
        """The exit code of a worker whose pipe is closed, or minus the number of the signal that killed it;
        None where nobody can tell.
        """
        until = time.monotonic() + _EXIT_TOLD_S
        while pid not in self._exits and self._control is not None:
            self._control.settimeout(max(0.001, until - time.monotonic()))
            try:
                told = self._control.recv(4096)
            except (TimeoutError, ConnectionError):
                break
            if not told:
                break
            said = json.loads(told)
            self._exits[said["exited"]] = said["code"]
        return self._exits.pop(pid, None)

    def close(self) -> None:
        """End the forkserver; workers are not touched."""
        if self._control is not None:
            self._control.close()
            self._control = None
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._exits.clear()


class WorkerProcess:
    """A worker as the system knows it, told apart from a later one of the same number.

    Args:
        pid: of a living process.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._handle: int | None = None
        with suppress(ProcessLookupError):
            self._handle = os.pidfd_open(pid)

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal; nothing where it has ended."""
        if self._handle is not None:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._handle, number)

    def close(self) -> None:
        """Forget it."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None
