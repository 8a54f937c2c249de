"""What the shell may put for the beginning of a word: names of models, caches, samplers, kernels, settings.

A key press waits for it, so nothing here imports torch. Each function takes what is typed so far.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal, get_args, get_origin


def _begin(typed: str, names: list[str]) -> list[str]:
    return [name for name in names if name.startswith(typed)]


def models(typed: str) -> list[str]:
    """Names of models; folders are the shell's own matter."""
    from chitu_diffusion.models.registry import model_names

    return _begin(typed, model_names())


def adapters(typed: str) -> list[str]:
    """Names of the shipped adapters."""
    from chitu_diffusion.task.lora import shipped_adapters

    return _begin(typed, list(shipped_adapters()))


def caches(typed: str) -> list[str]:
    """Names of cache strategies."""
    from chitu_diffusion.flexcache.registry import STRATEGIES

    return _begin(typed, list(STRATEGIES))


def samplers(typed: str) -> list[str]:
    """Names of solvers."""
    return _begin(typed, _values_of("infer.sampler"))


def recipes(typed: str) -> list[str]:
    """Names of sampler recipes."""
    from chitu_diffusion.sampling.recipes import NO_RECIPE, RECIPES

    return _begin(typed, [*RECIPES, NO_RECIPE])


def dtypes(typed: str) -> list[str]:
    """Of weights and products."""
    return _begin(typed, _values_of("infer.dtype"))


def devices(typed: str) -> list[str]:
    """Kinds of devices; which there are only torch knows."""
    return _begin(typed, ["auto", "cpu", "cuda"])


def kernels(typed: str) -> list[str]:
    """Names of attention kernels."""
    return _begin(typed, ["auto", *_kernel_names()])


def settings(typed: str) -> list[str]:
    """`infer.sa` -> `infer.sampler=`; `infer.sampler=e` -> `infer.sampler=euler`."""
    from chitu_diffusion.config import leaves

    name, equals, value = typed.partition("=")
    if not equals:
        return _begin(typed, [f"{leaf}=" for leaf, _ in leaves()])
    known = {"infer.attn_type": kernels, "models.name": models, "infer.device": devices}
    values = known[name](value) if name in known else _begin(value, _values_of(name))
    return [f"{name}={each}" for each in values]


def _values_of(setting: str) -> list[str]:
    """The words that a setting takes; none for a number or a free text."""
    from chitu_diffusion.config import leaves

    kind: Any = next((field.annotation for name, field in leaves() if name == setting), None)
    if kind is bool:
        return ["true", "false"]
    return [str(value) for value in get_args(kind)] if get_origin(kind) is Literal else []


def _kernel_names() -> list[str]:
    """Read from the files of the kernels, for importing them takes torch."""
    folder = Path(__file__).parent.parent / "attention"
    texts = [file.read_text(encoding="utf-8") for file in sorted(folder.glob("*.py"))]
    return [name for text in texts for name in re.findall(r'= AttentionKernel\(\s*"(\w+)"', text)]
