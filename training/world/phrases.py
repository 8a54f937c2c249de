"""The English for each word of the world: nouns, places, and ways to say what something does.

Every phrase is true for its word and for no other word of the same kind. A motion is said with the verb that
suits the actor: fish swim, cars drive. A verb of going without a direction means left or right, and nothing
else. This file knows phrases; how they are put together is in `captions`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

NOUNS: dict[str, tuple[str, ...]] = {
    "cat": ("cat", "cat", "cat", "kitten", "kitty"),
    "dog": ("dog", "dog", "dog", "puppy", "doggy"),
    "rabbit": ("rabbit", "rabbit", "bunny"),
    "bird": ("bird", "bird", "bird", "birdie"),
    "fish": ("fish",),
    "car": ("car", "car", "car", "automobile"),
    "boat": ("boat", "boat", "sailboat", "sailing boat", "ship"),
    "ball": ("ball", "ball", "beachball"),
    "robot": ("robot", "robot", "android"),
    "flower": ("flower", "flower", "blossom"),
}

UNNAMED = ("thing", "something", "object", "figure", "shape")

ADJECTIVES = (
    "cute",
    "little",
    "happy",
    "lovely",
    "nice",
    "funny",
    "small",
    "pretty",
    "cheerful",
    "friendly",
    "simple",
)

OPENINGS = (
    "a video of",
    "video of",
    "cartoon of",
    "a cartoon of",
    "an animation of",
    "a clip of",
    "a short film of",
    "footage of",
    "a drawing of",
    "a picture of",
    "show me",
)

PLACES: dict[str, tuple[str, ...]] = {
    "grass": (
        "on grass",
        "on grass",
        "on the grass",
        "on the grass",
        "in the grass",
        "in a meadow",
        "on a meadow",
        "on the lawn",
        "on a grassy hill",
        "in a grassy field",
        "on green grass",
    ),
    "beach": (
        "on the beach",
        "on the beach",
        "on the beach",
        "at the beach",
        "on a beach",
        "on a sandy beach",
        "on the sand",
        "on a tropical beach",
        "on a sunny beach",
        "under a palm tree",
    ),
    "night sky": (
        "in the night sky",
        "in the night sky",
        "at night",
        "at night",
        "under the stars",
        "in the starry night",
        "under a starry sky",
        "in the moonlight",
        "among the stars",
        "in a dark sky",
    ),
    "city": (
        "in the city",
        "in the city",
        "in the city",
        "in a city",
        "on a city street",
        "in the street",
        "on the road",
        "in town",
        "between tall buildings",
        "in front of buildings",
    ),
    "snow": (
        "in the snow",
        "in the snow",
        "on snow",
        "in snow",
        "on a snowy field",
        "in winter",
        "in a snowy forest",
        "on the snow",
        "in a winter landscape",
        "on white snow",
    ),
    "sea": (
        "at sea",
        "on the sea",
        "in the sea",
        "in the ocean",
        "on the ocean",
        "on the water",
        "in the water",
        "on the waves",
        "over the waves",
        "out at sea",
    ),
}

PLACE_NOUNS: dict[str, tuple[str, ...]] = {
    "grass": ("grass", "meadow", "lawn", "green grass"),
    "beach": ("beach", "sandy beach", "sand"),
    "night sky": ("night sky", "night", "starry sky", "stars"),
    "city": ("city", "street", "town", "city street"),
    "snow": ("snow", "snowy field", "winter", "snowy landscape"),
    "sea": ("sea", "ocean", "waves", "water"),
}


@dataclass(frozen=True)
class Doing:
    """One way to say a motion, in two forms: "walking to the left" and "walks to the left"."""

    gerund: str
    finite: str

    def __add__(self, rest: str) -> Doing:
        return Doing(f"{self.gerund} {rest}".rstrip(), f"{self.finite} {rest}".rstrip())


_WALK = (
    Doing("walking", "walks"),
    Doing("walking", "walks"),
    Doing("running", "runs"),
    Doing("trotting", "trots"),
)
_GENERIC = (Doing("moving", "moves"), Doing("going", "goes"), Doing("travelling", "travels"))

GAITS: dict[str, tuple[Doing, ...]] = {
    "cat": _WALK,
    "dog": _WALK,
    "rabbit": _WALK[:3],
    "bird": (Doing("flying", "flies"), Doing("flying", "flies"), Doing("fluttering", "flutters")),
    "fish": (Doing("swimming", "swims"),),
    "car": (Doing("driving", "drives"), Doing("driving", "drives"), Doing("racing", "races")),
    "boat": (Doing("sailing", "sails"), Doing("sailing", "sails"), Doing("cruising", "cruises")),
    "ball": (Doing("rolling", "rolls"),),
    "robot": (Doing("walking", "walks"), Doing("marching", "marches")),
    "flower": (Doing("moving", "moves"), Doing("sliding", "slides"), Doing("gliding", "glides")),
}

_DIRECTIONS: dict[str, tuple[str, ...]] = {
    "left": ("to the left", "to the left", "left", "leftwards", "towards the left", "from right to left"),
    "right": (
        "to the right",
        "to the right",
        "right",
        "rightwards",
        "towards the right",
        "from left to right",
    ),
    "up": ("up", "upward", "upwards", "straight up", "to the top"),
    "down": ("down", "downward", "downwards", "straight down", "to the bottom"),
    "circling": ("in a circle", "in a circle", "in circles", "round and round", "round in circles"),
}

_ANYWHERE = ("", "", "", "along", "by", "past")

_WHATEVER_THE_ACTOR: dict[str, tuple[Doing, ...]] = {
    "left": (),
    "right": (),
    "up": (
        Doing("rising", "rises"),
        Doing("rising up", "rises up"),
        Doing("floating up", "floats up"),
        Doing("flying up", "flies up"),
        Doing("going up", "goes up"),
        Doing("ascending", "ascends"),
    ),
    "down": (
        Doing("falling", "falls"),
        Doing("falling down", "falls down"),
        Doing("sinking", "sinks"),
        Doing("floating down", "floats down"),
        Doing("going down", "goes down"),
        Doing("descending", "descends"),
    ),
    "jumping": (
        Doing("jumping", "jumps"),
        Doing("jumping", "jumps"),
        Doing("jumping", "jumps"),
        Doing("hopping", "hops"),
        Doing("jumping up and down", "jumps up and down"),
        Doing("leaping", "leaps"),
        Doing("bouncing", "bounces"),
    ),
    "circling": (Doing("circling", "circles"), Doing("circling around", "circles around")),
    "growing": (
        Doing("growing", "grows"),
        Doing("growing", "grows"),
        Doing("getting bigger", "gets bigger"),
        Doing("growing bigger", "grows bigger"),
        Doing("becoming larger", "becomes larger"),
        Doing("getting larger and larger", "gets larger and larger"),
    ),
    "spinning": (
        Doing("spinning", "spins"),
        Doing("spinning", "spins"),
        Doing("spinning around", "spins around"),
        Doing("rotating", "rotates"),
        Doing("turning over", "turns over"),
        Doing("twirling", "twirls"),
    ),
    "staying": (
        Doing("staying still", "stays still"),
        Doing("standing still", "stands still"),
        Doing("not moving", "does not move"),
        Doing("resting", "rests"),
        Doing("staying in place", "stays in place"),
    ),
}

_SIT = (Doing("sitting still", "sits still"), Doing("standing", "stands"), Doing("waiting", "waits"))
_STAYS: dict[str, tuple[Doing, ...]] = {
    "cat": _SIT,
    "dog": _SIT,
    "rabbit": _SIT,
    "bird": (Doing("hovering in place", "hovers in place"), Doing("sitting still", "sits still")),
    "fish": (Doing("floating still", "floats still"),),
    "car": (Doing("parked", "is parked"), Doing("waiting", "waits")),
    "boat": (Doing("anchored", "is anchored"), Doing("floating still", "floats still")),
    "ball": (Doing("lying still", "lies still"),),
    "robot": (Doing("standing", "stands"), Doing("waiting", "waits")),
    "flower": (Doing("standing", "stands"),),
}


def directed(actor: str | None, motion: str) -> Iterator[Doing]:
    """The ways to say a motion that fit this motion only; `actor` None for an actor that is not named."""
    gaits = _GENERIC if actor is None else GAITS[actor] + _GENERIC[:1]
    if motion in _DIRECTIONS:
        yield from (gait + way for gait in gaits for way in _DIRECTIONS[motion])
    # Repeated, so that the many gaits do not crowd them out.
    yield from 3 * _WHATEVER_THE_ACTOR[motion]
    if motion == "staying" and actor is not None:
        yield from 4 * _STAYS[actor]


def undirected(actor: str | None) -> Iterator[Doing]:
    """The ways to say that something goes left or right without saying which."""
    yield from (gait + way for gait in (_GENERIC if actor is None else GAITS[actor]) for way in _ANYWHERE)
