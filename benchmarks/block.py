"""What fused kernels, `torch.compile` and 8-bit linear layers are worth: kernels alone, one block, one whole
forward.

    python benchmarks/block.py                                   Wan2.1-1.3B, 832x480, 81 frames (32,760
                                                                 tokens), on the GPU
    python benchmarks/block.py --model Wan2.1-T2V-14B --layers 8
    python benchmarks/block.py --small --device cpu              a toy network, in seconds; "compiled" is then
                                                                 traced only

Random weights, one guidance branch, batch 1, a text of 130 rows padded to 512. Times are medians by CUDA
events; the first call of each variant is reported apart. The error is that of the velocity against the same
weights in float32. Results are written after every section to benchmarks/results/; a section that fails is
reported there and the rest goes on. Knows the transformer; no text, VAE or steps.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import math
import statistics
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chitu_diffusion.attention import AttentionKernel, attention_kernel, cross_attention, sdpa
from chitu_diffusion.config import keep_compiled_code
from chitu_diffusion.models.registry import resolve_model
from chitu_diffusion.models.wan.transformer import KEEP_FLOAT32, WanConfig, WanTransformer
from chitu_diffusion.ops import fused
from chitu_diffusion.ops.float8_linear import Float8Linear, Float8Plan, set_float8, to_float8

RESULTS = Path(__file__).parent / "results"
SMALL = WanConfig(
    num_attention_heads=2,
    attention_head_dim=16,
    in_channels=4,
    out_channels=4,
    text_dim=24,
    freq_dim=32,
    ffn_dim=96,
    num_layers=3,
)
CALLS = 8
# (name, fused, compiled, 8 bits): what is compiled stays so, hence last
VARIANTS = [
    ("plain", False, False, False),
    ("fused", True, False, False),
    ("plain fp8", False, False, True),
    ("fused fp8", True, False, True),
    ("compiled fused", True, True, False),
    ("compiled fused fp8", True, True, True),
    ("compiled", False, True, False),
    ("compiled fp8", False, True, True),
]
TEXT_ROWS, TEXT_POSITIONS = 130, 512  # a prompt, or Wan's negative one, with its padding
SHARES = {  # by parts of kernels' names; the first that fits, else element-wise
    "element-wise": ("triton_poi", "triton_red", "triton_per"),
    "attention": ("flash", "fmha", "sdpa", "attention", "attn"),
    "matrix products": (
        "gemm",
        "cutlass",
        "xmma",
        "cublas",
        "nvjet",
        "scaled_mm",
        "mm_kernel",
        "cudnn",
        "addmm",
        "splitk",
    ),
    "copies and casts": ("memcpy", "memset", "copy"),
}


class Bench:
    """One network, its inputs, the clock, and the results so far."""

    def __init__(self, asked: argparse.Namespace) -> None:
        self.asked, self.began = asked, time.perf_counter()
        self.device = torch.device(asked.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.cuda = self.device.type == "cuda"
        self.dtype = torch.bfloat16 if self.cuda else torch.float32
        self.config, shape = self._size()
        self.attention = kernel_named(asked.attention)
        torch.manual_seed(0)
        with self.device:
            self.network = WanTransformer(self.config).eval().requires_grad_(False)
            self.latent, self.time = torch.randn(1, *shape).to(self.dtype), torch.full((1,), 500.0)
            self.text = torch.randn(1, TEXT_POSITIONS, self.config.text_dim).to(self.dtype)
            self.text[:, TEXT_ROWS - 1 :] = 0
        for name, parameter in self.network.named_parameters():
            if set(name.split(".")).isdisjoint(KEEP_FLOAT32):
                parameter.data = parameter.data.to(self.dtype)
        self.prepared = self.network.make_text_kv(self.text, TEXT_ROWS)
        patch = self.config.patch_size
        self.tokens = self.latent[0, 0].numel() // (patch[0] * patch[1] * patch[2])
        self.float8: list[Float8Linear] = []
        self.reference: Tensor | None = None
        name = torch.cuda.get_device_name(self.device) if self.cuda else "cpu"
        self.facts: dict[str, Any] = {
            "device": name,
            "torch": torch.__version__,
            "triton": fused.HAS_TRITON and fused.fused_triton.triton.__version__,
            "model": "small" if asked.small else asked.model,
            "layers": self.config.num_layers,
            "dim": self.config.dim,
            "tokens": self.tokens,
            "dtype": str(self.dtype).removeprefix("torch."),
            "attention": self.attention.name,
        }
        self.rows: dict[str, list[dict[str, Any]]] = {}
        self.failures: dict[str, str] = {}

    def _size(self) -> tuple[WanConfig, tuple[int, ...]]:
        if self.asked.small:
            return SMALL, (4, 2, 4, 6)
        spec, _ = resolve_model(self.asked.model, None)
        width, height = (int(side) for side in self.asked.size.split("x"))
        config = spec.transformers[0]
        if self.asked.layers:
            config = WanConfig.from_json({**config.to_json(), "num_layers": self.asked.layers})
        return config, spec.geometry.latent_shape(self.asked.frames, height, width)

    def seconds(self, work: Callable[[], object], repeats: int) -> list[float]:
        """Seconds of each call."""
        taken = []
        for _ in range(repeats):
            if self.cuda:
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                start.record()
                work()
                end.record()
                torch.cuda.synchronize()
                taken.append(start.elapsed_time(end) / 1e3)
            else:
                begun = time.perf_counter()
                work()
                taken.append(time.perf_counter() - begun)
        return taken

    def ms(self, work: Callable[[], object], repeats: int = 5) -> float:
        """Median milliseconds after one warm-up; on a GPU of several calls in a row, for a short one is over
        before the host has begun the next."""
        self.seconds(work, 1)
        calls = CALLS if self.cuda else 1
        return 1e3 * statistics.median(self.seconds(lambda: [work() for _ in range(calls)], repeats)) / calls

    def forward(self) -> Tensor:
        """One velocity; the text's keys are made by the first call, as a task's first step makes them."""
        return self.network(self.latent, self.time, self.prepared, attention=self.attention)

    def section(self, name: str, work: Callable[[], None]) -> None:
        """Runs a section, if there is time; whatever happens is written down."""
        if time.perf_counter() - self.began > self.asked.seconds:
            self.failures[name] = "not begun: out of time"
        else:
            try:
                work()
            except Exception:
                self.failures[name] = traceback.format_exc()
                print(self.failures[name], flush=True)
        self.write()

    def add(self, table: str, **row: Any) -> None:
        self.rows.setdefault(table, []).append(row)
        print(table, json.dumps(row), flush=True)

    def write(self) -> None:
        """JSON and Markdown of all that is known."""
        self.asked.out.mkdir(parents=True, exist_ok=True)
        slug = f"{self.facts['model']}-{self.facts['device']}".lower().replace(" ", "-")
        kind = "launches" if self.asked.tune else "block"
        file = self.asked.out / f"{datetime.date.today()}-{kind}-{slug}.json"
        spent = round(time.perf_counter() - self.began, 1)
        data = {"facts": self.facts, "seconds": spent, **self.rows, "failures": self.failures}
        file.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        lines = [f"# Blocks: {self.facts['model']} on {self.facts['device']}", ""]
        lines += [f"* {key}: {value}" for key, value in self.facts.items()] + [""]
        for name, rows in self.rows.items():
            columns = list(dict.fromkeys(key for row in rows for key in row))
            lines += [f"## {name}", "", f"| {' | '.join(columns)} |", "|" + " --- |" * len(columns)]
            lines += [f"| {' | '.join(shown(row.get(column)) for column in columns)} |" for row in rows] + [
                ""
            ]
        lines += [f"failed: {name}: {text.strip().splitlines()[-1]}" for name, text in self.failures.items()]
        file.with_suffix(".md").write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


def kernel_named(name: str) -> AttentionKernel:
    """The attention kernel of that name, or torch's own."""
    try:
        return attention_kernel(name)
    except Exception as error:
        print(f"attention {name}: {error}; sdpa instead", flush=True)
        return sdpa


def shown(value: object) -> str:
    """A cell of a Markdown table."""
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())


def widest(found: object) -> Tensor:
    """A result as one tensor that can be compared."""
    if isinstance(found, fused.Float8Rows):
        return found.widened()
    return widest(found[-1]) if isinstance(found, tuple) else found  # type: ignore[return-value]


def kernels(bench: Bench) -> None:
    """Each kernel beside its twin: milliseconds, bytes a second, and how far they are apart."""
    dim, heads, ffn = bench.config.dim, bench.config.num_attention_heads, bench.config.ffn_dim
    with bench.device:
        x, added = (torch.randn(1, bench.tokens, dim).to(bench.dtype) for _ in range(2))
        wide = torch.randn(1, bench.tokens, ffn).to(bench.dtype)
        gate, scale, shift = torch.randn(1, 3, dim).chunk(3, dim=1)
        weights = (torch.rand(dim).to(bench.dtype), torch.rand(dim).to(bench.dtype))
        angles = torch.rand(bench.tokens, dim // heads // 2)
    rope, affine, eps, item = (angles.cos(), angles.sin()), (1 + scale, shift), 1e-6, bench.dtype.itemsize
    copied = torch.empty_like(wide)
    ms = bench.ms(lambda: copied.copy_(wide))
    bench.add("kernels", name="copy", twin_ms=ms, gb_per_s=2 * wide.numel() * item / ms / 1e6)
    cases: list[tuple[str, Callable[[bool], object], float]] = [  # (name, work(fused), bytes that must move)
        (
            "norm, modulate",
            lambda f: fused.layer_norm(x, affine, eps, x.dtype, fused=f),
            2 * item * x.numel(),
        ),
        (
            "norm, modulate, 8 bits",
            lambda f: fused.layer_norm(x, affine, eps, x.dtype, float8=True, fused=f),
            3 * x.numel(),
        ),
        ("residual", lambda f: fused.add_gated(x, added, gate, fused=f), 3 * item * x.numel()),
        (
            "residual, norm",
            lambda f: fused.add_gated_norm(x, added, gate, affine, eps, x.dtype, fused=f),
            4 * item * x.numel(),
        ),
        (
            "residual, norm, 8 bits",
            lambda f: fused.add_gated_norm(x, added, gate, affine, eps, x.dtype, float8=True, fused=f),
            (3 * item + 1) * x.numel(),
        ),
        (
            "q, k norm, turn",
            lambda f: fused.norm_and_rotate(x, added, weights, eps, rope, heads, fused=f),
            4 * item * x.numel(),
        ),
        ("gelu", lambda f: fused.gelu(wide, fused=f), 2 * item * wide.numel()),
        ("gelu, 8 bits", lambda f: fused.gelu(wide, float8=True, fused=f), (item + 1) * wide.numel()),
        ("8 bits", lambda f: fused.quantise(x, fused=f), (item + 1) * x.numel()),
    ]
    if cross_attention.has_fused_cross_attention(bench.dtype, bench.device, dim // heads):
        for name, rows in (("text attention", TEXT_ROWS), ("text attention, no padding", TEXT_POSITIONS)):
            cases.append((name, text_attention(bench, x, heads, rows), 2 * item * x.numel()))
    can = fused.can_fuse(x)
    for name, work, size in cases:
        row: dict[str, Any] = {"name": name, "twin_ms": bench.ms(lambda work=work: work(False))}
        if can:
            ms = bench.ms(lambda work=work: work(True))
            apart = relative_error(widest(work(True)), widest(work(False)))
            row |= {"fused_ms": ms, "gb_per_s": size / ms / 1e6, "relative_difference": apart}
        bench.add("kernels", **row)


def text_attention(bench: Bench, x: Tensor, heads: int, rows: int) -> Callable[[bool], Tensor]:
    """Work(fused) of the queries' norm and the cross-attention: over a padded text, or over its `rows` that
    differ.
    """
    with bench.device:
        k, v = (torch.randn(1, rows, heads, x.shape[-1] // heads).to(x.dtype) for _ in range(2))
        weight, bias = torch.rand(x.shape[-1]).to(x.dtype), torch.zeros(1, rows)
    missing = TEXT_POSITIONS - rows
    bias[:, -1] = math.log(missing + 1)
    k_all, v_all = (torch.cat([each, each[:, -1:].expand(-1, missing, -1, -1)], dim=1) for each in (k, v))

    def work(fuse: bool) -> Tensor:
        if fuse:
            return cross_attention.cross_attention(x, weight, 1e-6, k, v, bias, fused=True)
        return cross_attention.cross_attention(x, weight, 1e-6, k_all, v_all)

    return work


def text_launches(bench: Bench, heads: int, rows: int) -> None:
    """Ways to start the text attention: how many tokens and keys, which warps, and programs that share a
    tile's heads.
    """
    ours = cross_attention.cross_attention_triton
    own = ours.launch_text
    with bench.device:
        x = torch.randn(1, bench.tokens, 128 * heads).to(bench.dtype)
    work = text_attention(bench, x, heads, rows)
    expected = work(False)
    bench.add("text launches", heads=heads, rows=rows, today=True, ms=bench.ms(lambda: work(False)))
    chosen = own(1, bench.tokens, rows, heads, 128, x.dtype)
    looped = chosen._replace(unroll=False, stages=3)
    ways = [chosen, looped, looped._replace(stages=2), *(chosen._replace(parts=parts) for parts in (2, 4))]
    ways += [chosen._replace(keys=128), chosen._replace(tile=64, warps=4), chosen._replace(tile=64, warps=8)]
    ways += [looped._replace(tile=64, warps=4, stages=stages) for stages in (3, 2)]
    for way in dict.fromkeys(ways):
        row: dict[str, Any] = {"heads": heads, "rows": rows, **way._asdict(), "chosen": way == chosen}
        ours.launch_text = lambda *_, way=way: way
        try:
            row["ms"] = bench.ms(lambda: work(True))
            row["gb_per_s"] = 2e-6 * x.dtype.itemsize * x.numel() / row["ms"]
            row["relative_difference"] = relative_error(work(True), expected)
        except Exception as error:  # too much shared memory, most of all
            row["failed"] = str(error).splitlines()[0][:80]
        finally:
            ours.launch_text = own
        bench.add("text launches", **row)


def launches(bench: Bench) -> None:
    """Warps of a program, for the widths of both model sizes: which the kernels' launches should choose."""
    ours, item = fused.fused_triton, bench.dtype.itemsize
    own = ours.launch, ours.launch_row
    for dim in (128 * 12, 128 * 40):
        with bench.device:
            x, added = (torch.randn(1, bench.tokens, dim).to(bench.dtype) for _ in range(2))
            gate, scale, shift = torch.randn(1, 3, dim).chunk(3, dim=1)
            angles = torch.rand(bench.tokens, 64)
        rope, weights = (angles.cos(), angles.sin()), (scale[0, 0].to(x.dtype), shift[0, 0].to(x.dtype))
        turned, row = own[0](dim), own[1](dim)
        works = {
            "residual, norm": partial(
                fused.add_gated_norm, x, added, gate, (scale, shift), 1e-6, x.dtype, fused=True
            ),
            "q, k norm, turn": partial(
                fused.norm_and_rotate, x, added, weights, 1e-6, rope, dim // 128, fused=True
            ),
        }
        for warps in (1, 2, 4, 8, 16):
            ours.launch = lambda _: (*turned[:2], {"num_warps": warps})  # noqa: B023
            ours.launch_row = lambda _: (*row[:2], {"num_warps": warps})  # noqa: B023
            try:
                speeds = {name: 4e-6 * item * x.numel() / bench.ms(work) for name, work in works.items()}
            finally:
                ours.launch, ours.launch_row = own
            chosen = [
                name
                for name, (_, _, options) in zip(works, (row, turned), strict=True)
                if options["num_warps"] == warps
            ]
            names = {
                "residual_norm_gb_per_s": speeds["residual, norm"],
                "norm_turn_gb_per_s": speeds["q, k norm, turn"],
            }
            bench.add("launches", dim=dim, warps=warps, **names, chosen=" and ".join(chosen) or None)


def products(bench: Bench) -> None:
    """Matrix products in 16 and 8 bits, and the GELU inside or behind one."""
    dim, ffn = bench.config.dim, bench.config.ffn_dim
    for rows, columns in ((dim, dim), (dim, ffn), (ffn, dim)):
        with bench.device:
            linear = nn.Linear(rows, columns).to(bench.dtype).requires_grad_(False)
            x = torch.randn(1, bench.tokens, rows).to(bench.dtype)
        layer = Float8Linear(linear)
        layer.quantise_weight()
        set_float8([layer], True)
        quantised, operations = fused.quantise(x), 2e-9 * bench.tokens * rows * columns
        wide, small = bench.ms(lambda: linear(x)), bench.ms(lambda: layer(quantised))  # noqa: B023
        row = {"name": f"{rows} to {columns}", "ms": wide, "tflop_per_s": operations / wide, "fp8_ms": small}
        row |= {
            "fp8_tflop_per_s": operations / small,
            "fp8_relative_error": relative_error(layer(quantised), linear(x)),
        }
        if columns == ffn and fused.has_linear_gelu(x, linear.weight, True):
            row["then_gelu_ms"] = bench.ms(lambda: F.gelu(linear(x), approximate="tanh"))  # noqa: B023
            row["gelu_inside_ms"] = bench.ms(lambda: fused.linear_gelu(x, linear.weight, linear.bias))  # noqa: B023
            inside = fused.linear_gelu(x, linear.weight, linear.bias)
            row["gelu_inside_difference"] = relative_error(inside, F.gelu(linear(x), approximate="tanh"))
        bench.add("products", **row)


def reference(bench: Bench) -> None:
    """The velocity of the same weights in float32."""
    network = copy.deepcopy(bench.network).float()
    network.use_fused(False)
    bench.reference = network(bench.latent.float(), bench.time, bench.text.float())
    del network
    if bench.cuda:
        torch.cuda.empty_cache()


def variant(bench: Bench, name: str, fuse: bool, compile_: bool, in_float8: bool) -> None:
    """One way to run the network: first call, later calls, one block alone, memory, error, and where the time
    goes.
    """
    network = bench.network
    if in_float8 and not bench.float8:
        keep = Float8Plan().keep if bench.config.num_layers > 2 else ()
        bench.float8 = to_float8(list(network.blocks), Float8Plan(keep))
    set_float8(bench.float8, in_float8)
    network.use_fused(fuse)
    if compile_ and not network.compiled:
        keep_compiled_code()
        network.compile_blocks(**({"mode": bench.asked.mode} if bench.cuda else {"backend": "eager"}))
    if bench.cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    begun = time.perf_counter()
    velocity = bench.forward()
    if bench.cuda:
        torch.cuda.synchronize()
    row: dict[str, Any] = {"name": name, "first_s": time.perf_counter() - begun}
    row["ms"] = 1e3 * statistics.median(bench.seconds(bench.forward, 3))
    if bench.cuda:
        row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    if bench.reference is not None:
        row["relative_error"] = relative_error(velocity, bench.reference)
    embedded = bench.network.embed(bench.latent, bench.time, bench.prepared)
    block = network.blocks[1]
    weighted = block.takes_bias(embedded.tokens, embedded.text.rows.dtype)
    text = embedded.text.keys(1, block.text_keys, weighted)
    row["block_ms"] = bench.ms(
        lambda: block(embedded.tokens, text, embedded.modulation, embedded.rope, bench.attention)
    )
    bench.add("forwards", **row)
    if bench.cuda:
        bench.add("shares", name=name, **shares(bench.forward))


def shares(work: Callable[[], object]) -> dict[str, float]:
    """Milliseconds of one call on the device, by kind of kernel, and the gaps between kernels."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        work()
        torch.cuda.synchronize()
    spent = dict.fromkeys(SHARES, 0.0)
    events = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    for event in events:
        kind = next(
            (kind for kind, words in SHARES.items() if any(word in event.name.lower() for word in words)),
            "element-wise",
        )
        spent[kind] += event.time_range.elapsed_us() / 1e3
    if events:
        whole = max(event.time_range.end for event in events) - min(
            event.time_range.start for event in events
        )
        spent["gaps"] = whole / 1e3 - sum(spent.values())
    return spent


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="Wan2.1-T2V-1.3B")
    parser.add_argument("--size", default="832x480")
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--layers", type=int, help="fewer than the model has")
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--device")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--mode", help="of torch.compile, such as max-autotune-no-cudagraphs")
    parser.add_argument(
        "--variants", default=",".join(name for name, *_ in VARIANTS), help="of the forwards, by name"
    )
    parser.add_argument("--tune", action="store_true", help="only time the kernels' launch options, on a GPU")
    parser.add_argument("--seconds", type=float, default=110, help="begin no section after this")
    parser.add_argument("--out", type=Path, default=RESULTS)
    bench = Bench(parser.parse_args())
    if bench.asked.tune:
        for heads, rows in ((12, TEXT_ROWS), (40, TEXT_ROWS), (12, 127), (12, 40)):
            name = f"text launches, {heads} heads, {rows} rows"
            bench.section(name, lambda heads=heads, rows=rows: text_launches(bench, heads, rows))
        return bench.section("launches", lambda: launches(bench))
    bench.section("kernels", lambda: kernels(bench))
    bench.section("products", lambda: products(bench))
    bench.section("reference", lambda: reference(bench))
    for name, *how in VARIANTS:
        if name in bench.asked.variants.split(","):
            bench.section(name, lambda name=name, how=how: variant(bench, name, *how))
    if bench.failures:
        raise SystemExit(f"failed: {', '.join(bench.failures)}")


if __name__ == "__main__":
    main()
