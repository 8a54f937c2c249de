"""Trains `wan-tiny`'s diffusion transformer and text encoder together, by flow matching, for text to video
and image to video at once.

"Flow Matching for Generative Modeling" (arXiv:2210.02747) on straight paths: x = (1 - s) latent +
s noise, target noise - latent, timestep 1000 s. The noise level s is logit-normal (arXiv:2403.03206)
with a shift towards noise, where motion and layout are decided. Of some clips the first latent frame is
known: clean, at time 0, and no part of the loss. Some captions are empty, which is what classifier-free
guidance needs (arXiv:2207.12598), and some are what people write as a negative prompt, so that guidance away
from any such words is like guidance away from nothing. Four linear heads on the text encoder's mean must
name what a caption tells of, which teaches it new words sooner than pixels do. Matrices inside blocks are
updated by Muon (https://kellerjordan.github.io/posts/muon/), all else by AdamW.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, UMT5EncoderModel

from chitu_diffusion.evaluation.judge import CLASSES
from chitu_diffusion.models.wan.config import WanConfig
from chitu_diffusion.models.wan.transformer import WanTransformer
from training import autoencoder, latents, text
from training.clock import Clock, Every, learning_rate
from training.muon import Muon
from training.network import Velocity
from training.world import around

CONFIG = WanConfig(
    num_attention_heads=4, attention_head_dim=64, text_dim=text.WIDTH, freq_dim=128, ffn_dim=1024,
    num_layers=8,
    rope_max_seq_len=1024,
)  # fmt: skip
SHIFT = 2.5
SPREAD = 1.2
EMPTY_SHARE = 0.09
NEGATIVE_SHARE = 0.09
NEGATIVES = 4096
PICTURE_SHARE = 0.35
HEADS_WEIGHT = 0.04
MUON_RATE = 3e-3
ADAM_RATE = 1e-3
PARTS = 3
"""Files that the averaged weights are kept in."""


@dataclass
class Nets:
    """What is trained together, and a slow average of its parameters; the heads have none, for they are not
    kept.
    """

    dit: WanTransformer
    encoder: UMT5EncoderModel
    heads: nn.ModuleDict
    average: list[Tensor]
    velocity: Velocity

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
    heads = nn.ModuleDict({name: nn.Linear(text.WIDTH, len(names)) for name, names in CLASSES.items()})
    velocity = Velocity(dit, compiled=device.type == "cuda")
    nets = Nets(dit.to(device), encoder.to(device), heads.to(device), [], velocity)
    nets.average = [p.detach().clone() for p in nets.parameters]
    return nets


def optimizers(nets: Nets) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of blocks, AdamW for everything else."""
    inner = [*nets.dit.blocks.named_parameters(), *nets.encoder.encoder.block.named_parameters()]
    matrices = [p for name, p in inner if p.ndim == 2 and "relative_attention_bias" not in name]
    chosen = {id(p) for p in matrices}
    others = [p for p in [*nets.parameters, *nets.heads.parameters()] if id(p) not in chosen]
    return [
        Muon(matrices, lr=MUON_RATE, weight_decay=0.01),
        torch.optim.AdamW(others, lr=ADAM_RATE, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def noise_levels(count: int, device: torch.device) -> Tensor:
    """[count] in (0, 1)."""
    return torch.sigmoid(torch.randn(count, device=device) * SPREAD + torch.tensor(SHIFT).log())


def unconditional(tokenizer: PreTrainedTokenizerFast, device: torch.device) -> Tensor:
    """The empty caption, then `NEGATIVES` that say nothing of any clip: ids [1 + NEGATIVES, L]."""
    rng = random.Random(8)
    return text.tokenize(tokenizer, ["", *(around.negative(rng) for _ in range(NEGATIVES))]).to(device)


def dropped(ids: Tensor, nothing: Tensor) -> Tensor:
    """Captions ids [B, L], some of them replaced by the empty one or another of `nothing`."""
    batch = len(ids)
    draw = torch.rand(batch, 1, device=ids.device)
    other = torch.randint(1, len(nothing), (batch,), device=ids.device)
    ids = torch.where(draw < EMPTY_SHARE + NEGATIVE_SHARE, nothing[other], ids)
    return torch.where(draw < EMPTY_SHARE, nothing[:1], ids)


def velocity_error(velocity: Velocity, latent: Tensor, words: Tensor, bias: Tensor) -> Tensor:
    """Mean squared error of the velocity at one random noise level a clip, some with a known first frame.

    latent: [B, 16, T, H, W] normalised; words, bias: of `text.encode`.
    """
    batch = len(latent)
    s = noise_levels(batch, latent.device)
    noise = torch.randn_like(latent)
    noisy = latent.lerp(noise, s[:, None, None, None, None])
    known = torch.rand(batch, device=latent.device) < PICTURE_SHARE
    noisy[:, :, 0] = torch.where(known[:, None, None, None], latent[:, :, 0], noisy[:, :, 0])
    time = s * 1000.0
    found = velocity(noisy, words, bias, time, torch.where(known, 0.0, time))
    error = (found - (noise - latent)).square().mean(dim=(1, 3, 4))  # [B, T]
    counts = torch.ones_like(error)
    counts[:, 0] = (~known).float()
    return (error * counts).sum() / counts.sum()


def loss_of(nets: Nets, latent: Tensor, ids: Tensor, parts: Tensor, nothing: Tensor) -> tuple[Tensor, Tensor]:
    """(loss, its part that is the velocity's error) of normalised latents [B, 16, T, H, W] with their
    captions ids [B, L] and parts [B, 4]; `nothing` of `unconditional`.
    """
    words, bias = text.encode(nets.encoder, dropped(ids, nothing))
    error = velocity_error(nets.velocity, latent, words, bias)
    rows, _ = text.encode(nets.encoder, ids[: len(ids) // 2])
    mean = rows.float().sum(1) / (ids[: len(ids) // 2] != 0).sum(1, keepdim=True)
    named = [
        nn.functional.cross_entropy(
            head(mean).float(), parts[: len(mean), number], ignore_index=latents.NOTHING_SAID, reduction="sum"
        )
        for number, head in enumerate(nets.heads.values())
    ]
    return error + HEADS_WEIGHT * torch.stack(named).sum() / len(mean), error.detach()


def start(folder: Path, device: torch.device) -> tuple[Nets, PreTrainedTokenizerFast]:
    """The networks as `folder` has them, or fresh ones, and the tokenizer."""
    tokenizer = text.make_tokenizer(folder)
    nets = build(len(tokenizer), device)
    text.load_reader(folder, nets.encoder)
    take_average(folder, nets)
    nets.average = [p.detach().clone() for p in nets.parameters]
    return nets, tokenizer


def scale_of(folder: Path, buckets: dict[latents.Shape, latents.Bucket]) -> tuple[Tensor, Tensor]:
    """Mean and deviation of the latent's channels, each [1, 16, 1, 1, 1]: those of the run, made once."""
    kept = latents.load_statistics(folder)
    if kept is None:
        kept = latents.statistics(next(iter(buckets.values())))
        latents.save_statistics(folder, *kept)
    device = next(iter(buckets.values())).latents.device
    mean, deviation = (value.view(1, -1, 1, 1, 1).to(device) for value in kept)
    return mean, deviation


def train(
    folder: Path,
    minutes: float,
    latent_minutes: float,
    shapes: latents.Shapes,
    device: torch.device,
    batch: int,
    encode_batch: int,
    peak: float = 1.0,
) -> None:
    """Fill the buckets, then train until the minutes are over; resumes from `folder/dit.pt`. `peak` is a
    factor on the learning rates.
    """
    nets, tokenizer = start(folder, device)
    solvers = optimizers(nets)
    path = folder / "dit.pt"
    step = 0
    spent = 0.0
    if path.exists():
        step, spent = restore(path, nets, solvers, device)
    vae = autoencoder.load(folder, device)
    buckets = latents.fill(vae, tokenizer, shapes, latent_minutes, device, encode_batch, seed=10 + step)
    mean, deviation = scale_of(folder, buckets)
    nothing = unconditional(tokenizer, device)
    source = latents.batches(buckets, shapes, batch, random.Random(step), device)
    started = step
    clock = Clock(minutes, spent)
    report = Every(10)
    save = Every(120)
    while not clock.over:
        for solver, rate in zip(solvers, (MUON_RATE, ADAM_RATE), strict=True):
            for group in solver.param_groups:
                group["lr"] = peak * rate * learning_rate(clock.progress)
        latent, ids, parts = next(source)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss, error = loss_of(nets, (latent - mean) / deviation, ids, parts, nothing)
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
            print(f"dit: compiled after {len(shapes)} steps", flush=True)
        if report() or clock.over:
            words = float(loss.detach() - error) / HEADS_WEIGHT
            print(f"dit step {step} {clock.spent:.0f}s loss {float(error):.4f} words {words:.3f}", flush=True)
        if save() or clock.over:
            keep(path, nets, solvers, step, clock.spent)


def keep(path: Path, nets: Nets, solvers: list[torch.optim.Optimizer], step: int, spent: float) -> None:
    """Everything that a restart needs, written whole and then renamed."""
    state = {
        "dit": nets.dit.state_dict(), "encoder": nets.encoder.state_dict(), "average": nets.average,
        "heads": nets.heads.state_dict(), "solvers": [solver.state_dict() for solver in solvers],
        "step": step, "spent": spent,
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
    nets.heads.load_state_dict(state["heads"])
    nets.average = state["average"]
    for solver, saved in zip(solvers, state["solvers"], strict=True):
        solver.load_state_dict(saved)
    return state["step"], state["spent"]
