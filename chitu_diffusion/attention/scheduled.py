"""One kernel for a task's first steps, another from some step on.

The error of early steps decides what a video becomes, for every later step builds on it: a kernel that rounds
or leaves out does the least harm late. Knows two kernels and a rule; which ones and from where on is told by
whoever reads the settings.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from chitu_diffusion.attention.kernels import AttentionContext, AttentionKernel


def scheduled(
    before: AttentionKernel, late: AttentionKernel, begins: Callable[[int | None], int | None]
) -> AttentionKernel:
    """`before` up to some step of a task, `late` from it on; `before` where the step is not known.

    Args:
        begins: number of a task's steps (None: not known) -> how many of them are `before`'s; None: all.
    """

    def at(where: AttentionContext) -> AttentionKernel:
        first = begins(where.num_steps)
        return before if where.step is None or first is None or where.step < first else late

    def run(q: Tensor, k: Tensor, v: Tensor, where: AttentionContext) -> Tensor:
        return at(where).run(q, k, v, where)

    def run_with_lse(q: Tensor, k: Tensor, v: Tensor, where: AttentionContext) -> tuple[Tensor, Tensor]:
        attend = at(where).run_with_lse
        assert attend is not None
        return attend(q, k, v, where)

    gives_lse = before.run_with_lse is not None and late.run_with_lse is not None
    return AttentionKernel(
        f"{before.name}, late {late.name}",
        exact=before.exact and late.exact,
        run=run,
        run_with_lse=run_with_lse if gives_lse else None,
        whole_sequence=before.whole_sequence or late.whole_sequence,
    )
