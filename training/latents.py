"""Drawn clips through the autoencoder, kept on the device for the diffusion transformer to read many times.

A bucket holds clips of one size. Every clip has several captions of its own, already tokenised.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from training.autoencoder import WholeClip, channels_last
from training.clips import Shape, drawn, drawn_pairs
from training.clock import Clock, Every
from training.text import tokenize
from training.world import WorldSpecs, pair_caption, rich_caption

CAPTIONS = 6
PAIR_EVERY = 6
"""One batch in so many shows two actors."""
NOTHING_SAID = -100
"""In place of a part's number, where a caption tells of two clips in one: the loss passes over it."""
Shapes = dict[Shape, float]
SHAPES: Shapes = {(128, 128, 33): 0.70, (96, 160, 33): 0.10, (160, 96, 33): 0.10, (128, 128, 17): 0.10}
"""(height, width, frames) -> share of the training steps."""
ONE_SHAPE: Shapes = {(128, 128, 33): 1.0}
"""For a short run: the default size alone, which also halves the compilation."""


@dataclass
class Bucket:
    """Clips of one size.

    latents: [N, 16, T, H, W] bfloat16, the means of the encoder, not normalised. Drawing from the encoder's
        distribution instead would ask the transformer to predict noise: channels that the autoencoder does
        not use are nothing else.
    spread: [N, 16] float32, the encoder's variance, averaged over each clip.
    ids: [N, CAPTIONS, L] int16.
    parts: [N, 4] int64: the numbers of actor, colour, scene and motion, or `NOTHING_SAID`.
    """

    latents: Tensor
    spread: Tensor
    ids: Tensor
    parts: Tensor


def encode_batch(
    net: WholeClip, tokenizer: PreTrainedTokenizerFast, video: Tensor, captions: list[str], parts: Tensor
) -> Bucket:
    """Latents and captions of drawn clips [B, 3, T, H, W]: `CAPTIONS` of each, clip by clip."""
    device = video.device
    video = video.contiguous(memory_format=torch.channels_last_3d)
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        mean, log_variance = net.encode(video)
    ids = tokenize(tokenizer, captions).unflatten(0, (len(video), CAPTIONS))
    spread = log_variance.exp().mean(dim=(2, 3, 4))
    return Bucket(mean.bfloat16(), spread, ids.to(device), parts.to(device))


Source = Iterator[tuple[Tensor, list[str], Tensor]]


def told(
    shape: Shape,
    batch: int,
    generator: torch.Generator,
    rng: random.Random,
    device: torch.device,
    style: Callable[[Tensor], Tensor] | None = None,
) -> Source:
    """Endless (video, captions, parts) of one size, as `encode_batch` takes them; no pairs in a `style`."""
    singles = drawn(shape, batch, "train", generator, device, style)
    pairs = drawn_pairs(shape, batch, generator, device)
    for number in itertools.count(1):
        if number % PAIR_EVERY == 0 and style is None:
            video, first, second = next(pairs)
            both = zip(first.words(), second.words(), strict=True)
            captions = [pair_caption(*words, rng) for words in both for _ in range(CAPTIONS)]
            yield video, captions, torch.full((batch, 4), NOTHING_SAID)
        else:
            video, specs = next(singles)
            captions = [rich_caption(words, rng) for words in specs.words() for _ in range(CAPTIONS)]
            yield video, captions, parts_of(specs)


def parts_of(specs: WorldSpecs) -> Tensor:
    """[B, 4]: the numbers of actor, colour, scene and motion."""
    return torch.stack([specs.actor, specs.colour, specs.scene, specs.motion], dim=1)


def fill(
    vae: AutoencoderKLWan,
    tokenizer: PreTrainedTokenizerFast,
    shapes: Shapes,
    minutes: float,
    device: torch.device,
    batch: int,
    seed: int,
    style: Callable[[Tensor], Tensor] | None = None,
) -> dict[Shape, Bucket]:
    """Encode clips of every size until the minutes are over."""
    net = WholeClip(channels_last(vae), fuse=device.type == "cuda")
    generator = torch.Generator().manual_seed(seed)
    rng = random.Random(seed)
    sources = {shape: told(shape, batch, generator, rng, device, style) for shape in shapes}
    parts: dict[Shape, list[Bucket]] = {shape: [] for shape in shapes}
    clock = Clock(minutes)
    report = Every(10)
    done = 0
    while not clock.over or not all(parts.values()):
        # the size that is furthest behind its share
        shape = min(shapes, key=lambda s: len(parts[s]) / shapes[s])
        parts[shape].append(encode_batch(net, tokenizer, *next(sources[shape])))
        done += batch
        if report():
            print(f"latents {done} clips {clock.spent:.0f}s", flush=True)
    print(f"latents: {done} clips in {clock.spent:.0f}s", flush=True)
    return {shape: Bucket(*map(torch.cat, zip(*map(fields, ps), strict=True))) for shape, ps in parts.items()}


def fields(bucket: Bucket) -> tuple[Tensor, ...]:
    """A bucket's tensors, in its own order."""
    return bucket.latents, bucket.spread, bucket.ids, bucket.parts


def statistics(bucket: Bucket) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each latent channel as the encoder draws it, [16] float32: its spread belongs to
    it.

    Without the spread an unused channel, whose mean hardly moves, would be divided by next to nothing.
    """
    sample = bucket.latents[:2048].float()
    variance = sample.var(dim=(0, 2, 3, 4)) + bucket.spread[:2048].mean(dim=0)
    return sample.mean(dim=(0, 2, 3, 4)), variance.sqrt()


def batches(
    buckets: dict[Shape, Bucket], shapes: Shapes, batch: int, rng: random.Random, device: torch.device
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Endless (latent [B, 16, T, H, W] float32, ids [B, L], parts [B, 4]): each size once, then by their
    shares.
    """
    sizes = list(shapes)
    weights = list(shapes.values())
    first = list(shapes)
    while True:
        bucket = buckets[first.pop() if first else rng.choices(sizes, weights)[0]]
        rows = torch.randint(len(bucket.latents), (batch,), device=device)
        which = torch.randint(CAPTIONS, (batch,), device=device)
        yield bucket.latents[rows].float(), bucket.ids[rows, which], bucket.parts[rows]


def save_statistics(folder: Path, mean: Tensor, deviation: Tensor) -> None:
    """Keep the channels' statistics for the export."""
    torch.save({"mean": mean.cpu(), "std": deviation.cpu()}, folder / "statistics.pt")


def load_statistics(folder: Path) -> tuple[Tensor, Tensor] | None:
    """What `save_statistics` kept, or None."""
    path = folder / "statistics.pt"
    if not path.exists():
        return None
    kept = torch.load(path, weights_only=True)
    return kept["mean"], kept["std"]
