"""Which attention a run uses: names to kernels. Knows tensors' kernels, not models or requests."""

from chitu_diffusion.attention.flash import fused
from chitu_diffusion.attention.kernels import AttentionFn, AttentionKernel, math, sdpa
from chitu_diffusion.errors import UsageError, nearest

__all__ = ["KERNELS", "AttentionFn", "AttentionKernel", "attention_kernel", "fused", "math", "sdpa"]

KERNELS: dict[str, AttentionKernel] = {kernel.name: kernel for kernel in (sdpa, math, fused)}


def attention_kernel(name: str = "auto", *, needs_lse: bool = False) -> AttentionKernel:
    """The kernel called `name`; "auto" is the fastest exact one, never a lossy one.

    Args:
        name: of `KERNELS`, or "auto".
        needs_lse: whether it must give the log-sum-exp, as ring attention needs.

    Raises:
        UsageError: no kernel has that name; names the nearest. Or it does not give the log-sum-exp.
    """
    if name == "auto":
        return fused if needs_lse else sdpa
    if name not in KERNELS:
        raise UsageError(f"attn_type = {name!r}: no such kernel.{nearest(name, ['auto', *KERNELS])}", field="attn_type")
    kernel = KERNELS[name]
    if needs_lse and not kernel.gives_lse:
        able = ", ".join(["auto", *(each.name for each in KERNELS.values() if each.gives_lse)])
        raise UsageError(
            f"attn_type = {name!r}: ring attention needs a kernel that gives the log-sum-exp; {able} would do", field="attn_type"
        )
    return kernel
