"""The same random network in every way of running it that is compared: ours by the engine's settings,
diffusers' by its users' recipes.

Knows how each is built and what one forward of it is; measures nothing. A way that this machine or this
version does not have raises `Absent`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import peers
from benchmarks.measuring import synchronise
from chitu_diffusion.backend import DiffusionBackend
from chitu_diffusion.config import EngineConfig, InferSettings
from chitu_diffusion.errors import UsageError
from chitu_diffusion.models.components import Networks
from chitu_diffusion.models.folder import read_folder
from chitu_diffusion.models.loading import load_text_encoder, load_vae
from chitu_diffusion.models.registry import ASSETS, TINY
from chitu_diffusion.models.spec import ModelSpec
from chitu_diffusion.models.wan.config import WanConfig
from chitu_diffusion.models.wan.presets import FULL_SIZE
from chitu_diffusion.models.wan.text_encoder import TextEncoder
from chitu_diffusion.models.wan.transformer import KEEP_FLOAT32, WanTransformer
from chitu_diffusion.models.wan.vae import WanVAE
from chitu_diffusion.pipelines import denoising


class Absent(Exception):
    """This way of running is not there: what is missing, in a sentence."""


@dataclass(frozen=True)
class Case:
    """A network and a size of video.

    Attributes:
        name: what tables call it.
        spec: the model, its transformer with as many layers as are timed.
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
    spec, (width, height, frames) = FULL_SIZE[model], size
    whole = spec.transformers[0]
    config = replace(whole, num_layers=timed_layers or whole.num_layers)
    label = f"{model.removeprefix('Wan2.1-T2V-')} {width}x{height}x{frames}"
    if config.num_layers < whole.num_layers:
        label += f", timed on {config.num_layers} of {whole.num_layers} layers"
    return Case(
        label, replace(spec, transformers=(config,), boundary=None), height, width, frames, whole.num_layers
    )


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
def random_weights(
    config: WanConfig, device: torch.device, dtype: torch.dtype, seed: int = 0
) -> dict[str, Tensor]:
    """Random weights by name, on the device, in the dtypes in which a checkpoint is loaded.

    Normal with the deviation 1 / sqrt(inputs), so that activations keep their size from layer to layer;
    norms' weights are 1.
    """
    generator = torch.Generator(device).manual_seed(seed)
    with torch.device("meta"):
        shapes = WanTransformer(config).state_dict()
    found = {}
    for name, shape in shapes.items():
        kept = any(part in name.split(".") for part in KEEP_FLOAT32)
        value = torch.empty(shape.shape, device=device, dtype=torch.float32 if kept else dtype)
        if shape.ndim == 1 and name.endswith("weight"):
            value.fill_(1)
        else:
            inputs = shape[0].numel() if shape.ndim > 1 else shape.numel()
            value.normal_(std=inputs**-0.5, generator=generator)
        found[name] = value
    return found


class Bench:
    """What a case's variants share: weights, inputs, and the parts of a backend that a forward does not use.

    Args:
        case: network and size.
        device: where.
        compiler: `torch.compile`'s backend; "eager" traces without making kernels.
    """

    def __init__(self, case: Case, device: torch.device, compiler: str = "inductor") -> None:
        self.case, self.device, self.compiler = case, device, compiler
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        """Of the network."""
        return random_weights(self.case.config, self.device, self.dtype)

    @cached_property
    def latent(self) -> Tensor:
        """[1, C, T, H, W] float32 noise, as the solver holds it."""
        return torch.randn(self.case.latent_shape, generator=torch.Generator().manual_seed(1)).to(self.device)

    @cached_property
    def text(self) -> Tensor:
        """[2, L, D]: the prompt's branch with 40 rows, the negative one with 130, zeros behind, as an encoder
        gives them.
        """
        shape = (2, self.case.spec.text_tokens, self.case.config.text_dim)
        text = torch.randn(shape, generator=torch.Generator().manual_seed(2))
        text[0, 40:] = 0
        text[1, 130:] = 0
        return text.to(self.device, self.dtype)

    @cached_property
    def timestep(self) -> Tensor:
        """[1]."""
        return torch.tensor([500.0], device=self.device)

    def network(self) -> WanTransformer:
        """A network of ours that shares the weights."""
        with torch.device("meta"):
            network = WanTransformer(self.case.config)
        network.load_state_dict(self.weights, strict=True, assign=True)
        return network

    @cached_property
    def _ends(self) -> tuple[TextEncoder, WanVAE]:
        """wan-tiny's encoder and VAE: a forward needs neither, a backend wants both."""
        folder = read_folder(ASSETS / TINY)
        encoder = load_text_encoder(folder, device=self.device, dtype=self.dtype)
        return encoder, load_vae(folder, device=self.device, dtype=self.dtype)

    def backend(
        self, settings: Mapping[str, Any], encoder: TextEncoder | None = None, vae: WanVAE | None = None
    ) -> DiffusionBackend:
        """A backend of ours with settings of `infer`.

        Raises:
            Absent: a setting or a kernel that is not there.
        """
        try:
            args = EngineConfig(infer={"device": str(self.device), **known(settings)})
            ends = (encoder or self._ends[0], vae or self._ends[1])
            networks = Networks(self.case.spec, [self.network()], *ends, read_folder(ASSETS / TINY).scheduler)
            return DiffusionBackend.from_networks(networks, args)
        except (UsageError, ImportError) as error:
            raise Absent(str(error)) from error


@dataclass
class Variant:
    """One way of running, ready to be timed.

    Attributes:
        call: one or two forwards.
        forwards: how many; ours runs both guidance branches, for it shares work between them.
        warm_up: seconds of the first call: compiling, choosing kernels.
        weights: bytes of its parameters.
        velocity: [1, C, T, H, W] of the prompt's branch: every variant must find about the same.
        backend: ours.
        settings: of `infer`, ours.
    """

    call: Callable[[], object]
    forwards: int
    warm_up: float
    weights: int
    velocity: Tensor
    backend: DiffusionBackend | None = None
    settings: Mapping[str, Any] | None = None


Builder = Callable[[Bench], Variant]


def ours(**settings: Any) -> Builder:
    """Our engine with some settings of `infer`: a guided step's two forwards."""

    def build(bench: Bench) -> Variant:
        if settings.get("compile") and bench.device.type != "cuda":
            raise Absent("compiling takes minutes on a CPU, and is worth it on a GPU alone")
        backend = bench.backend(settings)
        text, moment = as_task_text(bench.text), bench.timestep[0].cpu()  # where the solver keeps it

        def call() -> Tensor:
            with torch.no_grad():
                return denoising.predict_velocity(backend, bench.latent, text, moment, expert=0)

        velocity, warm_up = first_call(call, bench.device)
        return Variant(call, 2, warm_up, weight_bytes(backend.model_pool[0]), velocity[:1], backend, settings)

    return build


def diffusers(
    attention: str | None = None, *, compile: bool = False, eight_bit: bool = False, tuned: bool = True
) -> Builder:
    """diffusers' transformer: one forward of the prompt's branch.

    Args:
        attention: one of diffusers' attention backends; None is its default.
        compile: its repeated blocks.
        eight_bit: torchao's linear layers and attention.
        tuned: with torchao's own options for the compiler.
    """

    def build(bench: Bench) -> Variant:
        if bench.device.type != "cuda" and (attention is not None or eight_bit):
            raise Absent(f"{attention or 'torchao 8 bit'} needs a GPU")
        model: Any = peers.twin(bench.case.config, bench.weights, bench.device)
        with peers.compiler_settings_kept():
            shell: nn.Module = model
            if eight_bit:
                peers.eight_bit_linears(model, tuned)
                shell = peers.eight_bit_attention(model)
            # named always: diffusers keeps the backend of the last model for all that come after
            model.set_attention_backend(attention or "native")
            call = peers.one_forward(shell, bench.latent.to(bench.dtype), bench.timestep, bench.text[:1])
            velocity, warm_up = (
                compiled_call(model, call, bench) if compile else first_call(call, bench.device)
            )
        return Variant(call, 1, warm_up, weight_bytes(model), velocity)

    def checked(bench: Bench) -> Variant:
        try:
            return build(bench)
        except ImportError as error:
            raise Absent(str(error)) from error

    return checked


def known(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of `infer` without those that switch off what this version does not have anyway."""
    return {
        name: value
        for name, value in settings.items()
        if name in InferSettings.model_fields or value is not False
    }


def as_task_text(embeddings: Tensor) -> Any:
    """Embeddings [branches, L, D] as `denoising.predict_velocity` takes them: what depends on the prompt
    alone is kept.
    """
    keeper = getattr(denoising, "TaskText", None)
    return embeddings if keeper is None else keeper(embeddings)


def compiled_call(model: Any, call: Callable[[], Tensor], bench: Bench) -> tuple[Tensor, float]:
    """diffusers' blocks compiled, as one graph each if that can be, and their first call; static shapes, the
    fastest form.
    """
    try:
        model.compile_repeated_blocks(backend=bench.compiler, fullgraph=True, dynamic=False)
        return first_call(call, bench.device)
    except torch._dynamo.exc.TorchDynamoException as error:
        print(f"a block is not one graph: {str(error).splitlines()[0]}", flush=True)
        model.compile_repeated_blocks(backend=bench.compiler, fullgraph=False, dynamic=False)
        return first_call(call, bench.device)


def first_call(call: Callable[[], Tensor], device: torch.device) -> tuple[Tensor, float]:
    """What it gives, and its seconds, the device drained."""
    synchronise(device)
    began = time.perf_counter()
    found = call()
    synchronise(device)
    return found, time.perf_counter() - began


def weight_bytes(network: nn.Module) -> int:
    """Bytes of parameters and buffers; of torchao's packed tensors those of their parts."""
    total = 0
    for tensor in {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}.values():
        names = tensor.__tensor_flatten__()[0] if hasattr(tensor, "__tensor_flatten__") else None
        parts = [getattr(tensor, name) for name in names] if names else [tensor]
        total += sum(part.numel() * part.element_size() for part in parts if isinstance(part, Tensor))
    return total
