"""The shipped model as a thing: its size, its files, its words, its adapters, its autoencoder in tiles."""

import json
from pathlib import Path

import pytest
import torch
from conftest import WAN_TINY, Chitu
from running import relative_error

from chitu_diffusion.errors import UsageError
from chitu_diffusion.models.folder import read_folder
from chitu_diffusion.models.kinds import TEXT_IMAGE_TO_VIDEO
from chitu_diffusion.models.loading import load_vae
from chitu_diffusion.models.registry import resolve_model
from chitu_diffusion.models.wan.text_encoder import TextEncoder
from chitu_diffusion.models.wan.tokenizer import load_tokenizer
from chitu_diffusion.task.lora import Lora, shipped_adapters

MIB = 2**20


def test_it_travels_light():
    """All that is shipped beside the code."""
    sizes = {file: file.stat().st_size for file in WAN_TINY.parent.rglob("*") if file.is_file()}
    assert sum(sizes.values()) <= 32 * MIB
    assert max(sizes.values()) < 16 * MIB
    assert (WAN_TINY / "README.md").exists()


def test_one_model_makes_videos_of_words_and_of_pictures():
    assert resolve_model("wan-tiny").spec.kind == TEXT_IMAGE_TO_VIDEO


@pytest.mark.parametrize(
    ("prompt", "unknown"),
    [
        ("A red cat walking on grass, with a dog's ball beside it.", []),
        ("A red dragon walking on the moon", ["dragon", "moon"]),
        ("一只红色的猫在草地上走。", []),
        ("城市街道上有一个蓝色的机器人，正在向左边移动", []),
        ("雪地里，一朵小花一动不动、越来越大！", []),
        ("一只红色的龙在城堡上走", ["龙", "城堡"]),
        ("红cat在snow里跳，还有cinematic tail", ["还", "cinematic", "tail"]),
        ("a cat 🎉", ["🎉"]),
    ],
)
def test_words_that_it_does_not_know_are_named(prompt: str, unknown: list[str]) -> None:
    """In both languages; of Chinese what known words leave."""
    encoder = TextEncoder(torch.nn.Identity(), load_tokenizer(WAN_TINY / "tokenizer"))
    assert encoder.unknown_words(prompt, resolve_model("wan-tiny").spec.words) == unknown


def test_adapters_have_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert list(shipped_adapters()) == ["wan-tiny-4step", "wan-tiny-sketch"]
    named = Lora.of("wan-tiny-SKETCH:0.5")
    assert (named.path, named.strength) == (str(shipped_adapters()["wan-tiny-sketch"]), 0.5)
    assert Lora.of({"path": named.path}).sha256 == named.sha256
    Path("wan-tiny-4step").write_bytes(b"mine")  # a file counts for more
    assert Lora.of("wan-tiny-4step").path == str(tmp_path / "wan-tiny-4step")
    with pytest.raises(UsageError, match="Did you mean 'wan-tiny-sketch'"):
        Lora.of("wan-tiny-skech")


def test_the_adapters_are_listed_and_four_steps_are_chosen(chitu: Chitu) -> None:
    rows = {row["name"]: row for row in json.loads(chitu("models", "ls", "--json")[1])}
    assert "4 steps" in rows["wan-tiny-4step"]["default"]
    assert rows["wan-tiny-sketch"]["here"]
    code, _, err = chitu("generate", "a cat", "--lora", "wan-tiny-4step", "--dry-run")
    assert code == 0, err
    assert "sampler recipe lightx2v-4step (4 steps, euler, guidance 1)" in err
    assert "4 steps, guidance 1.0" in err


def test_tiles_are_the_whole_frame():
    vae = load_vae(read_folder(WAN_TINY), dtype=torch.float32)
    latent = vae.encode(torch.rand(1, 5, 3, 96, 128))
    assert relative_error(vae.decode_tiled(latent, tile_size=8), vae.decode(latent)) < 1e-5
