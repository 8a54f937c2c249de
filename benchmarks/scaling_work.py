"""What a scaling run measures: networks with random weights, their steps, kernels, links, and traces of what
overlapped.

Random weights are drawn on each rank from the same seed. A step is that of
`chitu_diffusion.pipelines.denoising`. Knows one rank's view; no clock and no results.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from random import Random
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

if find_spec("ftfy") is None:
    # mends prompts; none is read here, and not every test machine has it
    sys.modules["ftfy"] = ModuleType("ftfy")

from benchmarks.comm_volume import Counting, Traffic, traffic
from chitu_diffusion.attention import AttentionKernel, attention_kernel
from chitu_diffusion.backend import DiffusionBackend
from chitu_diffusion.config import load_config
from chitu_diffusion.distributed.collectives import Collectives, RecvBuffer
from chitu_diffusion.distributed.process_groups import ProcessGroups
from chitu_diffusion.distributed.ulysses import ulysses
from chitu_diffusion.models.components import Networks
from chitu_diffusion.models.spec import ModelSpec
from chitu_diffusion.models.wan.config import WanConfig
from chitu_diffusion.models.wan.text_encoder import TextEncoder, build_text_encoder
from chitu_diffusion.models.wan.transformer import KEEP_FLOAT32, WanTransformer
from chitu_diffusion.models.wan.vae import WanVAE, build_vae
from chitu_diffusion.ops.merge_lse import merge
from chitu_diffusion.pipelines import denoising

TEXT_ROWS = 512
SHARED = 1
"""Self-attentions that two branches of one latent have in common: the first."""
SCHEDULER = {
    "_class_name": "UniPCMultistepScheduler",
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
    "flow_shift": 3.0,
    "num_train_timesteps": 1000,
}
AXES = ("ulysses", "ring", "sequence", "branches")
Span = tuple[float, float]
Work = Callable[[], object]


def filled(
    module: nn.Module, device: torch.device, dtype: torch.dtype, keep: Sequence[str] = (), seed: int = 0
) -> nn.Module:
    """A network on the meta device, with random weights on `device`: N(0, 1 / fan-in), norms 1, biases 0.

    Args:
        module: on the meta device.
        device, dtype: where and as what.
        keep: parts of parameter names that stay float32.
        seed: the same seed gives the same weights on the same kind of device.
    """
    for name, parameter in module.named_parameters():
        if not any(part in name for part in keep):
            parameter.data = parameter.data.to(dtype)
    module.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(seed)
    for name, parameter in module.named_parameters():
        if parameter.ndim > 1 and "gamma" not in name:
            parameter.data.normal_(generator=generator).mul_(max(parameter[0].numel(), 1) ** -0.5)
        else:
            parameter.data.fill_(0.0 if name.endswith("bias") else 1.0)
    return module.eval().requires_grad_(False)


def random_transformer(
    config: WanConfig, device: torch.device, dtype: torch.dtype, seed: int = 0
) -> WanTransformer:
    """A transformer with random weights."""
    with torch.device("meta"):
        network = WanTransformer(config)
    filled(network, device, dtype, KEEP_FLOAT32, seed)
    return network


def random_vae(config: Mapping[str, Any], device: torch.device, dtype: torch.dtype) -> WanVAE:
    """A VAE with random weights; an empty config is the full-size one."""
    return WanVAE(filled(build_vae(config), device, dtype))


class Case:
    """One model at one size, and the inputs of its step.

    Args:
        spec: the model.
        size: (width, height, frames) in pixels.
        device, dtype: of the network.
        settings: dotted names of the engine's settings and their values, as text.
    """

    def __init__(
        self,
        spec: ModelSpec,
        size: tuple[int, int, int],
        device: torch.device,
        dtype: torch.dtype,
        settings: Mapping[str, str],
    ) -> None:
        self.spec, self.config, self.device, self.dtype = spec, spec.transformers[0], device, dtype
        kind = {torch.float32: "float32", torch.bfloat16: "bfloat16"}[dtype]
        self.args, _ = load_config(None, {"infer.device": str(device), "infer.dtype": kind, **settings}, {})
        width, height, frames = size
        self.tokens = spec.tokens(frames, height, width)
        generator = torch.Generator().manual_seed(1)
        shape = (1, *spec.geometry.latent_shape(frames, height, width))
        self.latent = torch.randn(shape, generator=generator).to(device)
        text = torch.randn(2, TEXT_ROWS, self.config.text_dim, generator=generator)
        # of a prompt and of a negative one; zeros behind, as an encoder gives them
        for branch, rows in enumerate((40, 130)):
            text[branch, rows:] = 0
        self.text = text.to(device, dtype)
        self.time = torch.tensor(500.0)

    def backend(self, network: WanTransformer, groups: ProcessGroups) -> DiffusionBackend:
        """The engine's own backend; of text encoder and VAE it has the shapes alone."""
        encoder = TextEncoder(build_text_encoder({}), tokenizer=None)  # type: ignore[arg-type]
        networks = Networks(
            self.spec, [network] * len(self.spec.transformers), encoder, WanVAE(build_vae({})), SCHEDULER
        )
        return DiffusionBackend.from_networks(networks, self.args, groups)

    def step(self, backend: DiffusionBackend) -> Callable[[], Tensor]:
        """Both branches' velocities, as the engine computes them."""
        text = denoising.TaskText(self.text)
        return lambda: denoising.predict_velocity(backend, self.latent, text, self.time, expert=0)

    def kernel(self, name: str, needs_lse: bool) -> AttentionKernel:
        """A kernel by name, or the first that this device offers."""
        place = {"device": self.device, "dtype": self.dtype, "head_dim": self.config.attention_head_dim}
        asked = {key: value for key, value in place.items() if key in signature(attention_kernel).parameters}
        return attention_kernel(name, needs_lse=needs_lse, **asked)

    def formula(self, groups: ProcessGroups) -> Traffic:
        """Numbers that a rank sends in a step."""
        return traffic(
            groups.plan,
            tokens=self.tokens,
            dim=self.config.dim,
            blocks=self.config.num_layers,
            values=self.config.patch_values * self.config.out_channels,
            latent=self.latent.numel(),
            shared=SHARED,
        )


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
            setattr(groups, name, counter.peers)


def beside(case: Case, groups: ProcessGroups, kernel: AttentionKernel) -> dict[str, Work]:
    """A ring's hop taken apart: the kernel, the transfer of the next keys and values, and both at once."""
    peers, config, with_lse = groups.ring, case.config, kernel.run_with_lse
    assert with_lse is not None
    own = case.tokens // peers.size
    q, k, v = torch.randn(
        3, 1, own, config.num_attention_heads, config.attention_head_dim, device=case.device
    ).to(case.dtype)
    rows = from_the_one_before(own, peers.size)

    def transfer() -> Callable[[], None]:
        peers.release_buffers()
        return peers.ring_shift([k[0], v[0]], [peers.recv_buffer(rows, x.shape[2:], x) for x in (k, v)])

    def both() -> None:
        wait = transfer()
        with_lse(q, k, v)
        wait()

    return {"attention": lambda: with_lse(q, k, v), "transfer": lambda: transfer()(), "both": both}


def from_the_one_before(rows: int, size: int) -> list[list[int]]:
    """A table for `Collectives.recv_buffer`: each of `size` peers gets so many rows from the one before."""
    return [[rows * (sender == (peer - 1) % size) for sender in range(size)] for peer in range(size)]


def link_exchanges(
    groups: ProcessGroups, device: torch.device, sizes: Sequence[int]
) -> Iterable[tuple[str, int, Work]]:
    """(kind, bytes that a rank sends, the exchange) for both ways in which blocks talk: `ring_shift` and
    `all_to_all`.
    """
    peers = groups.ulysses
    for size in sizes:
        x = torch.zeros(size // 2, dtype=torch.bfloat16, device=device)
        each = size // 2 // (peers.size - 1)

        def ring(x: Tensor = x) -> None:
            peers.release_buffers()
            peers.ring_shift([x], [peers.recv_buffer(from_the_one_before(len(x), peers.size), (), x)])()

        def all_to_all(x: Tensor = x, each: int = each) -> None:
            peers.release_buffers()
            peers.all_to_all(
                [x[:each]] * peers.size, peers.recv_buffer([[each] * peers.size] * peers.size, (), x)
            )()

        yield "ring", size, ring
        yield "all_to_all", 2 * each * (peers.size - 1), all_to_all


def wrong_arrivals(peers: Collectives, device: torch.device, rounds: int = 40) -> dict[str, int]:
    """Random parts sent round, several exchanges under way at once, ranks and readers late at random: how
    many came, and how many were not what the other rank had drawn."""
    common, own = Random(1), Random(peers.index)
    parts = wrong = 0

    def drawn(token: int, rows: int) -> Tensor:
        generator = torch.Generator(device).manual_seed(token)
        return torch.randint(-99, 99, (rows, 3, 8), generator=generator, device=device, dtype=torch.int32)

    def late() -> None:
        if device.type == "cuda":
            torch.cuda._sleep(own.randrange(1_000_000))  # cycles

    for turn in range(rounds):
        peers.release_buffers()
        under_way = []
        for _ in range(common.randrange(1, 4)):
            longest, before = common.choice((50, 5_000, 200_000)), (peers.index - 1) % peers.size
            rows = [[common.randrange(1, longest) for _ in range(peers.size)] for _ in range(peers.size)]
            token = common.randrange(1 << 30)
            if turn % 2:  # only to the next
                rows = [
                    [n * (s == (p - 1) % peers.size) for s, n in enumerate(of)] for p, of in enumerate(rows)
                ]
            late()
            recv_buffer = peers.recv_buffer(rows, (3, 8), torch.empty(0, dtype=torch.int32, device=device))
            leaving = [drawn(token + peers.index * 8 + to, rows[to][peers.index]) for to in range(peers.size)]
            if turn % 2:
                wait = peers.ring_shift([leaving[(peers.index + 1) % peers.size]], [recv_buffer])
            else:
                wait = peers.all_to_all(leaving, recv_buffer)
            sizes = [x.shape for x in leaving]
            del leaving  # what is given out anew must not be what still travels
            overwritten = [torch.full(size, 7, dtype=torch.int32, device=device) for size in sizes]
            del overwritten
            sources = [before] if turn % 2 else [p for p in range(peers.size) if p != peers.index]
            under_way.append(
                (recv_buffer, wait, {s: (token + s * 8 + peers.index, rows[peers.index][s]) for s in sources})
            )
        for recv_buffer, wait, expected in under_way:
            wait()
            late()
            for source, (seed, length) in expected.items():
                parts, wrong = (
                    parts + 1,
                    wrong + (not torch.equal(recv_buffer.parts[source], drawn(seed, length))),
                )
    return {"parts": parts, "wrong": wrong}


class Elsewhere:
    """Collectives that take no time and bring nothing: what remains of a layout is its own work."""

    def __init__(self, size: int) -> None:
        self.size, self.index = size, 0

    def recv_buffer(self, rows: Sequence[Sequence[int]], shape: Sequence[int], like: Tensor) -> RecvBuffer:
        """New memory."""
        return RecvBuffer.new(rows[self.index], shape, like)

    def release_buffers(self) -> None:
        """Nobody writes."""

    def all_to_all(self, leaving: Sequence[Tensor], recv_buffer: RecvBuffer) -> Callable[[], None]:
        """Nothing travels."""
        return lambda: None


def kernels(
    case: Case,
    attention: Sequence[tuple[int, int]],
    rows: Sequence[tuple[int, int]],
    plain: AttentionKernel,
    with_lse: AttentionKernel,
) -> Iterable[tuple[dict[str, Any], Work]]:
    """(what, work) for every piece of which a forward on any layout is made.

    Args:
        case: the model and size.
        attention: (tokens, heads) that one kernel call sees.
        rows: (own tokens, ulysses degree) of a rank.
        plain, with_lse: the kernels of one rank and of a ring.
    """
    config, device, dtype, lse = case.config, case.device, case.dtype, with_lse.run_with_lse
    assert lse is not None
    for tokens, heads in attention:
        q, k, v = (
            torch.randn(3, 1, tokens, heads, config.attention_head_dim, device=device).to(dtype).unbind()
        )
        yield {"kind": "attention", "tokens": tokens, "heads": heads}, lambda q=q, k=k, v=v: plain(q, k, v)
        out, sums = lse(q, k, v)
        yield {"kind": "attention_lse", "tokens": tokens, "heads": heads}, lambda q=q, k=k, v=v: lse(q, k, v)
        yield (
            {"kind": "merge", "tokens": tokens, "heads": heads},
            lambda out=out, sums=sums: merge(out, sums, out, sums, out.dtype),
        )
    network = random_transformer(replace(config, num_layers=1), device, dtype)
    text = network.make_text_kv(case.text[:1])
    whole = network.embed(case.latent, case.time.reshape(1).to(device), text)
    for own in sorted({own for own, _ in rows}, reverse=True):
        cos, sin = (part[:own] for part in whole.rope)
        part = replace(whole, tokens=whole.tokens[:, :own], rope=(cos, sin))
        # the self-attention gives its queries back: everything else of a block is in this
        yield (
            {"kind": "rest", "tokens": own},
            lambda part=part: network.run_blocks(part, attention=lambda q, k, v: q),
        )
    for own, degree in rows:
        if degree > 1:
            heads = torch.randn(
                3, 1, own, config.num_attention_heads, config.attention_head_dim, device=device
            ).to(dtype)
            pack = ulysses(_nothing, Elsewhere(degree), [own] * degree)  # type: ignore[arg-type]
            yield (
                {"kind": "pack", "tokens": own, "ulysses": degree},
                lambda x=heads, pack=pack: pack(*x.unbind()),
            )
    yield {"kind": "ends", "tokens": case.tokens}, lambda: ends(network, case, text)


def without_host(work: Work, times: int) -> Work | None:
    """So many calls of `work` as one CUDA graph, which a GPU runs through without the host; None where it
    cannot be recorded.
    """
    try:
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            work()
        torch.cuda.current_stream().wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(times):
                work()
    except RuntimeError as error:
        print(f"no graph: {str(error).splitlines()[0]}", file=sys.stderr, flush=True)
        return None
    return graph.replay


def _nothing(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """An attention that takes no time and gives a result as kernels lay it out."""
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


def ends(network: WanTransformer, case: Case, text: Any) -> Tensor:
    """A forward without blocks: embedding and head."""
    embedded = network.embed(case.latent, torch.full((1,), 500.0, device=case.device), text)
    return network.unpatchify(network.final_layer(embedded.tokens, embedded.time), embedded.grid)


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
    return overlap(event for event in events if event.get("cat") in ("kernel", "gpu_memcpy"))


def overlap(kernel_events: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """How much of the communication ran beside computation, from a trace's kernels and copies (`name`, `ts`
    and `dur` in us).

    Communication is NCCL's kernels and copies from GPU to GPU; a stream that waits for a copy from elsewhere
    is neither.

    Returns:
        seconds of communication (each moment once), of computation, of both at once, of neither, and the
        share of the communication that was hidden.
    """
    talk: list[Span] = []
    compute: list[Span] = []
    for event in kernel_events:
        name = str(event["name"])
        (talk if "nccl" in name or "PtoP" in name else compute).append(
            (event["ts"], event["ts"] + event["dur"])
        )
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
