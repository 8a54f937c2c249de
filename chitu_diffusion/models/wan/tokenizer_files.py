"""UMT5's tokenizer where all that there is of it is a SentencePiece model: as bytes in a file of weights, as
ComfyUI's text encoders have it.

transformers reads such a model through packages that are not asked for here; the pieces and their scores come
from `sentencepiece`, the table of its normaliser from the few fields that name it. Knows bytes and folders.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import Unigram

from chitu_diffusion.files.atomic import new_folder

_NORMALIZER = 3  # ModelProto.normalizer_spec
_CHARS_MAP = 2  # NormalizerSpec.precompiled_charsmap
_UNKNOWN = 2
"""The unknown piece of T5's tokenizers, as transformers' class has it."""


def kept_tokenizer(model: bytes, cache_dir: Path) -> Path:
    """A folder with the tokenizer of a SentencePiece model, made once; it appears whole or not at all.

    Raises:
        ValueError, RuntimeError: no such model, or one of another kind than T5's.
        OSError: the folder cannot be written.
    """
    place = cache_dir / "tokenizers" / hashlib.sha256(model).hexdigest()[:32]
    if not place.is_dir():
        place.parent.mkdir(parents=True, exist_ok=True)
        tokenizer = tokenizer_of_pieces(model)
        with new_folder(place) as part:
            tokenizer.save(str(part / "tokenizer.json"))
    return place


def tokenizer_of_pieces(model: bytes) -> Backend:
    """The tokenizer of a SentencePiece model.

    Raises:
        ValueError, RuntimeError: no such model, or one of another kind than T5's.
    """
    from sentencepiece import SentencePieceProcessor

    pieces = SentencePieceProcessor(model_proto=model)
    if pieces.unk_id() != _UNKNOWN:
        raise ValueError(f"its unknown piece is number {pieces.unk_id()}, and T5's is {_UNKNOWN}")
    table = [(pieces.id_to_piece(index), pieces.get_score(index)) for index in range(len(pieces))]
    named = (pieces.id_to_piece(index) for index in (pieces.eos_id(), pieces.unk_id(), pieces.pad_id()))
    end, unknown, padding = named
    normalizer = b"".join(value for number, value in _fields(model) if number == _NORMALIZER)
    chars = b"".join(value for number, value in _fields(normalizer) if number == _CHARS_MAP)
    backend = Backend(Unigram(table, unk_id=_UNKNOWN, byte_fallback=False))
    if chars:
        backend.normalizer = normalizers.Precompiled(chars)
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="always")]
    )
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    backend.add_special_tokens([padding, end, unknown])
    backend.post_processor = processors.TemplateProcessing(
        single=["$A", end], special_tokens=[(end, pieces.eos_id())]
    )
    return backend


def _fields(message: bytes) -> Iterator[tuple[int, bytes]]:
    """The fields of a protocol buffer that hold bytes: (number, value)."""
    at = 0

    def number() -> int:
        nonlocal at
        value = 0
        for shift in range(0, 70, 7):
            byte = message[at]
            at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
        raise ValueError("a number that is too long")

    while at < len(message):
        key = number()
        wire = key & 7
        if wire == 0:
            number()
        elif wire in (1, 5):
            at += 8 if wire == 1 else 4
        elif wire == 2:
            length = number()
            yield key >> 3, message[at : at + length]
            at += length
        else:
            raise ValueError(f"a field of wire type {wire}")
