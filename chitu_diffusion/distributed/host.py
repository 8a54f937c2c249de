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

from chitu_diffusion.memory.control_groups import control_groups

_ROOT = Path("/")
_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15


def machine_id() -> str | None:
    """What two processes share only if a process number means the same to both; None where unknown."""
    try:
        return (
            f"{Path('/proc/sys/kernel/random/boot_id').read_text(encoding='ascii').strip()} "
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


def usable_cores(root: Path = _ROOT) -> int:
    """Cores that this process may run on: the machine's, its affinity's, or what the quotas of its control
    groups come to.

    Args:
        root: of the file system that has /proc and /sys.
    """
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    shares = [share for group in control_groups("cpu", root) if (share := _share(group)) is not None]
    return min([cores, *(max(1, math.ceil(share)) for share in shares)])


def _share(group: Path) -> float | None:
    """Cores that a control group's quota comes to; None for one without a limit ("max", or -1)."""
    try:
        if (group / "cpu.max").exists():
            quota, period = (group / "cpu.max").read_text(encoding="ascii").split()
        else:
            quota, period = (
                (group / f"cpu.cfs_{name}_us").read_text(encoding="ascii") for name in ("quota", "period")
            )
        share = float(quota) / float(period)
    except (OSError, ValueError, ZeroDivisionError):
        return None
    return share if share > 0 else None
