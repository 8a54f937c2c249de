"""Trains the judge of `chitu_diffusion.evaluation.judge` on drawn clips, blurred and noised at random.

The blur and noise stand for what an autoencoder and a diffusion model do to edges and flat colours.
No generated clip is ever shown to it. Held-out combinations are drawn too: the judge must know
them, it is the generator that must not.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from chitu_diffusion.evaluation.judge import CLASSES, Judge, name_parts, prepare
from training.clips import drawn
from training.clock import Clock, Every, learning_rate
from training.world import WorldSpecs, draw, sample_specs

SIZES = ((64, 64, 33), (128, 128, 33), (64, 64, 33), (64, 96, 33), (64, 64, 33), (96, 64, 33), (64, 64, 17))


def disturb(video: Tensor) -> Tensor:
    """Random blur, noise, contrast and per-clip colour shift of [B, T, 3, H, W] in [0, 1]."""
    batch = video.shape[0]
    blurred = F.avg_pool2d(video.flatten(0, 1), 3, stride=1, padding=1, count_include_pad=False).view_as(
        video
    )
    share = torch.rand(batch, 1, 1, 1, 1, device=video.device)
    video = video.lerp(blurred, share * 0.9)
    gain = 1 + 0.1 * torch.randn(batch, 1, 1, 1, 1, device=video.device)
    shift = 0.03 * torch.randn(batch, 1, 3, 1, 1, device=video.device)
    noise = torch.randn_like(video) * (torch.rand(batch, 1, 1, 1, 1, device=video.device) * 0.05)
    return ((video - 0.5) * gain + 0.5 + shift + noise).clamp(0, 1)


def labels(specs: WorldSpecs, device: torch.device) -> dict[str, Tensor]:
    """Class indices [B] by head."""
    return {"actor": specs.actor.to(device), "colour": specs.colour.to(device),
            "scene": specs.scene.to(device), "motion": specs.motion.to(device)}  # fmt: skip


def collect(count: int, device: torch.device) -> tuple[Tensor, dict[str, Tensor]]:
    """Drawn clips of every size at the judge's own: (uint8 [N, FRAMES, 3, SIDE, SIDE], class indices [N] by
    head).
    """
    generator = torch.Generator().manual_seed(55)
    report = Every(10)
    sources = [drawn(shape, 16, "all", generator, device) for shape in SIZES]
    videos: list[Tensor] = []
    truths: list[dict[str, Tensor]] = []
    while 16 * len(videos) < count:
        video, specs = next(sources[len(videos) % len(sources)])
        videos.append((prepare(video.transpose(1, 2) / 2 + 0.5) * 255).round().to(torch.uint8))
        truths.append(labels(specs, device))
        if report():
            print(f"judge: {16 * len(videos)} clips drawn", flush=True)
    return torch.cat(videos), {name: torch.cat([truth[name] for truth in truths]) for name in CLASSES}


def accuracy_on_drawn_clips(
    judge: Judge, count: int, device: torch.device | str = "cpu", seed: int = 77
) -> dict[str, float]:
    """Share of fresh drawn 128x128x33 clips, of all combinations, that the judge names right, by part."""
    generator = torch.Generator().manual_seed(seed)
    right = dict.fromkeys(CLASSES, 0)
    for start in range(0, count, 16):
        specs = sample_specs(min(16, count - start), generator, "all")
        video = draw(specs, 128, 128, 33, device).transpose(1, 2) / 2 + 0.5
        for found, truth in zip(name_parts(judge, video), specs.words(), strict=True):
            for part in CLASSES:
                right[part] += asdict(found)[part] == asdict(truth)[part]
    return {part: value / count for part, value in right.items()}


def train(
    folder: Path, minutes: float, device: torch.device, batch: int, clips: int, test_clips: int
) -> None:
    """Train until the minutes are over, then write `folder/judge.safetensors` and its card
    `folder/judge.json`.
    """
    torch.manual_seed(1)
    judge = Judge().to(device)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3, weight_decay=0.05)
    videos, truth = collect(clips, device)
    clock = Clock(minutes)
    report = Every(10)
    step = 0
    while not clock.over:
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * learning_rate(clock.progress, hold=0.2)
        rows = torch.randint(len(videos), (batch,), device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = judge(disturb(videos[rows].float() / 255))
            losses = [
                F.cross_entropy(logits[n].float(), truth[n][rows], label_smoothing=0.05) for n in CLASSES
            ]
            loss = torch.stack(losses).sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(judge.parameters(), 1.0)
        optimizer.step()
        step += 1
        if report():
            print(f"judge step {step} {clock.spent:.0f}s loss {float(loss.detach()):.3f}", flush=True)
    judge.eval()
    scores = accuracy_on_drawn_clips(judge, test_clips, device)
    print("judge accuracy on fresh clips", {k: round(v, 4) for k, v in scores.items()}, flush=True)
    save_file({k: v.half().contiguous() for k, v in judge.state_dict().items()}, folder / "judge.safetensors")
    card = {"accuracy": scores, "test_clips": test_clips, "steps": step, "batch": batch, "drawn_clips": clips}
    (folder / "judge.json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
