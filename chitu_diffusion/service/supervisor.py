"""The supervisor: workers on this machine that run the store's jobs. Knows SQL through the store; no HTTP, no
torch.
"""

from __future__ import annotations

import logging
import threading

from chitu_diffusion.config import EngineConfig
from chitu_diffusion.service.jobs import StoreDownError
from chitu_diffusion.service.settings import ServiceConfig
from chitu_diffusion.service.store import JobStore
from chitu_diffusion.service.sweeper import sweep

logger = logging.getLogger(__name__)
_SWEEP_S = 30.0


def run(
    settings: ServiceConfig, store: JobStore, stop: threading.Event, *, engine: EngineConfig | None = None
) -> None:
    """Run jobs until `stop` is set; then park those that run (at most `settings.drain_s`) and come back.

    Blocks: call it in a thread of its own. Each worker has a row in `store.workers`: "starting" while its
    model loads, "ready", "busy", "draining". If this process dies, the workers end by themselves, and their
    jobs go on under the next supervisor.

    Args:
        settings: `workers` of them are kept running; with 0 only what is over is swept.
        store: may be shared with other threads.
        stop: set on SIGTERM.
        engine: the model and how it runs; None reads file and environment. Jobs of `engine.models.name` are
            taken.
    """
    while not stop.wait(_SWEEP_S):
        try:
            sweep(settings, store)
        except StoreDownError as error:
            logger.warning("nothing was swept: %s", error)
