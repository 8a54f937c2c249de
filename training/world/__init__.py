"""A small cartoon world with captions: what the shipped `wan-tiny` model is trained on and judged by.

Ten actors in eight colours do nine motions in six scenes. One combination in ten is held out from training,
so that a model can be asked for what it has never seen.
"""

from training.world import around, chinese
from training.world.captions import (
    caption,
    held_out_prompts,
    pair_caption,
    prompt_for,
    rich_caption,
    vocabulary_corpus,
)
from training.world.drawing import draw
from training.world.vocabulary import WorldSpecs, is_held_out, sample_pairs, sample_specs, specs_for

__all__ = [
    "WorldSpecs",
    "around",
    "caption",
    "chinese",
    "draw",
    "held_out_prompts",
    "is_held_out",
    "pair_caption",
    "prompt_for",
    "rich_caption",
    "sample_pairs",
    "sample_specs",
    "specs_for",
    "vocabulary_corpus",
]
