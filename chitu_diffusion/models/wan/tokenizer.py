"""UMT5's tokenizer: a folder's `tokenizer.json`, or its SentencePiece model, behind a few questions.

By `tokenizers` itself, so that no run waits for the import of transformers. No code of a folder is run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tokenizers

from chitu_diffusion.errors import CheckpointError
from chitu_diffusion.files.reading import foreign_data, read_json, require_regular
from chitu_diffusion.models.wan.tokenizer_files import tokenizer_of_pieces

_FILE = "tokenizer.json"
_PIECES = "spiece.model"
_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json")
_MOST_BYTES = 64 * 2**20
_MOST_FILES = 100
_MOST_PIECES = 2_000_000


class Tokenizer:
    """Text to the numbers of its pieces.

    Args:
        backend: as a `tokenizer.json` has it.
        padding: number of the padding piece.
        unknown: number of the piece for what there is no piece for; None: there is none.
        place: the folder, for messages.
    """

    def __init__(self, backend: tokenizers.Tokenizer, padding: int, unknown: int | None, place: Path) -> None:
        self.padding = padding
        self.unknown = unknown
        self.place = place
        self._backend = backend
        backend.no_padding()

    def __len__(self) -> int:
        return int(self._backend.get_vocab_size())

    def ids(self, text: str, most: int | None = None, *, marked: bool = True) -> list[int]:
        """The numbers of a text's pieces.

        Args:
            most: cut it to so many, the end mark included.
            marked: with the end mark.
        """
        if most is None:
            self._backend.no_truncation()
        else:
            self._backend.enable_truncation(most)
        return list(self._backend.encode(text, add_special_tokens=marked).ids)


def load_tokenizer(folder: Path, vocab_size: int | None = None) -> Tokenizer:
    """The tokenizer in a folder. No code in it is run, whatever its settings ask for.

    Args:
        vocab_size: rows of the text encoder's table; None looks at none.

    Raises:
        CheckpointError: it is missing, cannot be read, or belongs to another encoder.
    """
    if not folder.is_dir():
        raise CheckpointError("the tokenizer is missing", file=folder)
    with foreign_data(lambda cause: CheckpointError(f"the tokenizer cannot be read: {cause}", file=folder)):
        settings = _checked_settings(folder)
        if (folder / _FILE).exists():
            backend = tokenizers.Tokenizer.from_file(str(folder / _FILE))
        elif (folder / _PIECES).exists():
            backend = tokenizer_of_pieces((folder / _PIECES).read_bytes())
        else:
            raise ValueError(f"it has neither {_FILE} nor {_PIECES}")
        padding = backend.token_to_id(_name(settings.get("pad_token"), "<pad>"))
        unknown = backend.token_to_id(_name(settings.get("unk_token"), "<unk>"))
        largest = max(*backend.encode("a cat").ids, padding or 0)
    if padding is None:
        raise CheckpointError(
            "the tokenizer has no padding token", file=folder / _SETTINGS[0], key="pad_token"
        )
    if vocab_size is not None and largest >= vocab_size:
        raise another_encoder(folder, vocab_size, largest)
    return Tokenizer(backend, padding, unknown, folder)


def another_encoder(place: Path, vocab_size: int, found: int) -> CheckpointError:
    """A tokenizer's piece has no row in the text encoder's table."""
    return CheckpointError(
        "the tokenizer belongs to another text encoder",
        file=place,
        key="vocab_size",
        expected=f"pieces below {vocab_size}",
        found=found,
    )


def _name(token: Any, usual: str) -> str:
    """A special token as settings have it: a word, or an object with one."""
    if isinstance(token, dict):
        token = token.get("content")
    return usual if token is None else str(token)


def _checked_settings(folder: Path) -> dict[str, Any]:
    """What a tokenizer's small files say, together."""
    files = list(folder.iterdir())
    if len(files) > _MOST_FILES:
        raise ValueError(f"{len(files)} files; a tokenizer has fewer than {_MOST_FILES}")
    for file in files:
        if file.is_dir() and file.suffix != ".json":
            continue  # chat templates and other people's folders
        found = require_regular(file)
        if found.st_size > _MOST_BYTES:
            raise ValueError(f"{file.name} has {found.st_size} bytes, more than {_MOST_BYTES}")
    together: dict[str, Any] = {}
    for file in (folder / name for name in reversed(_SETTINGS)):
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
        together |= settings
    return together
