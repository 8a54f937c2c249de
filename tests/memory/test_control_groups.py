"""Main memory and cores of containers, from files as the kernel writes them."""

from __future__ import annotations

from pathlib import Path

import pytest

from chitu_diffusion.distributed.host import usable_cores
from chitu_diffusion.memory.control_groups import main_memory, resident_memory

GIB = 2**30
MACHINE = "MemTotal:       16777216 kB\nMemFree:         1048576 kB\nMemAvailable:   12582912 kB\n"


def system(root: Path, groups: str, files: dict[str, str]) -> Path:
    """A file system with a machine of 16 GiB, 12 of them free."""
    for name, text in {"proc/meminfo": MACHINE, "proc/self/cgroup": groups, **files}.items():
        place = root / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text)
    return root


def two(path: str, limit: str, used: int = 0, files: int = 0) -> dict[str, str]:
    """A group of version 2."""
    place = f"sys/fs/cgroup/{path}"
    said = f"anon {used - files}\ninactive_file {files // 2}\nactive_file {files - files // 2}\n"
    return {
        f"{place}/memory.max": limit,
        f"{place}/memory.current": f"{used}\n",
        f"{place}/memory.stat": said,
    }


def one(path: str, limit: int, used: int = 0, files: int = 0) -> dict[str, str]:
    """A group of version 1, whose own counts leave out its children's."""
    place = f"sys/fs/cgroup/memory/{path}"
    said = f"inactive_file 0\nactive_file 0\ntotal_inactive_file {files}\ntotal_active_file 0\n"
    return {
        f"{place}/memory.limit_in_bytes": f"{limit}\n",
        f"{place}/memory.usage_in_bytes": f"{used}\n",
        f"{place}/memory.stat": said,
    }


NO_LIMIT = 9223372036854771712
NESTED = "12:cpu,cpuacct:/\n4:memory:/pod/task\n0::/\n"


@pytest.mark.parametrize(
    ("groups", "files", "total", "free"),
    [
        ("", {}, 16, 12),
        ("0::/\n", two("", "max\n", 5 * GIB), 16, 12),
        ("0::/\n", two("", f"{8 * GIB}\n", 3 * GIB), 8, 5),
        ("0::/\n", two("", f"{8 * GIB}\n", 7 * GIB, files=6 * GIB), 8, 7),
        ("0::/\n", two("", f"{8 * GIB}\n", 9 * GIB), 8, 0),
        # the inner one has no limit, the outer one has; or the other way round
        ("0::/a/b\n", two("a/b", "max\n") | two("a", f"{4 * GIB}\n", GIB), 4, 3),
        ("0::/a/b\n", two("a/b", f"{2 * GIB}\n", GIB) | two("a", f"{4 * GIB}\n", GIB), 2, 1),
        # a brother has used what the outer one leaves
        ("0::/a/b\n", two("a/b", f"{4 * GIB}\n", GIB) | two("a", f"{6 * GIB}\n", 5 * GIB), 4, 1),
        # a container that sees its own group as the root, under the machine's name or one above it
        ("0::/docker/123\n", two("", f"{3 * GIB}\n"), 3, 3),
        ("0::/../../x\n", two("", f"{3 * GIB}\n"), 3, 3),
        (NESTED, one("", NO_LIMIT) | one("pod", 4 * GIB, GIB) | one("pod/task", NO_LIMIT), 4, 3),
        (NESTED, one("", NO_LIMIT) | one("pod", NO_LIMIT) | one("pod/task", GIB, GIB // 2), 1, 0.5),
        (NESTED, one("pod/task", 2 * GIB, GIB, files=GIB), 2, 2),
        ("4:memory:/host/name\n", one("", 2 * GIB, GIB), 2, 1),
        # more than there is
        ("0::/\n", two("", f"{64 * GIB}\n", 63 * GIB), 16, 1),
        ("0::/\n", two("", "nonsense", 63 * GIB), 16, 12),
    ],
)
def test_memory_is_what_the_tightest_group_leaves(
    groups: str, files: dict[str, str], total: float, free: float, tmp_path: Path
) -> None:
    assert main_memory(system(tmp_path, groups, files)) == (total * GIB, free * GIB)


def test_a_machine_that_says_nothing_has_its_pages(tmp_path: Path) -> None:
    total, free = main_memory(tmp_path)
    assert total == free > 2**28
    assert resident_memory(tmp_path) == 0
    assert 2**20 < resident_memory() < main_memory().total


@pytest.mark.parametrize(
    ("groups", "files"),
    [
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "100000 100000\n"}),
        ("0::/a/b\n", {"a/b/cpu.max": "50000 100000\n", "a/cpu.max": "900000 100000\n"}),
        (
            "3:cpu,cpuacct:/pod\n",
            {"cpu/pod/cpu.cfs_quota_us": "90000", "cpu/pod/cpu.cfs_period_us": "100000"},
        ),
    ],
)
def test_cores_are_what_the_tightest_group_leaves(groups: str, files: dict[str, str], tmp_path: Path) -> None:
    root = system(tmp_path, groups, {f"sys/fs/cgroup/{name}": text for name, text in files.items()})
    assert usable_cores(root) == 1
    for name in (name for name in files if not name.endswith("period_us")):
        (root / "sys/fs/cgroup" / name).write_text("-1\n")
    assert usable_cores(root) == usable_cores(tmp_path / "nothing") >= 1
