"""A small model as people have large ones: each part a file of its own, in ComfyUI's folders."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from chitu_diffusion.models.convert import convert
from chitu_diffusion.models.folder import ModelFolder, read_folder

STEM = "diffusion_pytorch_model"


def official_tensors(folder: Path, place: Path) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
    """(each expert's tensors, the VAE's), under official names."""
    official = convert(folder, place, "official").path
    homes = [official / name for name in ("high_noise_model", "low_noise_model")]
    homes = homes if homes[0].is_dir() else [official]
    (file,) = official.glob("Wan2.*_VAE.pth")
    vae = torch.load(file, weights_only=True)
    experts = [
        {
            name: value
            for file in sorted(home.glob(f"{STEM}*.safetensors"))
            for name, value in load_file(file).items()
        }
        for home in homes
    ]
    return experts, vae


def text_tensors(folder: Path) -> dict[str, Tensor]:
    """The text encoder's, under the library's names."""
    return load_file(folder / "text_encoder" / "model.safetensors")


def note_of(folder: ModelFolder) -> dict:
    """What a note must say of a model that is not of published sizes."""
    heads = folder.components["transformer"].config
    names = ("num_attention_heads", "attention_head_dim")
    scheduler = {**folder.scheduler}
    image = {}
    if folder.preprocessing is not None:
        encoder = {**folder.components["image_encoder"].config}
        image = {"image_encoder": encoder, "image_processor": folder.preprocessing.to_json()}
    return {
        **image,
        **folder.metadata,
        "transformer": {name: heads[name] for name in names},
        "vae": {**folder.components["vae"].config},
        "text_encoder": {**folder.components["text_encoder"].config},
        "scheduler": scheduler,
    }


def write_comfy(folder: Path, place: Path, name: str = "tiny", *, spiece: bytes | None = None) -> Path:
    """Writes a model's folder as ComfyUI's; returns the (high-noise) transformer's file."""
    experts, vae = official_tensors(folder, place / "official")
    shutil.rmtree(place / "official")
    model = read_folder(folder)
    names = [f"{name}_{word}_noise" for word in ("high", "low")] if len(experts) == 2 else [name]
    for each in ("diffusion_models", "text_encoders", "vae"):
        (place / each).mkdir(parents=True)
    for stem, tensors in zip(names, experts, strict=True):
        save_file(tensors, place / "diffusion_models" / f"{stem}.safetensors")
        note = place / "diffusion_models" / f"{stem}.chitu.json"
        note.write_text(json.dumps(note_of(model)))
    text = text_tensors(folder)
    if spiece is None:
        shutil.copytree(model.tokenizer, place / "tokenizer")
    else:
        text["spiece_model"] = torch.tensor(list(spiece), dtype=torch.uint8)
    save_file(text, place / "text_encoders" / "umt5_tiny.safetensors")
    save_file(vae, place / "vae" / "wan_tiny_vae.safetensors")
    if model.preprocessing is not None:
        vision = load_file(folder / "image_encoder" / "model.safetensors")
        vision["embeddings.position_ids"] = torch.arange(5)[None]  # as older libraries saved them
        (place / "clip_vision").mkdir()
        save_file(vision, place / "clip_vision" / "clip_vision_h.safetensors")
    return place / "diffusion_models" / f"{names[0]}.safetensors"


def sentencepiece_model(pieces: list[tuple[str, float, int]], chars: bytes = b"") -> bytes:
    """A SentencePiece model as its protocol buffer: pieces are (text, score, kind)."""

    def number(value: int) -> bytes:
        out = b""
        while value > 0x7F:
            out += bytes([value & 0x7F | 0x80])
            value >>= 7
        return out + bytes([value])

    def field(index: int, data: bytes) -> bytes:
        return number(index << 3 | 2) + number(len(data)) + data

    def plain(index: int, value: int) -> bytes:
        return number(index << 3) + number(value)

    model = b""
    for text, score, kind in pieces:
        model += field(
            1, field(1, text.encode()) + number(2 << 3 | 5) + struct.pack("<f", score) + plain(3, kind)
        )
    # unigram; the places of <unk>, <s> (none), </s> and <pad>
    trainer = (
        plain(3, 1)
        + plain(4, len(pieces))
        + plain(40, 2)
        + plain(41, 2**64 - 1)
        + plain(42, 1)
        + plain(43, 0)
    )
    return model + field(2, trainer) + field(3, field(1, b"identity") + field(2, chars))
