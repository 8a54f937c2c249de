"""Which ports processes listen on, as the system tells."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable
from pathlib import Path

_LISTENS = "0A"


def ports_of(processes: Iterable[int]) -> set[tuple[str, int]]:
    """(address, port) of every TCP socket that one of these processes listens on."""
    found = set()
    for process in processes:
        inodes = {os.readlink(file) for file in Path(f"/proc/{process}/fd").glob("*") if file.is_symlink()}
        for table, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
            for line in Path(f"/proc/{process}/net/{table}").read_text().splitlines()[1:]:
                _, local, _, state, *_, inode = line.split()[:10]
                if state == _LISTENS and f"socket:[{inode}]" in inodes:
                    host, port = local.split(":")
                    words = [bytes.fromhex(host[at : at + 8])[::-1] for at in range(0, len(host), 8)]
                    found.add((socket.inet_ntop(family, b"".join(words)), int(port, 16)))
    return found
