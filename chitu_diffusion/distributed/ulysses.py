"""Ulysses: ranks trade heads for tokens around an attention (DeepSpeed Ulysses, arXiv:2309.14509).

Each rank comes with its tokens and all heads, attends with all the group's tokens and its share of the heads,
and leaves with its tokens and all heads. Two exchanges a call: q, k and v packed into one, and the output;
each tensor is copied once on either side, and what a rank keeps for itself does not travel. Large exchanges
go in two pieces, half of the heads each, so that one travels while the other is computed. A rank's traffic is
4 B s d (P - 1) / P numbers, s its tokens and d all heads' channels. Tokens may be shared unevenly; nothing is
padded.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from chitu_diffusion.attention.kernels import AttentionContext, AttentionFn
from chitu_diffusion.distributed.collectives import Collectives
from chitu_diffusion.errors import UsageError
from chitu_diffusion.ops.pack_qkv import pack

_WORTH_TWO_PIECES = 8 * 2**20


def pieces_for(heads: int, sent: float) -> int:
    """In how many pieces a rank's heads of one sequence go: two where the first exchange is so large that
    hiding half of it is worth more than a call more.

    Args:
        heads: of one rank.
        sent: bytes that a rank with the longest shard sends with q, k and v of a sequence.
    """
    return 2 if heads > 1 and sent >= _WORTH_TWO_PIECES else 1


def ulysses(
    inner: AttentionFn, group: Collectives, lengths: Sequence[int], pieces: int | None = None
) -> AttentionFn:
    """An attention over the tokens of a group of ranks.

    Args:
        inner: attends with [B, sum(lengths), heads of a piece, D], and is told where as we are.
        group: the ranks, in the order of its tokens.
        lengths: each peer's tokens.
        pieces: a rank's heads are attended to in so many calls, at most one a head, for each sequence of the
            batch; while one is computed, the next one's q, k and v arrive and the last one's output leaves.
            One takes all sequences at once. None leaves it to `pieces_for`.

    Returns:
        (q, k, v, where) -> out, all [B, lengths[own], H, D].

    Raises:
        UsageError: when called with heads that the group does not divide.
    """
    if group.size == 1:
        return inner
    rows = list(lengths)
    index = group.index

    def attend(q: Tensor, k: Tensor, v: Tensor, where: AttentionContext) -> Tensor:
        batch, own, heads, channels = q.shape
        if heads % group.size:
            raise UsageError(
                f"{heads} heads cannot be shared by {group.size} ranks",
                field="infer.diffusion.ulysses_degree",
            )
        share = heads // group.size
        # the longest shard, not ours: all ranks must decide alike
        sent = 3 * max(rows) * (heads - share) * channels * q.element_size()
        number = pieces or pieces_for(share, sent)
        sequences = [slice(0, batch)] if number == 1 else [slice(row, row + 1) for row in range(batch)]
        coming = []
        returning = []
        group.release_buffers()
        for some in sequences:
            first = 0
            for width in shard_heads(share, number):
                # of everybody's tokens, our heads
                here = group.recv_buffer([rows] * group.size, (3, q[some].shape[0], width, channels), q)
                leaving = q.new_empty(group.size, own, *here.whole.shape[1:])
                # what stays is written where it will be read
                pack(q[some], k[some], v[some], leaving, here.parts[index], index, share, first)
                coming.append((some, here.whole, group.all_to_all(leaving.unbind(), here)))
                first += width
        for some, here_all, arrived in coming:
            arrived()
            all_q, all_k, all_v = (part.transpose(0, 1) for part in here_all.unbind(1))
            out = inner(all_q, all_k, all_v, where)  # [B, S, h, D]
            homeward = out.transpose(0, 1).contiguous().split(rows)
            # of our tokens, everybody's heads
            back = group.recv_buffer(
                [[theirs] * group.size for theirs in rows], homeward[index].shape[1:], out
            )
            returned = group.all_to_all(homeward, back)
            back.parts[index] = homeward[index]
            returning.append((some, back.parts, returned))
        whole = q.new_empty(q.shape)
        for some in sequences:
            _in_order([(parts, returned) for of, parts, returned in returning if of == some], whole[some])
        return whole

    return attend


def _in_order(pieces: Sequence[tuple[Sequence[Tensor], Callable[[], None]]], out: Tensor) -> None:
    """Once they are here, each piece's parts [s, B, h, D] by peer -> out [B, s, H, D], heads in order."""
    for _, arrived in pieces:
        arrived()
    ranks = range(len(pieces[0][0]))
    torch.cat([parts[peer].transpose(0, 1) for peer in ranks for parts, _ in pieces], dim=2, out=out)


def shard_heads(heads: int, pieces: int) -> list[int]:
    """Heads of each piece, as even as can be; no more pieces than heads."""
    pieces = min(heads, pieces)
    return [heads // pieces + (piece < heads % pieces) for piece in range(pieces)]
