"""Which attention a run uses: names to kernels. Knows tensors' kernels, not models or requests."""

import torch

from chitu_diffusion.attention.fa3 import fa3
from chitu_diffusion.attention.flash import cudnn, flash, fused
from chitu_diffusion.attention.fp8 import fa3_fp8
from chitu_diffusion.attention.kernels import AttentionFn, AttentionKernel, math, sdpa
from chitu_diffusion.attention.sage import sage
from chitu_diffusion.errors import UsageError, nearest

__all__ = [
    "KERNELS",
    "AttentionFn",
    "AttentionKernel",
    "attention_kernel",
    "candidates",
    "fused",
    "math",
    "sdpa",
]

KERNELS: dict[str, AttentionKernel] = {
    kernel.name: kernel for kernel in (fa3, cudnn, flash, sdpa, fused, math, fa3_fp8, sage)
}
"""Every kernel, the fastest exact ones first."""
_FIELD = "infer.attn_type"


def candidates(
    device: torch.device,
    dtype: torch.dtype | None = None,
    head_dim: int | None = None,
    *,
    needs_lse: bool = False,
) -> list[AttentionKernel]:
    """What "auto" may take there: the exact kernels that contend for being the fastest, or else the first
    that runs.

    Args:
        device, dtype, head_dim: of q, k and v; None is not asked.
        needs_lse: whether they must give the log-sum-exp, as ring attention needs.
    """
    able = [
        kernel
        for kernel in KERNELS.values()
        if kernel.exact
        and (kernel.gives_lse or not needs_lse)
        and kernel.why_unavailable(device, dtype, head_dim) is None
    ]
    return [kernel for kernel in able if kernel.autotuned] or able[:1]


def attention_kernel(
    name: str = "auto",
    *,
    needs_lse: bool = False,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
    head_dim: int | None = None,
) -> AttentionKernel:
    """The kernel called `name`; "auto" is an exact one, never a lossy one (`autotune` finds the fastest for a
    shape).

    Args:
        name: of `KERNELS`, or "auto".
        needs_lse: whether it must give the log-sum-exp, as ring attention needs.
        device: where it is to run; None is the CPU for "auto" and not asked for a name.
        dtype, head_dim: of q, k and v; None is not asked.

    Raises:
        UsageError: no kernel has that name; names the nearest. Or it does not give the log-sum-exp, or cannot
            run there.
    """
    if name == "auto":
        return candidates(device or torch.device("cpu"), dtype, head_dim, needs_lse=needs_lse)[0]
    if name not in KERNELS:
        raise UsageError(
            f"attn_type = {name!r}: no such kernel.{nearest(name, ['auto', *KERNELS])}", field=_FIELD
        )
    kernel = KERNELS[name]
    if needs_lse and not kernel.gives_lse:
        able = ", ".join(["auto", *(each.name for each in KERNELS.values() if each.gives_lse)])
        raise UsageError(
            f"attn_type = {name!r}: ring attention needs a kernel that gives the log-sum-exp; {able} would "
            "do",
            field=_FIELD,
        )
    why = None if device is None else kernel.why_unavailable(device, dtype, head_dim)
    if why is not None:
        assert device is not None
        here = [
            each.name for each in KERNELS.values() if each.why_unavailable(device, dtype, head_dim) is None
        ]
        here = [each for each in here if KERNELS[each].gives_lse or not needs_lse]
        raise UsageError(f"attn_type = {name!r}: {why}. Here: {', '.join(['auto', *here])}", field=_FIELD)
    return kernel
