"""Attention kernels alone: milliseconds, TFLOP/s and error against float64, on noise and on what real q and k
look like.

    # every kernel that runs here, about 40 s on one H100
    python -m benchmarks.kernels
    python -m benchmarks.kernels --small --device cpu      # does it work?

Each shape is one layer's self-attention, batch 1, bfloat16: 832x480x81 of the 1.3B model (12 heads) and of
the 14B (40), and 1280x720x81 of the 14B. Work is 4 S^2 D a head, whatever a kernel does; times are medians by
CUDA events, the first call apart. Errors are relative L2 (norm of the difference over norm) of some query
rows of every head against float64, and the largest absolute difference of the log-sum-exp. The cases:

    gaussian    q, k, v independent, scores of standard deviation 1
    wide        q twice as large: scores of standard deviation 2
    mean        k has a mean for each channel, eight times as large as what varies
    sharp       as `mean`, and each query is twice its own key: one weight near 1
    channels    four channels of q and k are five times as large as the rest

Results go to `benchmarks/results/` after every section, as JSON; the tables are printed as they grow.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from chitu_diffusion.attention import KERNELS, fp8
from chitu_diffusion.attention.autotune import KernelAutotuner, Shape, machine_name
from chitu_diffusion.attention.kernels import AttentionKernel

RESULTS = Path(__file__).parent / "results"
CASES = ("gaussian", "wide", "mean", "sharp", "channels")
FULL = (Shape(32760, 12, 128), Shape(32760, 40, 128), Shape(75600, 40, 128))
SMALL = (Shape(300, 2, 64), Shape(200, 1, 128))
ROWS = 64
PLAIN_FLOAT8 = "fa3_fp8, plain scales"

Run = Callable[[Tensor, Tensor, Tensor], Tensor]
RunWithLse = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


class Bench:
    """What the sections share: where they run, and what they found.

    Args:
        device: a CUDA device, or the CPU to try the script out.
        repeats: timed calls of each kernel.
        path: where results are written.
    """

    def __init__(self, device: torch.device, repeats: int, path: Path) -> None:
        self.device, self.repeats, self.path = device, repeats, path
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.kernels = [kernel for kernel in KERNELS.values() if self.runs(kernel)]
        self.found: dict[str, Any] = {
            "machine": machine_name(device, self.kernels),
            "absent": self.absent(),
            "sections": {},
        }
        print(f"{self.found['machine']}\n")
        for name, why in self.found["absent"].items():
            print(f"- {name}: {why}")

    def runs(self, kernel: AttentionKernel) -> bool:
        """Whether it is measured here; the plain reference would take minutes on full shapes, float8 is
        emulated on a CPU.
        """
        if self.device.type == "cpu":
            return kernel.name in ("sdpa", "fused", "math", "fa3_fp8")
        return (
            kernel.name not in ("math", "fused")
            and kernel.why_unavailable(self.device, self.dtype, 128) is None
        )

    def absent(self) -> dict[str, str]:
        """Kernels that cannot run here, and why."""
        whys = {
            name: kernel.why_unavailable(self.device, self.dtype, 128) for name, kernel in KERNELS.items()
        }
        return {name: why for name, why in whys.items() if why is not None}

    def section(self, name: str, run: Callable[[], Any]) -> None:
        """Run one; what it raises is told and recorded, and the next one goes on."""
        print(f"\n## {name}\n", flush=True)
        began = time.perf_counter()
        try:
            rows = run()
        except Exception as error:
            traceback.print_exc()
            rows = {"error": f"{type(error).__name__}: {error}"}
        self.found["sections"][name] = {"seconds": round(time.perf_counter() - began, 2), "rows": rows}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.found, indent=1) + "\n", encoding="utf-8")
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def milliseconds(self, call: Callable[[], object]) -> tuple[float, float]:
        """(median, first call)."""
        taken = [self._once(call) for _ in range(self.repeats + 1)]
        return statistics.median(taken[1:]), taken[0]

    def _once(self, call: Callable[[], object]) -> float:
        if self.device.type != "cuda":
            began = time.perf_counter()
            call()
            return (time.perf_counter() - began) * 1e3
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)

    def inputs(self, shape: Shape, case: str = "gaussian") -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v [1, S, H, D] of a case."""
        size = (1, shape.tokens, shape.heads, shape.head_dim)
        q, k, v = (torch.randn(size, device=self.device, dtype=self.dtype) for _ in range(3))
        if case == "wide":
            q = q * 2
        if case == "sharp":
            q = k * 2
        if case in ("mean", "sharp"):
            k = k + 8 * torch.randn(1, 1, shape.heads, shape.head_dim, device=self.device, dtype=self.dtype)
        if case == "channels":
            factor = torch.ones(shape.head_dim, device=self.device, dtype=self.dtype)
            factor[torch.randperm(shape.head_dim, device=self.device)[:4]] = 5
            q, k = q * factor / 2, k * factor / 2
        return q, k, v


def table(columns: tuple[str, ...], rows: Iterator[dict[str, Any]]) -> list[dict[str, Any]]:
    """Print rows as Markdown while they come, and keep them."""
    print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    kept = []
    for row in rows:
        kept.append(row)
        print("| " + " | ".join(shown(row.get(column)) for column in columns) + " |", flush=True)
    return kept


def shown(value: Any) -> str:
    """A cell."""
    if isinstance(value, float):
        return f"{value:.4f}" if abs(value) < 1 else f"{value:.2f}"
    return "" if value is None else str(value)


def guarded(name: str, row: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A row, or what was raised in its place."""
    try:
        return {"kernel": name, **row()}
    except Exception as error:
        traceback.print_exc()
        return {"kernel": name, "error": f"{type(error).__name__}: {error}"}


def speeds(bench: Bench, shape: Shape) -> list[dict[str, Any]]:
    """Every kernel on one shape."""
    q, k, v = bench.inputs(shape)
    work = 4 * shape.tokens**2 * shape.heads * shape.head_dim

    def measure(kernel: AttentionKernel) -> dict[str, Any]:
        median, first = bench.milliseconds(lambda: kernel(q, k, v))
        return {
            "exact": "yes" if kernel.exact else "no",
            "ms": median,
            "TFLOP/s": work / median / 1e9,
            "first call ms": first,
        }

    columns = ("kernel", "exact", "ms", "TFLOP/s", "first call ms", "error")
    return table(
        columns, (guarded(kernel.name, lambda kernel=kernel: measure(kernel)) for kernel in bench.kernels)
    )


def reference(q: Tensor, k: Tensor, v: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Attention of some query rows in float64, head by head: out [1, R, H, D], lse [1, R, H]."""
    outs, lses = [], []
    for head in range(q.shape[2]):
        some, keys, values = (x[0, :, head].double() for x in (q[:, rows], k, v))
        scores = some @ keys.mT / q.shape[-1] ** 0.5
        outs.append(scores.softmax(-1) @ values)
        lses.append(scores.logsumexp(-1))
    return torch.stack(outs, 1)[None], torch.stack(lses, 1)[None]


def plain_float8(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """FlashAttention-3's float8 with one scale a head from the largest number, for comparison."""
    scales = [x.abs().amax((1, 3)).float() / 448 for x in (q, k, v)]
    q8, k8, v8 = (
        (x / scale[:, None, :, None]).to(fp8.FLOAT8) for x, scale in zip((q, k, v), scales, strict=True)
    )
    out, _ = fp8.attend(q8, k8, v8, scales[0], scales[1])
    return out.float() * scales[2][:, None, :, None]


def errors(bench: Bench, shape: Shape, cases: tuple[str, ...]) -> list[dict[str, Any]]:
    """Every kernel against float64, by case."""
    runs: dict[str, tuple[Run, RunWithLse | None]] = {
        kernel.name: (kernel.run, kernel.run_with_lse) for kernel in bench.kernels
    }
    if "fa3_fp8" in runs:
        runs[PLAIN_FLOAT8] = (plain_float8, None)
    found: dict[str, dict[str, Any]] = {name: {} for name in runs}
    for case in cases:
        q, k, v = bench.inputs(shape, case)
        rows = torch.randperm(shape.tokens, device=bench.device)[:ROWS]
        out, lse = reference(q, k, v, rows)

        def measure(run: Run, with_lse: RunWithLse | None, case: str = case) -> dict[str, Any]:
            row = {case: float((run(q, k, v)[:, rows].double() - out).norm() / out.norm())}  # noqa: B023
            if with_lse is not None:
                row[f"{case} lse"] = float((with_lse(q, k, v)[1][:, rows].double() - lse).abs().max())  # noqa: B023
            return row

        for name, (run, with_lse) in runs.items():
            found[name] |= guarded(name, lambda run=run, with_lse=with_lse: measure(run, with_lse))
    columns = ("kernel", *cases, *(f"{case} lse" for case in cases if case in ("gaussian", "mean")), "error")
    return table(columns, iter(found.values()))


def float8_steps(bench: Bench, shape: Shape) -> list[dict[str, Any]]:
    """Where the time of float8 attention goes, and how near Triton's steps are to plain torch's."""
    q, k, v = bench.inputs(shape, "mean")
    steps = fp8.steps_on(bench.device)
    means = steps.measure(q, k, v)
    scales = steps.scale(means)
    q8, given = steps.quantise_q(q, scales), steps.quantise_kv(k, v, scales)
    bias, matrix = steps.correct(means, scales, given)
    small = [x[:, : min(shape.tokens, 1000), :2].contiguous() for x in (q, k, v)]
    exact, ours = (fp8.attend_in_fp8(*small, False, some)[0].float() for some in (fp8.PLAIN, steps))
    print(
        f"triton against plain torch: {float((ours - exact).norm() / exact.norm()):.4f} relative (0.01 would "
        "be much)\n"
    )
    parts: dict[str, Callable[[], object]] = {
        "measure q, k, v": lambda: steps.measure(q, k, v),
        "scale": lambda: steps.scale(means),
        "quantise q": lambda: steps.quantise_q(q, scales),
        "quantise and measure k, v": lambda: steps.quantise_kv(k, v, scales),
        "correct": lambda: steps.correct(means, scales, given),
        "attention": lambda: fp8.attend(q8, given.k, given.v, scales.descale, scales.descale),
        "finish": lambda: steps.finish(q, None, q, scales, bias, matrix),
        "all": lambda: KERNELS["fa3_fp8"](q, k, v),
    }
    names = ("kernel", "ms", "error")
    return table(
        names,
        (
            guarded(name, lambda call=call: {"ms": bench.milliseconds(call)[0]})
            for name, call in parts.items()
        ),
    )


def automatic(bench: Bench, shapes: tuple[Shape, ...]) -> list[dict[str, Any]]:
    """What "auto" takes, with and without the log-sum-exp, and how long it takes to find out."""

    def choose(shape: Shape, needs_lse: bool) -> dict[str, Any]:
        began = time.perf_counter()
        kernel = KernelAutotuner(
            "auto", bench.device, bench.dtype, shape.head_dim, needs_lse=needs_lse
        ).for_shape(shape)
        return {"chosen": kernel.name, "with lse": str(needs_lse), "ms": (time.perf_counter() - began) * 1e3}

    asked = [(shape, needs_lse) for shape in shapes for needs_lse in (False, True)]
    rows = (guarded(title(shape), lambda shape=shape, lse=lse: choose(shape, lse)) for shape, lse in asked)
    return table(("kernel", "chosen", "with lse", "ms", "error"), rows)


def title(shape: Shape) -> str:
    """A shape in words."""
    return f"{shape.tokens} tokens, {shape.heads} heads of {shape.head_dim}"


def main() -> None:
    """All sections, the shortest first."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--small", action="store_true", help="small shapes, to see that it works")
    parser.add_argument("--repeats", type=int, default=5, help="timed calls of each kernel")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    asked = parser.parse_args()
    if asked.device == "cpu" and not asked.small:
        parser.error("full shapes take hours on a CPU: add --small")
    device = torch.device(asked.device)
    torch.manual_seed(0)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    short = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    path = (
        asked.out
        / f"{datetime.date.today().isoformat()}-attention-{short}{'-small' if asked.small else ''}.json"
    )
    shapes, bench = SMALL if asked.small else FULL, Bench(device, asked.repeats, path)
    with torch.inference_mode():
        bench.section(f"speed, {title(shapes[0])}", lambda: speeds(bench, shapes[0]))
        bench.section(f"relative error, {title(shapes[0])}", lambda: errors(bench, shapes[0], CASES))
        bench.section(f"steps of fa3_fp8, {title(shapes[0])}", lambda: float8_steps(bench, shapes[0]))
        bench.section("auto", lambda: automatic(bench, shapes[:2]))
        for shape in shapes[1:]:
            bench.section(f"speed, {title(shape)}", lambda shape=shape: speeds(bench, shape))
        bench.section(
            f"relative error, {title(shapes[-1])}", lambda: errors(bench, shapes[-1], ("gaussian", "mean"))
        )
    print(f"\n{path}")


if __name__ == "__main__":
    main()
