"""Lines of JSON between a supervisor and a worker, over a socket of their own; no pickle. Knows no jobs.

Down: run, cancel, park. Up: started, ready, weights, tick, progress, preview, note, resumed, checkpoint,
parked, held, ended. Each is an object with a "kind".
"""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from typing import Any

Message = dict[str, Any]
_CHUNK = 65536
_SEND_S = 5.0


class LineChannel:
    """One end. Any thread may send; one receives.

    Args:
        end: a connected stream socket; it is the channel's from now on.
    """

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        self._rest = b""
        self._sending = threading.Lock()
        end.setblocking(True)

    def fileno(self) -> int:
        """For a selector."""
        return self._socket.fileno()

    def send(self, kind: str, **values: Any) -> None:
        """One line.

        Raises:
            OSError: the other end is closed, or takes nothing.
        """
        line = json.dumps({"kind": kind, **values}, ensure_ascii=False).encode() + b"\n"
        with self._sending:
            self._socket.sendall(line)

    def limit_sends(self) -> None:
        """Have a send fail (OSError) where the other end takes nothing for some seconds."""
        self._socket.settimeout(_SEND_S)

    def receive(self) -> list[Message]:
        """What has come, at least one line; waits for it. Nothing: the other end is closed."""
        while True:
            try:
                chunk = self._socket.recv(_CHUNK)
            except ConnectionError:
                chunk = b""
            if not chunk:
                return []
            *lines, self._rest = (self._rest + chunk).split(b"\n")
            if lines:
                return [json.loads(line) for line in lines]

    def messages(self) -> Iterator[Message]:
        """One after the other, until the other end is closed."""
        while received := self.receive():
            yield from received

    def close(self) -> None:
        """The other end sees the end."""
        self._socket.close()
