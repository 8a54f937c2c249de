"""Packed layers beside the `gguf` package's values: in plain torch, and by kernels in Triton's interpreter
(on a GPU: as they are).
"""

from __future__ import annotations

import secrets

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import RunText
from gguf import GGMLQuantizationType, quants
from gguf_files import random_blocks
from torch import Tensor, nn

from chitu_diffusion.ops.merge_lse import has_triton
from chitu_diffusion.ops.packed_linear import BLOCKS, PackedLinear, pack_layers, unpack, wide_weight

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(
    not has_triton(), reason="the kernels need Triton: pip install triton; plain torch is tested without"
)


def any_blocks(packing: str, blocks: int) -> Tensor:
    """Random bits, scales that are no numbers among them."""
    seed = secrets.randbelow(2**31)
    print("numpy seed", seed)  # shown when a test fails
    data = np.random.default_rng(seed).integers(0, 256, (blocks, BLOCKS[packing][1]), np.uint8)
    return torch.from_numpy(data)


def expected_of(blocks: Tensor, packing: str) -> Tensor:
    with np.errstate(all="ignore"):
        return torch.from_numpy(quants.dequantize(blocks.numpy(), GGMLQuantizationType[packing])).flatten()


def assert_same_bits(found: Tensor, expected: Tensor) -> None:
    assert found.dtype is expected.dtype and found.shape == expected.shape
    assert torch.equal(found.isnan(), expected.isnan())
    # a zero has a sign, which equality does not see
    bits = torch.int16 if found.itemsize == 2 else torch.int32
    assert torch.equal(
        torch.where(found.isnan(), 0, found).view(bits), torch.where(expected.isnan(), 0, expected).view(bits)
    )


@pytest.mark.parametrize("packing", BLOCKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("blocks", [1, 37, 5000])
def test_plain_torch_has_the_package_s_bits(packing: str, dtype: torch.dtype, blocks: int) -> None:
    data = any_blocks(packing, blocks)
    assert_same_bits(unpack(data.flatten(), packing, dtype), expected_of(data, packing).to(dtype))


@needs_triton
@pytest.mark.filterwarnings("ignore:invalid value encountered")  # scales that are no numbers
@pytest.mark.parametrize("packing", BLOCKS)
@pytest.mark.parametrize("blocks", [1, 37, 300])
def test_the_kernel_has_the_package_s_bits(packing: str, blocks: int) -> None:
    from chitu_diffusion.ops.unpack_triton import unpack_fused

    data = any_blocks(packing, blocks)
    # float32 alone on a CPU: the interpreter cuts 16-bit numbers where a GPU rounds them
    for dtype in (torch.float32, torch.bfloat16) if DEVICE == "cuda" else (torch.float32,):
        found = unpack_fused(data.flatten().to(DEVICE), packing, *BLOCKS[packing], dtype)
        assert_same_bits(found.cpu(), expected_of(data, packing).to(dtype))


def packed_layer(packing: str, dtype: torch.dtype = torch.float32) -> tuple[PackedLinear, nn.Linear]:
    """A packed layer of [48, 512], and one with the same weight in full."""
    full = nn.Linear(512, 48, dtype=dtype)
    blocks = torch.from_numpy(random_blocks((48, 512), packing, 0.05))
    full.weight = nn.Parameter(expected_of(blocks, packing).view(48, 512).to(dtype))
    with torch.device("meta"):
        empty = nn.Sequential(nn.Linear(512, 48, dtype=dtype))
    (layer,) = pack_layers(empty, {"0.weight": packing})
    assert empty[0] is layer
    layer.bias = full.bias
    layer.register_parameter("weight", None)
    layer.weight_packed = blocks.flatten()
    return layer.eval().requires_grad_(False), full.requires_grad_(False)


@pytest.mark.parametrize("packing", BLOCKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_gives_the_bits_of_one_in_full(packing: str, dtype: torch.dtype) -> None:
    layer, full = packed_layer(packing, dtype)
    x = torch.randn(2, 5, 512, dtype=dtype)
    assert torch.equal(layer(x), full(x))
    assert torch.equal(wide_weight(layer, dtype), full.weight) and wide_weight(full, dtype) is full.weight


def test_a_layer_is_widened_and_packed_again() -> None:
    layer, full = packed_layer("Q5_K")
    x = torch.randn(3, 512)
    other = torch.randn(48, 512)
    layer.widen(other)
    assert torch.equal(layer(x), F.linear(x, other, full.bias)) and torch.equal(
        layer.unpacked(x.dtype), full.weight
    )
    layer.widen(None)
    assert torch.equal(layer(x), full(x)) and not layer._parameters["weight"]


def test_other_layers_stay() -> None:
    with torch.device("meta"):
        network = nn.Sequential(nn.Linear(256, 8), nn.Linear(256, 8), nn.LayerNorm(256), nn.Linear(256, 8))
    packings = {"0.weight": "Q4_K", "1.weight": "Q2_K", "2.weight": "Q4_K"}
    assert pack_layers(network, packings) == [network[0]]
    assert [type(layer) for layer in network[1:]] == [nn.Linear, nn.LayerNorm, nn.Linear]


def test_a_compiled_layer_takes_the_blocks_as_they_are() -> None:
    layer, full = packed_layer("Q4_K")
    x = torch.randn(4, 512)
    with torch.no_grad():
        assert torch.equal(torch.compile(layer, fullgraph=True, backend="eager")(x), full(x))


COMPILED_FOR_HOPPER = """
import sys
from pathlib import Path
from chitu_diffusion.ops import unpack_triton
from hopper import build

POINTERS = {"byte_ptr": "*u8", "half_ptr": "*fp16", "out_ptr": "*bf16"}
for packing, kernel in unpack_triton._KERNELS.items():
    size = {"BLOCKS": unpack_triton._NUMBERS // (32 if packing == "Q8_0" else 256)}
    built = build(kernel, POINTERS, size, Path(sys.argv[1]))
    assert built.spilled == 0, packing
    assert "st.global.v4" in built.ptx, "16 bytes at once"
    # scales are read once a group, not once a number
    assert built.ptx.count("ld.global.b8") <= 6, packing
"""


def test_kernels_compile_for_hopper(runs_for_hopper: RunText) -> None:
    runs_for_hopper(COMPILED_FOR_HOPPER)
