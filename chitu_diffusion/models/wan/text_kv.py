"""A text as a network's blocks see it: what depends on the prompt alone, computed once and used by every
step.

Per network these are the projected rows and, for each block, the keys and values of its cross-attention. They
belong to whoever runs a task, never to the network, so that tasks can take turns on one network. Knows rows
and blocks; no prompt, guidance or task.

Padding. Wan pads every prompt to 512 rows, and the padding takes part in the attention: n equal rows. Only
one of them is projected and kept. How it counts n times depends on the kernel: where the scores take a bias
of log n in float32 (a CPU's kernel, and the fused one of `attention.cross_attention_triton`), the attention
runs over the few rows that differ. Flash kernels on a GPU (cuDNN, FlashAttention-3) take no bias, and those
that do cost more than 512 keys against 512 without; there the kept row is copied n times on the way into the
attention, 10 MB a block at 14B, which is nothing beside a block. Either equals the padded text within
rounding, and whoever asks for the keys says which, at every forward.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor


class TextKV(NamedTuple):
    """What one block's cross-attention looks at.

    Attributes:
        k, v: [B, L, heads, head_dim]; k is normalised. Their dtype is the one in which the block multiplies.
        bias: [B, L] or [1, L] float32, added to the scores, or None. Log n makes a row weigh as much as n
            equal ones.
        image_k, image_v: the same of an image's rows, which are attended to by themselves; None: no image.
    """

    k: Tensor
    v: Tensor
    bias: Tensor | None = None
    image_k: Tensor | None = None
    image_v: Tensor | None = None


@dataclass(eq=False)
class TextKVCache:
    """A text under one network.

    Attributes:
        rows: [B, L, dim], projected text, in the dtype in which the blocks multiply.
        positions: how many rows the text stands for; where more than L, the rest are equal to the last row.
        bias: see `TextKV`; where positions are more than L it says the same as copies of the last row
            would.
        keep: whether a block's keys stay for the next forward. They hold for as long as the network's weights
            and the autocast setting do.
        image: [1 or B, I, dim], projected rows of an image, for a network that takes them.
        image_of: another text under the same network, whose image this one has, too, and whose keys of it.
    """

    rows: Tensor
    positions: int
    bias: Tensor | None = None
    keep: bool = False
    image: Tensor | None = None
    image_of: TextKVCache | None = None
    _kept: dict[int, tuple[Tensor, ...]] = field(default_factory=dict, repr=False)
    _kept_image: dict[int, tuple[Tensor, ...]] = field(default_factory=dict, repr=False)

    def keys(self, block: int, make: Callable[..., tuple[Tensor, ...]], weighted: bool = False) -> TextKV:
        """The keys of a block, made when they are first asked for: that is when a streamed block's weights
        are there.

        Args:
            block: its index.
            make: rows [B, L, dim] and, where there are any, an image's -> k, v, each [B, L, heads,
                head_dim], and the image's.
            weighted: whether the attention takes a bias; else rows that stand for many are copied.
        """
        known = self.image_of or self
        text = self._kept.get(block, ())
        image = known._kept_image.get(block, ())
        if not text:
            made = make(self.rows, *(() if known.image is None or image else (known.image,)))
            text = made[:2]
            image = image or made[2:]
            if self.keep:
                self._kept[block] = text
                known._kept_image[block] = image
        k, v = text
        image = tuple(each.expand(len(k), -1, -1, -1).contiguous() for each in image)
        missing = self.positions - k.shape[1]
        if not missing or (weighted and self.bias is not None):
            return TextKV(k, v, self.bias, *image)
        k, v = (torch.cat([x, x[:, -1:].expand(-1, missing, -1, -1)], dim=1) for x in (k, v))
        return TextKV(k, v, None, *image)

    @property
    def bytes(self) -> int:
        """Memory held, on the network's device: 2 x dim x L numbers a block and branch. At 14B in bfloat16
        0.8 MiB a row, so some 25 MiB for a prompt of 30 tokens and 100 MiB for Wan's negative prompt, where
        512 rows would be 400 MiB."""
        kept = [tensor for made in (*self._kept.values(), *self._kept_image.values()) for tensor in made]
        rows = [self.rows] if self.image is None else [self.rows, self.image]
        return sum(tensor.numel() * tensor.element_size() for tensor in [*rows, *kept])


def rows_that_differ(text: Tensor) -> int:
    """How many leading rows of a padded text [B, N, D] say everything: the last of them and all behind it are
    equal.

    Reads the text once; on a GPU that waits for the device.
    """
    # [N - 1], row equals the one before it, in every branch
    same = (text[:, 1:] == text[:, :-1]).all(dim=-1).all(dim=0)
    behind = same.flip(0).int().cumprod(0).sum()  # length of the run of equal rows at the end
    return int(text.shape[1] - behind)


def dedup_padding(text: Tensor, rows: int | None = None) -> tuple[Tensor, int, Tensor | None]:
    """The rows of a padded text [B, N, D] that differ, how many they stand for, and their bias (see the
    file's top).

    Args:
        rows: of `rows_that_differ`, where it is known.

    Returns:
        text [B, rows, D], N, bias [1, rows] float32 or None.
    """
    rows = rows_that_differ(text) if rows is None else rows
    positions = text.shape[1]
    if rows == positions:
        return text, positions, None
    bias = torch.zeros(1, rows, device=text.device)
    # not a copy from the CPU, which would wait for the device
    bias[:, -1].fill_(math.log(positions - rows + 1))
    return text[:, :rows], positions, bias
