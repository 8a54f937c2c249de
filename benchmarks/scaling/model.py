"""The sections of one model in a scaling run: alone, on each layout, by diffusers, and in pieces.

Knows networks, groups and what their steps give; not in which order it is asked.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from benchmarks.comm_volume import Counting, traffic
from benchmarks.latency.peers import one_forward, twin
from benchmarks.measuring import relative_error
from benchmarks.networks import Case, Workload, random_vae
from benchmarks.scaling.pieces import pieces, ring_hop, traced, without_host
from benchmarks.scaling.ranks import INNER, Ranks
from benchmarks.simulate_scaling import needed_shapes
from chitu_diffusion.attention import AttentionKernel, attention_kernel
from chitu_diffusion.config import load_config
from chitu_diffusion.distributed.plan import auto_plan, parse_layout, plan_for
from chitu_diffusion.distributed.process_groups import ProcessGroups
from chitu_diffusion.distributed.sharding import gather_strips
from chitu_diffusion.models.registry import resolve_model

SIZES = {"480p": (832, 480, 81), "720p": (1280, 720, 81), "small": (64, 64, 5)}
SHORT = 0.005
"""Seconds below which one call is mostly the clock, or the host that launches it."""
LONG = 0.08
"""Seconds for which a longer kernel is called again and again."""
SHARED = 1
"""Self-attentions that two branches of one latent have in common: the first."""
AXES = ("ulysses", "ring", "sequence", "branches")
DIFFUSERS = {"ulysses": "ulysses_degree", "ring": "ring_degree"}
"""diffusers' context parallelism over all ranks."""
SMALL_VAE = {"base_dim": 8, "num_res_blocks": 1}


class ModelSections:
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
        like: ModelSections | None = None,
    ) -> None:
        self.ranks = ranks
        self.name = f"{name} {size}"
        self.asked = asked
        self.exact = exact
        settings = dict(text.split("=", 1) for text in asked.set)
        kind = "bfloat16" if ranks.device.type == "cuda" else "float32"
        place = {"infer.device": str(ranks.device), "infer.dtype": kind}
        self.args, _ = load_config(None, {**place, **settings}, {})
        self.work = self._workload(name, size, None if like is None else like.work)
        # of one rank, and of a ring: those that the steps took; one list, filled as they come
        self.kernel_names = ["auto", "auto"] if like is None else like.kernel_names
        self.reference = torch.empty(0)
        self.float32 = torch.empty(0)

    def _workload(self, name: str, size: str, like: Workload | None = None) -> Workload:
        spec, _ = resolve_model(name)
        width, height, frames = SIZES[size]
        case = Case(name, spec, height, width, frames, spec.transformers[0].num_layers)
        return Workload(case, self.ranks.device, like=like)

    @property
    def heads(self) -> int:
        """Of the network."""
        return self.work.case.config.num_attention_heads

    def alone(self) -> dict[str, Any]:
        """One GPU; every rank by itself."""
        began = time.monotonic()
        some = list(self.work.weights.values())[:8]
        sums = self.ranks.gathered([float(x.double().sum()) for x in some])
        backend = self.work.backend(self.args)
        found, self.reference = self._timed(self.work.step(backend))
        self.kernel_names[0] = found["kernel"] = backend.attn_backend.name
        found["weights_agree"] = all(each == sums[0] for each in sums)
        found["section_to_here"] = time.monotonic() - began
        if self.exact:
            network = self.work.network(torch.float32)
            text = self.work.text[:1].float()
            self.float32 = network(self.work.latent, text, self.work.timestep)
            found["error_to_float32"] = relative_error(self.reference[:1], self.float32)
        return found

    def layout(self, word: str) -> dict[str, Any]:
        """One layout of all ranks; "u2@nccl" exchanges through NCCL, "u2@8" too, which then may take 8
        multiprocessors.
        """
        plain, through_nccl, most = layout_and_means(word)
        plan = plan_for(self.ranks.world, self.heads, **parse_layout(plain))
        groups = self.ranks.layout(plan, multiprocessors=most, copies=not through_nccl)
        backend = self.work.backend(self.args, groups=groups)
        step = self.work.step(backend)
        with counted(groups) as sent:
            found, velocity = self._timed(step)
        calls = 1 + self.asked.repeats
        found |= {"kernel": backend.attn_backend.name, "plan": str(plan), "exchanges": groups.exchanges}
        if plan.ring > 1:
            self.kernel_names[1] = found["kernel"]
        alone = self.ranks.results.get(f"{self.name} alone", {}).get("seconds")
        found["speedup"] = alone and alone / found["seconds"]
        found["bytes_sent"] = {name: counter.sent // calls for name, counter in sent.items()}
        found["formula_numbers"] = asdict(traffic(groups.plan, **self._shape(), shared=SHARED))
        if len(self.reference):
            found["error_to_alone"] = relative_error(velocity, self.reference)
        if len(self.float32):
            found["error_to_float32"] = relative_error(velocity[:1], self.float32)
        if self.exact and plan.sequence > 1 and self.ranks.device.type == "cuda":
            found["trace"] = traced(step, self.ranks.device)
        return found

    def _shape(self) -> dict[str, int]:
        """What the formulas of traffic ask for."""
        config = self.work.case.config
        values = config.patch_values * config.out_channels
        sizes = {"tokens": self.work.case.tokens, "dim": config.dim, "blocks": config.num_layers}
        return sizes | {"values": values, "latent": self.work.latent.numel()}

    def overlap(self) -> dict[str, Any]:
        """A hop of the ring: its kernel, its transfer, and both at once."""
        groups = self.ranks.layout(plan_for(self.ranks.world, self.heads, cp=self.ranks.world, ulysses=1))
        kernel = self._kernel(self.kernel_names[1], for_ring=True)
        works = ring_hop(self.work, groups, kernel)
        return {"kernel": kernel.name, **{name: self.ranks.each(work) for name, work in works.items()}}

    def host(self) -> dict[str, Any]:
        """Seconds that the host takes for a block: of a step so small that the GPU waits for it."""
        work = self._workload(self.work.case.name, "small", self.work)
        world = self.ranks.world
        found = {}
        for word, ulysses in (("alone", 0), ("u2", 2), ("r2", 1)) if world == 2 else (("alone", 0),):
            groups = None
            if ulysses:
                groups = self.ranks.layout(plan_for(world, self.heads, cp=world, ulysses=ulysses))
            step = work.step(work.backend(self.args, groups=groups))
            took = self.ranks.timed(step, 2 * self.asked.repeats)["seconds"]
            found[word] = took / work.case.config.num_layers
        return {"seconds_per_block": found}

    def diffusers(self, word: str) -> dict[str, Any]:
        """diffusers' transformer with the same weights, alone or with its own context parallelism."""
        from diffusers import ContextParallelConfig

        work = self.work
        world = self.ranks.world
        model: Any = twin(work.case.config, work.weights, work.device)
        kind = word.rstrip("0123456789")
        backend = "_native_cudnn" if work.device.type == "cuda" and kind != "ulysses" else "native"
        model.set_attention_backend(backend)
        if word != "alone":
            self.ranks.layout(plan_for(world, self.heads, cp=world, ulysses=1), at_once=False)
            model.enable_parallelism(config=ContextParallelConfig(**{DIFFUSERS[kind]: world}))
        latent = work.latent.to(work.dtype)
        branches = [one_forward(model, latent, work.timestep, row[None]) for row in work.text]

        def step() -> list[Tensor]:
            return [branch() for branch in branches]

        found = {**self.ranks.timed(step, max(1, self.asked.repeats - 1)), "backend": backend}
        if len(self.reference):
            found["error_to_ours_alone"] = relative_error(torch.cat(step()), self.reference)
        alone = self.ranks.results.get(f"diffusers {self.name} alone", {}).get("seconds")
        return found if alone is None else {**found, "speedup": alone / found["seconds"]}

    def kernels(self) -> dict[str, Any]:
        """Times of the pieces of a forward, for every shape that the simulation asks for."""
        attention, rows = needed_shapes(self.heads, self.work.case.tokens)
        chosen = [
            self._kernel(name, for_ring=for_ring)
            for name, for_ring in zip(self.kernel_names, (False, True), strict=True)
        ]
        found = []
        for what, work in pieces(self.work, attention, rows, *chosen):
            seconds, alone = self._piece(work)
            found.append({**what, "seconds": seconds, "without_host": alone})
        shape = {**self._shape(), "heads": self.heads, "bytes_per_number": self.work.dtype.itemsize}
        return {"model": shape, "kernels": [kernel.name for kernel in chosen], "pieces": found}

    def _piece(self, work: Callable[[], object]) -> tuple[float, bool]:
        """Seconds of a kernel, and whether that was without the host."""
        took = self.ranks.timed(work, 1)["seconds"]
        if self.ranks.device.type != "cuda":
            return took, False
        if took < SHORT:
            calls = without_host(work, INNER)
            if calls is None:
                return self.ranks.each(work), False
            return self.ranks.timed(calls, 2)["seconds"] / INNER, True
        # as long as the clocks need to come down to what they hold
        several = round(LONG / took) or 1
        return self.ranks.timed(lambda: [work() for _ in range(several)], 1)["seconds"] / several, False

    def _kernel(self, name: str, *, for_ring: bool) -> AttentionKernel:
        """A kernel by name, or the first that this device offers."""
        head_dim = self.work.case.config.attention_head_dim
        place = {"device": self.work.device, "dtype": self.work.dtype, "head_dim": head_dim}
        return attention_kernel(name, for_ring=for_ring, **place)

    def _timed(self, work: Callable[[], Tensor]) -> tuple[dict[str, Any], Tensor]:
        """Times of a step, and the velocities of the last."""
        last = torch.empty(0)

        def call() -> None:
            nonlocal last
            last = work()

        return self.ranks.timed(call, self.asked.repeats), last

    def release(self) -> dict[str, Any]:
        """Lets go of the weights; the velocity, with which others are compared, is small."""
        self.work.release()
        self.float32 = torch.empty(0)
        return {}


@contextmanager
def counted(groups: ProcessGroups) -> Iterator[dict[str, Counting]]:
    """What this rank sends inside, by axis; exchanges go on as they are."""
    counters = {name: Counting(vars(groups)[name]) for name in AXES}
    for name, counter in counters.items():
        setattr(groups, name, counter)
    try:
        yield counters
    finally:
        for name, counter in counters.items():
            setattr(groups, name, counter.group)


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
        def decode(low: int, high: int) -> Tensor:
            return decoder.decode_strip(latent, low, high)

        return gather_strips(decode, shape[-1], -1, groups.world)

    found = ranks.timed(strips, repeats)
    alone = ranks.results.get("vae alone", {}).get("seconds")
    found["speedup"] = alone and alone / found["seconds"]
    whole = decoder.decode(latent)
    video = strips()
    if video is not None:
        found["error_to_alone"] = relative_error(video, whole)
        found["largest"] = float((video - whole).abs().max())
    return found
