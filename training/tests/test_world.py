"""The little world: its combinations, its pictures, its sentences."""

from __future__ import annotations

import json
import random
import re

import pytest
import torch

from chitu_diffusion.evaluation import prompts as shipped
from chitu_diffusion.evaluation.prompts import ACTORS, COLOURS, MOTIONS, SCENES, Words
from training.world import (
    caption,
    draw,
    held_out_prompts,
    is_held_out,
    prompt_for,
    sample_specs,
    specs_for,
    vocabulary_corpus,
)
from training.world.phrases import NOUNS
from training.world.vocabulary import every_combination

SIZES = (len(ACTORS), len(COLOURS), len(SCENES), len(MOTIONS))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def every_actor(motion: str, scene: str = "grass", colour: str = "red") -> list[Words]:
    return [Words(actor, colour, scene, motion) for actor in ACTORS]


def actor_pixels(words: list[Words], frames: int = 17, height: int = 64, width: int = 64) -> torch.Tensor:
    """Where the actor is: float `[B, T, H, W]`, 1 where it differs from the empty scene."""
    specs = specs_for(words, generator())
    full = draw(specs, height, width, frames)
    empty = draw(specs, height, width, frames, with_actor=False)
    return ((full - empty).abs().amax(dim=1) > 0.05).float()


def centroids(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x and y of the actor's middle as shares of the picture, `[B, T]` each."""
    height, width = pixels.shape[2:]
    mass = pixels.sum(dim=(2, 3))
    x = (pixels.sum(dim=2) * torch.arange(width)).sum(dim=2) / mass / width
    y = (pixels.sum(dim=3) * torch.arange(height)).sum(dim=2) / mass / height
    return x, y


# -- combinations


def test_about_one_combination_in_ten_is_held_out_for_good() -> None:
    held_out = is_held_out(*every_combination())
    assert 0.08 <= held_out.float().mean().item() <= 0.12
    assert torch.equal(held_out, is_held_out(*every_combination()))


def test_training_shows_every_pair_of_values_often() -> None:
    combinations = torch.stack(every_combination(), dim=1)
    training = combinations[~is_held_out(*combinations.unbind(dim=1))]
    for first in range(4):
        for second in range(first):
            pair = training[:, first] * SIZES[second] + training[:, second]
            everywhere = torch.bincount(combinations[:, first] * SIZES[second] + combinations[:, second])
            assert (torch.bincount(pair, minlength=len(everywhere)) >= 0.6 * everywhere).all()


@pytest.mark.parametrize(("split", "held_out_share"), [("train", 0.0), ("held_out", 1.0)])
def test_splits_keep_to_themselves(split: str, held_out_share: float) -> None:
    specs = sample_specs(500, generator(), split)
    assert len(specs) == 500
    assert is_held_out(specs.actor, specs.colour, specs.scene, specs.motion).float().mean() == held_out_share
    assert ((specs.variation >= 0) & (specs.variation < 1)).all()


def test_every_value_is_drawn() -> None:
    specs = sample_specs(2000, generator(), "all")
    for part, size in zip((specs.actor, specs.colour, specs.scene, specs.motion), SIZES, strict=True):
        assert part.unique().tolist() == list(range(size))


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(ValueError, match="split is 'test'"):
        sample_specs(1, generator(), "test")


def test_specs_and_words_go_both_ways() -> None:
    specs = sample_specs(20, generator())
    again = specs_for(specs.words(), generator(1))
    assert again.words() == specs.words()
    assert specs[3:5].words() == specs.words()[3:5]


# -- pictures


@pytest.mark.parametrize(
    ("height", "width", "frames"), [(64, 64, 1), (72, 128, 5), (256, 64, 5), (64, 104, 17)]
)
def test_clips_have_the_asked_shape_and_range(height: int, width: int, frames: int) -> None:
    specs = sample_specs(12, generator(), "all")
    clips = draw(specs, height, width, frames)
    assert clips.shape == (12, 3, frames, height, width) and clips.dtype == torch.float32
    assert clips.isfinite().all() and clips.min() >= -1 and clips.max() <= 1
    assert (clips - draw(specs, height, width, frames, with_actor=False)).abs().amax(
        dim=(1, 2, 3, 4)
    ).min() > 0.3


def test_the_same_specs_give_the_same_clip_in_any_company() -> None:
    specs = sample_specs(8, generator(), "all")
    together = draw(specs, 64, 64, 5)
    assert torch.equal(together, draw(specs, 64, 64, 5))
    alone = torch.cat([draw(specs[i : i + 1], 64, 64, 5) for i in range(8)])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("motion", "axis", "sign"), [("left", 0, -1), ("right", 0, 1), ("up", 1, -1), ("down", 1, 1)]
)
def test_actors_go_where_they_are_said_to_go(motion: str, axis: int, sign: int) -> None:
    middle = centroids(actor_pixels(every_actor(motion)))
    way = (middle[axis][:, -1] - middle[axis][:, 0]) * sign
    aside = (middle[1 - axis] - middle[1 - axis][:, :1]).abs()
    assert (way > 0.33).all()
    assert (aside < 0.08).all()


def test_growing_grows_and_nothing_else_does() -> None:
    area = actor_pixels(every_actor("growing")).sum(dim=(2, 3))
    assert (area[:, -1] > 3 * area[:, 0]).all()
    area = actor_pixels(every_actor("staying")).sum(dim=(2, 3))
    assert (area.amax(dim=1) < 1.35 * area.amin(dim=1)).all()


def test_staying_stays() -> None:
    x, y = centroids(actor_pixels(every_actor("staying")))
    assert (x.amax(dim=1) - x.amin(dim=1)).max() < 0.06
    assert (y.amax(dim=1) - y.amin(dim=1)).max() < 0.06


def test_spinning_turns_all_the_way_round_in_place() -> None:
    # These three do not move their parts when they spin, so the last frame is the first.
    words = [Words(actor, "red", "grass", "spinning") for actor in ("car", "robot", "ball")]
    clips = draw(specs_for(words, generator()), 64, 64, 17)
    assert (clips[:, :, 0] - clips[:, :, -1]).abs().max() < 0.05
    assert (clips[:, :, 0] - clips[:, :, 4]).abs().amax(dim=(1, 2, 3)).min() > 0.5


def test_jumping_lands_twice_and_circling_comes_back() -> None:
    _, y = centroids(actor_pixels(every_actor("jumping")))
    assert (y[:, 0] - y[:, 4] > 0.2).all() and (y[:, 8] - y[:, 12] > 0.2).all()
    assert ((y[:, 0] - y[:, 8]).abs() < 0.08).all()
    x, y = centroids(actor_pixels(every_actor("circling")))
    assert ((x[:, 0] - x[:, -1]).abs() < 0.08).all() and ((y[:, 0] - y[:, -1]).abs() < 0.08).all()
    assert (torch.hypot(x[:, 0] - x[:, 8], y[:, 0] - y[:, 8]) > 0.3).all()


def test_the_asked_colour_is_on_the_actor() -> None:
    """Red, green and blue actors have most of their own channel."""
    for channel, colour in enumerate(("red", "green", "blue")):
        words = every_actor("staying", "night sky", colour)
        inside = actor_pixels(words, frames=1)
        clips = draw(specs_for(words, generator()), 64, 64, 1)
        mean = (clips * inside[:, None]).sum(dim=(2, 3, 4)) / inside.sum(dim=(1, 2, 3))[:, None]
        assert (mean.argmax(dim=1) == channel).all()


# -- sentences

ACTOR_SIGNS = {actor: re.compile(rf"\b({'|'.join(nouns)})\b") for actor, nouns in NOUNS.items()}
SCENE_SIGNS = {
    "grass": re.compile(r"\b(grass|grassy|meadow|lawn)\b"),
    "beach": re.compile(r"\b(beach|sand|sandy|palm)\b"),
    "night sky": re.compile(r"\b(night|stars|starry|moonlight|dark)\b"),
    "city": re.compile(r"\b(city|street|road|town|buildings)\b"),
    "snow": re.compile(r"\b(snow|snowy|winter)\b"),
    "sea": re.compile(r"\b(sea|ocean|water|waves)\b"),
}
MOTION_SIGNS = {
    "left": re.compile(r"\bleft"),
    "right": re.compile(r"\bright"),
    "up": re.compile(r"\b(up|upward|upwards|top|rising|rises|ascend\w+)\b"),
    "down": re.compile(r"\b(down|downward|downwards|bottom|falling|falls|sink\w+|descend\w+)\b"),
    "jumping": re.compile(r"\b(jump|hopp|hops|leap|bounc)"),
    "circling": re.compile(r"\b(circl|round)"),
    "growing": re.compile(r"\b(grow|bigger|larger)"),
    "spinning": re.compile(r"\b(spin|rotat|turn|twirl)"),
    "staying": re.compile(r"\b(still|not mov|rest|place|sit|stand|wait|parked|anchored|hover)"),
}
GOING = re.compile(
    r"\b(walk|run|trot|flies|flying|flutter|swim|driv|rac|sail[si]|cruis|roll|march|mov|slid|glid|go|travel)"
)


def plain(text: str) -> str:
    """Lower case, without the phrases that use another word innocently."""
    text = text.lower()
    for phrase, meaning in (
        ("from right to left", "left"),
        ("from left to right", "right"),
        ("jumping up and down", "jumping"),
        ("jumps up and down", "jumps"),
        ("sailing boat", "boat"),
        ("green grass", "grass"),
        ("white snow", "snow"),
    ):
        text = text.replace(phrase, meaning)
    return text


def signs_in(text: str, signs: dict[str, re.Pattern[str]]) -> set[str]:
    return {value for value, sign in signs.items() if sign.search(text)}


def test_captions_never_say_anything_false() -> None:
    rng = random.Random(0)
    for words in sample_specs(6000, generator(), "all").words():
        text = plain(caption(words, rng))
        assert signs_in(text, ACTOR_SIGNS) <= {words.actor}, text
        assert {colour for colour in COLOURS if re.search(rf"\b{colour}\b", text)} <= {words.colour}, text
        assert signs_in(text, SCENE_SIGNS) <= {words.scene}, text
        motions = signs_in(text, MOTION_SIGNS)
        assert motions <= {words.motion}, text
        if GOING.search(text) and not motions:
            assert words.motion in ("left", "right"), text


def test_prompts_for_scoring_name_all_four_words() -> None:
    specs = sample_specs(300, generator(), "all").words()
    prompts = [(prompt_for(words), words) for words in specs] + held_out_prompts(300, seed=1)
    for prompt, words in prompts:
        text = plain(prompt)
        assert signs_in(text, ACTOR_SIGNS) == {words.actor}, text
        assert re.search(rf"\b{words.colour}\b", text), text
        assert signs_in(text, SCENE_SIGNS) == {words.scene}, text
        assert signs_in(text, MOTION_SIGNS) == {words.motion}, text


def test_held_out_prompts_are_held_out_repeatable_and_varied() -> None:
    prompts = held_out_prompts(100, seed=5)
    assert prompts == held_out_prompts(100, seed=5) and prompts != held_out_prompts(100, seed=6)
    assert len({words for _, words in prompts}) == 100
    specs = specs_for([words for _, words in prompts], generator())
    assert is_held_out(specs.actor, specs.colour, specs.scene, specs.motion).all()


@pytest.mark.parametrize("count", [16, 64])
def test_the_package_holds_what_the_world_says(count: int) -> None:
    """A model is asked the same prompts for as long as this holds."""
    seed = json.loads(shipped.HELD_OUT.read_text(encoding="utf-8"))["seed"]
    assert shipped.held_out_prompts(count) == held_out_prompts(count, seed)


def test_the_phrases_that_people_will_type_occur() -> None:
    rng = random.Random(0)
    for phrase, words in (
        ("cat walking on grass", Words("cat", "red", "grass", "left")),
        ("dog running on the beach", Words("dog", "white", "beach", "right")),
        ("a red car driving in the city", Words("car", "red", "city", "right")),
    ):
        assert any(phrase in caption(words, rng).lower() for _ in range(5000)), phrase


def test_the_corpus_is_as_long_as_asked_and_repeatable() -> None:
    corpus = list(vocabulary_corpus(500, seed=3))
    assert len(corpus) == 500 and corpus == list(vocabulary_corpus(500, seed=3))
    assert all(text.strip() == text and text for text in corpus)
    assert len(set(corpus)) > 450


def test_the_canonical_prompt_is_plain_english() -> None:
    assert prompt_for(Words("cat", "orange", "grass", "left")) == "An orange cat walking to the left on grass"
    assert prompt_for(Words("boat", "blue", "sea", "circling")) == "A blue boat sailing in a circle at sea"
