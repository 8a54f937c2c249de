"""Whether a tensor is free of NaN and Inf: asked now, answered later."""

from __future__ import annotations

import torch
from torch import Tensor

from chitu_diffusion.errors import NonFiniteError


class FiniteCheck:
    """A question that travels while the device works on.

    On a GPU whoever asks for the answer a step later waits for that step's end alone, and the device never
    runs empty. On a CPU it is known at once.

    Args:
        tensor: of any shape.
        name: what an error calls it.
    """

    def __init__(self, tensor: Tensor, name: str) -> None:
        self._name = name
        if tensor.is_floating_point() and tensor.itemsize == 1:
            tensor = tensor.float()  # 8 bits, of which torch asks nothing
        found = torch.stack([torch.isnan(tensor).any(), torch.isinf(tensor).any()])
        self._arrival: torch.cuda.Event | None = None
        if tensor.device.type == "cuda":
            self._found = torch.empty(2, dtype=torch.bool, pin_memory=True).copy_(found, non_blocking=True)
            self._arrival = torch.cuda.Event()
            self._arrival.record(torch.cuda.current_stream(tensor.device))
        else:
            self._found = found

    @property
    def is_known(self) -> bool:
        """Whether the answer is there already."""
        return self._arrival is None

    def require(self) -> None:
        """Wait for the answer.

        Raises:
            NonFiniteError (a ValueError): "NaN detected in NAME", or "Inf ...".
        """
        if self._arrival is not None:
            self._arrival.synchronize()
        nan, inf = self._found.tolist()
        if nan or inf:
            raise NonFiniteError(f"{'NaN' if nan else 'Inf'} detected in {self._name}")
