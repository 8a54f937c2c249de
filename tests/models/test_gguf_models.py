"""Models whose transformer is a GGUF file: the same videos as from files with its values in full, packed or
not, at every memory level, with adapters, on ranks; and what `verify`, `convert` and forecasts say of them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter
from gguf_files import write_gguf
from ranks import run_ranks
from running import CAT, config_for, relative_error
from safetensors.torch import load_file, save_file
from torch import Tensor

from chitu_diffusion.backend import DiffusionBackend
from chitu_diffusion.config import EngineConfig, RankPlace
from chitu_diffusion.engine import Engine
from chitu_diffusion.errors import CheckpointError
from chitu_diffusion.memory.offload import OffloadManager, OffloadPart, bytes_of
from chitu_diffusion.models.convert import convert, verify
from chitu_diffusion.models.folder import official_transformer_config, read_folder
from chitu_diffusion.models.kinds import TEXT_TO_VIDEO
from chitu_diffusion.models.loading import load_text_encoder, load_transformer
from chitu_diffusion.models.registry import resolve_model
from chitu_diffusion.models.wan.checkpoint_names import official_transformer_name
from chitu_diffusion.models.wan.presets import FULL_SIZE
from chitu_diffusion.models.wan.transformer import WanTransformer
from chitu_diffusion.ops.packed_linear import BLOCKS, PackedLinear

SHAPES = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 2}
WEIGHTS = "diffusion_pytorch_model.safetensors"


def kinds_of(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """As a mix of a file's packings has them: linear layers of the blocks, one type after the other."""
    linear = [name for name, value in tensors.items() if name.startswith("blocks.") and value.ndim == 2]
    narrow = {name for name in linear if tensors[name].shape[1] % 256}
    wide = [name for name in linear if name not in narrow]
    kinds = {name: ("Q4_K", "Q5_K", "Q6_K", "Q8_0", "Q2_K")[n % 5] for n, name in enumerate(wide)}
    return kinds | dict.fromkeys(narrow, "Q8_0")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model in the official layout with a GGUF file, and the same numbers in float32."""
    from tiny_model import write_tiny_model

    place = tmp_path_factory.mktemp("gguf")
    convert(write_tiny_model(place / "source", heads=16), place / "packed", "official")
    tensors = load_file(place / "packed" / WEIGHTS)
    flat = {**tensors, "patch_embedding.weight": tensors["patch_embedding.weight"].flatten(1)}
    held = write_gguf(place / "packed" / "wan-Q4_K_M.gguf", flat, kinds_of(tensors))
    shutil.copytree(place / "packed", place / "plain", ignore=shutil.ignore_patterns("*.gguf", "manifest*"))
    values = {name: value.reshape(tensors[name].shape).contiguous() for name, value in held.items()}
    save_file(values, place / "plain" / WEIGHTS)
    (place / "packed" / WEIGHTS).unlink()
    (place / "packed" / "manifest.json").unlink()
    return place / "packed", place / "plain"


def settings(folder: Path, place: Path, level: int = 0, **infer: Any) -> EngineConfig:
    config = config_for(folder, place)
    config.infer.diffusion.low_mem_level = level
    for name, value in infer.items():
        setattr(config.infer, name, value)
    return config


def video_of(engine: Engine, lora: str | None = None) -> Tensor:
    return torch.as_tensor(engine.generate(CAT, seed=3, lora=lora, **SHAPES).frames)


def packed_in(network: WanTransformer) -> list[PackedLinear]:
    return [module for module in network.modules() if isinstance(module, PackedLinear)]


def test_a_video_is_that_of_the_numbers_in_full(folders: tuple[Path, Path], tmp_path: Path) -> None:
    packed, plain = folders
    with Engine(settings(plain, tmp_path)) as engine:
        expected = video_of(engine)
        size = engine.backend.memory_estimate().parts["transformer"][1]
        assert not packed_in(engine.backend.model_pool[0])
    with Engine(settings(packed, tmp_path)) as engine:
        assert torch.equal(video_of(engine), expected)
        layers = packed_in(engine.backend.model_pool[0])
        assert {layer.packing for layer in layers} == set(BLOCKS)  # Q2_K was unpacked
        assert all(layer._parameters["weight"] is None for layer in layers)
        found = engine.backend.memory_estimate().parts["transformer"][1]
        assert found < 0.6 * size
    args = settings(packed, tmp_path)
    planned = DiffusionBackend.without_weights(args, resolve_model(str(packed))).memory_estimate()
    assert planned.parts["transformer"][1] == found
    with Engine(settings(packed, tmp_path, packed=False)) as engine:
        assert torch.equal(video_of(engine), expected)
        assert not packed_in(engine.backend.model_pool[0])
        assert engine.backend.memory_estimate().parts["transformer"][1] == size


@pytest.mark.parametrize("level", [2, 3, 4])
def test_memory_levels_change_nothing(folders: tuple[Path, Path], tmp_path: Path, level: int) -> None:
    latents = []
    for folder in folders:
        with Engine(settings(folder, tmp_path, level)) as engine:
            latents.append(video_of(engine))
    assert torch.equal(*latents)


def test_in_bfloat16_numbers_are_rounded_once(folders: tuple[Path, Path]) -> None:
    packed, plain = (
        load_transformer(read_folder(folder), dtype=torch.bfloat16, packed=True) for folder in folders
    )
    for name, layer in packed.named_modules():
        if isinstance(layer, PackedLinear):
            assert torch.equal(layer.unpacked(torch.bfloat16), plain.get_parameter(f"{name}.weight")), name
    latent = torch.randn(1, 4, 2, 4, 4).bfloat16()
    text = torch.randn(1, 5, 32).bfloat16()
    with torch.no_grad():
        assert torch.equal(packed(latent, text, 500.0), plain(latent, text, 500.0))


def test_compiled_blocks_are_as_near(folders: tuple[Path, Path]) -> None:
    packed, plain = (
        load_transformer(read_folder(folder), dtype=torch.float32, packed=True) for folder in folders
    )
    packed.compile_blocks(backend="eager")
    latent = torch.randn(1, 4, 2, 4, 4)
    text = torch.randn(1, 5, 32)
    with torch.no_grad():
        assert relative_error(packed(latent, text, 500.0), plain(latent, text, 500.0)) < 1e-5


def adapter(place: Path, seed: int) -> str:
    torch.manual_seed(seed)
    sizes = {
        "blocks.0.self_attn.q": (256, 256),
        "blocks.1.ffn.2": (256, 64),
        "blocks.1.cross_attn.o": (256, 256),
    }
    tensors = {}
    for name, (rows, columns) in sizes.items():
        tensors[f"diffusion_model.{name}.lora_down.weight"] = torch.randn(3, columns) * 0.2
        tensors[f"diffusion_model.{name}.lora_up.weight"] = torch.randn(rows, 3) * 0.2
    save_file(tensors, place / f"{seed}.safetensors")
    return str(place / f"{seed}.safetensors")


@pytest.mark.parametrize("level", [0, 4])
def test_adapters_are_merged_and_leave(folders: tuple[Path, Path], tmp_path: Path, level: int) -> None:
    """Bit for bit as into weights in full, two that take turns; afterwards there are only the blocks."""
    first, second = (adapter(tmp_path, seed) for seed in (1, 2))
    asked = [None, first, first, second, None]
    videos = []
    for folder in folders:
        with Engine(settings(folder, tmp_path, level)) as engine:
            network = engine.backend.model_pool[0]
            before = bytes_of(network)
            videos.append([video_of(engine, lora) for lora in asked])
            if folder == folders[0]:
                assert bytes_of(network) == before
                engine.backend.use_adapters()
                changed = [layer for layer in packed_in(network) if layer._parameters["weight"] is not None]
                assert not changed
    assert all(map(torch.equal, *videos))
    assert not torch.equal(videos[0][0], videos[0][1]) and not torch.equal(videos[0][1], videos[0][3])
    assert torch.equal(videos[0][0], videos[0][4])


def test_a_widened_layer_moves_with_its_part(folders: tuple[Path, Path]) -> None:
    """Two memories, as beside a GPU: what is new comes along, what is gone leaves nothing behind."""
    network = load_transformer(read_folder(folders[0]), dtype=torch.float32, packed=True)
    parts = {"transformer": OffloadPart(network, "denoiser", list(network.blocks))}
    manager = OffloadManager(torch.device("cpu"), parts=parts, level=4, apart=True)
    manager.use("transformer")
    home = manager._parts["transformer"].home
    assert len(list(manager.prefetched_blocks("transformer") or ())) == 2
    known = len(home)
    layer = packed_in(network)[0]
    value = torch.randn(layer.out_features, layer.in_features)
    layer.widen(value.clone())
    manager.retake("transformer")
    manager.use("transformer")
    for block in manager.prefetched_blocks("transformer") or ():
        if layer in block.modules():
            assert torch.equal(layer.wide(torch.float32), value)
    assert len(home) == known + 1
    layer.widen(None)
    manager.retake("transformer")
    manager.use("transformer")
    assert len(home) == known
    manager.close()


def _on_a_rank(rank: int, world: int, store: Any, folder: str, expected: str) -> None:
    config = settings(Path(folder), Path(expected).parent)
    config.infer.diffusion.cp_size = world
    with Engine(config, place=RankPlace(rank, world, store=store)) as engine:
        if rank:
            engine.run_worker()
        else:
            # sums of other lengths, which may round a pixel the other way
            assert (video_of(engine).int() - torch.load(expected).int()).abs().max() <= 1


def test_two_ranks_show_the_same(folders: tuple[Path, Path], tmp_path: Path) -> None:
    with Engine(settings(folders[1], tmp_path)) as engine:
        torch.save(video_of(engine), tmp_path / "expected.pt")
    run_ranks(2, _on_a_rank, str(folders[0]), str(tmp_path / "expected.pt"), errors=tmp_path)


def test_fp8_is_rounded_from_the_blocks_numbers(folders: tuple[Path, Path], tmp_path: Path) -> None:
    given: dict[str, Any] = {
        "quant": "fp8",
        "quant_keep": "attn2",
        "quant_from": 0.0,
        "quant_originals": False,
    }
    videos = []
    for folder in folders:
        with Engine(settings(folder, tmp_path, **given)) as engine:
            videos.append(video_of(engine))
            layers = packed_in(engine.backend.model_pool[0])
    assert torch.equal(*videos) and not layers
    with Engine(settings(folders[0], tmp_path, **given)) as engine:
        kept = packed_in(engine.backend.model_pool[0])
        assert kept and all(layer in engine.backend.model_pool[0].blocks.modules() for layer in kept)


def test_verify_and_convert_know_it(folders: tuple[Path, Path], tmp_path: Path) -> None:
    packed, plain = folders
    (said,) = [found for found in verify(packed, deep=True) if found.part == "transformer"]
    assert said.ok and "Q2_K/Q4_K/Q5_K/Q6_K/Q8_0" in said.message
    convert(packed, tmp_path / "wide", "diffusers", dtype=torch.float32)
    ours = load_transformer(read_folder(tmp_path / "wide")).state_dict()
    theirs = load_transformer(read_folder(plain)).state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    # nobody asked for a dtype: what was packed is worth 16 bits, the rest stays
    convert(packed, tmp_path / "half", "diffusers")
    half = load_file(tmp_path / "half" / "transformer" / WEIGHTS)
    assert half["blocks.0.attn1.to_q.weight"].dtype is torch.bfloat16
    assert half["patch_embedding.weight"].dtype is torch.float32


def test_in_diffusers_layout_official_names_are_known(folders: tuple[Path, Path], tmp_path: Path) -> None:
    convert(folders[1], tmp_path / "model", "diffusers")
    place = tmp_path / "model" / "transformer"
    (place / WEIGHTS).unlink()
    shutil.copy(next(folders[0].glob("*.gguf")), place)
    found = load_transformer(read_folder(tmp_path / "model"), dtype=torch.float32).state_dict()
    expected = load_transformer(read_folder(folders[1])).state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_text_encoder_may_be_one(tmp_path: Path, tiny_folder: Path) -> None:
    """Under llama.cpp's names."""
    folder = Path(
        shutil.copytree(tiny_folder, tmp_path / "model", ignore=shutil.ignore_patterns("manifest*"))
    )
    names = {"layer.0.SelfAttention.": "attn_", "relative_attention_bias": "rel_b",
             "layer.0.layer_norm": "attn_norm", "layer.1.layer_norm": "ffn_norm",
             "layer.1.DenseReluDense.wi_0": "ffn_gate",
             "layer.1.DenseReluDense.wi_1": "ffn_up", "layer.1.DenseReluDense.wo": "ffn_down",
             "encoder.block.": "enc.blk.", "encoder.final_layer_norm": "enc.output_norm",
             "shared": "token_embd"}  # fmt: skip
    file = folder / "text_encoder" / "model.safetensors"
    tensors = {}
    for name, value in load_file(file).items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        if name != "encoder.embed_tokens.weight":
            tensors[name] = value
    file.unlink()
    kinds = {name: "Q8_0" for name, value in tensors.items() if value.ndim == 2 and value.shape[1] % 32 == 0}
    write_gguf(folder / "text_encoder" / "umt5.gguf", tensors, kinds, architecture="t5encoder")
    found, expected = (
        load_text_encoder(read_folder(place), dtype=torch.float32).encode([CAT])
        for place in (folder, tiny_folder)
    )
    # 8 bits with a scale for each 32 numbers: about 0.4 % a weight
    assert relative_error(found, expected) < 0.05


def test_a_text_encoder_s_file_is_no_transformer(folders: tuple[Path, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders[0], tmp_path / "model"))
    file = next(folder.glob("*.gguf"))
    write_gguf(file, {"token_embd.weight": torch.ones(4, 4)}, {}, architecture="t5encoder")
    with pytest.raises(CheckpointError, match="tensor.* missing"):
        load_transformer(read_folder(folder))


def mixed(name: str) -> str:
    """A Q4_K_M mix with all values and second halves of feed-forwards in Q6_K, which is more than usual."""
    return "Q6_K" if name.endswith((".v.weight", "ffn.2.weight")) else "Q4_K"


def test_14b_in_q4_k_m_stays_below_10_gib(tmp_path: Path) -> None:
    """By a file of that size with a true header, and a hole for the rest."""
    config = FULL_SIZE["Wan2.1-T2V-14B"].transformers[0]
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in WanTransformer(config).state_dict().items()}
    file = tmp_path / "wan-Q4_K_M.gguf"
    writer = GGUFWriter(file, "wan")
    for ours, shape in shapes.items():
        name = official_transformer_name(ours)
        packing = mixed(name) if name.startswith("blocks.") and len(shape) == 2 else "F32"
        count, size = GGML_QUANT_SIZES[GGMLQuantizationType[packing]]
        row = (*shape[:-1], shape[-1] // count * size) if packing != "F32" else tuple(shape)
        kind = np.dtype(np.float32 if packing == "F32" else np.uint8)
        writer.add_tensor_info(
            name, row, kind, shape.numel() // count * size, raw_dtype=GGMLQuantizationType[packing]
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with file.open("r+b") as stream:
        stream.truncate(12 * 2**30)
    official = official_transformer_config(config.to_json(), TEXT_TO_VIDEO)
    (tmp_path / "config.json").write_text(json.dumps(official))
    sizes = [
        bytes_of(load_transformer(read_folder(tmp_path), device="meta", dtype=torch.bfloat16, packed=kept))
        / 2**30
        for kept in (True, False)
    ]
    assert 7 < sizes[0] < 10 and 26 < sizes[1] < 27
