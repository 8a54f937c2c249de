"""Which machine this process is on, containers that look like it told apart, which others run there, and how
many cores it may use.
"""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")


def machine_id() -> str | None:
    """What two processes share only if a process number means the same to both; None where unknown."""
    try:
        return (
            f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} "
            f"{os.readlink('/proc/self/ns/pid')}"
        )
    except OSError:
        return None


def is_gone(process: int) -> bool:
    """Whether no such process of this machine runs any more, buried or not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except FileNotFoundError:
        return Path("/proc/self/stat").exists()
    except OSError:
        return False


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
