"""Which attention a run uses: names to kernels. Knows tensors' kernels, not models or requests."""

from chitu_diffusion.attention.kernels import AttentionFn, AttentionKernel, math, sdpa
from chitu_diffusion.errors import UsageError, nearest

__all__ = ["KERNELS", "AttentionFn", "AttentionKernel", "attention_kernel", "math", "sdpa"]

KERNELS: dict[str, AttentionKernel] = {kernel.name: kernel for kernel in (sdpa, math)}


def attention_kernel(name: str = "auto") -> AttentionKernel:
    """The kernel called `name`; "auto" is the fastest exact one, never a lossy one.

    Raises:
        UsageError: no kernel has that name; names the nearest.
    """
    if name == "auto":
        return sdpa
    if name not in KERNELS:
        raise UsageError(f"attn_type = {name!r}: no such kernel.{nearest(name, ['auto', *KERNELS])}", field="attn_type")
    return KERNELS[name]
