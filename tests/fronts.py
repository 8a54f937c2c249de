"""Fronts of the service for tests: on a store of their own, in this process or behind uvicorn, with a
supervisor that makes no videos.
"""

from __future__ import annotations

import hashlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from starlette.testclient import TestClient

    from chitu_diffusion.service.front import Front
    from chitu_diffusion.service.jobs import Job, JobLease

VIDEO = bytes(range(256)) * 40
"""What a fake video's file holds."""


@dataclass
class FakeSupervisor:
    """Runs jobs by hand; every video has the same bytes."""

    front: Front
    video: bytes = VIDEO

    def claim(self) -> JobLease:
        claimed = self.front.store.leases.claim("fake", [self.front.planner.model])
        assert claimed is not None
        return claimed.lease

    def step(self, lease: JobLease, step: int = 1, steps: int = 2) -> None:
        from chitu_diffusion.service.jobs import JobProgress

        progress = JobProgress("denoising", step, steps, step / steps, 0.5, self.front.store.now() + 3)
        self.front.store.leases.event(lease, "step", {"step": step, "steps": steps}, progress)

    def complete(self, lease: JobLease) -> Job:
        from chitu_diffusion.service.jobs import Artifact

        path = f"jobs/{lease.job}/{lease.fence}/video.mp4"
        file = self.front.data / path
        file.parent.mkdir(parents=True)
        file.write_bytes(self.video)
        digest = hashlib.sha256(self.video).hexdigest()
        artifact = Artifact("video", path, len(self.video), digest, "video/mp4")
        return self.front.store.leases.complete(lease, [artifact], seconds={"denoising": 1.0})

    def make(self) -> Job:
        """The next job, from its claim to its end."""
        lease = self.claim()
        self.step(lease)
        return self.complete(lease)

    def run(self, stop: threading.Event) -> None:
        """Make what comes; cancel what is cancelled, and fail what asks for it."""
        from chitu_diffusion.service.jobs import JobFailure, WorkerInfo

        store = self.front.store
        store.workers.put(WorkerInfo("fake", "here", 1, self.front.planner.model, "ready"))
        while not stop.wait(0.02):
            claimed = store.leases.claim("fake", [self.front.planner.model])
            if claimed is None:
                continue
            self.step(claimed.lease)
            if "slow" in claimed.job.resolved["prompt"]:
                while not store.leases.beat(claimed.lease).cancel_requested and not stop.wait(0.02):
                    pass
                store.leases.cancelled(claimed.lease)
            elif "broken" in claimed.job.resolved["prompt"]:
                store.leases.fail(claimed.lease, JobFailure("non_finite", "NaN at step 1", "denoising", 1))
            else:
                self.complete(claimed.lease)


def make_front(folder: Path, url: str | None = None, **service: Any) -> Front:
    """A front of wan-tiny whose data lie in a folder; `service` are its settings."""
    from chitu_diffusion.config import EngineConfig
    from chitu_diffusion.service.serving import open_front
    from chitu_diffusion.service.settings import ServiceConfig

    settings = ServiceConfig(data=str(folder), store=url, port=0, min_free_gb=0, **service)
    return open_front(settings, EngineConfig())


def client_of(front: Front, **headers: str) -> TestClient:
    from starlette.testclient import TestClient

    from chitu_diffusion.service.app import build_app

    client = TestClient(build_app(front), base_url="http://127.0.0.1:8000", raise_server_exceptions=False)
    client.headers.update(headers)
    return client


def add_key(front: Front, owner: str, *scopes: str, **more: Any) -> str:
    from chitu_diffusion.service.auth import make_key

    row, key = make_key(owner, owner, scopes or ("read", "submit"), **more)
    front.store.keys.add(row)
    return key


@pytest.fixture
def front(tmp_path: Path) -> Iterator[Front]:
    front = make_front(tmp_path / "data")
    yield front
    front.store.close()


@pytest.fixture
def supervisor(front: Front) -> FakeSupervisor:
    return FakeSupervisor(front)


@contextmanager
def listening(
    front: Front, work: Callable[[threading.Event], None] | None = None, port: int = 0
) -> Iterator[str]:
    """The URL of a front behind uvicorn, with some work in a thread beside it."""
    import uvicorn

    from chitu_diffusion.service.app import build_app

    config = uvicorn.Config(build_app(front), port=port, log_level="warning", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    listener = config.bind_socket()
    stop = threading.Event()
    threads = [threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)]
    threads += [threading.Thread(target=work, args=(stop,), daemon=True)] if work else []
    for thread in threads:
        thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        stop.set()
        front.draining.set()
        server.should_exit = True
        for thread in threads:
            thread.join(10)
        for connection in server.server_state.connections:  # those that outlived it, as when a process ends
            with suppress(OSError):
                connection.transport.get_extra_info("socket").shutdown(socket.SHUT_RDWR)
