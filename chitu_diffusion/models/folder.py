"""What a model's folder on disk holds: which parts, where, with which configs. Reads JSON only, never a
weight.

Two layouts are understood. Diffusers':

    model_index.json  transformer/  [transformer_2/]  vae/  text_encoder/  tokenizer/  scheduler/

and the official Wan one, whose VAE and text encoder have no config beside them (they are those of the
full-size models unless a `chitu.json` says otherwise, which `convert` writes for every other model):

    config.json  diffusion_pytorch_model*.safetensors            (one transformer)
    high_noise_model/  low_noise_model/                          (two experts, each like the line above)
    models_t5_umt5-xxl-enc-bf16.pth  Wan2.1_VAE.pth or Wan2.2_VAE.pth  google/umt5-xxl/
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from chitu_diffusion.errors import CheckpointError, ModelMissingError
from chitu_diffusion.files import reading
from chitu_diffusion.models import limits
from chitu_diffusion.models.image_preprocessing import ImagePreprocessing
from chitu_diffusion.models.kinds import (
    EXPERT_ROLES,
    IMAGE_TO_VIDEO,
    OPTIONAL_ROLES,
    PARTS,
    TEXT_IMAGE_TO_VIDEO,
    TEXT_TO_VIDEO,
    ModelKind,
    Part,
    Role,
    kind_named,
)
from chitu_diffusion.models.wan.vae_22 import VAE_22
from chitu_diffusion.weights.hashing import ModelFiles

Layout = Literal["diffusers", "official", "files"]
"""Of a whole model; "files" are each a network alone, or one with all of them, wherever they lie."""

METADATA_FILE = "chitu.json"
TOKENIZER_FOLDER = "google/umt5-xxl"
EXPERT_FOLDERS = ("high_noise_model", "low_noise_model")

# UMT5-XXL's encoder, https://huggingface.co/google/umt5-xxl, in transformers' words.
_TEXT_CONFIG: Mapping[str, Any] = {
    "vocab_size": 256384,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "dropout_rate": 0.1,
    "layer_norm_epsilon": 1e-6,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
# Wan2.1's VAE; the latents' mean and deviation are `AutoencoderKLWan`'s own defaults.
_VAE_CONFIG: Mapping[str, Any] = {
    "base_dim": 96,
    "z_dim": 16,
    "dim_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "attn_scales": [],
    "temperal_downsample": [False, True, True],
    "dropout": 0.0,
}
# OpenCLIP's ViT-H/14, the vision half of XLM-RoBERTa-large-ViT-H/14, in transformers' words.
_IMAGE_ENCODER_CONFIG: Mapping[str, Any] = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
    "projection_dim": 1024,
}
_PICTURE_ROWS = (224 // 14) ** 2 + 1
"""What it gives of a picture: a row for each patch, and one for the class."""
_SCHEDULER_CONFIG: Mapping[str, Any] = {
    "_class_name": "UniPCMultistepScheduler",
    "num_train_timesteps": 1000,
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
    "solver_order": 2,
}
# Official config.json fields -> `WanConfig` fields; the head's width is dim / num_heads.
_OFFICIAL_FIELDS = {
    "ffn_dim": "ffn_dim",
    "freq_dim": "freq_dim",
    "in_dim": "in_channels",
    "out_dim": "out_channels",
    "num_layers": "num_layers",
    "num_heads": "num_attention_heads",
    "eps": "eps",
    "text_dim": "text_dim",
    "patch_size": "patch_size",
    "cross_attn_norm": "cross_attn_norm",
    "vace_layers": "vace_layers",
    "vace_in_dim": "vace_in_channels",
}

LIMITS: Mapping[str, Mapping[str, limits.Limit]] = {
    "transformer": limits.TRANSFORMER,
    "transformer_2": limits.TRANSFORMER,
    "vae": limits.VAE,
    "text_encoder": limits.TEXT_ENCODER,
    "image_encoder": limits.IMAGE_ENCODER,
}
_IMAGE_FIELDS = ("image_dim", "added_kv_proj_dim", "pos_embed_seq_len")
PREPROCESSING_FILE = "image_processor/preprocessor_config.json"
_NEEDED: Mapping[Role, tuple[str, ...]] = {"vae": ("latents_mean", "latents_std")}


@dataclass(frozen=True)
class Component:
    """One network of a model.

    Attributes:
        role: its folder's name in diffusers' layout.
        weights: a file, or the folder that holds the weights' files.
        config: its config in diffusers' (for the text encoder: transformers') words, in either layout.
        within: in a file with several networks, what the names of this one begin with.
    """

    role: Role
    weights: Path
    config: Mapping[str, Any]
    within: str = ""

    @property
    def part(self) -> Part:
        """What it is."""
        return PARTS[self.role]


@dataclass(frozen=True)
class ModelFolder:
    """A model on disk.

    Attributes:
        path: the folder; in layout "files" the (high-noise) transformer's file.
        layout: see `Layout`.
        kind: what it makes of what.
        components: by role; "transformer_2" only where there are two experts ("transformer" is the high-noise
            one).
        tokenizer: the tokenizer's folder.
        scheduler: config of the diffusers scheduler that the checkpoint asks for.
        boundary_ratio: of two experts, the share of the 1000 timesteps below which the second takes over.
        metadata: `chitu.json`, or nothing.
        preprocessing: of pictures for the image encoder; None where there is none.
    """

    path: Path
    layout: Layout
    kind: ModelKind
    components: Mapping[Role, Component]
    tokenizer: Path
    scheduler: Mapping[str, Any]
    boundary_ratio: float | None
    metadata: Mapping[str, Any]
    preprocessing: ImagePreprocessing | None = None

    @property
    def files(self) -> ModelFiles:
        """Its files, as manifests and hashes name them: those that lie apart by what they are for."""
        apart = self.components.values() if self.layout == "files" else ()
        return ModelFiles(self.path, {part.weights: part.role for part in reversed([*apart])})

    @property
    def note(self) -> Path:
        """Where `metadata` lies, or would."""
        return (
            self.path.with_suffix(f".{METADATA_FILE}")
            if self.layout == "files"
            else self.path / METADATA_FILE
        )

    def names(self) -> list[str]:
        """What it and its transformers' files are called, and the hub's repository whose cache it lies in."""
        path = self.path.resolve()
        weights = [self.components[role].weights for role in EXPERT_ROLES if role in self.components]
        files = [
            file for place in weights for file in ([place] if place.is_file() else sorted(place.iterdir()))
        ]
        cached = [part.removeprefix("models--") for part in path.parts if part.startswith("models--")]
        return [path.name, *cached, *(file.name for file in files)]

    def config_sha256(self) -> str:
        """SHA-256 over what the configs say and the tokenizer's files hold, without the shift and what tools
        note about themselves ("_diffusers_version").

        Raises:
            CheckpointError: a file cannot be read.
        """
        left_out = ("_", "shift", "flow_shift")
        configs: dict[str, Mapping[str, Any]] = {"scheduler": self.scheduler}
        configs |= {role: component.config for role, component in self.components.items()}
        if self.preprocessing is not None:
            configs["image_processor"] = self.preprocessing.to_json()
        said = {
            part: {name: value for name, value in config.items() if not name.startswith(left_out)}
            for part, config in configs.items()
        }
        place = self.tokenizer
        files = sorted(file for file in place.iterdir() if file.is_file()) if place.is_dir() else []
        tokenizer = {file.name: _sha256(file) for file in files}
        text = json.dumps([said, tokenizer, self.boundary_ratio], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()


def _sha256(file: Path) -> str:
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError as error:
        raise CheckpointError(f"a file cannot be read: {reading.cause(error)}", file=file) from error


def read_folder(path: str | Path) -> ModelFolder:
    """Understands a model's folder, in either layout.

    Raises:
        ModelMissingError: there is no folder, or nothing in it that is a Wan model.
        CheckpointError: a config is missing, unreadable or of another kind of model.
    """
    folder = Path(path).expanduser()
    with reading.foreign_data(
        lambda cause: CheckpointError(f"the folder cannot be read: {cause}", file=folder)
    ):
        return _read_folder(folder)


def is_model_folder(folder: Path) -> bool:
    """Whether a folder holds a whole model, in either layout."""
    marks = ("model_index.json", "config.json", EXPERT_FOLDERS[0])
    return any((folder / mark).exists() for mark in marks)


def _read_folder(folder: Path) -> ModelFolder:
    if not folder.is_dir():
        raise ModelMissingError(
            f"there is no folder {folder}; 'chitu models ls' shows the models on this machine"
        )
    metadata = read_json(folder / METADATA_FILE) if (folder / METADATA_FILE).exists() else {}
    if (folder / "model_index.json").exists():
        return _read_diffusers(folder, metadata)
    if (folder / "config.json").exists() or (folder / EXPERT_FOLDERS[0]).is_dir():
        return _read_official(folder, metadata)
    raise ModelMissingError(
        f"{folder} holds no model: neither model_index.json (diffusers' layout) nor config.json or "
        f"{EXPERT_FOLDERS[0]}/ (official Wan layout) is there"
    )


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: missing, unreadable, or not an object.
    """
    try:
        data = reading.read_json(file)
    except FileNotFoundError:
        raise CheckpointError("a config is missing", file=file) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"a config cannot be read: {reading.cause(error)}", file=file) from error
    if not isinstance(data, dict):
        raise CheckpointError(
            "a config is not an object", file=file, expected="{...}", found=type(data).__name__
        )
    return data


def _read_diffusers(folder: Path, metadata: Mapping[str, Any]) -> ModelFolder:
    file = folder / "model_index.json"
    index = read_json(file)
    kind = kind_named(index.get("_class_name"), file)
    if index.get("expand_timesteps"):
        kind = TEXT_IMAGE_TO_VIDEO
    components: dict[Role, Component] = {}
    for role, part in PARTS.items():
        if role in OPTIONAL_ROLES and index.get(role) in (None, [None, None]):
            continue
        if role == "image_encoder" and components["transformer"].config.get("image_dim") is None:
            continue  # nobody asks it
        config = read_json(folder / role / "config.json")
        if part.library == "diffusers":
            _expect_class(folder / role / "config.json", config, kind.class_name_of(role))
        limits.check_limits(config, LIMITS[role], folder / role / "config.json")
        for key in _NEEDED.get(role, ()):
            if key not in config:  # diffusers would take another model's
                raise CheckpointError(
                    "a config lacks a field", file=folder / role / "config.json", key=key, expected="numbers"
                )
        components[role] = Component(role, folder / role, config)
    limits.check_limits(index, limits.BOUNDARY, file)
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    boundary = index.get("boundary_ratio")
    place = folder / PREPROCESSING_FILE
    preprocessing = (
        ImagePreprocessing.from_json(read_json(place), place) if "image_encoder" in components else None
    )
    return ModelFolder(
        folder,
        "diffusers",
        kind,
        components,
        folder / "tokenizer",
        scheduler,
        boundary,
        metadata,
        preprocessing,
    )


def _read_official(folder: Path, metadata: Mapping[str, Any]) -> ModelFolder:
    experts = (
        [folder / name for name in EXPERT_FOLDERS] if (folder / EXPERT_FOLDERS[0]).is_dir() else [folder]
    )
    kind = TEXT_TO_VIDEO
    components: dict[Role, Component] = {}
    for role, place in zip(EXPERT_ROLES, experts, strict=False):
        kind, config = _transformer_config(place / "config.json")
        if kind is IMAGE_TO_VIDEO and len(experts) == 1:
            config |= _image_fields(place / "config.json", config, metadata)
        components[role] = Component(role, place, config)
    note = folder / METADATA_FILE
    for role, usual in usual_configs(kind, components["transformer"].config).items():
        file = kind.official_file(role)
        table = checked_table(note, metadata, role, usual)
        components[role] = Component(role, folder / str(file), table)
    limits.check_limits(metadata, limits.BOUNDARY, note)
    scheduler = checked_table(note, metadata, "scheduler", usual_scheduler(kind, len(experts)))
    boundary = metadata.get("boundary_ratio", kind.boundary_ratio) if len(experts) == 2 else None
    place = folder / TOKENIZER_FOLDER
    preprocessing = noted_preprocessing(note, metadata) if "image_encoder" in components else None
    return ModelFolder(
        folder, "official", kind, components, place, scheduler, boundary, metadata, preprocessing
    )


def usual_configs(kind: ModelKind, transformer: Mapping[str, Any]) -> Mapping[Role, Mapping[str, Any]]:
    """Of the parts beside a transformer, with its config, that every published model of a kind has alike."""
    vae = VAE_22 if kind.token_times else _VAE_CONFIG
    configs: dict[Role, Mapping[str, Any]] = {"vae": vae, "text_encoder": _TEXT_CONFIG}
    return (
        configs
        if transformer.get("image_dim") is None
        else {**configs, "image_encoder": _IMAGE_ENCODER_CONFIG}
    )


def usual_scheduler(kind: ModelKind, experts: int) -> Mapping[str, Any]:
    """The scheduler's config where nothing names one."""
    # wan/configs of Wan2.1
    return {**_SCHEDULER_CONFIG, "flow_shift": kind.flow_shift if experts == 2 else 5.0}


def noted_preprocessing(note: Path, metadata: Mapping[str, Any]) -> ImagePreprocessing:
    """Of pictures, as `metadata`, of the file `note`, has it, or CLIP's own."""
    return ImagePreprocessing.from_json(checked_table(note, metadata, "image_processor", {}), note)


def checked_table(
    note: Path, metadata: Mapping[str, Any], key: str, usual: Mapping[str, Any]
) -> Mapping[str, Any]:
    """A part's config as `metadata`, of the file `note`, has it, or the usual one; within limits.

    Raises:
        CheckpointError: it cannot be used.
    """
    table = metadata.get(key, usual)
    if not isinstance(table, Mapping):
        raise CheckpointError(
            "a note cannot be used", file=note, key=key, expected="{...}", found=repr(table)
        )
    limits.check_limits(table, LIMITS.get(key, {}), note)
    return table


def _expect_class(file: Path, config: Mapping[str, Any], expected: str) -> None:
    found = config.get("_class_name")
    if found != expected:
        raise CheckpointError("not a Wan model", file=file, key="_class_name", expected=expected, found=found)


def _transformer_config(file: Path) -> tuple[ModelKind, dict[str, Any]]:
    official = read_json(file)
    kind = kind_named(official.get("model_type", "t2v"), file)
    expected = kind.official_class
    _expect_class(file, {"_class_name": expected, **official}, expected)
    for key in ("dim", "num_heads", "num_layers", "ffn_dim"):
        if key not in official:
            raise CheckpointError("a config lacks a size", file=file, key=key, expected="a number")
    limits.check_limits(official, limits.OFFICIAL_TRANSFORMER, file)
    config = {ours: official[theirs] for theirs, ours in _OFFICIAL_FIELDS.items() if theirs in official}
    config["attention_head_dim"] = official["dim"] // official["num_heads"]
    if kind.takes_control:
        config.setdefault("vace_layers", list(range(0, official["num_layers"], 2)))  # as the authors' class
    return kind, config


def _image_fields(file: Path, config: Mapping[str, Any], metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What a network attends to beside the text, which the official config leaves out: Wan2.2 has two
    networks without, Wan2.1 one, and an image encoder.
    """
    noted = metadata.get("transformer")
    if isinstance(noted, Mapping):
        fields = {key: noted[key] for key in _IMAGE_FIELDS if noted.get(key) is not None}
        limits.check_limits(fields, limits.TRANSFORMER, file.parent / METADATA_FILE)
        return fields
    dim = config["num_attention_heads"] * config["attention_head_dim"]
    fields = {"image_dim": _IMAGE_ENCODER_CONFIG["hidden_size"], "added_kv_proj_dim": dim}
    two_pictures = read_json(file)["model_type"] == IMAGE_TO_VIDEO.frames_type
    return fields | ({"pos_embed_seq_len": 2 * _PICTURE_ROWS} if two_pictures else {})


def official_transformer_config(config: Mapping[str, Any], kind: ModelKind) -> dict[str, Any]:
    """The official `config.json` of a transformer whose config stands in diffusers' words."""
    official = {
        theirs: config[ours] for theirs, ours in _OFFICIAL_FIELDS.items() if config.get(ours) is not None
    }
    dim = config["num_attention_heads"] * config["attention_head_dim"]
    two_pictures = config.get("pos_embed_seq_len") is not None
    named = {
        "_class_name": kind.official_class,
        "model_type": kind.frames_type if two_pictures else kind.model_type,
    }
    return {**named, "dim": dim, "text_len": 512, **official}
