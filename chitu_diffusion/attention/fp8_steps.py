"""What passes between the steps around float8 attention, and the numbers that plain torch and Triton share;
what the steps do is told in `fp8`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

LARGEST = 448.0
RMS = 2.0
"""The root mean square before rounding; float8 goes up to 224 times that, and down to 1/128 of it at full
precision.
"""
_SAMPLE = 8
"""Every so many queries are looked at for a_c, which any positive number could be."""
TINY = 1e-12
"""The least mean square that a channel is taken to have."""


FLOAT8 = torch.float8_e4m3fn


class Means(NamedTuple):
    """Means over tokens, float32, in P parts whose sum they are: P programs of a GPU have one each, plain
    torch has P = 1.

    rows: of q^2 (a sample), k, k^2, v, v^2: [B, H, P, 5, D].
    product: of k v^T, [B, H, P, D of k, D of v].
    """

    rows: Tensor
    product: Tensor


class Scales(NamedTuple):
    """What rounding takes out and puts in, contiguous: float32 [B, H, D], descale [B, H], and in bfloat16
    k_turn [B, H, D, D].

    q8 = (q * q_factor) turned, k8 = k @ k_turn - k_shift, which is (k - k_mean) divided by a_c, turned and
    made as large as q8, and v8 = (v - v_mean) * v_factor. What the softmax sees of q (k - k_mean)^T is q8
    k8^T * descale^2.
    """

    k_mean: Tensor
    v_mean: Tensor
    q_factor: Tensor
    k_turn: Tensor
    k_shift: Tensor
    v_factor: Tensor
    descale: Tensor


class Rounded(NamedTuple):
    """k and v in float8 [B, L, H, D], and of these the means, in parts as above: v_mean [B, H, P, D], product
    of k8 v8^T.

    Both means would be taken out of the product, but each is an error of rounding, and what they make
    together is nothing.
    """

    k: Tensor
    v: Tensor
    v_mean: Tensor
    product: Tensor


class Steps(NamedTuple):
    """The work around the attention, in order; plain torch here, a Triton kernel each in `fp8_triton`."""

    measure: Callable[[Tensor, Tensor, Tensor], Means]
    scale: Callable[[Means], Scales]
    quantise_q: Callable[[Tensor, Scales], Tensor]
    quantise_kv: Callable[[Tensor, Tensor, Scales], Rounded]
    correct: Callable[[Means, Scales, Rounded], tuple[Tensor, Tensor]]
    finish: Callable[[Tensor, Tensor | None, Tensor, Scales, Tensor, Tensor], tuple[Tensor, Tensor]]


def sample(q: Tensor) -> Tensor:
    """The queries [B, S', H, D] whose mean square is taken: some of q's where there are many."""
    return q[:, :: _SAMPLE if q.shape[1] >= 64 * _SAMPLE else 1]


def hadamard(size: int) -> Tensor:
    """The orthonormal Hadamard matrix of a power of two, float32; it is symmetric and its own inverse."""
    if size < 1 or size & (size - 1):
        raise ValueError(f"a Hadamard matrix of {size}: use a power of two")
    matrix = torch.ones(1, 1)
    while matrix.shape[0] < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)], 0)
    return matrix / math.sqrt(size)
