"""How fast, beside diffusers, in one run: forwards, a whole video, and where the time goes. One command, any
GPU.

    # everything: about 315 s on one H200, 85 s of it compiling
    python -m benchmarks.latency
    python -m benchmarks.latency --sections ceilings small-exact --rounds 5
    # the most important first; what does not fit is left out
    python -m benchmarks.latency --budget 270
    python -m benchmarks.latency --small --device cpu           # does it work?

Both sides run the same random weights at the same shapes in the same process, and their timed calls take
turns. The first call of each (compiling, choosing kernels) is timed apart as `warm_up_s`. For diffusers a
call is one forward, for ours a guided step's two, of which the half is shown: the two share work. Results go
to `benchmarks/results/` after every section. FlashAttention-3 wants the wheel `fa3-fwd`, 8-bit diffusers
`torchao`; what is missing is noted as absent. The CPU beside diffusers' pipeline is
`benchmarks/cpu_latency.py`'s.
"""

from __future__ import annotations

import argparse
import math
import os
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks.peers import offer_flash_attention_3
from benchmarks.report import RESULTS, Report, Section, file_name, run_sections

PACKAGES = ("torch", "triton", "diffusers", "torchao", "fa3-fwd", "transformers")


def section_table(latency: Any, small: bool) -> list[Section]:
    """The sections in the order of their importance, as far as those that share a network stand together.

    Estimates, on one H200: 13 s for each compiled variant's first call and 3 s for one of ours, and (warm-up
    + rounds) calls at the milliseconds measured on an H100 (1.3B 405 to 627; 14B on 8 layers 330 to 500, at
    720p 1300 to 1850, on 40 layers 1650 to 2350), ours counting double: both guidance branches. 20 s for
    imports and building are in the first.
    """
    table = [
        ("ceilings", "large product, large copy", 20, latency.ceilings),
        ("small-exact", "1.3B 832x480x81, 16 bits, ours and diffusers", 50, latency.small_exact),
        ("small-compiled", "the same, our blocks compiled", 35, latency.small_compiled),
        ("small-8bit", "the same in 8 bits, beside torchao", 45, latency.small_eight_bit),
        (
            "end-to-end",
            f"1.3B, {latency.steps} steps, prompt to file",
            10 + 0.86 * latency.steps,
            latency.end_to_end,
        ),
        ("profile", "kernels by kind", 6, latency.profile),
        ("cached", "what fixed plans of step caches save of what they skip", 45, latency.cached),
        ("large-exact", "14B 832x480x81 on 8 layers, 16 bits", 28, latency.large_exact),
        ("large-8bit", "the same in 8 bits, beside torchao", 35, latency.large_eight_bit),
        ("large-720p", "14B 1280x720x81 on 8 layers, ours", 22, latency.large_720p),
        ("large-40", "14B 832x480x81, all 40 layers, ours", 22, latency.large_40),
    ]
    return [
        Section(name, about, 0.0 if small else float(estimate), run) for name, about, estimate, run in table
    ]


def machine(device: torch.device) -> dict[str, str]:
    """Device and versions, for the report's head."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    facts = {"device": name, "threads": str(torch.get_num_threads()), "cores": str(os.cpu_count())}
    if device.type == "cuda":
        facts |= {"cuda": str(torch.version.cuda), "cudnn": str(torch.backends.cudnn.version())}
    for package in PACKAGES:
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            facts[package] = "absent"
    return facts


def parsed(words: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--sections", nargs="+", default=[], metavar="NAME", help="only these; a wrong name lists all"
    )
    parser.add_argument(
        "--profile", action="store_true", help="the profile alone; short for --sections profile"
    )
    parser.add_argument(
        "--without",
        nargs="+",
        default=[],
        metavar="VARIANT",
        help="variants to leave out, as what compiles for minutes",
    )
    parser.add_argument("--budget", type=float, default=math.inf, metavar="SECONDS", help="for all of it")
    parser.add_argument("--rounds", type=int, default=3, help="timed calls of each variant")
    parser.add_argument("--steps", type=int, default=50, help="of the end-to-end video")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--small", action="store_true", help="tiny networks: only to see that it works")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FOLDER")
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> Report:
    """Runs the sections that were asked for and fit the budget."""
    began, asked = time.monotonic(), parsed(words)
    missing = offer_flash_attention_3()  # before anything imports diffusers
    from benchmarks.sections import EVERY, Latency

    unknown = [name for name in asked.without if name not in EVERY]
    if unknown:
        raise SystemExit(f"--without {' '.join(unknown)}: no such variant; there are: {', '.join(EVERY)}")

    torch._dynamo.config.recompile_limit = 64  # every variant compiles the same function anew
    device = torch.device(asked.device)
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    facts = machine(device)
    kind = "latency-small" if asked.small else "latency"
    report = Report("Latency", facts, asked.out, file_name(kind, facts["device"]))
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
        try:
            run_sections(
                sections,
                report,
                asked=[*asked.sections, *(["profile"] if asked.profile else [])],
                budget=asked.budget,
                began=began,
            )
        except ValueError as error:
            raise SystemExit(str(error)) from None
    for path in report.write():
        print(path)
    print(report.markdown())
    return report


if __name__ == "__main__":
    main()
