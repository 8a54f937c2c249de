"""The command line of `benchmarks.latency`: which sections there are, how long they take, and which run."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import benchmarks.latency as package
from benchmarks.latency.peers import offer_flash_attention_3
from benchmarks.report import Report, Section, parser, report_for, run_sections

ON_A_CPU = "cpu"
"""The section that wants no GPU; it is run where it is asked for, or where there is none."""


def section_table(latency: Any, small: bool) -> list[Section]:
    """The sections in the order of their importance, as far as those that share a network stand together.

    Estimates, on one H200: 13 s for each compiled variant's first call and 3 s for one of ours, and (warm-up
    + rounds) calls at the milliseconds measured on an H100 (1.3B 405 to 627; 14B on 8 layers 330 to 500, at
    720p 1300 to 1850, on 40 layers 1650 to 2350), ours counting double: both guidance branches. 20 s for
    imports and building are in the first.
    """
    whole = 10 + 0.86 * latency.steps
    table = [
        ("ceilings", "large product, large copy", 20, latency.ceilings),
        ("small-exact", "1.3B 832x480x81, 16 bits, ours and diffusers", 50, latency.small_exact),
        ("small-compiled", "the same, our blocks compiled", 35, latency.small_compiled),
        ("small-8bit", "the same in 8 bits, beside torchao", 45, latency.small_eight_bit),
        ("end-to-end", f"1.3B, {latency.steps} steps, prompt to file", whole, latency.end_to_end),
        ("profile", "kernels by kind", 6, latency.profile),
        ("cached", "what fixed plans of step caches save of what they skip", 45, latency.cached),
        ("large-exact", "14B 832x480x81 on 8 layers, 16 bits", 28, latency.large_exact),
        ("large-8bit", "the same in 8 bits, beside torchao", 35, latency.large_eight_bit),
        ("large-720p", "14B 1280x720x81 on 8 layers, ours", 22, latency.large_720p),
        ("large-40", "14B 832x480x81, all 40 layers, ours", 22, latency.large_40),
        (ON_A_CPU, "wan-tiny, 20 steps, beside diffusers' pipeline, one thread", 70, latency.on_a_cpu),
    ]
    return [
        Section(name, about, 0.0 if small else float(estimate), run) for name, about, estimate, run in table
    ]


def main(words: list[str] | None = None) -> Report:
    """Runs the sections that were asked for and fit the budget."""
    began = time.monotonic()
    options = parser(package.__doc__)
    options.add_argument("--sections", nargs="+", default=[], metavar="NAME", help="a wrong name lists all")
    options.add_argument("--profile", action="store_true", help="short for --sections profile")
    options.add_argument(
        "--without", nargs="+", default=[], metavar="VARIANT", help="left out, as what compiles for minutes"
    )
    options.add_argument("--rounds", type=int, default=3, help="timed calls of each variant")
    options.add_argument("--steps", type=int, default=50, help="of the end-to-end video")
    asked = options.parse_args(words)
    missing = offer_flash_attention_3()  # before anything imports diffusers
    from benchmarks.latency.sections import Latency
    from benchmarks.latency.variants import EVERY

    unknown = [name for name in asked.without if name not in EVERY]
    if unknown:
        raise SystemExit(f"--without {' '.join(unknown)}: no such variant; there are: {', '.join(EVERY)}")

    torch._dynamo.config.recompile_limit = 64  # every variant compiles the same function anew
    device = torch.device(asked.device)
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    report = report_for("Latency", "latency", asked)
    if missing is not None:
        report.note(missing)
    steps = min(asked.steps, 3) if asked.small else asked.steps
    with tempfile.TemporaryDirectory() as folder:
        latency = Latency(
            device,
            small=asked.small,
            rounds=asked.rounds,
            steps=steps,
            folder=Path(folder),
            without=asked.without,
        )
        sections = section_table(latency, asked.small)
        named = [*asked.sections, *(["profile"] if asked.profile else [])]
        names = named or default_names(sections, device, small=asked.small)
        run_sections(sections, report, asked=names, budget=asked.budget, began=began)
    print(*report.write(), sep="\n")
    return report


def default_names(sections: list[Section], device: torch.device, *, small: bool) -> list[str]:
    """Every section for its device; a small run tries them all."""
    on_gpu = device.type == "cuda"
    return [section.name for section in sections if small or on_gpu != (section.name == ON_A_CPU)]


if __name__ == "__main__":
    raise SystemExit(main().failed)
