"""A 3 x 3 x 3 convolution as 27 matrix products over shifted rows.

With a zero border of one cell around each frame, a cell's neighbour in any direction lies a fixed number of
rows away in the flat matrix [frames (H + 2) (W + 2), C]. So a tap of the convolution is a product of that
matrix, shifted, and a [C, C'] matrix; what comes out at border cells means nothing and is never read. On a
GPU one Triton kernel adds the 27 products up in registers; it is for widths such as 96, at which cuDNN takes
a kernel of an older generation.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # a CPU build of torch brings no triton
    triton = None

_WIDEST = 128  # channels: a program holds all of a row's
_NARROWEST = 16
_DEEPEST = 64  # channels a step


def suits_flat(weight: Tensor) -> bool:
    """Whether `flat_conv` takes a weight's size: 3 x 3 x 3, widths of at most two powers of two."""
    return weight.shape[2:] == (3, 3, 3) and all(_parts(width) is not None for width in weight.shape[:2])


def flat_weight(weight: Tensor) -> Tensor:
    """[C', C, 3, 3, 3] -> [27 C, C'], tap by tap."""
    return weight.permute(2, 3, 4, 1, 0).flatten(0, 3).contiguous()


def flat_conv(x: Tensor, weight: Tensor, on_gpu: bool, rows: int = 256) -> Tensor:
    """The convolution, without bias.

    Args:
        x: [2 + T, H + 2, W + 2, C], contiguous; zero in the outermost cells of each frame.
        weight: of `flat_weight`.
        on_gpu: by the Triton kernel (or its interpreter), else in plain torch.
        rows: of the result that one program of the kernel makes, 128 or 256.

    Returns:
        [T, H, W, C'], a view.
    """
    frames, height, width, channels = x.shape
    out = x.new_empty((frames - 2) * height * width, weight.shape[1])
    if on_gpu:
        _multiplied(x.view(-1, channels), weight, out, height * width, width, rows)
    else:
        _multiplied_plainly(x.view(-1, channels), weight, out, height * width, width)
    return out.view(frames - 2, height, width, -1)[:, 1:-1, 1:-1]


def _multiplied_plainly(x: Tensor, weight: Tensor, out: Tensor, plane: int, line: int) -> None:
    # the first and last line of a product are border cells, so that shifts may stop at the matrix's ends
    inner = out[line + 1 : -line - 1]
    wide = torch.promote_types(out.dtype, torch.float32)  # summed in, as the kernel does
    total = torch.zeros_like(inner, dtype=wide)
    for tap, matrix in enumerate(weight.view(27, x.shape[1], -1)):
        first = tap // 9 * plane + tap // 3 % 3 * line + tap % 3
        total.addmm_(x[first : first + len(inner)].to(wide), matrix.to(wide))
    inner.copy_(total)


def _multiplied(x: Tensor, weight: Tensor, out: Tensor, plane: int, line: int, rows: int) -> None:
    channels = x.shape[1]
    (first, second) = cast(tuple[int, int], _parts(weight.shape[1]))
    depth = min(channels & -channels, _DEEPEST)  # the largest power of two that divides them
    rows = min(rows, triton.next_power_of_2(plane))
    left = TensorDescriptor.from_tensor(x, [rows, depth])
    # without a second part its descriptor is never used; any shape that can be will do
    right = [TensorDescriptor.from_tensor(weight, [depth, part or first]) for part in (first, second)]
    frames = len(out) // plane
    _shifted_products[(triton.cdiv(plane, rows) * frames,)](
        left,
        *right,
        out,
        frames,
        plane,
        line,
        CHANNELS=channels,
        DEPTH=depth,
        FIRST=first,
        SECOND=second,
        ROWS=rows,
        num_warps=8 if rows > 128 else 4,
        num_stages=5,
    )


def _parts(width: int) -> tuple[int, int] | None:
    """A width as a power of two and another or nothing; None where that cannot be, or does not fit."""
    first = 1 << (width.bit_length() - 1)
    rest = width - first
    if width < _NARROWEST or width > _WIDEST or rest & (rest - 1) or 0 < rest < _NARROWEST:
        return None
    return first, rest


if triton is not None:

    @triton.jit
    def _shifted_products(
        x,
        weight0,
        weight1,
        out,
        frames,
        plane,
        line,
        CHANNELS: tl.constexpr,
        DEPTH: tl.constexpr,
        FIRST: tl.constexpr,
        SECOND: tl.constexpr,
        ROWS: tl.constexpr,
    ):
        # neighbouring programs take the same cells of successive frames, which read the same rows
        program = tl.program_id(0)
        frame = program % frames
        cell = program // frames * ROWS
        start = frame * plane + cell
        sum0 = tl.zeros([ROWS, FIRST], dtype=tl.float32)
        if SECOND > 0:
            sum1 = tl.zeros([ROWS, SECOND], dtype=tl.float32)
        for step in range(27 * CHANNELS // DEPTH):
            tap = step // (CHANNELS // DEPTH)
            channel = step % (CHANNELS // DEPTH) * DEPTH
            row = start + tap // 9 * plane + (tap // 3 % 3 - 1) * line + tap % 3 - 1
            seen = x.load([row, channel])
            sum0 = tl.dot(seen, weight0.load([step * DEPTH, 0]), sum0)
            if SECOND > 0:
                sum1 = tl.dot(seen, weight1.load([step * DEPTH, FIRST]), sum1)
        rows = tl.arange(0, ROWS)
        inside = (cell + rows < plane)[:, None]
        places = (start + rows).to(tl.int64)[:, None] * (FIRST + SECOND)
        tl.store(out + places + tl.arange(0, FIRST)[None, :], sum0.to(out.dtype.element_ty), mask=inside)
        if SECOND > 0:
            tl.store(
                out + places + FIRST + tl.arange(0, SECOND)[None, :],
                sum1.to(out.dtype.element_ty),
                mask=inside,
            )
