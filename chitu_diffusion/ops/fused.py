"""What stands between the matrix products of a transformer block: norms, gates, rotary turns, GELU, rounding
to 8 bits.

Each function is plain torch, and with `fused=True` one Triton kernel that reads and writes every number once
(`chitu_diffusion.ops.fused_triton`). Both work in float32 and round where diffusers rounds: the stream after
a residual, q and k after their norm and again after the turn. They differ by the order of float32 sums alone:
some 1e-7 before the last rounding, so that one result in some hundreds falls to the neighbouring bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from chitu_diffusion.ops.custom_op import operator

FLOAT8 = torch.float8_e4m3fn
FLOAT8_MAX = 448.0
"""Largest number of 4 exponent and 3 mantissa bits (e4m3fn)."""
_ONEDNN = torch.backends.mkldnn.is_available()
_SMALLEST_AMAX = 1e-12
"""A row of zeros gets this as its largest magnitude, so that nothing is divided by zero."""

HAS_TRITON = find_spec("triton") is not None
"""Whether Triton can be imported; torch for CUDA brings it along."""
if HAS_TRITON:
    from chitu_diffusion.ops import fused_triton

Affine = tuple[Tensor, Tensor]
"""(weight, bias) after a norm, each [dim] or [B, R, dim]: R is 1 or, with a `split`, 2."""


class Float8Rows(NamedTuple):
    """Rows rounded to 8 bits: `values` [..., dim] float8_e4m3fn times `scale` [..., 1] float32."""

    values: Tensor
    scale: Tensor

    def widened(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The rows as [..., dim] of `dtype`."""
        return (self.values.float() * self.scale).to(dtype)


def can_fuse(x: Tensor) -> bool:
    """Whether the kernels can run on x: a GPU with Triton, and no gradient wanted (they have none)."""
    return HAS_TRITON and x.is_cuda and not torch.is_grad_enabled()


def quantise(x: Tensor, *, fused: bool = False) -> Float8Rows:
    """x [..., dim] in 8 bits with one scale a row, so that the row's largest magnitude becomes 448."""
    if fused:
        return Float8Rows(*fused_triton.activation(x, None, False, True))
    rows = x.float()
    scale = rows.abs().amax(dim=-1, keepdim=True).clamp(min=_SMALLEST_AMAX) / FLOAT8_MAX
    return Float8Rows((rows * (1.0 / scale)).clamp(-FLOAT8_MAX, FLOAT8_MAX).to(FLOAT8), scale)


def layer_norm(
    x: Tensor,
    affine: Affine | None,
    eps: float,
    dtype: torch.dtype,
    *,
    float8: bool = False,
    fused: bool = False,
    split: int = 0,
) -> Tensor | Float8Rows:
    """LayerNorm of x [B, S, dim] in float32, then weight and bias, rounded once.

    Args:
        x: any float dtype.
        affine: a norm's own parameters [dim], or a modulation (1 + scale, shift) [B, R, dim].
        eps: added to the variance.
        dtype: of the result.
        float8: return `Float8Rows`, rounded from float32, in place of a tensor of `dtype`.
        fused: one kernel in place of several.
        split: of a modulation of two rows, how many of the S tokens have the first.
    """
    if fused:
        weight, bias = affine or (None, None)
        _, normed, scale = fused_triton.residual_norm(
            x, None, None, weight, bias, eps, dtype, True, float8, split
        )
        return Float8Rows(normed, scale) if float8 else normed
    if affine is None or affine[0].ndim == 1:
        weight, bias = (None, None) if affine is None else (affine[0].float(), affine[1].float())
        y = F.layer_norm(x.float(), x.shape[-1:], weight, bias, eps)
    else:
        y = F.layer_norm(x.float(), x.shape[-1:], None, None, eps)
        y = _row_by_row(lambda part, weight, bias: part * weight + bias, y, affine, split)
    return quantise(y) if float8 else y.to(dtype)


def add_gated(
    x: Tensor, added: Tensor, gate: Tensor | None, *, fused: bool = False, split: int = 0
) -> Tensor:
    """x + added * gate, summed in float32 and rounded once to x's dtype.

    Args:
        x, added: [B, S, dim].
        gate: [B, R, dim] float32, R as of `Affine`; None adds as it is.
        fused: one kernel in place of several.
        split: see `layer_norm`.
    """
    if fused:
        return fused_triton.residual_norm(x, added, gate, None, None, 0.0, x.dtype, False, False, split)[0]
    if gate is None:
        return x + added.to(x.dtype)  # the same bits as in float32: one sum, one rounding
    return (x.float() + _row_by_row(torch.mul, added.float(), (gate,), split)).to(x.dtype)


def add_gated_norm(
    x: Tensor,
    added: Tensor,
    gate: Tensor | None,
    affine: Affine | None,
    eps: float,
    dtype: torch.dtype,
    *,
    float8: bool = False,
    fused: bool = False,
    split: int = 0,
) -> tuple[Tensor, Tensor | Float8Rows]:
    """`add_gated`, and the `layer_norm` of its result: (the new stream [B, S, dim], its norm)."""
    if fused:
        weight, bias = affine or (None, None)
        stream, normed, scale = fused_triton.residual_norm(
            x, added, gate, weight, bias, eps, dtype, True, float8, split
        )
        return stream, Float8Rows(normed, scale) if float8 else normed
    stream = add_gated(x, added, gate, split=split)
    return stream, layer_norm(stream, affine, eps, dtype, float8=float8, split=split)


def _row_by_row(
    apply: Callable[..., Tensor], x: Tensor, parameters: tuple[Tensor, ...], split: int
) -> Tensor:
    """`apply` to x [B, S, dim] and parameters of one row [B, 1, dim] each; of two rows the first `split`
    tokens get the first, the others the last.
    """
    if parameters[0].shape[1] == 1:
        return apply(x, *parameters)
    first = apply(x[:, :split], *(rows[:, :1] for rows in parameters))
    return torch.cat([first, apply(x[:, split:], *(rows[:, 1:] for rows in parameters))], dim=1)


def norm_and_rotate(
    q: Tensor,
    k: Tensor,
    weights: tuple[Tensor, Tensor],
    eps: float,
    rope: tuple[Tensor, Tensor],
    heads: int,
    *,
    fused: bool = False,
) -> tuple[Tensor, Tensor]:
    """RMSNorm over all heads of q and k, rounded, then each neighbouring pair of channels turned by its
    token's angles.

    Args:
        q, k: [B, S, heads * head_dim].
        weights: of the two norms, [heads * head_dim].
        eps: added to the mean square.
        rope: (cos, sin), each [S, head_dim / 2] float32.
        heads: how many.
        fused: one kernel for both.

    Returns:
        q and k [B, S, heads, head_dim], in their own dtypes.
    """
    if fused:
        q, k = fused_triton.qk_norm_rotate(q, k, *weights, *rope, eps)
        return q.unflatten(2, (heads, -1)), k.unflatten(2, (heads, -1))
    q, k = (
        F.rms_norm(x, x.shape[-1:], weight.to(x.dtype), eps)
        for x, weight in zip((q, k), weights, strict=True)
    )
    return rotate(q.unflatten(2, (heads, -1)), rope), rotate(k.unflatten(2, (heads, -1)), rope)


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Turns each neighbouring pair of channels of x [B, S, heads, D] by its token's angles; in float32."""
    if x.device.type == "cpu":
        # the same products and sums in one pass, as complex numbers, for which a compiler for GPUs has no
        # code
        turns = torch.complex(*rope)[:, None, :]  # [S, 1, head_dim / 2]
        return (
            torch.view_as_real(torch.view_as_complex(x.float().unflatten(-1, (-1, 2))) * turns)
            .flatten(-2)
            .to(x.dtype)
        )
    cos, sin = (part[:, None, :] for part in rope)  # [S, 1, head_dim / 2]
    even, odd = x.float().reshape(*x.shape[:-1], -1, 2).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).to(x.dtype)


def gelu(
    x: Tensor, bias: Tensor | None = None, *, float8: bool = False, fused: bool = False
) -> Tensor | Float8Rows:
    """tanh-approximated GELU ("Gaussian Error Linear Units", arXiv:1606.08415) of x [..., dim] + bias [dim].

    The sum is rounded to x's dtype first, as a matrix product with bias hands it out. The result has x's
    dtype, or (`float8`) is `Float8Rows`, rounded from float32.
    """
    if fused:
        values, scale = fused_triton.activation(x, bias, True, float8)
        return Float8Rows(values, scale) if float8 else values
    if bias is not None:
        x = (x.float() + bias.float()).to(x.dtype)
    return quantise(F.gelu(x.float(), approximate="tanh")) if float8 else F.gelu(x, approximate="tanh")


def has_linear_gelu(x: Tensor, weight: Tensor, fused: bool) -> bool:
    """Whether `linear_gelu` can run: cuBLASLt on a GPU (asked for by `fused`), oneDNN on a CPU in float32.

    Neither knows gradients or autocast. The compiler has code for cuBLASLt's alone.
    """
    if torch.is_grad_enabled() or x.dtype != weight.dtype:
        return False
    if x.is_cuda:
        return fused
    if torch.compiler.is_compiling():
        return False
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and _ONEDNN
        and not torch.is_autocast_enabled("cpu")
    )


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """GELU of x [..., in] times weight [out, in] plus bias, inside the matrix product: [..., out].

    Against the product and then the GELU it saves a read and a write of [..., out], and in 16 bits one
    rounding. On a CPU the GELU alone would take as long as the product.
    """
    if x.is_cuda:
        return _linear_gelu_cuda(x, weight, bias)
    return cast(Tensor, torch.ops.mkldnn._linear_pointwise(x, weight, bias, "gelu", [], "tanh"))


@operator("chitu_diffusion::linear_gelu", schema="(Tensor x, Tensor weight, Tensor bias) -> Tensor")
def _linear_gelu_cuda(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    # on CUDA, and there alone, its GELU is the tanh-approximated one
    y = torch._addmm_activation(bias, x.flatten(0, -2), weight.t(), use_gelu=True)
    return y.unflatten(0, x.shape[:-1])


@_linear_gelu_cuda.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))
