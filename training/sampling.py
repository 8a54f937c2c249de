"""Plain sampling with the training's forward: for looking in on a training, and for teaching a student."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from training import text
from training.denoiser import Nets

SHIFT = 3.0


@dataclass(frozen=True)
class Asked:
    """What a batch of samples is of.

    Attributes:
        words, bias: [B, L, D] and [B, L] of `text.encode`.
        first: [B, 16, H, W], the first latent frame where it is known, normalised; None: it is known of none.
        known: [B] bool, of which clips.
    """

    words: Tensor
    bias: Tensor
    first: Tensor | None = None
    known: Tensor | None = None

    def put(self, x: Tensor) -> Tensor:
        """Latents [B, 16, T, H, W] with the known frames in their place."""
        if self.first is None or self.known is None:
            return x
        x = x.clone()
        x[:, :, 0] = torch.where(self.known[:, None, None, None], self.first, x[:, :, 0])
        return x

    def velocity(self, nets: Nets, x: Tensor, s: float) -> Tensor:
        """Of latents with the known frames in their place, at one noise level; these frames do not move."""
        time = torch.full((len(x),), s * 1000.0, device=x.device)
        first = time if self.known is None else torch.where(self.known, 0.0, time)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
            found = nets.velocity(x, self.words, self.bias, time, first)
        if self.known is not None:
            found[:, :, 0] = torch.where(self.known[:, None, None, None], 0.0, found[:, :, 0])
        return found

    def beside(self, other: Asked) -> Asked:
        """This and another of as many clips, one behind the other; the pictures are this one's."""
        twice = {
            name: None if value is None else torch.cat([value, value])
            for name, value in (("first", self.first), ("known", self.known))
        }
        return Asked(torch.cat([self.words, other.words]), torch.cat([self.bias, other.bias]), **twice)


@torch.no_grad()
def asked(nets: Nets, ids: Tensor, first: Tensor | None = None, known: Tensor | None = None) -> Asked:
    """From captions ids [B, L]."""
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=ids.is_cuda):
        words, bias = text.encode(nets.encoder, ids)
    return Asked(words, bias, first, known)


def levels(steps: int) -> list[float]:
    """Noise levels from 1 to 0 of so many steps, shifted as the model's are."""
    line = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    return (SHIFT * line / (1 + (SHIFT - 1) * line)).tolist()


@torch.no_grad()
def guided(
    nets: Nets,
    wanted: Asked,
    unwanted: Asked,
    noise: Tensor,
    line: Sequence[float],
    guidance: float = 5.0,
    keep: Sequence[float] = (),
) -> list[Tensor]:
    """Latents [B, 16, T, H, W] at the noise levels `keep`, which are among `line`, and at its end.

    Second order (Adams and Bashforth's, with steps of any length), so that 24 steps do for 50.
    """
    both = wanted.beside(unwanted)
    x = wanted.put(noise)
    kept = [x] if line[0] in keep else []
    before: tuple[Tensor, float] | None = None
    for s, following in zip(line[:-1], line[1:], strict=True):
        cond, free = both.velocity(nets, torch.cat([x, x]), s).chunk(2)
        v = free + guidance * (cond - free)
        step = following - s
        turned = v if before is None else v + 0.5 * step / before[1] * (v - before[0])
        x = x + step * turned
        before = (v, step)
        if following in keep:
            kept.append(x)
    return [*kept, x]


@torch.no_grad()
def plain(nets: Nets, wanted: Asked, noise: Tensor, line: Sequence[float]) -> Tensor:
    """Euler steps without guidance, as a distilled model is run."""
    x = wanted.put(noise)
    for s, following in zip(line[:-1], line[1:], strict=True):
        x = x + (following - s) * wanted.velocity(nets, x, s)
    return x
