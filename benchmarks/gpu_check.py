"""Does every GPU kernel of ours give what its plain twin gives, at full size, and does a video that was cut
short go on to the same bits? Two tables, some minutes; exit code 1 if one does not.

    python -m benchmarks.gpu_check                     # Wan2.1-1.3B's shapes: 32,760 tokens, 12 heads of 128
    python -m benchmarks.gpu_check --tokens 4095 --heads 40

The tests do the same on a CPU, where Triton interprets the kernels; here they are compiled. Errors are
relative, norm over norm, against the twin in the same dtypes; allowed are a few roundings to bfloat16 (4e-3
each), or to 8 bits where that is the task. `benchmarks.kernels` shows the same checks with bytes a second.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.measuring import milliseconds, relative_error
from benchmarks.packed import random_blocks
from benchmarks.report import first_line, table_of
from benchmarks.resume_check import resume_rows
from chitu_diffusion.attention import attention_kernel, cross_attention, fp8
from chitu_diffusion.ops import fused
from chitu_diffusion.ops.merge_lse import merge
from chitu_diffusion.ops.pack_qkv import pack
from chitu_diffusion.ops.packed_linear import BLOCKS, unpack

CALLS = 8
"""In a row for one reading of the clock: a short kernel is over before the host has begun the next."""
TEXT_ROWS = 130
TEXT_POSITIONS = 512
"""A prompt, or Wan's negative one, with its padding."""
Work = Callable[[bool], object]


def numbers(found: object) -> Tensor:
    """A result as one float32 tensor."""
    if isinstance(found, fused.Float8Rows):
        return found.widened().flatten()
    if isinstance(found, tuple):
        return torch.cat([numbers(each) for each in found])
    assert isinstance(found, Tensor)
    return found.float().flatten()


def checks(
    tokens: int, heads: int, device: torch.device, dtype: torch.dtype = torch.bfloat16
) -> dict[str, tuple[Work, float]]:
    """Name -> (work(ours?), allowed relative error), for heads of 128 channels."""
    dim = heads * 128
    ffn = heads * 128 * 35 // 6 // 16 * 16

    def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    x = normal(1, tokens, dim)
    added = normal(1, tokens, dim)
    wide = normal(1, tokens, ffn)
    weight = normal(dim)
    gate, scale, shift = normal(1, 3, dim, dtype=torch.float32).chunk(3, dim=1)
    angles = normal(tokens, 64, dtype=torch.float32)
    rope = (angles.cos(), angles.sin())
    affine = (1 + scale, shift)
    norm = partial(fused.layer_norm, x, affine, 1e-6, dtype)
    add_norm = partial(fused.add_gated_norm, x, added, gate, affine, 1e-6, dtype)
    two = [torch.cat([each, -each], dim=1) for each in (gate, *affine)]
    known = partial(fused.add_gated_norm, x, added, two[0], (two[1], two[2]), 1e-6, dtype, split=tokens // 3)
    turn = partial(fused.norm_and_rotate, x, added, (weight, weight), 1e-6, rope, heads)
    # Triton's interpreter, on a CPU, cuts off where a GPU rounds
    rounded = 2e-3 if device.type == "cuda" else 8e-2
    found: dict[str, tuple[Work, float]] = {
        "norm, modulate": (lambda f: norm(fused=f), 1e-3),
        "norm, modulate, 8 bits": (lambda f: norm(float8=True, fused=f), rounded),
        "residual": (lambda f: fused.add_gated(x, added, gate, fused=f), 1e-3),
        "residual, norm": (lambda f: add_norm(fused=f), 1e-3),
        "residual, norm, two times": (lambda f: known(fused=f), 1e-3),
        "residual, norm, 8 bits": (lambda f: add_norm(float8=True, fused=f), rounded),
        "q, k norm, turn": (lambda f: turn(fused=f), 1e-3),
        "gelu": (lambda f: fused.gelu(wide, fused=f), 1e-3),
        "gelu, 8 bits": (lambda f: fused.gelu(wide, float8=True, fused=f), rounded),
        "8 bits": (lambda f: fused.quantise(x, fused=f), rounded),
    }
    if cross_attention.has_fused_cross_attention(dtype, device, 128):
        found["text attention"] = text_attention(x, weight, heads, TEXT_ROWS), 1e-2
        found["text attention, no padding"] = text_attention(x, weight, heads, TEXT_POSITIONS), 1e-2
    found |= unpacking(dim, device, dtype)
    return found | around_ranks(tokens, heads, device, dtype) | attentions(tokens, heads, device, dtype)


def unpacking(dim: int, device: torch.device, dtype: torch.dtype) -> dict[str, tuple[Work, float]]:
    """A weight [dim, dim] in each packing that is kept, beside the gguf package's numbers, which were
    computed before: theirs is the time of a copy.
    """
    from gguf import GGMLQuantizationType, quants

    found: dict[str, tuple[Work, float]] = {}
    for packing in BLOCKS:
        blocks = random_blocks(dim * dim, packing, dim**-0.5, device)
        rows = blocks.view(-1, BLOCKS[packing][1]).cpu().numpy()
        theirs = torch.from_numpy(quants.dequantize(rows, GGMLQuantizationType[packing])).flatten()
        rounded = theirs.to(device, dtype)
        work = partial(_unpacked, blocks, packing, rounded)
        found[f"unpack {packing}"] = work, 0.0
    return found


def _unpacked(blocks: Tensor, packing: str, theirs: Tensor, ours: bool) -> Tensor:
    return unpack(blocks, packing, theirs.dtype) if ours else theirs.clone()


def text_attention(x: Tensor, weight: Tensor, heads: int, rows: int) -> Work:
    """The queries' norm and the attention to a padded text: ours over its `rows` that differ, the twin over
    all.
    """
    k, v = (torch.randn(1, rows, heads, 128, device=x.device).to(x.dtype) for _ in range(2))
    missing = TEXT_POSITIONS - rows
    bias = torch.zeros(1, rows, device=x.device)
    bias[:, -1] = torch.log(torch.tensor(missing + 1.0))
    k_all, v_all = (torch.cat([each, each[:, -1:].expand(-1, missing, -1, -1)], dim=1) for each in (k, v))

    def work(ours: bool) -> Tensor:
        if ours:
            return cross_attention.cross_attention(x, weight, 1e-6, k, v, bias, fused=True)
        return cross_attention.cross_attention(x, weight, 1e-6, k_all, v_all)

    return work


def around_ranks(
    tokens: int, heads: int, device: torch.device, dtype: torch.dtype
) -> dict[str, tuple[Work, float]]:
    """What stands between attention and the other ranks: packing for Ulysses, merging for the ring."""
    q, k, v = (torch.randn(1, tokens, heads, 128, device=device).to(dtype) for _ in range(3))
    lse = torch.randn(1, tokens, heads, device=device)
    half = heads // 2
    places = torch.empty(3, tokens, 3, 1, half, 128, dtype=dtype, device=device)

    def packed(ours: bool) -> Tensor:
        if ours:
            pack(q, k, v, places[:2], places[2], 1, half, 0)
            return places[::2]
        halves = (slice(0, half), slice(half, heads))
        return torch.stack(
            [torch.stack([each[:, :, own].transpose(0, 1) for each in (q, k, v)], dim=1) for own in halves]
        )

    def merged(ours: bool) -> tuple[Tensor, Tensor]:
        if ours:
            return merge(q, lse, k, lse.flip(1), dtype)
        both = torch.logaddexp(lse, lse.flip(1))
        out = q.float() * (lse - both).exp()[..., None] + k.float() * (lse.flip(1) - both).exp()[..., None]
        return out.to(dtype), both

    return {"pack": (packed, 0.0), "merge": (merged, 1e-3)}


def attentions(
    tokens: int, heads: int, device: torch.device, dtype: torch.dtype
) -> dict[str, tuple[Work, float]]:
    """Attention kernels that are GPUs' alone, beside cuDNN's."""
    if device.type != "cuda":
        return {}
    q, k, v = (torch.randn(1, tokens, heads, 128, device=device).to(dtype) for _ in range(3))
    steps = fp8.steps_on(device)

    def by_name(name: str) -> Work:
        return lambda ours: attention_kernel(name if ours else "cudnn")(q, k, v)

    return {
        "fa3_fp8's steps": (lambda f: fp8.attend_in_fp8(q, k, v, True, steps if f else fp8.PLAIN), 4e-2),
        "fa3 beside cudnn": (by_name("fa3"), 1e-2),
        "fa3_fp8 beside cudnn": (by_name("fa3_fp8"), 6e-2),
    }


def checked(name: str, work: Work, allowed: float, device: torch.device) -> dict[str, Any]:
    """A row: milliseconds of both, their distance, and "ok", "WRONG", or what was raised."""
    row: dict[str, Any] = {"kernel": name}
    try:
        error = relative_error(numbers(work(True)), numbers(work(False)))
        row["twin_ms"] = milliseconds(partial(work, False), device, calls=CALLS)[0]
        row["ours_ms"] = milliseconds(partial(work, True), device, calls=CALLS)[0]
        row |= {"relative_error": error, "allowed": allowed, "verdict": "ok" if error <= allowed else "WRONG"}
    except Exception as failure:
        traceback.print_exc()
        row |= {"allowed": allowed, "verdict": f"{type(failure).__name__}: {first_line(failure)[:80]}"}
    return row


@torch.no_grad()
def main(words: list[str] | None = None) -> int:
    """The command line."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--tokens", type=int, default=32760)
    options.add_argument("--heads", type=int, default=12)
    asked = options.parse_args(words)
    if not torch.cuda.is_available():
        raise SystemExit("no GPU here; the tests check the same kernels on a CPU: pytest tests/ops")
    device = torch.device("cuda")
    torch.manual_seed(0)
    rows = []
    for name, (work, allowed) in checks(asked.tokens, asked.heads, device).items():
        rows.append(checked(name, work, allowed, device))
        print(f"{name}: {rows[-1]['verdict']}", file=sys.stderr, flush=True)
    size = f"{asked.tokens} tokens, {asked.heads} heads of 128"
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {size}\n\n{table_of(rows)}")
    resumed = resume_rows("cuda", small=False)
    print(f"\nvideos that were cut short and went on in another process:\n\n{table_of(resumed)}", flush=True)
    rows += resumed
    return int(any(row["verdict"] != "ok" for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
