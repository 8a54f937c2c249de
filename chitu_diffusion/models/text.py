"""The text encoder: transformers' UMT5 and its tokenizer behind a room that takes prompts and gives embeddings.

Cleans and encodes as diffusers' `WanPipeline` does: 512 positions, zeros beyond a prompt's end. It knows no guidance,
no negative prompt's default and no device plan.
"""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import ftfy
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase, UMT5Config, UMT5EncoderModel

from chitu_diffusion.errors import CheckpointError

MAX_TOKENS = 512


class TextEncoder(nn.Module):
    """UMT5 ("UniMax", arXiv 2304.09151) as Wan uses it.

    Args:
        network: the encoder, with weights.
        tokenizer: its own.
        max_tokens: positions of an embedding; longer prompts are cut, as Wan's are.
    """

    def __init__(self, network: nn.Module, tokenizer: PreTrainedTokenizerBase, max_tokens: int = MAX_TOKENS) -> None:
        super().__init__()
        self.network: Any = network  # transformers' types do not say what its forward gives
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Embeddings of prompts.

        The encoder runs at the length of the longest prompt, not at `max_tokens`: padding is masked in every layer and
        its rows become zeros, so this changes nothing but the time.

        Args:
            prompts: as people typed them.

        Returns:
            [B, max_tokens, D] in the encoder's dtype, zeros beyond each prompt's end.
        """
        ids, mask = self.tokenize(prompts)
        device = self.network.shared.weight.device
        with torch.autocast(device.type, enabled=False):  # T5 overflows float16
            hidden = self.network(ids.to(device), mask.to(device)).last_hidden_state  # [B, longest, D]
        hidden = hidden * mask.to(hidden)[..., None]
        return torch.nn.functional.pad(hidden, (0, 0, 0, self.max_tokens - hidden.shape[1]))

    def tokenize(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """(ids, mask) of cleaned prompts, each [B, longest] int64; the mask is 1 on tokens, the end mark included."""
        tokens = self.tokenizer(
            [clean_prompt(prompt) for prompt in prompts],
            padding="longest",
            max_length=self.max_tokens,
            truncation=True,
            add_special_tokens=True,
            return_attention_mask=True,
            return_tensors="pt",
        )
        return tokens.input_ids, tokens.attention_mask


def clean_prompt(text: str) -> str:
    """Mends broken Unicode, resolves HTML entities (twice, for doubly escaped ones) and squeezes white space."""
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return re.sub(r"\s+", " ", text).strip()


def build_text_encoder(config: Mapping[str, Any]) -> nn.Module:
    """The encoder of a transformers config, with no weights (on the meta device)."""
    with torch.device("meta"):
        return cast(nn.Module, UMT5EncoderModel(UMT5Config.from_dict(dict(config))))


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder.

    Raises:
        CheckpointError: it is missing or cannot be read.
    """
    if not folder.is_dir():
        raise CheckpointError("the tokenizer is missing", file=folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # transformers has many words for a tokenizer that cannot be
        raise CheckpointError(f"the tokenizer cannot be read: {error}", file=folder) from error
    if tokenizer.pad_token_id is None:
        raise CheckpointError("the tokenizer has no padding token", file=folder / "tokenizer_config.json", key="pad_token")
    return cast(PreTrainedTokenizerBase, tokenizer)
