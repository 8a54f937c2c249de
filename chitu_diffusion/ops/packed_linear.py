"""Linear layers whose weights stay in the blocks of a GGUF file, and are unpacked each time they multiply.

A block is 32 or 256 numbers of 4 to 8 bits with their scales: 4.5 bits a weight (Q4_K), 5.5 (Q5_K), 6.6
(Q6_K) or 8.5 (Q8_0), where 16 bits are the usual. What is unpacked are the very numbers that the `gguf`
package computes, rounded once to the dtype of the product, so that a packed network and one that was unpacked
while it was loaded give the same bits. On a GPU a Triton kernel does it, elsewhere plain torch. One weight at
a time is there in full.

Knows linear layers and blocks; no files, and not which network, step or setting.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chitu_diffusion.ops.custom_op import operator
from chitu_diffusion.ops.merge_lse import has_triton

BLOCKS = MappingProxyType({"Q8_0": (32, 34), "Q4_K": (256, 144), "Q5_K": (256, 176), "Q6_K": (256, 210)})
"""Packings that can be kept: the numbers of a block, and its bytes."""
_AT_ONCE = 1 << 12
"""Blocks that plain torch unpacks at once, which bounds what it needs beside the result."""


class PackedLinear(nn.Linear):
    """A linear layer with its weight in packed blocks.

    Takes over the parameters of `linear`; `packed_weights` puts the blocks in place of the weight that is
    read.

    Attributes:
        packing: of `BLOCKS`.
        weight_packed: [bytes] uint8.
        weight: None; after `widen` [out, in], which counts then.
    """

    weight_packed: Tensor

    def __init__(self, linear: nn.Linear, packing: str) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.weight = linear.weight
        self.bias = linear.bias
        self.packing = packing
        # not in the state dict: checkpoints hold `weight`
        self.register_buffer("weight_packed", None, persistent=False)

    def unpacked(self, dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
        """The weight [out, in] that was packed, on a device; None: where the blocks are."""
        rows = unpack(self.weight_packed.to(device), self.packing, dtype)
        return rows.view(self.out_features, self.in_features)

    def wide(self, dtype: torch.dtype) -> Tensor:
        """The weight [out, in] that counts."""
        weight = self._parameters["weight"]
        return self.unpacked(dtype) if weight is None else weight

    def widen(self, weight: Tensor | None) -> None:
        """From now on multiply with a weight [out, in]; None: with the blocks, which have stayed."""
        self.register_parameter(
            "weight", None if weight is None else nn.Parameter(weight, requires_grad=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out], in x's dtype."""
        return F.linear(x, self.wide(x.dtype), self.bias)

    def forget_values(self) -> None:
        """On the meta device: as many bytes as the blocks will have."""
        count, size = BLOCKS[self.packing]
        blocks = self.in_features * self.out_features // count
        self.weight_packed = torch.empty(blocks * size, dtype=torch.uint8, device="meta")
        self.register_parameter("weight", None)


def pack_layers(blocks: nn.Module, packings: Mapping[str, str]) -> list[PackedLinear]:
    """Puts `PackedLinear` in the place of plain linear layers whose weights come in blocks that can be kept.

    Args:
        blocks: a network, or a part of it, on the meta device.
        packings: packing of each weight, by its name in `blocks`.
    """
    layers = []
    for name, module in list(blocks.named_modules()):
        packing = packings.get(f"{name}.weight")
        if type(module) is nn.Linear and packing in BLOCKS:
            owner, _, leaf = name.rpartition(".")
            layers.append(PackedLinear(module, cast(str, packing)))
            setattr(blocks.get_submodule(owner), leaf, layers[-1])
    return layers


def packed_weights(network: nn.Module) -> Callable[[str, Tensor], Mapping[str, Tensor]]:
    """A transform for `weights.loader.load_into` that puts blocks where packed layers keep them."""

    def transform(name: str, tensor: Tensor) -> Mapping[str, Tensor]:
        owner, _, leaf = name.rpartition(".")
        is_packed = leaf == "weight" and isinstance(network.get_submodule(owner), PackedLinear)
        return {f"{owner}.weight_packed": tensor} if is_packed else {name: tensor}

    return transform


def names_of(network: nn.Module, layers: Iterable[PackedLinear]) -> set[str]:
    """The names of the layers' weights in a network."""
    wanted = set(layers)
    return {f"{name}.weight" for name, module in network.named_modules() if module in wanted}


def wide_weight(layer: nn.Linear, dtype: torch.dtype) -> Tensor | None:
    """The weight [out, in] of a linear layer for a product in `dtype`; None where it has none in full."""
    return layer.wide(dtype) if isinstance(layer, PackedLinear) else layer._parameters["weight"]


@operator("chitu_diffusion::unpack")
def unpack(packed: Tensor, packing: str, dtype: torch.dtype) -> Tensor:
    """The numbers of packed blocks, [numbers] in `dtype`, each rounded once from float32.

    Args:
        packed: [bytes] uint8, contiguous.
        packing: of `BLOCKS`.
    """
    count, size = BLOCKS[packing]
    if packed.is_cuda and has_triton():
        from chitu_diffusion.ops.unpack_triton import unpack_fused

        return unpack_fused(packed, packing, count, size, dtype)
    blocks = packed.view(-1, size)
    out = torch.empty(len(blocks), count, dtype=dtype, device=packed.device)
    for start in range(0, len(blocks), _AT_ONCE):
        out[start : start + _AT_ONCE] = _PLAIN[packing](blocks[start : start + _AT_ONCE])
    return out.view(-1)


@unpack.register_fake
def _(packed: Tensor, packing: str, dtype: torch.dtype) -> Tensor:
    count, size = BLOCKS[packing]
    return packed.new_empty(packed.shape[0] // size * count, dtype=dtype)


def _half(two_bytes: Tensor) -> Tensor:
    """[n, 2] uint8 -> [n, 1] float32."""
    return two_bytes.contiguous().view(torch.float16).float()


def _unpack_q8_0(blocks: Tensor) -> Tensor:
    """[n, 34]: a scale, 32 numbers of 8 bits."""
    return blocks[:, 2:].contiguous().view(torch.int8).float() * _half(blocks[:, :2])


def _nibbles(data: Tensor) -> Tensor:
    """[n, 128] uint8 -> [n, 8, 32]: of each 32 bytes the low halves, then the high ones."""
    groups = data.view(-1, 4, 1, 32)
    return torch.cat([groups & 15, groups >> 4], dim=2).view(-1, 8, 32)


def _scales(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and minimum of the 8 groups of Q4_K and Q5_K, each [n, 8, 1] float32: two halves, and 12 bytes
    that hold 16 numbers of 6 bits.
    """
    first, second, rest = blocks[:, 4:16].split(4, dim=1)
    scale = torch.cat([first & 63, (rest & 15) | ((first >> 2) & 48)], dim=1)
    least = torch.cat([second & 63, (rest >> 4) | ((second >> 2) & 48)], dim=1)
    return (
        (_half(blocks[:, :2]) * scale.float())[..., None],
        (_half(blocks[:, 2:4]) * least.float())[..., None],
    )


def _unpack_q4_k(blocks: Tensor) -> Tensor:
    """[n, 144]: scales, 256 numbers of 4 bits."""
    scale, least = _scales(blocks)
    return (scale * _nibbles(blocks[:, 16:].contiguous()).float() - least).flatten(1)


def _unpack_q5_k(blocks: Tensor) -> Tensor:
    """[n, 176]: scales, the fifth bits of 256 numbers (bit g of byte j is number j's of group g), the other
    four.
    """
    scale, least = _scales(blocks)
    group = torch.arange(8, dtype=torch.uint8, device=blocks.device).view(8, 1)
    fifth = (blocks[:, None, 16:48] >> group) & 1
    numbers = _nibbles(blocks[:, 48:].contiguous()) | (fifth << 4)
    return (scale * numbers.float() - least).flatten(1)


def _unpack_q6_k(blocks: Tensor) -> Tensor:
    """[n, 210]: low four bits of 256 numbers, their high two, 16 scales of 8 bits, a scale of these."""
    low = blocks[:, :128].reshape(-1, 2, 1, 64)
    low = torch.cat([low & 15, low >> 4], dim=2).view(-1, 8, 32)
    shift = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=blocks.device).view(4, 1)
    high = ((blocks[:, 128:192].reshape(-1, 2, 1, 32) >> shift) & 3).view(-1, 8, 32)
    numbers = (low | (high << 4)).view(-1, 16, 16).float() - 32
    scale = blocks[:, 192:208].contiguous().view(torch.int8).float() * _half(blocks[:, 208:])
    return (scale[..., None] * numbers).flatten(1)


_PLAIN: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {"Q8_0": _unpack_q8_0, "Q4_K": _unpack_q4_k, "Q5_K": _unpack_q5_k, "Q6_K": _unpack_q6_k}
)
