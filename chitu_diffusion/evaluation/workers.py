"""Several processes that share one device, each with the model loaded once, for many small pieces of work.

A small model leaves a large device idle while the next operation is launched; a dozen processes fill it. With
one worker the work is done in this process. Knows settings and functions; not what they do.
"""

from __future__ import annotations

import os
import queue
import traceback
from collections import deque
from collections.abc import Callable
from multiprocessing import get_all_start_methods, get_context, parent_process
from threading import Thread
from types import TracebackType
from typing import Any

import torch

from chitu_diffusion.backend import DiffusionBackend
from chitu_diffusion.config import EngineConfig
from chitu_diffusion.distributed.host import usable_cores
from chitu_diffusion.errors import ChituError, TaskError

Work = Callable[..., Any]
"""A module's function: (backend, *arguments) -> plain data."""

_PATIENCE = 1.0
"""Seconds between looks at whether a process has died."""


class Workers:
    """Runs `Work` on backends of one model, in any order; use it as a context.

    Args:
        config: which model, where.
        count: processes; 1 is this process alone.
    """

    def __init__(self, config: EngineConfig, count: int = 1) -> None:
        self._config = config
        self._count = count
        self._own: deque[tuple[int, Work]] = deque()
        self._asked: dict[int, tuple[Any, ...]] = {}
        self._number = 0
        self._backend: DiffusionBackend | None = None
        self._processes: list[Any] = []
        if count > 1:
            # forks of one process that has imported everything and touched no device
            context: Any = get_context("forkserver" if "forkserver" in get_all_start_methods() else "spawn")
            context.set_forkserver_preload([__name__])
            self._work = context.Queue()
            self._results = context.Queue()
            plain = config.model_dump()
            threads = max(1, usable_cores() // count)
            for _ in range(count):
                process = context.Process(
                    target=_serve, args=(plain, threads, self._work, self._results), daemon=True
                )
                process.start()
                self._processes.append(process)

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._processes:
            if kind is None:
                self._work.put(None)
            else:
                process.terminate()
        for process in self._processes:
            process.join(timeout=30)
        if self._backend is not None:
            self._backend.terminate()

    @property
    def waiting(self) -> int:
        """Pieces whose result has not been taken yet."""
        return len(self._asked)

    def submit(self, work: Work, *arguments: Any) -> None:
        """Queue `work(backend, *arguments)`."""
        self._number += 1
        self._asked[self._number] = arguments
        if self._count > 1:
            self._work.put((self._number, work, arguments))
        else:
            self._own.append((self._number, work))

    def result(self) -> tuple[tuple[Any, ...], Any]:
        """The next finished piece: its arguments, and what it gave.

        Raises:
            ChituError: it failed, or a process died.
        """
        if self._count == 1:
            number, work = self._own.popleft()
            if self._backend is None:
                self._backend = _loaded(self._config)
            arguments = self._asked.pop(number)
            return arguments, work(self._backend, *arguments)
        while True:
            try:
                number, found, failure = self._results.get(timeout=_PATIENCE)
            except queue.Empty:
                dead = [process for process in self._processes if not process.is_alive()]
                if dead:
                    raise TaskError(
                        f"a worker process ended with code {dead[0].exitcode}; fewer workers need less "
                        "memory (--workers)"
                    ) from None
                continue
            if failure is not None:
                raise TaskError(failure)
            return self._asked.pop(number), found


def _loaded(config: EngineConfig) -> DiffusionBackend:
    """The model, with its attention kernel pinned: "auto" times kernels, and on a device that others use it
    might choose differently in each process, so that videos would be compared across kernels."""
    backend = DiffusionBackend(config)
    backend.attn_backend = backend.attn_backend
    return backend


def _end_with(parent: Any) -> None:
    """Ends this process once its parent has ended: a killed one says nothing, and the device must be free."""
    parent.join()
    os._exit(1)


def _serve(plain: dict[str, Any], threads: int, work: Any, results: Any) -> None:
    """A process's life: load, work until told to stop, or until nobody is left to work for."""
    Thread(target=_end_with, args=(parent_process(),), daemon=True).start()
    torch.set_num_threads(threads)
    try:
        backend = _loaded(EngineConfig(**plain))
        while (piece := work.get()) is not None:
            number, function, arguments = piece
            results.put((number, function(backend, *arguments), None))
    except ChituError as error:
        results.put((0, None, str(error)))
    except Exception as error:
        # recorded: the process that asked raises it
        results.put(
            (0, None, f"a worker failed with {type(error).__name__}: {error}\n{traceback.format_exc()}")
        )
