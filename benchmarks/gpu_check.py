"""Does every GPU kernel of ours give what its plain twin gives, at full size? One table, some 20 s; exit code
1 if one does not.

    python -m benchmarks.gpu_check                     # Wan2.1-1.3B's shapes: 32,760 tokens, 12 heads of 128
    python -m benchmarks.gpu_check --tokens 4095 --heads 40

The tests do the same on a CPU, where Triton interprets the kernels; here they are compiled. Errors are
relative, norm over norm, against the twin in the same dtypes; allowed are a few roundings to bfloat16 (4e-3
each), or to 8 bits where that is the task.
"""

from __future__ import annotations

import argparse
import traceback
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.measuring import timed_ms
from chitu_diffusion.attention import attention_kernel, cross_attention, fp8
from chitu_diffusion.ops import fused
from chitu_diffusion.ops.merge_lse import merge
from chitu_diffusion.ops.pack_qkv import pack

CALLS = 5
Work = Callable[[bool], object]


def numbers(found: object) -> Tensor:
    """A result as one float32 tensor."""
    if isinstance(found, fused.Float8Rows):
        return found.widened().flatten()
    return (
        torch.cat([numbers(each) for each in found]) if isinstance(found, tuple) else found.float().flatten()
    )  # type: ignore


def checks(tokens: int, heads: int) -> dict[str, tuple[Work, float]]:
    """Name -> (work(ours?), allowed relative error)."""
    device, dim, ffn = torch.device("cuda"), heads * 128, heads * 128 * 35 // 6 // 16 * 16
    torch.manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    x, added, wide, weight = (
        normal(1, tokens, dim),
        normal(1, tokens, dim),
        normal(1, tokens, ffn),
        normal(dim),
    )
    gate, scale, shift = normal(1, 3, dim, dtype=torch.float32).chunk(3, dim=1)
    angles = normal(tokens, 64, dtype=torch.float32)
    rope, affine = (angles.cos(), angles.sin()), (1 + scale, shift)
    q, k, v = (normal(1, tokens, heads, 128) for _ in range(3))
    lse = normal(1, tokens, heads, dtype=torch.float32)
    places = torch.empty(3, tokens, 3, 1, heads // 2, 128, dtype=torch.bfloat16, device=device)
    bias = torch.zeros(1, 130, device=device)
    bias[:, -1] = torch.log(torch.tensor(383.0))
    text_k, text_v = normal(1, 130, heads, 128), normal(1, 130, heads, 128)

    def text(ours: bool) -> Tensor:
        if ours:
            return cross_attention.cross_attention(x, weight, 1e-6, text_k, text_v, bias, fused=True)
        copies = (torch.cat([each, each[:, -1:].expand(-1, 382, -1, -1)], dim=1) for each in (text_k, text_v))
        return cross_attention.cross_attention(x, weight, 1e-6, *copies)

    def packed(ours: bool) -> Tensor:
        if ours:
            pack(q, k, v, places[:2], places[2], 1, heads // 2, 0)
            return places[::2]
        parts = [
            torch.stack([each[:, :, own].transpose(0, 1) for each in (q, k, v)], dim=1)
            for own in _halves(heads)
        ]
        return torch.stack(parts)

    def merged(ours: bool) -> tuple[Tensor, Tensor]:
        if ours:
            return merge(q, lse, k, lse.flip(1), torch.bfloat16)
        both = torch.logaddexp(lse, lse.flip(1))
        out = q.float() * (lse - both).exp()[..., None] + k.float() * (lse.flip(1) - both).exp()[..., None]
        return out.bfloat16(), both

    def by_name(name: str) -> Work:
        exact, other = attention_kernel("cudnn"), attention_kernel(name)
        return lambda ours: (other if ours else exact)(q, k, v)

    steps = fp8.steps_on(device)
    return {
        "norm, modulate": (lambda f: fused.layer_norm(x, affine, 1e-6, x.dtype, fused=f), 1e-3),
        "norm, modulate, 8 bits": (
            lambda f: fused.layer_norm(x, affine, 1e-6, x.dtype, float8=True, fused=f),
            2e-3,
        ),
        "residual, norm": (
            lambda f: fused.add_gated_norm(x, added, gate, affine, 1e-6, x.dtype, fused=f),
            1e-3,
        ),
        "q, k norm, turn": (
            lambda f: fused.norm_and_rotate(x, added, (weight, weight), 1e-6, rope, heads, fused=f),
            1e-3,
        ),
        "gelu, 8 bits": (lambda f: fused.gelu(wide, float8=True, fused=f), 2e-3),
        "text attention": (text, 1e-2),
        "pack": (packed, 0.0),
        "merge": (merged, 1e-3),
        "fa3_fp8's steps": (lambda f: fp8.attend_in_fp8(q, k, v, True, steps if f else fp8.PLAIN), 4e-2),
        "fa3 beside cudnn": (by_name("fa3"), 1e-2),
        "fa3_fp8 beside cudnn": (by_name("fa3_fp8"), 6e-2),
    }


def _halves(heads: int) -> tuple[slice, slice]:
    return slice(0, heads // 2), slice(heads // 2, heads)


def milliseconds(work: Callable[[], object], device: torch.device) -> float:
    """Of one of several calls in a row; the better of two such rows."""
    return min(timed_ms(lambda: [work() for _ in range(CALLS)], device) for _ in range(2)) / CALLS


@torch.no_grad()
def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=32760)
    parser.add_argument("--heads", type=int, default=12)
    asked = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("no GPU here; the tests check the same kernels on a CPU: pytest tests/test_fused.py")
    device, bad = torch.device("cuda"), 0
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {asked.tokens} tokens, {asked.heads} "
        "heads of 128\n"
    )
    print("| kernel | twin, ms | ours, ms | relative error | allowed | |\n|---|---:|---:|---:|---:|---|")
    for name, (work, allowed) in checks(asked.tokens, asked.heads).items():
        try:
            expected = numbers(work(False))
            error = float((numbers(work(True)) - expected).norm() / expected.norm())
            times = [milliseconds(partial(work, ours), device) for ours in (False, True)]
            said = "ok" if error <= allowed else "WRONG"
            print(
                f"| {name} | {times[0]:.3f} | {times[1]:.3f} | {error:.1e} | {allowed:.0e} | {said} |",
                flush=True,
            )
        except Exception as failure:
            traceback.print_exc()
            said = f"{type(failure).__name__}: {str(failure).splitlines()[0][:80]}"
            print(f"| {name} | | | | {allowed:.0e} | {said} |", flush=True)
        bad += said != "ok"
    return int(bad > 0)


if __name__ == "__main__":
    raise SystemExit(main())
