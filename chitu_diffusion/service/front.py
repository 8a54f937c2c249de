"""The HTTP front: what its routes work with. Holds nothing that matters: jobs lie in the store, files in the
data folder, and any front answers any client. Never imports torch.
"""

from __future__ import annotations

import shutil
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, cast

from fastapi import Depends, Request

from chitu_diffusion.files.places import make_folder
from chitu_diffusion.service.answers import ApiError, retry_later
from chitu_diffusion.service.auth import Authenticator, Caller
from chitu_diffusion.service.jobs import WorkerInfo
from chitu_diffusion.service.metrics import HEARD_OF_S, FrontMetrics
from chitu_diffusion.service.planning import Planner
from chitu_diffusion.service.settings import ServiceConfig
from chitu_diffusion.service.store import JobStore
from chitu_diffusion.service.streams import JobWatcher

INPUTS_FOLDER = "inputs"


@dataclass
class Front:
    """What routes work with.

    Args:
        draining: set when the process is about to end.
    """

    settings: ServiceConfig
    store: JobStore
    planner: Planner
    draining: threading.Event = field(default_factory=threading.Event)
    data: Path = field(init=False)
    auth: Authenticator = field(init=False)
    metrics: FrontMetrics = field(init=False)
    watcher: JobWatcher = field(init=False)

    def __post_init__(self) -> None:
        self.data = Path(self.settings.data).absolute()
        make_folder("service.data", self.data)
        self.auth = Authenticator(self.store, self.settings.cors)
        self.metrics = FrontMetrics(self.store, self.data, self.planner.model)
        self.watcher = JobWatcher(self.store, self.metrics.streams, self.draining)

    @property
    def inputs(self) -> Path:
        """Folder of the files that came with requests."""
        return self.data / INPUTS_FOLDER

    def workers(self) -> tuple[WorkerInfo, ...]:
        """Those of this server's model that were heard of lately.

        Raises:
            StoreDownError
        """
        now = self.store.now()
        return tuple(
            worker
            for worker in self.store.workers.all()
            if worker.model == self.planner.model and now - worker.seen_at < HEARD_OF_S
        )

    def require_room(self) -> None:
        """Raises ApiError: 503, the process ends, or the disk is nearly full."""
        if self.draining.is_set():
            raise ApiError(503, "draining", "the server is about to stop", headers=retry_later(5))
        if self.is_disk_low():
            raise ApiError(503, "disk_low", "the server's disk is nearly full", headers=retry_later(60))

    def is_disk_low(self) -> bool:
        """Whether less is left than jobs need."""
        return shutil.disk_usage(self.data).free < self.settings.min_free_gb * 2**30


def front_of(request: Request) -> Front:
    """That of the app."""
    return cast(Front, request.app.state.front)


class needs:
    """A dependency: the caller, who may do something of a scope."""

    def __init__(self, scope: str) -> None:
        self.scope = scope

    def __call__(self, request: Request) -> Caller:
        """Raises ApiError."""
        return front_of(request).auth.caller(request, self.scope)


Reader = Annotated[Caller, Depends(needs("read"))]
Submitter = Annotated[Caller, Depends(needs("submit"))]
