"""The hub's cache as downloads leave it: whole, broken off, without a name for its snapshot."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import WAN_TINY, Chitu

from chitu_diffusion.errors import CheckpointError
from chitu_diffusion.models.registry import resolve_model
from chitu_diffusion.models.wan.presets import FULL_SIZE

NAME = "Wan2.1-T2V-1.3B"
SNAPSHOT = "0fad780a534b6463e45facd96134c9f345acfa5b"


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with one whole model; its name stands for the shipped one's sizes."""
    cache = tmp_path / "hub"
    place = cache / "models--Wan-AI--Wan2.1-T2V-1.3B-Diffusers"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text(SNAPSHOT)
    shutil.copytree(WAN_TINY, place / "blobs")
    for entry in (place / "blobs").rglob("*"):
        if entry.is_file():
            link = place / "snapshots" / SNAPSHOT / entry.relative_to(place / "blobs")
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(entry, link.parent))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    same_sizes = replace(FULL_SIZE[NAME], transformers=resolve_model("wan-tiny").spec.transformers)
    monkeypatch.setattr("chitu_diffusion.models.registry.FULL_SIZE", {**FULL_SIZE, NAME: same_sizes})
    return place


@pytest.mark.parametrize("main", [SNAPSHOT, f"{SNAPSHOT}\n", None, "", "../../elsewhere"])
def test_a_snapshot_is_found_whatever_names_it(repository: Path, main: str | None) -> None:
    if main is None:
        (repository / "refs" / "main").unlink()
    else:
        (repository / "refs" / "main").write_text(main)
    assert resolve_model(NAME).required().path == repository / "snapshots" / SNAPSHOT


@pytest.mark.parametrize(
    "lost",
    [
        "transformer/diffusion_pytorch_model-00002-of-00002.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/config.json",
        "tokenizer",
    ],
)
def test_a_download_that_was_broken_off_is_told(repository: Path, lost: str, chitu: Chitu) -> None:
    """Nobody vouches for it, and the remedy goes on with it."""
    gone = repository / "snapshots" / SNAPSHOT / lost
    if gone.is_dir():
        shutil.rmtree(gone)
    else:
        (repository / "blobs" / lost).unlink()  # the link stays
    with pytest.raises(CheckpointError, match=f"incomplete.*go on with 'chitu models pull {NAME}'"):
        resolve_model(NAME)
    code, _, err = chitu("generate", "a cat", "--model", NAME, "--dry-run")
    assert code == 4 and "go on with" in err
    code, out, _ = chitu("models", "ls", "--json")
    row = next(row for row in json.loads(out) if row["name"] == NAME)
    assert code == 0 and not row["here"] and "incomplete" in row["where"]
    assert "go on with" in chitu("doctor")[1]


def test_pull_offline_knows_what_is_here(
    repository: Path, chitu: Chitu, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Offline:
        def model_info(self, *_: object, **__: object) -> None:
            raise ConnectionError("no network")

    monkeypatch.setattr("huggingface_hub.HfApi", Offline)
    code, out, err = chitu("models", "pull", NAME)
    assert (code, out.strip()) == (0, str(repository / "snapshots" / SNAPSHOT))
    assert "already here" in err
    (repository / "blobs" / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    code, _, err = chitu("models", "pull", NAME)
    assert code == 4 and "Is this machine online?" in err
