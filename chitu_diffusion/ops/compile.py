"""`torch.compile` that is heard and never gives up in silence.

torch compiles a function when it first meets new shapes, which takes seconds in which nothing seems to
happen, and runs it uncompiled where it cannot go on. Here the first is announced and timed, and the second is
an error. Knows functions; not what they compute.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from chitu_diffusion.errors import CompileError

logger = logging.getLogger(__name__)

_MOST_GRAPHS = 64
"""Graphs of one function, one for each size, precision and kind of layer; torch's own limit of 8 is soon
reached.
"""


class CompileWatch:
    """Tells when something is being compiled, and how long it took.

    A warning is logged when the first graph after `take` begins, since the next seconds bring no other news.
    """

    def __init__(self) -> None:
        from torch._dynamo.callback import callback_handler

        self._began: float | None = None
        self._announced = False
        self.seconds = 0.0
        self.graphs = 0
        callback_handler.register_start_callback(self._start)
        callback_handler.register_end_callback(self._end)

    def take(self) -> str | None:
        """What was compiled since the last call, in words; None for nothing."""
        if not self.graphs:
            return None
        note = f"compiled {self.graphs} piece(s) in {self.seconds:.1f} s"
        self.seconds = 0.0
        self.graphs = 0
        self._announced = False
        return note

    def close(self) -> None:
        """Stop listening; silent the second time."""
        from torch._dynamo.callback import callback_handler

        for heard, ours in (
            (callback_handler.start_callbacks, self._start),
            (callback_handler.end_callbacks, self._end),
        ):
            if ours in heard:
                heard.remove(ours)

    def _start(self, _: object) -> None:
        if not self._announced:
            logger.warning(
                "compiling the transformer for this size, once; later runs find most of it on disk"
            )
        self._announced = True
        self._began = time.perf_counter()

    def _end(self, _: object) -> None:
        if self._began is not None:
            self.seconds = self.seconds + time.perf_counter() - self._began
            self._began = None
            self.graphs += 1


def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """`function`, compiled whole: one graph for each set of shapes, dtypes and modules of the same build.

    Args:
        function: a method's plain function does for all objects of its class.
        options: of `torch.compile`, over fullgraph=True and dynamic=False.

    Returns:
        What raises `CompileError` where torch would run `function` uncompiled.
    """
    import torch._dynamo as dynamo
    from torch._inductor.exc import InductorError

    # torch's switches are per process
    dynamo.config.recompile_limit = max(dynamo.config.recompile_limit, _MOST_GRAPHS)
    inner = torch.compile(function, **{"fullgraph": True, "dynamic": False, **options})

    def run(*args: Any) -> Any:
        try:
            return inner(*args)
        except (dynamo.exc.TorchDynamoException, dynamo.exc.FailOnRecompileLimitHit, InductorError) as error:
            cause = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise CompileError(
                f"{function.__qualname__} cannot be compiled: {type(error).__name__}: {cause}; "
                "infer.compile=false runs it uncompiled"
            ) from error

    return run


def let_length_vary(tensors: Iterable[Tensor | None]) -> None:
    """Says that the second axis of tensors [B, L, ...] varies, so that not each length gets a graph."""
    for tensor in tensors:
        if tensor is not None:
            torch._dynamo.maybe_mark_dynamic(tensor, 1)
