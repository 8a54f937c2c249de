"""An activation of the video decoder on its way between a convolution and the next norm. Knows tensors
alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor


@dataclass
class Sum:
    """An activation whose parts are not added up yet. Whoever adds them up `release`s them.

    Attributes:
        value: [T, H, W, C] of any strides but 1 in the channel; of `phased` sums [T, H/2 + 1, W/2 + 1, 4 C],
            see `phased_weight`.
        bias: [C], or None.
        residual: [T, H, W, C] of the sum's own pixels, or None.
        phased: pixel (y, x) lies at (y/2 + y%2, x/2 + x%2), in channels (2 (y%2) + x%2) C and on.
        window: (top, left, height, width) of a phased sum's pixels; the others are cut by narrowing.
    """

    value: Tensor
    bias: Tensor | None = None
    residual: Tensor | None = None
    phased: bool = False
    window: tuple[int, int, int, int] = (0, 0, 0, 0)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """[T, H, W, C] of the sum."""
        frames, height, width, channels = self.value.shape
        return (frames, *self.window[2:], channels // 4) if self.phased else (frames, height, width, channels)

    def cut(self, top: int, left: int, height: int, width: int) -> Sum:
        """A rectangle of it; nothing is copied."""
        residual = (
            None if self.residual is None else self.residual[:, top : top + height, left : left + width]
        )
        if self.phased:
            window = (self.window[0] + top, self.window[1] + left, height, width)
            return replace(self, residual=residual, window=window)
        return replace(self, value=self.value[:, top : top + height, left : left + width], residual=residual)

    def release(self) -> None:
        """Lets go of the parts, which callers may still hold."""
        self.value = self.value.new_empty(0)
        self.residual = None
