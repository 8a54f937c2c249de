"""The commands on models of files that lie apart."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import Chitu
from eight_bit import in_eight_bits
from gguf_files import write_gguf
from safetensors.torch import load_file, save_file
from single_files import write_comfy

SHAPES = (
    "--size",
    "32x32",
    "--frames",
    5,
    "--steps",
    2,
    "--device",
    "cpu",
    "--dtype",
    "float32",
    "--seed",
    1,
)


@pytest.fixture
def file(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A transformer's file in ComfyUI's folders, and hashes remembered for this test alone."""
    monkeypatch.setenv("CHITU_CACHE_DIR", str(tmp_path / "cache"))
    return write_comfy(tiny_folder, tmp_path / "models")


def test_a_file_is_planned_made_repeated_and_checked(chitu: Chitu, file: Path, tiny_folder: Path) -> None:
    code, _, said = chitu("generate", "a cat", "--model", file, *SHAPES, "--dry-run")
    assert code == 0 and str(file) in said
    assert all(name in said for name in ("umt5_tiny.safetensors", "wan_tiny_vae.safetensors"))
    for model, name in ((file, "file.npy"), (tiny_folder, "folder.npy")):
        assert chitu("generate", "a cat", "--model", model, *SHAPES, "-o", name)[0] == 0
    assert (
        Path("file.npy").read_bytes()[:-4096]
        and chitu("reproduce", "file.npy", "--model", file, "--check")[0] == 0
    )
    assert chitu("reproduce", "file.npy", "--model", tiny_folder, "--check")[0] == 0  # the same frames
    code, out, _ = chitu("models", "verify", file, "--json")
    assert code == 0
    findings = {finding["part"]: finding["message"] for finding in json.loads(out)["findings"]}
    assert "first use" in findings["files"] and findings.keys() >= {
        "transformer",
        "vae",
        "text_encoder",
        "tokenizer",
    }
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    code, out, _ = chitu("models", "verify", file)
    assert code == 4 and "SHA-256" in out
    assert chitu("calibrate", "--model", file)[0] == 2


def test_the_plan_says_what_is_stored_in_8_bits(chitu: Chitu, file: Path) -> None:
    stored, said, _ = in_eight_bits(load_file(file), "scaled-old")
    save_file(stored, file, metadata=said)
    for words, hinted in (((), True), (("--quant", "fp8", "--set", "infer.quant_keep="), False)):
        code, _, said = chitu("generate", "a cat", "--model", file, *SHAPES, "--dry-run", *words)
        assert code == 0 and "transformer: float8_e4m3fn in its file" in said
        assert ("--quant fp8" in said) == hinted


def test_parts_elsewhere_are_told_by_flags(chitu: Chitu, file: Path, tmp_path: Path) -> None:
    vae = shutil.move(tmp_path / "models/vae/wan_tiny_vae.safetensors", tmp_path / "second.safetensors")
    tokenizer = shutil.move(tmp_path / "models/tokenizer", tmp_path / "words")
    code, _, said = chitu("generate", "a cat", "--model", file, "--dry-run")
    assert code == 4 and "--vae" in said and "--tokenizer" in said
    told = ("--vae", vae, "--tokenizer", tokenizer)
    assert chitu("generate", "a cat", "--model", file, *told, *SHAPES, "-o", "v.npy")[0] == 0
    assert chitu("reproduce", "v.npy", "--model", file, *told, "--check")[0] == 0
    assert chitu("models", "verify", file, *told)[0] == 0
    assert chitu("models", "verify", file)[0] == 4
    assert chitu("models", "convert", file, "whole", *told)[0] == 0
    assert chitu("models", "verify", "whole")[0] == 0
    assert chitu("reproduce", "v.npy", "--model", "whole", "--check")[0] == 0
    code, _, said = chitu("generate", "a cat", "--model", file, *told, "--vae", tokenizer, "--dry-run")
    assert code == 4 and "words" in said
    code, _, said = chitu("generate", "a cat", "--model", file, *told, "--vae", file, "--dry-run")
    assert code == 2 and said.startswith(
        f"error: --vae '{file}': this is a file with a Wan model's transformer"
    )
    code, _, said = chitu("generate", "a cat", "--model", "whole", *told, "--dry-run")
    assert code == 2 and "--vae" in said and "whole model" in said


def test_files_below_a_folder_are_listed(chitu: Chitu, tiny_folder: Path, tmp_path: Path) -> None:
    file = write_comfy(tiny_folder, tmp_path / "models", name="wan")
    stored, said, _ = in_eight_bits(load_file(file), "scaled-new")
    save_file({name: value for name, value in stored.items() if not name.startswith("blocks.1.")}, file, said)
    save_file({"a.lora_A.weight": torch.ones(1)}, file.with_name("style.safetensors"))
    file.with_name("broken.safetensors").write_bytes(b"x" * 50)
    write_gguf(file.with_name("packed.gguf"), {"w": torch.ones(64, 64)}, {"w": "Q8_0"})
    code, out, _ = chitu("models", "ls", "models", "--json")
    assert code == 0
    found = {Path(each["path"]).stem: each for each in json.loads(out)}
    assert "VAE" in found["wan_tiny_vae"]["what"] and "text encoder" in found["umt5_tiny"]["what"]
    assert "adapter" in found["style"]["what"] and "unusable" in found["broken"]["what"]
    assert found["wan"]["bytes"] == file.stat().st_size and "float8_e4m3fn" in found["wan"]["stored"]
    assert found["packed"]["stored"] == "Q8_0"
    assert chitu("models", "ls", "models")[0] == 0
    assert chitu("models", "ls", "nowhere")[0] == 4
