"""Clocks, the arithmetic of a forward, the machine's ceilings, and where the time goes. Knows torch; no
engine, no peer.

Work is counted by shapes, whatever an implementation saves: "achieved TFLOP/s" is useful work over time,
comparable between engines, and may exceed what the chip did where an engine computes something once instead
of fifty times.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from chitu_diffusion.models.wan.config import WanConfig

TERA = 1e12
GIB = 2**30


@dataclass(frozen=True)
class Work:
    """Floating-point operations of one forward, a multiply-add being two."""

    linear: int
    attention: int

    @property
    def total(self) -> int:
        """Both together."""
        return self.linear + self.attention


def forward_work(config: WanConfig, tokens: int, text_tokens: int = 512) -> Work:
    """Operations of one forward of one sequence.

    Linear: 2 x weights x rows for every matrix product. With S tokens, T text rows, width d, feed-forward
    width f, each layer has 8 S d^2 (self q, k, v, out) + 4 S d^2 (cross q, out) + 4 T d^2 (cross k, v) + 4 S
    d f. Attention: 4 S^2 d for self-attention and 4 S T d for cross-attention, a layer. Patch embedding, text
    and time projections and the output projection are counted once. Norms, rotary turns and activations are
    not.

    Args:
        config: of the network.
        tokens: S.
        text_tokens: T.
    """
    s, t, d, f, layers = tokens, text_tokens, config.dim, config.ffn_dim, config.num_layers
    ends = s * d * config.patch_values * (config.in_channels + config.out_channels)
    text = t * d * (config.text_dim + d)
    moment = config.freq_dim * d + 7 * d * d  # two layers of the time embedder and the six modulations
    block = 6 * s * d * d + 2 * t * d * d + 2 * s * d * f
    return Work(2 * (ends + text + moment + layers * block), 4 * layers * s * d * (s + t))


def synchronise(device: torch.device) -> None:
    """Waits until the device is idle; nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed_ms(call: Callable[[], object], device: torch.device) -> float:
    """Milliseconds of one call: by CUDA events around it, on a CPU by the wall clock."""
    if device.type != "cuda":
        began = time.perf_counter()
        call()
        return (time.perf_counter() - began) * 1e3
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


@dataclass
class Timing:
    """Of one call: milliseconds in each round, and bytes that the first of them allocated beyond what was
    there.
    """

    ms: list[float]
    allocated: int = 0


def alternating(
    calls: Mapping[str, Callable[[], object]], rounds: int, device: torch.device
) -> dict[str, Timing]:
    """Times each call in each round, one after the other within a round, so that a warming chip slows all
    alike.

    The order turns round from one round to the next: who comes second finds a warmer chip than who comes
    first. Calls must have been made once before.
    """
    found = {name: Timing([]) for name in calls}
    names = list(calls)
    for number in range(rounds):
        for name in names:

            def timed(name: str = name) -> None:
                found[name].ms.append(timed_ms(calls[name], device))

            if number == 0:
                found[name].allocated = peak_bytes(timed, device)
            else:
                timed()
        names.reverse()
    return found


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """Bytes that a call allocates on the device beyond what was there before it; 0 on a CPU, where nobody
    counts.
    """
    if device.type != "cuda":
        call()
        return 0
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def ceilings(device: torch.device) -> dict[str, float]:
    """What this machine gives now: TFLOP/s of a large bfloat16 product (and of an 8-bit one), TB/s of a large
    copy.

    The best of several bursts of about a tenth of a second: the rate before a long load lowers the clocks.
    """
    gpu = device.type == "cuda"
    side = 8192 if gpu else 256
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    found = {"bf16_tflops": 2 * side**3 / best_seconds(lambda: a @ b, device) / TERA}
    eight = eight_bit_product(a, b) if gpu and torch.cuda.get_device_capability(device) >= (8, 9) else None
    if eight is not None:
        found["fp8_tflops"] = 2 * side**3 / best_seconds(eight, device) / TERA
    source = torch.empty(GIB if gpu else 2**22, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    found["copy_tb_per_s"] = 2 * source.numel() / best_seconds(lambda: target.copy_(source), device) / TERA
    return found


def eight_bit_product(a: Tensor, b: Tensor) -> Callable[[], object]:
    """The same product in float8 e4m3 with a scale for each row of `a` and each column of `b`."""
    rows = torch.ones(a.shape[0], 1, device=a.device)
    columns = torch.ones(1, b.shape[1], device=b.device)
    left, right = a.to(torch.float8_e4m3fn), b.t().contiguous().to(torch.float8_e4m3fn).t()
    return lambda: torch._scaled_mm(left, right, rows, columns, out_dtype=torch.bfloat16, use_fast_accum=True)


def best_seconds(call: Callable[[], object], device: torch.device, bursts: int = 4) -> float:
    """Seconds of one call in the fastest of several bursts."""
    once = max(timed_ms(call, device), timed_ms(call, device), 1e-3)
    count = max(1, min(100, int(100 / once))) if device.type == "cuda" else 1
    times = [timed_ms(lambda: [call() for _ in range(count)], device) for _ in range(bursts)]
    return min(times) / count / 1e3


# -- where the time goes

KINDS = ("attention", "gemm", "convolution", "copy", "element-wise")
_WORDS: tuple[tuple[str, tuple[str, ...]], ...] = (
    # in this order: a compiled element-wise kernel names all that it fused, attention is built like matrix
    # products
    ("element-wise", ("triton_poi_", "triton_red_", "triton_per_")),
    ("attention", ("flash", "fmha", "attention", "sdpa", "sage", "_attn")),
    ("convolution", ("conv", "fprop", "implicit_gemm", "slow_conv")),
    (
        "gemm",
        (
            "gemm",
            "nvjet",
            "cutlass",
            "cublas",
            "matmul",
            "scaled_mm",
            "addmm",
            "::mm",
            "::bmm",
            "::linear",
            "splitk",
        ),
    ),
    ("copy", ("memcpy", "memset", "copy", "::clone", "::cat")),
)


_NO_KERNELS = (
    "##",
    "Torch-Compiled Region",
    "TorchDynamo",
    "ProfilerStep",
    "Activity Buffer",
    "Lazy Function",
    "cuda",
)
"""Beginnings of the profiler's other events: compiled regions around what they run, calls of the runtime, its
own work.
"""


@dataclass(frozen=True)
class Span:
    """One kernel: its name, and when it ran, in microseconds."""

    name: str
    start: float
    end: float


def kind_of(kernel: str) -> str:
    """Which of `KINDS` a kernel's name belongs to; what is nothing else is element-wise (norms and reductions
    among it).
    """
    low = kernel.lower()
    return next((kind for kind, words in _WORDS if any(word in low for word in words)), "element-wise")


def breakdown(spans: Iterable[Span]) -> dict[str, float]:
    """Milliseconds by kind, "busy" (at least one kernel runs), "span" (first start to last end), "gaps" (span
    - busy).
    """
    ordered = sorted(spans, key=lambda span: span.start)
    found = dict.fromkeys(KINDS, 0.0)
    busy, until = 0.0, float("-inf")
    for span in ordered:
        found[kind_of(span.name)] += (span.end - span.start) / 1e3
        busy += max(0.0, span.end - max(span.start, until)) / 1e3
        until = max(until, span.end)
    whole = (until - ordered[0].start) / 1e3 if ordered else 0.0
    return {**found, "busy": busy, "span": whole, "gaps": whole - busy}


def longest(spans: Iterable[Span], count: int = 12) -> list[dict[str, float | str | int]]:
    """The kernels that take the most time in all: name, kind, calls, milliseconds."""
    total: dict[str, list[float]] = {}
    for span in spans:
        total.setdefault(span.name, []).append((span.end - span.start) / 1e3)
    ordered = sorted(total.items(), key=lambda item: -sum(item[1]))[:count]
    return [
        {"kernel": name[:120], "kind": kind_of(name), "calls": len(ms), "ms": sum(ms)} for name, ms in ordered
    ]


def kernel_spans(call: Callable[[], object], device: torch.device) -> list[Span]:
    """Every kernel that a call runs, by torch's profiler.

    On a CPU every operator, with the time that it spends outside of those it calls, counted from its start:
    sums by kind are right there, the gaps only roughly.
    """
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    gpu = device.type == "cuda"
    synchronise(device)
    with profile(activities=[ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU]) as found:
        call()
        synchronise(device)
    events = [event for event in found.events() if not event.name.startswith(_NO_KERNELS)]
    if gpu:
        kernels = [event for event in events if event.device_type == DeviceType.CUDA]
        return [Span(event.name, event.time_range.start, event.time_range.end) for event in kernels]
    return [
        Span(event.name, event.time_range.start, event.time_range.start + event.self_cpu_time_total)
        for event in events
    ]
