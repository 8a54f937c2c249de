"""What a file of weights is, from the names and shapes of its tensors alone: which networks lie in it, and of
a transformer its sizes and what it makes of what. Reads no values and no configs.

The marks are those by which ComfyUI tells Wan's networks from one another (comfy/model_detection.py).
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from chitu_diffusion.errors import CheckpointError
from chitu_diffusion.models.wan.checkpoint_names import official_transformer_name

Shapes = Mapping[str, tuple[int, ...]]
_PLACES = MappingProxyType(
    {
        "transformer": ("head.modulation", "condition_embedder.time_proj.weight"),
        "vae": ("decoder.conv1.weight", "decoder.conv_in.weight"),
        "text_encoder": (
            "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight",
            "blocks.1.pos_embedding.embedding.weight",
        ),
        "image_encoder": ("embeddings.class_embedding", "visual.cls_embedding"),
    }
)
"""A part -> a tensor that it has and no other, T5's encoder neither: under official names, the libraries'."""
TITLES = MappingProxyType(
    {
        "transformer": "transformer",
        "vae": "VAE",
        "text_encoder": "text encoder",
        "image_encoder": "image encoder",
        "tokenizer": "tokenizer",
    }
)
"""What parts are called in sentences."""
_ADAPTER = re.compile(r"lora_(A|B|up|down)\b|\.(diff|diff_b|hada_w1_a|lokr_w1)$")
_FOREIGN = MappingProxyType(
    {
        "control_adapter.conv": "a camera model (Fun-Camera)",
        "casual_audio_encoder": "a speech-to-video model (S2V)",
        "face_adapter": "an Animate model",
        "audio_proj": "a model that follows speech",
        "blocks.0.block": "an Animate-2 model",
        "proj_l": "TurboWan's sparse attention with weights of its own (SLA)",
        "ref_conv": "a Fun-Control model with reference images",
    }
)
"""Part of a tensor's name -> the kind of network that has it, and is not made here."""
USUAL_HEAD = 128
"""Width of a head in every published Wan; tensors do not tell it."""


def parts_within(names: Collection[str]) -> dict[str, str]:
    """The networks in a file: part -> what its names begin with, "" where they stand alone."""
    found = {}
    for part, marks in _PLACES.items():
        for mark in marks:
            ends = (name for name in names if name == mark or name.endswith(f".{mark}"))
            if (key := next(ends, None)) is not None:
                found[part] = key.removesuffix(mark)
                break
    return found


def described(names: Collection[str]) -> str:
    """What a file of tensors is, in a few words."""
    parts = parts_within(names)
    if parts:
        return "a file with a Wan model's " + " and ".join(TITLES[part] for part in parts)
    if any(_ADAPTER.search(name) for name in names):
        return "an adapter, which goes with --lora onto a model"
    return f"a file of {len(names)} tensors, none of them a Wan network's"


def transformer_in(shapes: Shapes, file: Path, head: int = USUAL_HEAD) -> tuple[str, dict[str, Any]]:
    """A transformer's kind, as the official `config.json` calls it (`model_type`), and its config in
    diffusers' words.

    Args:
        shapes: of all its tensors, by official names or diffusers'.
        file: for errors.
        head: width of a head.

    Raises:
        CheckpointError: a network of a kind that is not made here, or one of other heads.
    """
    for mark, title in _FOREIGN.items():
        if (key := next((name for name in shapes if f".{mark}." in f".{name}"), None)) is not None:
            raise CheckpointError(
                f"this is {title}, which is not supported",
                file=file,
                key=key,
                remedy="use a text-to-video or image-to-video model of Wan",
            )
    official = "head.modulation" in shapes

    def shape(name: str) -> tuple[int, ...]:
        key = official_transformer_name(name) if official else name
        if key not in shapes:
            raise CheckpointError("a transformer lacks a tensor", file=file, key=key)
        return shapes[key]

    blocks = {int(found[1]) for name in shapes if (found := re.match(r"blocks\.(\d+)\.", name))}
    dim, channels, *patch = _patch_embedding(shape("patch_embedding.weight"), shape("patch_embedding.bias"))
    if dim % head or len(patch) != 3:
        raise CheckpointError(
            "the width of a transformer is no multiple of its heads'", file=file, expected=head, found=dim
        )
    values = patch[0] * patch[1] * patch[2]
    config: dict[str, Any] = {
        "patch_size": patch,
        "num_attention_heads": dim // head,
        "attention_head_dim": head,
        "in_channels": channels,
        "out_channels": shape("proj_out.weight")[0] // values,
        "text_dim": shape("condition_embedder.text_embedder.linear_1.weight")[1],
        "freq_dim": shape("condition_embedder.time_embedder.linear_1.weight")[1],
        "ffn_dim": shape("blocks.0.ffn.net.0.proj.weight")[0],
        "num_layers": max(blocks, default=-1) + 1,
        "cross_attn_norm": (
            official_transformer_name("blocks.0.norm2.weight") if official else "blocks.0.norm2.weight"
        )
        in shapes,
    }
    return _kind_of(shapes, config, official, file), config


def _patch_embedding(weight: tuple[int, ...], bias: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a patch embedding's weight; of one that GGUF could not hold, as every Wan has it."""
    if len(weight) > 4 or not bias:
        return weight
    patch = (1, 2, 2)
    return (bias[0], math.prod(weight) // (bias[0] * math.prod(patch)), *patch)


def _kind_of(shapes: Shapes, config: dict[str, Any], official: bool, file: Path) -> str:
    """The `model_type`; the config of a network with parts for pictures or controls is completed."""
    control = shapes.get("vace_patch_embedding.weight")
    if control is not None:
        hints = {name.split(".")[1] for name in shapes if name.startswith("vace_blocks.")}
        layers = config["num_layers"]
        config["vace_layers"] = list(range(0, layers, max(1, layers // max(1, len(hints)))))
        config["vace_in_channels"] = control[1]
        return "vace"
    taken = config["in_channels"]
    given = config["out_channels"]
    norm, rows = (
        official_transformer_name(f"condition_embedder.image_embedder.{name}")
        if official
        else f"condition_embedder.image_embedder.{name}"
        for name in ("norm1.weight", "pos_embed")
    )
    if norm in shapes:
        config["image_dim"] = shapes[norm][0]
        config["added_kv_proj_dim"] = config["num_attention_heads"] * config["attention_head_dim"]
        if rows in shapes:
            config["pos_embed_seq_len"] = shapes[rows][1]
            return "flf2v"
        return "i2v"
    if taken == given:
        return "ti2v" if taken == 48 else "t2v"
    if taken == 2 * given + 4:  # the latent, a mask of four channels, the picture's latent
        return "i2v"
    raise CheckpointError(
        "a transformer of a kind that is not supported",
        file=file,
        expected=f"{given} channels in and out, or {2 * given + 4} in for image to video",
        found=f"{taken} channels in, {given} out: a Fun-Control or editing model, by its channels",
        remedy="use a text-to-video or image-to-video model of Wan",
    )
