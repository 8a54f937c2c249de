"""What runs through the blocks of a Wan transformer beside its weights: the streams, the text and the times
that they are told, and what guidance branches have in common. Knows no block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from chitu_diffusion.models.wan.positions import Grid, RotaryTable
from chitu_diffusion.models.wan.text_kv import TextKVCache
from chitu_diffusion.models.wan.token_times import TimeRows


@dataclass(eq=False)
class SharedCfgPrefix:
    """The stream after the first block's self-attention, for guidance branches of one latent at one time.

    Up to the first cross-attention nothing depends on the text: the branches' tokens are equal, and one
    computation does for all. That saves one self-attention in 2 x blocks, exactly.

    Attributes:
        copies: branches along the batch of this forward: row b of branch i is row i * B + b of B * copies.
        attended: [B, S, dim], kept for the next forward where each branch has its own and they are handed one
            object.
    """

    copies: int = 1
    attended: Tensor | None = None

    def get(
        self, tokens: Tensor, modulation: TimeRows, attend: Callable[[Tensor, TimeRows], Tensor]
    ) -> Tensor:
        """The stream [copies * B, S, dim]; `attend` takes one branch's rows of tokens and modulation."""
        if self.copies > 1:
            one = modulation.of_branch(self.copies)
            return attend(tokens[: len(tokens) // self.copies], one).repeat(self.copies, 1, 1)
        if self.attended is None:
            self.attended = attend(tokens, modulation)
        return self.attended


@dataclass(frozen=True)
class BlockInputs:
    """What `embed` hands to the blocks and the head.

    Tokens run frame by frame, row by row; `of_tokens` gives a part of the sequence.

    Attributes:
        tokens: [B, S, dim], the residual stream.
        text: of B rows; of `make_text_kv`.
        time: [B, R, dim] or, where the batch has one time, [1, R, dim]: the time embedding, for the head.
        modulation: [B or 1, R, 6, dim], its projection, for the blocks.
        rope: rotary cosines and sines of these tokens' positions.
        grid: tokens along frames, rows, columns of the whole latent.
        step, num_steps: of the task, for the attention (`AttentionContext`); None where nobody knows.
        start: where branches of one latent share the first block's self-attention; None where nothing is
            known to be equal.
        control: [B, S, dim], the control stream before its first block; None: no hints are added.
        control_scale: of the hints, for all or for each block of that stream.
    """

    tokens: Tensor
    text: TextKVCache
    time: TimeRows
    modulation: TimeRows
    rope: RotaryTable
    grid: Grid
    step: int | None = None
    num_steps: int | None = None
    start: SharedCfgPrefix | None = None
    control: Tensor | None = None
    control_scale: float | tuple[float, ...] = 1.0

    def of_tokens(self, low: int, high: int) -> BlockInputs:
        """A part of the sequence."""
        cos, sin = (part[low:high] for part in self.rope)
        return replace(
            self,
            tokens=self.tokens[:, low:high],
            control=None if self.control is None else self.control[:, low:high],
            rope=(cos, sin),
            time=self.time.of_tokens(low, high),
            modulation=self.modulation.of_tokens(low, high),
        )
