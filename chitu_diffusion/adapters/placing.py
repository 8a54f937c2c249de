"""Which parameters of a network an adapter changes: its names, in whichever layout, brought to ours.

Names are compared with every dot as an underscore, which is how some trainers write them, so that one table
serves all layouts. Nothing is guessed: what has no place, or another shape, is told by its key.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from chitu_diffusion.adapters.formats import FORMATS, AdapterFile, Format, ModuleChange, misfit
from chitu_diffusion.models.hollow import hollow
from chitu_diffusion.models.wan.checkpoint_names import official_transformer_name
from chitu_diffusion.models.wan.config import WanConfig
from chitu_diffusion.models.wan.transformer import WanTransformer

_PREFIXES = (
    "base_model.model.", "model.diffusion_model.", "diffusion_model.", "transformer_2.", "transformer.",
    "lora_unet__", "lora_unet_", "lora_transformer_", "lycoris_", "unet.", "module.", "model.", "net.",
)  # fmt: skip
_SECOND = "transformer_2."
"""Before the names of the low-noise expert, where diffusers saves two in one file."""
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class PlacedChange:
    """A change of one parameter.

    Attributes:
        kind: its format.
        change: where its tensors are.
    """

    kind: Format
    change: ModuleChange


@dataclass(frozen=True)
class Placement:
    """An adapter on a network.

    Attributes:
        changes: by our parameter's name.
        unplaced: the file's keys that have no place, each with the reason where it is not the name.
    """

    changes: Mapping[str, tuple[PlacedChange, ...]]
    unplaced: tuple[str, ...]


@cache
def parameter_shapes(config: WanConfig) -> Shapes:
    """Of a network's parameters, by name; no weight is made."""
    with hollow():
        network = WanTransformer(config)
    return {name: tuple(value.shape) for name, value in network.state_dict().items()}


def place(file: AdapterFile, config: WanConfig, expert: int = 0) -> Placement:
    """What a file changes in a network.

    Args:
        expert: 0, or 1 for the low-noise one of two; a file of diffusers may hold both.
    """
    shapes = parameter_shapes(config)
    table = _modules(config)
    both = any(base.startswith(_SECOND) for base in file.modules)
    changes: dict[str, list[PlacedChange]] = {}
    unplaced = list(file.unknown)
    for base, change in file.modules.items():
        if both and base.startswith(_SECOND) != (expert == 1):
            continue
        placed: set[str] = set()
        for kind in FORMATS:
            parts = kind.parts_of(change)
            name = _parameter(_module(base, table), kind, shapes) if parts else None
            if name is None:
                continue
            placed.update(parts)
            if (why := misfit(kind, file, change, shapes[name])) is None:
                changes.setdefault(name, []).append(PlacedChange(kind, change))
            else:
                unplaced.append(f"{change.keys[kind.needs[-1]]} ({why})")
        unplaced += [key for part, key in change.keys.items() if part not in placed]
    return Placement({name: tuple(each) for name, each in changes.items()}, tuple(unplaced))


def keys_of_second_expert(file: AdapterFile) -> list[str]:
    """Those that a file of diffusers has for the low-noise expert beside the other's."""
    return [
        key
        for base, change in file.modules.items()
        if base.startswith(_SECOND)
        for key in change.keys.values()
    ]


@cache
def _modules(config: WanConfig) -> Mapping[str, str]:
    """Names of modules and bare parameters in both layouts, with underscores -> our name."""
    table = {}
    for name in parameter_shapes(config):
        for theirs in (official_transformer_name(name), name):  # where both have a name, ours counts
            for ours, other in ((name, theirs), (_owner(name), _owner(theirs))):
                table[other.replace(".", "_")] = ours
    return table


def _owner(name: str) -> str:
    """The module of a weight or bias; of a bare parameter the parameter itself."""
    owner, _, leaf = name.rpartition(".")
    return owner if leaf in ("weight", "bias") else name


def _module(base: str, table: Mapping[str, str]) -> str:
    """Our name of what an adapter calls `base`; as it is where nothing is called so."""
    for prefix in ("", *_PREFIXES):
        if base.startswith(prefix):
            inner = base.removeprefix(prefix)
            if (found := table.get(inner.replace(".", "_"))) is not None:
                return found
    # of a modulation's change the block alone is named, or the head
    inner = next((base.removeprefix(prefix) for prefix in _PREFIXES if base.startswith(prefix)), base)
    return table.get(f"{inner}.modulation".replace(".", "_"), base)


def _parameter(module: str, kind: Format, shapes: Shapes) -> str | None:
    if kind.target == "modulation":
        return module if module in shapes and module.endswith("scale_shift_table") else None
    if kind.target == "weight" and module in shapes:
        return module
    name = f"{module}.{kind.target}"
    return name if name in shapes else None
