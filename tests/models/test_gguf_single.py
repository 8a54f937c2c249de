"""GGUF files as single files: one network each, beside others."""

from __future__ import annotations

from pathlib import Path

import torch
from gguf_files import write_gguf
from safetensors.torch import load_file
from single_files import write_comfy
from tiny_model import write_tiny_model

from chitu_diffusion.models.convert import verify
from chitu_diffusion.models.loading import load_part
from chitu_diffusion.models.registry import resolve_model


def test_a_transformer_and_a_text_encoder_may_be_gguf(tmp_path: Path) -> None:
    """Found beside one another, and with the numbers of their blocks."""
    file = write_comfy(write_tiny_model(tmp_path / "tiny"), tmp_path / "comfy")
    tensors = {name.removeprefix("model.diffusion_model."): value for name, value in load_file(file).items()}
    flat = {**tensors, "patch_embedding.weight": tensors["patch_embedding.weight"].flatten(1)}
    kinds = {
        name: "Q8_0" for name, value in tensors.items() if name.startswith("blocks.") and value.ndim == 2
    }
    held = write_gguf(file.with_suffix(".gguf"), flat, kinds)
    file.unlink()
    (text,) = file.parent.parent.glob("text_encoders/*.safetensors")
    values = {name: value for name, value in load_file(text).items() if value.dtype.is_floating_point}
    narrow = {name: "Q8_0" for name, value in values.items() if value.ndim == 2 and value.shape[1] % 32 == 0}
    kept = write_gguf(text.with_suffix(".gguf"), values, narrow, architecture="t5encoder")
    text.unlink()
    tokenizer = str(tmp_path / "tiny" / "tokenizer")
    found = resolve_model(str(file.with_suffix(".gguf")), parts={"tokenizer": tokenizer}).required()
    network = load_part(found, "transformer", dtype=torch.float32)
    theirs = held["blocks.1.ffn.0.weight"]
    assert torch.equal(network.get_parameter("blocks.1.ffn.net.0.proj.weight"), theirs)
    assert torch.equal(network.get_parameter("patch_embedding.weight"), tensors["patch_embedding.weight"])
    packed = load_part(found, "transformer", dtype=torch.float32, packed=True)
    assert torch.equal(packed.get_submodule("blocks.1.ffn.net.0.proj").unpacked(torch.float32), theirs)
    encoder = load_part(found, "text_encoder", dtype=torch.float32)
    name = "encoder.block.1.layer.0.SelfAttention.q.weight"
    assert torch.equal(dict(encoder.named_parameters())[f"network.{name}"], kept[name])
    assert any("Q8_0" in said.message for said in verify(file.with_suffix(".gguf")))
