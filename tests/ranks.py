"""Several ranks in one test: processes that run a function together."""

from __future__ import annotations

import faulthandler
import gc
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# one import of everything, then each rank is a fork of it
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["chitu_diffusion.engine", "diffusers.models.autoencoders.autoencoder_kl_wan", "transformers"]
)

Work = Callable[..., None]


def new_store() -> dist.TCPStore:
    """Where the ranks of one test meet; it lives in the test's own process."""
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def start_ranks(world: int, work: Work, *given: Any, store: dist.TCPStore, errors: Path) -> list[BaseProcess]:
    """Begin `work(rank, world, store, *given)` in `world` processes; what it raises is written to
    ERRORS/RANK.txt.
    """
    ranks = [
        CONTEXT.Process(target=_rank, args=(work, rank, world, store.port, str(errors), given), daemon=True)
        for rank in range(world)
    ]
    for process in ranks:
        process.start()
    return ranks


def run_ranks(world: int, work: Work, *given: Any, errors: Path, seconds: float = 120) -> None:
    """`start_ranks`, and wait until all are done well."""
    store = new_store()
    ranks = start_ranks(world, work, *given, store=store, errors=errors)
    wait_for(ranks, seconds)
    told = [file.read_text() for file in sorted(errors.glob("*.txt"))]
    assert not told, "\n".join(told)
    codes = [process.exitcode for process in ranks]
    assert codes == [0] * world, f"exit codes {codes}"


def wait_for(ranks: Sequence[BaseProcess], seconds: float) -> float:
    """Seconds until all ranks have ended; the test fails, and ends them, when that is too long."""
    began = time.monotonic()
    for process in ranks:
        process.join(max(0.1, began + seconds - time.monotonic()))
    late = [index for index, process in enumerate(ranks) if process.is_alive()]
    for index in late:
        os.kill(ranks[index].pid or 0, signal.SIGUSR1)  # each tells on stderr where its threads are
    time.sleep(0.5 if late else 0)
    for process in ranks:
        process.kill()
    assert not late, f"ranks {late} hang after {seconds} s"
    return time.monotonic() - began


def _rank(work: Work, rank: int, world: int, port: int, errors: str, given: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    gc.freeze()  # what the fork brought stays: closing an engine looks at the rest alone
    faulthandler.register(signal.SIGUSR1)
    try:
        store = dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
        work(rank, world, store, *given)
    except BaseException:
        Path(errors, f"{rank}.txt").write_text(f"rank {rank}:\n{traceback.format_exc()}")
        raise
