"""A 3 x 3 x 3 convolution as 27 matrix products over shifted rows.

With a zero border of one cell around each frame, a cell's neighbour in any direction lies a fixed number of rows away in
the flat matrix [frames (H + 2) (W + 2), C]. So a tap of the convolution is a product of that matrix, shifted, and a [C, C']
matrix; what comes out at border cells means nothing and is never read. On a GPU one Triton kernel adds the 27 products up
in registers; it is for widths such as 96, at which cuDNN takes a kernel of an older generation.
"""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # a CPU build of torch brings no triton
    triton = None

_ROWS = 256  # of the output, a program
_WIDEST = 128  # channels: a program holds all of a row's
_NARROWEST = 16


def suits_flat(weight: Tensor) -> bool:
    """Whether a convolution's weight is of a size for `flat_conv`: 3 x 3 x 3, two or fewer powers of two wide."""
    return weight.shape[2:] == (3, 3, 3) and all(_parts(width) is not None for width in weight.shape[:2])


def flat_weight(weight: Tensor) -> Tensor:
    """[C', C, 3, 3, 3] -> [27 C, C'], tap by tap."""
    return weight.permute(2, 3, 4, 1, 0).flatten(0, 3).contiguous()


def flat_conv(x: Tensor, weight: Tensor, on_gpu: bool) -> Tensor:
    """The convolution, without bias.

    Args:
        x: [2 + T, H + 2, W + 2, C], contiguous; zero in the outermost cells of each frame.
        weight: of `flat_weight`.
        on_gpu: by the Triton kernel (or its interpreter), else in plain torch.

    Returns:
        [T, H, W, C'], a view.
    """
    frames, height, width, channels = x.shape
    out = x.new_empty((frames - 2) * height * width, weight.shape[1])
    (_multiplied if on_gpu else _multiplied_plainly)(x.view(-1, channels), weight, out, height * width, width)
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


def _multiplied(x: Tensor, weight: Tensor, out: Tensor, plane: int, line: int) -> None:
    channels, width = x.shape[1], weight.shape[1]
    deep, wide = cast(tuple[int, int], _parts(channels)), cast(tuple[int, int], _parts(width))
    rows = min(_ROWS, triton.next_power_of_2(plane))
    # without a second part its descriptor is never used; any shape that can be will do
    left = [TensorDescriptor.from_tensor(x, [rows, depth or deep[0]]) for depth in deep]
    right = [TensorDescriptor.from_tensor(weight, [depth or deep[0], part or wide[0]]) for depth in deep for part in wide]
    frames = len(out) // plane
    _shifted_products[(triton.cdiv(plane, rows) * frames,)](
        *left,
        *right,
        out,
        frames,
        plane,
        line,
        WIDTH=width,
        K0=deep[0],
        K1=deep[1],
        N0=wide[0],
        N1=wide[1],
        ROWS=rows,
        num_warps=8,
        num_stages=3,
    )


def _parts(width: int) -> tuple[int, int] | None:
    """A width as a power of two and another one or nothing; None where that cannot be, or is too wide or narrow."""
    first = 1 << (width.bit_length() - 1)
    rest = width - first
    if width < _NARROWEST or width > _WIDEST or rest & (rest - 1) or 0 < rest < _NARROWEST:
        return None
    return first, rest


if triton is not None:

    @triton.jit
    def _shifted_products(
        x0: Any,
        x1: Any,
        w00: Any,
        w01: Any,
        w10: Any,
        w11: Any,
        out: Any,
        frames: Any,
        plane: Any,
        line: Any,
        WIDTH: tl.constexpr,
        K0: tl.constexpr,
        K1: tl.constexpr,
        N0: tl.constexpr,
        N1: tl.constexpr,
        ROWS: tl.constexpr,
    ) -> None:
        # neighbouring programs take the same cells of successive frames, which read the same rows
        program = tl.program_id(0)
        frame, cell = program % frames, program // frames * ROWS
        first = frame * plane + cell
        sum0 = tl.zeros([ROWS, N0], dtype=tl.float32)
        if N1 > 0:
            sum1 = tl.zeros([ROWS, N1], dtype=tl.float32)
        for tap in range(27):
            row = first + tap // 9 * plane + (tap // 3 % 3 - 1) * line + tap % 3 - 1
            depth = tap * (K0 + K1)
            a = x0.load([row, 0])
            sum0 = tl.dot(a, w00.load([depth, 0]), sum0)
            if N1 > 0:
                sum1 = tl.dot(a, w01.load([depth, N0]), sum1)
            if K1 > 0:
                b = x1.load([row, K0])
                sum0 = tl.dot(b, w10.load([depth + K0, 0]), sum0)
                if N1 > 0:
                    sum1 = tl.dot(b, w11.load([depth + K0, N0]), sum1)
        rows = tl.arange(0, ROWS)
        inside = (cell + rows < plane)[:, None]
        places = (first + rows).to(tl.int64)[:, None] * WIDTH
        tl.store(out + places + tl.arange(0, N0)[None, :], sum0.to(out.dtype.element_ty), mask=inside)
        if N1 > 0:
            tl.store(out + places + N0 + tl.arange(0, N1)[None, :], sum1.to(out.dtype.element_ty), mask=inside)
