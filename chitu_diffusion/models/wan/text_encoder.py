"""The text encoder: UMT5 and its tokenizer behind a room that takes prompts and gives embeddings.

Cleans and encodes as diffusers' `WanPipeline` does: 512 positions, zeros beyond a prompt's end. It knows no
guidance, no negative prompt's default and no device plan.
"""

from __future__ import annotations

import html
import re
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import ftfy
import torch
from torch import Tensor, nn

from chitu_diffusion.models.hollow import hollow
from chitu_diffusion.models.wan.tokenizer import Tokenizer, another_encoder
from chitu_diffusion.models.wan.umt5 import Umt5Config, Umt5Encoder

MAX_TOKENS = 512
_UNSPACED = re.compile(r"[\u3040-\u9fff]+")
"""Chinese and Japanese."""
_WORD = re.compile(rf"{_UNSPACED.pattern}|[^\W_\u3040-\u9fff](?:(?![\u3040-\u9fff])[\w'])*|[^\x00-\x7f]")


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
        self, network: nn.Module, tokenizer: Tokenizer, max_tokens: int = MAX_TOKENS, remembered: int = 64
    ) -> None:
        super().__init__()
        self.network: Any = network
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
            ids = torch.tensor([self.tokenizer.ids(clean_prompt(prompt), self.max_tokens)])
            device = self.network.shared.weight.device
            if ids.max() >= (pieces := self.network.shared.num_embeddings):
                raise another_encoder(self.tokenizer.place, pieces, int(ids.max()))
            with torch.autocast(device.type, enabled=False):  # T5 overflows float16
                hidden = self.network(ids.to(device))  # [1, tokens, D]
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

    def count_tokens(self, prompt: str) -> int:
        """Tokens of a prompt as it would be read without a limit, the end mark included."""
        return len(self.tokenizer.ids(clean_prompt(prompt)))

    def unknown_words(self, prompt: str, known: Collection[str] = ()) -> list[str]:
        """Words and signs of a prompt that the tokenizer has no tokens for.

        Args:
            known: lower-case words that the model was trained on; any other word is unknown then. Of a run
                of signs without spaces, as Chinese is written, it is what known words leave.
        """
        words = dict.fromkeys(words_of(clean_prompt(prompt).lower(), known))
        return [
            word
            for word in words
            if word.isprintable()
            and (
                (bool(known) and word[0].isalnum() and not {word, word.removesuffix("'s")} & set(known))
                or self.tokenizer.unknown in self.tokenizer.ids(word, marked=False)
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
    """The encoder of a transformers config, with no weights (on the meta device).

    Raises:
        UsageError: another network than Wan's.
    """
    with hollow():
        return Umt5Encoder(Umt5Config.from_json(config))
