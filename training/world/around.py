"""What people write around the words that say something: style tails, negative prompts, long sentences, words
that the world does not have.

Nothing here tells of a clip, and nothing here names an actor, a colour, a scene or a direction.
"""

from __future__ import annotations

import random

TAILS = (
    "cinematic", "4k", "8k", "highly detailed", "masterpiece", "best quality", "35mm", "film grain", "hd",
    "uhd", "ultra hd", "photorealistic", "realistic", "cinematic lighting", "soft lighting",
    "dramatic lighting", "sharp focus", "depth of field", "shallow depth of field", "bokeh",
    "award winning", "trending on artstation", "unreal engine", "octane render", "3d render",
    "studio quality", "professional", "high resolution", "high quality", "vivid", "slow motion",
    "wide shot", "close up", "tracking shot", "aerial view", "hyperrealistic", "anime style",
    "pixar style", "watercolor", "oil painting", "volumetric light", "golden hour", "ultra detailed",
    "intricate details", "epic", "beautiful", "stunning", "smooth animation", "60fps", "hdr", "imax",
    "vibrant", "minimalist", "in the style of a movie",
)  # fmt: skip
NEGATIVES = (
    "blurry", "low quality", "watermark", "deformed", "ugly", "bad anatomy", "worst quality",
    "low resolution", "lowres", "jpeg artifacts", "text", "signature", "logo", "extra limbs",
    "disfigured", "overexposed", "underexposed", "static", "noise", "grainy", "out of focus", "distorted",
    "bad", "bad quality", "poorly drawn", "mutated", "mutation", "cropped", "duplicate", "error",
    "flicker", "flickering", "jitter", "artifacts", "oversaturated", "subtitles", "subtitle", "gross",
    "morphing", "messy", "chaotic background", "three legs", "extra fingers", "fused fingers",
    "bad hands", "missing limbs", "malformed", "unnatural", "frame", "border", "caption", "username",
    "blurred details", "incomplete", "low contrast", "dull", "washed out", "cartoon", "amateur",
    "bright tones", "overall gray", "paintings", "nsfw",
)  # fmt: skip
NEGATIVES_CHINESE = (
    "色调艳丽", "过曝", "静态", "细节模糊不清", "字幕", "风格", "作品", "画作", "画面", "静止",
    "整体发灰", "最差质量", "低质量", "JPEG压缩残留", "丑陋的", "残缺的", "多余的手指", "画得不好的手部",
    "画得不好的脸部", "畸形的", "毁容的", "形态畸形的肢体", "手指融合", "静止不动的画面", "杂乱的背景",
    "三条腿", "背景人很多", "倒着走", "模糊", "水印",
)  # fmt: skip
_THINGS = (
    "castle", "dragon", "mountain", "river", "lake", "house", "window", "table", "chair", "hat", "scarf",
    "guitar", "piano", "book", "lamp", "bridge", "train", "plane", "helicopter", "bicycle", "horse",
    "elephant", "lion", "tiger", "monkey", "bear", "cow", "pig", "sheep", "chicken", "dinosaur",
    "unicorn", "wizard", "princess", "king", "soldier", "man", "woman", "boy", "girl", "child",
    "astronaut", "spaceship", "rocket", "planet", "volcano", "desert", "cave", "temple", "church",
    "garden", "fence", "gate", "clock", "phone", "computer", "camera", "umbrella", "bag", "shoe", "crown",
    "sword", "shield", "cake", "pizza", "apple", "banana", "bread", "coffee", "cup", "bottle", "candle",
    "balloon", "kite", "mushroom", "butterfly", "bee", "spider", "snake", "frog", "turtle", "whale",
    "shark", "octopus", "penguin", "owl", "eagle", "fox", "wolf", "deer", "mouse", "squirrel", "statue",
    "painting", "mirror", "box", "glasses", "sunglasses", "necklace", "backpack", "skateboard",
    "surfboard", "bench", "lantern", "rainbow", "lightning", "fog", "smoke", "fire",
)  # fmt: skip
_QUALITIES = (
    "ancient", "shiny", "golden", "silver", "wooden", "metallic", "transparent", "giant", "tiny",
    "magical", "mysterious", "old", "young", "brave", "lonely", "gentle", "fluffy", "furry", "striped",
    "spotted", "elegant", "futuristic", "rusty", "glowing", "sleepy", "angry", "curious", "proud",
    "playful", "majestic", "graceful", "adorable", "peaceful", "serene", "colorful", "charming",
    "whimsical", "detailed", "soft", "delicate", "wonderful", "tall", "round", "quick", "calm",
)  # fmt: skip
_ADJUNCTS = (
    "wearing a {}", "with a {}", "near a {}", "next to a {}", "beside the {}", "holding a {}", "and a {}",
    "like a {}", "behind a {}", "without any {}", "and some {}s", "for the {}", "made of {}",
    "close to the old {}", "dreaming of a {}",
)  # fmt: skip
_CLAUSES = (
    "with soft warm light falling gently over everything",
    "while a light breeze moves through the air",
    "as the camera slowly follows the action",
    "the camera holds steady and keeps the subject in the middle of the frame",
    "every detail is rendered with great care",
    "the mood is calm, joyful and a little dreamy",
    "the background is simple and clean",
    "the colors are rich and well balanced",
    "it looks like a scene from an animated feature for children",
    "there is a feeling of quiet wonder in the whole scene",
    "with smooth and natural motion from the first frame to the last",
    "the lighting is gentle and evenly spread",
    "with clear outlines and simple forms",
    "nothing else happens and nobody else is to be seen",
    "the atmosphere feels fresh and peaceful",
    "filmed in one long take without any cuts",
    "in a style that is playful, modern and minimal",
    "with a pleasant rhythm that makes you smile",
    "the composition is balanced and easy to read",
    "it seems to enjoy every single moment of it",
    "showing its full body and its lively expression",
    "captured by a professional crew with an expensive lens",
    "the whole picture is sharp and full of life",
    "reminding you of a happy childhood memory",
    "with subtle details that reward a second look",
    "as if the world had nothing to worry about",
)
_COMMON_TEXT = """
after again against age all almost already also although always amount angle answer any anything appear
area arm arrive art ask baby balance base because become bed before begin behind believe best better
beyond body bone born break breath bring broad brother build business busy but buy call can care carry
case catch cause center century certain chance change character choose clean clear close cloth collect
common compare complete consider contain corner could count country course cover create cry danger
daughter day dead deal dear decide deep design did differ difficult direct distance do doctor dollar done
door doubt draw dream dress drink dry during ear early easy eat edge effect effort either else end energy
engine enough enter equal even evening event ever every everyone everything exact example except expect
experience explain eye face fact fair family famous far father favor fear feel few fill final find fine
finger finish first fit five floor follow food foot force foreign forget form four free fresh friend full
fun further future game general get gift give glad glass good got govern great guess guide habit half hand
happen hard has have head hear heart heavy help her here him his history hold home hope hot hour how human
hundred hurry idea if imagine important include inside instead interest into iron it its join journey joy
judge just keep key kind kitchen knew know language last late laugh law lay lead learn least leave length
less let letter level lie life light like line list listen live long look lost lot love made main make
many map mark market master match material matter may meal mean measure meet memory method middle might
mile mind minute miss modern moment money month more morning most mother mouth much music must my name
nation nature near necessary neck need never new next noise none north nor nose note nothing notice now
number observe occur offer office often oil once only open opposite or order original our outside own page
paper parent part particular party patient pattern pay people perhaps period person phrase piece plain
plan please plenty poem point poor position possible power practice prepare present press probable problem
process produce promise proper protect prove provide public pull push put quality question quiet quite
radio raise range rather reach read ready real reason receive recognise record region remain remember
repeat reply represent require result return rich room root rule safe said salt same save say scale school
science second secret section see seem seen select self sell send sense sentence separate serve set settle
several shade shadow share she should shoulder shout side sight sign signal silent similar since single
sister size skill skin slip smell smile so soap social soil soldier solution solve some song soon sort
sound south speak special speech spell spend spirit stage start state steam story strange stream string
strong student study subject success such sudden suffix suggest suit supply support suppose sure surface
surprise system table take talk task taste teach team tell temper ten term test than their them then
theory there these they thick thin think third this those though thought thousand through throw thus tie
time tire told tomorrow tone too took tool total touch trade tradition triangle trouble true trust try
twenty type understand unit until upon use usual value various very village visit voice vowel wall want
war wash watch way wear weather week weight welcome well were what when where whether which while who
whole whose why wide wife wild will win wind wire wish with within without woman wonder word work world
would write wrong year yes yet you your
"""
_COMMON = tuple(_COMMON_TEXT.split())
"""Usual words, none of which the world knows."""
_BETWEEN_TEXT = """
the the the a a of of and and is are in with for to that it its there no not as at from be or by was who
"""
BETWEEN = tuple(_BETWEEN_TEXT.split())
_SYLLABLES = (
    "ba", "ko", "ri", "tun", "mel", "vox", "za", "shi", "plo", "quer", "dan", "fi", "ost", "ne", "gru",
    "lam", "yo",
)  # fmt: skip
_LETTERS = (
    "eeeeeeeeeeeetttttttttaaaaaaaaooooooooiiiiiiinnnnnnnsssssshhhhhhrrrrrrddddlllluuucccmmmwwwffggyyppbbvk"
)
"""By how usual they are in English."""
_ENDINGS = ("s", "ed", "ing", "ly", "er", "ness", "ful", "less", "where", "thing", "'s")
_CJK = (
    "山河湖桥房子桌椅帽灯书龙马虎熊象猴牛羊鸡猪人男女孩国王公主电脑手机相机雨云风火石"
    "木金银老年轻快慢美丽神秘古代未来"
)


def gibberish(rng: random.Random) -> str:
    """A word that nobody knows: of syllables or of letters, or usual words and endings in one."""
    draw = rng.random()
    if draw < 0.2:
        return "".join(rng.choice(_SYLLABLES) for _ in range(rng.randint(2, 4)))
    if draw < 0.6:
        return "".join(rng.choice(_LETTERS) for _ in range(rng.randint(2, 10)))
    return rng.choice(_COMMON) + rng.choice((rng.choice(_COMMON), *_ENDINGS))


def unknown(rng: random.Random) -> str:
    """A noun that the world does not have."""
    draw = rng.random()
    if draw < 0.45:
        return gibberish(rng)
    if draw < 0.55:
        return f"{rng.choice(_QUALITIES)} {rng.choice(_THINGS)}"
    return rng.choice(_THINGS)


def clause(rng: random.Random) -> str:
    """Some words that say nothing: written by somebody, or drawn."""
    if rng.random() < 0.2:
        return rng.choice(_CLAUSES)
    words = []
    for _ in range(rng.randint(5, 17)):
        draw = rng.random()
        if draw < 0.42:
            words.append(rng.choice(BETWEEN))
        else:
            words.append(rng.choice(_COMMON) if draw < 0.75 else unknown(rng))
    return " ".join(words)


def with_unknown(text: str, rng: random.Random) -> str:
    """A sentence with words beside it, or in it, that say nothing of the clip."""
    text = text.rstrip(".!")
    draw = rng.random()
    words = text.split(" ")
    if draw < 0.35 and len(words) > 2:
        words.insert(rng.randint(1, len(words) - 1), rng.choice((*_QUALITIES, gibberish(rng))))
        return " ".join(words)
    adjunct = rng.choice(_ADJUNCTS).format(unknown(rng))
    if draw < 0.85:
        return f"{text} {adjunct}"
    return f"{adjunct}, {text}"


def with_tail(text: str, rng: random.Random) -> str:
    """A sentence with a style tail, seldom in front of it."""
    tail = ", ".join(rng.sample(TAILS, rng.choices(range(1, 9), (3, 4, 4, 3, 2, 1, 1, 1))[0]))
    return f"{tail}, {text}" if rng.random() < 0.1 else f"{text.rstrip('.!')}, {tail}"


def lengthened(text: str, rng: random.Random, words: int) -> str:
    """A sentence with clauses behind it, seldom in front, until it has about so many words."""
    parts = [text.rstrip(".!")]
    while sum(len(part.split()) for part in parts) < words - 4:
        if rng.random() < 0.15:
            parts.insert(0, clause(rng))
        else:
            parts.append(clause(rng))
    if rng.random() < 0.3:
        parts = [part[0].upper() + part[1:] for part in parts]
        return ". ".join(parts) + "."
    return ", ".join(parts) + rng.choice(("", "."))


def negative(rng: random.Random) -> str:
    """What people write as a negative prompt, or a prompt of which nothing is known."""
    draw = rng.random()
    if draw < 0.5:
        return ", ".join(rng.sample(NEGATIVES, rng.randint(1, 14)))
    if draw < 0.65:
        return "，".join(rng.sample(NEGATIVES_CHINESE, rng.randint(1, len(NEGATIVES_CHINESE))))
    if draw < 0.8:
        return ", ".join(rng.sample(TAILS, rng.randint(1, 10)))
    if draw < 0.9:
        return " ".join(unknown(rng) for _ in range(rng.randint(1, 8)))
    if draw < 0.95:
        return ", ".join(clause(rng) for _ in range(rng.randint(1, 3)))
    return "".join(rng.choice(_CJK) for _ in range(rng.randint(2, 16)))


def pieces() -> list[str]:
    """The most usual of these words, each of which may be one token."""
    texts = (*TAILS, *NEGATIVES, *_CLAUSES, *_ADJUNCTS, *_QUALITIES, *_THINGS, *_COMMON)
    found = {word.strip(",{}") for text in texts for word in text.split()}
    return sorted(word for word in found if len(word) > 1)
