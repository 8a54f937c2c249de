"""Files whose names all stand behind a prefix open as those without."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from chitu_diffusion.errors import CheckpointError
from chitu_diffusion.models.convert import convert, verify
from chitu_diffusion.models.folder import read_folder
from chitu_diffusion.models.loading import load_transformer, open_weights
from tests.tiny_model import write_tiny_model

FILE = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("prefixes")
    return convert(write_tiny_model(place / "tiny"), place / "official", "official").path


def renamed(source: Path, target: Path, prefix: str, bare: str = "") -> Path:
    """A copy whose transformer's names have a prefix; all but the one that is called `bare`."""
    shutil.copytree(source, target)
    (target / "manifest.json").unlink()
    tensors = load_file(source / FILE)
    save_file(
        {name if name == bare else prefix + name: value for name, value in tensors.items()}, target / FILE
    )
    return target


@pytest.mark.parametrize(
    "prefix", ["model.diffusion_model.", "diffusion_model.", "model.", "net.", "module."]
)
@pytest.mark.parametrize("mapped", [True, False])
def test_prefixed_names_load_the_same_tensors(
    official: Path, tmp_path: Path, prefix: str, mapped: bool
) -> None:
    folder = read_folder(renamed(official, tmp_path / "other", prefix))
    plain = read_folder(official)
    ours = open_weights(folder, "transformer", mapped=mapped)
    theirs = open_weights(plain, "transformer", mapped=mapped)
    assert ours.entries.keys() == theirs.entries.keys()
    assert all(torch.equal(ours.read(name), theirs.read(name)) for name in theirs.entries)
    expected = load_transformer(plain).state_dict()
    found = load_transformer(folder).state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert all(finding.ok for finding in verify(folder.path))


def test_a_prefix_of_some_names_is_none(official: Path, tmp_path: Path) -> None:
    folder = read_folder(renamed(official, tmp_path / "other", "model.", bare="patch_embedding.weight"))
    with pytest.raises(CheckpointError, match="missing"):
        load_transformer(folder)
