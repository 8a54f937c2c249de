"""Seconds per guided step and per VAE decode on one GPU and on every layout of the ranks, in one run, on
random weights.

    python -m benchmarks.scaling --ranks 2                                    two GPUs of this machine
    torchrun --nproc-per-node 2 -m benchmarks.scaling --budget 200            the same, started by hand
    torchrun --nproc-per-node 8 -m benchmarks.scaling --layouts all --sizes 480p,720p --repeats 1
    python -m benchmarks.scaling --ranks 2 --small --device cpu               the same road without a GPU
                                                                              (gloo)

Beside them diffusers' own context parallelism, the links' bandwidth by message size, and the kernels' times,
from which `benchmarks.simulate_scaling` computes more ranks. Sections stand for themselves: one that fails
fails on all ranks, and the run goes on. Results are rewritten after each. Warm-up is reported and not
counted; a time is the slowest rank's.
"""

from __future__ import annotations

import argparse
import faulthandler
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.scaling_ranks import Ranks, in_processes
from benchmarks.scaling_report import as_markdown
from benchmarks.scaling_work import (
    Case,
    beside,
    counted,
    kernels,
    link_exchanges,
    random_transformer,
    random_vae,
    traced,
    without_host,
    wrong_arrivals,
)
from benchmarks.simulate_scaling import needed_shapes, plans
from chitu_diffusion.config import rank_place
from chitu_diffusion.distributed.plan import ParallelPlan, auto_plan, parse_layout, plan_for
from chitu_diffusion.distributed.process_groups import ProcessGroups
from chitu_diffusion.distributed.sharding import gather_strips
from chitu_diffusion.errors import UsageError
from chitu_diffusion.models.registry import resolve_model
from chitu_diffusion.models.wan.transformer import WanTransformer

RESULTS = Path(__file__).resolve().parent / "results"
SIZES = {"480p": (832, 480, 81), "720p": (1280, 720, 81), "small": (64, 64, 5)}
INNER, SHORT = 16, 0.005
"""Calls for one reading of the clock, for what takes less than so many seconds."""
LONG = 0.08
"""Seconds for which a longer kernel is called again and again."""
DIFFUSERS = {"ulysses": "ulysses_degree", "ring": "ring_degree"}
"""diffusers' context parallelism over all ranks."""
SMALL_VAE = {"base_dim": 8, "num_res_blocks": 1}


def settings_of(asked: argparse.Namespace) -> dict[str, str]:
    """The command line's settings by dotted name."""
    return dict(text.split("=", 1) for text in asked.set)


def relative(found: Tensor, reference: Tensor) -> float:
    """Error of norms."""
    return float((found.float() - reference.float()).norm() / reference.float().norm())


class Model:
    """The sections of one model: alone, then each layout beside it.

    Args:
        ranks: the run.
        name: of the model, and of its results.
        size: a key of `SIZES`.
        asked: the command line.
        exact: also compare with float32.
        like: another size of the model, whose weights and choice of kernels this one shares.
    """

    def __init__(
        self,
        ranks: Ranks,
        name: str,
        size: str,
        asked: argparse.Namespace,
        exact: bool,
        like: Model | None = None,
    ) -> None:
        self._like = like
        self.ranks, self.name, self.asked, self.exact = ranks, f"{name} {size}", asked, exact
        cuda = ranks.device.type == "cuda"
        spec, _ = resolve_model(name)
        dtype = torch.bfloat16 if cuda else torch.float32
        self.case = Case(spec, SIZES[size], ranks.device, dtype, settings_of(asked))
        # of one rank, and of a ring: those that the steps took; one list, filled as they come
        self.kernel_names = ["auto", "auto"] if like is None else like.kernel_names
        self.network: WanTransformer | None = None
        self.reference = self.float32 = torch.empty(0)

    def weights(self) -> WanTransformer:
        """The network; drawn at the first call."""
        if self._like is not None:
            return self._like.weights()
        if self.network is None:
            self.network = random_transformer(self.case.config, self.case.device, self.case.dtype)
        return self.network

    def alone(self) -> dict[str, Any]:
        """One GPU; every rank by itself."""
        began, network = time.monotonic(), self.weights()
        sums = self.ranks.gathered([float(x.double().sum()) for x in list(network.parameters())[:8]])
        backend = self.case.backend(network, ProcessGroups())
        found, self.reference = self._timed(self.case.step(backend))
        self.kernel_names[0] = found["kernel"] = backend.attn_backend.name
        found |= {
            "weights_agree": all(each == sums[0] for each in sums),
            "section_to_here": time.monotonic() - began,
        }
        if self.exact:
            self.float32 = self._in_float32(network)
            found["error_to_float32"] = relative(self.reference[:1], self.float32)
        return found

    def layout(self, word: str) -> dict[str, Any]:
        """One layout of all ranks; "u2@nccl" exchanges through NCCL, "u2@8" too, which then may take 8
        multiprocessors.
        """
        plain, through_nccl, most = layout_and_means(word)
        plan = plan_for(self.ranks.world, self.case.config.num_attention_heads, **parse_layout(plain))
        groups = self.ranks.layout(plan, multiprocessors=most, copies=not through_nccl)
        backend = self.case.backend(self.weights(), groups)
        work = self.case.step(backend)
        with counted(groups) as sent:
            found, velocity = self._timed(work)
        kernel, calls = backend.attn_backend.name, 1 + self.asked.repeats
        if plan.ring > 1:
            self.kernel_names[1] = kernel
        alone = self.ranks.results.get(f"{self.name} alone", {}).get("seconds")
        found |= {"kernel": kernel, "plan": str(plan), "exchanges": groups.exchanges}
        found |= {"speedup": alone and alone / found["seconds"]}
        found |= {"bytes_sent": {name: counter.sent // calls for name, counter in sent.items()}}
        found |= {"formula_numbers": asdict(self.case.formula(groups))}
        if len(self.reference):
            found["error_to_alone"] = relative(velocity, self.reference)
        if len(self.float32):
            found["error_to_float32"] = relative(velocity[:1], self.float32)
        if self.exact and plan.sequence > 1 and self.ranks.device.type == "cuda":
            found["trace"] = traced(work)
        return found

    def overlap(self) -> dict[str, Any]:
        """A hop of the ring: its kernel, its transfer, and both at once."""
        world = self.ranks.world
        groups = self.ranks.layout(plan_for(world, self.case.config.num_attention_heads, cp=world, ulysses=1))
        kernel = self.case.kernel(self.kernel_names[1], True)
        works = beside(self.case, groups, kernel)
        return {"kernel": kernel.name, **{name: self._each(work) for name, work in works.items()}}

    def host(self) -> dict[str, Any]:
        """Seconds that the host takes for a block: of a step so small that the GPU waits for it."""
        found, case = (
            {},
            Case(self.case.spec, SIZES["small"], self.case.device, self.case.dtype, settings_of(self.asked)),
        )
        world, heads = self.ranks.world, case.config.num_attention_heads
        for word, ulysses in (("alone", 0), ("u2", 2), ("r2", 1)) if world == 2 else (("alone", 0),):
            groups = (
                self.ranks.layout(plan_for(world, heads, cp=world, ulysses=ulysses))
                if ulysses
                else ProcessGroups()
            )
            step = case.step(case.backend(self.weights(), groups))
            found[word] = self.ranks.timed(step, 2 * self.asked.repeats)["seconds"] / case.config.num_layers
        return {"seconds_per_block": found}

    def diffusers(self, word: str) -> dict[str, Any]:
        """diffusers' transformer with the same weights, alone or with its own context parallelism."""
        from diffusers import ContextParallelConfig, WanTransformer3DModel

        with torch.device("meta"):
            model = WanTransformer3DModel.from_config(self.case.config.to_json())
        model.load_state_dict(self.weights().state_dict(), assign=True)
        # computed in the constructor, and not weights: made again where the weights are
        with self.ranks.device:
            model.rope = type(model.rope)(
                self.case.config.attention_head_dim,
                self.case.config.patch_size,
                self.case.config.rope_max_seq_len,
            )
        kind = word.rstrip("0123456789")
        backend = "_native_cudnn" if self.ranks.device.type == "cuda" and kind != "ulysses" else "native"
        model.eval().set_attention_backend(backend)
        if word != "alone":
            plan = plan_for(
                self.ranks.world, self.case.config.num_attention_heads, cp=self.ranks.world, ulysses=1
            )
            self.ranks.layout(plan, at_once=False)
            model.enable_parallelism(config=ContextParallelConfig(**{DIFFUSERS[kind]: self.ranks.world}))
        latent, time_row = (
            self.case.latent.to(self.case.dtype),
            self.case.time.reshape(1).to(self.ranks.device),
        )

        def step() -> list[Tensor]:
            return [model(latent, time_row, row[None], return_dict=False)[0] for row in self.case.text]

        found = {**self.ranks.timed(step, max(1, self.asked.repeats - 1)), "backend": backend}
        if len(self.reference):
            found["error_to_ours_alone"] = relative(torch.cat(step()), self.reference)
        alone = self.ranks.results.get(f"diffusers {self.name} alone", {}).get("seconds")
        return found if alone is None else {**found, "speedup": alone / found["seconds"]}

    def kernels(self) -> dict[str, Any]:
        """Times of the pieces of a forward, for every shape that the simulation asks for."""
        attention, rows = needed_shapes(self.case.config.num_attention_heads, self.case.tokens)
        pieces = []
        names = self.kernel_names
        chosen = [
            self.case.kernel(name, needs_lse) for name, needs_lse in zip(names, (False, True), strict=True)
        ]
        for what, work in kernels(self.case, attention, rows, *chosen):
            took, alone = self.ranks.timed(work, 1)["seconds"], False
            if took < SHORT and self.ranks.device.type == "cuda":
                # a single short call is mostly the clock, or the host that launches it
                calls = without_host(work, INNER)
                took, alone = (
                    (self.ranks.timed(calls, 2)["seconds"] / INNER, True)
                    if calls
                    else (self._each(work), False)
                )
            elif self.ranks.device.type == "cuda":
                # as long as the clocks need to come down to what they hold
                several = round(LONG / took) or 1
                took = (
                    self.ranks.timed(lambda work=work, n=several: [work() for _ in range(n)], 1)["seconds"]
                    / several
                )
            pieces.append({**what, "seconds": took, "without_host": alone})
        config = self.case.config
        shape = {"tokens": self.case.tokens, "heads": config.num_attention_heads, "dim": config.dim}
        shape |= {"blocks": config.num_layers, "values": config.patch_values * config.out_channels}
        shape |= {"latent": self.case.latent.numel(), "bytes_per_number": self.case.dtype.itemsize}
        return {"model": shape, "kernels": [kernel.name for kernel in chosen], "pieces": pieces}

    def _each(self, work: Callable[[], object]) -> float:
        """Seconds of one call of many."""
        return float(self.ranks.timed(lambda: [work() for _ in range(INNER)], 3)["seconds"] / INNER)

    def _timed(self, work: Callable[[], Tensor]) -> tuple[dict[str, Any], Tensor]:
        """Times of a step, and the velocities of the last."""
        last = torch.empty(0)

        def call() -> None:
            nonlocal last
            last = work()

        return self.ranks.timed(call, self.asked.repeats), last

    def release(self) -> None:
        """Let go of the weights; the velocity, with which others are compared, is small."""
        self.network = None
        self.float32 = torch.empty(0)

    def _in_float32(self, network: WanTransformer) -> Tensor:
        """The prompt's velocity with the same weights, everything in float32."""
        with torch.device("meta"):
            exact = WanTransformer(self.case.config)
        exact.load_state_dict({name: x.float() for name, x in network.state_dict().items()}, assign=True)
        case = self.case
        return exact.eval()(case.latent, case.time.reshape(1).to(case.device), case.text[:1].float())


def links(ranks: Ranks, sizes: list[int]) -> dict[str, Any]:
    """Seconds of both kinds of exchange by bytes that a rank sends; bandwidth is of one direction of one
    rank.
    """
    groups = ranks.layout(plan_for(ranks.world, ranks.world, cp=ranks.world, ulysses=ranks.world))
    rows = []
    for kind, size, work in link_exchanges(groups, ranks.device, sizes):
        took = ranks.timed(lambda work=work: [work() for _ in range(INNER)], 3)["seconds"] / INNER
        rows.append({"kind": kind, "bytes": size, "seconds": took, "gigabytes_per_second": size / took / 1e9})
    return {"ranks": ranks.world, "rows": rows}


def exchanges(ranks: Ranks) -> dict[str, Any]:
    """Whether what arrives is what was sent, in each kind of exchange, with ranks that are late in turn."""
    found: dict[str, Any] = {}
    for axis in ("ulysses", "ring"):
        groups = ranks.layout(
            plan_for(
                ranks.world, ranks.world, cp=ranks.world, ulysses=ranks.world if axis == "ulysses" else 1
            )
        )
        wrong = ranks.gathered(wrong_arrivals(vars(groups)[axis], ranks.device))
        found[axis] = {
            "by": groups.exchanges.get(axis, "gloo"),
            "parts": wrong[0]["parts"],
            "wrong": [w["wrong"] for w in wrong],
        }
    return found


def vae(ranks: Ranks, small: bool, repeats: int, shared: bool) -> dict[str, Any]:
    """A decode by each rank alone, or in strips over all."""
    dtype = torch.float32 if small else torch.bfloat16
    decoder = random_vae(SMALL_VAE if small else {}, ranks.device, dtype)
    shape = (1, 16, 3, 8, 8) if small else (1, 16, 21, 60, 104)
    latent = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(ranks.device)
    if not shared:
        return ranks.timed(lambda: decoder.decode(latent), repeats)
    groups = ranks.layout(auto_plan(ranks.world, ranks.world))

    def strips() -> Tensor | None:
        return gather_strips(
            lambda low, high: decoder.decode_strip(latent, low, high), shape[-1], -1, groups.world
        )

    found = ranks.timed(strips, repeats)
    alone = ranks.results.get("vae alone", {}).get("seconds")
    whole, video = decoder.decode(latent), strips()
    error = (
        {}
        if video is None
        else {"error_to_alone": relative(video, whole), "largest": float((video - whole).abs().max())}
    )
    return {**found, "speedup": alone and alone / found["seconds"], **error}


def fault(ranks: Ranks, kind: str) -> dict[str, Any]:
    """The last rank raises while the others wait in an exchange with it: how long they wait, and whether
    groups open again.

    Args:
        ranks: the run.
        kind: "group", an exchange of the process group; "sequence", one within a sequence; "refused", one
            within a sequence, through NCCL, that is refused half begun on every rank.
    """
    plan = plan_for(ranks.world, ranks.world, cp=ranks.world, ulysses=ranks.world)
    groups, size = ranks.layout(plan, copies=kind == "sequence"), ranks.world
    x = torch.zeros(1 << 20, device=ranks.device)

    def exchange(x: Tensor = x) -> None:
        if kind == "group":
            groups.world.all_gather(x)
        else:
            groups.ulysses.release_buffers()
            groups.ulysses.all_to_all(
                [x] * size, groups.ulysses.recv_buffer([[len(x)] * size] * size, (), x)
            )()

    for _ in range(3):
        exchange()
    began = time.monotonic()
    said = ""
    try:
        if kind == "refused":
            exchange(x.short())  # of a type that NCCL does not know
        if ranks.rank == ranks.world - 1:
            time.sleep(1.0)
            ranks.fall()
            raise ValueError("on purpose")
        exchange()
        float(x.sum())  # the host waits for the device here
    except (TypeError, ValueError, RuntimeError) as error:
        said = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    waited = time.monotonic() - began
    found = {"seconds": waited, "broken": groups.broken, "raised": said}
    groups.abort()  # with gloo that is what wakes those who wait for this rank
    facts = ranks.gathered(found)
    groups.open()
    exchange()
    again = [
        float(part[0])
        for part in groups.world.all_gather(torch.full((1,), float(ranks.rank), device=ranks.device))
    ]
    return {
        "exchanges": groups.exchanges,
        "ranks": facts,
        "groups_again": again == [float(rank) for rank in range(ranks.world)],
    }


def warm_up(ranks: Ranks) -> dict[str, Any]:
    """Libraries, and what the machine is."""
    cuda = ranks.device.type == "cuda"
    x = torch.randn(256, 256, device=ranks.device)
    (x @ x).sum().item()
    facts: dict[str, Any] = {
        "device": torch.cuda.get_device_name(ranks.device) if cuda else "cpu",
        "ranks": ranks.world,
    }
    facts |= {
        "torch": torch.__version__,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if cuda else None,
    }
    return {**facts, "to_first_section": ranks.elapsed}


def sections(
    ranks: Ranks, asked: argparse.Namespace
) -> list[tuple[str, Callable[[], dict[str, Any]], float]]:
    """(name, work, seconds that it takes on H200) in order: what matters first."""
    small, names = asked.small, ["wan-tiny"] if asked.small else asked.models.split(",")
    sizes = ["small"] if small else asked.sizes.split(",")
    message = [1 << power for power in ((12, 16) if small else range(16, 29, 2))]
    rows: list[tuple[str, Callable[[], dict[str, Any]], float]] = [("machine", lambda: warm_up(ranks), 0)]
    rows.append(("links", lambda: links(ranks, message), 4))
    rows.append(("exchanges", lambda: exchanges(ranks), 3))
    rows.append(("vae alone", lambda: vae(ranks, small, 2, False), 10))
    rows.append(("vae shared", lambda: vae(ranks, small, 2, True), 8))
    models = [Model(ranks, name, sizes[0], asked, exact=index == 0) for index, name in enumerate(names)]
    for index, model in enumerate(models):
        rows += steps_of(model, asked, first=index == 0)
        for size in sizes[1:]:
            # with the same weights; its kernels are those that the first size chose
            other = Model(ranks, names[index], size, asked, exact=False, like=model)
            rows += steps_of(other, asked, first=False)
        rows.append((f"{model.name} released", lambda m=model: m.release() or {}, 0))
    for model in [] if small or "720p" in sizes else models:
        larger = Model(ranks, model.case.spec.name, "720p", asked, exact=False, like=model)
        rows.append((f"{larger.name} kernels", larger.kernels, 3 if model is models[0] else 8))
        rows.append((f"{larger.name} released", lambda m=model: m.release() or {}, 0))
    for name, kind in (
        ("fault", "group"),
        ("fault within a sequence", "sequence"),
        ("fault in a batch", "refused"),
    ):
        rows.append((name, lambda kind=kind: fault(ranks, kind), 6))
    # last, for a crash in there would end the run
    for word in ("alone", *(f"{kind}{ranks.world}" for kind in DIFFUSERS if not small)):
        rows.append((f"diffusers {models[0].name} {word}", lambda w=word: models[0].diffusers(w), 7))
    chosen = asked.only.split(",") if asked.only else [""]
    return [row for row in rows if any(word in row[0] for word in chosen)]


def steps_of(
    model: Model, asked: argparse.Namespace, first: bool
) -> list[tuple[str, Callable[[], dict[str, Any]], float]]:
    """Sections of one model and size, with their seconds on H200s; what is looked at once comes with the
    first.
    """
    world, heads = model.ranks.world, model.case.config.num_attention_heads
    words = (
        [str_of(plan) for plan in plans(world, heads)] if asked.layouts == "all" else asked.layouts.split(",")
    )
    step = 1.0 if first else 5.0 if "480p" in model.name else 21.0 if "14B" in model.name else 4.0
    rows: list[tuple[str, Callable[[], dict[str, Any]], float]] = [
        (f"{model.name} alone", model.alone, 12 + 4 * step)
    ]
    # a choice of means is looked at once
    for word in (word for word in words if first or "@" not in word):
        rows.append((f"{model.name} {word}", lambda w=word: model.layout(w), 4 + 8 * step / world))
    if first:
        rows.append((f"{model.name} overlap", model.overlap, 3))
    rows.append((f"{model.name} host", model.host, 6))
    rows.append((f"{model.name} kernels", model.kernels, 4 if first else 8))
    return rows


def str_of(plan: ParallelPlan) -> str:
    """`cfg2u4r2`, as `parse_layout` reads it."""
    parts = {"cfg": plan.cfg, "u": plan.ulysses, "r": plan.ring}
    return "".join(f"{name}{degree}" for name, degree in parts.items() if degree > 1)


def layout_and_means(word: str) -> tuple[str, bool, int | None]:
    """ "u2" as ("u2", False, None), "u2@nccl" as ("u2", True, None), "u2@8" as ("u2", True, 8): a layout,
    whether its ranks exchange through NCCL though they could copy, and how many multiprocessors that may
    take.

    Raises:
        ValueError: no such means.
    """
    plain, at, means = word.partition("@")
    if at and means != "nccl" and not (means.isascii() and means.isdigit() and int(means) > 0):
        raise ValueError(f"use {plain}@nccl, or {plain}@8 with a number of multiprocessors from 1")
    return plain, bool(at), int(means) if means.isdigit() else None


@torch.no_grad()
def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--ranks", type=int, default=2, help="processes, where torchrun did not start this one"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--small", action="store_true", help="wan-tiny's shape, 64x64, 5 frames")
    parser.add_argument("--repeats", type=int, default=3, help="counted readings of a step")
    parser.add_argument(
        "--layouts", default="cfg2,u2,r2", help="or all; u2@nccl: no copies; u2@8: on 8 multiprocessors"
    )
    parser.add_argument("--models", default="Wan2.1-T2V-1.3B,Wan2.1-T2V-14B", help="names, comma-separated")
    parser.add_argument("--sizes", default="480p", help="480p, 720p or both, comma-separated")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="as infer.attn_type=math"
    )
    parser.add_argument(
        "--only", default="", help="sections whose names hold one of these words, comma-separated"
    )
    parser.add_argument("--budget", type=float, default=200.0, help="seconds; what would not fit is skipped")
    parser.add_argument("--out", type=Path, default=None, help="JSON; a table is written beside it")
    asked = parser.parse_args()
    for size in set(asked.sizes.split(",")) - set(SIZES):
        parser.error(f"--sizes {asked.sizes}: {size!r}: use {', '.join(SIZES)}")
    for word in asked.layouts.split(",") if asked.layouts != "all" else ():
        try:
            parse_layout(layout_and_means(word)[0])
        except (UsageError, ValueError) as error:
            parser.error(f"--layouts {asked.layouts}: {word!r}: {error}")
    faulthandler.enable()  # a crash inside a library says at least where it was called
    place = rank_place()
    if place is None:
        return in_processes("benchmarks.scaling", asked.ranks, sys.argv[1:])
    cuda = torch.cuda.is_available() if asked.device == "auto" else asked.device == "cuda"
    device = torch.device("cuda", place.local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    out = asked.out or RESULTS / f"scaling-{place.world}-{'gpus' if cuda else 'cpu'}.json"
    ranks = Ranks(place, device, out, asked.budget)
    for name, work, estimate in sections(ranks, asked):
        ranks.section(name, work, 0 if asked.small else estimate)
        if ranks.rank == 0:
            out.with_suffix(".md").write_text(as_markdown(ranks.results))
    broken = ranks.broken
    ranks.close()
    return 1 if broken else 0


if __name__ == "__main__":
    raise SystemExit(main())
