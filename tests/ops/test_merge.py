"""What stands around attention on several ranks, against float64 and plain torch: two partial results as one,
and heads packed for their peers. The Triton kernels are interpreted on the CPU.
"""

from __future__ import annotations

import importlib.util
import sys

import pytest
import torch

from chitu_diffusion.attention.kernels import math
from chitu_diffusion.ops.merge_lse import merge
from chitu_diffusion.ops.pack_qkv import pack


def parts(tokens: int = 37, heads: int = 3, channels: int = 20, dtype: torch.dtype = torch.float32):
    """q, and two sets of keys and values; fresh. The second set's scores are larger, so that it weighs
    more.
    """
    q = torch.randn(2, tokens, heads, channels)
    sizes = [(11, 1), (5, 3)]
    sets = [
        (scale * torch.randn(2, keys, heads, channels), torch.randn(2, keys, heads, channels))
        for keys, scale in sizes
    ]
    found = [math.run_with_lse(q, k, v) for k, v in sets]
    k, v = (torch.cat([each[index] for each in sets], dim=1) for index in (0, 1))
    scores = torch.einsum("bshd,blhd->bhsl", q.double(), k.double()) / channels**0.5
    whole = torch.einsum("bhsl,blhd->bshd", scores.softmax(-1), v.double())
    return [(out.to(dtype), lse) for out, lse in found], whole, scores.logsumexp(-1).transpose(1, 2)


def freshly_read(name: str, monkeypatch: pytest.MonkeyPatch):
    """A kernel's module, read with Triton's interpreter on."""
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.delitem(sys.modules, name, raising=False)
    spec = importlib.util.find_spec(name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch):
    """The kernel's own function."""
    return freshly_read("chitu_diffusion.ops.merge_lse_triton", monkeypatch).merge_fused


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(2, 37, 6, 20, 2, 1, 1), (1, 64, 4, 16, 2, 0, 2), (3, 5, 12, 8, 3, 1, 1)])
def test_packing_copies_every_peers_heads(
    dtype: torch.dtype, sizes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    batch, tokens, heads, channels, share, first, width = sizes
    work = freshly_read("chitu_diffusion.ops.pack_qkv_triton", monkeypatch).pack_fused
    wide = torch.randn(3, batch, tokens, heads, 2 * channels).to(dtype)  # channels side by side, heads apart
    q, k, v = (x[..., :channels] for x in wide.unbind())
    peers = heads // share
    index = peers - 1
    places, expected = torch.zeros(2, peers + 1, tokens, 3, batch, width, channels, dtype=dtype).unbind()
    for run, into in ((work, places), (pack, expected)):
        run(q, k, v, into[:-1], into[-1], index, share, first)
        assert not into[index].any(), "one's own place stands elsewhere"
    assert torch.equal(places, expected)
    for peer in range(peers):
        theirs = slice(peer * share + first, peer * share + first + width)
        found = expected[-1 if peer == index else peer]
        assert torch.equal(found.permute(1, 2, 0, 3, 4), torch.stack([q, k, v])[:, :, :, theirs])


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_parts_are_the_attention_over_all_keys(
    fused: bool, dtype: torch.dtype, request: pytest.FixtureRequest
) -> None:
    work = request.getfixturevalue("interpreted") if fused else merge
    ((out, lse), (part, part_lse)), whole, sums = parts(dtype=dtype)
    # as kernels give them: the log-sum-exp heads first, the output out of a wider tensor
    lse = lse.transpose(1, 2).contiguous().transpose(1, 2)
    part = torch.cat([part, part], dim=-1)[..., : part.shape[-1]]
    merged, both = work(out, lse, part, part_lse, dtype)
    assert merged.dtype == dtype and both.dtype == torch.float32
    # float32: rounding of the parts; bfloat16: 8 bits, once in the parts and once in the result
    allowed = 2e-6 if dtype == torch.float32 else 8e-3
    assert (merged.double() - whole).norm() / whole.norm() < allowed
    assert (both.double() - sums).abs().max() < 1e-5
    wide, _ = work(out, lse, part, part_lse, torch.float32)
    assert wide.dtype == torch.float32


def test_both_roads_agree(interpreted) -> None:
    ((out, lse), (part, part_lse)), _, _ = parts()
    lse = lse + 200  # far apart, where an exponential of one alone would overflow
    given = (out, lse, part, part_lse, torch.float32)
    for ours, theirs in zip(interpreted(*given), merge(*given), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


COMPILED_FOR_HOPPER = """
import sys
from pathlib import Path
from chitu_diffusion.ops import merge_lse_triton as merge_triton
from chitu_diffusion.ops import pack_qkv_triton as pack_triton
from hopper import build

POINTERS = {name: "*bf16" for name in ("q_ptr", "k_ptr", "v_ptr", "away_ptr", "own_ptr")}
built = build(pack_triton._pack_kernel, POINTERS, {"TOKENS": pack_triton._TOKENS, "CHANNELS": 128},
Path(sys.argv[1]))
assert built.spilled == 0, built.spilled
merge = {name: "*bf16" for name in ("out_ptr", "part_ptr", "merged_ptr")}
merge |= {name: "*fp32" for name in ("lse_ptr", "part_lse_ptr", "both_ptr")}
merged = build(merge_triton._merge_kernel, merge, {"TOKENS": merge_triton._TOKENS, "CHANNELS": 128},
Path(sys.argv[1]))
assert merged.spilled == 0, merged.spilled
# of a batch element: out's, part's and both log-sum-exps' strides times its number, and its rows', in 64 bits
assert merged.ptx.count("mul.lo.s64") + merged.ptx.count("mad.lo.s64") + merged.ptx.count("mul.wide.s32") >= 5
assert "ld.global.v4" in built.ptx and "st.global.v4" in built.ptx, "16 bytes at once"
"""


def test_packing_compiles_for_hopper(runs_for_hopper) -> None:
    """Two pointers to choose from, which the interpreter takes for numbers."""
    runs_for_hopper(COMPILED_FOR_HOPPER)
