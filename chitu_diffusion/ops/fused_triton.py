"""Triton kernels for what stands between the matrix products of a transformer block: one read and one write
each.

One program takes whole rows (tokens) and holds their channels in registers; arithmetic is float32. What the
kernels compute, and the plain torch that says the same, stands in `chitu_diffusion.ops.fused`; this file only
launches them, as operators that `torch.compile` takes as they are. It needs Triton; on a CPU it runs in
Triton's interpreter (TRITON_INTERPRET=1), which is for tests.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from chitu_diffusion.ops.custom_op import operator

FLOAT8 = torch.float8_e4m3fn
FLOAT8_MAX = 448.0
"""Largest number of 4 exponent and 3 mantissa bits (e4m3fn)."""
SMALLEST_AMAX = 1e-12
"""A row of zeros gets this as its largest magnitude, so that nothing is divided by zero."""


@triton.jit
def _channels(FIRST: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr):
    # left alone, the compiler gives a thread 16 neighbours, as many as fill a store of 8-bit numbers; loads
    # of the wider ones then leave gaps between threads, and a parameter in float32 costs four times its bytes
    # in the cache
    return FIRST + tl.max_contiguous(tl.arange(0, SIZE), WIDTH)


@triton.jit
def _read_row(x, dim, HEAD: tl.constexpr, TAIL: tl.constexpr, WIDTH: tl.constexpr):
    # the first HEAD channels, which every row has, and up to TAIL more, in float32; zero outside
    last = _channels(HEAD, TAIL, WIDTH)
    head = tl.load(x + _channels(0, HEAD, WIDTH)).to(tl.float32)
    return head, tl.load(x + last, mask=last < dim, other=0.0).to(tl.float32)


@triton.jit
def _write_row(target, head, tail, dim, HEAD: tl.constexpr, TAIL: tl.constexpr, WIDTH: tl.constexpr):
    last = _channels(HEAD, TAIL, WIDTH)
    tl.store(target + _channels(0, HEAD, WIDTH), head.to(target.dtype.element_ty))
    tl.store(target + last, tail.to(target.dtype.element_ty), mask=last < dim)


@triton.jit
def _in_8_bits(scale, head, tail, FLOAT8_TOP: tl.constexpr, FLOOR: tl.constexpr):
    # what is rounded next. No number is above the top by more than its last bit, which the rounding takes
    largest = tl.maximum(tl.max(tl.abs(head), axis=0), tl.max(tl.abs(tail), axis=0))
    step = tl.maximum(largest, FLOOR) / FLOAT8_TOP
    tl.store(scale, step)
    return head * (1.0 / step), tail * (1.0 / step)


@triton.jit
def _residual_norm(
    x, added, gate, weight, bias, stream, normed, scale,
    rows, dim, split, gate_stride, gate_row, weight_stride, weight_row, bias_stride, bias_row, eps,
    ADD: tl.constexpr, GATE: tl.constexpr, NORM: tl.constexpr, AFFINE: tl.constexpr, QUANTISE: tl.constexpr,
    FLOAT8_TOP: tl.constexpr, FLOOR: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(1)
    row = batch.to(tl.int64) * rows + tl.program_id(0)
    at = row * dim
    later = (tl.program_id(0) >= split).to(tl.int32)  # which of two rows of a gate and an affine pair
    # every load stands before the first store, which no later one may overtake
    head, tail = _read_row(x + at, dim, HEAD, TAIL, WIDTH)
    if ADD:
        more_head, more_tail = _read_row(added + at, dim, HEAD, TAIL, WIDTH)
        if GATE:
            gate_head, gate_tail = _read_row(
                gate + batch * gate_stride + later * gate_row, dim, HEAD, TAIL, WIDTH
            )
            more_head *= gate_head
            more_tail *= gate_tail
        rounded_head = (head + more_head).to(stream.dtype.element_ty)
        rounded_tail = (tail + more_tail).to(stream.dtype.element_ty)
        _write_row(stream + at, rounded_head, rounded_tail, dim, HEAD, TAIL, WIDTH)
        # the norm sees what the stream keeps
        head = rounded_head.to(tl.float32)
        tail = rounded_tail.to(tl.float32)
    if NORM:
        mean = (tl.sum(head, axis=0) + tl.sum(tail, axis=0)) / dim
        head -= mean
        tail = tl.where(_channels(HEAD, TAIL, WIDTH) < dim, tail - mean, 0.0)
        factor = 1.0 / tl.sqrt((tl.sum(head * head, axis=0) + tl.sum(tail * tail, axis=0)) / dim + eps)
        head *= factor
        tail *= factor
        if AFFINE:
            weight_head, weight_tail = _read_row(
                weight + batch * weight_stride + later * weight_row, dim, HEAD, TAIL, WIDTH
            )
            bias_head, bias_tail = _read_row(
                bias + batch * bias_stride + later * bias_row, dim, HEAD, TAIL, WIDTH
            )
            head = head * weight_head + bias_head
            tail = tail * weight_tail + bias_tail
        if QUANTISE:
            head, tail = _in_8_bits(scale + row, head, tail, FLOAT8_TOP, FLOOR)
        _write_row(normed + at, head, tail, dim, HEAD, TAIL, WIDTH)


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
    channel = tl.arange(0, BLOCK)
    pair = tl.arange(0, BLOCK // 2)
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
def _tanh_gelu(y):
    # 0.5 y (1 + tanh u) = y / (1 + exp(-2 u)), u = sqrt(2 / pi) (y + 0.044715 y^3); the constants are -2
    # sqrt(2 / pi) over ln 2. A GPU has an instruction for exp2 and one for 1 / sqrt; exp and a division would
    # be ten
    root = tl.rsqrt(1.0 + tl.exp2(y * (-2.302208198144325 - 0.1029432395800235 * (y * y))))
    return y * root * root


@triton.jit
def _activation(
    x, bias, out, scale, dim,
    BIAS: tl.constexpr, GELU: tl.constexpr, QUANTISE: tl.constexpr, FLOAT8_TOP: tl.constexpr,
    FLOOR: tl.constexpr,
    HEAD: tl.constexpr, TAIL: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head, tail = _read_row(x + row * dim, dim, HEAD, TAIL, WIDTH)
    if BIAS:
        bias_head, bias_tail = _read_row(bias, dim, HEAD, TAIL, WIDTH)
        # rounded as a matrix product with bias would hand it out
        head = (head + bias_head).to(x.dtype.element_ty).to(tl.float32)
        tail = (tail + bias_tail).to(x.dtype.element_ty).to(tl.float32)
    if GELU:
        head = _tanh_gelu(head)
        tail = _tanh_gelu(tail)
    if QUANTISE:
        head, tail = _in_8_bits(scale + row, head, tail, FLOAT8_TOP, FLOOR)
    _write_row(out + row * dim, head, tail, dim, HEAD, TAIL, WIDTH)


@operator(
    "chitu_diffusion::residual_norm",
    schema="(Tensor x, Tensor? added, Tensor? gate, Tensor? weight, Tensor? bias, float eps, "
    "ScalarType dtype, bool norm, bool quantise, SymInt split=0) -> (Tensor, Tensor, Tensor)",
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
    split: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """LayerNorm of x + added * gate, times weight plus bias.

    Args:
        x, added: [B, S, dim].
        gate: [B, R, dim], or None for one.
        weight, bias: [dim] or [B, R, dim], both or neither; R is 1 or, with a `split`, 2.
        eps: of the norm.
        dtype: of the normed rows, unless they are quantised.
        norm: False leaves at the sum.
        quantise: whether the normed rows are float8 with one scale each.
        split: how many of the S tokens have the first of two rows.

    Returns:
        (the sum in x's dtype, the normed rows, their scales [B, S, 1] float32); what was not asked for is
        empty.
    """
    x, batch, rows, dim = x.contiguous(), *x.shape
    stream, normed, scale = _outputs(x, added, dtype, norm, quantise)
    gate = None if gate is None else _by_batch(gate, batch)
    weight, bias = (None if each is None else _by_batch(each, batch) for each in (weight, bias))
    head, tail, options = launch_row(dim)
    with on_device(x):
        _residual_norm[(rows, batch)](
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
            split,
            *_strides(gate),
            *_strides(weight),
            *_strides(bias),
            eps,
            ADD=added is not None,
            GATE=gate is not None,
            NORM=norm,
            AFFINE=weight is not None,
            QUANTISE=quantise,
            FLOAT8_TOP=FLOAT8_MAX,
            FLOOR=SMALLEST_AMAX,
            HEAD=head,
            TAIL=tail,
            WIDTH=4,
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
    split: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    return _outputs(x, added, dtype, norm, quantise)


@operator(
    "chitu_diffusion::qk_norm_rotate",
    schema=(
        "(Tensor q, Tensor k, Tensor q_weight, Tensor k_weight, Tensor cos, Tensor sin, float eps) -> "
        "(Tensor, Tensor)"
    ),
)
def qk_norm_rotate(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """RMSNorm over all heads of q and of k [B, S, dim], then the turn of neighbouring channels by cos, sin
    [S, head_dim / 2].

    Returns:
        q and k [B, S, dim], each in its own dtype.
    """
    batch, rows, dim = q.shape
    q = q.contiguous()
    k = k.contiguous()
    q_out = torch.empty_like(q)
    k_out = torch.empty_like(k)
    block, per_program, options = launch(dim)
    with on_device(q):
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
def _(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    return _like(q, q.dtype), _like(k, k.dtype)


@operator(
    "chitu_diffusion::activation",
    schema="(Tensor x, Tensor? bias, bool gelu, bool quantise) -> (Tensor, Tensor)",
)
def activation(x: Tensor, bias: Tensor | None, gelu: bool, quantise: bool) -> tuple[Tensor, Tensor]:
    """tanh-approximated GELU of x [..., dim] + bias [dim], or (gelu False) the sum itself.

    Returns:
        (rows in x's dtype, or float8 with `quantise`; their scales [..., 1] float32, or nothing).
    """
    x, dim = x.contiguous(), x.shape[-1]
    out = _like(x, FLOAT8 if quantise else x.dtype)
    scale = _scales(x, quantise)
    head, tail, options = launch_row(dim)
    with on_device(x):
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
            HEAD=head,
            TAIL=tail,
            WIDTH=8 if bias is None else 4,
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


def _outputs(
    x: Tensor, added: Tensor | None, dtype: torch.dtype, norm: bool, quantise: bool
) -> tuple[Tensor, Tensor, Tensor]:
    nothing = (0,)
    stream = torch.empty(nothing if added is None else x.shape, dtype=x.dtype, device=x.device)
    normed = torch.empty(x.shape if norm else nothing, dtype=FLOAT8 if quantise else dtype, device=x.device)
    return stream, normed, _scales(x, norm and quantise)


def _by_batch(x: Tensor, batch: int) -> Tensor:
    """[dim], [1, R, dim] or [B, R, dim] -> [B, R, dim] without a copy where the channels are neighbours."""
    rows = x.view(1, 1, -1) if x.ndim == 1 else x
    return (rows if rows.stride(-1) == 1 else rows.contiguous()).expand(batch, -1, -1)


def _strides(x: Tensor | None) -> tuple[int, int]:
    """From one row [B, R, dim] to the next of the batch, and of the sequence."""
    return (0, 0) if x is None else (x.stride(0), 0 if x.shape[1] == 1 else x.stride(1))


def launch_row(dim: int) -> tuple[int, int, dict[str, int]]:
    """(channels of the head, of the tail, options of the launch) for a program that takes one row of `dim`
    channels.

    Triton's tiles are powers of two. One that holds 8960 channels is 16384 wide and works on as many
    nothings; two of 8192 and 1024 waste 3 %. Some 48 channels a thread: a row of 1536 is one warp's, which
    then waits for no other, and a multiprocessor holds 20 to 30 of them, whose loads together are what keeps
    the memory busy.
    """
    head = triton.next_power_of_2(dim) // 2 or 1
    tail = triton.next_power_of_2(max(dim - head, 1))
    return head, tail, {"num_warps": min(16, triton.next_power_of_2(triton.cdiv(head + tail, 1536)))}


def launch(dim: int) -> tuple[int, int, dict[str, int]]:
    """(channels held, rows of a program, options of the launch) for rows of `dim` channels.

    16 channels a thread: 32 bytes of a bfloat16 row, two loads. Few registers, so that several programs share
    a core and hide each other's waiting: without a limit the wide ones would run alone.
    """
    block = triton.next_power_of_2(dim)
    options = {"num_warps": min(16, max(1, block // 512))}
    return (block, 4, options) if block <= 2048 else (block, 1, options | {"maxnreg": 64})


def on_device(x: Tensor) -> AbstractContextManager[object]:
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
