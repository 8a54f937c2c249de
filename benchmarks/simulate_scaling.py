"""What more GPUs are worth, computed from a two-GPU run: seconds per guided step for 2 to 64 GPUs over
several nodes.

    python -m benchmarks.simulate_scaling benchmarks/results/scaling-2-gpus.json

Takes kernel times and link times as `benchmarks.scaling` measured them, and the traffic that
`benchmarks.comm_volume` states. A block is its attention (one call, or one a hop of the ring), the rest of
it, packing for Ulysses, and what its exchanges cost: those of Ulysses in full, or, where they go in pieces,
the first that comes and the last that goes and what the others' work does not hide, a hop of the ring as far
as it outlasts the hop's kernel, and what a kernel was seen to lose with a transfer beside it. All kernels are
scaled by one factor, so that one GPU's step is what was measured (long runs clock lower than short ones). A
step takes at least what the host needs to launch it, as a tiny step showed, where every further peer is taken
to cost as much as the first. Nothing else is fitted: the two-GPU predictions are checked against the
measurement. Writes a table, JSON and a plot beside the input.

Assumed, and stated in the table: 8 GPUs a node. NVLink as measured; between nodes a stated speed times the
share of its nominal speed that NVLink reached, plus a latency. InfiniBand is per GPU, Ethernet per node and
shared by who crosses. A forward of either expert of Wan2.2-T2V-A14B is one of Wan2.1-T2V-14B.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.comm_volume import PACKED, Traffic, traffic
from benchmarks.report import results_folder, table_of
from chitu_diffusion.distributed.plan import ParallelPlan, auto_plan
from chitu_diffusion.distributed.ulysses import pieces_for

WORLDS = (1, 2, 4, 8, 16, 64)
NODE = 8
NVLINK = 450e9
"""Bytes per second in one direction of one GPU, nominal."""
Piece = Mapping[str, Any]


@dataclass(frozen=True)
class Fabric:
    """What connects the nodes.

    Attributes:
        name: in tables.
        speed: bytes per second in one direction, nominal.
        shared: whether that is a node's (else each GPU has its own).
        latency: seconds.
    """

    name: str
    speed: float
    shared: bool
    latency: float


FABRICS = (
    Fabric("InfiniBand 400 Gb/s a GPU", 50e9, False, 10e-6),
    Fabric("Ethernet 100 Gb/s a node", 12.5e9, True, 30e-6),
)


@dataclass(frozen=True)
class Prediction:
    """One layout's step.

    Attributes:
        plan: the layout.
        seconds: of a guided step.
        compute: seconds of kernels.
        exposed: seconds in which a rank waits for others.
        host: seconds in which the host launches it, beside all that.
        sent: bytes that a rank sends.
    """

    plan: str
    seconds: float
    compute: float
    exposed: float
    host: float
    sent: float


def plans(world: int, heads: int) -> list[ParallelPlan]:
    """Every layout of `world` ranks whose Ulysses groups stay in a node."""
    found = []
    for cfg in (1, 2):
        if world % cfg == 0:
            sequence = world // cfg
            degrees = [
                degree
                for degree in range(1, min(sequence, NODE) + 1)
                if sequence % degree == heads % degree == 0
            ]
            found += [ParallelPlan(cfg, degree, sequence // degree) for degree in degrees]
    return found


def needed_shapes(
    heads: int, tokens: int, worlds: Sequence[int] = WORLDS
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Shapes whose times a study needs: (tokens, heads) of an attention, and (own tokens, ulysses degree) of
    a rank.
    """
    layouts = [plan for world in worlds for plan in plans(world, heads)]
    attention = {(-(-tokens // plan.ring), heads // plan.ulysses) for plan in layouts}
    rows = {(-(-tokens // plan.sequence), plan.ulysses) for plan in layouts}
    return sorted(attention, reverse=True), sorted(rows, reverse=True)


class Links:
    """Seconds of an exchange, by bytes that a rank sends.

    Args:
        rows: measured within a node: `kind` ("ring" or "all_to_all"), `bytes`, `seconds`.
        fabric: between nodes.
    """

    def __init__(self, rows: Sequence[Piece], fabric: Fabric) -> None:
        self._fabric = fabric
        self._known = {
            kind: sorted((row["bytes"], row["seconds"]) for row in rows if row["kind"] == kind)
            for kind in ("ring", "all_to_all")
        }
        fastest = max(size / seconds for known in self._known.values() for size, seconds in known)
        self.reached = min(1.0, fastest / NVLINK)

    def seconds(self, kind: str, size: float, crosses: bool, sharing: int) -> float:
        """Of one exchange; `sharing` ranks of a node cross at once."""
        if size <= 0:
            return 0.0
        if crosses:
            speed = self._fabric.speed * self.reached / (sharing if self._fabric.shared else 1)
            return self._fabric.latency + size / speed
        return _between(self._known[kind], size)


def _between(known: Sequence[tuple[float, float]], size: float) -> float:
    """Linear between the measured sizes; the last bandwidth beyond them, the first time below."""
    if size <= known[0][0]:
        return known[0][1]
    for (low, first), (high, second) in pairwise(known):
        if size <= high:
            return first + (second - first) * (size - low) / (high - low)
    return known[-1][1] * size / known[-1][0]


class Study:
    """One model at one size.

    Args:
        model: `tokens`, `heads`, `dim`, `blocks`, `values`, `latent`, `bytes_per_number`.
        pieces: measured kernels: `kind`, the shape, `seconds`.
        links: of the machine.
        alone: seconds that one GPU's step took; None leaves the kernels' times as they are.
        factor: on the kernels' times, where `alone` is None.
        beside: of a hop alone (`attention`), its transfer alone (`transfer`) and both at once; None: they do
            not disturb each other.
        host: seconds that the host takes for a block, `alone`, `u2` and `r2`; None: none.
    """

    def __init__(
        self,
        model: Piece,
        pieces: Sequence[Piece],
        links: Links,
        alone: float | None,
        factor: float = 1.0,
        beside: Piece | None = None,
        host: Mapping[str, float] | None = None,
    ) -> None:
        self._host = host or {}
        self.model = model
        self._pieces = pieces
        self._links = links
        self.factor = 1.0
        # seconds that a hop loses for each second of transfer beside it
        self.disturbance = 0.0
        if beside is not None:
            lost = beside["both"] - max(beside["attention"], beside["transfer"])
            self.disturbance = max(0.0, lost / beside["transfer"])
        self.factor = factor if alone is None else alone / self.predict(ParallelPlan()).seconds

    def predict(self, plan: ParallelPlan) -> Prediction:
        """A layout's step."""
        model = self.model
        tokens = model["tokens"]
        blocks = model["blocks"]
        item = model["bytes_per_number"]
        sent = self._traffic(plan)
        forwards = 2 // plan.cfg
        calls = forwards * blocks
        own = -(-tokens // plan.sequence)
        seen = -(-tokens // plan.ring)
        heads = model["heads"] // plan.ulysses
        hop = self._time("attention" if plan.ring == 1 else "attention_lse", tokens=seen, heads=heads)
        # branches that share a sequence's ranks share a forward: what is not attention has the rows of both
        rest = (
            self._time("rest", tokens=2 * own) / 2
            if forwards == 2 and plan.sequence > 1
            else self._time("rest", tokens=own)
        )
        kernels = rest + plan.ring * hop
        if plan.ulysses > 1:
            kernels += self._time("pack", tokens=own, ulysses=plan.ulysses)
        if plan.ring > 1:
            kernels += (plan.ring - 1) * self._time("merge", tokens=seen, heads=heads)
        spread = plan.sequence > NODE
        waits = (
            self._ulysses_waits(plan, sent.ulysses / calls * item, plan.ring * hop, own)
            if plan.ulysses > 1
            else 0.0
        )
        if plan.ring > 1:
            transfer = self._links.seconds(
                "ring", sent.ring / calls / (plan.ring - 1) * item, spread, plan.ulysses
            )
            waits += (plan.ring - 1) * (max(0.0, transfer - hop) + self.disturbance * min(transfer, hop))
        compute = forwards * self._time("ends", tokens=tokens) + calls * kernels
        exposed = calls * waits + forwards * self._links.seconds(
            "all_to_all", sent.gather / forwards * item, spread, NODE
        )
        exposed += self._links.seconds("all_to_all", sent.guidance * item, plan.world > NODE, NODE)
        host = (forwards if plan.sequence == 1 else 1) * blocks * self._launching(plan)
        return Prediction(str(plan), max(compute + exposed, host), compute, exposed, host, sent.total * item)

    def _launching(self, plan: ParallelPlan) -> float:
        """Seconds of the host for a block."""
        alone = self._host.get("alone", 0.0)
        more = {word: max(0.0, self._host.get(word, alone) - alone) for word in ("u2", "r2")}
        return alone + (plan.ulysses - 1) * more["u2"] + (plan.ring - 1) * more["r2"]

    def _ulysses_waits(self, plan: ParallelPlan, size: float, kernel: float, own: int) -> float:
        """Seconds in which a block's kernels wait for its two exchanges of `size` bytes together."""
        inward = size * PACKED
        outward = size * (1 - PACKED)
        pieces = pieces_for(self.model["heads"] // plan.ulysses, inward) if plan.ring == 1 else 1
        # branches that share ranks share a forward: so many sequences whose exchanges may hide behind each
        # other's work
        sequences = 2 // plan.cfg
        whole = 1 if pieces > 1 else sequences  # all of them in one exchange
        first, last = (
            self._links.seconds("all_to_all", part * whole / pieces, plan.ulysses > NODE, NODE)
            for part in (inward, outward)
        )
        if pieces == 1:
            return (first + last) / sequences
        # the other pieces are packed while the first travels; three of the four copies of a block are packing
        others = sequences * pieces - 1
        packing = others * self._time("pack", tokens=own, ulysses=plan.ulysses) * PACKED / pieces
        beside = kernel / pieces
        late = others * sum(
            max(0.0, part - beside) + self.disturbance * min(part, beside) for part in (first, last)
        )
        return (max(0.0, first - packing) + last + late) / sequences

    def best(self, world: int) -> Prediction:
        """The fastest layout of that many ranks."""
        return min(
            (self.predict(plan) for plan in plans(world, self.model["heads"])),
            key=lambda found: found.seconds,
        )

    def _traffic(self, plan: ParallelPlan) -> Traffic:
        keys = ("tokens", "dim", "blocks", "values", "latent")
        return traffic(plan, **{key: self.model[key] for key in keys})

    def _time(self, kind: str, **shape: int) -> float:
        """Seconds of a measured piece; of the nearest one, scaled by its work, where this shape was not
        measured.
        """
        known = [piece for piece in self._pieces if piece["kind"] == kind]
        if not known:
            raise ValueError(
                f"no piece of kind {kind!r} was measured; run benchmarks.scaling with its kernels sections"
            )

        def work(of: Piece) -> float:
            tokens = of["tokens"] ** 2 if kind.startswith("attention") else of["tokens"]
            return float(tokens * of.get("heads", 1))

        wanted = work(shape)
        same = [piece for piece in known if all(piece[key] == value for key, value in shape.items())]
        nearest = same[0] if same else min(known, key=lambda piece: abs(math.log(work(piece) / wanted)))
        return float(nearest["seconds"]) * wanted / work(nearest) * self.factor


def studied(results: Piece) -> dict[str, Any]:
    """Everything that follows from a run's results: rows for each model and fabric, and the check on the
    measured layouts.
    """
    rows: list[dict[str, Any]] = []
    checks: list[dict[str, Any]] = []
    factors: dict[str, float] = {}
    if "rows" not in results.get("links", {}):
        raise ValueError("the links were not measured; run benchmarks.scaling with its section 'links'")
    links = Links(results["links"]["rows"], FABRICS[0])
    beside = next(
        (found for name, found in results.items() if name.endswith(" overlap") and "both" in found), None
    )
    for section, found in results.items():
        if not section.endswith(" kernels") or "pieces" not in found:
            continue
        name = section.removesuffix(" kernels")
        alone = results.get(f"{name} alone", {}).get("seconds")
        for fabric in FABRICS:
            fabric_links = Links(results["links"]["rows"], fabric)
            factor = factors.get(name.split()[0], 1.0)
            host = results.get(f"{name.split()[0]} 480p host", results.get(f"{name} host", {})).get(
                "seconds_per_block"
            )
            study = Study(found["model"], found["pieces"], fabric_links, alone, factor, beside, host)
            factors[name.split()[0]] = study.factor
            rows += _rows(name, fabric, study)
        checks += _checked(name, study, results)
    errors = [abs(check["error"]) for check in checks]
    largest = max(errors, default=None)
    return {
        "reached": links.reached,
        "factors": factors,
        "checks": checks,
        "largest_error": largest,
        "rows": rows,
    }


def _rows(name: str, fabric: Fabric, study: Study) -> list[dict[str, Any]]:
    rows = []
    one = study.predict(ParallelPlan()).seconds
    for world in WORLDS:
        auto = study.predict(auto_plan(world, study.model["heads"], min(world, NODE)))
        best = study.best(world)
        facts = {"model": name, "fabric": fabric.name, "gpus": world, "speedup": one / auto.seconds}
        rows.append({**facts, "efficiency": one / auto.seconds / world, **asdict(auto), "best": asdict(best)})
    return rows


def _checked(name: str, study: Study, results: Piece) -> list[dict[str, Any]]:
    """Predictions beside what was measured, for every layout of the run."""
    by_plan = {str(plan): plan for world in WORLDS for plan in plans(world, study.model["heads"])}
    checks = []
    for section, found in results.items():
        if section.startswith(f"{name} ") and "@" not in section and found.get("plan") in by_plan:
            predicted = study.predict(by_plan[found["plan"]]).seconds
            measured = found["seconds"]
            checks.append(
                {
                    "case": section,
                    "predicted": predicted,
                    "measured": measured,
                    "error": predicted / measured - 1,
                }
            )
    return checks


def as_markdown(study: Mapping[str, Any]) -> str:
    """The study as tables."""
    _, _, taken, assumed, *_ = (part.replace("\n", " ") for part in (__doc__ or "").split("\n\n"))
    lines = ["# Scaling, simulated", taken, assumed.strip()]
    lines += [f"NVLink reached {study['reached']:.0%} of its nominal speed."]
    lines += ["## Checked against the measurement", table_of(study["checks"])]
    for model in dict.fromkeys(row["model"] for row in study["rows"]):
        rows = [_shown(row) for row in study["rows"] if row["model"] == model and not _is_repeated(row)]
        lines += [f"## {model}", table_of(rows)]
    return "\n\n".join(lines) + "\n"


def _is_repeated(row: Mapping[str, Any]) -> bool:
    """Whether one node is told of already: no fabric matters there."""
    return row["gpus"] <= NODE and row["fabric"] != FABRICS[0].name


def _shown(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row for people."""
    best = row["best"]
    return {
        "GPUs": row["gpus"],
        "between nodes": row["fabric"] if row["gpus"] > NODE else "one node",
        "layout": row["plan"],
        "s a step": row["seconds"],
        "speed-up": row["speedup"],
        "efficiency": f"{row['efficiency']:.0%}",
        "waiting": f"{row['exposed'] / row['seconds']:.1%}",
        "launching": f"{row['host'] / row['seconds']:.0%}",
        "sent, GB": row["sent"] / 1e9,
        "best": "the same" if best["plan"] == row["plan"] else f"{best['plan']}: {best['seconds']:.3f} s",
    }


def plotted(study: Mapping[str, Any], path: Path) -> None:
    """Speed-up over GPUs, both axes logarithmic, one line for each model and fabric."""
    from PIL import Image, ImageDraw, ImageFont

    width = 1000
    height = 700
    margin = 80
    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(16)
    top = math.log2(WORLDS[-1])

    def at(gpus: float, speedup: float) -> tuple[float, float]:
        x = margin + math.log2(gpus) / top * (width - 2 * margin)
        return x, height - margin - math.log2(max(speedup, 1)) / top * (height - 2 * margin)

    for gpus in WORLDS:
        draw.line([at(gpus, 1), at(gpus, WORLDS[-1])], "#e0e0e0")
        draw.line([at(1, gpus), at(WORLDS[-1], gpus)], "#e0e0e0")
        draw.text((at(gpus, 1)[0], height - margin + 8), str(gpus), "black", font, anchor="ma")
        draw.text((margin - 8, at(1, gpus)[1]), f"{gpus}x", "black", font, anchor="rm")
    draw.line([at(1, 1), at(WORLDS[-1], WORLDS[-1])], "#a0a0a0", 2)
    draw.text((width / 2, height - 30), "GPUs, 8 a node", "black", font, anchor="mm")
    draw.text(
        (width / 2, 30),
        "Speed-up of a guided step, simulated from two GPUs (grey: ideal)",
        "black",
        font,
        anchor="mm",
    )
    colours = ("#1f6fb4", "#d9541e", "#2b9348", "#7b3fa0", "#b08900", "#c2185b", "#00838f", "#5d4037")
    lines = dict.fromkeys((row["model"], row["fabric"]) for row in study["rows"])
    for index, line in enumerate(lines):
        points = [
            at(row["gpus"], row["speedup"]) for row in study["rows"] if (row["model"], row["fabric"]) == line
        ]
        colour = colours[index % len(colours)]
        draw.line(points, colour, 3)
        for x, y in points:
            draw.ellipse((x - 4, y - 4, x + 4, y + 4), colour)
        draw.text((margin + 20, margin + 20 + 22 * index), f"{line[0]}, {line[1]}", colour, font)
    image.save(path)


def main(words: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, help="JSON of benchmarks.scaling")
    parser.add_argument("--out", type=results_folder, default=None, help="folder; the input's by default")
    asked = parser.parse_args(words)
    try:
        results = json.loads(asked.results.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SystemExit(
            f"{asked.results}: {error}; use the JSON that 'python -m benchmarks.scaling' writes"
        ) from None
    try:
        folder = asked.out or results_folder(str(asked.results.parent))
    except argparse.ArgumentTypeError as error:
        raise SystemExit(f"{error}, by --out FOLDER") from None
    study = studied(results)
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / f"{asked.results.stem}-simulated"
    stem.with_suffix(".json").write_text(json.dumps(study, indent=1) + "\n", encoding="utf-8")
    stem.with_suffix(".md").write_text(as_markdown(study), encoding="utf-8")
    plotted(study, stem.with_suffix(".png"))
    print(as_markdown(study))


if __name__ == "__main__":
    main()
