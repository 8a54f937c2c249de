"""`wan-tiny`'s words: a tokenizer learned from captions, and a small UMT5 encoder.

The encoder is transformers' own `UMT5EncoderModel`; it is trained together with the diffusion
transformer (`training.denoiser`). Text is lower-cased, so that "A CAT" and "a cat" are one.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from chitu_diffusion.evaluation.judge import CLASSES
from training.clock import Clock, Every, learning_rate
from training.world import caption, sample_specs, vocabulary_corpus

PAD = "<pad>"
EOS = "</s>"
UNKNOWN = "<unk>"
VOCABULARY = 1024
WIDTH = 128
MAX_TOKENS = 40
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
    return PreTrainedTokenizerFast.from_pretrained(path)


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


def read_captions(folder: Path, minutes: float, batch: int = 256) -> None:
    """Teach a fresh encoder which words mean the same, before it meets any video:
    `folder/encoder.safetensors`.

    Four linear heads on its mean output must name actor, colour, scene and motion of the clip that a caption
    tells of. It takes a CPU a few minutes and spares the diffusion transformer the learning of synonyms.
    Held-out combinations are not read.
    """
    torch.manual_seed(4)
    tokenizer = make_tokenizer(folder)
    encoder = build_encoder(len(tokenizer))
    heads = nn.ModuleDict({name: nn.Linear(WIDTH, len(names)) for name, names in CLASSES.items()})
    optimizer = torch.optim.AdamW([*encoder.parameters(), *heads.parameters()], lr=2e-3, weight_decay=0.01)
    generator = torch.Generator().manual_seed(21)
    rng = random.Random(21)
    clock = Clock(minutes)
    report = Every(10)
    step = 0
    while not clock.over:
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * learning_rate(clock.progress, hold=0.3)
        specs = sample_specs(batch, generator, "train")
        ids = tokenize(tokenizer, [caption(words, rng) for words in specs.words()]).long()
        mask = (ids != 0)[:, :, None].float()
        hidden = encoder(input_ids=ids, attention_mask=mask[..., 0].long()).last_hidden_state
        mean = (hidden * mask).sum(1) / mask.sum(1)
        truth = {"actor": specs.actor, "colour": specs.colour, "scene": specs.scene, "motion": specs.motion}
        logits = {name: head(mean) for name, head in heads.items()}
        loss = torch.stack([F.cross_entropy(logits[name], truth[name]) for name in truth]).sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        step += 1
        if report():
            right = {n: float((logits[n].argmax(1) == truth[n]).float().mean()) for n in truth}
            print(f"text step {step} {clock.spent:.0f}s loss {float(loss.detach()):.3f} {right}", flush=True)
    save_file(
        {n: p.detach().contiguous() for n, p in encoder.named_parameters()}, folder / "encoder.safetensors"
    )


def load_reader(folder: Path, encoder: UMT5EncoderModel) -> None:
    """Put what `read_captions` learned into an encoder; silent where there is none."""
    path = folder / "encoder.safetensors"
    if path.exists():
        encoder.load_state_dict(load_file(path), strict=False)
