"""Weights between disk and device: strict, one tensor at a time, never a second copy in memory.

Knows modules built on the meta device and, through `chitu_diffusion.weights.files`, files of tensors. It does
not know which network it fills or how other layouts call its parameters: tables of names are handed in. Every
fault of a checkpoint is a `CheckpointError` that names file, key, what was expected and what was found.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from chitu_diffusion.errors import CheckpointError
from chitu_diffusion.files.atomic import new_file
from chitu_diffusion.weights.files import INDEX_ENDING, Stored, WeightFiles, few
from chitu_diffusion.weights.hashing import write_json

__all__ = ["WeightFiles", "load_into", "match_names", "save_weights"]

LoadProgress = Callable[[int, int], None]  # (bytes read, bytes in all)
Transform = Callable[[str, Tensor], Mapping[str, Tensor]]
"""(our name, tensor) -> what takes its place, by name: the same name for a changed value, others for tensors
that stand beside or instead of it.

The tensor is the transform's own: a change in place (`add_`) takes no memory, and leaves no gap in a CPU's.
It may hold other files open and read from them what belongs to the name (an adapter's two factors, a scale).
"""


def load_into(
    module: nn.Module,
    weights: WeightFiles,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    keep_float32: Collection[str] = (),
    names: Mapping[str, str] | None = None,
    ties: Mapping[str, str] | None = None,
    progress: LoadProgress | None = None,
    transforms: Sequence[Transform] = (),
    packed: Collection[str] = (),
) -> None:
    """Fills a module (built on the meta device) from files, each tensor straight to its device and dtype.

    Args:
        module: its parameters and persistent buffers are replaced.
        weights: the files.
        device, dtype: where and as what; dtype None keeps what is stored.
        keep_float32: parts of dotted names that are float32 whatever `dtype` says.
        names: our name -> name in the files; None: the same.
        ties: {second name: first name} of parameters that are one tensor. Files may hold either or both.
        progress: called after each tensor.
        transforms: what each tensor goes through on its device and in its dtype, in this order, before the
            next is read. A name that comes out and is none of the module's becomes a buffer beside it that is
            not saved; a parameter whose name does not come out is None.
        packed: parameters of which transforms get the packed blocks, [bytes] uint8, in place of values.

    Raises:
        CheckpointError: a tensor is missing, extra or misshapen; nothing has been loaded then.
    """
    ties = ties or {}
    wanted = {name: tensor for name, tensor in module.state_dict(keep_vars=True).items() if name not in ties}
    plan = match_names(
        {name: tuple(tensor.shape) for name, tensor in wanted.items()}, weights, names=names, ties=ties
    )
    total = sum(weights.entries[key].bytes for key in plan.values())
    done = 0
    # file by file, in the file's own order, so that a disk reads straight on
    for name, key in sorted(plan.items(), key=lambda item: _place(weights.entries[item[1]])):
        stored = weights.entries[key]
        kept = not set(name.split(".")).isdisjoint(keep_float32)
        if name in packed:
            loaded = weights.read_packed(key).to(device)
        else:
            kind = torch.float32 if kept else dtype or stored.dtype
            loaded = torch.empty(stored.shape, dtype=kind, device=device)
            loaded.copy_(weights.read(key, device))
        values: Mapping[str, Tensor] = {name: loaded}
        del loaded
        for transform in transforms:
            values = {
                new: made for old, value in values.items() for new, made in transform(old, value).items()
            }
        _put(module, name, values, wanted[name])
        del values
        done += stored.bytes
        if progress is not None:
            progress(done, total)
    for second, first in ties.items():
        owner, _, leaf = second.rpartition(".")
        setattr(module.get_submodule(owner), leaf, module.get_parameter(first))


def match_names(
    shapes: Mapping[str, tuple[int, ...]],
    weights: WeightFiles,
    *,
    names: Mapping[str, str] | None = None,
    ties: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Which stored tensor fills which parameter: {our name: name in the files}. Reads no values but tied
    doubles.

    Args:
        shapes: of the network's parameters, by our names.
        weights, names, ties: as for `load_into`.

    Raises:
        CheckpointError: missing, extra or misshapen tensors; tied doubles that differ.
    """
    names = names or {}
    ties = ties or {}
    plan = {name: names.get(name, name) for name in shapes}
    doubles: set[str] = set()
    for second, first in ties.items():
        stored_second = names.get(second, second)
        stored_first = plan[first]
        if stored_second in weights.entries and stored_second != stored_first:
            if stored_first not in weights.entries:
                plan[first] = stored_second
            else:
                _check_double(weights, stored_first, stored_second)
                doubles.add(stored_second)
    missing = [key for key in plan.values() if key not in weights.entries]
    if missing:
        raise CheckpointError(
            f"{len(missing)} tensor(s) missing",
            file=weights.path,
            key=few(missing),
            expected=len(plan),
            found=len(weights.entries),
        )
    extra = weights.entries.keys() - set(plan.values()) - doubles
    if extra:
        file = weights.entries[min(extra)].file
        raise CheckpointError(
            f"{len(extra)} tensor(s) that the network does not have", file=file, key=few(sorted(extra))
        )
    for name, key in plan.items():
        stored = weights.entries[key]
        if stored.shape != shapes[name] and not weights.unflatten(key, shapes[name]):
            raise CheckpointError(
                "a tensor has the wrong shape",
                file=stored.file,
                key=key,
                expected=list(shapes[name]),
                found=list(stored.shape),
            )
    return plan


def save_weights(
    tensors: Mapping[str, Tensor],
    folder: str | Path,
    stem: str = "diffusion_pytorch_model",
    *,
    dtype: torch.dtype | None = None,
    keep_float32: Collection[str] = (),
    max_shard_bytes: int = 5 * 2**30,
    read: Callable[[str], Tensor] | None = None,
) -> list[Path]:
    """Writes a network's tensors as safetensors: one file, or numbered shards with an index.

    Each file appears whole, the index last; older files of the same stem are removed after that. At most one
    shard is held in memory beside `tensors`, which may be backed by files.

    Args:
        tensors: by name.
        folder: is made if it does not exist.
        stem: how the files begin.
        dtype: stored floats; None keeps each tensor's own.
        keep_float32: parts of dotted names that are stored in float32 whatever `dtype` says.
        max_shard_bytes: of one file's values.
        read: gives the values by name, where `tensors` are on the meta device.

    Returns:
        The files, the index among them.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    kinds = {
        name: torch.float32 if not set(name.split(".")).isdisjoint(keep_float32) else dtype or tensor.dtype
        for name, tensor in tensors.items()
    }
    sizes = {name: tensor.numel() * kinds[name].itemsize for name, tensor in tensors.items()}
    shards = _shards(sizes, max_shard_bytes)
    written: list[Path] = []
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        plain = len(shards) == 1
        file = folder / (
            f"{stem}.safetensors" if plain else f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        )
        # clones, since safetensors refuses tensors that share memory, as views of one file do
        values = {
            name: (read(name) if read else tensors[name])
            .detach()
            .to("cpu", kinds[name], copy=True)
            .contiguous()
            for name in shard
        }
        with new_file(file) as part:
            save_file(values, str(part), metadata={"format": "pt"})
        written.append(file)
        weight_map.update(dict.fromkeys(shard, file.name))
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(sizes.values())},
            "weight_map": dict(sorted(weight_map.items())),
        }
        written.append(write_json(folder / (stem + INDEX_ENDING), index))
    for old in [*folder.glob(f"{stem}.safetensors*"), *folder.glob(f"{stem}-*-of-*.safetensors")]:
        if old not in written:
            old.unlink()
    return written


def _check_double(weights: WeightFiles, first: str, second: str) -> None:
    if not torch.equal(weights.read(first), weights.read(second)):
        raise CheckpointError(
            "two names of one tensor hold different values",
            file=weights.entries[second].file,
            key=second,
            expected=f"as {first}",
        )


def _put(module: nn.Module, name: str, values: Mapping[str, Tensor], old: Tensor) -> None:
    """What came of the tensor `name`, in place of `old`."""
    if name not in values:
        owner, _, leaf = name.rpartition(".")
        module.get_submodule(owner).register_parameter(leaf, None)
    for new, value in values.items():
        owner, _, leaf = new.rpartition(".")
        holder = module.get_submodule(owner)
        if new == name and isinstance(old, nn.Parameter):
            holder.register_parameter(leaf, nn.Parameter(value, requires_grad=old.requires_grad))
        else:
            holder.register_buffer(leaf, value, persistent=new == name)


def _place(stored: Stored) -> tuple[str, int]:
    return str(stored.file), stored.position


def _shards(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards
