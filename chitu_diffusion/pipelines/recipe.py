"""What it takes to make a video again, as JSON values. Knows a task and a backend; writes nothing."""

from __future__ import annotations

from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from chitu_diffusion.backend import DiffusionBackend
from chitu_diffusion.pipelines.fingerprint import fingerprint_of
from chitu_diffusion.task import DiffusionTask

_PACKAGES = ("chitu-diffusion", "torch", "diffusers", "transformers")


def recipe_of(task: DiffusionTask, backend: DiffusionBackend) -> dict[str, Any]:
    """The recipe stored in a video: the request with every value filled in, the model, the machine."""
    params = (task.resolved or task.params).to_mapping()
    made = fingerprint_of(backend, params["shift"], params["sampler_recipe"])
    return {
        "prompt": params["prompt"],
        "seed": task.seed,
        "params": params,
        "model": backend.spec.name,
        **made,
        "sampler": {**made["sampler"], "authors_shift": backend.spec.authors_shift},
        "versions": {name: _version(name) for name in _PACKAGES},
        "device": device_name(backend.device),
        "fused": backend.args.infer.fused,
        "compile": backend.args.infer.compile,
        "low_mem_level": backend.low_mem_level,
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


def device_name(device: torch.device) -> str:
    """What the device is called: "cpu", or the GPU's own name."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


@cache
def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
