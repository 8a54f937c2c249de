"""A process that has imported what a worker needs, and forks workers: `python -m` it, with a socket's number.

A worker is ready again as soon as its model is loaded, without the seconds that imports take. It has no
threads and no CUDA context, which no fork may have. It ends when the supervisor's end of its socket closes.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import wait
from typing import Any

Work = Callable[[socket.socket, dict[str, Any]], None]
"""(the worker's end of its pipe, what the supervisor says of it): a worker's whole life."""
_LONGEST = 1 << 18


def serve(control: socket.socket, work: Work) -> None:
    """Fork a worker for each message (JSON, and with it the worker's end of a pipe), and send each one's end:
    {"exited": pid, "code": its exit code, or minus the signal's number}.
    """
    for ended_by_supervisor in (signal.SIGINT, signal.SIGTERM):  # which come to the whole group
        signal.signal(ended_by_supervisor, signal.SIG_IGN)
    woken, wake = os.pipe()
    os.set_blocking(woken, False)
    os.set_blocking(wake, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake)
    gc.freeze()
    while True:
        ready = wait([control, woken])
        if woken in ready:
            os.read(woken, 4096)
            for pid, code in _ended():
                control.send(json.dumps({"exited": pid, "code": code}).encode())
        if control in ready:
            message, handles, _, _ = socket.recv_fds(control, _LONGEST, 1)
            if not message:
                return
            if os.fork() == 0:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                control.close()
                _live(work, handles[0], message)
            os.close(handles[0])


def _ended() -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return found
        if pid == 0:
            return found
        found.append((pid, os.waitstatus_to_exitcode(status)))


def _live(work: Work, handle: int, message: bytes) -> None:
    """In the worker; does not come back."""
    code = 1
    try:
        work(socket.socket(fileno=handle), json.loads(message))
        code = 0
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main() -> None:
    """Import, then serve."""
    control = socket.socket(fileno=int(sys.argv[1]))
    from chitu_diffusion.config import set_openmp_defaults, set_torch_cache

    set_openmp_defaults()  # before torch is imported
    set_torch_cache()
    from chitu_diffusion.service.worker import run_worker

    serve(control, run_worker)


if __name__ == "__main__":
    main()
