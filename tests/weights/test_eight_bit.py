"""Weights in 8 bits: the numbers that they stand for, in layers of 16 bits and of 8, with adapters and
without."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from chitu_diffusion.errors import CheckpointError
from chitu_diffusion.models.convert import convert, verify
from chitu_diffusion.models.folder import read_folder
from chitu_diffusion.models.loading import load_transformer
from chitu_diffusion.ops.float8_linear import Float8Linear, Float8Plan
from chitu_diffusion.weights.files import WeightFiles
from tests.eight_bit import FLOAT8, FORMS, in_eight_bits
from tests.tiny_model import write_tiny_model

FILE = "diffusion_pytorch_model.safetensors"
PLAN = Float8Plan(keep=("attn2.to_k",), originals=False)


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("eight-bit")
    return convert(write_tiny_model(place / "tiny"), place / "official", "official").path


def folder_with(official: Path, place: Path, tensors, metadata=None) -> Path:
    """A copy of a folder whose transformer has these tensors."""
    shutil.copytree(official, place, ignore=shutil.ignore_patterns("manifest.json"))
    save_file(tensors, place / FILE, metadata=metadata)
    return place


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_what_is_read_is_the_number_times_its_scale(
    official: Path, tmp_path: Path, form: str, prefix: str
) -> None:
    stored, said, plain = in_eight_bits(load_file(official / FILE), form)
    # the mark of older files stands with the prefix and without
    named = {name if name == "scaled_fp8" else prefix + name: value for name, value in stored.items()}
    folder = folder_with(official, tmp_path / "model", named, said)
    files = WeightFiles(folder)
    assert files.entries.keys() == plain.keys() and files.metadata == said
    assert all(torch.equal(files.read(name), value) for name, value in plain.items())
    for dtype in (torch.float32, torch.bfloat16):
        found = load_transformer(read_folder(folder), dtype=dtype).state_dict()
        expected = load_transformer(
            read_folder(folder_with(official, tmp_path / str(dtype), plain)), dtype=dtype
        ).state_dict()
        assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("mapped", [True, False])
def test_without_a_mapping_it_reads_the_same(official: Path, tmp_path: Path, mapped: bool) -> None:
    stored, said, plain = in_eight_bits(load_file(official / FILE), "scaled-new")
    files = WeightFiles(folder_with(official, tmp_path / "model", stored, said), mapped=mapped)
    assert all(torch.equal(files.read(name), value) for name, value in plain.items())


def test_blocks_at_the_edges_may_be_smaller(tmp_path: Path) -> None:
    values = torch.randint(-127, 128, (130, 300), dtype=torch.int8)
    scale = torch.rand(2, 3) + 0.1
    save_file({"a.weight": values, "a.weight_scale": scale}, tmp_path / FILE)
    expected = values.float()
    for row in range(2):
        for column in range(3):
            expected[row * 128 : (row + 1) * 128, column * 128 : (column + 1) * 128] *= scale[row, column]
    assert torch.equal(WeightFiles(tmp_path).read("a.weight"), expected)


def test_converted_it_is_16_bits(official: Path, tmp_path: Path) -> None:
    stored, said, plain = in_eight_bits(load_file(official / FILE), "scaled-old")
    folder = folder_with(official, tmp_path / "model", stored, said)
    findings = verify(folder)
    assert all(finding.ok for finding in findings)
    assert any("float8_e4m3fn" in finding.message for finding in findings)
    written = load_file(convert(folder, tmp_path / "plain", "official").path / FILE)
    name = "blocks.0.ffn.0.weight"
    assert torch.equal(written[name], plain[name].bfloat16())
    assert written.keys() == plain.keys()


@pytest.mark.parametrize("form", ["scaled-old", "rows", "cast"])
@pytest.mark.parametrize("originals", [True, False])
def test_layers_in_8_bits_take_stored_rows_as_they_are(
    official: Path, tmp_path: Path, form: str, originals: bool
) -> None:
    stored, said, plain = in_eight_bits(load_file(official / FILE), form)
    folder = read_folder(folder_with(official, tmp_path / "model", stored, said))
    network = load_transformer(folder, dtype=torch.bfloat16, float8=Float8Plan(PLAN.keep, originals))
    layers = {name: layer for name, layer in network.named_modules() if isinstance(layer, Float8Linear)}
    assert len(layers) == 18
    layer = layers["blocks.1.ffn.net.2"]
    name = "blocks.1.ffn.2.weight"
    assert torch.equal(layer.weight_float8.view(torch.uint8), stored[name].view(torch.uint8))
    assert layer.weight_scale.shape == (32, 1)
    assert torch.equal(layer.weight_float8.float() * layer.weight_scale, plain[name])
    assert (layer.weight is not None) == originals
    if originals:
        assert torch.equal(layer.weight, plain[name].bfloat16())


@pytest.mark.parametrize("form", ["rows-int8", "blocks", "cast-e5m2"])
def test_layers_in_8_bits_round_other_forms(official: Path, tmp_path: Path, form: str) -> None:
    stored, said, plain = in_eight_bits(load_file(official / FILE), form)
    found = load_transformer(
        read_folder(folder_with(official, tmp_path / "model", stored, said)), dtype=torch.float32, float8=PLAN
    )
    expected = load_transformer(
        read_folder(folder_with(official, tmp_path / "plain", plain)), dtype=torch.float32, float8=PLAN
    )
    name = "blocks.1.ffn.net.2"
    mine, other = (network.get_submodule(name).weight_float8 for network in (found, expected))
    assert torch.equal(mine.view(torch.uint8), other.view(torch.uint8))


def spoilt(form: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    weight = "a.weight"
    value = tensors[weight]
    note = {"nvfp4": "nvfp4", "w4a8": "w4a8", "convrot": "int8_tensorwise"}.get(form)
    if note:
        text = f'{{"format": "{note}", "convrot": {str(form == "convrot").lower()}}}'
        return {**tensors, "a.comfy_quant": torch.tensor(list(text.encode()), dtype=torch.uint8)}
    return {
        "mxfp8": {weight: value, "a.weight_scale": torch.ones(32, 1, dtype=torch.uint8)},
        "two scales": {**tensors, "a.weight_scale_2": torch.ones(1)},
        "turbowan": {"a.int8_weight": torch.ones(2, 2, dtype=torch.int8), "a.scale": torch.ones(1, 1)},
        "no weight": {"b.weight": value.float(), "a.weight_scale": torch.ones(1)},
        "no scale": {**tensors, "b.weight": value.clone()},
        "shape": {weight: value, "a.weight_scale": torch.ones(7)},
        "nan": {weight: value, "a.weight_scale": torch.tensor(float("nan"))},
        "below 0": {weight: value, "a.weight_scale": torch.tensor([[1.0]] * 31 + [[-1.0]])},
        "zero": {weight: value, "a.weight_scale": torch.zeros(())},
        "int8 alone": {weight: torch.ones(2, 2, dtype=torch.int8)},
    }[form]


@pytest.mark.parametrize(
    ("form", "words"),
    [
        ("nvfp4", "not opened.*a.weight.*nvfp4"),
        ("w4a8", "not opened.*w4a8"),
        ("convrot", "ConvRot"),
        ("mxfp8", "not opened.*mxfp8"),
        ("two scales", "nvfp4"),
        ("turbowan", "TurboWan"),
        ("no weight", "a scale has no weight.*a.weight_scale"),
        ("no scale", "b.weight.*b.weight_scale"),
        ("shape", r"shape.*a.weight_scale.*\[32, 1\].*\[7\]"),
        ("nan", "NaN or Inf.*a.weight_scale"),
        ("below 0", "not above 0.*a.weight_scale"),
        ("zero", "not above 0.*a.weight_scale"),
        ("int8 alone", "not of floats.*I8"),
    ],
)
def test_what_cannot_be_undone_is_refused(tmp_path: Path, form: str, words: str) -> None:
    tensors = {"a.weight": torch.randn(32, 16).to(FLOAT8), "a.weight_scale": torch.ones(32, 1)}
    save_file(spoilt(form, tensors), tmp_path / FILE)
    with pytest.raises(CheckpointError, match=words):
        WeightFiles(tmp_path).read("a.weight")
