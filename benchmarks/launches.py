"""Launch options of Triton's kernels, each beside what the engine takes: `benchmarks.kernels --tune`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from benchmarks.gpu_check import CALLS, TEXT_ROWS, checks, text_attention
from benchmarks.measuring import milliseconds, relative_error
from benchmarks.report import Report, Section, first_line
from chitu_diffusion.attention import cross_attention
from chitu_diffusion.ops import fused


@contextmanager
def launched(module: Any, **ways: Callable[..., Any]) -> Iterator[None]:
    """A module of Triton kernels with other functions that say how they start."""
    own = {name: getattr(module, name) for name in ways}
    for name, way in ways.items():
        setattr(module, name, way)
    try:
        yield
    finally:
        for name, way in own.items():
            setattr(module, name, way)


def text_launches(tokens: int, heads: int, rows: int, device: torch.device, report: Report) -> None:
    """Ways to start the text attention: tokens, keys, warps, and programs that share a tile's heads."""
    ours = cross_attention.cross_attention_triton
    x = torch.randn(1, tokens, 128 * heads, device=device).bfloat16()
    work = text_attention(x, torch.rand(x.shape[-1], device=device).bfloat16(), heads, rows)
    expected = work(False)
    chosen = ours.launch_text(1, tokens, rows, heads, 128, x.dtype)
    looped = chosen._replace(unroll=False, stages=3)
    ways = [chosen, looped, looped._replace(stages=2), *(chosen._replace(parts=parts) for parts in (2, 4))]
    ways += [chosen._replace(keys=128), chosen._replace(tile=64, warps=4), chosen._replace(tile=64, warps=8)]
    ways += [looped._replace(tile=64, warps=4, stages=stages) for stages in (3, 2)]
    for way in dict.fromkeys(ways):
        row: dict[str, Any] = {"heads": heads, "rows": rows, **way._asdict(), "chosen": way == chosen}
        try:
            with launched(ours, launch_text=lambda *_, way=way: way):
                row["ms"], _ = milliseconds(partial(work, True), device, calls=CALLS)
                row["relative_difference"] = relative_error(work(True), expected)
        except Exception as error:  # too much shared memory, most of all
            row["failed"] = first_line(error)[:80]
        report.add("Launches of the text attention", row)


def launches(tokens: int, dim: int, device: torch.device, report: Report) -> None:
    """Warps of a program of the fused kernels, for rows of `dim` channels."""
    ours = fused.fused_triton
    found = checks(tokens, dim // 128, device)
    held = ours.launch(dim)
    row = ours.launch_row(dim)
    for warps in (1, 2, 4, 8, 16):
        options = {"num_warps": warps}
        with launched(
            ours, launch=lambda _, o=options: (*held[:2], o), launch_row=lambda _, o=options: (*row[:2], o)
        ):
            speeds = {
                f"{name}, ms": milliseconds(partial(found[name][0], True), device, calls=CALLS)[0]
                for name in ("residual, norm", "q, k norm, turn")
            }
        chosen = [how[2]["num_warps"] == warps for how in (row, held)]
        report.add("Launches of the fused kernels", {"dim": dim, "warps": warps, **speeds, "chosen": chosen})


# -- the command line


def tuning(device: torch.device) -> list[Section]:
    """All launch options, at 32,760 tokens."""
    texts = {
        f"text, {heads} heads, {rows} rows": partial(text_launches, 32760, heads, rows, device)
        for heads, rows in ((12, TEXT_ROWS), (40, TEXT_ROWS), (12, 127), (12, 40))
    }
    around = {f"{dim} channels": partial(launches, 32760, dim, device) for dim in (128 * 12, 128 * 40)}
    return [Section(name, "", 10, run) for name, run in (texts | around).items()]
