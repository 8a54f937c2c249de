"""Functions that a compiled graph takes as they are, and that cost nothing more outside one.

`torch.library.custom_op` leads every call through the dispatcher and several layers of Python, where outputs
are compared with inputs: 100 to 150 us on the host of an H200, as much as launching five kernels. Without a
graph and without gradients nothing of that is wanted, so the function itself is called.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, ParamSpec, TypeVar, cast

import torch
from torch import Tensor, nn

P = ParamSpec("P")
R = TypeVar("R")
_PLAIN = (Tensor, nn.Parameter)


class Operator(Generic[P, R]):
    """A function of tensors, the first argument among them, none of which it changes or returns.

    Args:
        name: with a name space, `chitu::fa3`.
        run: the function; called by position.
        schema: as `torch.library` has it; None reads the annotations.
        device_types: where it runs; None: anywhere.

    Attributes:
        op: what graphs hold; its `register_fake` tells the outputs' shapes.
    """

    def __init__(self, name: str, run: Callable[P, R], schema: str | None, device_types: str | None) -> None:
        self._run = run
        self.op = torch.library.custom_op(
            name, run, mutates_args=(), schema=schema, device_types=device_types
        )
        self.register_fake = self.op.register_fake
        self.__doc__ = run.__doc__
        self.__name__ = run.__name__

    def __call__(self, *given: P.args, **named: P.kwargs) -> R:
        """What the function gives."""
        # a tensor of another class stands for one that is not there: whoever traces wants the operator
        if (
            not torch.compiler.is_compiling()
            and not torch.is_grad_enabled()
            and given
            and type(given[0]) in _PLAIN
        ):
            return self._run(*given, **named)
        result = self.op(*given, **named)
        return cast(R, result)


def operator(
    name: str, schema: str | None = None, device_types: str | None = None
) -> Callable[[Callable[P, R]], Operator[P, R]]:
    """Decorator for `Operator`."""
    return lambda run: Operator(name, run, schema, device_types)
