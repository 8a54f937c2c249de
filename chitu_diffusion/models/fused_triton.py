"""Triton kernels for what stands between the matrix products of a transformer block: one read and one write each.

One program takes a few whole rows (tokens) and holds their channels in registers; arithmetic is float32. What the kernels
compute, and the plain torch that says the same, stands in `chitu_diffusion.models.fused`; this file only launches them,
as operators that `torch.compile` takes as they are. It needs Triton; on a CPU it runs in Triton's interpreter
(TRITON_INTERPRET=1), which is for tests.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

FLOAT8 = torch.float8_e4m3fn
FLOAT8_MAX = 448.0
"""Largest number of 4 exponent and 3 mantissa bits (e4m3fn)."""
SMALLEST_AMAX = 1e-12
"""A row of zeros gets this as its largest magnitude, so that nothing is divided by zero."""


@triton.jit
def _store_row(target, scale, row, at, y, inside, FLOAT8_TOP: tl.constexpr, FLOOR: tl.constexpr, QUANTISE: tl.constexpr):
    # y [BLOCK] float32, zero outside; `inside` is false for a row past the end
    if QUANTISE:
        step = tl.maximum(tl.max(tl.abs(y), axis=0), FLOOR) / FLOAT8_TOP
        y = tl.minimum(tl.maximum(y * (1.0 / step), -FLOAT8_TOP), FLOAT8_TOP)
        # the first channel's mask stands for the row's
        tl.store(scale + row, step, mask=tl.max(inside.to(tl.int32), axis=0) > 0)
    tl.store(target + at, y.to(target.dtype.element_ty), mask=inside)


@triton.jit
def _residual_norm(
    x,
    added,
    gate,
    weight,
    bias,
    stream,
    normed,
    scale,
    rows,
    dim,
    gate_stride,
    weight_stride,
    bias_stride,
    eps,
    ADD: tl.constexpr,
    GATE: tl.constexpr,
    NORM: tl.constexpr,
    AFFINE: tl.constexpr,
    QUANTISE: tl.constexpr,
    FLOAT8_TOP: tl.constexpr,
    FLOOR: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    batch = tl.program_id(1)
    channel = tl.arange(0, BLOCK)
    real = channel < dim
    for turn in range(ROWS):
        own = tl.program_id(0) * ROWS + turn
        inside = real & (own < rows)
        row = batch.to(tl.int64) * rows + own
        at = row * dim + channel
        value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        if ADD:
            more = tl.load(added + at, mask=inside, other=0.0).to(tl.float32)
            if GATE:
                more *= tl.load(gate + batch * gate_stride + channel, mask=real, other=0.0).to(tl.float32)
            value += more
            rounded = value.to(stream.dtype.element_ty)
            tl.store(stream + at, rounded, mask=inside)
            value = rounded.to(tl.float32)  # the norm sees what the stream keeps
        if NORM:
            mean = tl.sum(value, axis=0) / dim
            centred = tl.where(inside, value - mean, 0.0)
            y = centred * (1.0 / tl.sqrt(tl.sum(centred * centred, axis=0) / dim + eps))
            if AFFINE:
                w = tl.load(weight + batch * weight_stride + channel, mask=real, other=0.0).to(tl.float32)
                y = y * w + tl.load(bias + batch * bias_stride + channel, mask=real, other=0.0).to(tl.float32)
            _store_row(normed, scale, row, at, y, inside, FLOAT8_TOP, FLOOR, QUANTISE)


@triton.jit
def _normed_rotated(x, weight, out, at, channel, inside, real, cos, sin, dim, eps, BLOCK: tl.constexpr):
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(weight + channel, mask=real, other=0.0).to(tl.float32)
    y = value * (1.0 / tl.sqrt(tl.sum(value * value, axis=0) / dim + eps)) * w
    y = y.to(out.dtype.element_ty).to(tl.float32)  # the norm is rounded before the turn
    even, odd = tl.split(tl.reshape(y, (BLOCK // 2, 2)))
    turned = tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), (BLOCK,))
    tl.store(out + at, turned.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _qk_norm_rotate(
    q,
    k,
    q_weight,
    k_weight,
    cos,
    sin,
    q_out,
    k_out,
    rows,
    dim,
    half,
    eps,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    batch = tl.program_id(1)
    channel, pair = tl.arange(0, BLOCK), tl.arange(0, BLOCK // 2)
    real = channel < dim
    for turn in range(ROWS):
        own = tl.program_id(0) * ROWS + turn
        inside = real & (own < rows)
        known = (pair < dim // 2) & (own < rows)
        angle = own.to(tl.int64) * half + pair % half  # every head turns alike
        c = tl.load(cos + angle, mask=known, other=0.0)
        s = tl.load(sin + angle, mask=known, other=0.0)
        at = (batch.to(tl.int64) * rows + own) * dim + channel
        _normed_rotated(q, q_weight, q_out, at, channel, inside, real, c, s, dim, eps, BLOCK)
        _normed_rotated(k, k_weight, k_out, at, channel, inside, real, c, s, dim, eps, BLOCK)


@triton.jit
def _activation(
    x,
    bias,
    out,
    scale,
    dim,
    BIAS: tl.constexpr,
    GELU: tl.constexpr,
    QUANTISE: tl.constexpr,
    FLOAT8_TOP: tl.constexpr,
    FLOOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    channel = tl.arange(0, BLOCK)
    inside = channel < dim
    row = tl.program_id(0).to(tl.int64)
    at = row * dim + channel
    y = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if BIAS:
        y += tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
        y = y.to(x.dtype.element_ty).to(tl.float32)  # as a matrix product with bias would hand it out
    if GELU:
        # 0.5 y (1 + tanh u) = y / (1 + exp(-2 u)), u = sqrt(2 / pi) (y + 0.044715 y^3)
        y = y / (1.0 + tl.exp(-1.5957691216057308 * (y + 0.044715 * y * y * y)))
    _store_row(out, scale, row, at, y, inside, FLOAT8_TOP, FLOOR, QUANTISE)


@torch.library.custom_op(
    "chitu_diffusion::residual_norm",
    mutates_args=(),
    schema="(Tensor x, Tensor? added, Tensor? gate, Tensor? weight, Tensor? bias, float eps, ScalarType dtype, bool norm, "
    "bool quantise) -> (Tensor, Tensor, Tensor)",
)
def residual_norm(
    x: Tensor,
    added: Tensor | None,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    norm: bool,
    quantise: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """LayerNorm of x + added * gate, times weight plus bias.

    Args:
        x, added: [B, S, dim].
        gate: [B, 1, dim], or None for one.
        weight, bias: [dim] or [B, 1, dim], both or neither.
        eps: of the norm.
        dtype: of the normed rows, unless they are quantised.
        norm: False leaves at the sum.
        quantise: whether the normed rows are float8 with one scale each.

    Returns:
        (the sum in x's dtype, the normed rows, their scales [B, S, 1] float32); what was not asked for is empty.
    """
    x, batch, rows, dim = x.contiguous(), *x.shape
    stream, normed, scale = _outputs(x, added, dtype, norm, quantise)
    gate = None if gate is None else _by_batch(gate, batch)
    weight, bias = (None if each is None else _by_batch(each, batch) for each in (weight, bias))
    block, per_program, options = launch(dim)
    with _on(x):
        _residual_norm[(triton.cdiv(rows, per_program), batch)](
            x,
            x if added is None else added.contiguous(),
            x if gate is None else gate,
            x if weight is None else weight,
            x if bias is None else bias,
            stream,
            normed,
            scale,
            rows,
            dim,
            0 if gate is None else gate.stride(0),
            0 if weight is None else weight.stride(0),
            0 if bias is None else bias.stride(0),
            eps,
            ADD=added is not None,
            GATE=gate is not None,
            NORM=norm,
            AFFINE=weight is not None,
            QUANTISE=quantise,
            FLOAT8_TOP=FLOAT8_MAX,
            FLOOR=SMALLEST_AMAX,
            BLOCK=block,
            ROWS=per_program,
            **options,
        )
    return stream, normed, scale


@residual_norm.register_fake
def _(
    x: Tensor,
    added: Tensor | None,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    norm: bool,
    quantise: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return _outputs(x, added, dtype, norm, quantise)


@torch.library.custom_op(
    "chitu_diffusion::qk_norm_rotate",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor q_weight, Tensor k_weight, Tensor cos, Tensor sin, float eps) -> (Tensor, Tensor)",
)
def qk_norm_rotate(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """RMSNorm over all heads of q and of k [B, S, dim], then the turn of neighbouring channels by cos, sin [S, head_dim / 2].

    Returns:
        q and k [B, S, dim], each in its own dtype.
    """
    batch, rows, dim = q.shape
    q, k = q.contiguous(), k.contiguous()
    q_out, k_out = torch.empty_like(q), torch.empty_like(k)
    block, per_program, options = launch(dim)
    with _on(q):
        _qk_norm_rotate[(triton.cdiv(rows, per_program), batch)](
            q,
            k,
            q_weight,
            k_weight,
            cos.contiguous(),
            sin.contiguous(),
            q_out,
            k_out,
            rows,
            dim,
            cos.shape[-1],
            eps,
            BLOCK=block,
            ROWS=per_program,
            **options,
        )
    return q_out, k_out


@qk_norm_rotate.register_fake
def _(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return _like(q, q.dtype), _like(k, k.dtype)


@torch.library.custom_op(
    "chitu_diffusion::activation",
    mutates_args=(),
    schema="(Tensor x, Tensor? bias, bool gelu, bool quantise) -> (Tensor, Tensor)",
)
def activation(x: Tensor, bias: Tensor | None, gelu: bool, quantise: bool) -> tuple[Tensor, Tensor]:
    """tanh-approximated GELU of x [..., dim] + bias [dim], or (gelu False) the sum itself.

    Returns:
        (rows in x's dtype, or float8 with `quantise`; their scales [..., 1] float32, or nothing).
    """
    x, dim = x.contiguous(), x.shape[-1]
    out, scale = _like(x, FLOAT8 if quantise else x.dtype), _scales(x, quantise)
    block, _, options = launch(dim)
    with _on(x):
        _activation[(x.numel() // dim,)](
            x,
            x if bias is None else bias,
            out,
            scale,
            dim,
            BIAS=bias is not None,
            GELU=gelu,
            QUANTISE=quantise,
            FLOAT8_TOP=FLOAT8_MAX,
            FLOOR=SMALLEST_AMAX,
            BLOCK=block,
            **options,
        )
    return out, scale


@activation.register_fake
def _(x: Tensor, bias: Tensor | None, gelu: bool, quantise: bool) -> tuple[Tensor, Tensor]:
    return _like(x, FLOAT8 if quantise else x.dtype), _scales(x, quantise)


def _like(x: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(x.shape, dtype=dtype, device=x.device)


def _scales(x: Tensor, quantise: bool) -> Tensor:
    return torch.empty((*x.shape[:-1], 1) if quantise else (0,), dtype=torch.float32, device=x.device)


def _outputs(x: Tensor, added: Tensor | None, dtype: torch.dtype, norm: bool, quantise: bool) -> tuple[Tensor, Tensor, Tensor]:
    nothing = (0,)
    stream = torch.empty(nothing if added is None else x.shape, dtype=x.dtype, device=x.device)
    normed = torch.empty(x.shape if norm else nothing, dtype=FLOAT8 if quantise else dtype, device=x.device)
    return stream, normed, _scales(x, norm and quantise)


def _by_batch(x: Tensor, batch: int) -> Tensor:
    """[dim], [1, 1, dim] or [B, 1, dim] -> [B, dim] without a copy where the channels are neighbours."""
    flat = x.reshape(-1, x.shape[-1])
    return (flat if flat.stride(-1) == 1 else flat.contiguous()).expand(batch, -1)


def launch(dim: int) -> tuple[int, int, dict[str, int]]:
    """(channels held, rows of a program, options of the launch) for rows of `dim` channels.

    16 channels a thread: 32 bytes of a bfloat16 row, two loads. Few registers, so that several programs share a core and
    hide each other's waiting: without a limit the wide ones would run alone.
    """
    block = triton.next_power_of_2(dim)
    options = {"num_warps": min(16, max(1, block // 512))}
    return (block, 4, options) if block <= 2048 else (block, 1, options | {"maxnreg": 64})


def _on(x: Tensor) -> AbstractContextManager[object]:
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
