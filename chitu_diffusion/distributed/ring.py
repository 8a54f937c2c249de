"""Ring attention: keys and values travel round the ranks, queries stay (arXiv:2310.01889).

While a rank attends to the keys and values it holds, the next ones are already on their way. Partial results
are merged by their log-sum-exp in float32, so only kernels that give it can be used. A rank's traffic is 2 B
s d (P - 1) numbers. Tokens may be shared unevenly; nothing is padded.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from chitu_diffusion.attention.kernels import AttentionContext, AttentionFn, AttentionKernel
from chitu_diffusion.distributed.collectives import Collectives
from chitu_diffusion.errors import UsageError
from chitu_diffusion.ops.merge_lse import merge


def ring(kernel: AttentionKernel, group: Collectives, lengths: Sequence[int]) -> AttentionFn:
    """An attention over the tokens of a group of ranks.

    Args:
        kernel: attends to one peer's keys at a time.
        group: the ranks, in the order of its tokens.
        lengths: each peer's tokens.

    Returns:
        (q, k, v, where) -> out, all [B, lengths[own], H, D].

    Raises:
        UsageError: a kernel without the log-sum-exp, or one that looks at the whole sequence.
    """
    if group.size == 1:
        return kernel
    with_lse = kernel.run_with_lse
    if with_lse is None or not kernel.supports_ring:
        raise UsageError(
            f"attn_type = {kernel.name!r}: ring attention cannot use it, for {kernel.why_no_ring}; use "
            "'auto', or Ulysses alone",
            field="infer.attn_type",
        )

    size = group.size

    def attend(q: Tensor, k: Tensor, v: Tensor, where: AttentionContext) -> Tensor:
        held = [k.contiguous(), v.contiguous()]
        # replaced at the first hop
        out = q
        lse = q
        group.release_buffers()
        for hop in range(size):
            more = hop + 1 < size
            # the keys that began hop + 1 places behind each peer; a sequence after the other, for all come
            # from one sender
            came = [lengths[(p - hop - 1) % size] for p in range(size)]
            rows = [[q.shape[0] * came[p] * (s == (p - 1) % size) for s in range(size)] for p in range(size)]
            recv_buffers = [group.recv_buffer(rows, x.shape[2:], x) for x in held] if more else []
            # sent before the kernel is started, so that the copies get their share of the chip at once
            arrived = group.ring_shift([x.flatten(0, 1) for x in held], recv_buffers) if more else None
            part, part_lse = with_lse(q, held[0], held[1], where)
            if hop == 0:
                out = part
                lse = part_lse
            else:
                out, lse = merge(out, lse, part, part_lse, torch.float32 if more else q.dtype)
            if arrived is not None:
                arrived()
                held = [buffer.whole.unflatten(0, (q.shape[0], came[group.index])) for buffer in recv_buffers]
        return out

    return attend
