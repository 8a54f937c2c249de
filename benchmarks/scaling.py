"""Seconds per guided step and per VAE decode on every layout that fits the ranks, on random weights.

    torchrun --nproc-per-node 2 benchmarks/scaling.py --model Wan2.1-T2V-1.3B --size 832x480 --frames 81
    torchrun --nproc-per-node 2 benchmarks/scaling.py --model wan-tiny --size 64x64 --frames 5 --repeats 1   (CPU, gloo)

One JSON line a layout on rank 0's stdout. The one-rank figure is taken on rank 0 in the same run while the others wait.
Knows the engine's layers; measures nothing of files or of the text encoder.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from chitu_diffusion.attention import attention_kernel
from chitu_diffusion.config import rank_place
from chitu_diffusion.models.spec import resolve_model
from chitu_diffusion.models.wan import WanTransformer
from chitu_diffusion.parallel.groups import RankGroups
from chitu_diffusion.parallel.guidance import all_branches, own_branches
from chitu_diffusion.parallel.plan import ParallelPlan, parse_layout, plan_for
from chitu_diffusion.parallel.sequence import Shards, sharded_attention


def guided_step(network: WanTransformer, latent: torch.Tensor, text: torch.Tensor, groups: RankGroups) -> torch.Tensor:
    """Both branches' velocities, as `chitu_diffusion.forward` computes them, one branch after the other."""
    kernel = attention_kernel("auto", needs_lse=groups.plan.ring > 1)
    parts = []
    for branch in own_branches(text, groups.branches).split(1):
        embedded = network.embed(latent, torch.tensor([500.0], device=latent.device), branch)
        shards = Shards.of(embedded.tokens.shape[1], groups.sequence)
        cos, sin = (shards.take(part, 0) for part in embedded.rope)
        own = type(embedded)(**{**vars(embedded), "tokens": shards.take(embedded.tokens, 1), "rope": (cos, sin)})
        attention = sharded_attention(kernel, groups.ulysses, groups.ring, shards.lengths)
        tokens = network.run_blocks(own, attention=attention)
        values = shards.gather(network.head(tokens, own.time), groups.sequence)
        parts.append(network.unpatchify(values, own.grid))
    return all_branches(torch.cat(parts), len(text), groups.branches)


def seconds(work: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Median time, the device drained before and after."""
    times = []
    for _ in range(repeats + 1):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    return sorted(times[1:])[repeats // 2]


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="wan-tiny")
    parser.add_argument("--size", default="64x64")
    parser.add_argument("--frames", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--layouts", default="cfg2,u2,r2")
    asked = parser.parse_args()
    place = rank_place()
    if place is None:
        raise SystemExit("start this with torchrun")
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", place.local_rank) if cuda else torch.device("cpu")
    store = next(iter(dist.rendezvous("env://")))[0]
    spec, _ = resolve_model(asked.model, None)
    torch.manual_seed(0)
    with device:
        network = WanTransformer(spec.transformers[0]).to(torch.bfloat16 if cuda else torch.float32).eval()
    width, height = (int(side) for side in asked.size.split("x"))
    latent = torch.randn(1, *spec.geometry.latent_shape(asked.frames, height, width), device=device)
    text = torch.randn(2, 512, spec.transformers[0].text_dim, device=device)
    alone, reference = 0.0, torch.empty(0)
    if place.rank == 0:
        reference = guided_step(network, latent, text, RankGroups())
        alone = seconds(lambda: guided_step(network, latent, text, RankGroups()), asked.repeats, device)
        print(json.dumps({"layout": str(ParallelPlan()), "seconds": alone}), flush=True)
    for layout in asked.layouts.split(","):
        plan = plan_for(place.world, spec.transformers[0].num_attention_heads, **parse_layout(layout))
        groups = RankGroups(plan, place.rank, device, dist.PrefixStore(layout, store), timeout=600)
        groups.open()
        found = guided_step(network, latent, text, groups)
        took = seconds(lambda groups=groups: guided_step(network, latent, text, groups), asked.repeats, device)
        if place.rank == 0:
            error = float((found - reference).float().norm() / reference.float().norm())
            memory = torch.cuda.max_memory_allocated(device) if cuda else 0
            facts = {"seconds": took, "speedup": alone / took, "relative_error": error, "peak_bytes": memory}
            print(json.dumps({"layout": str(plan), **facts}), flush=True)
        groups.close()


if __name__ == "__main__":
    main()
