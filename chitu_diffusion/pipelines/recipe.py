"""What it takes to make a video again, as JSON values. Knows a task and a backend; writes nothing."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from chitu_diffusion.attention import attention_kernel
from chitu_diffusion.backend import DiffusionBackend
from chitu_diffusion.config import AttnSchedule, EngineConfig
from chitu_diffusion.sampling.noise_levels import levels_as_lists
from chitu_diffusion.task import DiffusionTask

_PACKAGES = ("chitu-diffusion", "torch", "diffusers", "transformers")


def recipe_of(task: DiffusionTask, backend: DiffusionBackend) -> dict[str, Any]:
    """The recipe stored in a video: the request with every value filled in, the model, the machine."""
    params = (task.resolved or task.params).to_mapping()
    return {
        "prompt": params["prompt"],
        "seed": task.seed,
        "params": params,
        "model": backend.spec.name,
        "weights_sha256": backend.weights_sha256(),
        "versions": {name: _version(name) for name in _PACKAGES},
        "dtype": str(backend.dtype).removeprefix("torch."),
        "device": device_name(backend.device),
        "attention": backend.attn_backend.name,
        "attn_schedule": attn_schedule_of(backend.args),
        "fused": backend.args.infer.fused,
        "compile": backend.args.infer.compile,
        "quant": quant_of(backend.args),
        "low_mem_level": backend.low_mem_level,
        "sampler": {
            "name": backend.sampler.name,
            "shift": backend.sampler.shift if params["shift"] is None else params["shift"],
            "authors_shift": backend.spec.authors_shift,
            **levels_as_lists(backend.sampler.levels),
        },
        "quality": backend.args.output.quality,
        "seconds": {stage: round(seconds, 3) for stage, seconds in task.seconds.items()},
        **_resumed(task, backend),
    }


def _resumed(task: DiffusionTask, backend: DiffusionBackend) -> dict[str, Any]:
    """Said only where the video may differ from that of a run that was never cut short."""
    found = task.resumed
    if found is None or not found.step:
        return {}
    kernel = backend.attn_backend.name
    exact = found.exact and found.kernel == kernel
    differs = [
        *found.differs,
        *([f"attention kernel {found.kernel}, here {kernel}"] if found.kernel != kernel else []),
    ]
    return {} if exact else {"resumed": {"step": found.step, "exact": False, "differs": differs}}


def quant_of(args: EngineConfig) -> dict[str, Any] | None:
    """How linear layers were rounded; None for not at all. It is lossy, so a video says it."""
    infer = args.infer
    if infer.quant == "none":
        return None
    kept = infer.quant_keep
    begins = infer.quant_from
    originals = infer.quant_originals
    return {"name": infer.quant, "lossy": True, "keep": kept, "from": begins, "originals": originals}


def attn_schedule_of(args: EngineConfig) -> dict[str, Any] | None:
    """Which attention kernel took over after how many steps, or which share of them; None for none.

    Raises:
        UsageError: no kernel has that name.
    """
    schedule = AttnSchedule.from_text(args.infer.attn_schedule)
    if schedule is None:
        return None
    lossy = not attention_kernel(schedule.kernel, setting="infer.attn_schedule").exact
    unit = "share" if schedule.of_share else "steps"
    return {"kernel": schedule.kernel, "lossy": lossy, f"after_{unit}": float(schedule.after)}


def device_name(device: torch.device) -> str:
    """What the device is called: "cpu", or the GPU's own name."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
