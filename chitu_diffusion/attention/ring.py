"""Ring attention: keys and values travel round the ranks, queries stay (arXiv:2310.01889).

While a rank attends to the keys and values it holds, the next ones are already on their way. Partial results are merged
by their log-sum-exp in float32, so only kernels that give it can be used. A rank's traffic is 2 B s d (P - 1) numbers.
Tokens may be shared unevenly; nothing is padded.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from chitu_diffusion.attention.kernels import AttentionFn, AttentionKernel
from chitu_diffusion.attention.peers import Peers
from chitu_diffusion.errors import UsageError


def ring(kernel: AttentionKernel, peers: Peers, lengths: Sequence[int]) -> AttentionFn:
    """An attention over the tokens of all peers.

    Args:
        kernel: attends to one peer's keys at a time.
        peers: the group, in the order of its tokens.
        lengths: each peer's tokens.

    Returns:
        (q, k, v) -> out, all [B, lengths[own], H, D].

    Raises:
        UsageError: a kernel without the log-sum-exp.
    """
    if peers.size == 1:
        return kernel
    with_lse = kernel.run_with_lse
    if with_lse is None:
        raise UsageError(
            f"attn_type = {kernel.name!r}: ring attention merges by the log-sum-exp, which this kernel does not give; "
            "'auto', or ulysses alone, would do",
            field="infer.attn_type",
        )

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        held = torch.stack([k, v])  # [2, B, s, H, D]
        out: Tensor | None = None
        lse: Tensor | None = None
        for hop in range(peers.size):
            arrived = None
            if hop + 1 < peers.size:
                coming = lengths[(peers.index - hop - 1) % peers.size]
                arrived = peers.pass_on(held, held.new_empty(2, q.shape[0], coming, *q.shape[2:]))
            part, part_lse = with_lse(q, held[0], held[1])
            out, lse = (part.float(), part_lse) if out is None or lse is None else merge(out, lse, part, part_lse)
            if arrived is not None:
                held = arrived()
        assert out is not None
        return out.to(q.dtype)

    return attend


def merge(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two sets of keys, from the attention over each; out [B, S, H, D] and lse [B, S, H] float32."""
    both = torch.logaddexp(lse, part_lse)
    return out * (lse - both).exp()[..., None] + part.float() * (part_lse - both).exp()[..., None], both
