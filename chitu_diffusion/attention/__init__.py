"""Which attention a run uses: names to kernels. Knows tensors' kernels, not models or requests."""

import torch

from chitu_diffusion.attention.fa3 import fa3
from chitu_diffusion.attention.flash import cudnn, flash, fused
from chitu_diffusion.attention.fp8 import fa3_fp8
from chitu_diffusion.attention.kernels import AttentionContext, AttentionFn, AttentionKernel, math, sdpa
from chitu_diffusion.attention.sage import sage
from chitu_diffusion.errors import UsageError, nearest

__all__ = [
    "KERNELS",
    "AttentionContext",
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
_SETTING = "infer.attn_type"


def candidates(
    device: torch.device,
    dtype: torch.dtype | None = None,
    head_dim: int | None = None,
    *,
    for_ring: bool = False,
) -> list[AttentionKernel]:
    """What "auto" may take there: the exact kernels that contend for being the fastest, or else the first
    that runs.

    Args:
        device, dtype, head_dim: of q, k and v; None is not asked.
        for_ring: whether ring attention must be able to use them.
    """
    able = [
        kernel
        for kernel in KERNELS.values()
        if kernel.exact
        and (kernel.supports_ring or not for_ring)
        and kernel.why_unavailable(device, dtype, head_dim) is None
    ]
    return [kernel for kernel in able if kernel.autotuned] or able[:1]


def attention_kernel(
    name: str = "auto",
    *,
    for_ring: bool = False,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
    head_dim: int | None = None,
    setting: str = _SETTING,
) -> AttentionKernel:
    """The kernel called `name`; "auto" is an exact one, never a lossy one (`autotune` finds the fastest for a
    shape).

    Args:
        name: of `KERNELS`, or "auto".
        for_ring: whether ring attention must be able to use it.
        device: where it is to run; None is the CPU for "auto" and not asked for a name.
        dtype, head_dim: of q, k and v; None is not asked.
        setting: that names it, for error messages.

    Raises:
        UsageError: no kernel has that name; names the nearest. Or ring attention cannot use it, or it cannot
            run there.
    """
    if name == "auto":
        return candidates(device or torch.device("cpu"), dtype, head_dim, for_ring=for_ring)[0]
    label = setting.rpartition(".")[2]
    others = ["auto"] if setting == _SETTING else []
    if name not in KERNELS:
        raise UsageError(
            f"{label} = {name!r}: no such kernel.{nearest(name, [*others, *KERNELS])}", field=setting
        )
    kernel = KERNELS[name]
    why = kernel.why_no_ring if for_ring else None
    if why is not None:
        able = ", ".join([*others, *(each.name for each in KERNELS.values() if each.supports_ring)])
        raise UsageError(
            f"{label} = {name!r}: ring attention cannot use it, for {why}; use {able}, or Ulysses alone",
            field=setting,
        )
    why = None if device is None else kernel.why_unavailable(device, dtype, head_dim)
    if why is not None:
        assert device is not None
        here = [
            each.name
            for each in KERNELS.values()
            if each.why_unavailable(device, dtype, head_dim) is None and (each.supports_ring or not for_ring)
        ]
        raise UsageError(f"{label} = {name!r}: {why}. Here: {', '.join([*others, *here])}", field=setting)
    return kernel
