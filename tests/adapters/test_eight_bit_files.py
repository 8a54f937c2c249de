"""Adapters on files whose weights are in 8 bits."""

from __future__ import annotations

import shutil

import pytest
import torch
from eight_bit import in_eight_bits
from running import config_for
from safetensors.torch import load_file, save_file
from test_videos import adapter, settings

from chitu_diffusion.engine import Engine
from chitu_diffusion.models.convert import convert
from chitu_diffusion.ops.fused import quantise
from chitu_diffusion.task.lora import Lora


@pytest.mark.parametrize("originals", [True, False])
def test_onto_a_file_in_8_bits_it_is_merged_into_what_that_stands_for(
    tiny_folder, tmp_path, originals
) -> None:
    """And taken out, layers have the file's very rows again, which rounding anew would not give."""
    official = convert(tiny_folder, tmp_path / "official", "official").path
    (official / "manifest.json").unlink()
    file = official / "diffusion_pytorch_model.safetensors"
    stored, said, plain = in_eight_bits(load_file(file), "rows")
    save_file(stored, file, metadata=said)
    wide = shutil.copytree(official, tmp_path / "wide")
    save_file(plain, wide / file.name)
    lora = [Lora(str(adapter(tiny_folder, tmp_path)))]
    with Engine(config_for(official, tmp_path)) as engine, Engine(config_for(wide, tmp_path)) as other:
        for each in (engine, other):
            each.backend.use_adapters(lora)
        merged = other.backend.model_pool[0].state_dict()
        found = engine.backend.model_pool[0].state_dict()
        assert all(torch.equal(found[name], value) for name, value in merged.items())
    quant = {"quant": "fp8", "quant_keep": "attn2", "quant_originals": originals}
    with Engine(settings(official, tmp_path, **quant)) as engine:
        layer = engine.backend.model_pool[0].get_submodule("blocks.1.attn1.to_q")
        before = layer.weight_float8.view(torch.uint8).clone()
        scale = layer.weight_scale.clone()
        engine.backend.use_adapters(lora)
        expected = quantise(merged["blocks.1.attn1.to_q.weight"])
        assert torch.equal(layer.weight_float8.view(torch.uint8), expected.values.view(torch.uint8))
        assert torch.equal(layer.weight_scale, expected.scale)
        engine.backend.use_adapters()
        assert torch.equal(layer.weight_float8.view(torch.uint8), before)
        assert torch.equal(layer.weight_scale, scale)
