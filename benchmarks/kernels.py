"""Kernels alone, and what they are worth in a forward: attention, what stands around it, products, switches.

    python -m benchmarks.kernels                           # 1.3B at 832x480x81 and 14B's shapes, on a GPU
    python -m benchmarks.kernels --sections around plain "fused fp8" --model Wan2.1-T2V-14B --layers 8
    python -m benchmarks.kernels --tune                    # only the launch options of Triton's kernels
    python -m benchmarks.kernels --small --device cpu      # does it work? "compiled" is then traced only

Attention: one layer's, batch 1, bfloat16. Work is 4 S^2 D a head, whatever a kernel does; times are medians
by CUDA events, the first call apart. Errors are relative L2 (norm of the difference over norm) of some query
rows of every head against float64, and the largest absolute difference of the log-sum-exp. The cases:

    gaussian    q, k, v independent, scores of standard deviation 1
    wide        q twice as large: scores of standard deviation 2
    mean        k has a mean for each channel, eight times as large as what varies
    sharp       as `mean`, and each query is twice its own key: one weight near 1
    channels    four channels of q and k are five times as large as the rest

Forwards: random weights, one guidance branch, a text of 130 rows padded to 512; the error is that of the
velocity against the same weights in float32.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.gpu_check import CALLS, checked, checks
from benchmarks.launches import tuning
from benchmarks.measuring import GIB, breakdown, kernel_spans, milliseconds, peak_bytes, relative_error
from benchmarks.networks import Case, Workload, case_of, small_case
from benchmarks.report import Report, Section, first_line, parser, report_for, run_sections
from chitu_diffusion.attention import KERNELS, attention_kernel, fp8, sdpa
from chitu_diffusion.attention.autotune import KernelAutotuner, Shape
from chitu_diffusion.attention.kernels import AttentionKernel
from chitu_diffusion.config import keep_compiled_code
from chitu_diffusion.errors import UsageError
from chitu_diffusion.ops import fused
from chitu_diffusion.ops.float8_linear import Float8Linear, Float8Plan, set_float8, to_float8

CASES = ("gaussian", "wide", "mean", "sharp", "channels")
FULL = (Shape(32760, 12, 128), Shape(32760, 40, 128), Shape(75600, 40, 128))
SMALL = (Shape(300, 2, 64), Shape(200, 1, 128))
ROWS = 64
PLAIN_FLOAT8 = "fa3_fp8, plain scales"
VARIANTS: dict[str, tuple[bool, bool, bool]] = {
    "plain": (False, False, False),
    "fused": (True, False, False),
    "plain fp8": (False, False, True),
    "fused fp8": (True, False, True),
    "compiled": (False, True, False),
    "compiled fused": (True, True, False),
    "compiled fp8": (False, True, True),
    "compiled fused fp8": (True, True, True),
}
"""Name -> (fused kernels, compiled, 8 bits)."""
MOVED = {
    "norm, modulate": (2, 0),
    "norm, modulate, 8 bits": (1, 1),
    "residual": (3, 0),
    "residual, norm": (4, 0),
    "residual, norm, 8 bits": (3, 1),
    "q, k norm, turn": (4, 0),
    "gelu": (2, 0),
    "gelu, 8 bits": (1, 1),
    "8 bits": (1, 1),
    "text attention": (2, 0),
    "text attention, no padding": (2, 0),
}
"""What a kernel must read and write for each number of its input: numbers like it, and bytes."""

Run = Callable[[Tensor, Tensor, Tensor], Tensor]
RunWithLse = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass
class AttentionTrial:
    """Where attention kernels run, and which.

    Attributes:
        device, dtype: of q, k and v.
        repeats: timed calls of each kernel.
        kernels: those that run here.
    """

    device: torch.device
    dtype: torch.dtype
    repeats: int
    kernels: list[AttentionKernel]

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
            q = q * factor / 2
            k = k * factor / 2
        return q, k, v

    def ms(self, call: Callable[[], object]) -> tuple[float, float]:
        """(median, first call)."""
        return milliseconds(call, self.device, self.repeats)


def attention_trial(device: torch.device, repeats: int, report: Report) -> AttentionTrial:
    """The kernels that are measured here; the others are noted. The plain reference would take minutes on
    full shapes, float8 is emulated on a CPU.
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    found = []
    for name, kernel in KERNELS.items():
        why = kernel.why_unavailable(device, dtype, 128)
        if why is not None:
            report.note(f"{name}: {why}")
        here = why is None or (name == "fa3_fp8" and device.type == "cpu")
        if here and (device.type == "cpu" or name not in ("math", "fused")):
            found.append(kernel)
    return AttentionTrial(device, dtype, repeats, found)


def guarded(name: str, row: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A row, or what was raised in its place."""
    try:
        return {"kernel": name, **row()}
    except Exception as error:
        return {"kernel": name, "error": f"{type(error).__name__}: {first_line(error)}"}


def speeds(trial: AttentionTrial, shape: Shape, report: Report) -> None:
    """Every kernel on one shape."""
    q, k, v = trial.inputs(shape)
    work = 4 * shape.tokens**2 * shape.heads * shape.head_dim

    def measure(kernel: AttentionKernel) -> dict[str, Any]:
        median, first = trial.ms(lambda: kernel(q, k, v))
        speed = work / median / 1e9
        return {"exact": kernel.exact, "ms": median, "tflops": speed, "first_call_ms": first}

    for kernel in trial.kernels:
        report.add(f"Attention, {title(shape)}", guarded(kernel.name, partial(measure, kernel)))


def reference(q: Tensor, k: Tensor, v: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Attention of some query rows in float64, head by head: out [1, R, H, D], lse [1, R, H]."""
    outs = []
    lses = []
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


def errors(trial: AttentionTrial, shape: Shape, cases: tuple[str, ...], report: Report) -> None:
    """Every kernel against float64, by case."""
    runs: dict[str, tuple[Run, RunWithLse | None]] = {
        kernel.name: (kernel.run, kernel.run_with_lse) for kernel in trial.kernels
    }
    if "fa3_fp8" in runs:
        runs[PLAIN_FLOAT8] = (plain_float8, None)
    found: dict[str, dict[str, Any]] = {name: {} for name in runs}
    for case in cases:
        inputs = trial.inputs(shape, case)
        rows = torch.randperm(shape.tokens, device=trial.device)[:ROWS]
        for name, both in runs.items():
            found[name] |= guarded(name, partial(_error, case, both, inputs, rows, reference(*inputs, rows)))
    for row in found.values():
        report.add(f"Attention's relative error, {title(shape)}", row)


def _error(
    case: str,
    runs: tuple[Run, RunWithLse | None],
    inputs: tuple[Tensor, Tensor, Tensor],
    rows: Tensor,
    exact: tuple[Tensor, Tensor],
) -> dict[str, float]:
    run, with_lse = runs
    found = {case: relative_error(run(*inputs)[:, rows], exact[0])}
    if with_lse is not None and case in ("gaussian", "mean"):
        found[f"{case} lse"] = float((with_lse(*inputs)[1][:, rows].double() - exact[1]).abs().max())
    return found


def float8_steps(trial: AttentionTrial, shape: Shape, report: Report) -> None:
    """Where the time of float8 attention goes, and how near Triton's steps are to plain torch's."""
    q, k, v = trial.inputs(shape, "mean")
    steps = fp8.steps_on(trial.device)
    means = steps.measure(q, k, v)
    scales = steps.scale(means)
    q8 = steps.quantise_q(q, scales)
    given = steps.quantise_kv(k, v, scales)
    bias, matrix = steps.correct(means, scales, given)
    small = [x[:, : min(shape.tokens, 1000), :2].contiguous() for x in (q, k, v)]
    exact, ours = (fp8.attend_in_fp8(*small, False, some)[0] for some in (fp8.PLAIN, steps))
    apart = relative_error(ours, exact)
    report.note(f"fa3_fp8, triton against plain torch: {apart:.4f} relative (0.01 would be much)")
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
    for name, call in parts.items():
        row = guarded(name, lambda call=call: {"ms": trial.ms(call)[0]})
        report.add(f"Steps of fa3_fp8, {title(shape)}", row)


def automatic(trial: AttentionTrial, shapes: tuple[Shape, ...], report: Report) -> None:
    """What "auto" takes, with and without the log-sum-exp, and how long it takes to find out."""
    for shape in shapes:
        for for_ring in (False, True):
            place = (trial.device, trial.dtype, shape.head_dim)
            began = time.perf_counter()
            kernel = KernelAutotuner("auto", *place, for_ring=for_ring).for_shape(shape)
            row = {"shape": title(shape), "with_lse": for_ring, "chosen": kernel.name}
            report.add("What auto chooses", {**row, "ms": (time.perf_counter() - began) * 1e3})


def title(shape: Shape) -> str:
    """A shape in words."""
    return f"{shape.tokens} tokens, {shape.heads} heads of {shape.head_dim}"


# -- around attention


def around(shape: Shape, device: torch.device, report: Report) -> None:
    """Each kernel beside its twin: the table of `benchmarks.gpu_check`, with bytes a second."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    dim = shape.heads * 128
    widths = dict.fromkeys(MOVED, dim) | dict.fromkeys(("gelu", "gelu, 8 bits"), dim * 35 // 6 // 16 * 16)
    source = torch.randn(shape.tokens, dim, device=device).to(dtype)
    target = torch.empty_like(source)
    ms, _ = milliseconds(lambda: target.copy_(source), device, calls=CALLS)
    speed = 2 * source.numel() * dtype.itemsize / ms / 1e6
    report.add("Kernels", {"kernel": "copy", "twin_ms": ms, "gb_per_s": speed})
    for name, (work, allowed) in checks(shape.tokens, shape.heads, device, dtype).items():
        if not fused.can_fuse(source):
            ms, _ = milliseconds(partial(work, False), device)
            report.add("Kernels", {"kernel": name, "twin_ms": ms})
            continue
        row = checked(name, work, allowed, device)
        if name in MOVED and "ours_ms" in row:
            numbers, more = MOVED[name]
            moved = (numbers * dtype.itemsize + more) * shape.tokens * widths[name]
            row["gb_per_s"] = moved / row["ours_ms"] / 1e6
        report.add("Kernels", row)


def products(work: Workload, report: Report) -> None:
    """Matrix products in 16 and 8 bits, and the GELU inside or behind one."""
    dim = work.case.config.dim
    ffn = work.case.config.ffn_dim
    device = work.device

    def ms(call: Callable[[], object]) -> float:
        return milliseconds(call, device, calls=CALLS)[0]

    for rows, columns in ((dim, dim), (dim, ffn), (ffn, dim)):
        linear = nn.Linear(rows, columns, device=device, dtype=work.dtype).requires_grad_(False)
        x = torch.randn(1, work.case.tokens, rows, device=device).to(work.dtype)
        layer = Float8Linear(linear)
        layer.quantise_weight()
        set_float8([layer], True)
        quantised = fused.quantise(x)
        operations = 2e-9 * work.case.tokens * rows * columns
        wide = ms(partial(linear, x))
        small = ms(partial(layer, quantised))
        row = {"name": f"{rows} to {columns}", "ms": wide, "tflops": operations / wide, "fp8_ms": small}
        row |= {
            "fp8_tflops": operations / small,
            "fp8_relative_error": relative_error(layer(quantised), linear(x)),
        }
        if columns == ffn and fused.has_linear_gelu(x, linear.weight, True):
            behind = partial(_gelu_behind, linear, x)
            inside = partial(fused.linear_gelu, x, linear.weight, linear.bias)
            row |= {"then_gelu_ms": ms(behind), "gelu_inside_ms": ms(inside)}
            row["gelu_inside_difference"] = relative_error(inside(), behind())
        report.add("Products", row)


def _gelu_behind(linear: nn.Linear, x: Tensor) -> Tensor:
    return F.gelu(linear(x), approximate="tanh")


# -- forwards


class SwitchTrial:
    """One network in each of `VARIANTS`.

    Args:
        work: weights and inputs.
        attention: a kernel's name; torch's own where that is not there.
        mode: of `torch.compile`.
    """

    def __init__(self, work: Workload, attention: str, mode: str | None) -> None:
        self.work = work
        self.mode = mode
        self.exact: Tensor | None = None
        try:
            self.attention = attention_kernel(attention)
        except UsageError as error:
            print(f"attention {attention}: {first_line(error)}; sdpa instead", flush=True)
            self.attention = sdpa

    def float32(self) -> Tensor:
        """The velocity of the same weights in float32; computed once."""
        if self.exact is None:
            network = self.work.network(torch.float32)
            self.exact = network(self.work.latent, self.work.text[1:].float(), self.work.timestep)
        return self.exact

    def variant(self, name: str, report: Report) -> None:
        """First call, later calls, one block alone, memory, error, and where the time goes."""
        fuse, compiled, in_float8 = VARIANTS[name]
        work = self.work
        device = self.work.device
        network = work.network()
        if in_float8:
            keep = Float8Plan().keep if work.case.config.num_layers > 2 else ()
            set_float8(to_float8(list(network.blocks), Float8Plan(keep)), True)
        network.use_fused(fuse)
        if compiled:
            keep_compiled_code()
            options = {"mode": self.mode} if device.type == "cuda" else {"backend": "eager"}
            network.compile_blocks(**options)
        latent = work.latent.to(work.dtype)
        text = network.make_text_kv(work.text[1:])

        def forward() -> Tensor:
            return network(latent, text, work.timestep, attention=self.attention)

        median, first = milliseconds(forward, device, 3)
        row: dict[str, Any] = {"variant": name, "ms": median, "first_ms": first}
        row["work_gib"] = peak_bytes(forward, device) / GIB
        row["relative_error"] = relative_error(forward(), self.float32())
        embedded = network.embed(latent, text, work.timestep)
        block = network.blocks[1]
        weighted = block.takes_bias(embedded.tokens, embedded.text.rows.dtype)
        keys = embedded.text.keys(1, block.text_keys, weighted)
        inputs = (embedded.tokens, keys, embedded.modulation, embedded.rope, self.attention)
        row["block_ms"], _ = milliseconds(partial(block, *inputs), device, calls=CALLS)
        row |= breakdown(kernel_spans(forward, device))
        report.add(f"Forward, {work.case.name}, {self.attention.name}", row)


def case_asked(asked: argparse.Namespace) -> Case:
    """The network of the forwards."""
    if asked.small:
        return small_case("small", 3, 3)
    width, height = (int(side) for side in asked.size.split("x"))
    return case_of(asked.model, (width, height, asked.frames), asked.layers)


def section_list(asked: argparse.Namespace, report: Report) -> list[Section]:
    """What is short and matters first; estimates are of one H100."""
    device = torch.device(asked.device)
    trial = attention_trial(device, asked.repeats, report)
    work = Workload(case_asked(asked), device)
    switches = SwitchTrial(work, asked.attention, asked.mode)
    first, *others = SMALL if asked.small else FULL
    tokens = 24 if asked.small else work.case.tokens
    shape = Shape(tokens, work.case.config.num_attention_heads, 128)
    rows: list[tuple[str, Callable[[Report], None], float]] = [
        ("attention", partial(speeds, trial, first), 10),
        ("errors", partial(errors, trial, first, CASES), 5),
        ("fa3_fp8", partial(float8_steps, trial, first), 3),
        ("auto", partial(automatic, trial, (first, others[0])), 5),
        ("around", partial(around, shape, device), 5),
        ("products", partial(products, work), 3),
        *((name, partial(switches.variant, name), 25 if "compiled" in name else 6) for name in VARIANTS),
        *((f"attention, {title(shape)}", partial(speeds, trial, shape), 10) for shape in others),
        ("errors, large", partial(errors, trial, others[-1], ("gaussian", "mean")), 5),
    ]
    return [Section(name, "", 0 if asked.small else seconds, run) for name, run, seconds in rows]


@torch.no_grad()
def main(words: list[str] | None = None) -> Report:
    """The sections that were asked for."""
    options = parser(__doc__)
    options.add_argument("--sections", nargs="+", default=[], metavar="NAME", help="a wrong name lists all")
    options.add_argument("--repeats", type=int, default=5, help="timed calls of each attention kernel")
    options.add_argument("--model", default="Wan2.1-T2V-1.3B", help="of the forwards")
    options.add_argument("--size", default="832x480")
    options.add_argument("--frames", type=int, default=81)
    options.add_argument("--layers", type=int, help="fewer than the model has")
    options.add_argument("--attention", default="auto", help="of the forwards")
    options.add_argument("--mode", help="of torch.compile, such as max-autotune-no-cudagraphs")
    options.add_argument("--tune", action="store_true", help="only time launch options, on a GPU")
    asked = options.parse_args(words)
    if asked.device == "cpu" and not asked.small:
        options.error("full shapes take hours on a CPU: add --small")
    torch.manual_seed(0)
    torch._dynamo.config.recompile_limit = 64  # every variant compiles the same functions anew
    report = report_for("Kernels", "launches" if asked.tune else "kernels", asked)
    sections = tuning(torch.device(asked.device)) if asked.tune else section_list(asked, report)
    run_sections(sections, report, asked=asked.sections, budget=asked.budget)
    print(*report.write(), sep="\n")
    return report


if __name__ == "__main__":
    raise SystemExit(main().failed)
