"""A forward taken apart, as the simulation puts it together again: the kernels of every shape that a layout
needs, a hop of the ring, and how much of a trace's communication was hidden.

Knows one rank's view; no clock and no results.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.measuring import Span, busy_ms, kernel_spans
from benchmarks.networks import Workload, random_transformer
from benchmarks.scaling.links import from_the_one_before
from benchmarks.scaling.ranks import Work
from chitu_diffusion.attention import AttentionContext, AttentionKernel
from chitu_diffusion.attention.kernels import NOWHERE
from chitu_diffusion.distributed.collectives import RecvBuffer
from chitu_diffusion.distributed.process_groups import ProcessGroups
from chitu_diffusion.distributed.ulysses import ulysses
from chitu_diffusion.models.wan.transformer import WanTransformer
from chitu_diffusion.ops.merge_lse import merge


def ring_hop(work: Workload, groups: ProcessGroups, kernel: AttentionKernel) -> dict[str, Work]:
    """A ring's hop taken apart: the kernel, the transfer of the next keys and values, and both at once."""
    peers = groups.ring
    with_lse = kernel.run_with_lse
    assert with_lse is not None
    own = work.case.tokens // peers.size
    q, k, v = heads_of(work, own)
    rows = from_the_one_before(own, peers.size)

    def transfer() -> Callable[[], None]:
        peers.release_buffers()
        return peers.ring_shift([k[0], v[0]], [peers.recv_buffer(rows, x.shape[2:], x) for x in (k, v)])

    def both() -> None:
        wait = transfer()
        with_lse(q, k, v)
        wait()

    return {"attention": lambda: with_lse(q, k, v), "transfer": lambda: transfer()(), "both": both}


def heads_of(work: Workload, tokens: int, heads: int | None = None) -> tuple[Tensor, ...]:
    """Random q, k and v, [1, S, H, D] each."""
    config = work.case.config
    shape = (3, 1, tokens, heads or config.num_attention_heads, config.attention_head_dim)
    return torch.randn(shape, device=work.device).to(work.dtype).unbind()


class Elsewhere:
    """Collectives that take no time and bring nothing: what remains of a layout is its own work."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.index = 0

    def recv_buffer(self, rows: Sequence[Sequence[int]], shape: Sequence[int], like: Tensor) -> RecvBuffer:
        """New memory."""
        return RecvBuffer.new(rows[self.index], shape, like)

    def release_buffers(self) -> None:
        """Nobody writes."""

    def all_to_all(self, leaving: Sequence[Tensor], recv_buffer: RecvBuffer) -> Callable[[], None]:
        """Nothing travels."""
        return lambda: None


def pieces(
    work: Workload,
    attention: Sequence[tuple[int, int]],
    rows: Sequence[tuple[int, int]],
    plain: AttentionKernel,
    with_lse: AttentionKernel,
) -> Iterable[tuple[dict[str, Any], Work]]:
    """(what, call) for every piece of which a forward on any layout is made.

    Args:
        work: the model and size.
        attention: (tokens, heads) that one kernel call sees.
        rows: (own tokens, ulysses degree) of a rank.
        plain, with_lse: the kernels of one rank and of a ring.
    """
    lse = with_lse.run_with_lse
    assert lse is not None
    for tokens, heads in attention:
        q, k, v = heads_of(work, tokens, heads)
        shape = {"tokens": tokens, "heads": heads}
        yield {"kind": "attention", **shape}, partial(plain, q, k, v)
        out, sums = lse(q, k, v)
        yield {"kind": "attention_lse", **shape}, partial(lse, q, k, v)
        yield {"kind": "merge", **shape}, partial(merge, out, sums, out, sums, out.dtype)
    network = random_transformer(replace(work.case.config, num_layers=1), work.device, work.dtype)
    text = network.make_text_kv(work.text[:1])
    whole = network.embed(work.latent, text, work.timestep)
    for own in sorted({own for own, _ in rows}, reverse=True):
        part = whole.of_tokens(0, own)
        # the self-attention gives its queries back: everything else of a block is in this
        rest = partial(network.run_blocks, part, attention=lambda q, k, v, where: q)
        yield {"kind": "rest", "tokens": own}, rest
    for own, degree in rows:
        if degree > 1:
            pack = ulysses(_nothing, Elsewhere(degree), [own] * degree)  # type: ignore[arg-type]
            what = {"kind": "pack", "tokens": own, "ulysses": degree}
            yield what, partial(pack, *heads_of(work, own), NOWHERE)
    yield {"kind": "ends", "tokens": work.case.tokens}, lambda: ends(network, work, text)


def _nothing(q: Tensor, k: Tensor, v: Tensor, where: AttentionContext) -> Tensor:
    """An attention that takes no time and gives a result as kernels lay it out."""
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


def ends(network: WanTransformer, work: Workload, text: Any) -> Tensor:
    """A forward without blocks: embedding and head."""
    embedded = network.embed(work.latent, text, work.timestep)
    return network.unpatchify(network.final_layer(embedded.tokens, embedded.time), embedded.grid)


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


def traced(work: Work, device: torch.device) -> dict[str, float]:
    """A profiler's trace of `work` on this rank's GPU, summed up by `hidden_share`."""
    return hidden_share(kernel_spans(work, device))


def hidden_share(spans: Iterable[Span]) -> dict[str, float]:
    """How much of the communication ran beside computation.

    Communication is NCCL's kernels and copies from GPU to GPU; a stream that waits for a copy from elsewhere
    is neither.

    Returns:
        seconds of communication (each moment once), of computation, of both at once, of neither, and the
        share of the communication that was hidden.
    """
    everything = list(spans)
    talk = [span for span in everything if is_talk(span)]
    compute = [span for span in everything if not is_talk(span)]
    talking, computing, whole = (busy_ms(part) / 1e3 for part in (talk, compute, everything))
    both = talking + computing - whole
    idle = 0.0
    if everything:
        first = min(span.start for span in everything)
        last = max(span.end for span in everything)
        idle = (last - first) / 1e6 - whole
    return {
        "communication": talking,
        "computation": computing,
        "both": both,
        "neither": idle,
        "hidden_share": both / talking if talking else 0.0,
    }


def is_talk(span: Span) -> bool:
    """Whether it is communication."""
    return "nccl" in span.name or "PtoP" in span.name
