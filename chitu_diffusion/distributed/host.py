"""Which machine this process is on, containers that look like it told apart, how many cores it may use, and
other processes there, by descriptors that no later process can come to bear.
"""

from __future__ import annotations

import ctypes
import math
import os
import select
import signal
import sys
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")
_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15


def machine_id() -> str | None:
    """What two processes share only if a process number means the same to both; None where unknown."""
    try:
        return (
            f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} "
            f"{os.readlink('/proc/self/ns/pid')}"
        )
    except OSError:
        return None


class Process:
    """A process of this machine. Whatever later gets its number is another one.

    Args:
        number: its process number now.

    Raises:
        ProcessLookupError: there is none.
        OSError: this system has no descriptors of processes.
    """

    def __init__(self, number: int) -> None:
        if sys.platform != "linux":
            raise OSError("no descriptors of processes")
        self.number = number
        self._descriptor = os.pidfd_open(number)

    def __del__(self) -> None:
        if "_descriptor" in vars(self):
            os.close(self._descriptor)

    def is_gone(self) -> bool:
        """Whether it has ended, buried or not."""
        ended = select.poll()
        ended.register(self._descriptor, select.POLLIN)
        return bool(ended.poll(0))

    def kill(self) -> None:
        """End it at once; nothing happens to one that has ended."""
        try:
            signal.pidfd_send_signal(self._descriptor, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            return


def end_with_parent(name: str) -> None:
    """This process gets SIGTERM when the one that forked it ends; and it is called so from now on."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
        libc.prctl(_PR_SET_NAME, name.encode(), 0, 0, 0)


def usable_cores(cgroup: Path = _CGROUP) -> int:
    """Cores that this process may run on: the machine's, its affinity's, or what its container's quota comes
    to.

    Args:
        cgroup: where control groups are mounted, of version 1 or 2.
    """
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    try:
        if (cgroup / "cpu.max").exists():
            quota, period = (cgroup / "cpu.max").read_text().split()
        else:
            quota, period = (
                (cgroup / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period")
            )
        share = float(quota) / float(period)
    except (OSError, ValueError, ZeroDivisionError):
        return cores  # no group, or one without a limit ("max")
    return min(cores, max(1, math.ceil(share))) if share > 0 else cores
