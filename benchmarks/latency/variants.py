"""The same random network in every way of running it that is compared: ours by the engine's settings,
diffusers' by its users' recipes.

Knows how each is built and what one forward of it is; measures nothing. A way that this machine or this
version does not have raises `Absent`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.latency import peers
from benchmarks.measuring import synchronise
from benchmarks.networks import Workload
from chitu_diffusion.backend import DiffusionBackend
from chitu_diffusion.config import EngineConfig
from chitu_diffusion.errors import UsageError
from chitu_diffusion.models.wan.text_encoder import TextEncoder
from chitu_diffusion.models.wan.vae import WanVAE


class Absent(Exception):
    """This way of running is not there: what is missing, in a sentence."""


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


Builder = Callable[[Workload], Variant]


def ours(**settings: Any) -> Builder:
    """Our engine with some settings of `infer`: a guided step's two forwards."""

    def build(work: Workload) -> Variant:
        if settings.get("compile") and work.device.type != "cuda":
            raise Absent("compiling takes minutes on a CPU, and is worth it on a GPU alone")
        backend = backend_of(work, settings)
        call = work.step(backend)
        velocity, warm_up = first_call(call, work.device)
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

    def build(work: Workload) -> Variant:
        if work.device.type != "cuda" and (attention is not None or eight_bit):
            raise Absent(f"{attention or 'torchao 8 bit'} needs a GPU")
        model: Any = peers.twin(work.case.config, work.weights, work.device)
        with peers.compiler_settings_kept():
            shell: nn.Module = model
            if eight_bit:
                peers.eight_bit_linears(model, tuned)
                shell = peers.eight_bit_attention(model)
            # named always: diffusers keeps the backend of the last model for all that come after
            model.set_attention_backend(attention or "native")
            call = peers.one_forward(shell, work.latent.to(work.dtype), work.timestep, work.text[:1])
            velocity, warm_up = compiled_call(model, call, work) if compile else first_call(call, work.device)
        return Variant(call, 1, warm_up, weight_bytes(model), velocity)

    def checked(work: Workload) -> Variant:
        try:
            return build(work)
        except ImportError as error:
            raise Absent(str(error)) from error

    return checked


def backend_of(
    work: Workload, settings: Mapping[str, Any], encoder: TextEncoder | None = None, vae: WanVAE | None = None
) -> DiffusionBackend:
    """A backend of ours with settings of `infer`.

    Raises:
        Absent: a setting or a kernel that is not there.
    """
    try:
        args = EngineConfig(infer={"device": str(work.device), **settings})
        return work.backend(args, encoder, vae)
    except (UsageError, ImportError) as error:
        raise Absent(str(error)) from error


def compiled_call(model: Any, call: Callable[[], Tensor], work: Workload) -> tuple[Tensor, float]:
    """diffusers' blocks compiled, as one graph each if that can be, and their first call; static shapes, the
    fastest form.
    """
    try:
        model.compile_repeated_blocks(backend=work.compiler, fullgraph=True, dynamic=False)
        return first_call(call, work.device)
    except torch._dynamo.exc.TorchDynamoException as error:
        print(f"a block is not one graph: {str(error).splitlines()[0]}", flush=True)
        model.compile_repeated_blocks(backend=work.compiler, fullgraph=False, dynamic=False)
        return first_call(call, work.device)


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


EXACT_PEERS: Mapping[str, Builder] = {
    "diffusers_eager": diffusers(),
    "diffusers_compiled_cudnn": diffusers("_native_cudnn", compile=True),
    "diffusers_compiled_fa3": diffusers("_flash_3", compile=True),
}
EIGHT_BIT_PEERS: Mapping[str, Builder] = {
    "diffusers_compiled_fa3": diffusers("_flash_3", compile=True),
    "diffusers_compiled_torchao_fp8": diffusers(compile=True, eight_bit=True),
}
UNTUNED_PEER: Mapping[str, Builder] = {
    "diffusers_compiled_torchao_fp8_untuned": diffusers(compile=True, eight_bit=True, tuned=False)
}
"""For 14B: the elements between products are a smaller share there, and tuning them takes minutes."""
OURS_EXACT: Mapping[str, Builder] = {
    "ours_eager": ours(attn_type="auto", fused=False),
    "ours_auto": ours(attn_type="auto"),
    "ours_cudnn": ours(attn_type="cudnn"),
    "ours_fa3": ours(attn_type="fa3"),
    "ours_batched": ours(attn_type="auto", diffusion={"cfg_batch": "batched"}),
}
OURS_COMPILED: Mapping[str, Builder] = {
    "ours_compiled": ours(attn_type="auto", compile=True, fused=False),
    "ours_fused_compiled": ours(attn_type="auto", compile=True),
}
OURS_EIGHT_BIT: Mapping[str, Builder] = {
    "ours_fp8": ours(attn_type="fa3_fp8", quant="fp8"),
    "ours_fp8_all": ours(attn_type="fa3_fp8", quant="fp8", quant_keep="", quant_originals=False),
    "ours_fp8_all_compiled": ours(
        attn_type="fa3_fp8", quant="fp8", quant_keep="", quant_originals=False, compile=True
    ),
    "ours_fp8_all_batched": ours(
        attn_type="fa3_fp8",
        quant="fp8",
        quant_keep="",
        quant_originals=False,
        diffusion={"cfg_batch": "batched"},
    ),
}
"""`ours_fp8` keeps the first and the last block in 16 bits, as the settings' defaults do; "all" keeps none,
as torchao does.
"""
OUR_GUESS: Mapping[bool, str] = {False: "ours_auto", True: "ours_fp8_all"}
PEERS_GUESS: Mapping[bool, str] = {False: "diffusers_compiled_fa3", True: "diffusers_compiled_torchao_fp8"}
"""Whether 8 bits -> which is taken for the fastest where none was timed."""
EVERY: Mapping[str, Builder] = {
    "diffusers_compiled": diffusers(compile=True),
    **EXACT_PEERS,
    **EIGHT_BIT_PEERS,
    **UNTUNED_PEER,
    **OURS_EXACT,
    **OURS_COMPILED,
    **OURS_EIGHT_BIT,
}


def chosen(names: Iterable[str | None]) -> dict[str, Builder]:
    """Variants by name, each once."""
    return {name: EVERY[name] for name in names if name is not None}
