"""FlashAttention-3 in float8, with what makes its inputs fit for float8 taken out first and put back after. Lossy.

float8_e4m3 keeps three bits behind the point: each number is off by 2.65 % (root mean square), at any scale. So no scale helps;
what helps is to hand over small numbers where large ones cancel. All of it is exact in real numbers (per batch and head;
i is a query, j one of L keys, D the channels of a head):

1. k loses its mean over tokens: every score of a query changes by the same q_i . mean(k), which the softmax does not see and
   the log-sum-exp gets back.
2. channel c of q is multiplied and that of k divided by a_c = (var(k_c) / mean(q_c^2))^(1/4), which makes both equally large:
   the products stay, the sum of |q_c| |k_c|, to which the error is proportional, is the least that such scaling can give.
3. q and k are turned by a Hadamard matrix over D, which spreads what is left of outlying channels over all of them.
4. v loses its mean, which the output gets back, because the weights sum to 1. This also keeps the accumulators of the tensor
   cores, which drop low bits as they grow, near zero.
5. Of softmax(s) the part linear in s is known in closed form: (1 / L) sum_j (v_j - mean v) (k_j - mean k)^T q_i / sqrt(D), one
   D x D matrix a head. What rounding k and v did to that matrix is put right (a control variate). What rounding q did is left:
   where attention is sharp, the few keys that matter have another matrix than all, and a correction by that of all does harm.

Relative error, plain float8 and so: Gaussian q, k, v 5.3 and 4.5 %; k with a mean eight times as large as what varies 22 and
4.5 %; q, k, v of wan-tiny's trained layers 4.3 and 2.5 %. The sharper the attention, the less step 5 gives; scores of standard
deviation 2 between independent q and k stay at 7.8 %. Rotation after QuaRot (arXiv:2404.00456), mean of k after SageAttention
(arXiv:2410.02367).

On a CPU the same steps run in plain torch, and the attention between them is emulated.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from chitu_diffusion.attention.fa3 import FA3
from chitu_diffusion.attention.kernels import AttentionKernel
from chitu_diffusion.attention.needs import Needs

FLOAT8 = torch.float8_e4m3fn
LARGEST = 448.0
_RMS = 2.0
"""The root mean square before rounding; float8 goes up to 224 times that, and down to 1/128 of it at full precision."""
_SAMPLE = 8
"""Every so many queries are looked at for a_c, which any positive number could be."""
_P_SCALE = 256.0
"""FlashAttention-3's largest weight before rounding."""
_ROWS = 1024
_TINY = 1e-12


@dataclass(frozen=True)
class Moments:
    """Over tokens, per batch and head, float32: means and mean squares [B, H, D] and cov(v, k) [B, H, D of v, D of k]."""

    k_mean: Tensor
    k_square: Tensor
    v_mean: Tensor
    v_square: Tensor
    vk: Tensor

    @classmethod
    def of_sums(cls, tokens: int, k: Tensor, kk: Tensor, v: Tensor, vv: Tensor, vk: Tensor) -> Moments:
        """From sums of k, k^2, v, v^2 and v k^T."""
        k, kk, v, vv = k / tokens, kk / tokens, v / tokens, vv / tokens
        return cls(k, kk, v, vv, torch.addcmul(vk / tokens, v[..., :, None], k[..., None, :], value=-1))

    def deviations(self) -> tuple[Tensor, Tensor]:
        """Standard deviations of k and of v, [B, H, D]; never zero."""
        pairs = (self.k_mean, self.k_square), (self.v_mean, self.v_square)
        k, v = (torch.addcmul(square, mean, mean, value=-1).clamp_min(_TINY).sqrt() for mean, square in pairs)
        return k, v


class Steps(NamedTuple):
    """The work around the attention; plain torch here, Triton in `fp8_triton`."""

    moments: Callable[[Tensor, Tensor], Moments]
    quantise: Callable[[Tensor, Tensor | None, Tensor, Tensor | None], Tensor]
    finish: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def moments(k: Tensor, v: Tensor) -> Moments:
    """Of k, v [B, L, H, D], float8 or not."""
    k32, v32 = k.float(), v.float()
    sums = k32.sum(1), (k32 * k32).sum(1), v32.sum(1), (v32 * v32).sum(1), torch.einsum("blhe,blhd->bhed", v32, k32)
    return Moments.of_sums(k.shape[1], *sums)


def quantise(x: Tensor, shift: Tensor | None, factor: Tensor, rotation: Tensor | None) -> Tensor:
    """float8 of ((x - shift) * factor) @ rotation; x [B, S, H, D], shift and factor [B, H, D], rotation [D, D] or None."""
    x = x.float() if shift is None else x.float() - shift[:, None]
    x = x * factor[:, None]
    if rotation is not None:
        x = x @ rotation.float()
    return x.clamp(-LARGEST, LARGEST).to(FLOAT8)


def finish(out: Tensor, scale: Tensor, bias: Tensor, q: Tensor, matrix: Tensor) -> Tensor:
    """out * scale + bias + q @ matrix in q's dtype; out, q [B, S, H, D], scale, bias [B, H, D], matrix [B, H, D, D]."""
    linear = torch.einsum("bshd,bhde->bshe", q.float(), matrix)
    return (out.float() * scale[:, None] + bias[:, None] + linear).to(q.dtype).contiguous()


def hadamard(size: int) -> Tensor:
    """The orthonormal Hadamard matrix of a power of two, float32; it is symmetric and its own inverse."""
    if size < 1 or size & (size - 1):
        raise ValueError(f"a Hadamard matrix of {size}: a power of two would do")
    matrix = torch.ones(1, 1)
    while matrix.shape[0] < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)], 0)
    return matrix / math.sqrt(size)


@cache
def hadamard_on(device: torch.device, size: int) -> Tensor:
    """`hadamard`, moved there once: a copy to a GPU makes the host wait."""
    return hadamard(size).to(device)


def emulated(q: Tensor, k: Tensor, v: Tensor, q_descale: Tensor, k_descale: Tensor) -> tuple[Tensor, Tensor]:
    """What FlashAttention-3 makes of float8 q, k, v: weights rounded to float8 as well, sums and products in float32.

    It takes the largest score of a row where the kernel takes the largest so far, which float8's steps do not tell apart
    short of underflow, and knows nothing of the bits that tensor cores drop.

    Args:
        q, k, v: [B, S, H, D], [B, L, H, D], [B, L, H, D], float8.
        q_descale, k_descale: [B, H].

    Returns:
        out [B, S, H, D] float32 and lse [B, H, S].
    """
    factor = (q_descale * k_descale)[..., None, None] / math.sqrt(q.shape[-1])
    q32, k32, v32 = (x.float().transpose(1, 2) for x in (q, k, v))
    outs, lses = [], []
    for rows in torch.split(q32, _ROWS, dim=2):
        scores = (rows @ k32.mT) * factor
        largest = scores.amax(-1, keepdim=True)
        weights = (scores - largest).exp() * _P_SCALE
        total = weights.sum(-1, keepdim=True)
        outs.append(weights.to(FLOAT8).float() @ v32 / total)
        lses.append((total.log() - math.log(_P_SCALE) + largest)[..., 0])
    return torch.cat(outs, 2).transpose(1, 2), torch.cat(lses, 2)


PLAIN = Steps(moments, quantise, finish)


def attend(q: Tensor, k: Tensor, v: Tensor, q_descale: Tensor, k_descale: Tensor) -> tuple[Tensor, Tensor]:
    """FlashAttention-3 on float8 q, k, v [B, S, H, D]; descales [B, H]. Emulated off a GPU. Returns out and lse [B, H, S]."""
    if q.device.type != "cuda":
        return emulated(q, k, v, q_descale, k_descale)
    from fa3_fwd_interface import flash_attn_func

    out, lse = flash_attn_func(q, k, v, q_descale=q_descale, k_descale=k_descale, return_attn_probs=True)
    return out, lse


def steps_on(device: torch.device) -> Steps:
    """Triton's on a GPU, plain torch's elsewhere."""
    if device.type != "cuda":
        return PLAIN
    from chitu_diffusion.attention import fp8_triton

    return fp8_triton.STEPS


def mean_square(q: Tensor) -> Tensor:
    """Of q [B, S, H, D] over tokens, [B, H, D] float32; of a sample of them where there are many."""
    sample = q[:, :: _SAMPLE if q.shape[1] >= 64 * _SAMPLE else 1]
    return torch.linalg.vector_norm(sample, dim=1, dtype=torch.float32).square() / sample.shape[1]  # one pass


def attend_in_fp8(q: Tensor, k: Tensor, v: Tensor, with_lse: bool, steps: Steps) -> tuple[Tensor, Tensor]:
    """Attention as the head of this file tells; out [B, S, H, D] in q's dtype and lse [B, H, S] float32, or empty."""
    channels = q.shape[-1]
    rotation = hadamard_on(q.device, channels)
    exact = steps.moments(k, v)
    q_rms, (k_rms, v_rms) = mean_square(q).clamp_min(_TINY).sqrt(), exact.deviations()
    balance = (k_rms / q_rms).sqrt()
    both = (q_rms * k_rms).mean(-1).sqrt()  # [B, H], of q's and k's channels after balancing
    q_factor, k_factor = balance * (_RMS / both)[..., None], (_RMS / both)[..., None] / balance
    q8 = steps.quantise(q, None, q_factor, rotation)
    k8 = steps.quantise(k, exact.k_mean, k_factor, rotation)
    v8 = steps.quantise(v, exact.v_mean, _RMS / v_rms, None)
    rounded = steps.moments(k8, v8)
    descale, v_scale = both / _RMS, v_rms / _RMS
    out, lse = attend(q8, k8, v8, descale, descale)
    # cov(k, v) from the rounded ones, in the channels of q: [B, H, D of k, D of v]
    given = rotation @ rounded.vk.mT * v_scale[..., None, :] * (descale**2)[..., None, None] * q_factor[..., :, None]
    matrix = (exact.vk.mT - given) / math.sqrt(channels)
    out = steps.finish(out, v_scale, exact.v_mean - v_scale * rounded.v_mean, q, matrix)
    if not with_lse:
        return out, lse.new_empty((0,))
    taken = torch.einsum("bshd,bhd->bhs", q.float(), exact.k_mean / math.sqrt(channels))
    return out, lse + taken


@torch.library.custom_op("chitu::fa3_fp8", mutates_args=())
def fa3_fp8_op(q: Tensor, k: Tensor, v: Tensor, with_lse: bool) -> tuple[Tensor, Tensor]:
    """q [B, S, H, D], k, v [B, L, H, D] -> out [B, S, H, D], lse [B, H, S] float32, empty if it is not asked for."""
    return attend_in_fp8(q, k, v, with_lse, steps_on(q.device))


@fa3_fp8_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, with_lse: bool) -> tuple[Tensor, Tensor]:
    batch, tokens, heads, _ = q.shape
    shape = (batch, heads, tokens) if with_lse else (0,)
    return torch.empty(q.shape, dtype=q.dtype, device=q.device), q.new_empty(shape, dtype=torch.float32)


def _fa3_fp8_with_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    out, lse = fa3_fp8_op(q, k, v, True)
    return out, lse.transpose(1, 2)


def _fa3_fp8(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return fa3_fp8_op(q, k, v, False)[0]


fa3_fp8 = AttentionKernel(
    "fa3_fp8",
    exact=False,
    run=_fa3_fp8,
    run_with_lse=_fa3_fp8_with_lse,
    needs=Needs(("cuda",), (torch.bfloat16,), head_dim_step=64, head_dim_most=128, compute=((9, 0), (9, 9)), package=FA3),
)
