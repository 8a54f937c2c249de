"""A supervisor of fake workers, in a thread or as a process of its own, and what is waited for."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from chitu_diffusion.config import EngineConfig
from chitu_diffusion.service.jobs import NewJob
from chitu_diffusion.service.launcher import WorkerLauncher
from chitu_diffusion.service.settings import ServiceConfig
from chitu_diffusion.service.slot import Patience
from chitu_diffusion.service.store import JobStore, open_store
from chitu_diffusion.service.supervisor import run

T = TypeVar("T")
FAKE = (sys.executable, str(Path(__file__).with_name("fake_worker.py")))
PATIENCE = Patience(silence_s=1.0, unit_s=2.0, paces=5.0, unknown_s=20.0)
ENGINE = EngineConfig()


def settings_of(data: Path, **more: object) -> ServiceConfig:
    """Quick ones, and not so quick that a busy machine breaks them."""
    return ServiceConfig(**{"data": str(data), "lease_s": 2.0, "beat_s": 0.1, "drain_s": 5.0, **more})


def new_job(**resolved: object) -> NewJob:
    """Ten steps of 20 ms, unless said."""
    asked = {"steps": 10, "step_s": 0.02, **resolved}
    return NewJob("ann", ENGINE.models.name, {}, asked, "hash", seed=3)


@contextmanager
def supervised(
    settings: ServiceConfig,
    store: JobStore,
    launcher: WorkerLauncher | None = None,
    engine: EngineConfig = ENGINE,
    patience: Patience = PATIENCE,
) -> Iterator[Callable[[], None]]:
    """Runs while the block does; gives what stops it, and waits for its end."""
    stop = threading.Event()
    launcher = launcher or WorkerLauncher(FAKE)
    raised: list[BaseException] = []

    def live() -> None:
        try:
            run(settings, store, stop, engine=engine, launcher=launcher, patience=patience)
        except BaseException as error:
            raised.append(error)
            raise

    thread = threading.Thread(target=live)
    thread.start()

    def end() -> None:
        stop.set()
        thread.join(20)
        assert not thread.is_alive()

    try:
        yield end
    finally:
        end()
        if launcher is not None and launcher._command is FAKE:
            launcher.close()
    assert not raised


def until(ask: Callable[[], T | None], seconds: float = 20.0) -> T:
    """The first answer that is true."""
    late = time.monotonic() + seconds
    while not (answer := ask()):
        assert time.monotonic() < late, "it did not come"
        time.sleep(0.005)
    return answer


if __name__ == "__main__":
    own = settings_of(Path(sys.argv[1]), store=sys.argv[2])
    run(
        own,
        open_store(own.store_url()),
        threading.Event(),
        engine=ENGINE,
        launcher=WorkerLauncher(FAKE),
        patience=PATIENCE,
    )
