"""What a file is, told by its tensors: every published size, from files that have names and shapes alone."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import WAN_TINY
from eight_bit import is_linear

from chitu_diffusion.errors import UsageError
from chitu_diffusion.models.detection import transformer_in
from chitu_diffusion.models.folder import usual_configs
from chitu_diffusion.models.kinds import TEXT_IMAGE_TO_VIDEO, TEXT_TO_VIDEO
from chitu_diffusion.models.loading import check_part
from chitu_diffusion.models.registry import resolve_model
from chitu_diffusion.models.wan.checkpoint_names import (
    official_text_name,
    official_transformer_name,
    official_vae_name,
)
from chitu_diffusion.models.wan.config import WanConfig
from chitu_diffusion.models.wan.image_encoder import build_image_encoder
from chitu_diffusion.models.wan.presets import FULL_SIZE
from chitu_diffusion.models.wan.text_encoder import build_text_encoder
from chitu_diffusion.models.wan.transformer import WanTransformer
from chitu_diffusion.models.wan.vae import build_vae


def shapes_of(config: WanConfig) -> dict[str, tuple[int, ...]]:
    """Under our names, which are diffusers'."""
    with torch.device("meta"):
        network = WanTransformer(config)
    return {name: tuple(value.shape) for name, value in network.state_dict().items()}


def write_hollow(path: Path, shapes: dict[str, tuple[int, ...]], eight_bit: bool = False) -> Path:
    """A file of zeros that takes no room: a header, and a hole of the right length."""
    header = {}
    end = 0
    for name, shape in shapes.items():
        small = eight_bit and is_linear(name, torch.empty(shape, device="meta"))
        size = torch.Size(shape).numel() * (1 if small else 2)
        header[name] = {
            "dtype": "F8_E4M3" if small else "BF16",
            "shape": shape,
            "data_offsets": [end, end + size],
        }
        end += size
    data = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(data)) + data)
        stream.truncate(8 + len(data) + end)
    return path


@pytest.mark.parametrize("name", FULL_SIZE)
@pytest.mark.parametrize("official", [True, False])
def test_tensors_tell_kind_and_sizes(name: str, official: bool) -> None:
    spec = FULL_SIZE[name]
    config = spec.transformers[0]
    shapes = {
        official_transformer_name(key) if official else key: shape for key, shape in shapes_of(config).items()
    }
    told, found = transformer_in(shapes, Path("file"))
    kind = "flf2v" if config.pos_embed_seq_len is not None else spec.kind.model_type
    assert (told, WanConfig.from_json(found)) == (kind, config)


@pytest.mark.parametrize(("layers", "hints", "places"), [(30, 15, [0, 2, 28]), (40, 8, [0, 5, 35])])
def test_controls_lie_evenly_over_the_blocks(layers: int, hints: int, places: list[int]) -> None:
    """As in both published sizes of VACE."""
    shapes = shapes_of(WanConfig(num_attention_heads=12, ffn_dim=8960, num_layers=layers))
    shapes |= {f"vace_blocks.{index}.proj_out.weight": (1536, 1536) for index in range(hints)}
    told, found = transformer_in({**shapes, "vace_patch_embedding.weight": (1536, 96, 1, 2, 2)}, Path("file"))
    layers_of = found["vace_layers"]
    assert (told, found["vace_in_channels"], len(layers_of)) == ("vace", 96, hints)
    assert [layers_of[0], layers_of[1], layers_of[-1]] == places


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ComfyUI's folders with full-size files."""
    place = tmp_path_factory.mktemp("models")
    usual = usual_configs(TEXT_TO_VIDEO, {"image_dim": 1280})
    for file, config, residual in (
        ("wan_2.1_vae", usual["vae"], False),
        ("wan2.2_vae", usual_configs(TEXT_IMAGE_TO_VIDEO, {})["vae"], True),
    ):
        vae = {name: tuple(value.shape) for name, value in build_vae(config).state_dict().items()}
        named = {official_vae_name(name, 2, residual): shape for name, shape in vae.items()}
        write_hollow(place / f"vae/{file}.safetensors", named)
    vision = build_image_encoder(usual["image_encoder"]).state_dict()
    write_hollow(
        place / "clip_vision/clip_vision_h.safetensors",
        {name: tuple(value.shape) for name, value in vision.items()},
    )
    text = {
        name: tuple(value.shape)
        for name, value in build_text_encoder(usual["text_encoder"]).state_dict().items()
    }
    del text["encoder.embed_tokens.weight"]
    write_hollow(place / "text_encoders/umt5_xxl_fp16.safetensors", text)
    official = {official_text_name(name): shape for name, shape in text.items()}
    write_hollow(place / "other/umt5-xxl-enc-bf16.safetensors", official)
    files = {
        "wan2.1_t2v_1.3B_fp16": "Wan2.1-T2V-1.3B",
        "wan2.1_t2v_14B_fp8_e4m3fn": "Wan2.1-T2V-14B",
        "wan2.2_t2v_high_noise_14B_fp16": "Wan2.2-T2V-A14B",
        "wan2.2_t2v_low_noise_14B_fp16": "Wan2.2-T2V-A14B",
        "Wan2_2-I2V-A14B-HIGH_fp8_e4m3fn": "Wan2.2-I2V-A14B",
        "Wan2_2-I2V-A14B-LOW_fp8_e4m3fn": "Wan2.2-I2V-A14B",
        "wan2.1_i2v_480p_14B_bf16": "Wan2.1-I2V-14B-480P",
        "wan2.1_i2v_720p_14B_fp8_e4m3fn": "Wan2.1-I2V-14B-720P",
        "wan2.1_flf2v_720p_14B_fp16": "Wan2.1-FLF2V-14B-720P",
        "wan2.2_ti2v_5B_fp16": "Wan2.2-TI2V-5B",
        "wan2.2_i2v_14B": "Wan2.2-I2V-A14B",
        "wan2.2_t2v_A14B": "Wan2.2-T2V-A14B",
        "wan22_t2v_14B": "Wan2.2-T2V-A14B",
        "wan22T2VHigh_v2": "Wan2.2-T2V-A14B",
        "wan22T2VLow_v2": "Wan2.2-T2V-A14B",
        "mixWAN22I2V_i2vHighV9": "Wan2.2-I2V-A14B",
        "mixWAN22I2V_i2vLowV9": "Wan2.2-I2V-A14B",
        "Wan2_1-I2V-14B-720P_fp8_e4m3fn": "Wan2.1-I2V-14B-720P",
        "wan2.1_t2v_14B_low_vram": "Wan2.1-T2V-14B",
        "wan_t2v_1.3B_high_quality": "Wan2.1-T2V-1.3B",
    }
    for name, model in files.items():
        shapes = shapes_of(FULL_SIZE[model].transformers[0])
        named = {official_transformer_name(key): shape for key, shape in shapes.items()}
        write_hollow(place / "diffusion_models" / f"{name}.safetensors", named, "fp8" in name)
    return place


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("wan2.1_t2v_1.3B_fp16", "Wan2.1-T2V-1.3B"),
        ("wan2.1_t2v_14B_fp8_e4m3fn", "Wan2.1-T2V-14B"),
        ("wan2.2_t2v_high_noise_14B_fp16", "Wan2.2-T2V-A14B"),
        ("Wan2_2-I2V-A14B-LOW_fp8_e4m3fn", "Wan2.2-I2V-A14B"),
        ("wan2.1_i2v_480p_14B_bf16", "Wan2.1-I2V-14B-480P"),
        ("wan2.1_i2v_720p_14B_fp8_e4m3fn", "Wan2.1-I2V-14B-720P"),
        ("wan2.1_flf2v_720p_14B_fp16", "Wan2.1-FLF2V-14B-720P"),
        ("wan2.2_ti2v_5B_fp16", "Wan2.2-TI2V-5B"),
        ("wan22T2VHigh_v2", "Wan2.2-T2V-A14B"),
        ("mixWAN22I2V_i2vLowV9", "Wan2.2-I2V-A14B"),
        ("Wan2_1-I2V-14B-720P_fp8_e4m3fn", "Wan2.1-I2V-14B-720P"),
        ("wan2.1_t2v_14B_low_vram", "Wan2.1-T2V-14B"),
        ("wan_t2v_1.3B_high_quality", "Wan2.1-T2V-1.3B"),
    ],
)
def test_a_full_size_file_is_the_model_of_its_name(models: Path, file: str, name: str) -> None:
    """With its authors' defaults, shift and boundary."""
    parts = {"tokenizer": str(WAN_TINY / "tokenizer")}
    spec, folder = resolve_model(str(models / "diffusion_models" / f"{file}.safetensors"), parts=parts)
    own = FULL_SIZE[name]
    assert (spec.name, spec.transformers, spec.kind, spec.boundary) == (
        own.name,
        own.transformers,
        own.kind,
        own.boundary,
    )
    assert spec.defaults == own.defaults and spec.geometry == own.geometry and spec.measured == own.measured
    assert folder is not None
    for role in folder.components.keys() - {"text_encoder", "transformer_2"}:
        check_part(folder, role)


def test_a_text_encoder_may_have_the_official_names(models: Path) -> None:
    parts = {
        "tokenizer": str(WAN_TINY / "tokenizer"),
        "text_encoder": str(models / "other/umt5-xxl-enc-bf16.safetensors"),
    }
    file = models / "diffusion_models" / "wan2.1_t2v_1.3B_fp16.safetensors"
    check_part(resolve_model(str(file), parts=parts).required(), "text_encoder")


@pytest.mark.parametrize("file", ["wan2.2_i2v_14B", "wan2.2_t2v_A14B", "wan22_t2v_14B"])
def test_which_of_two_experts_a_file_is_is_asked(models: Path, file: str) -> None:
    with pytest.raises(UsageError, match="does not tell which.*--low-noise-model"):
        resolve_model(str(models / "diffusion_models" / f"{file}.safetensors"))


def test_two_experts_that_were_merged_are_one_with_their_defaults(models: Path, tmp_path: Path) -> None:
    """Told, or seen by a checkpoint that has all parts in one file."""
    parts = {"tokenizer": str(WAN_TINY / "tokenizer"), "low_noise_model": "none"}
    told = resolve_model(str(models / "diffusion_models" / "wan2.2_i2v_14B.safetensors"), parts=parts).spec
    own = FULL_SIZE["Wan2.2-I2V-A14B"]
    shapes = shapes_of(own.transformers[0])
    named = {
        f"model.diffusion_model.{official_transformer_name(key)}": shape for key, shape in shapes.items()
    }
    vae = build_vae(usual_configs(TEXT_TO_VIDEO, {})["vae"]).state_dict()
    named |= {f"vae.{official_vae_name(name, 2)}": tuple(value.shape) for name, value in vae.items()}
    file = write_hollow(tmp_path / "checkpoints" / "wan2.2-i2v-aio.safetensors", named)
    parts = {**parts, "text_encoder": str(models / "text_encoders/umt5_xxl_fp16.safetensors")}
    del parts["low_noise_model"]
    for spec in (told, resolve_model(str(file), parts=parts).spec):
        assert (spec.transformers, spec.boundary, spec.kind) == (own.transformers[:1], None, own.kind)
        assert spec.defaults == replace(own.defaults, guidance=(3.5,))
