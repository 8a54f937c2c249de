"""A `chitu serve` of one's own for benchmarks: started with keys of several owners, driven over HTTP,
looked at as the system and its database see it.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from chitu_diffusion.service.auth import make_key
from chitu_diffusion.service.jobs import Job, OwnerLimits
from chitu_diffusion.service.store import JobStore, open_store

_START_S = 120.0
_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
ROLES = ("front", "forkserver", "worker")


@dataclass(frozen=True)
class Served:
    """A server that runs.

    Attributes:
        pid: of the front, whose threads are supervisor and webhooks.
        keys: by owner.
        store: this process's own view of the database.
    """

    pid: int
    url: str
    data: Path
    keys: Mapping[str, str]
    store: JobStore
    http: httpx.Client

    def headers(self, owner: str) -> dict[str, str]:
        """That an owner's requests carry."""
        return {"authorization": f"Bearer {self.keys[owner]}"}

    def submit(self, owner: str, fields: Mapping[str, Any]) -> str:
        """A job; its id."""
        answer = self.http.post("/v1/videos", json=dict(fields), headers=self.headers(owner))
        answer.raise_for_status()
        return str(answer.json()["id"])

    def ended(self, ids: Sequence[str], seconds: float = 600.0) -> list[Job]:
        """Those jobs, once all of them are completed."""
        wait_for(lambda: all(self.store.job(job).state.ended for job in ids), seconds, pause=0.1)
        jobs = [self.store.job(job) for job in ids]
        if failed := [job.id for job in jobs if job.state.value != "completed"]:
            raise RuntimeError(f"{len(failed)} of {len(ids)} jobs were not completed")
        return jobs

    def processes(self) -> dict[str, int]:
        """Numbers of `ROLES`."""
        (forkserver,) = _children(self.pid)
        (worker,) = _children(forkserver)
        return dict(zip(ROLES, (self.pid, forkserver, worker), strict=True))

    def rows(self) -> int:
        """Jobs, ended ones too."""
        return sum(self.store.counts().values())

    def files(self) -> int:
        """In the data folder."""
        return sum(len(names) for _, _, names in os.walk(self.data))


@contextmanager
def served(data: Path, owners: Sequence[str], **service: object) -> Iterator[Served]:
    """A server on the CPU with one worker, which is ready; ends with the block.

    Args:
        service: settings of the service, by their names.
    """
    data.mkdir(parents=True, exist_ok=True)
    store = open_store(f"sqlite:///{data}/chitu.db")
    keys = {}
    for owner in owners:
        row, keys[owner] = make_key(owner, owner, limits=OwnerLimits(), max_priority=9)
        store.keys.add(row)
    environment = {f"CHITU_SERVICE__{name.upper()}": str(value) for name, value in service.items()}
    command = [sys.executable, "-m", "chitu_diffusion", "serve", "--port", "0", "--data", str(data)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=on_cpu() | environment)
    try:
        said = process.stderr
        found = None if said is None else re.search(r"http://\S+", said.readline())
        if said is None or found is None:
            raise RuntimeError("the server did not start")
        threading.Thread(target=said.read, daemon=True).start()
        with httpx.Client(base_url=found[0], timeout=60) as http:
            wait_for(lambda: any(each.state == "ready" for each in store.workers.all()), _START_S)
            yield Served(process.pid, found[0], data, keys, store, http)
    finally:
        process.terminate()
        process.wait()
        store.close()


def on_cpu() -> dict[str, str]:
    """Variables of a child that computes on one core."""
    return os.environ | {"OMP_NUM_THREADS": "1", "CHITU_INFER__DEVICE": "cpu"}


def wait_for(ask: Callable[[], bool], seconds: float, pause: float = 0.05) -> None:
    """Until it is so.

    Raises:
        TimeoutError: it did not come.
    """
    late = time.monotonic() + seconds
    while not ask():
        if time.monotonic() > late:
            raise TimeoutError(f"waited for {seconds:.0f} s")
        time.sleep(pause)


def cpu_s(process: int) -> float:
    """Seconds of a core that a process has taken, its children's not among them."""
    fields = Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return sum(map(int, fields[11:13])) / _TICKS


def rss_mb(process: int) -> float:
    """Resident memory, in MB."""
    pages = int(Path(f"/proc/{process}/statm").read_text(encoding="ascii").split()[1])
    return pages * _PAGE_BYTES / 1e6


def descriptors(process: int) -> int:
    """Files, sockets and pipes that are open."""
    return len(os.listdir(f"/proc/{process}/fd"))


def _children(process: int) -> list[int]:
    """Those that live, of any thread."""
    threads = Path(f"/proc/{process}/task").iterdir()
    return [int(child) for thread in threads for child in (thread / "children").read_text().split()]
