"""What a scaling run measures: networks with random weights, their steps, kernels, links, and traces of what overlapped.

Random weights are drawn on each rank from the same seed. A step is `chitu_diffusion.forward`'s own. Knows one rank's view;
no clock and no results.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

if find_spec("ftfy") is None:
    sys.modules["ftfy"] = ModuleType("ftfy")  # mends prompts; none is read here, and not every test machine has it

from chitu_diffusion import forward
from chitu_diffusion.attention import attention_kernel
from chitu_diffusion.attention.merge import merge
from chitu_diffusion.attention.ulysses import ulysses
from chitu_diffusion.config import EngineConfig
from chitu_diffusion.models.spec import ModelSpec
from chitu_diffusion.models.vae import Vae, build_vae
from chitu_diffusion.models.wan import KEEP_FLOAT32, WanTransformer
from chitu_diffusion.models.wan_config import WanConfig
from chitu_diffusion.parallel.groups import RankGroups
from chitu_diffusion.parallel.traffic import Counting, Traffic, traffic

TEXT_ROWS = 512
AXES = ("ulysses", "ring", "sequence", "branches")
Span = tuple[float, float]
Work = Callable[[], object]


def filled(module: nn.Module, device: torch.device, dtype: torch.dtype, keep: Sequence[str] = (), seed: int = 0) -> nn.Module:
    """A network on the meta device, with random weights on `device`: N(0, 1 / fan-in), norms 1, biases 0.

    Args:
        module: on the meta device.
        device, dtype: where and as what.
        keep: parts of parameter names that stay float32.
        seed: the same seed gives the same weights on the same kind of device.
    """
    module.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(seed)
    for name, parameter in module.named_parameters():
        if not any(part in name for part in keep):
            parameter.data = parameter.data.to(dtype)
        if parameter.ndim > 1 and "gamma" not in name:
            parameter.data.normal_(generator=generator).mul_(max(parameter[0].numel(), 1) ** -0.5)
        else:
            parameter.data.fill_(0.0 if name.endswith("bias") else 1.0)
    return module.eval().requires_grad_(False)


def random_transformer(config: WanConfig, device: torch.device, dtype: torch.dtype, seed: int = 0) -> WanTransformer:
    """A transformer with random weights."""
    with torch.device("meta"):
        network = WanTransformer(config)
    filled(network, device, dtype, KEEP_FLOAT32, seed)
    return network


def random_vae(config: Mapping[str, Any], device: torch.device, dtype: torch.dtype) -> Vae:
    """A VAE with random weights; an empty config is the full-size one."""
    return Vae(filled(build_vae(config), device, dtype))


class Case:
    """One model at one size, and the inputs of its step.

    Args:
        spec: the model.
        size: (width, height, frames) in pixels.
        device, dtype: of the network.
        attention: the kernel's name.
    """

    def __init__(
        self, spec: ModelSpec, size: tuple[int, int, int], device: torch.device, dtype: torch.dtype, attention: str
    ) -> None:
        self.spec, self.config, self.device, self.dtype, self.attention = spec, spec.transformers[0], device, dtype, attention
        width, height, frames = size
        self.tokens = spec.tokens(frames, height, width)
        generator = torch.Generator().manual_seed(1)
        shape = (1, *spec.geometry.latent_shape(frames, height, width))
        self.latent = torch.randn(shape, generator=generator).to(device)
        self.text = torch.randn(2, TEXT_ROWS, self.config.text_dim, generator=generator).to(device, dtype)
        self.time = torch.tensor(500.0, device=device)

    def step(self, network: WanTransformer, groups: RankGroups) -> Callable[[], Tensor]:
        """Both branches' velocities, as the engine computes them."""
        standing = SimpleNamespace(
            groups=groups,
            device=self.device,
            args=EngineConfig(),
            spec=self.spec,
            model_pool=[network],
            attn_backend=attention_kernel(self.attention, needs_lse=groups.plan.ring > 1),
            residency=SimpleNamespace(use=lambda name: None, stream_of=lambda name: None),
        )
        return lambda: forward.stacked_velocity(standing, self.latent, self.text, self.time, expert=0)  # type: ignore[arg-type]

    def formula(self, groups: RankGroups) -> Traffic:
        """Numbers that a rank sends in a step."""
        return traffic(
            groups.plan,
            tokens=self.tokens,
            dim=self.config.dim,
            blocks=self.config.num_layers,
            values=self.config.patch_values * self.config.out_channels,
            latent=self.latent.numel(),
        )


def bytes_sent(groups: RankGroups, work: Callable[[], object]) -> dict[str, int]:
    """Bytes that this rank sends while `work` runs, by axis."""
    counters = {name: Counting(vars(groups)[name]) for name in AXES}
    for name, counter in counters.items():
        setattr(groups, name, counter)
    work()
    for name, counter in counters.items():
        setattr(groups, name, counter.peers)
    return {name: counter.sent for name, counter in counters.items()}


def link_exchanges(groups: RankGroups, device: torch.device, sizes: Sequence[int]) -> Iterable[tuple[str, int, Work]]:
    """(kind, bytes that a rank sends, the exchange) for both ways in which blocks talk: `pass_on` and `swap`."""
    peers = groups.world
    for size in sizes:
        x = torch.zeros(size // 2, dtype=torch.bfloat16, device=device)
        y = torch.empty_like(x)
        each = size // 2 // (peers.size - 1)
        leaving = [x[:each]] * peers.size
        arriving = list(torch.empty(peers.size, each, dtype=x.dtype, device=device).unbind())
        yield "ring", size, lambda x=x, y=y: peers.pass_on([x], [y])()
        yield "swap", 2 * each * (peers.size - 1), lambda a=leaving, b=arriving: peers.swap(a, b)


class Elsewhere:
    """Peers whose exchanges take no time and bring nothing: what remains of a layout is its own work."""

    def __init__(self, size: int) -> None:
        self.size, self.index = size, 0

    def swap(self, leaving: Sequence[Tensor], arriving: Sequence[Tensor]) -> None:
        """Nothing travels."""


def kernels(
    case: Case, attention: Sequence[tuple[int, int]], rows: Sequence[tuple[int, int]]
) -> Iterable[tuple[dict[str, Any], Work]]:
    """(what, work) for every piece of which a forward on any layout is made.

    Args:
        case: the model and size.
        attention: (tokens, heads) that one kernel call sees.
        rows: (own tokens, ulysses degree) of a rank.
    """
    config, device, dtype = case.config, case.device, case.dtype
    plain, lse = attention_kernel(case.attention), attention_kernel(case.attention, needs_lse=True)
    for tokens, heads in attention:
        q, k, v = torch.randn(3, 1, tokens, heads, config.attention_head_dim, device=device).to(dtype).unbind()
        yield {"kind": "attention", "tokens": tokens, "heads": heads}, lambda q=q, k=k, v=v: plain(q, k, v)
        assert lse.run_with_lse is not None
        out, sums = lse.run_with_lse(q, k, v)
        yield {"kind": "attention_lse", "tokens": tokens, "heads": heads}, lambda q=q, k=k, v=v: lse.run_with_lse(q, k, v)
        yield (
            {"kind": "merge", "tokens": tokens, "heads": heads},
            lambda out=out, sums=sums: merge(out, sums, out, sums, out.dtype),
        )
    network = random_transformer(replace(config, num_layers=1), device, dtype)
    whole = network.embed(case.latent, case.time.reshape(1), case.text[:1])
    for own in sorted({own for own, _ in rows}, reverse=True):
        cos, sin = (part[:own] for part in whole.rope)
        part = replace(whole, tokens=whole.tokens[:, :own], rope=(cos, sin))
        # the self-attention gives its queries back: everything else of a block is in this
        yield {"kind": "rest", "tokens": own}, lambda part=part: network.run_blocks(part, attention=lambda q, k, v: q)
    for own, degree in rows:
        if degree > 1:
            heads = torch.randn(3, 1, own, config.num_attention_heads, config.attention_head_dim, device=device).to(dtype)
            pack = ulysses(lambda q, k, v: q.contiguous(), Elsewhere(degree), [own] * degree)  # type: ignore[arg-type]
            yield {"kind": "pack", "tokens": own, "ulysses": degree}, lambda x=heads, pack=pack: pack(*x.unbind())
    yield {"kind": "ends", "tokens": case.tokens}, lambda: ends(network, case)


def ends(network: WanTransformer, case: Case) -> Tensor:
    """A forward without blocks: embedding and head."""
    embedded = network.embed(case.latent, case.time.reshape(1), case.text[:1])
    return network.unpatchify(network.head(embedded.tokens, embedded.time), embedded.grid)


def traced(work: Callable[[], object]) -> dict[str, float]:
    """A profiler's trace of `work` on this rank's GPU, summed up by `overlap`."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        work()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(file))
        events = json.loads(file.read_text())["traceEvents"]
    return overlap(event for event in events if event.get("cat") == "kernel")


def overlap(kernel_events: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """How much of the communication ran beside computation, from a trace's kernels (`name`, `ts` and `dur` in us).

    Returns:
        seconds of communication kernels (each moment once), of computation, of both at once, of neither, and the share of
        the communication that was hidden.
    """
    talk: list[Span] = []
    compute: list[Span] = []
    for event in kernel_events:
        (talk if "nccl" in str(event["name"]).lower() else compute).append((event["ts"], event["ts"] + event["dur"]))
    talk, compute = _union(talk), _union(compute)
    talking, computing, whole = (_length(spans) for spans in (talk, compute, _union([*talk, *compute])))
    both = talking + computing - whole
    spans = _union([*talk, *compute])
    idle = spans[-1][1] - spans[0][0] - whole if spans else 0.0
    return {
        "communication": talking / 1e6,
        "computation": computing / 1e6,
        "both": both / 1e6,
        "neither": idle / 1e6,
        "hidden_share": both / talking if talking else 0.0,
    }


def _union(spans: Iterable[Span]) -> list[Span]:
    joined: list[Span] = []
    for start, end in sorted(spans):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((start, end))
    return joined


def _length(spans: Iterable[Span]) -> float:
    return sum(end - start for start, end in spans)
