"""Low-rank adapters of the trained transformer: a student of four steps without guidance, and a style.

"LoRA" (arXiv:2106.09685) on every linear layer of the blocks; files hold the names that diffusers gives them.

The student learns where a guided trajectory of its teacher passes: at each of the four noise levels it must
name the straight line to the teacher's next point. Half of its inputs are points of the teacher's, half are
where the student itself came to, so that it learns to come back.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from chitu_diffusion.evaluation.prompts import MANNERS
from chitu_diffusion.sampling.recipes import recipe_named
from training import autoencoder, denoiser, latents
from training.clock import Clock, Every, learning_rate
from training.denoiser import Nets
from training.glances import Looker
from training.sampling import Asked, asked, guided
from training.world.styles import sketch

NAMES = {"student": "wan-tiny-4step.safetensors", "style": "wan-tiny-sketch.safetensors"}
RECIPE = "lightx2v-4step"
STUDENT_RANK = 24
STYLE_RANK = 8
RATE = 1.5e-3
_SUBSTEPS = (4, 5, 7, 8)
"""Of the teacher in each of the student's steps: 24 in all, near its own grid."""


class LowRank(nn.Module):
    """A linear layer and the change of an adapter beside it; the change is nothing at first."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Parameter(torch.randn(rank, base.in_features, device=base.weight.device))
        self.up = nn.Parameter(torch.zeros(base.out_features, rank, device=base.weight.device))
        with torch.no_grad():
            self.down /= base.in_features**0.5

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> [..., out_features]."""
        return self.base(x) + nn.functional.linear(nn.functional.linear(x, self.down), self.up)


def wrapped(nets: Nets, rank: int, compiled: bool) -> tuple[Nets, dict[str, LowRank]]:
    """A copy of the networks, frozen but for adapters on the blocks' linear layers; these by name."""
    dit = copy.deepcopy(nets.dit).requires_grad_(False)
    torch.manual_seed(7)
    found = {n: m for n, m in dit.blocks.named_modules() if isinstance(m, nn.Linear)}
    adapters: dict[str, LowRank] = {}
    for name, linear in found.items():
        parent, _, leaf = name.rpartition(".")
        adapters[f"blocks.{name}"] = LowRank(linear, rank)
        owner = dit.blocks.get_submodule(parent)
        if leaf.isdigit():
            owner[int(leaf)] = adapters[f"blocks.{name}"]  # type: ignore[index]
        else:
            setattr(owner, leaf, adapters[f"blocks.{name}"])
    student = Nets(dit, nets.encoder, nets.heads, [], denoiser.Velocity(dit, compiled))
    return student, adapters


def save(path: Path, adapters: dict[str, LowRank], average: list[Tensor], note: str) -> None:
    """An adapter's file in bfloat16, of the averaged weights."""
    slow = iter(average)
    tensors: dict[str, Tensor] = {}
    for name in adapters:
        for part in ("lora_A", "lora_B"):
            value = next(slow).detach().to("cpu", torch.bfloat16)
            tensors[f"transformer.{name}.{part}.weight"] = value.contiguous()
    save_file(tensors, path, metadata={"format": "pt", "note": note})
    print(f"{path}: {path.stat().st_size / 2**20:.2f} MiB", flush=True)


def _parameters(adapters: dict[str, LowRank]) -> list[Tensor]:
    return [value for each in adapters.values() for value in (each.down, each.up)]


def fit(
    adapters: dict[str, LowRank], minutes: float, losses: Iterator[Tensor], name: str
) -> tuple[list[Tensor], int]:
    """Minimise endless losses until the minutes are over: (slow average of the parameters, steps)."""
    parameters = _parameters(adapters)
    solver = torch.optim.AdamW(parameters, lr=RATE, betas=(0.9, 0.98), weight_decay=0.0)
    average = [p.detach().clone() for p in parameters]
    clock = Clock(minutes)
    report = Every(10)
    step = 0
    while not clock.over:
        for group in solver.param_groups:
            group["lr"] = RATE * learning_rate(clock.progress, hold=0.3)
        loss = next(losses)
        solver.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        solver.step()
        step += 1
        with torch.no_grad():
            torch._foreach_lerp_(average, parameters, 1 - min(0.99, (1 + step) / (10 + step)))
        if step == 2:
            clock.restart()  # compiling
        if report() or clock.over:
            print(f"{name} step {step} {clock.spent:.0f}s loss {float(loss.detach()):.4f}", flush=True)
    return average, step


def use(adapters: dict[str, LowRank], average: list[Tensor]) -> None:
    """Put averaged weights into the adapters."""
    with torch.no_grad():
        torch._foreach_copy_(_parameters(adapters), average)


def student_levels() -> tuple[float, ...]:
    """The noise levels of `RECIPE`, and 0."""
    return (*recipe_named(RECIPE).levels.sigmas, 0.0)


def teacher_levels() -> list[float]:
    """From 1 to 0 through the student's, between them evenly before the model's shift."""
    points = student_levels()
    line = [points[0]]
    for high, low, count in zip(points[:-1], points[1:], _SUBSTEPS, strict=True):
        ends = [s / (3.0 - 2.0 * s) for s in (high, low)]
        for number in range(1, count):
            place = ends[0] + (ends[1] - ends[0]) * number / count
            line.append(3.0 * place / (1 + 2.0 * place))
        line.append(low)
    return line


def teach(
    nets: Nets,
    bucket: latents.Bucket,
    scale: tuple[Tensor, Tensor],
    nothing: Tensor,
    minutes: float,
    batch: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The teacher's trajectories until the minutes are over.

    Returns:
        points: [N, 5, 16, T, H, W] bfloat16, at `student_levels`.
        ids: [N, L]. known: [N] bool, of which the first frame is given.
    """
    mean, deviation = scale
    line = teacher_levels()
    clock = Clock(minutes)
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    device = bucket.latents.device
    count = len(bucket.latents)
    while not clock.over or not parts:
        rows = torch.randint(count, (batch,), device=device)
        ids = bucket.ids[rows, torch.randint(latents.CAPTIONS, (batch,), device=device)]
        known = torch.rand(batch, device=device) < denoiser.PICTURE_SHARE
        first = ((bucket.latents[rows, :, 0].float()[:, :, None] - mean) / deviation)[:, :, 0]
        free = asked(nets, nothing[:1].expand(batch, -1))
        noise = torch.randn(batch, *bucket.latents.shape[1:], device=device)
        kept = guided(nets, asked(nets, ids, first, known), free, noise, line, keep=student_levels()[:-1])
        parts.append((torch.stack(kept, dim=1).bfloat16(), ids, known))
    print(f"teacher: {len(parts) * batch} trajectories in {clock.spent:.0f}s", flush=True)
    points, ids, known = (torch.cat(part) for part in zip(*parts, strict=True))
    return points, ids, known


def student_losses(student: Nets, points: Tensor, ids: Tensor, known: Tensor, batch: int) -> Iterator[Tensor]:
    """Endless losses of `teach`'s trajectories."""
    levels = torch.tensor(student_levels(), device=points.device)
    own = points[:, :-1].clone()  # where the student came to, as far as it has been
    while True:
        rows = torch.randint(len(points), (batch,), device=points.device)
        at = torch.randint(len(levels) - 1, (batch,), device=points.device)
        alone = torch.rand(batch, device=points.device) < 0.5
        x = torch.where(alone[:, None, None, None, None], own[rows, at], points[rows, at]).float()
        step = (levels[at + 1] - levels[at])[:, None, None, None, None]
        target = (points[rows, at + 1].float() - x) / step
        wanted = asked(student, ids[rows], x[:, :, 0], known[rows])
        time = levels[at] * 1000.0
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
            found = student.velocity(x, wanted.words, wanted.bias, time, torch.where(known[rows], 0.0, time))
        error = (found - target).square().mean(dim=(1, 3, 4))
        counts = torch.ones_like(error)
        counts[:, 0] = (~known[rows]).float()
        with torch.no_grad():
            reached = x + step * found
            reached[:, :, 0] = torch.where(known[rows][:, None, None, None], x[:, :, 0], reached[:, :, 0])
            further = at < len(levels) - 2
            own[rows[further], at[further] + 1] = reached[further].to(own.dtype)
        yield (error * counts).sum() / counts.sum()


def style_losses(
    student: Nets, bucket: latents.Bucket, scale: tuple[Tensor, Tensor], nothing: Tensor, batch: int
) -> Iterator[Tensor]:
    """Endless losses of flow matching on clips in a style."""
    mean, deviation = scale
    device = bucket.latents.device
    while True:
        rows = torch.randint(len(bucket.latents), (batch,), device=device)
        ids = bucket.ids[rows, torch.randint(latents.CAPTIONS, (batch,), device=device)]
        wanted: Asked = asked(student, denoiser.dropped(ids, nothing))
        latent = (bucket.latents[rows].float() - mean) / deviation
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = denoiser.velocity_error(student.velocity, latent, wanted.words, wanted.bias)
        yield loss


def train(
    folder: Path, kind: str, minutes: float, device: torch.device, batch: int, encode_batch: int
) -> None:
    """Train the "student" or the "style" of the run's averaged networks: `folder/{NAMES[kind]}`."""
    nets, tokenizer = denoiser.start(folder, device)
    nets.dit.requires_grad_(False)
    nets.encoder.requires_grad_(False)
    vae = autoencoder.load(folder, device)
    shapes = latents.ONE_SHAPE
    style = sketch if kind == "style" else None
    buckets = latents.fill(vae, tokenizer, shapes, 0.1 * minutes, device, encode_batch, 31, style)
    (bucket,) = buckets.values()
    scale = denoiser.scale_of(folder, buckets)
    nothing = denoiser.unconditional(tokenizer, device)
    compiled = device.type == "cuda"
    if kind == "style":
        student, adapters = wrapped(nets, STYLE_RANK, compiled)
        losses = style_losses(student, bucket, scale, nothing, batch)
        average, step = fit(adapters, 0.8 * minutes, losses, kind)
    else:
        taught = teach(nets, bucket, scale, nothing, 0.42 * minutes, batch)
        student, adapters = wrapped(nets, STUDENT_RANK, compiled)
        average, step = fit(adapters, 0.45 * minutes, student_losses(student, *taught, batch), kind)
    use(adapters, average)
    save(folder / NAMES[kind], adapters, average, f"{kind}, {step} steps of {batch}")
    distilled = student_levels() if kind == "student" else None
    count = 64 if compiled else 2
    looker = Looker(tokenizer, vae, *scale, folder, prompts=count, distilled=distilled)
    manners = ("plain", "picture") if kind == "style" else MANNERS
    looker.look(student, kind, manners)
