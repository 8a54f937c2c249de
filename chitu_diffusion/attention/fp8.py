"""FlashAttention-3 in float8, with what makes its inputs fit for float8 taken out first and put back after.
Lossy.

float8_e4m3 keeps three bits behind the point: each number is off by 2.65 % (root mean square), at any scale.
So no scale helps; what helps is to hand over small numbers where large ones cancel. All of it is exact in
real numbers (per batch and head; i is a query, j one of L keys, D the channels of a head):

1. k loses its mean over tokens: every score of a query changes by the same q_i . mean(k), which the softmax
   does not see and the log-sum-exp gets back.
2. channel c of q is multiplied and that of k divided by a_c = (var(k_c) / mean(q_c^2))^(1/4), which makes
   both equally large: the products stay, the sum of |q_c| |k_c|, to which the error is proportional, is the
   least that such scaling can give.
3. q and k are turned by a Hadamard matrix over D, which spreads what is left of outlying channels over all of
  them.
4. v loses its mean, which the output gets back, because the weights sum to 1. This also keeps the
   accumulators of the tensor cores, which drop low bits as they grow, near zero.
5. Of softmax(s) the part linear in s is known in closed form: (1 / L) sum_j (v_j - mean v) (k_j - mean k)^T
   q_i / sqrt(D), one D x D matrix a head. What rounding k and v did to that matrix is put right (a control
   variate). What rounding q did is left: where attention is sharp, the few keys that matter have another
   matrix than all, and a correction by that of all does harm.

Relative error, plain float8 and so: Gaussian q, k, v 5.3 and 4.5 %; k with a mean eight times as large as
what varies 22 and 4.5 %; q, k, v of wan-tiny's trained layers 4.3 and 2.5 %. The sharper the attention, the
less step 5 gives; scores of standard deviation 2 between independent q and k stay at 7.8 %. Rotation after
QuaRot (arXiv:2404.00456), mean of k after SageAttention (arXiv:2410.02367).

On a CPU the same steps run in plain torch, and the attention between them is emulated.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

from chitu_diffusion.attention.fa3 import FA3
from chitu_diffusion.attention.fp8_steps import (
    FLOAT8,
    LARGEST,
    RMS,
    TINY,
    Means,
    Rounded,
    Scales,
    Steps,
    hadamard,
    sample,
)
from chitu_diffusion.attention.kernels import AttentionKernel, dense
from chitu_diffusion.attention.requirements import Requirements
from chitu_diffusion.ops.custom_op import operator

_P_SCALE = 256.0
"""FlashAttention-3's largest weight before rounding."""
_ROWS = 1024


def measure(q: Tensor, k: Tensor, v: Tensor) -> Means:
    """Of q [B, S, H, D], k, v [B, L, H, D]."""
    q32 = sample(q).float()
    k32 = k.float()
    v32 = v.float()
    rows = torch.stack([x.mean(1) for x in (q32 * q32, k32, k32 * k32, v32, v32 * v32)], 2)
    return Means(rows[:, :, None], _mean_product(k32, v32))


def _mean_product(k: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("blhd,blhe->bhde", k, v)[:, :, None] / k.shape[1]


def scale(means: Means) -> Scales:
    """Factors that make q and k equally large and give q8, k8, v8 a root mean square of 2; none is zero."""
    q_square, k_mean, k_square, v_mean, v_square = means.rows.sum(2).movedim(2, 0).contiguous().unbind()
    channels = q_square.shape[-1]
    q_rms = q_square.clamp_min(TINY).sqrt()
    k_rms, v_rms = ((y - x * x).clamp_min(TINY).sqrt() for x, y in ((k_mean, k_square), (v_mean, v_square)))
    balance = (k_rms / q_rms).sqrt()
    descale = (q_rms * k_rms).mean(-1).sqrt() / RMS  # of q's and k's channels after balancing
    # in 16 bits, which take k as it is; q_factor makes up for what that rounds. The matrix's first column is
    # 1 / sqrt(D)
    k_turn = (hadamard_on(balance.device, channels) / (balance * descale[..., None])[..., None]).bfloat16()
    q_factor = 1 / (k_turn[..., 0].float() * descale[..., None] ** 2 * math.sqrt(channels))
    k_shift = (k_mean[..., None, :] @ k_turn.float())[..., 0, :]
    return Scales(k_mean, v_mean, q_factor, k_turn, k_shift, RMS / v_rms, descale)


def rounded(x: Tensor) -> Tensor:
    """x in float8, what is too large cut off."""
    return x.clamp(-LARGEST, LARGEST).to(FLOAT8)


def quantise_q(q: Tensor, scales: Scales) -> Tensor:
    """q8 of `Scales`, [B, S, H, D]."""
    return rounded(q.float() * scales.q_factor[:, None] @ hadamard_on(q.device, q.shape[-1]))


def quantise_kv(k: Tensor, v: Tensor, scales: Scales) -> Rounded:
    """k8 and v8 of `Scales`, [B, L, H, D], and their means."""
    k8 = rounded(torch.einsum("blhd,bhdt->blht", k.float() - scales.k_mean[:, None], scales.k_turn.float()))
    v8 = rounded((v.float() - scales.v_mean[:, None]) * scales.v_factor[:, None])
    return Rounded(k8, v8, v8.float().mean(1)[:, :, None], _mean_product(k8.float(), v8.float()))


def correct(means: Means, scales: Scales, given: Rounded) -> tuple[Tensor, Tensor]:
    """bias [B, H, D of v] and matrix [B, H, D of q, D of v] such that bias + q matrix makes up for what
    rounding k and v did.
    """
    channels = scales.k_mean.shape[-1]
    exact = means.product.sum(2) - scales.k_mean[..., :, None] * scales.v_mean[..., None, :]  # cov(k, v)
    # the same from k8 and v8, turned back: k_turn is q_factor's inverse, turned, over descale^2
    found = hadamard_on(exact.device, channels) @ given.product.sum(2)
    found = (
        (scales.q_factor * scales.descale[..., None] ** 2)[..., :, None]
        * found
        / scales.v_factor[..., None, :]
    )
    return scales.v_mean - given.v_mean.sum(2) / scales.v_factor, (exact - found) / math.sqrt(channels)


def finish(
    out: Tensor, lse: Tensor | None, q: Tensor, scales: Scales, bias: Tensor, matrix: Tensor
) -> tuple[Tensor, Tensor]:
    """out / v_factor + bias + q @ matrix in q's dtype, and lse + q . k_mean / sqrt(D).

    out, q are [B, S, H, D], lse is [B, H, S], or None, which comes back as an empty tensor; bias and matrix
    as of `correct`.
    """
    linear = torch.einsum("bshd,bhde->bshe", q.float(), matrix)
    whole = (out.float() / scales.v_factor[:, None] + bias[:, None] + linear).to(q.dtype).contiguous()
    if lse is None:
        return whole, bias.new_empty((0,))
    return whole, lse + torch.einsum("bshd,bhd->bhs", q.float(), scales.k_mean / math.sqrt(q.shape[-1]))


@cache
def hadamard_on(device: torch.device, size: int) -> Tensor:
    """`hadamard`, moved there once: a copy to a GPU makes the host wait."""
    return hadamard(size).to(device)


def emulated(q: Tensor, k: Tensor, v: Tensor, q_descale: Tensor, k_descale: Tensor) -> tuple[Tensor, Tensor]:
    """What FlashAttention-3 makes of float8 q, k, v: weights rounded to float8 as well, sums and products in
    float32.

    It takes the largest score of a row where the kernel takes the largest so far, which float8's steps do not
    tell apart short of underflow, and knows nothing of the bits that tensor cores drop.

    Args:
        q, k, v: [B, S, H, D], [B, L, H, D], [B, L, H, D], float8.
        q_descale, k_descale: [B, H].

    Returns:
        out [B, S, H, D] float32 and lse [B, H, S].
    """
    factor = (q_descale * k_descale)[..., None, None] / math.sqrt(q.shape[-1])
    q32, k32, v32 = (x.float().transpose(1, 2) for x in (q, k, v))
    outs = []
    lses = []
    for rows in torch.split(q32, _ROWS, dim=2):
        scores = (rows @ k32.mT) * factor
        largest = scores.amax(-1, keepdim=True)
        weights = (scores - largest).exp() * _P_SCALE
        total = weights.sum(-1, keepdim=True)
        outs.append(weights.to(FLOAT8).float() @ v32 / total)
        lses.append((total.log() - math.log(_P_SCALE) + largest)[..., 0])
    return torch.cat(outs, 2).transpose(1, 2), torch.cat(lses, 2)


PLAIN = Steps(measure, scale, quantise_q, quantise_kv, correct, finish)


def attend(q: Tensor, k: Tensor, v: Tensor, q_descale: Tensor, k_descale: Tensor) -> tuple[Tensor, Tensor]:
    """FlashAttention-3 on float8 q, k, v [B, S, H, D]; descales [B, H]. Emulated off a GPU. Returns out and
    lse [B, H, S].
    """
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


def attend_in_fp8(q: Tensor, k: Tensor, v: Tensor, with_lse: bool, steps: Steps) -> tuple[Tensor, Tensor]:
    """Attention as this file's head tells; out [B, S, H, D] in q's dtype, lse [B, H, S] float32 or empty."""
    means = steps.measure(q, k, v)
    scales = steps.scale(means)
    q8 = steps.quantise_q(q, scales)
    given = steps.quantise_kv(k, v, scales)
    bias, matrix = steps.correct(means, scales, given)
    out, lse = attend(q8, given.k, given.v, scales.descale, scales.descale)
    return steps.finish(out, lse if with_lse else None, q, scales, bias, matrix)


@operator("chitu::fa3_fp8")
def fa3_fp8_op(q: Tensor, k: Tensor, v: Tensor, with_lse: bool) -> tuple[Tensor, Tensor]:
    """q [B, S, H, D], k, v [B, L, H, D] -> out [B, S, H, D], lse [B, H, S] float32, empty if it is not asked
    for.
    """
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
    run=dense(_fa3_fp8),
    run_with_lse=dense(_fa3_fp8_with_lse),
    requires=Requirements(
        ("cuda",),
        (torch.bfloat16,),
        head_dim_step=64,
        head_dim_most=128,
        compute=((9, 0), (9, 9)),
        package=FA3,
    ),
)
