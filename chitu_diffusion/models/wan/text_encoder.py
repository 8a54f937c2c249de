"""The text encoder: transformers' UMT5 and its tokenizer behind a room that takes prompts and gives
embeddings.

Cleans and encodes as diffusers' `WanPipeline` does: 512 positions, zeros beyond a prompt's end. It knows no
guidance, no negative prompt's default and no device plan.
"""

from __future__ import annotations

import html
import re
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import ftfy
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase, UMT5Config, UMT5EncoderModel

from chitu_diffusion.errors import CheckpointError
from chitu_diffusion.files.reading import foreign_data, read_json, require_regular

MAX_TOKENS = 512
_CONFIG_FIELDS = (
    "vocab_size",
    "d_model",
    "d_kv",
    "d_ff",
    "num_layers",
    "num_heads",
    "relative_attention_num_buckets",
    "relative_attention_max_distance",
    "dropout_rate",
    "layer_norm_epsilon",
    "initializer_factor",
    "feed_forward_proj",
    "pad_token_id",
    "eos_token_id",
)
_UNSPACED = re.compile(r"[\u3040-\u9fff]+")
"""Chinese and Japanese."""
_WORD = re.compile(rf"{_UNSPACED.pattern}|[^\W_\u3040-\u9fff](?:(?![\u3040-\u9fff])[\w'])*|[^\x00-\x7f]")
_TOKENIZER_SETTINGS = "tokenizer_config.json"
_MOST_TOKENIZER_BYTES = 64 * 2**20
_MOST_TOKENIZER_FILES = 100
_MOST_PIECES = 2_000_000


class TextEncoder(nn.Module):
    """UMT5 ("UniMax", arXiv 2304.09151) as Wan uses it.

    Args:
        network: the encoder, with weights.
        tokenizer: its own.
        max_tokens: positions of an embedding; longer prompts are cut, as Wan's are.
        remembered: how many prompts' embeddings are kept in main memory, the last used ones; at most 4 MB
            each.
    """

    def __init__(
        self,
        network: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        max_tokens: int = MAX_TOKENS,
        remembered: int = 64,
    ) -> None:
        super().__init__()
        self.network: Any = network  # transformers' types do not say what its forward gives
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self._remembered = remembered
        # (cleaned prompt, weights) -> [tokens, D] in main memory, the last used at the end
        self._known: OrderedDict[tuple[str, object], Tensor] = OrderedDict()

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Embeddings of prompts, computed or remembered.

        The encoder runs each prompt by itself and at its own length, not at `max_tokens`: padding is masked
        in every layer and its rows become zeros, so this changes nothing but the time, and a prompt's
        embedding is the same bits whatever stands beside it and whatever was encoded before.

        Args:
            prompts: as people typed them.

        Returns:
            [B, max_tokens, D] in the encoder's dtype and on its device, zeros beyond each prompt's end.
        """
        device = self.network.shared.weight.device
        return torch.stack([self._padded(self._tokens_of(prompt), device) for prompt in prompts])

    def recall(self, prompts: Sequence[str], device: torch.device) -> Tensor | None:
        """What `encode` would give, on a device, if all of it is remembered: no encoder is needed then."""
        places = [self._place(prompt) for prompt in prompts]
        if not all(place in self._known for place in places):
            return None
        return torch.stack([self._padded(self._known[place], device) for place in places])

    def _tokens_of(self, prompt: str) -> Tensor:
        """[tokens, D] of a prompt, the end mark included, in main memory."""
        place = self._place(prompt)
        if place not in self._known:
            ids, mask = self.tokenize([prompt])
            device = self.network.shared.weight.device
            if ids.max() >= (pieces := self.network.shared.num_embeddings):
                raise _another_encoder(self.tokenizer.name_or_path, pieces, int(ids.max()))
            with torch.autocast(device.type, enabled=False):  # T5 overflows float16
                hidden = self.network(ids.to(device), mask.to(device)).last_hidden_state  # [1, tokens, D]
            self._known[place] = hidden[0].to("cpu", copy=True)
            if len(self._known) > self._remembered:
                self._known.popitem(last=False)
        self._known.move_to_end(place)
        return self._known[place]

    def _place(self, prompt: str) -> tuple[str, object]:
        weights = list(self.network.parameters())
        # moving weights between devices leaves these as they are; loading others, or converting them, does
        # not
        identity = (weights[0].dtype, sum(weight._version for weight in weights))
        return clean_prompt(prompt), identity

    def _padded(self, rows: Tensor, device: torch.device) -> Tensor:
        return torch.nn.functional.pad(rows.to(device), (0, 0, 0, self.max_tokens - rows.shape[0]))

    def tokenize(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """(ids, mask) of cleaned prompts, each [B, longest] int64; the mask is 1 on tokens, the end mark
        included.
        """
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

    def count_tokens(self, prompt: str) -> int:
        """Tokens of a prompt as it would be read without a limit, the end mark included."""
        return len(self.tokenizer(clean_prompt(prompt), verbose=False).input_ids)

    def unknown_words(self, prompt: str, known: Collection[str] = ()) -> list[str]:
        """Words and signs of a prompt that the tokenizer has no tokens for.

        Args:
            known: lower-case words that the model was trained on; any other word is unknown then. Of a run
                of signs without spaces, as Chinese is written, it is what known words leave.
        """
        words = dict.fromkeys(words_of(clean_prompt(prompt).lower(), known))
        mark = self.tokenizer.unk_token_id
        return [
            word
            for word in words
            if word.isprintable()
            and (
                (bool(known) and word[0].isalnum() and not {word, word.removesuffix("'s")} & set(known))
                or mark in self.tokenizer(word, add_special_tokens=False).input_ids
            )
        ]


def clean_prompt(text: str) -> str:
    """Mends broken Unicode, resolves HTML entities (twice: some are escaped twice), squeezes white space."""
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return re.sub(r"\s+", " ", text).strip()


def words_of(text: str, known: Collection[str] = ()) -> list[str]:
    """Words of a text, and signs that are no ASCII. A run of signs without spaces is cut at the known words
    in it, of which the longest that fits is taken first.
    """
    inside = sorted((word for word in known if _UNSPACED.fullmatch(word)), key=len, reverse=True)
    cut = re.compile(f"({'|'.join(inside)})") if inside else None
    found: list[str] = []
    for word in _WORD.findall(text):
        found += filter(None, cut.split(word)) if cut and _UNSPACED.match(word) else [word]
    return found


def build_text_encoder(config: Mapping[str, Any]) -> nn.Module:
    """The encoder of a transformers config, with no weights (on the meta device)."""
    with torch.device("meta"):
        # what else stands there (labels, code, another attention) is none of the network's
        used = {key: value for key, value in config.items() if key in _CONFIG_FIELDS}
        return cast(nn.Module, UMT5EncoderModel(UMT5Config.from_dict(used)))


def load_tokenizer(folder: Path, vocab_size: int | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder. No code in it is run, whatever its settings ask for.

    Args:
        vocab_size: rows of the text encoder's table; None looks at none.

    Raises:
        CheckpointError: it is missing, cannot be read, or belongs to another encoder.
    """
    if not folder.is_dir():
        raise CheckpointError("the tokenizer is missing", file=folder)
    # transformers has many words for a tokenizer that cannot be
    with foreign_data(lambda cause: CheckpointError(f"the tokenizer cannot be read: {cause}", file=folder)):
        _check_tokenizer_files(folder)
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        largest = max(*tokenizer("a cat").input_ids, tokenizer.pad_token_id or 0)
    if tokenizer.pad_token_id is None:
        raise CheckpointError(
            "the tokenizer has no padding token", file=folder / "tokenizer_config.json", key="pad_token"
        )
    if vocab_size is not None and largest >= vocab_size:
        raise _another_encoder(folder, vocab_size, largest)
    return cast(PreTrainedTokenizerBase, tokenizer)


def _another_encoder(place: object, vocab_size: int, found: int) -> CheckpointError:
    return CheckpointError(
        "the tokenizer belongs to another text encoder",
        file=place,
        key="vocab_size",
        expected=f"pieces below {vocab_size}",
        found=found,
    )


def _check_tokenizer_files(folder: Path) -> None:
    """transformers opens them by name, and does what their settings say."""
    files = list(folder.iterdir())
    if len(files) > _MOST_TOKENIZER_FILES:
        raise ValueError(f"{len(files)} files; a tokenizer has fewer than {_MOST_TOKENIZER_FILES}")
    for file in files:
        if file.is_dir() and file.suffix != ".json":
            continue  # chat templates and other people's folders
        found = require_regular(file)
        if found.st_size > _MOST_TOKENIZER_BYTES:
            raise ValueError(f"{file.name} has {found.st_size} bytes, more than {_MOST_TOKENIZER_BYTES}")
    for file in (folder / _TOKENIZER_SETTINGS, folder / "special_tokens_map.json"):
        settings = read_json(file) if file.exists() else {}
        if not isinstance(settings, dict):
            raise ValueError(f"{file.name} is not an object")
        for key, value in settings.items():
            is_large = isinstance(value, int) and value > _MOST_PIECES and key != "model_max_length"
            if is_large or (key.endswith("_file") and value is not None):
                raise CheckpointError(
                    "the tokenizer has a setting that no tokenizer of Wan has",
                    file=file,
                    key=key,
                    found=value,
                )
