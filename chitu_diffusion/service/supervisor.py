"""The supervisor: keeps this machine's workers running on the store's jobs.

Knows slots, their names and their turns; no HTTP, no torch.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import count
from multiprocessing.connection import wait
from pathlib import Path

from chitu_diffusion.config import EngineConfig, load_config
from chitu_diffusion.errors import UsageError
from chitu_diffusion.files.places import expand_home
from chitu_diffusion.service.figures import SupervisorFigures
from chitu_diffusion.service.jobs import StoreDownError
from chitu_diffusion.service.launcher import WorkerLauncher
from chitu_diffusion.service.logs import logged_about
from chitu_diffusion.service.settings import ServiceConfig
from chitu_diffusion.service.slot import Patience, WorkerSlot
from chitu_diffusion.service.store import JobStore
from chitu_diffusion.service.sweeper import sweep

logger = logging.getLogger(__name__)
_SWEEP_S = 30.0
_TURN_S = 0.1
_DOWN_S = 1.0


def run(
    settings: ServiceConfig,
    store: JobStore,
    stop: threading.Event,
    *,
    engine: EngineConfig | None = None,
    launcher: WorkerLauncher | None = None,
    patience: Patience | None = None,
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
        launcher: of one's own, which stays open.
        patience: how long a worker may be quiet.

    Raises:
        UsageError: workers of several GPUs, or a data folder that cannot be written.
    """
    if settings.gpus_per_worker > 1:
        raise UsageError(
            f"gpus_per_worker = {settings.gpus_per_worker}: use 1; a worker of several GPUs is not there yet",
            field="gpus_per_worker",
        )
    engine = _with_whole_paths(engine or load_config()[0])
    own_launcher = WorkerLauncher()  # starts nothing by itself
    sweeping = threading.Thread(target=_sweep_until, args=(settings, store, stop), daemon=True)
    sweeping.start()
    with ExitStack() as stack:
        stack.callback(own_launcher.close)
        slots = []
        figures = SupervisorFigures()
        for number in range(settings.workers):
            name = stack.enter_context(_own_name(Path(settings.data) / "workers"))
            starter = launcher or own_launcher
            patience = patience or Patience()
            slot = WorkerSlot(name, number, settings, engine, store, starter, patience, figures)
            stack.callback(slot.close)
            slots.append(slot)
        _give_back(slots, store, stop)
        while not stop.is_set():
            _turn(slots)
            if not slots:
                stop.wait()
        for slot in slots:
            slot.drain()
        until = time.monotonic() + settings.drain_s
        while not all(slot.is_idle for slot in slots) and time.monotonic() < until:
            _turn(slots)
    sweeping.join()


def _with_whole_paths(engine: EngineConfig) -> EngineConfig:
    """Settings for workers, which live in the data folder: so paths that videos name are inside it."""
    engine = engine.frozen_copy()
    for name, value in engine.models.model_dump().items():
        if value is not None and (place := Path(expand_home(value))).exists():
            setattr(engine.models, name, str(place.absolute()))
    return engine


def _turn(slots: list[WorkerSlot]) -> None:
    """What has come from the workers first: a worker is judged by what it said, not by when it was read."""
    if not any(slot.channel for slot in slots):
        time.sleep(_TURN_S)
    timeout = _TURN_S
    while by_handle := {slot.channel.fileno(): slot for slot in slots if slot.channel is not None}:
        ready = [handle for handle in wait(list(by_handle), timeout) if isinstance(handle, int)]
        if not ready:
            break
        for handle in ready:
            slot = by_handle[handle]
            with logged_about(worker=slot.name, job=slot.job):
                slot.read()
        timeout = 0.0
    for slot in slots:
        with logged_about(worker=slot.name, job=slot.job):
            slot.act()


@contextmanager
def _own_name(folder: Path) -> Iterator[str]:
    """A worker's id that no other supervisor has while this process lives; after a restart the same again."""
    host = re.sub(r"[^A-Za-z0-9.-]", "-", socket.gethostname())
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for number in count():
            handle = os.open(folder / f"{host}-{number}.lock", os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(handle)
            else:
                break
    except OSError as error:
        raise UsageError(f"data: {folder} cannot be written: {error.strerror}; use another folder") from error
    try:
        yield f"{host}-{number}"
    finally:
        os.close(handle)


def _give_back(slots: list[WorkerSlot], store: JobStore, stop: threading.Event) -> None:
    """Jobs that a supervisor of these names had when it died: no need to wait for their leases."""
    while not stop.is_set():
        try:
            for slot in slots:
                for lease in store.leases.held_by(slot.name):
                    store.leases.worker_lost(lease, signal="supervisor lost")
            return
        except StoreDownError as error:
            logger.warning("waiting for the store: %s", error)
            stop.wait(_DOWN_S)


def _sweep_until(settings: ServiceConfig, store: JobStore, stop: threading.Event) -> None:
    while not stop.is_set():
        try:
            sweep(settings, store)
        except StoreDownError as error:
            logger.warning("nothing was swept: %s", error)
        stop.wait(_SWEEP_S)
