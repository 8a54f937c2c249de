"""Ring attention: keys and values travel round the ranks, queries stay (arXiv:2310.01889).

While a rank attends to the keys and values it holds, the next ones are already on their way. Partial results are merged
by their log-sum-exp in float32, so only kernels that give it can be used. A rank's traffic is 2 B s d (P - 1) numbers.
Tokens may be shared unevenly; nothing is padded.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, float32

from chitu_diffusion.attention.kernels import AttentionFn, AttentionKernel, AttentionWithLse
from chitu_diffusion.attention.merge import merge
from chitu_diffusion.attention.peers import Peers
from chitu_diffusion.attention.turns import Attend
from chitu_diffusion.errors import UsageError


def ring(kernel: AttentionKernel, peers: Peers, lengths: Sequence[int]) -> AttentionFn:
    """An attention over the tokens of all peers.

    Args:
        kernel: attends to one peer's keys at a time.
        peers: the group, in the order of its tokens.
        lengths: each peer's tokens.

    Returns:
        (q, k, v) -> out, all [B, lengths[own], H, D]; a `Ring`, or the kernel itself where there is one peer.

    Raises:
        UsageError: a kernel without the log-sum-exp.
    """
    if peers.size == 1:
        return kernel
    if kernel.run_with_lse is None:
        raise UsageError(
            f"attn_type = {kernel.name!r}: ring attention merges by the log-sum-exp, which this kernel does not give; "
            "'auto', or ulysses alone, would do",
            field="infer.attn_type",
        )
    return Ring(kernel.run_with_lse, peers, tuple(lengths))


@dataclass(frozen=True)
class Ring:
    """See `ring`; `begin` as in `attention.turns`."""

    kernel: AttentionWithLse
    peers: Peers
    lengths: tuple[int, ...]

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.begin(q, k, v)()()

    def begin(self, q: Tensor, k: Tensor, v: Tensor) -> Attend:
        """The first keys and values are on their way when this returns."""
        held = [k.contiguous(), v.contiguous()]
        arriving, arrived = self._pass_on(held, 0)

        def attend() -> Callable[[], Tensor]:
            nonlocal held, arriving, arrived
            out, lse = self.kernel(q, held[0], held[1])
            for hop in range(1, self.peers.size):
                arrived()
                held = arriving
                more = hop + 1 < self.peers.size
                if more:
                    # sent before the kernel is started, so that the copies get their share of the chip at once
                    arriving, arrived = self._pass_on(held, hop)
                part, part_lse = self.kernel(q, held[0], held[1])
                out, lse = merge(out, lse, part, part_lse, float32 if more else q.dtype)
            return lambda: out

        return attend

    def _pass_on(self, held: Sequence[Tensor], hop: int) -> tuple[list[Tensor], Callable[[], None]]:
        shape = held[0].shape
        coming = (shape[0], self.lengths[(self.peers.index - hop - 1) % self.peers.size], *shape[2:])
        arriving = [x.new_empty(coming) for x in held]
        return arriving, self.peers.pass_on(held, arriving)
