"""Trains `wan-tiny`'s diffusion transformer and text encoder together, by flow matching.

"Flow Matching for Generative Modeling" (arXiv:2210.02747) on straight paths: x = (1 - s) latent +
s noise, target noise - latent, timestep 1000 s. The noise level s is logit-normal (arXiv:2403.03206)
with a shift towards noise, where motion and layout are decided. One caption in ten is empty, which
is what classifier-free guidance needs (arXiv:2207.12598). Matrices inside blocks are updated by
Muon (https://kellerjordan.github.io/posts/muon/), all else by AdamW.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, UMT5EncoderModel

from chitu_diffusion.evaluation.judge import CLASSES, Judge, load_judge
from chitu_diffusion.models.wan.config import WanConfig
from chitu_diffusion.models.wan.transformer import WanTransformer
from training import autoencoder, latents, text
from training.clock import Clock, Every, learning_rate
from training.judging import prepare
from training.muon import Muon
from training.world import held_out_prompts

CONFIG = WanConfig(
    num_attention_heads=4, attention_head_dim=64, text_dim=text.WIDTH, freq_dim=128, ffn_dim=1024,
    num_layers=8,
    rope_max_seq_len=1024,
)  # fmt: skip
SHIFT = 2.5
SPREAD = 1.2
EMPTY_SHARE = 0.1
MUON_RATE = 3e-3
ADAM_RATE = 1e-3
PARTS = 3
"""Files that the averaged weights are kept in."""


@dataclass
class Nets:
    """What is trained together, and a slow average of its parameters."""

    dit: WanTransformer
    encoder: UMT5EncoderModel
    average: list[Tensor]

    @property
    def parameters(self) -> list[Tensor]:
        return [*self.dit.parameters(), *self.encoder.parameters()]

    def swap(self) -> None:
        """Exchange the parameters with their average; a second call undoes it."""
        for parameter, slow in zip(self.parameters, self.average, strict=True):
            kept = parameter.data.clone()
            parameter.data.copy_(slow)
            slow.copy_(kept)


def build(vocabulary: int, device: torch.device) -> Nets:
    """Fresh networks in float32."""
    torch.manual_seed(2)
    dit = WanTransformer(CONFIG)
    dit.init_weights()
    encoder = text.build_encoder(vocabulary)
    nets = Nets(dit.to(device), encoder.to(device), [])
    nets.average = [p.detach().clone() for p in nets.parameters]
    return nets


def optimizers(nets: Nets) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of blocks, AdamW for everything else."""
    inner = [*nets.dit.blocks.named_parameters(), *nets.encoder.encoder.block.named_parameters()]
    matrices = [p for name, p in inner if p.ndim == 2 and "relative_attention_bias" not in name]
    chosen = {id(p) for p in matrices}
    others = [p for p in nets.parameters if id(p) not in chosen]
    return [
        Muon(matrices, lr=MUON_RATE, weight_decay=0.01),
        torch.optim.AdamW(others, lr=ADAM_RATE, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def loss_of(nets: Nets, latent: Tensor, ids: Tensor, empty: Tensor) -> Tensor:
    """Mean squared error of the velocity at one random noise level a clip.

    latent: [B, 16, T, H, W] normalised; ids: [B, L]; empty: [L], the empty caption.
    """
    batch = len(latent)
    dropped = torch.rand(batch, 1, device=latent.device) < EMPTY_SHARE
    words, bias = text.encode(nets.encoder, torch.where(dropped, empty[None], ids))
    s = torch.sigmoid(torch.randn(batch, device=latent.device) * SPREAD + torch.tensor(SHIFT).log())
    noise = torch.randn_like(latent)
    wide = s[:, None, None, None, None]
    velocity = nets.dit(latent.lerp(noise, wide), words, s * 1000.0, text_bias=bias)
    return (velocity.float() - (noise - latent)).square().mean()


def train(
    folder: Path,
    minutes: float,
    latent_minutes: float,
    shapes: latents.Shapes,
    device: torch.device,
    batch: int,
    encode_batch: int,
) -> None:
    """Fill the buckets, then train until the minutes are over; resumes from `folder/dit.pt`."""
    tokenizer = text.make_tokenizer(folder)
    nets = build(len(tokenizer), device)
    text.load_reader(folder, nets.encoder)
    take_average(folder, nets)
    nets.average = [p.detach().clone() for p in nets.parameters]
    solvers = optimizers(nets)
    path = folder / "dit.pt"
    step = 0
    spent = 0.0
    if path.exists():
        step, spent = restore(path, nets, solvers, device)
    vae = autoencoder.load(folder, device)
    buckets = latents.fill(vae, tokenizer, shapes, latent_minutes, device, encode_batch, seed=10 + step)
    mean, deviation = latents.statistics(buckets[(128, 128, 33)])
    latents.save_statistics(folder, mean, deviation)
    mean, deviation = (v.view(1, -1, 1, 1, 1) for v in (mean, deviation))
    if device.type == "cuda":
        nets.dit.compile_blocks()
    empty = text.tokenize(tokenizer, [""])[0].to(device)
    source = latents.batches(buckets, shapes, batch, random.Random(step), device)
    started = step
    clock = Clock(minutes, spent)
    report = Every(10)
    save = Every(45)
    look = Every(150)
    while not clock.over:
        for solver, peak in zip(solvers, (MUON_RATE, ADAM_RATE), strict=True):
            for group in solver.param_groups:
                group["lr"] = peak * learning_rate(clock.progress)
        latent, ids = next(source)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = loss_of(nets, (latent - mean) / deviation, ids, empty)
        for solver in solvers:
            solver.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(nets.parameters, 1.0)
        for solver in solvers:
            solver.step()
        step += 1
        with torch.no_grad():
            torch._foreach_lerp_(nets.average, nets.parameters, 1 - min(0.998, (1 + step) / (10 + step)))
        if step == started + len(shapes):
            clock.restart()  # compiling for every size does not count as learning
        if report() or clock.over:
            print(f"dit step {step} {clock.spent:.0f}s loss {float(loss.detach()):.4f}", flush=True)
        if save() or clock.over:
            keep(path, nets, solvers, step, clock.spent)
        if look() or clock.over:
            print(
                f"dit step {step} {glance(nets, tokenizer, vae, mean, deviation, folder, device)}", flush=True
            )


def keep(path: Path, nets: Nets, solvers: list[torch.optim.Optimizer], step: int, spent: float) -> None:
    """Everything that a restart needs, written whole and then renamed."""
    state = {
        "dit": nets.dit.state_dict(), "encoder": nets.encoder.state_dict(), "average": nets.average,
        "solvers": [solver.state_dict() for solver in solvers], "step": step, "spent": spent,
    }  # fmt: skip
    torch.save(state, path.with_suffix(".part"))
    path.with_suffix(".part").rename(path)
    names = [
        *(f"dit.{n}" for n, _ in nets.dit.named_parameters()),
        *(f"encoder.{n}" for n, _ in nets.encoder.named_parameters()),
    ]
    save_average(path.parent, dict(zip(names, nets.average, strict=True)))


def save_average(folder: Path, values: dict[str, Tensor]) -> None:
    """The averaged weights by name ("dit.…", "encoder.…"), in a few files of like size."""
    names = list(values)
    for part in range(PARTS):
        chosen = {name: values[name].cpu().contiguous() for name in names[part::PARTS]}
        save_file(chosen, folder / f"average-{part}.safetensors")


def take_average(folder: Path, nets: Nets) -> bool:
    """Start from the averaged weights of an earlier run, if they are in `folder`; whether they were."""
    files = [folder / f"average-{part}.safetensors" for part in range(PARTS)]
    if not all(file.exists() for file in files):
        return False
    values = {name: value for file in files for name, value in load_file(file).items()}
    for prefix, net in (("dit.", nets.dit), ("encoder.", nets.encoder)):
        own = dict(net.named_parameters())
        for name, parameter in own.items():
            parameter.data.copy_(values[prefix + name])
    return True


def restore(
    path: Path, nets: Nets, solvers: list[torch.optim.Optimizer], device: torch.device
) -> tuple[int, float]:
    """Take up a run where it stopped: (steps done, seconds spent)."""
    state = torch.load(path, map_location=device, weights_only=True)
    nets.dit.load_state_dict(state["dit"])
    nets.encoder.load_state_dict(state["encoder"])
    nets.average = state["average"]
    for solver, saved in zip(solvers, state["solvers"], strict=True):
        solver.load_state_dict(saved)
    return state["step"], state["spent"]


@torch.no_grad()
def sample(
    nets: Nets, ids: Tensor, empty: Tensor, shape: tuple[int, ...], steps: int, guidance: float
) -> Tensor:
    """Plain Euler sampling with guidance, for looking in on the training: latents [B, *shape], normalised."""
    device = ids.device
    batch = len(ids)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(batch, *shape, generator=generator).to(device)
    words, bias = text.encode(nets.encoder, torch.cat([ids, empty.expand(batch, -1)]))
    line = torch.linspace(1, 0, steps + 1)
    levels = (3.0 * line / (1 + 2.0 * line)).tolist()
    for s, following in zip(levels[:-1], levels[1:], strict=True):
        t = torch.full((2 * batch,), s * 1000.0, device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            cond, free = nets.dit(torch.cat([x, x]), words, t, text_bias=bias).float().chunk(2)
        x = x + (following - s) * (free + guidance * (cond - free))
    return x


@torch.no_grad()
def glance(
    nets: Nets,
    tokenizer: PreTrainedTokenizerFast,
    vae: nn.Module,
    mean: Tensor,
    deviation: Tensor,
    folder: Path,
    device: torch.device,
) -> dict[str, float]:
    """Share of 64 held-out prompts whose parts the judge finds in quick samples of the averaged networks."""
    if not (folder / "judge.safetensors").exists():
        return {}
    judge: Judge = load_judge(folder / "judge.safetensors").to(device)
    asked = held_out_prompts(64, seed=5)
    ids = text.tokenize(tokenizer, [prompt for prompt, _ in asked]).to(device)
    empty = text.tokenize(tokenizer, [""])[0].to(device)
    nets.swap()
    latent = sample(nets, ids, empty, (16, 9, 16, 16), steps=16, guidance=5.0)
    nets.swap()
    net = autoencoder.WholeClip(vae)
    parts = [net.decode(part).clamp(-1, 1) for part in (latent * deviation + mean).split(16)]
    video = torch.cat([prepare(part.transpose(1, 2) / 2 + 0.5) for part in parts])
    torch.save(torch.cat(parts[:1]).to(torch.float16).cpu(), folder / "glance.pt")
    logits = judge(video)
    truth = {name: [getattr(words, name) for _, words in asked] for name in CLASSES}
    found = {name: [CLASSES[name][index] for index in logits[name].argmax(1).tolist()] for name in CLASSES}
    return {name: sum(map(str.__eq__, found[name], truth[name])) / len(asked) for name in CLASSES}
