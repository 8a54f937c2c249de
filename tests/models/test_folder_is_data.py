"""A folder is data: no code of its is run, no size of its is believed, and what lies about is named."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import WAN_TINY, Chitu
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file

from chitu_diffusion.errors import CheckpointError
from chitu_diffusion.models.convert import convert, verify
from chitu_diffusion.models.folder import read_folder
from chitu_diffusion.models.limits import TEXT_ENCODER, TRANSFORMER, VAE, Limit
from chitu_diffusion.models.loading import load_transformer, open_weights, tokenizer_of
from chitu_diffusion.models.registry import resolve_model
from chitu_diffusion.weights.files import WeightFiles

Spoil = Callable[[str, dict[str, Any]], Path]


@pytest.fixture
def changed_file(tiny_folder: Path, tmp_path: Path) -> Spoil:
    """A copy of the random model with values put into one of its JSON files."""

    def spoil(name: str, values: dict[str, Any]) -> Path:
        folder = Path(shutil.copytree(tiny_folder, tmp_path / "spoilt"))
        said = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(said | values))
        return folder

    return spoil


def test_no_code_of_a_folder_is_run(changed_file: Spoil, tmp_path: Path) -> None:
    """Nor is anybody asked whether it may: the answer would be yes."""
    evil = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
    folder = changed_file("tokenizer/tokenizer_config.json", evil)
    for place in (folder / "tokenizer", folder):
        (place / "evil.py").write_text(f"open({str(tmp_path / 'pwned')!r}, 'w')\nclass Evil: ...\n")
    code = "import sys; from chitu_diffusion.cli.app import run; sys.exit(run())"
    done = subprocess.run(
        [sys.executable, "-c", code, "models", "verify", str(folder)],
        input="y\n" * 10,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert not (tmp_path / "pwned").exists()
    assert "[y/N]" not in done.stdout + done.stderr and "unexpected" not in done.stderr


LIMITS = [
    *((f"{role}/config.json", key, limit) for role, limits in (("transformer", TRANSFORMER), ("vae", VAE))
      for key, limit in limits.items()),
    *(("text_encoder/config.json", key, limit) for key, limit in TEXT_ENCODER.items()),
]  # fmt: skip


@pytest.mark.parametrize(("file", "key", "limit"), LIMITS)
def test_every_number_of_a_config_has_an_upper_bound(
    file: str, key: str, limit: Limit, changed_file: Spoil
) -> None:
    beyond: Any = int(limit.high) + 1
    beyond = [beyond] if limit.most else beyond
    folder = changed_file(file, {key: beyond})
    with pytest.raises(CheckpointError) as caught:
        read_folder(folder)
    assert (caught.value.key, Path(str(caught.value.file))) == (key, folder / file)
    assert f"to {limit.high:g}" in str(caught.value) and str(beyond) in str(caught.value)
    if limit.most:
        (folder / file).write_text(
            json.dumps(json.loads((folder / file).read_text()) | {key: [limit.low] * (limit.most + 1)})
        )
        with pytest.raises(CheckpointError, match=f"at most {limit.most}"):
            read_folder(folder)


def test_the_tokenizer_fits_its_encoder(changed_file: Spoil) -> None:
    folder = changed_file("text_encoder/config.json", {"vocab_size": 2})
    with pytest.raises(CheckpointError, match="another text encoder"):
        tokenizer_of(read_folder(folder))


def test_a_pipe_in_a_folder_holds_nobody(tiny_folder: Path, tmp_path: Path, chitu: Chitu) -> None:
    for name in ("chitu.json", "vae/config.json", "tokenizer/tokenizer.json", "flexcache.json"):
        folder = Path(shutil.copytree(tiny_folder, tmp_path / name.replace("/", "-")))
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)
        code, out, err = chitu("models", "verify", folder)
        assert code == 4 and "unexpected" not in err, (out, err)


def test_a_single_file_beside_shards_is_read_as_diffusers_reads_it(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(WAN_TINY, tmp_path / "stale"))
    place = folder / "transformer"
    shards = sorted(place.glob("*-of-*.safetensors"))
    values = {name: value for file in shards for name, value in load_file(file).items()}
    stale = {name: torch.zeros_like(value) for name, value in values.items()}
    save_file(stale, place / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    theirs = WanTransformer3DModel.from_pretrained(folder, subfolder="transformer").state_dict()
    ours = load_transformer(read_folder(folder)).state_dict()
    assert all(torch.equal(ours[name].float(), value.float()) for name, value in theirs.items())
    finding = next(finding for finding in verify(folder) if finding.part == "transformer")
    assert (
        finding.ok
        and "not read, by diffusers neither: diffusion_pytorch_model.safetensors" in finding.message
    )


def test_the_text_encoder_s_single_file_counts_as_for_transformers(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(WAN_TINY, tmp_path / "both"))
    place = folder / "text_encoder"
    values = load_file(place / "model.safetensors")
    save_file(values, place / "model-00001-of-00001.safetensors")
    names = dict.fromkeys(values, "model-00001-of-00001.safetensors")
    (place / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    weights = open_weights(read_folder(folder), "text_encoder")
    assert [file.name for file in weights.files] == ["model.safetensors"]
    assert [file.name for file in weights.unused()] == ["model-00001-of-00001.safetensors"]


def test_a_name_in_an_index_is_a_name(tmp_path: Path) -> None:
    for name in ("a" * 5000 + ".safetensors", "a\x1b[31m.safetensors", "../a.safetensors", ".safetensors\0"):
        (tmp_path / "x.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(CheckpointError, match="no shard beside it") as caught:
            WeightFiles(tmp_path, "x")
        assert len(str(caught.value)) < 2000


@pytest.mark.parametrize("value", [torch.ones(2, device="meta"), torch.eye(2).to_sparse()])
def test_a_tensor_without_values_is_refused(value: torch.Tensor, tmp_path: Path) -> None:
    torch.save({"a": value}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="no plain values.*key: a|cannot be read"):
        WeightFiles(tmp_path / "a.pth")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("height", 10**9),
        ("steps", 100_000),
        ("shift", 10**30),
        ("guidance", [5.0] * 100),
        ("negative_prompt", "a" * 30_000),
        ("sigmas", [1 - n / 5000 for n in range(4000)]),
    ],
)
def test_a_folder_s_defaults_have_upper_bounds(key: str, value: Any, changed_file: Spoil) -> None:
    folder = changed_file("chitu.json", {"defaults": {key: value}})
    with pytest.raises(CheckpointError) as caught:
        resolve_model(str(folder))
    assert caught.value.key == key and "expected" in str(caught.value)


def test_a_folder_s_name_cannot_steer_a_terminal(changed_file: Spoil) -> None:
    with pytest.raises(CheckpointError, match="can be printed"):
        resolve_model(str(changed_file("chitu.json", {"name": "a\x1b[31m"})))


def test_other_files_of_an_official_folder_are_none_that_lie_about(tiny_folder: Path, tmp_path: Path) -> None:
    convert(tiny_folder, tmp_path / "official", "official")
    assert not [finding for finding in verify(tmp_path / "official") if "not read" in finding.message]


@pytest.mark.parametrize("key", ["latents_mean", "latents_std"])
def test_a_vae_without_its_latents_scale_is_refused(tiny_folder: Path, tmp_path: Path, key: str) -> None:
    """The library would take another model's, and the colours would be wrong without a word."""
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "model"))
    file = folder / "vae" / "config.json"
    config = json.loads(file.read_text())
    config[f"{key}_"] = config.pop(key)
    file.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=f"lacks a field.*{key}"):
        resolve_model(str(folder))


@pytest.mark.parametrize("how", ["text", "folder"])
def test_verify_looks_into_a_calibration(tiny_folder: Path, tmp_path: Path, how: str) -> None:
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "model"))
    assert "calibration" not in {finding.part for finding in verify(folder)}
    file = folder / "flexcache.json"
    if how == "text":
        file.write_text("[")
    else:
        file.mkdir()
    (finding,) = (each for each in verify(folder) if each.part == "calibration")
    assert not finding.ok and "calibration cannot be read" in finding.message
