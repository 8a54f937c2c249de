"""`chitu serve`: the front in this process, supervisor and webhooks in threads beside it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import uvicorn

from chitu_diffusion.config import EngineConfig
from chitu_diffusion.errors import UsageError, raise_first
from chitu_diffusion.files.reading import read_text
from chitu_diffusion.service.app import build_app
from chitu_diffusion.service.auth import is_loopback, row_of_key
from chitu_diffusion.service.bodies import sweep
from chitu_diffusion.service.front import Front
from chitu_diffusion.service.limits import MOST_HEADERS
from chitu_diffusion.service.planning import Planner
from chitu_diffusion.service.settings import ServiceConfig, store_of
from chitu_diffusion.service.store import JobStore
from chitu_diffusion.service.webhooks import WebhookSender, kept_secret

logger = logging.getLogger(__name__)
_SWEEP_S = 600.0
_STOP_S = 3
"""Seconds that answers may still take when the process ends."""


class _Server(uvicorn.Server):
    """Says at the first signal that it drains; the second one ends it at once."""

    def __init__(self, config: uvicorn.Config, draining: threading.Event) -> None:
        super().__init__(config)
        self._draining = draining

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._draining.set()
        super().handle_exit(sig, frame)


def open_front(service: ServiceConfig, engine: EngineConfig) -> Front:
    """The store and the front of settings.

    Raises:
        ModelError: there is no such model.
        UsageError, StoreDownError: see `store_of`.
    """
    planner = Planner(engine, service)
    return Front(service, store_of(service), planner)


def add_key_file(store: JobStore, file: Path) -> None:
    """Take in the keys of a file, one a line (`ck_ID_SECRET`), that the store has not: containers bring them.

    Raises:
        UsageError: it cannot be read, or a line is no key.
    """
    try:
        lines = [line.strip() for line in read_text(file).splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise UsageError(f"--key-file {file}: it cannot be read", field="--key-file") from error
    for line in lines:
        row = row_of_key(line, "default", ("read", "submit", "metrics", "admin"))
        if store.keys.get(row.id) is None:
            store.keys.add(row)


def require_safe_address(front: Front) -> None:
    """Without keys nobody but this machine may reach the server.

    Raises:
        UsageError: it would be reached.
    """
    host = front.settings.host
    if not is_loopback(host) and not front.auth.has_keys():
        raise UsageError(
            f"host = {host}: others could reach it, and there is no key; make one with 'chitu keys add "
            "NAME', or use --host 127.0.0.1",
            field="service.host",
        )


@contextmanager
def beside(name: str, work: Callable[[threading.Event], None], patience_s: float) -> Iterator[None]:
    """Work in a thread, which is asked to stop and waited for at the end."""
    stop = threading.Event()
    thread = threading.Thread(target=work, args=(stop,), name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(patience_s)
        if thread.is_alive():
            logger.warning("%s did not stop in %g s", name, patience_s)


def serve(front: Front, engine: EngineConfig, *, on_bound: Callable[[str], None] = print) -> None:
    """Answer until SIGTERM or Ctrl+C; jobs that run are parked then.

    Args:
        engine: the workers' settings.
        on_bound: called with the server's URL once it answers.

    Raises:
        UsageError: an address that is taken, or needs a key.
        Exception: the supervisor's, which cannot go on.
    """
    require_safe_address(front)
    settings = front.settings
    secret = kept_secret(front.data, settings.webhooks.secret)
    sender = WebhookSender(
        front.store, settings.webhooks, secret, lambda result: front.metrics.webhooks.labels(result).inc()
    )

    def sweep_inputs(stop: threading.Event) -> None:
        while not stop.wait(_SWEEP_S):
            sweep(front.inputs, settings.retention_s + 2 * settings.queue.ttl_s)

    faults: list[Exception] = []

    def supervise(stop: threading.Event) -> None:
        from chitu_diffusion.service.supervisor import run

        try:
            run(settings, front.store, stop, engine=engine)
        except Exception as error:  # whoever started this starts it again
            faults.append(error)
            server.should_exit = True

    config = uvicorn.Config(
        build_app(front),
        host=settings.host,
        port=settings.port,
        h11_max_incomplete_event_size=MOST_HEADERS,
        timeout_graceful_shutdown=_STOP_S,
        access_log=False,
        log_config=None,  # what it logs goes where all else does
        server_header=False,
        proxy_headers=False,
        ws="none",
    )
    server = _Server(config, front.draining)
    try:
        listener = config.bind_socket()
        listener.listen(config.backlog)
    except (SystemExit, OSError) as error:  # uvicorn's way to say that the address is taken
        raise UsageError(
            f"{settings.host}:{settings.port} cannot be listened on; use another --port", field="service.port"
        ) from error
    host, port = listener.getsockname()[:2]
    on_bound(f"http://{f'[{host}]' if ':' in host else host}:{port}")
    with (
        beside("supervisor", supervise, settings.drain_s + 5),
        beside("webhooks", sender.run, 6),
        beside("inputs", sweep_inputs, 1),
    ):
        try:
            server.run(sockets=[listener])
        except KeyboardInterrupt:
            logger.info("the server has stopped")  # and has raised the signal again
        finally:
            front.draining.set()
    raise_first(faults)
