"""The kernel for the attention to a text, in Triton's interpreter (on a GPU: as it is), against float64 and
its twin.
"""

from __future__ import annotations

import math
import secrets
from dataclasses import replace

import pytest
import torch
from conftest import RunText
from small_networks import COMPILED, EverySite
from torch import Tensor
from torch._dynamo.utils import counters

from chitu_diffusion.attention.cross_attention import cross_attention, has_fused_cross_attention
from chitu_diffusion.models.wan.text_kv import TextKV, TextKVCache
from chitu_diffusion.models.wan.transformer import WanTransformer
from chitu_diffusion.ops import fused
from chitu_diffusion.ops.fused import HAS_TRITON

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
EPS = 1e-6
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="the kernel needs Triton: pip install triton")


@pytest.fixture(autouse=True)
def fresh_numbers() -> None:
    seed = secrets.randbelow(2**31)
    print("torch seed", seed)  # shown when a test fails
    torch.manual_seed(seed)


@pytest.fixture
def kernels_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    for room in ("models.wan.transformer", "models.wan.block", "ops.float8_linear"):
        monkeypatch.setattr(f"chitu_diffusion.{room}.can_fuse", lambda x: not torch.is_grad_enabled())


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def inputs(
    batch: int, rows: int, length: int, heads: int, width: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, the norm's weight, k and v; keys and values are views of one tensor, so that no stride is what it
    seems.
    """
    q = torch.randn(batch, rows, heads * width, device=DEVICE) * 3 + 0.7
    both = torch.randn(batch, length, 2, heads, width + 4, device=DEVICE)[..., :width]
    return q, torch.rand(heads * width, device=DEVICE) * 2, both[:, :, 0], both[:, :, 1]


def exact(q: Tensor, weight: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """The formula in float64, for q that is rounded nowhere."""
    q, weight, k, v = (each.double() for each in (q, weight, k, v))
    q = (q / (q.square().mean(-1, keepdim=True) + EPS).sqrt() * weight).unflatten(2, k.shape[2:])
    scores = torch.einsum("bshd,blhd->bhsl", q, k) / math.sqrt(k.shape[-1])
    if bias is not None:
        scores = scores + bias.double()[:, None, None, :]
    return torch.einsum("bhsl,blhd->bshd", scores.softmax(-1), v)


# (B, S, L, heads, head_dim): odd lengths, one row of text, a text as long as a tile and one of many
SHAPES = [
    (2, 7, 1, 2, 16),
    (1, 37, 19, 3, 32),
    (2, 33, 77, 2, 64),
    (1, 5, 70, 4, 128),
    (1, 3, 32, 20, 32),
    (1, 5, 300, 2, 16),
]


@needs_triton
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_kernel_is_the_formula_and_its_twin(shape: tuple[int, int, int, int, int]) -> None:
    batch, _, length, _, _ = shape
    q, weight, k, v = inputs(*shape)
    for bias in (None, torch.randn(1, length, device=DEVICE) * 3, torch.randn(batch, length, device=DEVICE)):
        found = cross_attention(q, weight, EPS, k, v, bias, fused=True)
        assert found.shape == (*q.shape[:2], *k.shape[2:]) and found.dtype == v.dtype
        # float32 sums over up to 5120 channels and 300 keys
        assert relative_error(found, exact(q, weight, k, v, bias)) < 2e-6
        assert relative_error(found, cross_attention(q, weight, EPS, k, v, bias)) < 3e-6
    turned = torch.randn(batch, length, k.shape[3], k.shape[2], device=DEVICE).transpose(2, 3)
    assert turned.stride(-1) != 1 or min(k.shape[2:]) == 1
    found = cross_attention(q, weight, EPS, turned, v, fused=True)
    assert relative_error(found, exact(q, weight, turned, v, None)) < 2e-6


@needs_triton
@pytest.mark.parametrize("unroll", [True, False])
@pytest.mark.parametrize("parts", [1, 2, 4])
@torch.no_grad()
def test_however_it_is_started(unroll: bool, parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from chitu_diffusion.attention import cross_attention_triton

    how = cross_attention_triton.Launch(tile=16, keys=16, parts=parts, warps=4, stages=2, unroll=unroll)
    monkeypatch.setattr(cross_attention_triton, "launch_text", lambda *_: how)
    q, weight, k, v = inputs(2, 19, 40, 4, 16)
    bias = torch.randn(2, 40, device=DEVICE)
    bias[0, :20] = -torch.inf  # a whole tile of keys that weigh nothing
    assert (
        relative_error(cross_attention(q, weight, EPS, k, v, bias, fused=True), exact(q, weight, k, v, bias))
        < 2e-6
    )


@needs_triton
@torch.no_grad()
def test_sixteen_bits_round_where_the_twin_rounds() -> None:
    """In float16, which the interpreter can multiply: a large key makes plain where q is rounded, and that
    the bias is not.
    """
    q, weight, k, v = (each.half() for each in inputs(1, 100, 30, 3, 32))
    k = k * 8
    bias = torch.zeros(1, 30, device=DEVICE)
    bias[:, -1] = math.log(483)
    found = cross_attention(q, weight, EPS, k, v, bias, fused=True)
    assert found.dtype == torch.float16
    rounded = torch.nn.functional.rms_norm(q.float(), weight.shape, weight.float(), EPS).half()
    # shares and results of 11 bits are 2e-4; where q is not rounded, the scores differ, and it is 5e-4
    assert relative_error(found, exact_after_norm(rounded, k, v, bias)) < 3e-4
    assert relative_error(found, exact(q, weight, k, v, bias)) > 3.5e-4


def exact_after_norm(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    q = q.double().unflatten(2, k.shape[2:])
    k = k.double()
    v = v.double()
    scores = torch.einsum("bshd,blhd->bhsl", q, k) / math.sqrt(k.shape[-1]) + bias.double()[:, None, None, :]
    return torch.einsum("bhsl,blhd->bshd", scores.softmax(-1), v)


@needs_triton
@torch.no_grad()
def test_a_row_with_a_bias_is_as_many_equal_rows() -> None:
    q, weight, k, v = inputs(1, 50, 41, 2, 64)
    bias = torch.zeros(1, 41, device=DEVICE)
    bias[:, -1] = math.log(512 - 40)
    k_all, v_all = (torch.cat([x, x[:, -1:].expand(-1, 471, -1, -1)], dim=1) for x in (k, v))
    expected = exact(q, weight, k_all, v_all, None)
    assert relative_error(cross_attention(q, weight, EPS, k, v, bias, fused=True), expected) < 2e-6
    assert relative_error(cross_attention(q, weight, EPS, k_all, v_all, fused=True), expected) < 2e-6


@needs_triton
@pytest.mark.usefixtures("kernels_everywhere")
@torch.no_grad()
def test_a_prepared_text_may_be_used_either_way() -> None:
    """The network's velocity with kernels and without, in any order, for one text that was prepared once."""
    with torch.device(DEVICE):
        network = WanTransformer(replace(COMPILED, num_layers=2)).eval().requires_grad_(False)
        latent = torch.randn(2, 4, 1, 2, 6)
        text = torch.randn(2, 100, 24)
        time = torch.tensor([900.0, 20.0])
    text[:, 9:] = 0
    network.use_fused(False)
    expected = network(latent, text, time)
    prepared = network.make_text_kv(text)
    assert prepared.rows.shape[1] == 10 and prepared.positions == 100
    for fuse in (True, False, True):
        network.use_fused(fuse)
        assert relative_error(network(latent, prepared, time), expected) < 1e-5
    assert relative_error(network(latent, prepared, time, cache=EverySite()), expected) < 1e-5
    assert relative_error(network(latent, text, time), expected) < 1e-5  # all 100 rows, in more than one tile
    assert prepared.keys(0, network.blocks[0].text_keys).k.shape[1] == 100


@pytest.mark.usefixtures("kernels_everywhere")
def test_where_rows_are_weighted_and_where_they_are_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device that computes shapes alone and, like a GPU, is no CPU."""
    seen: list[tuple[int, bool, bool]] = []

    def attend(
        q: Tensor, weight: Tensor, eps: float, k: Tensor, v: Tensor, bias: Tensor | None, *, fused: bool
    ) -> Tensor:
        seen.append((k.shape[1], bias is not None, fused))
        return q.unflatten(2, v.shape[2:])

    monkeypatch.setattr("chitu_diffusion.models.wan.block.cross_attention", attend)
    monkeypatch.setattr(
        "chitu_diffusion.models.wan.block.norm_and_rotate",
        lambda q, k, *_, fused: (q.unflatten(2, (2, -1)), k.unflatten(2, (2, -1))),
    )
    for name in ("layer_norm", "add_gated", "add_gated_norm"):
        plain = getattr(fused, name)
        monkeypatch.setattr(
            f"chitu_diffusion.models.wan.block.{name}", lambda *a, plain=plain, fused, **kw: plain(*a, **kw)
        )
    for dtype, fuse, grad, expected in [
        (torch.bfloat16, True, False, (10, True, True)),
        (torch.bfloat16, False, False, (512, False, False)),
        (torch.bfloat16, True, True, (512, False, False)),
        (torch.float32, True, False, (512, False, False)),  # a GPU's exact float32
    ]:
        network = WanTransformer(replace(COMPILED, num_layers=1)).to("meta", dtype)
        network.use_fused(fuse)
        prepared = TextKVCache(
            torch.empty(1, 10, 32, device="meta", dtype=dtype), 512, torch.zeros(1, 10, device="meta")
        )
        block = network.blocks[0]
        tokens = torch.empty(1, 6, 32, device="meta", dtype=dtype)
        with torch.set_grad_enabled(grad):
            text = prepared.keys(0, block.text_keys, block.takes_bias(tokens, dtype))
            block.cross_attention(tokens, text)
        assert seen.pop() == expected
    network = WanTransformer(replace(COMPILED, num_layers=1)).to("meta", torch.bfloat16)
    block = network.blocks[0]
    tokens = torch.empty(1, 6, 32, device="meta", dtype=torch.bfloat16)
    # many that differ are torch's
    for rows, bias, fuse in ((256, False, True), (257, False, False), (257, True, True)):
        keys = torch.empty(2, 1, rows, 2, 16, device="meta", dtype=torch.bfloat16)
        with torch.no_grad():
            block.cross_attention(
                tokens, TextKV(*keys, torch.empty(1, rows, device="meta") if bias else None)
            )
        assert seen.pop() == (rows, bias, fuse)


@needs_triton
@pytest.mark.usefixtures("kernels_everywhere", "gelu_apart")
@torch.no_grad()
def test_compiled_pieces_hold_the_operator_for_texts_of_any_length() -> None:
    with torch.device(DEVICE):
        network = WanTransformer(replace(COMPILED, num_layers=2)).eval().requires_grad_(False)
        latent = torch.randn(1, 4, 1, 4, 4)
        time = torch.tensor([300.0])
        texts = [
            torch.cat([torch.randn(1, rows, 24), torch.zeros(1, 40 - rows, 24)], dim=1) for rows in (7, 9, 30)
        ]
    expected = [network(latent, network.make_text_kv(text), time) for text in texts]
    torch._dynamo.reset()
    counters.clear()
    network.compile_blocks(backend="eager")
    for text, plain in zip(texts, expected, strict=True):
        assert torch.equal(network(latent, network.make_text_kv(text), time), plain)
    assert counters["stats"]["unique_graphs"] == 2  # before and after the self-attention
    torch._dynamo.reset()


@needs_triton
@torch.no_grad()
def test_operator_tells_torch_compile_its_shape() -> None:
    from chitu_diffusion.attention import cross_attention_triton

    q, weight, k, v = inputs(2, 5, 7, 2, 16)
    for bias in (None, torch.zeros(1, 7, device=DEVICE)):
        args = (q, weight, k, v, bias, EPS)
        torch.library.opcheck(
            cross_attention_triton.cross_attention.op, args, test_utils=("test_schema", "test_faketensor")
        )


def test_which_sizes_it_takes() -> None:
    cpu = torch.device("cpu")
    cuda = torch.device("cuda")
    assert all(has_fused_cross_attention(torch.bfloat16, cuda, width) for width in (16, 32, 64, 128))
    assert not any(has_fused_cross_attention(torch.bfloat16, cuda, width) for width in (8, 20, 48, 256))
    assert has_fused_cross_attention(torch.float32, cpu, 16) and not has_fused_cross_attention(
        torch.float32, cuda, 16
    )


@needs_triton
def test_short_sequences_and_small_devices_get_other_launches() -> None:
    from chitu_diffusion.attention.cross_attention_triton import launch_text

    asked = (130, 12, 128, torch.bfloat16)
    whole = launch_text(1, 32760, *asked)
    part = launch_text(1, 4095, *asked)
    assert whole.parts == 1 and whole.unroll and whole.stages == 2
    assert launch_text(1, 32760, 128, *asked[1:]).stages == 3
    # 8 ranks share 32,760 tokens: 32 tiles would leave 100 multiprocessors idle
    assert 12 % part.parts == 0 and 64 <= 32 * part.parts <= 132
    assert not launch_text(1, 32760, 512, *asked[1:]).unroll
    assert not launch_text(1, 32760, *asked, 99 * 1024).unroll  # a GeForce's shared memory
    assert launch_text(1, 32760, *asked, 64 * 1024).tile == 64


COMPILED_FOR_HOPPER = """
import sys
from pathlib import Path
import torch
from chitu_diffusion.attention import cross_attention_triton as ours
from hopper import build

POINTERS = {name: "*bf16" for name in ("q", "weight", "k", "v", "out")} | {"bias": "*fp32"}
heads, length = 12, 128
how = ours.launch_text(1, 32760, length, heads, 128, torch.bfloat16)
whole, rest = ours._split(length, how.keys)
constants = {"HEADS": heads, "OWN_HEADS": heads // how.parts, "HEAD_DIM": 128, "K_ROW": heads * 128,
"V_ROW": heads * 128,
             "TILE": how.tile, "KEYS": how.keys, "WHOLE": whole, "REST": rest, "UNROLL": how.unroll,
             "BIAS": True,
             "SCORE_SCALE": 0.1, "LOG2_E": 1.4}
options = {"num_warps": how.warps, "num_stages": how.stages}
built = build(ours._cross_attention, POINTERS, constants, Path(sys.argv[1]), **options)
assert built.spilled <= 64, built.spilled
assert built.shared <= ours._SHARED, built.shared
assert "wgmma" in built.ptx and "tf32" not in built.ptx
# queries of the first pass, keys and values of the second arrive while something else is computed
assert built.ttgir.count("async_copy_global_to_local") > 10
assert built.ttgir.count("scf.for") == 2, "the loop over heads is not the innermost"
"""


def test_kernel_compiles_for_hopper(runs_for_hopper: RunText) -> None:
    """Registers, shared memory and matrix units, on which the speed depends. Needs no GPU."""
    runs_for_hopper(COMPILED_FOR_HOPPER)
