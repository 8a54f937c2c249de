"""Looks in on a training: quick samples of held-out prompts in every manner, scored by the shipped judge.

Far quicker than `chitu eval adherence`, which is the figure that counts: batches, and the training's own
forward.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from chitu_diffusion.evaluation.judge import CLASSES, load_judge, name_parts
from chitu_diffusion.evaluation.prompts import MANNERS, Words, asked_in
from training import autoencoder, denoiser, latents, text
from training.autoencoder import WholeClip
from training.denoiser import Nets
from training.sampling import asked, guided, levels, plain
from training.world import draw, specs_for

SHAPE = (128, 128, 33)
STRIP = (0, 8, 16, 24, 32)
"""Frames that a strip shows."""
DECODED_AT_ONCE = 16


@dataclass(frozen=True)
class Looker:
    """What looking in takes.

    Attributes:
        tokenizer, vae: as the training's.
        mean, deviation: of the latent's channels, [1, 16, 1, 1, 1].
        folder: where strips are written.
        prompts, seeds: how many of each.
        steps: of the guided solver.
        distilled: noise levels of a model that is run without guidance; None: guided.
    """

    tokenizer: PreTrainedTokenizerFast
    vae: nn.Module
    mean: Tensor
    deviation: Tensor
    folder: Path
    prompts: int = 64
    seeds: int = 2
    steps: int = 24
    distilled: tuple[float, ...] | None = None

    @torch.no_grad()
    def look(self, nets: Nets, name: str, manners: tuple[str, ...] = MANNERS) -> dict[str, str]:
        """Scores in each manner, printed as they come; strips of samples: `folder/{name}-{manner}.png`."""
        judge = load_judge().to(self.mean.device)
        scores: dict[str, str] = {}
        for manner in manners:
            rows = asked_in(manner, self.prompts) * self.seeds
            words = [each for _, _, each in rows]
            drawn = self._pictures(words) if manner == "picture" else None
            parts = []
            for start in range(0, len(rows), 64):
                piece = rows[start : start + 64]
                first = None if drawn is None else drawn[start : start + 64]
                parts.append(self._sample(nets, piece, first, seed=start))
            video = torch.cat(parts)
            found = [
                each
                for part in video.split(DECODED_AT_ONCE)
                for each in name_parts(judge, part.transpose(1, 2).float() / 2 + 0.5)
            ]
            scores[manner] = _shares(words, found)
            if drawn is not None:
                error = (video[:, :, 0].float() - drawn.float()).div(2).square().mean(dim=(1, 2, 3))
                dbs = -10 * error.log10()
                scores[manner] += f", first frame {float(dbs.mean()):.1f} dB, worst {float(dbs.min()):.1f}"
            print(f"{name}, {manner}: {scores[manner]}", flush=True)
            _strip(video[:8], self.folder / f"{name}-{manner}.png")
        return scores

    def _sample(
        self, nets: Nets, rows: list[tuple[str, str, Words]], first: Tensor | None, seed: int
    ) -> Tensor:
        device = self.mean.device
        ids = text.tokenize(self.tokenizer, [prompt for prompt, _, _ in rows]).to(device)
        free = text.tokenize(self.tokenizer, [negative for _, negative, _ in rows]).to(device)
        latent = None if first is None else self._first_latents(first)
        known = None if first is None else torch.ones(len(rows), dtype=torch.bool, device=device)
        wanted = asked(nets, ids, latent, known)
        height, width, frames = SHAPE
        size = (len(rows), 16, (frames - 1) // 4 + 1, height // 8, width // 8)
        noise = torch.randn(size, generator=torch.Generator().manual_seed(seed + 3)).to(device)
        if self.distilled is None:
            x = guided(nets, wanted, asked(nets, free), noise, levels(self.steps))[-1]
        else:
            x = plain(nets, wanted, noise, self.distilled)
        net = WholeClip(self.vae)
        parts = (x * self.deviation + self.mean).split(DECODED_AT_ONCE)
        return torch.cat([net.decode(part).clamp(-1, 1).to(torch.float16) for part in parts])

    def _pictures(self, words: list[Words]) -> Tensor:
        """First frames [B, 3, H, W] of drawn clips of these words, as 8-bit pictures hold them."""
        specs = specs_for(words, torch.Generator().manual_seed(17))
        height, width, frames = SHAPE
        device = self.mean.device
        first = [
            draw(specs[i : i + 16], height, width, frames, device)[:, :, 0] for i in range(0, len(specs), 16)
        ]
        return torch.cat(first).add(1).mul(127.5).round().div(127.5).sub(1)

    def _first_latents(self, pictures: Tensor) -> Tensor:
        """[B, 16, h, w], normalised."""
        mean, _ = WholeClip(self.vae).encode(pictures[:, :, None])
        return ((mean - self.mean) / self.deviation)[:, :, 0]


def look(folder: Path, device: torch.device, prompts: int) -> None:
    """Prints the scores of a run's averaged networks, in every manner."""
    nets, tokenizer = denoiser.start(folder, device)
    vae = autoencoder.load(folder, device)
    kept = latents.load_statistics(folder)
    if kept is None:
        raise FileNotFoundError(f"{folder} holds no statistics.pt; run the stage 'dit' first")
    mean, deviation = (value.view(1, -1, 1, 1, 1).to(device) for value in kept)
    Looker(tokenizer, vae, mean, deviation, folder, prompts).look(nets, "dit")


def _shares(asked_for: list[Words], found: list[Words]) -> str:
    rows = [(asdict(a), asdict(b)) for a, b in zip(asked_for, found, strict=True)]
    return ", ".join(f"{part} {sum(a[part] == b[part] for a, b in rows) / len(rows):.1%}" for part in CLASSES)


def _strip(video: Tensor, path: Path) -> None:
    """Clips [B, 3, T, H, W] below each other, five frames of each side by side."""
    rows = [torch.cat([clip[:, t] for t in STRIP], dim=-1) for clip in video]
    whole = torch.cat(rows, dim=-2).float().add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)
    Image.fromarray(whole.permute(1, 2, 0).cpu().numpy()).save(path)
