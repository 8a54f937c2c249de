"""Muon: momentum whose matrices are made orthogonal before they are applied.

Keller Jordan, "Muon: An optimizer for hidden layers in neural networks" (2024,
https://kellerjordan.github.io/posts/muon/); the scale that lets AdamW's learning rates serve is
from "Muon is Scalable for LLM Training" (arXiv:2502.16982). torch has a Muon for matrices; this
one also takes convolution kernels (as [out, in x k x k]) and works on all matrices of one shape at
once, which for small networks is several times quicker.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

# Newton-Schulz coefficients of the post: singular values of any size end near 1 within five rounds.
_A = 3.4445
_B = -4.7750
_C = 2.0315


def orthogonal(matrices: Tensor, rounds: int = 5) -> Tensor:
    """The nearest (semi-)orthogonal matrix of each of [N, rows, columns], roughly; in bfloat16 on a GPU."""
    x = matrices.bfloat16() if matrices.is_cuda else matrices.float()
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(rounds):
        gram = x @ x.mT
        x = _A * x + (_B * gram + _C * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Args: params of at least two axes; lr: as AdamW's; momentum; weight_decay: decoupled."""

    def __init__(
        self, params: Iterable[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            by_shape: dict[tuple[int, int], list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    shape = (parameter.shape[0], parameter[0].numel())
                    by_shape.setdefault(shape, []).append(parameter)
            for shape, parameters in by_shape.items():
                self._update(shape, parameters, group)

    def _update(self, shape: tuple[int, int], parameters: list[Tensor], group: dict[str, float]) -> None:
        for parameter in parameters:
            if "momentum" not in self.state[parameter]:
                self.state[parameter]["momentum"] = torch.zeros_like(parameter.grad)
        gradients = [p.grad for p in parameters]
        buffers = [self.state[p]["momentum"] for p in parameters]
        torch._foreach_lerp_(buffers, gradients, 1 - group["momentum"])
        # Nesterov: look one step ahead
        ahead = torch._foreach_lerp(gradients, buffers, group["momentum"])
        updates = orthogonal(torch.stack([a.reshape(shape) for a in ahead]))
        rate = group["lr"] * 0.2 * max(shape) ** 0.5
        if group["weight_decay"]:
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        flat = [u.to(p.dtype).reshape(p.shape) for u, p in zip(updates, parameters, strict=True)]
        torch._foreach_add_(parameters, flat, alpha=-rate)
