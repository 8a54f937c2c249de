"""Adapters in a network's weights: W = round(W0 + sum of strength x change), from W0 each time the set
changes, in float32, in place.

What nobody has changed is its own W0, so that a first merge reads nothing; of what was changed W0 comes from
the model's files again. Nothing is subtracted, so a set that was taken out leaves the very bits. A packed
layer has its weight in full while something is merged into it, beside the blocks, which are its W0. Knows
networks, where their weights lie, and adapters; no tasks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from chitu_diffusion.adapters.formats import AdapterFile, changed_weight
from chitu_diffusion.adapters.placing import PlacedChange, Placement, keys_of_second_expert, place
from chitu_diffusion.errors import CheckpointError, UsageError
from chitu_diffusion.memory.offload import OffloadManager
from chitu_diffusion.models.loading import Originals
from chitu_diffusion.models.wan.transformer import WanConfig, WanTransformer
from chitu_diffusion.ops.float8_linear import Float8Linear, rows_on
from chitu_diffusion.ops.fused import Float8Rows
from chitu_diffusion.ops.packed_linear import PackedLinear
from chitu_diffusion.task.lora import Lora
from chitu_diffusion.weights.files import few

_Sources = list[tuple[Lora, AdapterFile, PlacedChange]]


def open_adapter(lora: Lora) -> AdapterFile:
    """The file of an adapter.

    Raises:
        UsageError: it is not what the request was made with, or no file of tensors.
    """
    if lora.hashed() != lora.sha256:
        raise UsageError(
            f"lora = {lora.path!r}: the file has changed since the request; give it again", field="lora"
        )
    try:
        return AdapterFile(Path(lora.path))
    except CheckpointError as error:
        said = str(error).partition("; check the folder")[0]  # that remedy is a model's
        raise UsageError(
            f"lora = {lora.path!r}: it cannot be used: {said}; use a .safetensors file of an adapter",
            field="lora",
        ) from error


def check_adapters(loras: Sequence[Lora], configs: Sequence[WanConfig]) -> list[str]:
    """What a person should know of adapters on a model's transformers: keys that have no place.

    Args:
        configs: `WanConfig` of each transformer, high noise first.

    Raises:
        UsageError: one that cannot be opened, has no place at all, or changes nothing; an expert that is
            not there.
    """
    notes = []
    for lora in loras:
        if lora.expert is not None and len(configs) == 1:
            raise UsageError(
                f"lora = {lora}: this model has one transformer; leave '@{lora.expert}' out", field="lora"
            )
        file = open_adapter(lora)
        found = [place(file, config, index) for index, config in enumerate(configs) if lora.is_for(index)]
        placed = [each for placement in found for changes in placement.changes.values() for each in changes]
        unplaced = list(dict.fromkeys(key for placement in found for key in placement.unplaced))
        if len(configs) == 1:
            unplaced += keys_of_second_expert(file)
        if not placed:
            raise UsageError(
                f"lora = {lora.path!r}: none of its {len(file.modules) + len(file.unknown)} names fits this "
                f"model ({few(unplaced or file.modules)}); use an adapter of this network",
                field="lora",
            )
        if key := next((key for each in placed if (key := _key_that_is_not_finite(file, each))), ""):
            raise UsageError(
                f"lora = {lora.path!r}: it has NaN or Inf ({key}); use a file that is whole", field="lora"
            )
        if not any(_is_something(file, each) for each in placed):
            raise UsageError(
                f"lora = {lora.path!r}: all of its changes are zero; use another file, or leave it out",
                field="lora",
            )
        if unplaced:
            notes.append(f"lora {lora}: {len(unplaced)} key(s) have no place here: {', '.join(unplaced)}")
    return notes


def _key_that_is_not_finite(file: AdapterFile, placed: PlacedChange) -> str:
    """The first key of a change whose values are not all numbers; "" where there is none."""
    parts = file.parts(placed.change, torch.device("cpu"))
    return next((placed.change.keys[part] for part in parts if not parts[part].isfinite().all()), "")


def _is_something(file: AdapterFile, placed: PlacedChange) -> bool:
    """Whether a change can be other than zero: none of the factors that it is a product of is zero."""
    parts = file.parts(placed.change, torch.device("cpu"))
    if placed.kind.replaces or "dora" in parts:
        return True
    if placed.change.alpha == 0 and "down" in parts:
        return False
    return all(bool(parts[part].any()) for part in placed.kind.needs)


class AdaptedNetwork:
    """A transformer and what is merged into it.

    Args:
        network: its parameters are written into where they lie.
        device: where sums are computed.
        offload: knows every copy of a parameter that there is, on the device and at home.
        role: the network's name there.
        originals: what each parameter was; None for networks made in memory, of which copies are kept.
        expert: its index in the model pool.
    """

    def __init__(
        self,
        network: WanTransformer,
        device: torch.device,
        offload: OffloadManager,
        role: str,
        originals: Originals | None,
        expert: int,
    ) -> None:
        self._network = network
        self._device = device
        self._offload = offload
        self._role = role
        self._originals = originals
        self._expert = expert
        self._kept: dict[str, Tensor] = {}
        self._changed: set[str] = set()
        self._merged: tuple[Lora, ...] | None = ()
        """None while weights are being written, and after that was cut short."""
        self._placements: dict[str, tuple[AdapterFile, Placement]] = {}

    @torch.no_grad()
    def use(self, loras: Sequence[Lora]) -> None:
        """Merge these, and only these, in their order.

        Raises:
            UsageError: a file that has changed since, changes that are all lost in rounding, or one that
                leaves NaN or Inf.
        """
        wanted = tuple(each for each in loras if each.strength and each.is_for(self._expert))
        if wanted == self._merged:
            return
        sources = self._sources(wanted)
        self._merged = None
        differs = not wanted
        for name in self._in_order(sources):
            base = self._base(name)
            self._changed.add(name)
            start = base.float()
            value = base.to(torch.float32, copy=True)
            for lora, file, placed in sources.get(name, ()):
                parts = file.parts(placed.change, self._device)
                changed_weight(placed.kind, parts, placed.change.alpha, value, start, lora.strength)
            merged = value.to(base.dtype)
            if not merged.isfinite().all():  # attention may hide it from who looks at the latents
                raise UsageError(
                    f"lora = {', '.join(str(each) for each, _, _ in sources.get(name, ()))}: {name} would "
                    f"have NaN or Inf in {str(base.dtype).removeprefix('torch.')}; use a whole file, or a "
                    "smaller strength",
                    field="lora",
                )
            differs = differs or not torch.equal(merged, base)
            if not self._widen(name, merged if name in sources else None):
                own = None if name in sources else self._originals
                self._write(name, merged, None if own is None else own.read_float8_rows(name))
            if name not in sources:
                self._changed.discard(name)
        if not differs:
            raise UsageError(
                f"lora = {', '.join(map(str, wanted))}: every change is smaller than a rounding of the "
                "weights, and nothing would differ; use a larger strength",
                field="lora",
            )
        self._merged = wanted

    def _sources(self, wanted: Sequence[Lora]) -> Mapping[str, _Sources]:
        """The changes of each parameter. Files stay open while they are used."""
        opened = {}
        sources: dict[str, _Sources] = {}
        for lora in wanted:
            key = f"{lora.sha256} {lora.path}"
            if key not in self._placements:
                file = open_adapter(lora)
                self._placements[key] = (file, place(file, self._network.config, self._expert))
            opened[key] = self._placements[key]
            file, placement = opened[key]
            for name, changes in placement.changes.items():
                sources.setdefault(name, []).extend((lora, file, each) for each in changes)
        self._placements = opened
        return sources

    def _in_order(self, sources: Mapping[str, _Sources]) -> list[str]:
        """The names that are to be written, in the order of the network, in which files are read best."""
        names = [name for name, _ in self._network.named_parameters()]
        dropped = sorted((self._changed | set(sources)) - set(names))
        return [name for name in names if name in self._changed or name in sources] + dropped

    def _base(self, name: str) -> Tensor:
        """What a parameter was, on the device, in the dtype of its network."""
        layer, current = self._holder(name)
        if isinstance(layer, PackedLinear) and name.endswith(".weight"):
            return layer.unpacked(_wide_dtype(layer), self._device)
        if name not in self._changed and current is not None:
            if self._originals is None and name not in self._kept:
                self._kept[name] = current.detach().to("cpu", copy=True)
            return current.detach().to(self._device)
        if name in self._kept:
            return self._kept[name].to(self._device)
        if self._originals is None:
            raise UsageError(
                f"lora: {name} is there in 8 bits alone; set infer.quant_originals = true", field="lora"
            )
        dtype = current.dtype if current is not None else _wide_dtype(layer)
        return self._originals.read(name).to(self._device).to(dtype)

    def _widen(self, name: str, merged: Tensor | None) -> bool:
        """Gives a packed layer a weight in full, or with None takes it away. False: the weight is to be
        written where it is.
        """
        layer, current = self._holder(name)
        if not isinstance(layer, PackedLinear) or not name.endswith(".weight"):
            return False
        if merged is not None and current is not None:
            return False
        layer.widen(None if merged is None else merged.to(layer.weight_packed.device))
        self._offload.retake(self._role)
        return True

    def _write(self, name: str, merged: Tensor, rows: Float8Rows | None = None) -> None:
        """Puts a value wherever the parameter is kept; `rows` are its 8 bits, where it has its own."""
        layer, current = self._holder(name)
        leaf = name.rpartition(".")[2]
        values = {leaf: merged}
        if isinstance(layer, Float8Linear) and leaf == "weight":
            values = layer.rounded(merged, rows_on(rows, merged.device))
        for part, value in values.items():
            kept = layer._buffers.get(part)
            kept = current if kept is None else kept
            assert kept is not None  # what a layer keeps of a weight is there
            for copy in self._offload.copies(self._role, kept):
                copy.copy_(value)

    def _holder(self, name: str) -> tuple[nn.Module, Tensor | None]:
        """The module of a parameter, and its tensor; None where only 8 bits of it are there."""
        owner, _, leaf = name.rpartition(".")
        module = self._network.get_submodule(owner)
        return module, module._parameters[leaf]


def _wide_dtype(layer: nn.Module) -> torch.dtype:
    """In which a layer's weight is, or was before it was rounded to 8 bits: that of its bias."""
    bias = layer._parameters["bias"]
    return torch.float32 if bias is None else bias.dtype
