"""torch's own fused CUDA kernels that also give the log-sum-exp, which ring attention needs.

`scaled_dot_product_attention` keeps the log-sum-exp to itself; the operators under it hand it out. cuDNN's and
FlashAttention-2's (arXiv:2307.08691) want 16 bits; the memory-efficient one also takes float32.
"""

import torch
from torch import Tensor

from chitu_diffusion.attention.kernels import AttentionKernel, math

_aten = torch.ops.aten
_SIXTEEN_BITS = (torch.float16, torch.bfloat16)


def _fused_with_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    if q.device.type != "cuda":
        assert math.run_with_lse is not None
        return math.run_with_lse(q, k, v)
    # torch wants [B, H, S, D]; the transposes are views
    heads_first = [x.transpose(1, 2) for x in (q, k, v)]
    if q.dtype in _SIXTEEN_BITS:
        out, lse = _aten._scaled_dot_product_flash_attention(*heads_first, 0.0, False, False)[:2]
    else:
        out, lse = _aten._scaled_dot_product_efficient_attention(*heads_first, None, True)[:2]
    # the memory-efficient kernel rounds the length of its lse up
    return out.transpose(1, 2), lse[:, :, : q.shape[1]].transpose(1, 2).float()


def _fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _fused_with_lse(q, k, v)[0]


fused = AttentionKernel("fused", exact=True, run=_fused, run_with_lse=_fused_with_lse)
