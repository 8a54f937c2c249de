"""Trains `wan-tiny`'s video autoencoder: diffusers' `AutoencoderKLWan` in small.

The network is diffusers' own class, so the checkpoint opens there. Its forward walks a video
frame group by frame group with caches; here the same modules run over a whole clip at once,
which is the same function (causal convolutions padded with zeros at the start only; a test
holds both to equal outputs) and several times faster to train.

Two departures from the full-size sizes, both options of the same class: pixels are patchified
2x2 first and there are two spatial stages instead of three (the stride stays 4, 8, 8), which
spares the costly full-resolution layers.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    WanAttentionBlock,
    WanCausalConv3d,
    WanResample,
    WanResidualBlock,
    WanRMS_norm,
    patchify,
    unpatchify,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from training.clips import drawn
from training.clock import Clock, Every, learning_rate
from training.muon import Muon
from training.world import draw, sample_specs

SIZES: dict[str, Any] = {
    "base_dim": 24,
    "z_dim": 16,
    "dim_mult": [1, 2, 3],
    "num_res_blocks": 2,
    "temperal_downsample": [True, True],
    "patch_size": 2,
    "in_channels": 12,
    "out_channels": 12,
    "latents_mean": [0.0] * 16,
    "latents_std": [1.0] * 16,
}
MUON_RATE = 2e-3
ADAM_RATE = 1e-3
KL_WEIGHT = 3e-4
ABSOLUTE_WEIGHT = 0.1
EDGE_WEIGHT = 0.1
LOG_WEIGHT = 0.02
LOG_EDGE_WEIGHT = 0.02


def build() -> AutoencoderKLWan:
    """A fresh autoencoder of `SIZES`."""
    return AutoencoderKLWan(**SIZES)


def channels_last(vae: AutoencoderKLWan) -> AutoencoderKLWan:
    """The same network with its convolution weights laid out channels last."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    for module in vae.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            module.weight.data = module.weight.data.contiguous(memory_format=formats[module.weight.ndim])
    return vae


def _norm_silu(x: Tensor, gamma: Tensor) -> Tensor:
    # RMS norm over channels, in float32 as the class does for 16-bit inputs; gamma [C, 1, 1, 1]
    wide = x.float()
    norm = wide * torch.rsqrt(wide.square().sum(dim=1, keepdim=True).clamp_min(1e-24)) * (x.shape[1] ** 0.5)
    return F.silu(norm * gamma).to(x.dtype)


class WholeClip:
    """Runs an `AutoencoderKLWan` over whole clips, without its frame caches.

    Args:
        vae: the network; its parameters are used in place.
        fuse: compile the norm + SiLU pair (worth it on a GPU).
    """

    def __init__(self, vae: AutoencoderKLWan, fuse: bool = False) -> None:
        self.vae = vae
        self.norm_silu = torch.compile(_norm_silu, dynamic=True) if fuse else _norm_silu

    def encode(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """[B, 3, T, H, W] in [-1, 1] -> mean and log-variance of the latent, each [B, 16, (T-1)/4+1, H/8,
        W/8].
        """
        encoder = self.vae.encoder
        x = self._conv(encoder.conv_in, patchify(video, self.vae.config.patch_size or 1))
        for layer in encoder.down_blocks:
            x = self._layer(layer, x)
        x = self._middle(encoder.mid_block, x)
        x = self._conv(encoder.conv_out, self._norm(encoder.norm_out, x))
        mean, log_variance = self.vae.quant_conv(x).float().chunk(2, dim=1)
        return mean, log_variance.clamp(-30.0, 20.0)

    def decode(self, latent: Tensor) -> Tensor:
        """Latent (not normalised) -> [B, 3, T, H, W], not clamped."""
        decoder = self.vae.decoder
        x = self._conv(decoder.conv_in, self.vae.post_quant_conv(latent))
        x = self._middle(decoder.mid_block, x)
        for block in decoder.up_blocks:
            for layer in [*block.resnets, *(block.upsamplers or [])]:
                x = self._layer(layer, x)
        x = self._conv(decoder.conv_out, self._norm(decoder.norm_out, x))
        return unpatchify(x, self.vae.config.patch_size or 1)

    def _middle(self, block: nn.Module, x: Tensor) -> Tensor:
        x = self._layer(block.resnets[0], x)
        for attention, resnet in zip(block.attentions, block.resnets[1:], strict=True):
            x = self._layer(resnet, self._layer(attention, x))
        return x

    def _layer(self, layer: nn.Module, x: Tensor) -> Tensor:
        if isinstance(layer, WanResidualBlock):
            short = layer.conv_shortcut(x)
            x = self._conv(layer.conv1, self._norm(layer.norm1, x))
            return self._conv(layer.conv2, self._norm(layer.norm2, x)) + short
        if isinstance(layer, WanResample):
            return self._resample(layer, x)
        if isinstance(layer, WanAttentionBlock):
            return layer(x)
        raise TypeError(f"unexpected layer {type(layer).__name__}")

    def _norm(self, norm: WanRMS_norm, x: Tensor) -> Tensor:
        return self.norm_silu(x, norm.gamma)

    def _conv(self, conv: WanCausalConv3d, x: Tensor) -> Tensor:
        # _padding is (w, w, h, h, 2t, 0): space by the convolution itself, past frames by zeros
        w, _, h, _, past, _ = conv._padding
        return F.conv3d(F.pad(x, (0, 0, 0, 0, past, 0)), conv.weight, conv.bias, conv.stride, (0, h, w))

    def _resample(self, layer: WanResample, x: Tensor) -> Tensor:
        if layer.mode == "upsample3d":
            # the first frame stands alone; each later one becomes two
            first = x[:, :, :1]
            rest = x[:, :, 1:]
            if rest.shape[2]:
                two = self._conv(layer.time_conv, rest).unflatten(1, (2, -1))  # [B, 2, C, t, H, W]
                rest = two.permute(0, 2, 3, 1, 4, 5).flatten(2, 3)
            x = torch.cat([first, rest], dim=2)
        batch = x.shape[0]
        frames = x.shape[2]
        flat = x.transpose(1, 2).flatten(0, 1)
        x = layer.resample(flat).unflatten(0, (batch, frames)).transpose(1, 2)
        if layer.mode == "downsample3d" and frames > 1:
            x = torch.cat([x[:, :, :1], self._conv(layer.time_conv, x)], dim=2)
        return x


def reconstruction_psnr(net: WholeClip, clips: int, device: torch.device, seed: int = 1) -> float:
    """Mean PSNR in dB, of frames in [0, 1], over fresh drawn 128x128x33 clips (latent mean, decoded,
    clamped).
    """
    generator = torch.Generator().manual_seed(seed)
    total = 0.0
    for _ in range(clips):
        video = draw(sample_specs(1, generator, "all"), 128, 128, 33, device)
        with torch.no_grad():
            back = net.decode(net.encode(video)[0]).clamp(-1, 1)
        total += float(-10 * torch.log10(((video - back) / 2).square().mean()))
    return total / clips


Part = Literal["vae", "decoder"]
Loss = Callable[[WholeClip, Tensor], tuple[Tensor, Tensor, Tensor]]


def loss_of(net: WholeClip, video: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, mean squared error, KL per latent value) of a batch of clips."""
    mean, log_variance = net.encode(video)
    latent = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
    back = net.decode(latent).float()
    error = back - video
    edges = sum(error.diff(dim=axis).abs().mean() for axis in (-1, -2))
    kl = 0.5 * (mean.square() + log_variance.exp() - 1.0 - log_variance).mean()
    squared = error.square().mean()
    return (
        2 * squared + ABSOLUTE_WEIGHT * error.abs().mean() + EDGE_WEIGHT * edges + KL_WEIGHT * kl,
        squared,
        kl,
    )


def decoder_loss(net: WholeClip, video: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`loss_of` for a decoder alone: the logarithm of each clip's squared error, whose mean is the mean
    PSNR.
    """
    with torch.no_grad():
        mean, log_variance = net.encode(video)
        latent = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
    error = net.decode(latent).float() - video
    edges = sum(error.diff(dim=axis).abs().mean() for axis in (-1, -2))
    squared = error.square().flatten(1).mean(1)
    return (
        LOG_WEIGHT * squared.log().mean() + LOG_EDGE_WEIGHT * edges,
        squared.mean(),
        torch.zeros_like(edges),
    )


class Step:
    """Loss and gradients of one batch; on a GPU one replay of a CUDA graph, since launching is what costs
    there.

    Gradients lie in `parameter.grad` after each call and are overwritten by the next: do not clear them.
    """

    def __init__(self, net: WholeClip, video: Tensor, loss: Loss) -> None:
        self.net = net
        self.loss = loss
        self.graph = None
        if not video.is_cuda:
            return
        self.video = video.contiguous(memory_format=torch.channels_last_3d)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self._compute(self.video)
        torch.cuda.current_stream().wait_stream(side)
        net.vae.zero_grad(set_to_none=True)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.result = self._compute(self.video)

    def __call__(self, video: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(loss, mean squared error, KL per value), detached."""
        if self.graph is None:
            self.net.vae.zero_grad(set_to_none=True)
            return self._compute(video)
        self.video.copy_(video)
        self.graph.replay()
        return self.result

    def _compute(self, video: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        kind = video.device.type
        with torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda", cache_enabled=False):
            loss, squared, kl = self.loss(self.net, video)
        loss.backward()
        return loss.detach(), squared.detach(), kl.detach()


def train(
    folder: Path,
    minutes: float,
    device: torch.device,
    batch: int,
    size: int,
    frames: int,
    part: Literal["vae", "decoder"] = "vae",
) -> None:
    """Train until the minutes are over; resumes from `folder/{part}.pt`, leaves `folder/vae.safetensors`.

    "decoder" keeps the encoder as it is, so that whoever learns its latents can do so at the same time, and
    minimises the logarithm of each clip's squared error: its mean is the mean PSNR.
    """
    torch.manual_seed(0)
    vae = channels_last(build().to(device))
    if part == "decoder":
        vae.requires_grad_(False)
        for module in (vae.post_quant_conv, vae.decoder):
            module.requires_grad_(True)
    net = WholeClip(vae, fuse=device.type == "cuda")
    parameters = [p for p in vae.parameters() if p.requires_grad]
    solvers = optimizers(parameters)
    average = [p.detach().clone() for p in vae.parameters()]
    state = folder / f"{part}.pt"
    step, spent = restore(state, vae, average, solvers, device)
    source = drawn((size, size, frames), batch, "train", torch.Generator().manual_seed(1000 + step), device)
    compute = Step(net, next(source)[0], loss_of if part == "vae" else decoder_loss)
    clock = Clock(minutes, spent)
    report = Every(10)
    save = Every(60)
    while not clock.over:
        for solver, peak in zip(solvers, (MUON_RATE, ADAM_RATE), strict=True):
            for group in solver.param_groups:
                group["lr"] = peak * learning_rate(clock.progress, hold=0.3)
        loss, squared, kl = compute(next(source)[0])
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for solver in solvers:
            solver.step()
        step += 1
        with torch.no_grad():
            torch._foreach_lerp_(average, list(vae.parameters()), 1 - min(0.999, (1 + step) / (10 + step)))
        if report() or clock.over or step == 1:
            psnr = float(-10 * torch.log10(squared / 4))
            numbers = f"loss {float(loss):.4f} psnr {psnr:.2f} dB kl {float(kl):.3f}"
            print(f"{part} step {step} {clock.spent:.0f}s {numbers}", flush=True)
        if save() or clock.over:
            keep(state, vae, average, solvers, step, clock.spent)
    with torch.no_grad():
        torch._foreach_copy_(list(vae.parameters()), average)
    print(
        f"{part}: reconstruction PSNR {reconstruction_psnr(net, 32, device):.2f} dB on fresh clips",
        flush=True,
    )


def optimizers(parameters: list[Tensor]) -> list[torch.optim.Optimizer]:
    """Muon for convolution kernels (those of several output channels), AdamW for everything else."""
    kernels = [p for p in parameters if p.ndim >= 4 and p.shape[0] > 12 and p.shape[1] > 12]
    chosen = {id(p) for p in kernels}
    others = [p for p in parameters if id(p) not in chosen]
    return [
        Muon(kernels, lr=MUON_RATE),
        torch.optim.AdamW(others, ADAM_RATE, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def keep(
    path: Path,
    vae: AutoencoderKLWan,
    average: list[Tensor],
    solvers: list[torch.optim.Optimizer],
    step: int,
    spent: float,
) -> None:
    """What a restart needs (`path`), and the averaged weights alone (`vae.safetensors` beside it)."""
    state = {
        "vae": vae.state_dict(), "average": average, "solvers": [solver.state_dict() for solver in solvers],
        "step": step, "spent": spent,
    }  # fmt: skip
    torch.save(state, path.with_suffix(".part"))
    path.with_suffix(".part").rename(path)
    names = [name for name, _ in vae.named_parameters()]
    save_file(
        {n: a.cpu().contiguous() for n, a in zip(names, average, strict=True)},
        path.with_name("vae.safetensors"),
    )


def restore(
    path: Path,
    vae: AutoencoderKLWan,
    average: list[Tensor],
    solvers: list[torch.optim.Optimizer],
    device: torch.device,
) -> tuple[int, float]:
    """Take up a run where it stopped: (steps done, seconds spent). `vae.safetensors` alone is a start with
    these weights.
    """
    if not path.exists():
        if path.with_name("vae.safetensors").exists():
            vae.load_state_dict(load_file(path.with_name("vae.safetensors")))
            torch._foreach_copy_(average, [p.detach() for p in vae.parameters()])
        return 0, 0.0
    state = torch.load(path, map_location=device, weights_only=True)
    vae.load_state_dict(state["vae"])
    for solver, saved in zip(solvers, state["solvers"], strict=True):
        solver.load_state_dict(saved)
    torch._foreach_copy_(average, state["average"])
    return state["step"], state["spent"]


def load(folder: Path, device: torch.device) -> AutoencoderKLWan:
    """The averaged autoencoder of a run, in float32, for encoding and export."""
    vae = build()
    vae.load_state_dict(load_file(folder / "vae.safetensors"))
    return vae.to(device).eval().requires_grad_(False)
