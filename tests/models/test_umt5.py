"""Our UMT5 encoder and tokenizer beside transformers' own: the same bits and the same numbers."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from tiny_model import write_tiny_model
from transformers import AutoTokenizer, UMT5Config, UMT5EncoderModel

from chitu_diffusion.errors import CheckpointError, UsageError
from chitu_diffusion.models.registry import ASSETS
from chitu_diffusion.models.wan.tokenizer import load_tokenizer
from chitu_diffusion.models.wan.umt5 import Umt5Config, Umt5Encoder

CONFIGS = [
    {"vocab_size": 99, "d_model": 48, "d_kv": 16, "d_ff": 80, "num_layers": 3, "num_heads": 2},
    {
        "vocab_size": 50, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4,
        "relative_attention_num_buckets": 16, "relative_attention_max_distance": 40,
        "layer_norm_epsilon": 1e-5,
    },
]  # fmt: skip


@pytest.mark.parametrize("config", CONFIGS, ids=["usual", "other buckets"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_encoder_is_transformers_own(config: dict[str, int], dtype: torch.dtype) -> None:
    theirs = UMT5EncoderModel(UMT5Config(**config, feed_forward_proj="gated-gelu", dropout_rate=0.0)).eval()
    ours = Umt5Encoder(Umt5Config.from_json({**config, "architectures": ["x"]}))
    ours.load_state_dict(theirs.state_dict())
    theirs.to(dtype)
    ours.to(dtype)
    for tokens in (1, 7, 150):
        ids = torch.randint(config["vocab_size"], (1, tokens))
        with torch.no_grad():
            expected = theirs(ids, torch.ones_like(ids)).last_hidden_state
            assert torch.equal(ours(ids), expected)


def test_only_wans_feed_forward() -> None:
    with pytest.raises(UsageError, match="use gated-gelu"):
        Umt5Config.from_json({"feed_forward_proj": "relu"})


def texts(rng: random.Random) -> list[str]:
    signs = "aAbcdé 猫ﬁ\t.,!?'\"<>/s0123  \u3000😀"
    drawn = ["".join(rng.choice(signs) for _ in range(rng.randint(0, 60))) for _ in range(100)]
    return [*drawn, "</s> a cat <pad>", "a cat walking on grass", "the cat" * 400]


@pytest.mark.parametrize("place", ["shipped", "tiny"])
def test_tokenizer_is_transformers_own(place: str, tmp_path: Path) -> None:
    folder = ASSETS / "wan-tiny" if place == "shipped" else write_tiny_model(tmp_path / "tiny", seed=3)
    theirs = AutoTokenizer.from_pretrained(folder / "tokenizer")
    ours = load_tokenizer(folder / "tokenizer")
    assert len(ours) == len(theirs)
    assert (ours.padding, ours.unknown) == (theirs.pad_token_id, theirs.unk_token_id)
    rng = random.Random()
    for text in texts(rng):
        assert ours.ids(text) == theirs(text).input_ids, repr(text)
        assert ours.ids(text, marked=False) == theirs(text, add_special_tokens=False).input_ids
        most = rng.randint(1, 40)
        assert ours.ids(text, most) == theirs(text, max_length=most, truncation=True).input_ids


def test_a_tokenizer_without_padding_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "tokenizer"
    shutil.copytree(ASSETS / "wan-tiny" / "tokenizer", folder)
    settings = folder / "tokenizer_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "pad_token": "[nothing]"}))
    with pytest.raises(CheckpointError, match="no padding token"):
        load_tokenizer(folder)
