"""Checking a model's folder, and turning one layout into the other. Moves weights, computes nothing."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from chitu_diffusion.config import cache_dir
from chitu_diffusion.errors import CheckpointError, ChituError, UsageError
from chitu_diffusion.files.atomic import free_space, new_folder
from chitu_diffusion.flexcache.calibration import CALIBRATION_FILE, read_calibration
from chitu_diffusion.models.folder import (
    EXPERT_FOLDERS,
    METADATA_FILE,
    PREPROCESSING_FILE,
    TOKENIZER_FOLDER,
    Layout,
    ModelFolder,
    official_transformer_config,
    read_folder,
    read_json,
)
from chitu_diffusion.models.kinds import PARTS, Role
from chitu_diffusion.models.loading import blueprint, check_part, names_in, open_weights, tokenizer_of
from chitu_diffusion.models.registry import read_model, spec_of_folder
from chitu_diffusion.models.spec import ModelSpec
from chitu_diffusion.models.wan.image_encoder_files import official_image_tensors
from chitu_diffusion.sampling.solvers import Sampler
from chitu_diffusion.weights.files import few
from chitu_diffusion.weights.hashing import ModelFiles, write_json
from chitu_diffusion.weights.loader import match_names, save_weights
from chitu_diffusion.weights.manifest import Manifest, problem_with, read_manifest, write_manifest

_MODEL_TYPES: Mapping[Role, str] = MappingProxyType(
    {"text_encoder": "umt5", "image_encoder": "clip_vision_model"}
)
"""As transformers' configs name what they are of."""


@dataclass(frozen=True)
class PartCheck:
    """What `verify` says of one part of a model.

    Attributes:
        part: its role, or "tokenizer", "scheduler", "calibration" or "folder".
        path: where it lies.
        ok: whether it is whole.
        message: what is there, or what is wrong.
    """

    part: str
    path: Path
    ok: bool
    message: str


def verify(path: str | Path, deep: bool = False, parts: Mapping[str, str] | None = None) -> list[PartCheck]:
    """Checks a model: configs, each file's size, every tensor's name, shape and dtype, and all
    files' SHA-256 where a manifest, or the hub's cache, says what they should be.

    Args:
        path: the folder, in either layout, or the transformer's file.
        deep: also read every value and look for NaN and Inf.
        parts: of a file, as for `resolve_model`.

    Returns:
        One finding for each part; a folder that is no model at all gives a single bad one.
    """
    try:
        folder = read_model(Path(path), parts)
        spec = spec_of_folder(folder)
    except ChituError as error:
        return [PartCheck("folder", Path(path), False, str(error))]
    try:
        manifest = read_manifest(folder.files, cache_dir())
    except ChituError as error:
        return [PartCheck("manifest", folder.path, False, str(error))]
    said = f"{spec.name}, {folder.layout} layout, "
    said += (
        f"SHA-256 by {manifest.place.name} ({manifest.origin})"
        if manifest
        else "without a manifest: no SHA-256 to compare with"
    )

    def checked(part: str, place: Path, look: Callable[[], str]) -> PartCheck:
        """`look` says what is there, or raises; then each file's bytes."""
        try:
            message = look()
            problem = None if manifest is None else _bytes_of(folder, part, manifest)
        except ChituError as error:
            problem = str(error)
        return PartCheck(part, place, problem is None, problem or message)

    findings = [checked("folder" if folder.layout != "files" else "files", folder.path, lambda: said)]
    for role, component in folder.components.items():
        findings.append(checked(role, component.weights, partial(_verified, folder, role, deep)))
    findings.append(checked("tokenizer", folder.tokenizer, lambda: f"{len(tokenizer_of(folder))} pieces"))
    place = folder.note if folder.layout == "files" else folder.path / "scheduler"
    findings.append(checked("scheduler", place, lambda: f"shift {_sampler_of(folder, spec).shift:g}"))
    shown = folder.preprocessing
    if shown is not None:
        place = folder.path / PREPROCESSING_FILE
        findings.append(checked("image_processor", place, lambda: f"pictures of {shown.side}x{shown.side}"))
    measured = folder.path / CALIBRATION_FILE
    if os.path.lexists(measured):
        findings.append(checked("calibration", measured, lambda: _measured_in(folder.path)))
    return findings


def _measured_in(folder: Path) -> str:
    found = read_calibration(folder)
    return "nothing was measured" if found is None else f"step caches, {len(found.table)} settings measured"


def convert(
    source: str | Path,
    target: str | Path,
    layout: Layout,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5 * 2**30,
    parts: Mapping[str, str] | None = None,
) -> ModelFolder:
    """Writes a model anew in a layout.

    The new folder appears whole or not at all, and after an error nothing of it is left. A `chitu.json` in it
    keeps what its layout has no room for, so that turning a model round and back loses nothing.

    Args:
        source: a model's folder, in either layout, or its transformer's file.
        target: must not exist yet.
        layout: "diffusers" or "official".
        dtype: of the stored weights; None keeps each tensor's own. What the network keeps in float32 stays
            so.
        max_shard_bytes: of one safetensors file's values.
        parts: of a file, as for `resolve_model`.

    Raises:
        UsageError: the target exists, or an unknown layout.
        ModelMissingError, CheckpointError: the source is not a whole model.
    """
    target = Path(target)
    if layout not in ("diffusers", "official"):
        raise UsageError(f"layout = {layout!r}: use 'diffusers' or 'official'", field="layout")
    if target.exists():
        raise UsageError(f"{target} exists already; name a folder that does not", field="target")
    folder = read_model(Path(source), parts)
    spec_of_folder(folder)
    _check_room(folder, target, dtype)
    with new_folder(target) as part:
        for role in folder.components:
            _write_component(folder, role, part, layout, dtype, max_shard_bytes)
        place = part / ("tokenizer" if layout == "diffusers" else TOKENIZER_FOLDER)
        shutil.copytree(folder.tokenizer, place)
        if layout == "diffusers":
            write_model_index(part, folder)
            if folder.preprocessing is not None:
                (part / PREPROCESSING_FILE).parent.mkdir()
                write_json(part / PREPROCESSING_FILE, folder.preprocessing.to_json())
            (part / "scheduler").mkdir()
            write_json(part / "scheduler" / "scheduler_config.json", dict(folder.scheduler))
        _write_metadata(folder, part, layout)
        write_manifest(ModelFiles(part), "convert")
    return read_folder(target)


def _check_room(folder: ModelFolder, target: Path, dtype: torch.dtype | None) -> None:
    """Whether the disk holds what will be written, whose size is known but for the tokenizer and configs.

    Raises:
        UsageError: it does not.
    """
    stored = [tensor for role in folder.components for tensor in open_weights(folder, role).entries.values()]
    needed = sum(
        tensor.bytes * (dtype or tensor.dtype).itemsize // tensor.dtype.itemsize for tensor in stored
    )
    free, place, _ = free_space(target.absolute().parent)
    if needed > free:
        raise UsageError(
            f"{target} will take {needed / 2**30:.2f} GiB, and '{place}' has {free / 2**30:.2f} GiB free; "
            "free some space, or choose another disk",
            field="target",
        )


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
        "transformer_2": [None, None],
        **({"image_encoder": [None, None]} if folder.kind.takes_image else {}),
        **{role: [PARTS[role].library, folder.kind.class_name_of(role)] for role in folder.components},
    }
    if folder.preprocessing is not None:
        index["image_processor"] = ["transformers", "CLIPImageProcessor"]
    if folder.boundary_ratio is not None:
        index["boundary_ratio"] = folder.boundary_ratio
    if folder.kind.token_times:
        index["expand_timesteps"] = True
    write_json(place / "model_index.json", index)


def _sampler_of(folder: ModelFolder, spec: ModelSpec) -> Sampler:
    return Sampler(spec.defaults.sampler, folder.scheduler, spec.defaults.levels)


def _bytes_of(folder: ModelFolder, part: str, manifest: Manifest) -> str | None:
    """What is wrong with a part's files by the manifest, None for nothing."""
    names = [name for name in manifest.files if _part_of(folder, folder.files.file(name)) == part]
    return problem_with(folder.files, names, manifest)


def _part_of(folder: ModelFolder, file: Path) -> str:
    """The part that a file belongs to; in the official layout several lie side by side."""
    if folder.layout == "files":
        return folder.files.name(file)
    for role, component in folder.components.items():
        shared = component.weights == folder.path
        inside = file.parent == component.weights
        if file == component.weights or (
            inside and (not shared or file.name.startswith(component.part.stem) or file.name == "config.json")
        ):
            return role
    if file.parent == folder.tokenizer:
        return "tokenizer"
    return file.parent.name if file.parent.name in ("scheduler", "image_processor") else "folder"


def _verified(folder: ModelFolder, role: Role, deep: bool) -> str:
    """What a part holds.

    Raises:
        CheckpointError: it is not whole.
    """
    weights, names = check_part(folder, role)
    kinds = sorted({stored.packing or str(stored.dtype).removeprefix("torch.") for stored in weights.on_disk})
    total = sum(stored.packed_bytes or stored.bytes for stored in weights.on_disk)
    if deep:
        for key in names.values():
            if not torch.isfinite(weights.read(key)).all():
                raise CheckpointError("NaN or Inf", file=weights.entries[key].file, key=key)
    message = f"{len(names)} tensors, {total / 2**30:.2f} GiB, {'/'.join(kinds)}"
    others = {folder.kind.official_file(part) for part in PARTS}
    if spare := [file.name for file in weights.unused() if file.name not in others]:
        message += f"; not read, by diffusers neither: {few(spare)}"
    return message


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
    weights = open_weights(folder, role, mapped=False)  # which may change under a long work
    stored = match_names(plan.shapes(), weights, names=names_in(weights, folder, plan), ties=plan.ties)
    new_names = plan.official if layout == "official" else {name: name for name in stored}
    keys = {new_names[name]: key for name, key in stored.items()}

    def read(name: str) -> Tensor:
        return weights.read(keys[name])

    keep = {new_names[name] for name in stored if not set(name.split(".")).isdisjoint(plan.keep_float32)}
    official = folder.kind.official_file(role)
    if layout == "official" and official is not None:
        kinds = {name: dtype or weights.entries[key].dtype for name, key in keys.items()}
        # copies: torch.save would write the whole storage behind a view, and that may be the source's file
        tensors = {name: read(name).to(kind, copy=True) for name, kind in kinds.items()}
        torch.save(official_image_tensors(tensors) if role == "image_encoder" else tensors, place / official)
        return
    if layout == "official":
        two = "transformer_2" in folder.components
        home = place / EXPERT_FOLDERS[role == "transformer_2"] if two else place
        config = official_transformer_config(config, folder.kind)
    else:
        home = place / role
        said = (
            {"model_type": _MODEL_TYPES[role]}
            if role in _MODEL_TYPES
            else {"_class_name": folder.kind.class_name_of(role)}
        )
        config = {**said, **config}
    entries = {name: weights.entries[key] for name, key in keys.items()}
    empty = {name: torch.empty(e.shape, dtype=e.dtype, device="meta") for name, e in entries.items()}
    save_weights(
        empty, home, part.stem, dtype=dtype, keep_float32=keep, max_shard_bytes=max_shard_bytes, read=read
    )
    write_json(home / "config.json", config)


def _write_metadata(folder: ModelFolder, place: Path, layout: Layout) -> None:
    metadata = dict(folder.metadata)
    if layout == "official":
        single = [role for role in folder.components if folder.kind.official_file(role) is not None]
        for role in (*single, "transformer"):
            metadata[role] = dict(folder.components[role].config)
        metadata["scheduler"] = dict(folder.scheduler)
        if folder.preprocessing is not None:
            metadata["image_processor"] = folder.preprocessing.to_json()
        if folder.boundary_ratio is not None:
            metadata["boundary_ratio"] = folder.boundary_ratio
    else:
        for key in ("vae", "text_encoder", "image_encoder", "image_processor", "scheduler", "boundary_ratio"):
            metadata.pop(key, None)  # they have files of their own here
    if metadata:
        write_json(place / METADATA_FILE, metadata)
