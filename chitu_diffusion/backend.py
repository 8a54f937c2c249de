"""The loaded model on its device, and what goes with it: attention, solver, cache manager, offload.

A backend is an instance; several may live in one process. It lends networks and knows where they are; it runs
nothing and knows no task.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from enum import IntEnum
from pathlib import Path
from types import NoneType

import torch

from chitu_diffusion.adapters.merging import AdaptedNetwork
from chitu_diffusion.attention import AttentionKernel, attention_kernel
from chitu_diffusion.attention.autotune import KernelAutotuner, Shape
from chitu_diffusion.attention.scheduled import scheduled
from chitu_diffusion.attn_schedule import AttnSchedule
from chitu_diffusion.config import EngineConfig, cache_dir, keep_compiled_code
from chitu_diffusion.distributed.host import usable_cores
from chitu_diffusion.distributed.process_groups import ProcessGroups
from chitu_diffusion.errors import UsageError, names_checked, require_kind
from chitu_diffusion.flexcache.calibration import Calibration
from chitu_diffusion.flexcache.manager import FlexCacheManager
from chitu_diffusion.memory.device import empty_cache
from chitu_diffusion.memory.estimate import MemoryEstimate
from chitu_diffusion.memory.offload import OffloadManager, OffloadPart
from chitu_diffusion.models.components import (
    Networks,
    check_quant,
    float8_plan,
    load_networks,
    networks_without_weights,
)
from chitu_diffusion.models.kinds import EXPERT_ROLES, PARTS
from chitu_diffusion.models.registry import FoundModel, model_of
from chitu_diffusion.models.spec import ModelSpec
from chitu_diffusion.models.wan.image_encoder import ImageEncoder
from chitu_diffusion.models.wan.text_encoder import TextEncoder
from chitu_diffusion.models.wan.transformer import WanTransformer
from chitu_diffusion.models.wan.vae import WanVAE
from chitu_diffusion.ops.compile import CompileWatch
from chitu_diffusion.ops.float8_linear import float8_begins, set_float8, to_float8
from chitu_diffusion.ops.fused import HAS_TRITON
from chitu_diffusion.sampling.library import SamplerState
from chitu_diffusion.sampling.scheduler import NoiseScheduler
from chitu_diffusion.sampling.solvers import Sampler
from chitu_diffusion.task.lora import Lora

logger = logging.getLogger(__name__)

_DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


class BackendState(IntEnum):
    """Where a backend is in its life."""

    UNINITIALIZED = 0
    INITIALIZED = 1
    RUNNING = 2
    TERMINATED = 3


@names_checked
class DiffusionBackend:
    """Loads the model that the settings name, on the device and in the dtype that they name.

    A load that fails raises and leaves nothing behind.

    Args:
        args: the settings; a frozen copy is kept, so that later edits of `args` reach only backends made
            after them. None is `EngineConfig()`: the shipped `wan-tiny` on this machine's best device.
        logging_level: of the package's logger; None leaves it alone.
        groups: the ranks that share the work; None is this process alone.
        model: which, where `resolve_model` has found it already; None looks for the one that `args` names.

    Raises:
        ModelError: no such model, or a faulty checkpoint.
        UsageError: settings that this machine or this model cannot follow.
        torch.OutOfMemoryError: the weights do not fit at this memory level.
    """

    def __init__(
        self,
        args: EngineConfig | None = None,
        logging_level: int | None = None,
        groups: ProcessGroups | None = None,
        model: FoundModel | None = None,
    ) -> None:
        args = checked_args(args, model)
        require_kind("groups", groups, (ProcessGroups, NoneType), "ProcessGroups(...), or leave it out")
        model = model or model_of(args.models)
        self._begin(args, model.spec, logging_level, groups)
        encodes = self.groups.rank == 0
        try:
            self._install(load_networks(self.args, model, self.device, self.dtype, encodes=encodes))
        except BaseException:
            empty_cache(self.device)
            raise

    @classmethod
    def without_weights(
        cls, args: EngineConfig, model: FoundModel, groups: ProcessGroups | None = None
    ) -> DiffusionBackend:
        """A backend that can do nothing: its settings are checked, and its networks' sizes known."""
        backend = cls.__new__(cls)
        backend._begin(args, model.spec, None, groups)
        backend._install(networks_without_weights(backend.args, model, backend.dtype))
        return backend

    @classmethod
    def from_networks(
        cls, networks: Networks, args: EngineConfig | None = None, groups: ProcessGroups | None = None
    ) -> DiffusionBackend:
        """A backend of networks in memory. They keep their dtype and are moved to the device."""
        backend = cls.__new__(cls)
        weights = networks.experts[0].blocks.parameters()
        attended = next((weight.dtype for weight in weights if weight.ndim == 2), None)
        backend._begin(checked_args(args), networks.spec, None, groups, attended)
        backend._install(networks)
        return backend

    def _begin(
        self,
        args: EngineConfig,
        spec: ModelSpec,
        logging_level: int | None,
        groups: ProcessGroups | None,
        attended: torch.dtype | None = None,
    ) -> None:
        self.state = BackendState.UNINITIALIZED
        self._process = os.getpid()
        if logging_level is not None:
            logging.getLogger("chitu_diffusion").setLevel(logging_level)
        self.args = args.frozen_copy()
        self.groups = groups or ProcessGroups()
        _check_ranks(self.args, self.groups.plan.world)
        self.device = pick_device(self.args.infer.device)
        self.dtype = pick_dtype(self.args.infer.dtype, self.device)
        self._attention = KernelAutotuner(
            self.args.infer.attn_type,
            self.device,
            attended or self.dtype,
            spec.transformers[0].attention_head_dim,
            for_ring=self.groups.plan.ring > 1,
            folder=cache_dir(),
            all_reduce_max=self.groups.all_reduce_max if self.groups.plan.world > 1 else None,
            is_driver=self.groups.rank == 0,
        )
        self._schedule = AttnSchedule.from_text(self.args.infer.attn_schedule)
        self._late = (
            None
            if self._schedule is None
            else attention_kernel(
                self._schedule.kernel,
                for_ring=self.groups.plan.ring > 1,
                device=self.device,
                dtype=attended or self.dtype,
                head_dim=spec.transformers[0].attention_head_dim,
                setting="infer.attn_schedule",
            )
        )
        self.flexcache_manager = FlexCacheManager(self.groups.all_reduce_max)
        if self.args.infer.threads is not None:
            torch.set_num_threads(self.args.infer.threads)
        elif usable_cores() < torch.get_num_threads():  # torch knows no container's quota
            torch.set_num_threads(usable_cores())
        self._watch: CompileWatch | None = None
        check_quant(self.args, self.device, self.dtype)

    def _install(self, networks: Networks) -> None:
        for network in networks.parts.values():
            network.eval().requires_grad_(False)
        if self.args.infer.fused and self.device.type == "cuda" and not HAS_TRITON:
            logger.warning(
                "infer.fused = true: Triton is not there (pip install triton); norms take several passes"
            )
        plan = float8_plan(self.args)
        self._float8 = [
            [] if plan is None else to_float8(list(expert.blocks), plan, expert.vace_blocks)
            for expert in networks.experts
        ]
        for expert in networks.experts:
            expert.use_fused(self.args.infer.fused)
        if self.args.infer.compile:
            keep_compiled_code()
            self._watch = CompileWatch()
            for expert in networks.experts:
                expert.compile_blocks()
        networks = replace(networks, spec=networks.spec.with_sampler(self.args.infer.sampler))
        self.sampler = networks.sampler(None)
        self._samplers: dict[str, Sampler] = {}
        self.offload = OffloadManager(
            self.device,
            parts={
                role: OffloadPart(
                    part, PARTS[role].kind, part.stack if isinstance(part, WanTransformer) else ()
                )
                for role, part in networks.parts.items()
            },
            level=self.args.infer.diffusion.low_mem_level,
        )
        self.offload.place()
        self._adapted = [
            AdaptedNetwork(expert, self.device, self.offload, role, networks.originals.get(role), index)
            for index, (role, expert) in enumerate(zip(EXPERT_ROLES, networks.experts, strict=False))
        ]
        if self.args.infer.diffusion.low_mem_level >= 1:
            # real in training; under inference, where nothing is kept for a backward pass, it costs and saves
            # nothing
            for expert in networks.experts:
                expert.enable_gradient_checkpointing()
        self._networks: Networks | None = networks
        self.state = BackendState.INITIALIZED

    @property
    def attn_backend(self) -> AttentionKernel:
        """The kernel of self-attention, after `choose_attention` the fastest; one that is put here stays."""
        return self._attention.kernel

    @attn_backend.setter
    def attn_backend(self, kernel: AttentionKernel) -> None:
        self._attention.pin(kernel)

    @property
    def attention(self) -> AttentionKernel:
        """What forwards attend with: `attn_backend`, and late in a task `infer.attn_schedule`'s kernel."""
        if self._schedule is None or self._late is None:
            return self.attn_backend
        return scheduled(self.attn_backend, self._late, self._schedule.begins)

    def choose_attention(self, tokens: int, expert: int = 0) -> None:
        """Let `attn_backend` be right for forwards over `tokens` tokens, shared by all ranks; every rank must
        ask alike.

        Raises:
            UsageError: rank 0 found a kernel that cannot run on this rank.
        """
        config = self._alive().spec.transformers[expert]
        plan = self.groups.plan
        shape = Shape(
            -(-tokens // plan.ring),
            max(1, config.num_attention_heads // plan.ulysses),
            config.attention_head_dim,
        )
        self._attention.for_shape(shape, epoch=self.groups.generation)

    @property
    def spec(self) -> ModelSpec:
        """The model without its weights."""
        return self._alive().spec

    @property
    def model_pool(self) -> Sequence[WanTransformer]:
        """The transformers: one, or high noise and low noise."""
        return self._alive().experts

    @property
    def text_encoder(self) -> TextEncoder:
        """Prompts to embeddings; on ranks but the first it has no weights."""
        return self._alive().text_encoder

    @property
    def image_encoder(self) -> ImageEncoder:
        """Pictures to rows, likewise; of a model that has one."""
        return self._alive().image_encoder

    @property
    def vae(self) -> WanVAE:
        """Latents to videos."""
        return self._alive().vae

    @property
    def low_mem_level(self) -> int:
        """The memory level: as the settings said, or higher since."""
        return self.offload.level

    @low_mem_level.setter
    def low_mem_level(self, level: int) -> None:
        self.require_alive()
        require_kind("low_mem_level", level, int, "0 to 4")
        self.offload.set_level(level)

    def scheduler(self, num_steps: int | None = None, seed: int = 0) -> NoiseScheduler:
        """The model's solver as an object that remembers where it is, for a denoising loop of one's own.

        Args:
            num_steps: denoising steps; None is the model's own number.
            seed: of fresh noise, for a solver that takes some.

        Raises:
            UsageError (a ValueError): a number of steps that the solver cannot take; says what it can.
        """
        steps = self.spec.defaults.steps if num_steps is None else num_steps
        return NoiseScheduler(self.sampler, steps, seed)

    def sampler_for(self, recipe: str | None) -> Sampler:
        """The solver with a recipe's schedule; None is the model's own.

        Raises:
            UsageError: no such recipe, or not for this model.
        """
        if recipe in (None, self.sampler.recipe):
            return self.sampler
        if recipe not in self._samplers:
            self._samplers[recipe] = self._alive().sampler(recipe)
        return self._samplers[recipe]

    def use_calibration(self, calibration: Calibration | None) -> None:
        """Let caches rest on these measurements from the next task on."""
        networks = self._alive()
        self._networks = replace(networks, spec=replace(networks.spec, calibration=calibration))

    def set_precision(self, expert: int, timestep: float, state: SamplerState | None = None) -> bool:
        """Ready an expert's layers for a step: 8 bits from where the settings say, 16 before. True for 8.

        Args:
            state: of the task's solver, for its schedule; None is the model's own.
        """
        layers = self._float8[expert]
        share = self.args.infer.quant_from
        sampler = self.sampler if state is None else self.sampler_for(state["recipe"])
        levels = sampler.levels
        shift = sampler.shift if state is None else state["shift"]
        begins = float8_begins(share, shift) if levels is None else levels.time_after(share)
        in_float8 = bool(layers) and timestep <= begins
        set_float8(layers, in_float8, self.device)
        return in_float8

    def use_adapters(self, loras: Sequence[Lora] | None = None) -> None:
        """Merge these adapters into the transformers, and only these, until the next call; None is none. A
        UsageError as `AdaptedNetwork.use`."""
        self.require_alive()
        for adapted in self._adapted:
            adapted.use(loras or ())

    def compile_note(self) -> str | None:
        """What was compiled since the last call; None for nothing."""
        return None if self._watch is None else self._watch.take()

    def start(self) -> None:
        """Enter the running state."""
        self.require_alive()
        self.state = BackendState.RUNNING

    def require_alive(self) -> None:
        """Raise if there is nothing to run on.

        Raises:
            UsageError: the backend is terminated.
        """
        self._alive()

    def terminate(self) -> None:
        """Let go of every network; silent the second time."""
        if self._networks is not None:
            if self._watch is not None:
                self._watch.close()
            self.offload.close()
            del self.offload
            del self._adapted
            if self._networks.folder is not None:
                self._networks.folder.close()
            self._networks = None
            empty_cache(self.device)
        self.state = BackendState.TERMINATED

    def memory_estimate(self) -> MemoryEstimate:
        """What a memory estimate is made from."""
        config = self.spec.transformers[0]
        return MemoryEstimate(
            parts=self.offload.part_bytes(),
            block=self.offload.largest_block_bytes(),
            dim=config.dim,
            ffn_dim=config.ffn_dim,
            vae_stage=self.vae.last_stage,
            item=self.dtype.itemsize,
            on_cpu=self.device.type == "cpu",
            encodes_video=self.spec.kind.needs_image or self.spec.kind.takes_control,
            has_control=self.spec.kind.takes_control,
        )

    def weights_sha256(self) -> str | None:
        """SHA-256 over the weights that were loaded; waits, and says so, where it is not known yet. None for
        networks made in memory, and for files that were written into before anybody could hash them.
        """
        loaded = self._alive().folder
        return None if loaded is None else loaded.sha256()

    @property
    def config_sha256(self) -> str | None:
        """SHA-256 over configs and tokenizer; None for networks made in memory."""
        return self._alive().config_sha256

    def weights_are_hashed(self) -> bool:
        """Whether `weights_sha256` would not wait."""
        loaded = self._alive().folder
        return loaded is None or loaded.is_known

    def _alive(self) -> Networks:
        if os.getpid() != self._process:
            raise UsageError(
                "this process was forked from the one that loaded the model, and lacks its threads; start "
                "it with multiprocessing.get_context('spawn'), and make the engine in it"
            )
        if self.state is BackendState.UNINITIALIZED or self._networks is None:
            raise UsageError("this backend is terminated; make a new one with DiffusionBackend(args)")
        return self._networks


def pick_device(name: str) -> torch.device:
    """The device that a setting means, with its index.

    Raises:
        UsageError: a device that torch or this machine does not have.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(
            f"device = {name!r}: use 'auto', 'cpu', 'cuda' or 'cuda:N'", field="infer.device"
        ) from None
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type != "cuda":
        raise UsageError(f"device = {name!r}: use 'auto', 'cpu', 'cuda' or 'cuda:N'", field="infer.device")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    index = device.index if device.index is not None else (torch.cuda.current_device() if count else 0)
    if index >= count:
        raise UsageError(
            f"device = {name!r}: this machine has {count} CUDA device(s); use 'auto' or 'cpu'",
            field="infer.device",
        )
    return torch.device("cuda", index)


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype that a setting means on a device."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return _DTYPES[name]


def checked_args(args: object, model: object = None) -> EngineConfig:
    """The settings; None is all defaults.

    Raises:
        UsageError: something else, or a model that `resolve_model` did not find; says the line that is right.
    """
    if not isinstance(model, FoundModel | None):
        raise UsageError(
            f'model = {model!r}: choose a model by EngineConfig(models={{"name": "{model}"}})', field="model"
        )
    if args is None:
        return EngineConfig()
    if isinstance(args, EngineConfig):
        return args
    remedy = "EngineConfig(infer={...}, ...), or nothing for the shipped model"
    if isinstance(args, str | Path):
        remedy = f'a model is chosen by EngineConfig(models={{"name": "{args}"}})'
    elif isinstance(args, Mapping):
        remedy = (
            "use EngineConfig(**settings), or load_config(flags={'infer.device': 'cpu'})[0] for dotted names"
        )
    raise UsageError(
        f"args is a {type(args).__name__}; use EngineConfig, which checks names and values: {remedy}",
        field="args",
    )


def _check_ranks(args: EngineConfig, world: int) -> None:
    """A setting that asks for more ranks than there are is refused, not passed over."""
    for name, value in (
        ("cfg_size", args.infer.diffusion.cfg_size),
        ("cp_size", args.infer.diffusion.cp_size),
    ):
        if value > world:
            field = f"infer.diffusion.{name}"
            raise UsageError(
                f"{field} = {value}: this engine runs on {world} rank(s); use {world}, or start {value} "
                "ranks with --gpus or torchrun",
                field=field,
            )
