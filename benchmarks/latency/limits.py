"""What an ideal forward takes: its operations by shapes, and what this machine reaches now. Knows torch; no
engine, no peer.

Work is counted by shapes, whatever an implementation saves: "achieved TFLOP/s" is useful work over time,
comparable between engines, and may exceed what the chip did where an engine computes something once instead
of fifty times.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.measuring import GIB, TERA, timed_ms
from chitu_diffusion.models.wan.config import WanConfig


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of one forward, a multiply-add being two."""

    linear: int
    attention: int

    @property
    def total(self) -> int:
        """Both together."""
        return self.linear + self.attention


def forward_flops(config: WanConfig, tokens: int, text_tokens: int = 512) -> Flops:
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
    s = tokens
    t = text_tokens
    d = config.dim
    f = config.ffn_dim
    layers = config.num_layers
    ends = s * d * config.patch_values * (config.in_channels + config.out_channels)
    text = t * d * (config.text_dim + d)
    moment = config.freq_dim * d + 7 * d * d  # two layers of the time embedder and the six modulations
    block = 6 * s * d * d + 2 * t * d * d + 2 * s * d * f
    return Flops(2 * (ends + text + moment + layers * block), 4 * layers * s * d * (s + t))


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
    left = a.to(torch.float8_e4m3fn)
    right = b.t().contiguous().to(torch.float8_e4m3fn).t()
    return lambda: torch._scaled_mm(left, right, rows, columns, out_dtype=torch.bfloat16, use_fast_accum=True)


def best_seconds(call: Callable[[], object], device: torch.device, bursts: int = 4) -> float:
    """Seconds of one call in the fastest of several bursts."""
    once = max(timed_ms(call, device), timed_ms(call, device), 1e-3)
    count = max(1, min(100, int(100 / once))) if device.type == "cuda" else 1
    times = [timed_ms(lambda: [call() for _ in range(count)], device) for _ in range(bursts)]
    return min(times) / count / 1e3
