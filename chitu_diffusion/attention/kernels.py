"""Attention kernels: each a small value that says what it promises.

A kernel takes q [B, S, H, D] and k, v [B, L, H, D] and returns [B, S, H, D] in q's dtype: softmax(q k^T /
sqrt(D)) v, with no mask. It is told where in the network and the task it is called (`AttentionContext`):
dense kernels ignore that, a sparse one finds its blocks by it. This file knows tensors only; which kernel a
run uses is chosen in `chitu_diffusion.attention`, and how a sequence is spread over ranks is composed around
a kernel elsewhere.
"""

import math as arithmetic
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from chitu_diffusion.attention.requirements import Requirements

Result = TypeVar("Result")


@dataclass(frozen=True)
class AttentionContext:
    """Where a self-attention is called.

    Attributes:
        grid: tokens along frames, rows, columns of the whole latent, in which order they run; also where a
            rank holds a part of them.
        block: index of the block, from 0.
        depth: how many blocks there are.
        step: index of the denoising step in its task, from 0, over all stages of a cascade; None where nobody
            knows it, as in a forward by hand.
        num_steps: how many the task has; None likewise.
    """

    grid: tuple[int, int, int]
    block: int
    depth: int
    step: int | None = None
    num_steps: int | None = None


NOWHERE = AttentionContext(grid=(0, 0, 0), block=0, depth=0)
"""Of a call outside of a network, as of the attention to a text: only dense kernels can do with it."""

DenseAttention = Callable[[Tensor, Tensor, Tensor], Tensor]
AttentionFn = Callable[[Tensor, Tensor, Tensor, AttentionContext], Tensor]
AttentionWithLse = Callable[[Tensor, Tensor, Tensor, AttentionContext], tuple[Tensor, Tensor]]

# Rows of the score matrix that the reference kernel holds at a time: 1024 x 32,760 keys in float32 is 128 MiB
# a head.
_MATH_ROWS = 1024


@dataclass(frozen=True)
class AttentionKernel:
    """One way to compute attention.

    Attributes:
        name: what settings call it.
        exact: True if it is attention up to rounding in its own dtype; False for 8-bit and sparse kernels.
        run: (q, k, v, where) -> out; of a function of q, k and v `dense` makes one.
        run_with_lse: (q, k, v, where) -> (out, lse [B, S, H] float32), or None. Ring attention merges partial
            results by the log-sum-exp of the scaled scores and admits only kernels that have it.
        whole_sequence: whether q, k and v must be all tokens of `where.grid`: of kernels that look at where
            tokens lie. Under ring attention, which hands over a part of the keys at a time, they cannot run.
        needs: devices, dtypes, head sizes and packages.
        autotuned: whether `auto` times it against others; the rest is what `auto` falls back on, in the
            registry's order.
    """

    name: str
    exact: bool
    run: AttentionFn
    run_with_lse: AttentionWithLse | None = None
    whole_sequence: bool = False
    requires: Requirements = field(default_factory=Requirements)
    autotuned: bool = False

    @property
    def why_no_ring(self) -> str | None:
        """Why ring attention cannot use it; None if it can."""
        if self.whole_sequence:
            return "it looks at the whole sequence, of which a ring's ranks hold a part at a time"
        return None if self.run_with_lse is not None else "it does not give the log-sum-exp"

    @property
    def supports_ring(self) -> bool:
        """Whether ring attention can use it."""
        return self.why_no_ring is None

    def why_unavailable(
        self, device: torch.device, dtype: torch.dtype | None = None, head_dim: int | None = None
    ) -> str | None:
        """Why it cannot be used there, and what to do about it; None if it can. A dtype or head size of None
        is not asked.
        """
        unmet = self.requires.unmet(device, dtype, head_dim)
        return None if unmet is None else str(unmet)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, where: AttentionContext = NOWHERE) -> Tensor:
        """Attention of q [B, S, H, D] over k, v [B, L, H, D]; returns [B, S, H, D]."""
        return self.run(q, k, v, where)


def dense(
    attend: Callable[[Tensor, Tensor, Tensor], Result],
) -> Callable[[Tensor, Tensor, Tensor, AttentionContext], Result]:
    """A kernel's function of q, k and v, which need not know where it is called."""

    def anywhere(q: Tensor, k: Tensor, v: Tensor, where: AttentionContext = NOWHERE) -> Result:
        return attend(q, k, v)

    return anywhere


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    # torch wants [B, H, S, D]; the transposes are views
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return out.transpose(1, 2)


def sdpa_weighted(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Attention whose scores get `bias` [B or 1, L] float32 added, by key: log n makes one key weigh as much
    as n equal ones.

    The bias must not be rounded to 16 bits: at log 500 that is 1.6 % of the key's weight. The CPU's kernel
    takes it in float32. CUDA's want it in q's dtype; there each key stands twice, see `split_weight`.
    """
    if bias.dtype != q.dtype and q.device.type != "cpu":
        bias = split_weight(bias, q.dtype)
        k = torch.cat([k, k], dim=1)
        v = torch.cat([v, v], dim=1)
    mask = bias[:, None, None, :]
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask
    )
    return out.transpose(1, 2)


def split_weight(bias: Tensor, dtype: torch.dtype) -> Tensor:
    """A bias [B, L], >= 0 or -inf, for keys that stand twice, [B, 2 L] in a coarser dtype, of the same weight
    to 5e-4.

    First the bias rounded down, then the log of the weight that this lacks (-inf for none): 1.6 % of 1.6 % is
    left.
    """
    coarse = bias.to(dtype)
    coarse = torch.where(coarse.float() > bias, coarse * (1 - torch.finfo(dtype).eps), coarse)
    missing = (bias.exp() - coarse.float().exp()).clamp_min(0).log()
    return torch.cat([coarse, missing.to(dtype)], dim=1)


def _math_rows(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    # q [B, H, s, D], k, v [B, H, L, D], all float32
    scores = q @ k.transpose(-1, -2) / arithmetic.sqrt(q.shape[-1])
    lse = scores.logsumexp(dim=-1)
    return (scores - lse[..., None]).exp() @ v, lse


def math_with_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The reference in plain torch: out [B, S, H, D] and the log-sum-exp of the scaled scores [B, S, H]."""
    q32, k32, v32 = (x.transpose(1, 2).float() for x in (q, k, v))
    parts = [_math_rows(rows, k32, v32) for rows in torch.split(q32, _MATH_ROWS, dim=2)]
    out = torch.cat([part for part, _ in parts], dim=2)  # [B, H, S, D]
    lse = torch.cat([part for _, part in parts], dim=2)  # [B, H, S]
    return out.transpose(1, 2).to(q.dtype), lse.transpose(1, 2)


def _math(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return math_with_lse(q, k, v)[0]


sdpa = AttentionKernel("sdpa", exact=True, run=dense(_sdpa))
math = AttentionKernel("math", exact=True, run=dense(_math), run_with_lse=dense(math_with_lse))
