"""Sentences for clips: many ways to say the same four words, never a false one.

A caption may leave parts out, as people do, but what it says is true of the clip. Sentences are made and
never parsed: whoever scores a clip keeps the words beside the prompt.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from chitu_diffusion.evaluation.prompts import ACTORS, COLOURS, MOTIONS, SCENES, Words
from training.world import around, chinese
from training.world.phrases import (
    ADJECTIVES,
    GAITS,
    NOUNS,
    OPENINGS,
    PLACE_NOUNS,
    PLACES,
    UNNAMED,
    Doing,
    directed,
    undirected,
)
from training.world.vocabulary import every_combination, is_held_out

_CANONICAL_MOTION = {
    "up": "moving up",
    "down": "moving down",
    "jumping": "jumping",
    "growing": "growing",
    "spinning": "spinning",
    "staying": "staying still",
}


def prompt_for(words: Words) -> str:
    """The one plain sentence that names all four words: "A red cat walking to the left on grass"."""
    gait = GAITS[words.actor][0].gerund
    if words.motion in ("left", "right"):
        motion = f"{gait} to the {words.motion}"
    elif words.motion == "circling":
        motion = f"{gait} in a circle"
    else:
        motion = _CANONICAL_MOTION[words.motion]
    return f"{_with_article(f'{words.colour} {words.actor}').capitalize()} {motion} {PLACES[words.scene][0]}"


def caption(words: Words, rng: random.Random, *, complete: bool = False) -> str:
    """A random true sentence about a clip of these words; `complete` names all four and the direction."""
    if not complete and rng.random() < 0.02:
        return _styled(
            f"{rng.choice(('', 'a view', 'a scene', 'something'))} {_place(words, rng)}".strip(), rng
        )
    named = complete or rng.random() > 0.04
    coloured = complete or rng.random() > 0.2
    placed = complete or rng.random() > 0.12
    moving = complete or rng.random() > 0.1
    actor = words.actor if named else None
    colour = words.colour if coloured else None
    doing = _doing(actor, words.motion, rng, complete) if moving else None
    if rng.random() < 0.07:
        return _styled(_listed(words, actor, colour, doing, placed, rng), rng)
    place = _place(words, rng) if placed else None
    return _styled(_sentence(_subject(actor, colour, rng), doing, place, rng), rng)


def rich_caption(words: Words, rng: random.Random) -> str:
    """A caption as people write them: plain, in Chinese, with a style tail, among unknown words, or long."""
    draw = rng.random()
    if draw < 0.18:
        text = chinese.caption(words, rng)
        if rng.random() < 0.25:
            text = "，".join([text.rstrip("。"), *rng.sample(chinese.TAILS, rng.randint(1, 4))])
        return text
    if draw < 0.25:
        doing = _doing(words.actor, words.motion, rng, complete=True)
        return _styled(rng.choice((f"it is {doing.gerund}", f"it {doing.finite}", doing.gerund)), rng)
    text = caption(words, rng, complete=rng.random() < 0.55)
    if rng.random() < 0.15:
        text = around.with_unknown(text, rng)
    if rng.random() < 0.55:
        text = around.lengthened(text, rng, rng.randint(20, 66))
    if rng.random() < 0.25:
        text = around.with_tail(text, rng)
    return text


def pair_caption(first: Words, second: Words, rng: random.Random) -> str:
    """A sentence about two actors in one picture, the first named first or second."""
    if rng.random() < 0.5:
        first, second = second, first
    if rng.random() < 0.15:
        return chinese.pair(first, second, rng)
    place = _place(first, rng) if rng.random() > 0.1 else ""
    one, two = (_subject(words.actor, words.colour, rng).rstrip(",") for words in (first, second))
    acts = [_doing(words.actor, words.motion, rng, complete=True) for words in (first, second)]
    draw = rng.random()
    if draw < 0.3:
        text = f"{one} and {two} {place}"
    elif draw < 0.65:
        text = f"{one} {acts[0].gerund} and {two} {acts[1].gerund} {place}"
    elif draw < 0.8:
        text = f"{place}, {one} {acts[0].finite} while {two} {acts[1].finite}"
    else:
        text = f"{one} {acts[0].gerund} {place}, with {two} {acts[1].gerund} beside it"
    if rng.random() < 0.2:
        text = around.with_tail(text, rng)
    return _styled(text, rng)


def held_out_prompts(n: int, seed: int) -> list[tuple[str, Words]]:
    """`n` complete prompts, variously phrased, for held-out combinations; none comes twice before each came
    once.
    """
    combinations = every_combination()
    kept = is_held_out(*combinations)
    rows = [
        Words(ACTORS[a], COLOURS[c], SCENES[s], MOTIONS[m])
        for a, c, s, m in zip(*(column[kept].tolist() for column in combinations), strict=True)
    ]
    rng = random.Random(seed)
    chosen: list[Words] = []
    while len(chosen) < n:
        chosen += rng.sample(rows, min(len(rows), n - len(chosen)))
    return [(caption(words, rng, complete=True), words) for words in chosen]


def vocabulary_corpus(n: int, seed: int) -> Iterator[str]:
    """`n` random captions of random words, to train a tokenizer on."""
    rng = random.Random(seed)
    for _ in range(n):
        words = Words(rng.choice(ACTORS), rng.choice(COLOURS), rng.choice(SCENES), rng.choice(MOTIONS))
        yield prompt_for(words) if rng.random() < 0.05 else caption(words, rng)


def _with_article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _place(words: Words, rng: random.Random) -> str:
    return rng.choice(PLACES[words.scene])


def _doing(actor: str | None, motion: str, rng: random.Random, complete: bool) -> Doing:
    if motion in ("left", "right") and not complete and rng.random() < 0.25:
        return rng.choice(list(undirected(actor)))
    return rng.choice(list(directed(actor, motion)))


def _subject(actor: str | None, colour: str | None, rng: random.Random) -> str:
    """ "a cute red cat", "the ball, blue", "something green"."""
    noun = rng.choice(NOUNS[actor] if actor else UNNAMED)
    if noun == "something":
        return f"something {colour}" if colour else noun
    adjective = rng.choice(ADJECTIVES) if rng.random() < 0.25 else None
    colour_after = colour is not None and rng.random() < 0.06
    before = [adjective, None if colour_after else colour]
    phrase = " ".join([word for word in before if word] + [noun])
    article = rng.choices(("a", "the ", "one ", ""), (0.75, 0.1, 0.03, 0.12))[0]
    phrase = _with_article(phrase) if article == "a" else article + phrase
    if colour_after:
        phrase += rng.choice((f" that is {colour}", f" in {colour}", f", {colour},"))
    return phrase


def _sentence(subject: str, doing: Doing | None, place: str | None, rng: random.Random) -> str:
    """Subject, motion and place in one of the orders that English allows."""
    opening = f"{rng.choice(OPENINGS)} " if rng.random() < 0.15 else ""
    draw = rng.random()
    if doing is None:
        if place is None:
            return opening + subject
        return f"{place}, {subject}" if draw < 0.2 else f"{opening}{subject} {place}"
    if place is None:
        place = ""
    elif draw < 0.1:
        return f"{place}, {opening}{subject} {doing.gerund}"
    elif draw < 0.15:
        return f"{place}, {subject} {doing.finite}"
    elif draw < 0.25:
        return f"{opening}{subject} {place}, {doing.gerund}"
    if draw < 0.65:
        return f"{opening}{subject} {doing.gerund} {place}"
    if draw < 0.75:
        return f"{opening}{subject} that {doing.finite} {place}"
    if draw < 0.83:
        return f"{subject} is {doing.gerund} {place}"
    return f"{subject} {doing.finite} {place}"


def _listed(
    words: Words, actor: str | None, colour: str | None, doing: Doing | None, placed: bool, rng: random.Random
) -> str:
    """Keywords with commas: "cat, jumping, beach"."""
    noun = rng.choice(NOUNS[actor]) if actor else "thing"
    parts = [f"{colour} {noun}"] if colour and rng.random() < 0.7 else [noun, *([colour] if colour else [])]
    if doing is not None:
        parts.append(doing.gerund)
    if placed:
        parts.append(rng.choice(PLACE_NOUNS[words.scene]))
    if rng.random() < 0.6:
        rng.shuffle(parts)
    return ", ".join(parts)


def _styled(text: str, rng: random.Random) -> str:
    """Spaces tidied; upper or lower case and a full stop as people happen to write."""
    text = " ".join(text.split()).strip(" ,").replace(" ,", ",").replace(",,", ",")
    draw = rng.random()
    if draw < 0.6:
        text = text[0].upper() + text[1:]
    elif draw < 0.62:
        text = text.upper()
    draw = rng.random()
    return text + ("." if draw < 0.3 else "!" if draw < 0.32 else "")
