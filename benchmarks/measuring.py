"""Clocks, distances between results, and where the time goes. Knows torch; no engine, no peer."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

TERA = 1e12
GIB = 2**30


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
    start = torch.cuda.Event(enable_timing=True)
    end = torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def milliseconds(
    call: Callable[[], object], device: torch.device, repeats: int = 5, calls: int = 1
) -> tuple[float, float]:
    """(median, first): of one call, and of the first one, which compiles and chooses kernels.

    Args:
        repeats: readings of the clock.
        calls: in a row for one reading on a GPU, where a short kernel is over before the host has begun the
            next; a CPU takes one.
    """
    first = timed_ms(call, device)
    calls = calls if device.type == "cuda" else 1
    readings = [timed_ms(lambda: [call() for _ in range(calls)], device) for _ in range(repeats)]
    return statistics.median(readings) / calls, first


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what was expected, in float32 or wider."""
    expected = expected if expected.dtype == torch.float64 else expected.float()
    return float((found.to(expected.dtype) - expected).norm() / expected.norm())


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
    "nccl:",
    "cuda",
)
"""Beginnings of the profiler's other events: regions and exchanges around what they run, the runtime's calls,
its own work.
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
    """Milliseconds by kind, "busy" (see `busy_ms`), "span" (first start to last end), "gaps" (the rest)."""
    everything = list(spans)
    found = dict.fromkeys(KINDS, 0.0)
    for span in everything:
        found[kind_of(span.name)] += (span.end - span.start) / 1e3
    busy = busy_ms(everything)
    first = min((s.start for s in everything), default=0.0)
    last = max((s.end for s in everything), default=0.0)
    whole = (last - first) / 1e3
    return {**found, "busy": busy, "span": whole, "gaps": whole - busy}


def busy_ms(spans: Iterable[Span]) -> float:
    """Milliseconds in which at least one of them runs."""
    busy = 0.0
    until = float("-inf")
    for span in sorted(spans, key=lambda span: span.start):
        busy += max(0.0, span.end - max(span.start, until)) / 1e3
        until = max(until, span.end)
    return busy


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
