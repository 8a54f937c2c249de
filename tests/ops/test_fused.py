"""The fused kernels against their plain twins, in Triton's interpreter; the twins against float64."""

from __future__ import annotations

import secrets

import pytest
import torch
import torch.nn.functional as F
from conftest import RunText
from torch import Tensor

from chitu_diffusion.ops import fused
from chitu_diffusion.ops.fused import FLOAT8, Affine, Float8Rows, quantise

# as meant: GELU of large negative numbers
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")
EPS = 1e-6
# (B, S, heads, head_dim): odd lengths, widths of 1.3B, 14B and wan-tiny, and ones that are no power of two
SHAPES = [(2, 7, 3, 20), (2, 13, 4, 64), (1, 5, 12, 128), (1, 3, 40, 128), (1, 1, 2, 6)]
ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
needs_triton = pytest.mark.skipif(
    not fused.HAS_TRITON,
    reason="the kernels need Triton: pip install triton; without it only their plain twins are tested",
)


@pytest.fixture(autouse=True)
def fresh_numbers() -> None:
    seed = secrets.randbelow(2**31)
    print("torch seed", seed)  # shown when a test fails
    torch.manual_seed(seed)


def rows(shape: tuple[int, int, int, int]) -> Tensor:
    batch, length, heads, width = shape
    # a mean far from zero, and channels of unlike size, as real streams have
    x = (
        torch.randn(batch, length, heads * width, device=DEVICE)
        * torch.rand(heads * width, device=DEVICE)
        * 3
        + 0.7
    )
    return x


def modulation(x: Tensor) -> tuple[Tensor, Affine]:
    """A gate and an affine pair as a block has them: views of one table, with its batch stride."""
    table = torch.randn(x.shape[0], 6, x.shape[-1], device=DEVICE).chunk(6, dim=1)
    return table[2], (1 + table[1], table[0])


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def assert_same_rows(found: Tensor | Float8Rows, expected: Tensor | Float8Rows) -> None:
    assert isinstance(found, Float8Rows) and isinstance(expected, Float8Rows)
    assert found.values.dtype == FLOAT8 and found.scale.dtype == torch.float32
    assert found.scale.shape == expected.scale.shape
    assert relative_error(found.scale, expected.scale) < 1e-6
    codes = found.values.float()
    other = expected.values.float()
    # Triton's interpreter forgets the carry where rounding up reaches the next power of two, and cuts off
    # numbers below the smallest normal one; a GPU does neither
    carry = (codes.abs() * 2 == other.abs()) & (torch.frexp(other)[0].abs() == 0.5)
    excused = (carry | (other.abs() <= 2**-6)) & (not ON_GPU)
    # a sum in another order moves a number in ten thousand over the middle between two codes
    assert ((codes != other) & ~excused).sum() <= 1 + codes.numel() // 1000


@needs_triton
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_norms_and_gates_are_their_twins(shape: tuple[int, int, int, int]) -> None:
    x = rows(shape)
    added = rows(shape)
    gate, affine = modulation(x)
    own = (affine[0][0, 0].contiguous(), affine[1][0, 0].contiguous())
    for after in (None, own, affine):
        for between in (None, gate):
            args = (x, added, between, after, EPS, torch.float32)
            stream, normed = fused.add_gated_norm(*args, fused=True)
            plain_stream, plain = fused.add_gated_norm(*args)
            # one product and one sum, perhaps rounded together: 1e-7
            assert relative_error(stream, plain_stream) < 2e-7
            assert relative_error(fused.add_gated(x, added, between, fused=True), plain_stream) < 2e-7
            # float32 sums over up to 5120 channels in another order
            assert relative_error(normed, plain) < 1e-6
        found = fused.layer_norm(x, after, EPS, torch.float32, fused=True)
        assert relative_error(found, fused.layer_norm(x, after, EPS, torch.float32)) < 1e-6


@needs_triton
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_norm_and_rotation_is_its_twin(shape: tuple[int, int, int, int]) -> None:
    q = rows(shape)
    k = rows(shape)
    heads = shape[2]
    weights = (torch.randn(q.shape[-1], device=DEVICE), torch.randn(q.shape[-1], device=DEVICE))
    angles = torch.randn(shape[1], shape[3] // 2, device=DEVICE) * 9
    args = (q, k, weights, EPS, (angles.cos(), angles.sin()), heads)
    for found, expected in zip(
        fused.norm_and_rotate(*args, fused=True), fused.norm_and_rotate(*args), strict=True
    ):
        assert found.shape == shape
        assert relative_error(found, expected) < 1e-6


@needs_triton
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_gelu_is_its_twin(shape: tuple[int, int, int, int]) -> None:
    x = rows(shape)
    x[0, 0, :4] = torch.tensor([40.0, -40.0, 0.0, -1e4], device=DEVICE)  # where exp overflows or vanishes
    for bias in (None, torch.randn(x.shape[-1], device=DEVICE)):
        found = fused.gelu(x, bias, fused=True)
        assert torch.isfinite(found).all()
        assert relative_error(found, fused.gelu(x, bias)) < 1e-6


@needs_triton
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_eight_bits_are_those_of_the_twins(shape: tuple[int, int, int, int]) -> None:
    x = rows(shape)
    added = rows(shape)
    x[0, 0] = 0  # a row without a largest number
    gate, affine = modulation(x)
    assert_same_rows(quantise(x, fused=True), quantise(x))
    assert_same_rows(
        fused.gelu(x, x[0, 0] + 1, float8=True, fused=True), fused.gelu(x, x[0, 0] + 1, float8=True)
    )
    args = (x, affine, EPS, torch.float32)
    assert_same_rows(fused.layer_norm(*args, float8=True, fused=True), fused.layer_norm(*args, float8=True))
    both = [fused.add_gated_norm(x, added, gate, *args[1:], float8=True, fused=way) for way in (True, False)]
    assert_same_rows(both[0][1], both[1][1])


@needs_triton
@pytest.mark.parametrize("split", [1, 4])
@pytest.mark.parametrize("float8", [False, True])
@torch.no_grad()
def test_tokens_have_one_of_two_rows(split: int, float8: bool) -> None:
    """Of a gate and a modulation: each part of the sequence as if it were alone, computed either way."""
    x = rows((2, 5, 3, 20))
    added = rows((2, 5, 3, 20))
    table = torch.randn(2, 2, 6, 60, device=DEVICE).unbind(2)  # views, as a block has them
    gate = table[2]
    affine = (1 + table[1], table[0])
    args = (x, added, gate, affine, EPS, torch.float32)
    for way in (False, True):
        stream, normed = fused.add_gated_norm(*args, float8=float8, fused=way, split=split)
        alone = fused.layer_norm(stream, affine, EPS, torch.float32, float8=float8, fused=way, split=split)
        gated = fused.add_gated(x, added, gate, fused=way, split=split)
        assert relative_error(gated, stream) < 2e-7
        for part, row in ((slice(0, split), slice(0, 1)), (slice(split, None), slice(1, 2))):
            own = (affine[0][:, row], affine[1][:, row])
            args_of = (x[:, part], added[:, part], gate[:, row], own, EPS, torch.float32)
            of_stream, of_normed = fused.add_gated_norm(*args_of, float8=float8)
            assert relative_error(stream[:, part], of_stream) < 2e-7
            for found in (normed, alone):
                if isinstance(found, Float8Rows):
                    cut = Float8Rows(found.values[:, part], found.scale[:, part])
                    assert_same_rows(cut, of_normed)
                else:
                    assert relative_error(found[:, part], of_normed) < 1e-6


@needs_triton
@torch.no_grad()
def test_sixteen_bits_round_where_the_twins_round() -> None:
    shape = (1, 9, 12, 128)
    x = rows(shape).bfloat16()
    added = rows(shape).bfloat16()
    gate, affine = modulation(x)
    args = (x, added, gate, affine, EPS, torch.bfloat16)
    # the interpreter cuts a bfloat16 off (an error of up to 2^-8) where a GPU rounds it
    bound = 1e-3 if ON_GPU else 2**-7
    for found, expected in zip(
        fused.add_gated_norm(*args, fused=True), fused.add_gated_norm(*args), strict=True
    ):
        assert isinstance(found, Tensor) and isinstance(expected, Tensor)
        assert found.dtype == torch.bfloat16
        assert relative_error(found, expected) < bound


@needs_triton
@torch.no_grad()
def test_operators_tell_torch_compile_their_shapes() -> None:
    from chitu_diffusion.ops import fused_triton

    x = rows((2, 5, 3, 20))
    gate, (weight, bias) = modulation(x)
    checks = ("test_schema", "test_faketensor")
    for ask in ((None, None, None, None), (x + 1, gate, weight, bias)):
        for quantised in (False, True):
            args = (x, *ask, EPS, torch.bfloat16, True, quantised)
            torch.library.opcheck(fused_triton.residual_norm.op, args, test_utils=checks)
    two = [each.repeat(1, 2, 1) for each in (gate, weight, bias)]
    args = (x, x + 1, *two, EPS, torch.bfloat16, True, False, 3)
    torch.library.opcheck(fused_triton.residual_norm.op, args, test_utils=checks)
    torch.library.opcheck(fused_triton.activation.op, (x, None, True, True), test_utils=checks)
    angles = torch.randn(5, 10, device=DEVICE)
    args = (x, x + 1, weight[0, 0], bias[0, 0], angles.cos(), angles.sin(), EPS)
    torch.library.opcheck(fused_triton.qk_norm_rotate.op, args, test_utils=checks)


COMPILED_FOR_HOPPER = """
import sys
from pathlib import Path
from chitu_diffusion.ops import fused_triton as ours
from hopper import build

EIGHT = {"QUANTISE": True, "FLOAT8_TOP": 448.0, "FLOOR": 1e-12}
ROW = {"x": "*bf16", "bias": "*fp32", "scale": "*fp32", "out": "*fp8e4nv"}
NORM = {"x": "*bf16", "added": "*bf16", "gate": "*fp32", "weight": "*fp32", "bias": "*fp32",
"stream": "*bf16",
        "normed": "*fp8e4nv", "scale": "*fp32"}
ALL = {"ADD": True, "GATE": True, "NORM": True, "AFFINE": True, "WIDTH": 4}
for kernel, pointers, constants, dim in (
    (ours._activation, ROW, {"BIAS": False, "GELU": True, "WIDTH": 8}, 8960),
    (ours._activation, ROW, {"BIAS": False, "GELU": False, "WIDTH": 8}, 1536),
    (ours._residual_norm, NORM, ALL, 1536),
    (ours._residual_norm, NORM, ALL, 5120),
):
    head, tail, options = ours.launch_row(dim)
    assert head < dim <= head + tail <= 1.2 * dim, (head, tail)
    built = build(kernel, pointers, {"HEAD": head, "TAIL": tail, **EIGHT, **constants}, Path(sys.argv[1]),
    **options)
    assert not built.spilled, (kernel, built.spilled)
    # of a thread: 20 warps and more share a multiprocessor
    assert built.registers <= 96, (kernel, built.registers)
    assert "convert_layout" not in built.ttgir, "numbers change threads between a load and a store"
    # loads and stores of neighbouring threads leave no gap, in 8, 16 and 32 bits alike
    assert "sizePerThread = [16]" not in built.ttgir
    assert built.ptx.count("div.full.f32") <= 5, "a division for each number, and not for each row"
"""


def test_kernels_compile_for_hopper(runs_for_hopper: RunText) -> None:
    """Layouts and registers, on which the speed depends and which the interpreter does not see. Requirements
    no GPU.
    """
    runs_for_hopper(COMPILED_FOR_HOPPER)


@torch.no_grad()
def test_twins_are_the_formulas() -> None:
    x = rows((2, 7, 3, 20))
    added = rows((2, 7, 3, 20))
    gate, (weight, bias) = modulation(x)
    stream, normed = fused.add_gated_norm(x, added, gate, (weight, bias), EPS, torch.float32)
    exact = x.double() + added.double() * gate.double()
    centred = exact - exact.mean(-1, keepdim=True)
    expected = centred / (centred.square().mean(-1, keepdim=True) + EPS).sqrt() * weight + bias
    assert relative_error(stream, exact) < 1e-6
    assert isinstance(normed, Tensor)
    assert relative_error(normed, expected) < 1e-6
    angles = torch.randn(7, 10, device=DEVICE, dtype=torch.float64)
    own = weight[0, 0]
    q, _ = fused.norm_and_rotate(x, added, (own, own), EPS, (angles.cos().float(), angles.sin().float()), 3)
    scaled = x.double() / (x.double().square().mean(-1, keepdim=True) + EPS).sqrt() * own
    pairs = (
        torch.view_as_complex(scaled.view(2, 7, 3, 10, 2))
        * torch.polar(torch.ones_like(angles), angles)[:, None]
    )
    assert relative_error(q, torch.view_as_real(pairs).flatten(-2)) < 1e-6
    found = fused.gelu(x, bias[0, 0])
    assert isinstance(found, Tensor)
    assert relative_error(found, F.gelu(x.double() + bias[0, 0].double(), approximate="tanh")) < 1e-6


@torch.no_grad()
def test_gelu_inside_a_product() -> None:
    x, weight, bias = (torch.randn(*shape, device=DEVICE) for shape in ((2, 7, 48), (80, 48), (80,)))
    assert fused.has_linear_gelu(x, weight, True) and not fused.has_linear_gelu(x.bfloat16(), weight, True)
    with torch.enable_grad():
        assert not fused.has_linear_gelu(x, weight, True)
    expected = F.gelu(F.linear(x.double(), weight.double(), bias.double()), approximate="tanh")
    # TensorFloat-32
    assert relative_error(fused.linear_gelu(x, weight, bias), expected) < (1e-3 if ON_GPU else 1e-6)


def test_eight_bits_hold_the_largest_number_and_are_near_the_rest() -> None:
    x = rows((2, 9, 12, 128))
    x[0, 0, 0] = 3e4
    x[0, 1] = 0
    found = quantise(x)
    assert found.values.dtype == FLOAT8
    assert torch.isfinite(found.widened()).all()
    assert found.widened()[0, 0, 0] == pytest.approx(3e4, rel=1e-6)
    assert not found.widened()[0, 1].any()
    # half a step of 3 mantissa bits, where the number is not below the smallest normal one
    normal = found.values.float().abs() >= 2**-6
    error = (found.widened() - x).abs() / found.widened().abs()
    assert 2**-5 < float(error[normal].max()) <= 2**-4 * 1.001
