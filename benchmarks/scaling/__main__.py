"""The command line of `benchmarks.scaling`: the sections in their order, and the results as a table."""

from __future__ import annotations

import argparse
import faulthandler
import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

import benchmarks.scaling as package
from benchmarks.report import file_name, kept_in, machine, parser, table_of
from benchmarks.scaling.links import exchanges, links, rank_that_raises
from benchmarks.scaling.model import DIFFUSERS, SIZES, ModelSections, layout_and_means, vae
from benchmarks.scaling.ranks import Ranks, in_processes
from benchmarks.simulate_scaling import plans
from chitu_diffusion.config import rank_place
from chitu_diffusion.distributed.plan import ParallelPlan, parse_layout
from chitu_diffusion.errors import UsageError

TARGETS = {"cfg2": 1.95, "u2": 1.88, "r2": 1.85, "vae shared": 1.7}
FAULTS = {"fault": "group", "fault within a sequence": "sequence", "fault in a batch": "refused"}
TimedSection = tuple[str, Callable[[], dict[str, Any]], float]
"""Name, work, seconds that it takes on H200."""


def warm_up(ranks: Ranks) -> dict[str, Any]:
    """Libraries, and what the machine is."""
    x = torch.randn(256, 256, device=ranks.device)
    (x @ x).sum().item()
    facts: dict[str, Any] = {**machine(ranks.device), "ranks": ranks.world}
    if ranks.device.type == "cuda":
        facts["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    return {**facts, "to_first_section": ranks.elapsed}


def sections(ranks: Ranks, asked: argparse.Namespace) -> list[TimedSection]:
    """In order: what matters first."""
    small = asked.small
    names = ["wan-tiny"] if small else asked.models.split(",")
    sizes = ["small"] if small else asked.sizes.split(",")
    message = [1 << power for power in ((12, 16) if small else range(16, 29, 2))]
    rows: list[TimedSection] = [
        ("machine", partial(warm_up, ranks), 0),
        ("links", partial(links, ranks, message), 4),
        ("exchanges", partial(exchanges, ranks), 3),
        ("vae alone", partial(vae, ranks, small, 2, False), 10),
        ("vae shared", partial(vae, ranks, small, 2, True), 8),
    ]
    models = [ModelSections(ranks, name, sizes[0], asked, exact=name == names[0]) for name in names]
    for model, name in zip(models, names, strict=True):
        rows += steps_on(model, asked, first=model is models[0])
        for size in sizes[1:]:
            # with the same weights; its kernels are those that the first size chose
            rows += steps_on(ModelSections(ranks, name, size, asked, False, like=model), asked, first=False)
        rows.append((f"{model.name} released", model.release, 0))
    for model, name in [] if small or "720p" in sizes else zip(models, names, strict=True):
        larger = ModelSections(ranks, name, "720p", asked, False, like=model)
        rows.append((f"{larger.name} kernels", larger.kernels, 3 if model is models[0] else 8))
        rows.append((f"{larger.name} released", model.release, 0))
    rows += [(name, partial(rank_that_raises, ranks, kind), 6) for name, kind in FAULTS.items()]
    # last, for a crash in there would end the run
    for word in ("alone", *(f"{kind}{ranks.world}" for kind in DIFFUSERS if not small)):
        rows.append((f"diffusers {models[0].name} {word}", partial(models[0].diffusers, word), 7))
    chosen = asked.only.split(",") if asked.only else [""]
    return [row for row in rows if any(word in row[0] for word in chosen)]


def steps_on(model: ModelSections, asked: argparse.Namespace, first: bool) -> list[TimedSection]:
    """Sections of one model and size; what is looked at once comes with the first."""
    world = model.ranks.world
    words = asked.layouts.split(",")
    if asked.layouts == "all":
        words = [str_of(plan) for plan in plans(world, model.heads)]
    step = 1.0 if first else 5.0 if "480p" in model.name else 21.0 if "14B" in model.name else 4.0
    rows: list[TimedSection] = [(f"{model.name} alone", model.alone, 12 + 4 * step)]
    # a choice of means is looked at once
    for word in (word for word in words if first or "@" not in word):
        rows.append((f"{model.name} {word}", partial(model.layout, word), 4 + 8 * step / world))
    if first:
        rows.append((f"{model.name} overlap", model.overlap, 3))
    rows.append((f"{model.name} host", model.host, 6))
    rows.append((f"{model.name} kernels", model.kernels, 4 if first else 8))
    return rows


def str_of(plan: ParallelPlan) -> str:
    """`cfg2u4r2`, as `parse_layout` reads it."""
    parts = {"cfg": plan.cfg, "u": plan.ulysses, "r": plan.ring}
    return "".join(f"{name}{degree}" for name, degree in parts.items() if degree > 1)


def written(results: Mapping[str, Any]) -> str:
    """The results as tables of steps, decodes, links and failures, in Markdown."""
    machine_facts = results.get("machine", {})
    lines = ["# Scaling, measured", "; ".join(f"{key} {value}" for key, value in machine_facts.items())]
    steps = [_step_row(name, found) for name, found in results.items() if "seconds" in found]
    rows = [
        {
            "exchange": row["kind"],
            "bytes a rank sends": row["bytes"],
            "ms": row["seconds"] * 1e3,
            "GB/s in one direction": row["gigabytes_per_second"],
        }
        for row in results.get("links", {}).get("rows", [])
    ]
    lines += [table_of(each) for each in (steps, rows) if each]
    for name, found in results.items():
        lines += [f"{name} {word}: {found[word]}" for word in ("failed", "skipped") if word in found]
        if "groups_again" in found:
            again = f"groups made again: {found['groups_again']}"
            lines.append(f"{name}, a rank that raised: {found['ranks']}; {again}.")
    return "\n\n".join(lines) + "\n"


def _step_row(name: str, found: Mapping[str, Any]) -> dict[str, Any]:
    ours = "diffusers" not in name
    peak = max(found.get("peak_bytes", [0]))
    sent = sum(found.get("bytes_sent", {}).values())
    return {
        "section": name,
        "s": found["seconds"],
        "first_s": found["first"],
        "speedup": found.get("speedup"),
        "target": next((value for word, value in TARGETS.items() if ours and name.endswith(word)), None),
        "error": found.get("error_to_alone", found.get("error_to_ours_alone")),
        "error_to_float32": found.get("error_to_float32"),
        "peak_gib": peak / 2**30 if peak else None,
        "sent_mb": sent / 1e6 if sent else None,
        "hidden_share": found.get("trace", {}).get("hidden_share"),
    }


def parsed(words: list[str] | None) -> argparse.Namespace:
    """The command line, looked at before any work."""
    options = parser(package.__doc__)
    options.set_defaults(budget=200.0)
    options.add_argument(
        "--ranks", type=int, default=2, help="processes, where torchrun did not start this one"
    )
    options.add_argument("--repeats", type=int, default=3, help="counted readings of a step")
    options.add_argument(
        "--layouts", default="cfg2,u2,r2", help="or all; u2@nccl: no copies; u2@8: on 8 multiprocessors"
    )
    options.add_argument("--models", default="Wan2.1-T2V-1.3B,Wan2.1-T2V-14B", help="comma-separated")
    options.add_argument("--sizes", default="480p", help="480p, 720p or both, comma-separated")
    options.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="as infer.attn_type=math"
    )
    options.add_argument("--only", default="", help="sections whose names hold one of these words")
    asked = options.parse_args(words)
    for size in set(asked.sizes.split(",")) - set(SIZES):
        options.error(f"--sizes {asked.sizes}: {size!r}: use {', '.join(SIZES)}")
    for word in asked.layouts.split(",") if asked.layouts != "all" else ():
        try:
            parse_layout(layout_and_means(word)[0])
        except (UsageError, ValueError) as error:
            options.error(f"--layouts {asked.layouts}: {word!r}: {error}")
    return asked


@torch.no_grad()
def main(words: list[str] | None = None) -> int:
    """The command line."""
    asked = parsed(words)
    folder = kept_in(asked)
    faulthandler.enable()  # a crash inside a library says at least where it was called
    place = rank_place()
    if place is None:
        return in_processes("benchmarks.scaling", asked.ranks, sys.argv[1:] if words is None else words)
    cuda = torch.device(asked.device).type == "cuda"
    device = torch.device("cuda", place.local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    name = f"{torch.cuda.get_device_name(device) if cuda else 'cpu'} x{place.world}"
    kind = "scaling-small" if asked.small else "scaling"
    out = None if folder is None else folder / f"{file_name(kind, name)}.json"
    ranks = Ranks(place, device, out, asked.budget)
    for section, work, estimate in sections(ranks, asked):
        ranks.section(section, work, 0 if asked.small else estimate)
        if ranks.rank == 0 and out is not None:
            out.with_suffix(".md").write_text(written(ranks.results), encoding="utf-8")
    broken = ranks.broken
    ranks.close()
    return 1 if broken else 0


if __name__ == "__main__":
    raise SystemExit(main())
