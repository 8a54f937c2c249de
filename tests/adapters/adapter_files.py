"""Small adapters with random numbers, in the formats that people have, and what they mean in float64."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

RANK = 3
ALPHA = 1.5


def factors(shape: tuple[int, ...], strength: float = 0.3) -> tuple[Tensor, Tensor]:
    """down [r, in, ...], up [out, r, 1 ...] for a weight [out, in, ...]."""
    down = torch.randn(RANK, *shape[1:]) * strength
    up = torch.randn(shape[0], RANK, *[1] * (len(shape) - 2)) * strength
    return down, up


def product(down: Tensor, up: Tensor, scale: float = 1.0) -> Tensor:
    """What the factors add to the weight, float64."""
    change = up.double().flatten(1) @ down.double().flatten(1)
    return scale * change.reshape(up.shape[0], *down.shape[1:])


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Path:
    save_file({name: value.contiguous() for name, value in tensors.items()}, path, metadata=metadata)
    return path


def lora_of(
    path: Path,
    names: Mapping[str, tuple[int, ...]],
    *,
    prefix: str = "diffusion_model.",
    ends: tuple[str, str] = (".lora_down.weight", ".lora_up.weight"),
    alpha: float | None = ALPHA,
    underscores: bool = False,
    strength: float = 0.3,
) -> tuple[Path, dict[str, Tensor]]:
    """A file with factors for modules {name in the file: weight's shape}, and the change of each by name."""
    tensors: dict[str, Tensor] = {}
    changes = {}
    for name, shape in names.items():
        down, up = factors(shape, strength)
        base = prefix + (name.replace(".", "_") if underscores else name)
        tensors[base + ends[0]] = down
        tensors[base + ends[1]] = up
        if alpha is not None:
            tensors[f"{base}.alpha"] = torch.tensor(alpha)
        changes[name] = product(down, up, 1.0 if alpha is None else alpha / RANK)
    return write(path, tensors), changes
