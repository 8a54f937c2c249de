"""Checking a model's folder, and turning one layout into the other. Moves weights, computes nothing."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from chitu_diffusion.errors import ChituError, UsageError
from chitu_diffusion.models.folder import (
    EXPERT_FOLDERS,
    METADATA_FILE,
    TOKENIZER_FOLDER,
    Layout,
    ModelFolder,
    official_transformer_config,
    read_folder,
    read_json,
)
from chitu_diffusion.models.kinds import OPTIONAL_ROLES, PARTS, Role
from chitu_diffusion.models.loading import blueprint, open_weights, tokenizer_of
from chitu_diffusion.models.registry import spec_of_folder
from chitu_diffusion.sampling.solvers import Sampler
from chitu_diffusion.weights.files import few
from chitu_diffusion.weights.loader import match_names, save_weights, write_json


@dataclass(frozen=True)
class PartCheck:
    """What `verify` says of one part of a model.

    Attributes:
        part: its role, or "tokenizer", "scheduler" or "folder".
        path: where it lies.
        ok: whether it is whole.
        message: what is there, or what is wrong.
    """

    part: str
    path: Path
    ok: bool
    message: str


def verify(path: str | Path, deep: bool = False) -> list[PartCheck]:
    """Checks a model's folder: configs, each file's size, every tensor's name, shape and dtype.

    Args:
        path: the folder, in either layout.
        deep: also read every value and look for NaN and Inf.

    Returns:
        One finding for each part; a folder that is no model at all gives a single bad one.
    """
    try:
        folder = read_folder(path)
        spec = spec_of_folder(folder)
    except ChituError as error:
        return [PartCheck("folder", Path(path), False, str(error))]
    findings = [PartCheck("folder", folder.path, True, f"{spec.name}, {folder.layout} layout")]
    findings += [_verified(folder, role, deep) for role in folder.components]
    try:
        size = len(tokenizer_of(folder))
        findings.append(PartCheck("tokenizer", folder.tokenizer, True, f"{size} pieces"))
    except ChituError as error:
        findings.append(PartCheck("tokenizer", folder.tokenizer, False, str(error)))
    try:
        sampler = Sampler(spec.defaults.sampler, folder.scheduler, spec.defaults.levels)
        findings.append(PartCheck("scheduler", folder.path / "scheduler", True, f"shift {sampler.shift:g}"))
    except ChituError as error:
        findings.append(PartCheck("scheduler", folder.path / "scheduler", False, str(error)))
    return findings


def convert(
    source: str | Path,
    target: str | Path,
    layout: Layout,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5 * 2**30,
) -> ModelFolder:
    """Writes a model anew in a layout.

    The new folder appears whole or not at all: it grows beside its place as NAME.part. A `chitu.json` in it
    keeps what its layout has no room for, so that turning a model round and back loses nothing.

    Args:
        source: a model's folder, in either layout.
        target: must not exist yet.
        layout: "diffusers" or "official".
        dtype: of the stored weights; None keeps each tensor's own. What the network keeps in float32 stays
            so.
        max_shard_bytes: of one safetensors file's values.

    Raises:
        UsageError: the target exists, or an unknown layout.
        ModelMissingError, CheckpointError: the source is not a whole model.
    """
    target = Path(target)
    if layout not in ("diffusers", "official"):
        raise UsageError(f"layout = {layout!r}: use 'diffusers' or 'official'", field="layout")
    if target.exists():
        raise UsageError(f"{target} exists already; name a folder that does not", field="target")
    folder = read_folder(source)
    spec_of_folder(folder)
    part = target.with_name(target.name + ".part")
    shutil.rmtree(part, ignore_errors=True)  # of a run that was stopped
    part.mkdir(parents=True)
    for role in folder.components:
        _write_component(folder, role, part, layout, dtype, max_shard_bytes)
    place = part / ("tokenizer" if layout == "diffusers" else TOKENIZER_FOLDER)
    shutil.copytree(folder.tokenizer, place)
    if layout == "diffusers":
        write_model_index(part, folder)
        (part / "scheduler").mkdir()
        write_json(part / "scheduler" / "scheduler_config.json", dict(folder.scheduler))
    _write_metadata(folder, part, layout)
    part.rename(target)
    return read_folder(target)


def write_model_index(place: Path, folder: ModelFolder) -> None:
    """Writes diffusers' `model_index.json` for the parts of `folder` into `place`."""
    settings = folder.tokenizer / "tokenizer_config.json"
    tokenizer = (
        read_json(settings).get("tokenizer_class", "T5TokenizerFast")
        if settings.exists()
        else "T5TokenizerFast"
    )
    index: dict[str, Any] = {
        "_class_name": folder.kind.class_name,
        "scheduler": ["diffusers", folder.scheduler.get("_class_name", "UniPCMultistepScheduler")],
        "tokenizer": ["transformers", tokenizer],
        **{role: [None, None] for role in OPTIONAL_ROLES},
        **{role: [PARTS[role].library, PARTS[role].class_name] for role in folder.components},
    }
    if folder.boundary_ratio is not None:
        index["boundary_ratio"] = folder.boundary_ratio
    write_json(place / "model_index.json", index)


def _verified(folder: ModelFolder, role: Role, deep: bool) -> PartCheck:
    component = folder.components[role]
    try:
        weights = open_weights(folder, role)
        plan = blueprint(folder, role)
        names = match_names(plan.shapes(), weights, names=plan.names(folder.layout), ties=plan.ties)
        kinds = sorted({str(stored.dtype).removeprefix("torch.") for stored in weights.entries.values()})
        total = sum(stored.bytes for stored in weights.entries.values())
        if deep:
            for key in names.values():
                if not torch.isfinite(weights.read(key)).all():
                    return PartCheck(role, weights.entries[key].file, False, f"{key} holds NaN or Inf")
    except ChituError as error:
        return PartCheck(role, component.weights, False, str(error))
    message = f"{len(names)} tensors, {total / 2**30:.2f} GiB, {'/'.join(kinds)}"
    others = {part.official_file for part in PARTS.values()}
    if spare := [file.name for file in weights.unused() if file.name not in others]:
        message += f"; not read, by diffusers neither: {few(spare)}"
    return PartCheck(role, component.weights, True, message)


def _write_component(
    folder: ModelFolder,
    role: Role,
    place: Path,
    layout: Layout,
    dtype: torch.dtype | None,
    max_shard_bytes: int,
) -> None:
    part = PARTS[role]
    config = dict(folder.components[role].config)
    plan = blueprint(folder, role)
    weights = open_weights(folder, role)
    stored = match_names(plan.shapes(), weights, names=plan.names(folder.layout), ties=plan.ties)
    new_names = plan.official if layout == "official" else {name: name for name in stored}
    tensors = {new_names[name]: weights.read(key) for name, key in stored.items()}  # backed by the files
    keep = {new_names[name] for name in stored if not set(name.split(".")).isdisjoint(plan.keep_float32)}
    if layout == "official" and part.official_file is not None:
        _write_torch_file(place / part.official_file, tensors, dtype)
        return
    if layout == "official":
        two = "transformer_2" in folder.components
        home = place / EXPERT_FOLDERS[role == "transformer_2"] if two else place
        config = official_transformer_config(config, folder.kind)
    else:
        home = place / role
        said = {"model_type": "umt5"} if part.library == "transformers" else {"_class_name": part.class_name}
        config = {**said, **config}
    save_weights(tensors, home, part.stem, dtype=dtype, keep_float32=keep, max_shard_bytes=max_shard_bytes)
    write_json(home / "config.json", config)


def _write_torch_file(file: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> None:
    # copies: torch.save would write the whole storage behind a view, and that may be the source's whole file
    torch.save({name: tensor.to(dtype or tensor.dtype, copy=True) for name, tensor in tensors.items()}, file)


def _write_metadata(folder: ModelFolder, place: Path, layout: Layout) -> None:
    metadata = dict(folder.metadata)
    if layout == "official":
        single = [role for role in PARTS if PARTS[role].official_file is not None]
        for role in (*single, "transformer"):
            metadata[role] = dict(folder.components[role].config)
        metadata["scheduler"] = dict(folder.scheduler)
        if folder.boundary_ratio is not None:
            metadata["boundary_ratio"] = folder.boundary_ratio
    else:
        for key in ("vae", "text_encoder", "scheduler", "boundary_ratio"):
            metadata.pop(key, None)  # they have files of their own here
    if metadata:
        write_json(place / METADATA_FILE, metadata)
