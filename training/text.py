"""`wan-tiny`'s words: a tokenizer learned from captions, and a small UMT5 encoder.

The encoder is transformers' own `UMT5EncoderModel`; it is trained together with the diffusion
transformer (`training.denoiser`). Text is lower-cased, so that "A CAT" and "a cat" are one.
"""

from __future__ import annotations

import copy
import json
import random
import re
from collections.abc import Collection, Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from chitu_diffusion.evaluation.judge import CLASSES
from training.clock import Clock, Every, learning_rate
from training.world import around, caption, chinese, rich_caption, sample_specs, vocabulary_corpus

PAD = "<pad>"
EOS = "</s>"
UNKNOWN = "<unk>"
VOCABULARY = 1024
WIDTH = 128
MAX_TOKENS = 103
"""Enough for a sentence of some 60 words and a style tail; with the row for padding a multiple of 8."""
TEXT_POSITIONS = 512
"""Rows that the diffusion transformer attends to; those beyond the prompt are zeros (Wan's rule)."""


def train_tokenizer(captions: Iterable[str]) -> Tokenizer:
    """A unigram tokenizer with the whole printable ASCII alphabet, so that unknown words fall apart into
    letters.
    """
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKD(), normalizers.Lowercase(), normalizers.StripAccents()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation()]
    )
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, EOS, UNKNOWN],
        unk_token=UNKNOWN,
        initial_alphabet=[chr(code) for code in range(33, 127)],
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions, trainer)
    eos = tokenizer.token_to_id(EOS)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {EOS}", special_tokens=[(EOS, eos)])
    return tokenizer


def make_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The run's tokenizer, learned on the first call and kept in `folder/tokenizer`."""
    path = folder / "tokenizer"
    if not path.exists():
        fast = PreTrainedTokenizerFast(
            tokenizer_object=train_tokenizer(vocabulary_corpus(60_000, seed=0)),
            pad_token=PAD,
            eos_token=EOS,
            unk_token=UNKNOWN,
            model_max_length=TEXT_POSITIONS,
        )
        fast.save_pretrained(path)
        grow_tokenizer(path)
    return PreTrainedTokenizerFast.from_pretrained(path)


def grown_pieces(vocabulary: Collection[str]) -> list[tuple[str, float]]:
    """Pieces to put behind a vocabulary, with their scores: Chinese words and signs, and the English words of
    `around`. What was one piece, or several, before stays as it was: no new piece begins an old word.
    """
    known = {
        word for line in vocabulary_corpus(20_000, seed=2) for word in re.findall(r"[a-z]+", line.lower())
    }
    words = chinese.words()
    texts = (*words, *chinese.TAILS, *around.NEGATIVES_CHINESE, "。、")
    signs = sorted({sign for text in texts for sign in text if ord(sign) > 127})
    english = [word for word in around.pieces() if word.isascii() and word.isalpha()]
    english = [f"▁{word}" for word in english if not any(old.startswith(word) for old in known)]
    scored = [(word, -8.0) for word in words if len(word) > 1]
    scored += [(sign, -8.5) for sign in signs] + [(word, -9.0) for word in english]
    return [(piece, score) for piece, score in dict(scored).items() if piece not in vocabulary]


def grow_tokenizer(folder: Path) -> None:
    """Put `grown_pieces` behind a tokenizer's own, whose numbers stay; a second call changes nothing."""
    path = folder / "tokenizer.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    own = data["model"]["vocab"]
    own += [list(pair) for pair in grown_pieces({piece for piece, _ in own})]
    path.write_text(json.dumps(data, ensure_ascii=False, indent=1), encoding="utf-8")


def grown_rows(rows: Tensor, tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """Embeddings [V, D] with rows for the tokenizer's new pieces behind them. A Chinese word begins as the
    English one does, any other piece as no word in particular.
    """
    noise = torch.randn(len(tokenizer) - len(rows), rows.shape[1], generator=torch.Generator().manual_seed(6))
    grown = torch.cat([rows, rows.mean(dim=0) + 0.3 * rows.std() * noise])
    vocabulary = tokenizer.get_vocab()
    for word, english in chinese.meanings().items():
        number = vocabulary.get(word, 0)
        if number >= len(rows):
            pieces = tokenizer(english, add_special_tokens=False).input_ids
            grown[number] = rows[[piece for piece in pieces if piece != vocabulary["▁"]]].mean(dim=0)
    return grown


def build_encoder(vocabulary: int) -> UMT5EncoderModel:
    """A fresh encoder."""
    config = UMT5Config(
        vocab_size=vocabulary,
        d_model=WIDTH,
        d_kv=32,
        d_ff=320,
        num_layers=3,
        num_heads=4,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        relative_attention_num_buckets=32,
        relative_attention_max_distance=128,
        pad_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=False,
    )
    return UMT5EncoderModel(config)


def tokenize(tokenizer: PreTrainedTokenizerFast, captions: list[str]) -> Tensor:
    """Captions -> ids [B, MAX_TOKENS] int16, zeros beyond the end mark."""
    ids = tokenizer(captions, padding="max_length", max_length=MAX_TOKENS, truncation=True).input_ids
    return torch.tensor(ids, dtype=torch.int16)


def encode(encoder: UMT5EncoderModel, ids: Tensor) -> tuple[Tensor, Tensor]:
    """ids [B, L] -> text [B, L + 1, D] and the bias of its rows [B, L + 1] float32.

    The last row is one zero row that stands for all rows from the prompt's end to `TEXT_POSITIONS`: with log
    n added to its scores it weighs as much as n such rows. Padding inside the first L rows is cut off by
    -inf.
    """
    ids = ids.long()
    mask = ids != 0
    hidden = encoder(input_ids=ids, attention_mask=mask.long()).last_hidden_state
    hidden = hidden * mask[..., None].to(hidden.dtype)
    text = torch.cat([hidden, hidden.new_zeros(len(ids), 1, hidden.shape[-1])], dim=1)
    padding = (TEXT_POSITIONS - mask.sum(dim=1, keepdim=True)).float().log()
    bias = torch.cat([torch.where(mask, 0.0, -torch.inf), padding], dim=1)
    return text, bias


def read_captions(folder: Path, minutes: float, batch: int = 128) -> None:
    """Teach an encoder which words mean the same, before it meets any video: `folder/encoder.safetensors`.

    Four linear heads on its mean output must name actor, colour, scene and motion of the clip that a caption
    tells of. It takes a CPU a few minutes and spares the diffusion transformer the learning of synonyms. An
    encoder that was trained before keeps what it gives for plain captions. Held-out combinations are not
    read.
    """
    torch.manual_seed(4)
    tokenizer = make_tokenizer(folder)
    encoder = build_encoder(len(tokenizer))
    trained = load_reader(folder, encoder)
    before = copy.deepcopy(encoder).requires_grad_(False) if trained else None
    heads = nn.ModuleDict({name: nn.Linear(WIDTH, len(names)) for name, names in CLASSES.items()})
    optimizer = torch.optim.AdamW([*encoder.parameters(), *heads.parameters()], lr=2e-3, weight_decay=0.01)
    peak = 1e-3 if trained else 2e-3
    generator = torch.Generator().manual_seed(21)
    rng = random.Random(21)
    clock = Clock(minutes)
    report = Every(10)
    step = 0
    while not clock.over:
        for group in optimizer.param_groups:
            group["lr"] = peak * learning_rate(clock.progress, hold=0.3)
        specs = sample_specs(batch, generator, "train")
        plain = batch // 4 if trained else batch // 2
        lines = [caption(words, rng) for words in specs.words()[:plain]]
        lines += [rich_caption(words, rng) for words in specs.words()[plain:]]
        ids = tokenize(tokenizer, lines).long()
        ids = ids[:, : int((ids != 0).sum(1).max())]
        hidden = _hidden(encoder, ids)
        mean = hidden.sum(1) / (ids != 0).sum(1, keepdim=True)
        truth = {"actor": specs.actor, "colour": specs.colour, "scene": specs.scene, "motion": specs.motion}
        logits = {name: head(mean) for name, head in heads.items()}
        loss = torch.stack([F.cross_entropy(logits[name], truth[name]) for name in truth]).sum()
        if before is not None:
            kept = _hidden(before, ids[:plain])
            loss = loss + 4 * (hidden[:plain] - kept).square().sum() / kept.square().sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        step += 1
        if report():
            right = {n: float((logits[n].argmax(1) == truth[n])[plain:].float().mean()) for n in truth}
            print(f"text step {step} {clock.spent:.0f}s loss {float(loss.detach()):.3f} {right}", flush=True)
    save_file(
        {n: p.detach().contiguous() for n, p in encoder.named_parameters()}, folder / "encoder.safetensors"
    )


def _hidden(encoder: UMT5EncoderModel, ids: Tensor) -> Tensor:
    """ids [B, L] -> [B, L, D], zeros in the padding."""
    mask = (ids != 0).long()
    return encoder(input_ids=ids, attention_mask=mask).last_hidden_state * mask[:, :, None]


def load_reader(folder: Path, encoder: UMT5EncoderModel) -> bool:
    """Put what `read_captions` learned into an encoder; whether there was any."""
    path = folder / "encoder.safetensors"
    if path.exists():
        encoder.load_state_dict(load_file(path), strict=False)
    return path.exists()
