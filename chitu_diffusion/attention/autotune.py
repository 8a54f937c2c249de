"""`attn_type=auto`: the fastest exact kernel for a shape, found by timing once and remembered on disk.

One file holds, for each machine (device, versions of torch, CUDA, cuDNN and the kernels' packages), the
answer for each dtype, head size, number of heads and bucket of lengths, two buckets to an octave. Knows
kernels and tensors; which folder, which ranks and when are told by the backend.
"""

from __future__ import annotations

import json
import logging
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from chitu_diffusion.attention import KERNELS, attention_kernel, candidates
from chitu_diffusion.attention.kernels import AttentionKernel
from chitu_diffusion.files.atomic import write_text
from chitu_diffusion.files.reading import read_json

logger = logging.getLogger(__name__)

Timer = Callable[[AttentionKernel, "Shape"], float]  # -> milliseconds
FILE = "attention-kernels.json"
_OPERATIONS = 4e12
"""Multiplications and additions of one timed call at most (about 6 ms on an H100): heads beyond that are left
out.
"""
_REPEATS = 3


@dataclass(frozen=True)
class Shape:
    """A self-attention: tokens and heads of one rank, channels of a head."""

    tokens: int
    heads: int
    head_dim: int

    def bucket(self, dtype: torch.dtype) -> str:
        """The name under which its answer is kept."""
        octave = round(2 * math.log2(self.tokens)) / 2
        return (
            f"{str(dtype).removeprefix('torch.')} heads={self.heads} head_dim={self.head_dim} "
            f"log2(tokens)={octave:g}"
        )


class KernelAutotuner:
    """The kernel of each call: the one that a setting names, or for "auto" the fastest exact one.

    Args:
        name: a kernel's, or "auto".
        device, dtype, head_dim: of q, k and v.
        for_ring: whether ring attention will use it, and so ask for the log-sum-exp.
        folder: where answers are kept between runs; None keeps them in memory alone.
        all_reduce_max: a number common to all ranks, the one that the leading rank gives; None for one rank.
        is_driver: whether this rank times for all.
        timer: measures one kernel; None uses the device.

    Raises:
        UsageError: no such kernel, or one that cannot run there.
    """

    def __init__(
        self,
        name: str,
        device: torch.device,
        dtype: torch.dtype,
        head_dim: int | None = None,
        *,
        for_ring: bool = False,
        folder: Path | None = None,
        all_reduce_max: Callable[[float | None], float] | None = None,
        is_driver: bool = True,
        timer: Timer | None = None,
    ) -> None:
        self.kernel = attention_kernel(name, for_ring=for_ring, device=device, dtype=dtype, head_dim=head_dim)
        self._automatic = name == "auto"
        self._device = device
        self._dtype = dtype
        self._for_ring = for_ring
        self._folder = folder
        self._all_reduce_max = all_reduce_max
        self._is_driver = is_driver
        self._timer = timer or self._time_on_device
        self._found: dict[tuple[int, str], AttentionKernel] = {}

    def for_shape(self, shape: Shape, epoch: int = 0) -> AttentionKernel:
        """The kernel for a shape; `kernel` is it until the next call. The first call of a shape may take some
        milliseconds.

        With several ranks all must call it with the same shapes in the same order.

        Args:
            shape: of every rank alike.
            epoch: changes when the ranks have lost each other and met again: then they agree anew.

        Raises:
            UsageError: the leading rank's kernel cannot run on this one.
        """
        if not self._automatic:
            return self.kernel
        key = epoch, shape.bucket(self._dtype)
        if key not in self._found:
            self._found[key] = self._agreed(shape)
            logger.info("attention %s for %s", self._found[key].name, key[1])
        self.kernel = self._found[key]
        return self.kernel

    def pin(self, kernel: AttentionKernel) -> None:
        """Take this one from now on, whatever the shape."""
        self.kernel = kernel
        self._automatic = False

    def _agreed(self, shape: Shape) -> AttentionKernel:
        among = candidates(self._device, self._dtype, shape.head_dim, for_ring=self._for_ring)
        if self._all_reduce_max is None:
            return self._fastest(among, shape)
        names = list(KERNELS)
        number = self._all_reduce_max(
            float(names.index(self._fastest(among, shape).name)) if self._is_driver else None
        )
        return attention_kernel(
            names[int(number)],
            for_ring=self._for_ring,
            device=self._device,
            dtype=self._dtype,
            head_dim=shape.head_dim,
        )

    def _fastest(self, among: Sequence[AttentionKernel], shape: Shape) -> AttentionKernel:
        if len(among) == 1:
            return among[0]
        machine = machine_name(self._device, among)
        bucket = shape.bucket(self._dtype)
        kept = recall(self._folder).get(machine, {})
        names = {kernel.name: kernel for kernel in among}
        known = kept.get(bucket) if isinstance(kept, dict) else None
        if isinstance(known, dict) and known.get("kernel") in names:
            return names[known["kernel"]]
        times = self._times(among, shape)
        if not times:
            return among[0]
        best = min(times, key=lambda name: times[name])
        # one that failed, perhaps for want of memory, gets another chance in the next run
        if len(times) == len(among):
            remember(
                self._folder,
                machine,
                bucket,
                {"kernel": best, "ms": {name: round(ms, 4) for name, ms in times.items()}},
            )
        return names[best]

    def _times(self, among: Sequence[AttentionKernel], shape: Shape) -> dict[str, float]:
        times = {}
        for kernel in among:
            try:
                times[kernel.name] = self._timer(kernel, shape)
            except RuntimeError as error:  # torch.OutOfMemoryError is one
                logger.warning(
                    "attention %s failed when it was timed, and is left out: %s", kernel.name, error
                )
        return times

    def _time_on_device(self, kernel: AttentionKernel, shape: Shape) -> float:
        run = kernel.run_with_lse if self._for_ring else kernel.run
        assert run is not None
        return time_attention(run, shape, self._device, self._dtype)


def time_attention(
    run: Callable[..., Any], shape: Shape, device: torch.device, dtype: torch.dtype, repeats: int = _REPEATS
) -> float:
    """Milliseconds of one call on a CUDA device, the median; fewer heads where all would take long."""
    each = 4.0 * shape.tokens**2 * shape.head_dim
    heads = max(1, min(shape.heads, int(_OPERATIONS / each)))
    size = (1, shape.tokens, heads, shape.head_dim)
    generator = torch.Generator(device).manual_seed(0)  # leaves the global state alone
    q, k, v = (torch.randn(size, device=device, dtype=dtype, generator=generator) for _ in range(3))
    run(q, k, v)
    taken = []
    for _ in range(repeats):
        begin = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        begin.record()
        run(q, k, v)
        end.record()
        end.synchronize()
        taken.append(begin.elapsed_time(end))
    return statistics.median(taken)


def machine_name(device: torch.device, kernels: Sequence[AttentionKernel]) -> str:
    """What an answer depends on besides the shape: the device, and the versions of all that takes part."""
    parts = [
        torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        f"torch {torch.__version__}",
    ]
    parts += [f"cuda {torch.version.cuda}", f"cudnn {torch.backends.cudnn.version()}"]
    parts += sorted(
        f"{k.name} {k.requires.package.version()}" if k.requires.package else k.name for k in kernels
    )
    return ", ".join(parts)


def recall(folder: Path | None) -> dict[str, Any]:
    """What the file of answers holds; nothing if there is none or it is spoilt: it is timed once more."""
    if folder is None:
        return {}
    try:
        data = read_json(folder / FILE)
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


def remember(folder: Path | None, machine: str, bucket: str, answer: dict[str, Any]) -> None:
    """Add an answer to the file."""
    if folder is None:
        return
    data = recall(folder)
    kept = data.get(machine)
    data[machine] = {**(kept if isinstance(kept, dict) else {}), bucket: answer}
    try:
        write_text(folder / FILE, json.dumps(data, indent=1))
    except OSError as error:
        # the next run times once more
        logger.debug("cannot remember the fastest attention in %s: %s", folder, error)
