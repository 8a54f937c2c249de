"""Networks of any size with random weights, and the inputs of their forwards: what benchmarks compute with.

Knows how a backend is made of such a network, and what a guided step of it is; measures nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from chitu_diffusion.backend import DiffusionBackend
from chitu_diffusion.config import EngineConfig
from chitu_diffusion.distributed.process_groups import ProcessGroups
from chitu_diffusion.models.components import Networks
from chitu_diffusion.models.folder import read_folder
from chitu_diffusion.models.kinds import EXPERT_ROLES
from chitu_diffusion.models.loading import load_text_encoder, load_vae
from chitu_diffusion.models.registry import ASSETS, TINY
from chitu_diffusion.models.spec import ModelSpec
from chitu_diffusion.models.wan.config import WanConfig
from chitu_diffusion.models.wan.presets import FULL_SIZE
from chitu_diffusion.models.wan.text_encoder import TextEncoder
from chitu_diffusion.models.wan.transformer import KEEP_FLOAT32, WanTransformer
from chitu_diffusion.models.wan.vae import WanVAE
from chitu_diffusion.pipelines import denoising
from chitu_diffusion.pipelines.conditioning import PreparedConditioning

PROMPT_ROWS = (40, 130)
"""Text rows that are not zero: of a prompt, and of Wan's negative one."""


@dataclass(frozen=True)
class Case:
    """A network and a size of video.

    Attributes:
        name: what tables call it.
        spec: the model, its transformer with as many layers as are timed.
        height, width, frames: of the video, in pixels.
        layers: of the whole model; more than are timed where the time is carried over to them.
    """

    name: str
    spec: ModelSpec
    height: int
    width: int
    frames: int
    layers: int

    @property
    def config(self) -> WanConfig:
        """Of the network that is timed."""
        return self.spec.transformers[0]

    @property
    def tokens(self) -> int:
        """Length of the sequence."""
        return self.spec.tokens(self.frames, self.height, self.width)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """[1, C, T, H, W]."""
        return (1, *self.spec.geometry.latent_shape(self.frames, self.height, self.width))


def case_of(model: str, size: tuple[int, int, int], timed_layers: int | None = None) -> Case:
    """A full-size model at (width, height, frames), with some of its layers or all."""
    spec = FULL_SIZE[model]
    width, height, frames = size
    whole = spec.transformers[0]
    config = replace(whole, num_layers=timed_layers or whole.num_layers)
    label = f"{model.removeprefix('Wan2.1-T2V-')} {width}x{height}x{frames}"
    if config.num_layers < whole.num_layers:
        label += f", timed on {config.num_layers} of {whole.num_layers} layers"
    one_expert = replace(spec, transformers=(config,), boundary=None)
    return Case(label, one_expert, height, width, frames, whole.num_layers)


def small_case(name: str, layers: int, timed_layers: int) -> Case:
    """A network that a CPU runs in a blink, to see that a benchmark works."""
    if timed_layers < layers:
        name += f", timed on {timed_layers} of {layers} layers"
    config = WanConfig(
        num_attention_heads=2, attention_head_dim=64, ffn_dim=256, text_dim=128, num_layers=timed_layers
    )
    spec = replace(FULL_SIZE["Wan2.1-T2V-1.3B"], transformers=(config,))
    return Case(name, spec, 64, 64, 5, layers)


@torch.no_grad()
def filled(
    network: nn.Module, device: torch.device, dtype: torch.dtype, keep: Sequence[str] = (), seed: int = 0
) -> nn.Module:
    """A network from the meta device with random weights: normal with the deviation 1 / sqrt(inputs), so that
    activations keep their size from layer to layer; norms are 1.

    Args:
        network: on the meta device.
        device, dtype: where and as what.
        keep: parts of parameters' names that stay float32, as a checkpoint is loaded.
        seed: the same seed gives the same weights on the same kind of device.
    """
    for name, parameter in network.named_parameters():
        if set(name.split(".")).isdisjoint(keep):
            parameter.data = parameter.data.to(dtype)
    network.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(seed)
    for name, parameter in network.named_parameters():
        if parameter.ndim > 1 and "gamma" not in name:
            parameter.normal_(std=parameter[0].numel() ** -0.5, generator=generator)
        elif name.endswith("bias"):
            parameter.normal_(std=parameter.numel() ** -0.5, generator=generator)
        else:
            parameter.fill_(1.0)
    return network.eval().requires_grad_(False)


def random_transformer(config: WanConfig, device: torch.device, dtype: torch.dtype) -> WanTransformer:
    """A transformer with random weights, in the dtypes of a loaded checkpoint."""
    with torch.device("meta"):
        network = WanTransformer(config)
    filled(network, device, dtype, KEEP_FLOAT32)
    return network


def random_vae(config: Mapping[str, Any], device: torch.device, dtype: torch.dtype) -> WanVAE:
    """diffusers' VAE with random weights; an empty config is the full-size one."""
    from diffusers import AutoencoderKLWan

    with torch.device("meta"):
        network: Any = AutoencoderKLWan.from_config({"_class_name": "AutoencoderKLWan", **config})
    return WanVAE(filled(network, device, dtype))


class Workload:
    """A case's weights and inputs, shared by every way of running it.

    Args:
        case: network and size.
        device: where; bfloat16 on a GPU, float32 on a CPU.
        compiler: `torch.compile`'s backend; "eager" traces without making kernels.
        like: another size of the same network, whose weights this one takes.
    """

    def __init__(
        self, case: Case, device: torch.device, compiler: str = "inductor", like: Workload | None = None
    ) -> None:
        self.case = case
        self.device = device
        self.compiler = compiler
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self._like = like
        self._weights: dict[str, Tensor] | None = None

    @property
    def weights(self) -> dict[str, Tensor]:
        """Of the network, by name; drawn when they are first asked for."""
        if self._like is not None:
            return self._like.weights
        if self._weights is None:
            self._weights = random_transformer(self.case.config, self.device, self.dtype).state_dict()
        return self._weights

    def release(self) -> None:
        """Lets go of the weights; the same are drawn when they are asked for again."""
        self._weights = None

    @cached_property
    def latent(self) -> Tensor:
        """[1, C, T, H, W] float32 noise, as the solver holds it."""
        return torch.randn(self.case.latent_shape, generator=torch.Generator().manual_seed(1)).to(self.device)

    @cached_property
    def text(self) -> Tensor:
        """[2, L, D]: the prompt's branch and the negative one's, zeros behind, as an encoder gives them."""
        shape = (2, self.case.spec.text_tokens, self.case.config.text_dim)
        text = torch.randn(shape, generator=torch.Generator().manual_seed(2))
        for branch, rows in enumerate(PROMPT_ROWS):
            text[branch, rows:] = 0
        return text.to(self.device, self.dtype)

    @cached_property
    def timestep(self) -> Tensor:
        """[1]."""
        return torch.tensor([500.0], device=self.device)

    def network(self, dtype: torch.dtype | None = None) -> WanTransformer:
        """A network of ours that shares the weights, or with copies of them in another dtype."""
        with torch.device("meta"):
            network = WanTransformer(self.case.config)
        weights = self.weights if dtype is None else {k: x.to(dtype) for k, x in self.weights.items()}
        network.load_state_dict(weights, strict=True, assign=True)
        return network.eval().requires_grad_(False)

    @cached_property
    def _ends(self) -> tuple[TextEncoder, WanVAE]:
        """wan-tiny's encoder and VAE: a forward needs neither, a backend wants both."""
        folder = read_folder(ASSETS / TINY)
        encoder = load_text_encoder(folder, device=self.device, dtype=self.dtype)
        return encoder, load_vae(folder, device=self.device, dtype=self.dtype)

    def backend(
        self,
        args: EngineConfig,
        encoder: TextEncoder | None = None,
        vae: WanVAE | None = None,
        groups: ProcessGroups | None = None,
    ) -> DiffusionBackend:
        """The engine's own backend of this network.

        Raises:
            UsageError: a setting or a kernel that is not there.
        """
        ends = (encoder or self._ends[0], vae or self._ends[1])
        experts = [self.network()] * len(self.case.spec.transformers)
        parts = {"text_encoder": ends[0], **dict(zip(EXPERT_ROLES, experts, strict=False)), "vae": ends[1]}
        networks = Networks(self.case.spec, parts, read_folder(ASSETS / TINY).scheduler)
        return DiffusionBackend.from_networks(networks, args, groups)

    def step(self, backend: DiffusionBackend) -> Callable[[], Tensor]:
        """A guided step: both branches' velocities [2, C, T, H, W], as the engine computes them."""
        text = PreparedConditioning(self.text)
        moment = self.timestep[0].cpu()  # where the solver keeps it

        def call() -> Tensor:
            with torch.no_grad():
                return denoising.predict_velocity(backend, self.latent, text, moment, expert=0)

        return call
