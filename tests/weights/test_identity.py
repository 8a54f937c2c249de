"""Which bytes the weights are: hashed from what was opened, remembered, compared with a manifest."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
from pathlib import Path

import pytest
import torch
from gguf_files import write_gguf
from running import CAT, config_for
from safetensors.torch import save_file

from chitu_diffusion.backend import DiffusionBackend
from chitu_diffusion.engine import Engine
from chitu_diffusion.errors import CheckpointError
from chitu_diffusion.media.reading import read_recipe
from chitu_diffusion.models.convert import convert, verify
from chitu_diffusion.models.registry import ASSETS, TINY
from chitu_diffusion.weights import hashing
from chitu_diffusion.weights.hashing import FileHashes, ModelFiles, hashes_of
from chitu_diffusion.weights.loader import WeightFiles
from chitu_diffusion.weights.manifest import (
    MANIFEST_FILE,
    downloaded,
    listed_files,
    read_manifest,
    sha256_of,
    write_manifest,
)

MEMORY = "weights-sha256.json"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    place = tmp_path / "cache"
    monkeypatch.setenv("CHITU_CACHE_DIR", str(place))
    return place


@pytest.fixture
def model(tiny_folder: Path, tmp_path: Path) -> Path:
    """A folder that nobody has used yet."""
    return shutil.copytree(tiny_folder, tmp_path / "model", ignore=shutil.ignore_patterns(MANIFEST_FILE))


@pytest.fixture
def shipped(tmp_path: Path) -> Path:
    return shutil.copytree(ASSETS / TINY, tmp_path / "shipped")


def weights_of(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.safetensors"))


def expected(folder: Path) -> str:
    return sha256_of(ModelFiles(folder), {file: plain(file) for file in weights_of(folder)})


def plain(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def flip(file: Path, position: int) -> None:
    data = bytearray(file.read_bytes())
    data[position] ^= 0x40
    file.write_bytes(data)


def bad_parts(folder: Path) -> list[str]:
    return [finding.part for finding in verify(folder) if not finding.ok]


# -- hashing


@pytest.mark.parametrize("quick", [True, False])
def test_hashes_are_sha256_whatever_the_size(tmp_path, monkeypatch, quick) -> None:
    """Around the chunk, more files than threads; small together, and too large to be waited for."""
    monkeypatch.setattr(hashing, "_CHUNK", 1000)
    monkeypatch.setattr(hashing, "_QUICK", 10**9 if quick else 0)
    files = []
    for size in (0, 1, 999, 1000, 1001, 5000, 12345):
        files.append(tmp_path / f"{size}.bin")
        files[-1].write_bytes(torch.randint(0, 256, (size,), dtype=torch.uint8).numpy().tobytes())
    assert hashes_of(files) == {file: plain(file) for file in files}


@pytest.mark.parametrize(
    "spoilt", ["[" * 10**6, "{", "[]", "null", '{"a": [1, 2, 3, 4, 5]}', "\0", "9" * 5000]
)
def test_a_spoilt_memory_is_as_none(tmp_path, spoilt) -> None:
    file = tmp_path / "w.safetensors"
    file.write_bytes(b"weights")
    (tmp_path / MEMORY).write_text(spoilt)
    assert hashes_of([file], tmp_path) == {file: plain(file)}
    assert json.loads((tmp_path / MEMORY).read_text())[str(file)][-1] == plain(file)


def test_a_memory_that_is_no_file_holds_nobody_up(tmp_path) -> None:
    file = tmp_path / "w.safetensors"
    file.write_bytes(b"weights")
    os.mkfifo(tmp_path / MEMORY)
    assert hashes_of([file], tmp_path) == {file: plain(file)}


def test_a_pipe_among_the_weights_is_refused_at_once(tmp_path) -> None:
    os.mkfifo(tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="it is a pipe; use a regular file"):
        FileHashes([tmp_path / "a.safetensors"])


def test_what_is_remembered_is_not_hashed_again_until_it_changes(tmp_path, monkeypatch) -> None:
    file = tmp_path / "w.safetensors"
    file.write_bytes(b"weights")
    before = os.stat(file)
    first = hashes_of([file], tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(FileHashes, "_hash", lambda *_: pytest.fail("hashed again"))
        assert hashes_of([file], tmp_path) == first
    file.write_bytes(b"Weights")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))  # size, inode and time as before
    assert hashes_of([file], tmp_path) == {file: plain(file)} != first


def test_a_file_that_is_replaced_while_it_is_read_is_refused(tmp_path) -> None:
    file = tmp_path / "w.safetensors"
    other = tmp_path / "other"
    for change in (lambda: os.replace(other, file), lambda: file.write_bytes(b"more"), file.unlink):
        file.write_bytes(b"weights")
        other.write_bytes(b"weights")
        hashes = FileHashes([file])
        change()
        with pytest.raises(CheckpointError, match="replaced or changed while it was read"):
            hashes.settle()
        hashes.close()


# -- what was loaded


def held_back(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Hashing as of a model too large to be waited for, which goes on when the event is set."""
    go = threading.Event()
    hash_file = FileHashes._hash
    monkeypatch.setattr(hashing, "_QUICK", 0)
    monkeypatch.setattr(FileHashes, "_hash", lambda self, file: (go.wait(60), hash_file(self, file))[1])
    return go


@pytest.mark.parametrize("gone", ["replaced", "moved", "deleted"])
def test_the_recipe_names_what_was_loaded(model, cache, tmp_path, monkeypatch, caplog, gone) -> None:
    """The folder changes after loading, before anything was hashed, and the memory is spoilt."""
    loaded = expected(model)
    monkeypatch.setattr(hashing, "_FIRST_WORD", 0.01)
    go = held_back(monkeypatch)
    with Engine(config_for(model, tmp_path)) as engine:
        cache.mkdir(exist_ok=True)
        (cache / MEMORY).write_text("[" * 10**6)
        if gone == "replaced":
            for file in weights_of(model):
                new = file.with_name("new")
                new.write_bytes(file.read_bytes()[:-4] + b"new!")
                os.replace(new, file)
        elif gone == "moved":
            model.rename(tmp_path / "elsewhere")
        else:
            shutil.rmtree(model)
        task = engine.submit(CAT, seed=1, num_inference_steps=3, save_path=str(tmp_path / "a.mp4"))
        while task.status != "saving":
            assert engine.step() is not None and not engine.backend.weights_are_hashed()
        threading.Timer(0.2, go.set).start()  # only the recipe waits, and says so
        engine.run_until_idle()
    assert read_recipe(tmp_path / "a.mp4")["weights_sha256"] == loaded
    assert "waiting for the SHA-256 of the weights" in caplog.text
    assert gone == "replaced" or not model.exists()


def test_bytes_that_nobody_can_know_any_more_are_none(model, cache, tmp_path, monkeypatch, caplog) -> None:
    """A file that is written into after it was loaded and before it was hashed."""
    go = held_back(monkeypatch)
    backend = DiffusionBackend(config_for(model, tmp_path))
    flip(weights_of(model)[0], -1)
    go.set()
    assert backend.weights_sha256() is None and "written into after it was loaded" in caplog.text


def test_closing_does_not_wait_for_the_hash(model, cache, tmp_path, monkeypatch) -> None:
    go = held_back(monkeypatch)
    backend = DiffusionBackend(config_for(model, tmp_path))
    backend.terminate()
    assert not go.is_set()
    go.set()


# -- manifests


def test_the_shipped_model_has_a_manifest_of_all_that_is_read() -> None:
    folder = ASSETS / TINY
    manifest = read_manifest(ModelFiles(folder))
    assert manifest is not None and manifest.origin == "shipped"
    assert manifest.files == {
        file.relative_to(folder).as_posix(): plain(file) for file in listed_files(folder)
    }
    about = json.loads((folder / "flexcache.json").read_text())["about"]
    assert about["weights_sha256"] == expected(folder)


def test_verify_finds_each_flipped_bit(shipped) -> None:
    """Anywhere in any file, 12 of them in weights; a random position each."""
    assert not bad_parts(shipped)
    files = [file for file in listed_files(shipped) for _ in range(3 if file.suffix == ".safetensors" else 1)]
    assert sum(file.suffix == ".safetensors" for file in files) == 12
    for file in files:
        position = int(torch.randint(file.stat().st_size, ()))
        before = file.read_bytes()
        flip(file, position)
        assert bad_parts(shipped), f"{file} at {position}"
        file.write_bytes(before)
    assert not bad_parts(shipped)


def test_a_flipped_bit_in_the_shipped_weights_is_refused_at_loading(shipped, cache, tmp_path) -> None:
    config = config_for(shipped, tmp_path)
    for file in weights_of(shipped):
        before = file.read_bytes()
        flip(file, len(before) - 1 - int(torch.randint(len(before) // 2, ())))
        with pytest.raises(CheckpointError, match=f"{file.name}.*delete .*manifest.json"):
            DiffusionBackend(config)
        file.write_bytes(before)
    assert DiffusionBackend(config).weights_sha256() == expected(shipped)


def test_first_use_writes_a_manifest_and_later_changes_are_told(model, cache, tmp_path, caplog) -> None:
    (model / "stray.safetensors").write_bytes(b"of somebody else")
    DiffusionBackend(config_for(model, tmp_path))
    manifest = read_manifest(ModelFiles(model))
    assert manifest is not None and manifest.origin == "first use" and not bad_parts(model)
    assert "stray.safetensors" not in manifest.files and "tokenizer/tokenizer.json" in manifest.files
    (model / "stray.safetensors").unlink()
    assert not [file for file in model.rglob("*") if "part" in file.name]
    flip(model / "vae" / "diffusion_pytorch_model.safetensors", -1)
    assert bad_parts(model) == ["vae"] and not caplog.text
    # its owner may have trained it on: it loads, and says so
    assert DiffusionBackend(config_for(model, tmp_path)).weights_sha256() == expected(model)
    assert "is not the one in manifest.json (from first use)" in caplog.text


def test_a_folder_that_cannot_be_written_to_has_its_manifest_in_the_cache(model, cache, tmp_path) -> None:
    """Here because something else of that name lies there, which stays."""
    (model / MANIFEST_FILE).write_text('{"name": "of an app"}')
    DiffusionBackend(config_for(model, tmp_path))
    assert json.loads((model / MANIFEST_FILE).read_text()) == {"name": "of an app"}
    manifest = read_manifest(ModelFiles(model), cache)
    assert manifest is not None and manifest.place.parent == cache / "manifests"
    flip(model / "transformer" / "diffusion_pytorch_model.safetensors", -1)
    assert bad_parts(model) == ["transformer"]


@pytest.mark.parametrize("harm", ["[" * 10**6, "{", '{"format": 1, "origin": "x", "files": {"../a": "0"}}'])
def test_a_spoilt_manifest_stops_no_video(model, cache, tmp_path, harm, caplog) -> None:
    (model / MANIFEST_FILE).write_text(harm)
    assert DiffusionBackend(config_for(model, tmp_path)).weights_sha256() == expected(model)
    assert "the manifest cannot be used" in caplog.text and bad_parts(model) == ["manifest"]


def test_what_a_manifest_names_must_be_there(shipped) -> None:
    (shipped / "tokenizer" / "tokenizer_config.json").unlink()
    assert bad_parts(shipped) == ["tokenizer"]


def test_a_converted_folder_brings_its_manifest(model, tmp_path, cache) -> None:
    for layout in ("official", "diffusers"):
        target = tmp_path / layout
        convert(model, target, layout)
        manifest = read_manifest(ModelFiles(target))
        assert manifest is not None and manifest.origin == "convert" and not bad_parts(target)
        for file in (file for file in listed_files(target) if file.suffix in (".pth", ".safetensors")):
            before = file.read_bytes()
            flip(file, -2 - int(torch.randint(len(before) // 4, ())))
            assert bad_parts(target), file
            file.write_bytes(before)


def test_the_hub_cache_is_its_own_manifest(model, tmp_path) -> None:
    """Large files are links to blobs that are called by their SHA-256."""
    repo = tmp_path / "hub" / "models--a--b"
    snapshot = shutil.copytree(model, repo / "snapshots" / "0123")
    (repo / "blobs").mkdir()
    for file in weights_of(snapshot):
        blob = repo / "blobs" / plain(file)
        file.rename(blob)
        file.symlink_to(os.path.relpath(blob, file.parent))
    manifest = read_manifest(ModelFiles(snapshot))
    assert manifest is not None and manifest.origin == "hub cache" and len(manifest.files) == 3
    assert not bad_parts(snapshot)
    flip((snapshot / "vae" / "diffusion_pytorch_model.safetensors").resolve(), -1)
    assert bad_parts(snapshot) == ["vae"]


def test_a_pulled_folder_is_compared_with_what_the_hub_said(model) -> None:
    """A file that was damaged on its way is found, for its hash comes from the hub's client."""
    (file, *_) = weights_of(model)
    note = model / ".cache/huggingface/download" / f"{file.relative_to(model).as_posix()}.metadata"
    note.parent.mkdir(parents=True)
    note.write_text(f"{'0' * 40}\n{plain(file)}\n1.5\n")
    flip(file, -1)
    write_manifest(ModelFiles(model), "pull", downloaded(model))
    assert bad_parts(model) == [file.parent.name]


@pytest.mark.parametrize("mapped", [True, False])
@pytest.mark.parametrize("ending", [".safetensors", ".pth", ".gguf"])
def test_what_is_read_is_what_was_opened(tmp_path: Path, ending: str, mapped: bool) -> None:
    """Adapters are taken out by reading the weights again, long after they were loaded."""

    def write(place: Path, value: float) -> None:
        tensors = {"w": torch.full((64, 64), value)}
        if ending == ".safetensors":
            save_file(tensors, place)
        elif ending == ".pth":
            torch.save(tensors, place)
        else:
            write_gguf(place, tensors, {"w": "Q8_0"})

    file = tmp_path / f"w{ending}"
    other = tmp_path / f"other{ending}"
    for change in (lambda: os.replace(other, file), file.unlink):
        write(file, 1.0)
        write(other, 2.0)
        weights = WeightFiles(file, mapped=mapped)
        change()
        # Q8_0 keeps scales in 16 bits
        assert torch.allclose(weights.read("w"), torch.ones(64, 64), atol=1e-3), "another file's"
    write(file, 1.0)
    weights = WeightFiles(file, mapped=mapped)
    file.write_bytes(other.read_bytes())
    os.utime(file, (1, 1))
    with pytest.raises(CheckpointError, match="has been written into since it was opened"):
        weights.read("w")
