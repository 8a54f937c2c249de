"""An image encoder in both layouts: names, shapes, counts, and what a folder must have."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from tiny_model import write_tiny_model
from transformers import CLIPVisionConfig, CLIPVisionModel

from chitu_diffusion.errors import CheckpointError
from chitu_diffusion.models.convert import convert, verify
from chitu_diffusion.models.folder import read_folder
from chitu_diffusion.models.image_preprocessing import ImagePreprocessing
from chitu_diffusion.models.loading import blueprint, load_part
from chitu_diffusion.models.registry import FULL_SIZE, resolve_model, spec_of_folder
from chitu_diffusion.models.wan.image_encoder_files import official_image_tensors

CLIP_FILE = "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{pictures: a random model's folder, and the same in the official layout}."""
    home = tmp_path_factory.mktemp("models")
    made = {}
    for clip in (1, 2):
        folder = write_tiny_model(home / f"{clip}", image=True, clip=clip, seed=7)
        made[clip] = folder, convert(folder, home / f"official-{clip}", "official").path
    return made


def clip_names(layers: int) -> dict[str, tuple[int, ...]]:
    """What the vision half of Wan's CLIP file holds, written down from its own code (wan/modules/clip.py)."""
    linear = {
        "attn.to_qkv": (3840, 1280),
        "attn.proj": (1280, 1280),
        "mlp.0": (5120, 1280),
        "mlp.2": (1280, 5120),
    }
    shapes: dict[str, tuple[int, ...]] = {
        "visual.cls_embedding": (1, 1, 1280),
        "visual.pos_embedding": (1, 257, 1280),
        "visual.patch_embedding.weight": (1280, 3, 14, 14),
    }
    norms = ["pre_norm", "post_norm"]
    for layer in range(layers):
        norms += [f"transformer.{layer}.norm{number}" for number in (1, 2)]
        for name, shape in linear.items():
            shapes[f"visual.transformer.{layer}.{name}.weight"] = shape
            shapes[f"visual.transformer.{layer}.{name}.bias"] = shape[:1]
    return shapes | {f"visual.{norm}.{kind}": (1280,) for norm in norms for kind in ("weight", "bias")}


def official_folder(place: Path, model_type: str, experts: int = 1) -> Path:
    """The configs that Wan's authors publish, without any weight."""
    config = {
        "_class_name": "WanModel",
        "model_type": model_type,
        "dim": 5120,
        "ffn_dim": 13824,
        "in_dim": 36,
    }
    config |= {
        "num_heads": 40,
        "num_layers": 40,
        "out_dim": 16,
        "text_len": 512,
        "freq_dim": 256,
        "eps": 1e-6,
    }
    homes = [place] if experts == 1 else [place / "high_noise_model", place / "low_noise_model"]
    for home in homes:
        home.mkdir(parents=True)
        (home / "config.json").write_text(json.dumps(config))
    return place


def test_the_full_size_encoder(tmp_path: Path) -> None:
    folder = read_folder(official_folder(tmp_path / "model", "i2v"))
    plan = blueprint(folder, "image_encoder")
    config = CLIPVisionConfig.from_dict(dict(folder.components["image_encoder"].config))
    with torch.device("meta"):
        theirs = CLIPVisionModel(config).state_dict()
    wrapped = {
        f"vision_model.{key.removeprefix('vision_model.')}": tuple(v.shape) for key, v in theirs.items()
    }
    assert plan.shapes() == wrapped
    found = official_image_tensors(plan.module.state_dict())
    assert {key: tuple(value.shape) for key, value in found.items()} == clip_names(32)
    assert sum(math.prod(shape) for shape in wrapped.values()) == 630_766_080


@pytest.mark.parametrize("clip", [1, 2])
def test_a_round_trip_loses_nothing(folders, clip, tmp_path: Path) -> None:
    folder, official = folders[clip]
    back = convert(official, tmp_path / "back", "diffusers")
    for place in (folder, official, back.path):
        parts = {part.part: part for part in verify(place)}
        assert all(part.ok for part in parts.values()), parts
        assert (
            parts["image_encoder"].message.startswith("55 tensors")
            and "28x28" in parts["image_processor"].message
        )
    said = json.loads((official / "config.json").read_text())
    assert said["model_type"] == ("flf2v" if clip == 2 else "i2v") and "image_dim" not in said
    ours = load_part(read_folder(folder), "image_encoder").state_dict()
    for each in (official, back.path):
        again = load_part(read_folder(each), "image_encoder").state_dict()
        assert (
            all(torch.equal(again[name], value) for name, value in ours.items())
            and again.keys() == ours.keys()
        )
    assert back.config_sha256() == read_folder(official).config_sha256()
    _, told = CLIPVisionModel.from_pretrained(back.path / "image_encoder", output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"]


def test_the_other_half_of_clip_is_left_out(folders, tmp_path: Path) -> None:
    """In the authors' file stands the text tower, too; in others' a projection."""
    folder, official = (shutil.copytree(place, tmp_path / place.name) for place in folders[1])
    tensors = torch.load(official / CLIP_FILE, weights_only=True)
    assert "visual.transformer.0.attn.to_qkv.weight" in tensors
    more = {
        "textual.token_embedding.weight": torch.zeros(3, 4),
        "log_scale": torch.zeros(()),
        "visual.head": torch.zeros(24, 8),
    }
    torch.save(tensors | more, official / CLIP_FILE)
    from transformers import CLIPVisionModelWithProjection

    whole = CLIPVisionModelWithProjection(CLIPVisionConfig.from_pretrained(folder / "image_encoder"))
    whole.vision_model.load_state_dict(CLIPVisionModel.from_pretrained(folder / "image_encoder").state_dict())
    shutil.rmtree(folder / "image_encoder")
    whole.save_pretrained(folder / "image_encoder")
    first, second = (
        load_part(read_folder(place), "image_encoder").state_dict() for place in (folder, official)
    )
    assert all(torch.equal(first[name], value) for name, value in second.items())
    del tensors["visual.transformer.1.attn.to_qkv.bias"]
    torch.save(tensors, official / CLIP_FILE)
    with pytest.raises(CheckpointError, match=r"3 tensor\(s\) missing"):
        load_part(read_folder(official), "image_encoder")


@pytest.mark.parametrize(
    ("model_type", "experts", "name", "model", "shift"),
    [
        ("i2v", 1, "wan2.1-i2v-14b-480p", "Wan2.1-I2V-14B-480P", 3.0),
        ("i2v", 1, "a Wan2.1-I2V-14B-720P of mine", "Wan2.1-I2V-14B-720P", 5.0),
        ("i2v", 1, "anything", "Wan2.1-I2V-14B-480P", 3.0),
        ("flf2v", 1, "anything", "Wan2.1-FLF2V-14B-720P", 16.0),
        ("i2v", 2, "anything", "Wan2.2-I2V-A14B", 5.0),
    ],
)
def test_official_folders_are_told_apart(tmp_path, model_type, experts, name, model, shift) -> None:
    folder = read_folder(official_folder(tmp_path / name, model_type, experts))
    found = spec_of_folder(folder)
    assert (found.name, found.defaults.shift) == (model, shift)
    assert found.defaults == FULL_SIZE[model].defaults and found.transformers == FULL_SIZE[model].transformers
    assert ("image_encoder" in folder.components) == (experts == 1)


def test_a_name_that_was_given_counts(tmp_path: Path) -> None:
    """480P and 720P are one network; only defaults differ."""
    place = official_folder(tmp_path / "anything", "i2v")
    for name in ("Wan2.1-I2V-14B-480P", "Wan2.1-I2V-14B-720P"):
        found = resolve_model(name, place).spec
        assert (found.name, found.defaults) == (name, FULL_SIZE[name].defaults)


def test_one_network_is_one_expert_whatever_the_boundary(folders, tmp_path: Path) -> None:
    """diffusers' script writes a boundary for Wan2.1, too."""
    folder = shutil.copytree(folders[1][0], tmp_path / "model")
    edit(folder / "model_index.json", boundary_ratio=0.9)
    spec = resolve_model(str(folder)).spec
    assert len(spec.transformers) == 1 and spec.boundary is None


def edit(file: Path, **values) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


BROKEN = [
    ("model_index.json", {"image_encoder": [None, None]}, "has no image encoder"),
    ("model_index.json", {"_class_name": "WanPipeline"}, "has no image encoder"),
    ("image_encoder/config.json", {"hidden_size": 32}, "hidden_size"),
    ("image_encoder/config.json", {"num_hidden_layers": 10**6}, "num_hidden_layers"),
    ("image_encoder/config.json", {"hidden_act": "os.system"}, "cannot be used"),
    ("image_processor/preprocessor_config.json", {"crop_size": 14}, "crop_size"),
    ("image_processor/preprocessor_config.json", {"crop_size": {"height": 28, "width": 30}}, "crop_size"),
    ("image_processor/preprocessor_config.json", {"size": {"shortest_edge": 10**9}}, "size"),
    ("image_processor/preprocessor_config.json", {"size": {"shortest_edge": 20}}, "crop_size"),
    ("image_processor/preprocessor_config.json", {"image_std": [0, 0, 0]}, "image_std"),
    ("image_processor/preprocessor_config.json", {"do_normalize": False}, "do_normalize"),
    ("image_processor/preprocessor_config.json", {"rescale_factor": 1.0}, "rescale_factor"),
    ("transformer/config.json", {"image_dim": 10**9}, "image_dim"),
    ("chitu.json", {"image_processor": {}}, ""),
]


@pytest.mark.parametrize(("file", "values", "said"), BROKEN)
def test_what_does_not_fit_is_refused_by_its_field(folders, tmp_path, file, values, said) -> None:
    folder = shutil.copytree(folders[1][0], tmp_path / "model")
    edit(folder / file, **values)
    found = [part.message for part in verify(folder) if not part.ok]
    assert not found if not said else len(found) == 1 and said in found[0], found


def test_two_pictures_want_an_encoder_of_half_the_rows(folders, tmp_path: Path) -> None:
    folder = shutil.copytree(folders[2][0], tmp_path / "model")
    edit(folder / "transformer" / "config.json", pos_embed_seq_len=12)
    with pytest.raises(CheckpointError, match="rows of two pictures"):
        resolve_model(str(folder))


def test_what_is_left_out_of_a_preprocessor_is_clip_s_own() -> None:
    own = ImagePreprocessing.from_json({}, Path("x"))
    assert own == ImagePreprocessing.from_json({"size": 224, "crop_size": 224, "resample": 3}, Path("x"))
    assert own == ImagePreprocessing() == ImagePreprocessing.from_json(own.to_json(), Path("x"))
