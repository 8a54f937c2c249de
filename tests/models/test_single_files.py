"""Models of files that lie apart: found, told, refused in words, and the same to the bit as their folders."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from eight_bit import FORMS, in_eight_bits
from running import CAT
from safetensors.torch import load_file, save_file
from single_files import STEM, sentencepiece_model, text_tensors, write_comfy

from chitu_diffusion.config import EngineConfig
from chitu_diffusion.engine import Engine
from chitu_diffusion.errors import CheckpointError, ModelMissingError, UsageError
from chitu_diffusion.models.convert import convert, verify
from chitu_diffusion.models.folder import read_folder
from chitu_diffusion.models.loading import load_part, load_transformer, tokenizer_of
from chitu_diffusion.models.registry import ASSETS, resolve_model
from tests.tiny_model import write_tiny_model

WAN_TINY = ASSETS / "wan-tiny"
SHAPES = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("single") / "tiny")


@pytest.fixture(scope="module")
def comfy(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("comfy")
    write_comfy(folder, place)
    return place


def own(comfy: Path, place: Path) -> Path:
    """A copy to change; the transformer's file."""
    return Path(shutil.copytree(comfy, place)) / "diffusion_models" / "tiny.safetensors"


def settings(model: Path, place: Path, dtype: str = "float32", **models: str) -> EngineConfig:
    return EngineConfig(
        models={"name": str(model), **models},
        output={"dir": str(place)},
        infer={"device": "cpu", "dtype": dtype},
    )


def video(config: EngineConfig) -> tuple[np.ndarray, dict]:
    """The frames of a short video, and its recipe."""
    with Engine(config) as engine:
        result = engine.generate(CAT, seed=3, **SHAPES)
    return np.asarray(result.frames), dict(result.recipe)


def test_every_tensor_of_the_shipped_model_is_read_to_the_bit(tmp_path: Path) -> None:
    found = resolve_model(str(write_comfy(WAN_TINY, tmp_path))).required()
    expected = read_folder(WAN_TINY)
    assert found.layout == "files" and found.components.keys() == expected.components.keys()
    for role in expected.components:
        ours = load_part(found, role).state_dict()
        theirs = load_part(expected, role).state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], value) for name, value in theirs.items()), role


def test_a_video_of_bf16_files_is_the_folder_s(folder: Path, tmp_path: Path) -> None:
    plain = convert(folder, tmp_path / "bf16", "diffusers", dtype=torch.bfloat16).path
    file = write_comfy(plain, tmp_path / "comfy")
    expected, theirs = video(settings(plain, tmp_path, "bfloat16"))
    found, ours = video(settings(file, tmp_path, "bfloat16"))
    assert np.array_equal(found, expected)
    assert ours.keys() == theirs.keys()


@pytest.mark.parametrize(
    ("form", "name", "dtype"),
    [("scaled-old", "float32", torch.float32), ("rows", "bfloat16", None)],  # None: bf16 where 8 bits were
)
def test_a_video_of_8_bits_is_that_of_what_they_stand_for(
    comfy: Path, tmp_path: Path, form: str, name: str, dtype: torch.dtype | None
) -> None:
    file = own(comfy, tmp_path / "models")
    stored, said, _ = in_eight_bits(load_file(file), form)
    save_file({f"model.diffusion_model.{name}": value for name, value in stored.items()}, file, metadata=said)
    plain = convert(file, tmp_path / "plain", "diffusers", dtype=dtype).path
    assert np.array_equal(video(settings(file, tmp_path, name))[0], video(settings(plain, tmp_path, name))[0])


def test_files_are_known_wherever_they_lie(comfy: Path, tmp_path: Path) -> None:
    """The hash of the weights is of what they hold and are for, not of their names and places."""
    file = own(comfy, tmp_path / "models")
    _, first = video(settings(file, tmp_path))
    other = tmp_path / "elsewhere"
    other.mkdir()
    moved = {}
    for part, path in (("vae", "vae/wan_tiny_vae"), ("text_encoder", "text_encoders/umt5_tiny")):
        moved[part] = str(
            shutil.copy(tmp_path / "models" / f"{path}.safetensors", other / f"{part}.safetensors")
        )
    main = shutil.copy(file, other / "renamed.safetensors")
    shutil.copy(file.with_suffix(".chitu.json"), other / "renamed.chitu.json")
    moved["tokenizer"] = str(tmp_path / "models" / "tokenizer")
    _, second = video(settings(main, tmp_path, **moved))
    assert second["weights_sha256"] == first["weights_sha256"]
    tensors = load_file(main)
    tensors["head.head.bias"] += 1
    save_file(tensors, main)
    _, third = video(settings(main, tmp_path, **moved))
    assert third["weights_sha256"] != first["weights_sha256"]


def test_one_file_may_hold_all(folder: Path, comfy: Path, tmp_path: Path) -> None:
    file = own(comfy, tmp_path / "models")
    stored, said, _ = in_eight_bits(load_file(file), "scaled-new")
    tensors = {f"model.diffusion_model.{name}": value for name, value in stored.items()}
    for part, place in (
        ("vae.", "vae/wan_tiny_vae"),
        ("text_encoders.umt5xxl.transformer.", "text_encoders/umt5_tiny"),
    ):
        path = tmp_path / "models" / f"{place}.safetensors"
        tensors |= {part + name: value for name, value in load_file(path).items()}
        path.unlink()
    save_file({**tensors, "text_encoders.umt5xxl.logit_scale": torch.ones(1)}, file, metadata=said)
    found = resolve_model(str(file)).required()
    for role in ("vae", "text_encoder"):
        ours, theirs = (load_part(model, role).state_dict() for model in (found, read_folder(folder)))
        assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    assert len(load_transformer(found).blocks) == 2
    assert all(finding.ok for finding in verify(file))


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_8_bits_is_detected_alike(comfy: Path, tmp_path: Path, form: str) -> None:
    file = own(comfy, tmp_path / "models")
    before = resolve_model(str(file)).spec
    stored, said, _ = in_eight_bits(load_file(file), form)
    save_file(stored, file, metadata=said)
    assert resolve_model(str(file)).spec == before
    assert all(finding.ok for finding in verify(file, deep=True))


def test_libraries_names_open_too(folder: Path, comfy: Path, tmp_path: Path) -> None:
    """A transformer and a VAE under diffusers' names."""
    file = own(comfy, tmp_path / "models")
    shutil.copy(folder / "transformer" / f"{STEM}.safetensors", file)
    shutil.copy(
        folder / "vae" / f"{STEM}.safetensors", tmp_path / "models" / "vae" / "wan_tiny_vae.safetensors"
    )
    found = resolve_model(str(file)).required()
    for role in found.components:
        ours, theirs = (load_part(model, role).state_dict() for model in (found, read_folder(folder)))
        assert all(torch.equal(ours[name], value) for name, value in theirs.items())


def test_other_models_vaes_are_passed_over(comfy: Path, tmp_path: Path) -> None:
    """Flux's has 16 channels, too; Qwen-Image's has Wan's tensors, and other numbers."""
    file = own(comfy, tmp_path / "models")
    vae = tmp_path / "models" / "vae"
    own_vae = vae / "wan_tiny_vae.safetensors"
    tensors = load_file(own_vae)
    flat = {name: value[:, :, 0] if value.ndim == 5 else value for name, value in tensors.items()}
    save_file({name: value.contiguous() for name, value in flat.items()}, vae / "flux_vae.safetensors")
    for name in ("qwen_image_vae", "some_vae"):
        save_file({key: value + 1 for key, value in tensors.items()}, vae / f"{name}.safetensors")
    assert resolve_model(str(file)).required().components["vae"].weights == own_vae
    for name in ("wan_tiny_vae", "some_vae"):
        (vae / f"{name}.safetensors").unlink()
    with pytest.raises(ModelMissingError, match="its VAE was not found.*--vae"):
        resolve_model(str(file))
    told = str(vae / "qwen_image_vae.safetensors")
    assert str(resolve_model(str(file), parts={"vae": told}).required().components["vae"].weights) == told


@pytest.mark.parametrize("repackaged", [True, False])
def test_a_folder_of_one_model_is_that_model(comfy: Path, tmp_path: Path, repackaged: bool) -> None:
    file = own(comfy, tmp_path / "repo" / ("split_files" if repackaged else "models"))
    assert resolve_model(str(tmp_path / "repo")).required().path == file
    shutil.copy(file, file.with_name("another.safetensors"))
    with pytest.raises(UsageError, match="holds 2 models: another.safetensors, tiny.safetensors; name one"):
        resolve_model(str(tmp_path / "repo"))


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("experts")
    write_comfy(write_tiny_model(place / "tiny", experts=2), place / "models")
    return place


def test_names_tell_the_experts(experts: Path, tmp_path: Path) -> None:
    expected = read_folder(experts / "tiny")
    place = Path(shutil.copytree(experts / "models", tmp_path / "models")) / "diffusion_models"
    for name in (f"tiny_{word}_noise.safetensors" for word in ("high", "low")):
        found = resolve_model(str(place / name)).required()
        assert found.boundary_ratio == 0.875
        for role in ("transformer", "transformer_2"):
            ours, theirs = (load_transformer(model, role).state_dict() for model in (found, expected))
            assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    assert (
        resolve_model(str(tmp_path / "models")).spec.transformers
        == resolve_model(str(place / name)).spec.transformers
    )
    # in folders of their own, under one name
    for word in ("High", "Low"):
        (place / f"{word}Noise").mkdir()
        for end in ("safetensors", "chitu.json"):
            shutil.move(place / f"tiny_{word.lower()}_noise.{end}", place / f"{word}Noise" / f"wan.{end}")
    found = resolve_model(str(place / "LowNoise" / "wan.safetensors")).required()
    assert found.components["transformer"].weights == place / "HighNoise" / "wan.safetensors"
    (place / "LowNoise" / "wan.safetensors").rename(place / "second.safetensors")
    main = str(place / "HighNoise" / "wan.safetensors")
    with pytest.raises(UsageError, match=r"low-noise model was not found.*LowNoise.*--low-noise-model"):
        resolve_model(main)
    told = resolve_model(main, parts={"low_noise_model": str(place / "second.safetensors")}).required()
    assert told.components["transformer_2"].weights == place / "second.safetensors"
    with pytest.raises(UsageError, match="is the file of the high-noise model, too; use the other"):
        resolve_model(main, parts={"low_noise_model": main})
    with pytest.raises(UsageError, match="called low too"):
        resolve_model(
            str(experts / "models/diffusion_models/tiny_low_noise.safetensors"),
            parts={"low_noise_model": main},
        )


def test_image_to_video_is_told_by_its_channels(image_experts_folder: Path, tmp_path: Path) -> None:
    found = resolve_model(str(write_comfy(image_experts_folder, tmp_path / "models")))
    expected = resolve_model(str(image_experts_folder))
    assert (found.spec.kind, found.spec.transformers) == (expected.spec.kind, expected.spec.transformers)
    assert found.spec.kind.takes_image and found.spec.boundary == 0.9  # as its authors have it


@pytest.mark.parametrize("pictures", [1, 2])
def test_an_image_encoder_is_found_too(tmp_path: Path, pictures: int) -> None:
    folder = read_folder(write_tiny_model(tmp_path / "tiny", image=True, clip=pictures))
    file = write_comfy(folder.path, tmp_path / "models")
    found = resolve_model(str(file))
    expected = resolve_model(str(folder.path)).spec
    assert (found.spec.kind, found.spec.transformers) == (expected.kind, expected.transformers)
    for role in folder.components:
        ours, theirs = (load_part(model, role).state_dict() for model in (found.required(), folder))
        assert all(torch.equal(ours[name], value) for name, value in theirs.items()), role
    assert all(finding.ok for finding in verify(file))
    again = convert(file, tmp_path / "again", "diffusers")
    assert again.preprocessing == folder.preprocessing
    shutil.rmtree(tmp_path / "models" / "clip_vision")
    with pytest.raises(ModelMissingError, match="its image encoder was not found.*--image-encoder"):
        resolve_model(str(file))


def test_what_is_missing_is_named_with_where_it_was_looked_for(comfy: Path, tmp_path: Path) -> None:
    file = own(comfy, tmp_path / "models")
    (tmp_path / "models/vae/wan_tiny_vae.safetensors").unlink()
    shutil.rmtree(tmp_path / "models/tokenizer")
    with pytest.raises(ModelMissingError) as caught:
        resolve_model(str(file))
    said = str(caught.value)
    assert all(
        word in said
        for word in ("--vae", "--tokenizer", str(tmp_path / "models" / "vae"), "a Wan model's transformer")
    )
    assert "--text-encoder" not in said


def test_several_that_fit_are_asked_about(comfy: Path, tmp_path: Path) -> None:
    file = own(comfy, tmp_path / "models")
    text = tmp_path / "models" / "text_encoders" / "umt5_tiny.safetensors"
    shutil.copy(text, text.with_name("umt5_other.safetensors"))
    with pytest.raises(UsageError, match=r"umt5_other.safetensors, umt5_tiny.safetensors.*--text-encoder"):
        resolve_model(str(file))
    resolve_model(str(file), parts={"text_encoder": str(text)})
    # files of other models do not count: T5's encoder, whose later blocks have no biases, and another VAE
    tensors = load_file(text)
    name = "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight"
    save_file(
        {key: value for key, value in tensors.items() if key != name},
        text.with_name("umt5_other.safetensors"),
    )
    vae = tmp_path / "models" / "vae" / "wan_tiny_vae.safetensors"
    values = load_file(vae)
    values["decoder.conv1.weight"] = torch.zeros(8, 48, 3, 3, 3)
    save_file(values, vae.with_name("wan2.2_vae.safetensors"))
    assert resolve_model(str(file)).required().components["vae"].weights == vae


def test_a_file_that_nobody_named_may_be_damaged(
    comfy: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = own(comfy, tmp_path / "models")
    vae = tmp_path / "models" / "vae" / "wan_tiny_vae.safetensors"
    vae.with_name("half_a_vae.safetensors").write_bytes(vae.read_bytes()[:-9])
    assert resolve_model(str(file)).required().components["vae"].weights == vae
    assert "passed over" in caplog.text and "half_a_vae" in caplog.text
    with pytest.raises(CheckpointError, match="truncated"):
        resolve_model(str(file), parts={"vae": str(vae.with_name("half_a_vae.safetensors"))})


@pytest.mark.parametrize(
    ("added", "words"),
    [
        ("face_adapter.fuser_blocks.0.k_norm.weight", "Animate"),
        ("casual_audio_encoder.weights", "S2V"),
        ("control_adapter.conv.weight", "Fun-Camera"),
        ("blocks.0.self_attn.attn_op.proj_l.weight", "SLA"),
        ("vace_patch_embedding.weight", "control stream does not fit"),
    ],
)
def test_kinds_that_are_not_made_here_are_refused_by_name(
    comfy: Path, tmp_path: Path, added: str, words: str
) -> None:
    file = own(comfy, tmp_path / "models")
    save_file({**load_file(file), added: torch.ones(1, 1)}, file)
    with pytest.raises(CheckpointError, match=words):
        resolve_model(str(file))


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"decoder.conv1.weight": torch.ones(2)}, "a Wan model's VAE; use the file of the transformer"),
        ({"blocks.0.self_attn.q.lora_down.weight": torch.ones(2)}, "an adapter"),
        ({"a": torch.ones(2)}, "a file of 1 tensors"),
    ],
)
def test_a_file_of_another_kind_is_told(tmp_path: Path, tensors: dict, words: str) -> None:
    save_file(tensors, tmp_path / "wan.safetensors")
    with pytest.raises(UsageError, match=words):
        resolve_model(str(tmp_path / "wan.safetensors"))


def test_parts_of_a_whole_model_are_refused(folder: Path) -> None:
    for name in (str(folder), "wan-tiny"):
        with pytest.raises(UsageError, match="models.vae: .* whole model"):
            resolve_model(name, parts={"vae": "x.safetensors"})


def test_a_file_s_name_tells_its_sampler_recipe(comfy: Path, tmp_path: Path) -> None:
    file = own(comfy, tmp_path / "models")
    note = json.loads(file.with_suffix(".chitu.json").read_text())
    (tmp_path / "models" / "diffusion_models" / "wan2.1_lightx2v_4step.chitu.json").write_text(
        json.dumps(note)
    )
    named = file.rename(file.with_name("wan2.1_lightx2v_4step.safetensors"))
    assert resolve_model(str(named)).spec.own_recipe == ("lightx2v-4step", named.name)


def test_the_tokenizer_comes_out_of_the_text_encoder_s_file(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As SentencePiece itself reads it; where it cannot be read, a folder is asked for."""
    from sentencepiece import SentencePieceProcessor

    monkeypatch.setenv("CHITU_CACHE_DIR", str(tmp_path / "cache"))
    pieces = [
        ("<pad>", 0.0, 3),
        ("</s>", 0.0, 3),
        ("<unk>", 0.0, 2),
        ("\u2581", -2.0, 1),
        ("\u2581cat", -3.0, 1),
    ]
    pieces += [(letter, -5.0 - place / 10, 1) for place, letter in enumerate("acdegiklnorstw")]
    model = sentencepiece_model(pieces)
    file = write_comfy(folder, tmp_path / "models", spiece=model)
    for _ in range(2):  # made, then found
        tokenizer = tokenizer_of(resolve_model(str(file)).required())
        assert str(tmp_path / "cache") in str(tokenizer.place)
    reader = SentencePieceProcessor(model_proto=model)
    for text in ("a cat walking", "cat", "an old dog \u00e9", ""):
        assert tokenizer.ids(text) == [*reader.encode(text), 1]
    assert tokenizer.padding == 0
    text = tmp_path / "models" / "text_encoders" / "umt5_tiny.safetensors"
    save_file({**text_tensors(folder), "spiece_model": torch.ones(9, dtype=torch.uint8)}, text)
    with pytest.raises(CheckpointError, match="spiece_model.*--tokenizer FOLDER"):
        resolve_model(str(file))
