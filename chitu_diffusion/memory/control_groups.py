"""How much main memory this process may have: the machine's, and what the control groups around it leave, of
version 1 or 2, nested as they are. Knows the system's files; imports no torch.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

_ROOT = Path("/")


class MainMemory(NamedTuple):
    """Bytes: of all that there is, and of what is free now. Copies of files' contents, which the system drops
    when memory is wanted, count as free.
    """

    total: int
    free: int


def main_memory(root: Path = _ROOT) -> MainMemory:
    """Of this machine, or of the tightest control group around this process.

    Args:
        root: of the file system that has /proc and /sys.
    """
    machine = _numbers(root / "proc" / "meminfo")
    total = machine.get("MemTotal", 0) * 1024 or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    free = machine["MemAvailable"] * 1024 if "MemAvailable" in machine else total
    for group in control_groups("memory", root):
        # version 2 has the first name of each pair, version 1 the second
        limit = _number(group / "memory.max", group / "memory.limit_in_bytes")
        used = _number(group / "memory.current", group / "memory.usage_in_bytes")
        if limit is None:
            continue
        said = _numbers(group / "memory.stat")
        files = sum(said.get(f"total_{kind}", said.get(kind, 0)) for kind in ("active_file", "inactive_file"))
        total = min(total, limit)
        free = min(free, max(0, limit - max(0, (used or 0) - files)))
    return MainMemory(total, min(free, total))


def resident_memory(root: Path = _ROOT) -> int:
    """Bytes that this process has now; 0 where the system does not say."""
    return _numbers(root / "proc" / "self" / "status").get("VmRSS", 0) * 1024


def control_groups(controller: str, root: Path = _ROOT) -> Iterator[Path]:
    """The folders of the groups that hold for this process, the innermost first, of both versions.

    Args:
        controller: of version 1, such as "memory" or "cpu".
    """
    mounts = root / "sys" / "fs" / "cgroup"
    lines = _text(root / "proc" / "self" / "cgroup").splitlines() or ["0::/"]
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and controller not in controllers.split(","):
            continue
        names = (controllers, controller) if controllers else ("", "unified")
        for mount in dict.fromkeys(mounts / name for name in names):
            inside = mount.joinpath(path.strip().lstrip("/"))
            # a container's own view of the tree may lack the outer part of the path
            if ".." in inside.parts:
                inside = mount
            places = [inside, *inside.parents]
            yield from (place for place in places[: places.index(mount) + 1] if place.is_dir())


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _number(*files: Path) -> int | None:
    """What the first of the files says that has a number; None for "max"."""
    return next((int(text) for file in files if (text := _text(file).strip()).isdecimal()), None)


def _numbers(file: Path) -> Mapping[str, int]:
    """Lines of a name and a number, such as "MemTotal:  24684088 kB"."""
    words = (line.replace(":", " ").split() for line in _text(file).splitlines())
    return {each[0]: int(each[1]) for each in words if len(each) > 1 and each[1].isdecimal()}
