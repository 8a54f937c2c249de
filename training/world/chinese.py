"""The common Chinese for each word of the world, and sentences made of it.

As in `phrases`, what is said is true of the clip. Chinese has no spaces: the tokenizer is given these words
as pieces (`words`).
"""

from __future__ import annotations

import random

from chitu_diffusion.evaluation.prompts import Words

NOUNS: dict[str, tuple[str, ...]] = {
    "cat": ("猫", "猫", "小猫", "猫咪"),
    "dog": ("狗", "狗", "小狗", "狗狗"),
    "rabbit": ("兔子", "兔子", "小兔子", "兔"),
    "bird": ("鸟", "鸟", "小鸟", "鸟儿"),
    "fish": ("鱼", "鱼", "小鱼", "鱼儿"),
    "car": ("汽车", "车", "小汽车", "轿车"),
    "boat": ("船", "船", "小船", "帆船"),
    "ball": ("球", "球", "皮球"),
    "robot": ("机器人",),
    "flower": ("花", "花", "花朵", "小花"),
}
MEASURES: dict[str, tuple[str, ...]] = {
    "cat": ("一只",),
    "dog": ("一只", "一条"),
    "rabbit": ("一只",),
    "bird": ("一只",),
    "fish": ("一条",),
    "car": ("一辆",),
    "boat": ("一艘", "一条"),
    "ball": ("一个",),
    "robot": ("一个",),
    "flower": ("一朵",),
}
COLOURS: dict[str, tuple[str, ...]] = {
    "red": ("红色的", "红色的", "红色", "红"),
    "orange": ("橙色的", "橘色的", "橙色", "橘黄色的"),
    "yellow": ("黄色的", "黄色的", "黄色", "黄"),
    "green": ("绿色的", "绿色的", "绿色", "绿"),
    "blue": ("蓝色的", "蓝色的", "蓝色", "蓝"),
    "purple": ("紫色的", "紫色的", "紫色", "紫"),
    "pink": ("粉色的", "粉红色的", "粉色", "粉红色"),
    "white": ("白色的", "白色的", "白色", "白"),
}
PLACES: dict[str, tuple[str, ...]] = {
    "grass": ("草地上", "草地上", "草坪上", "草原上", "草丛里", "绿色的草地上"),
    "beach": ("海滩上", "沙滩上", "沙滩上", "海边", "海边的沙滩上"),
    "night sky": ("夜空中", "夜空中", "夜空下", "星空下", "夜里", "夜晚", "晚上", "月光下", "星空中"),
    "city": ("城市里", "城市中", "城市街道上", "街上", "街道上", "马路上", "城里"),
    "snow": ("雪地里", "雪地上", "雪地上", "雪中", "雪里", "冬天的雪地里", "白雪中"),
    "sea": ("海上", "海里", "大海上", "大海里", "海面上", "海洋中", "水上", "水里", "海浪上"),
}
PLACE_NOUNS: dict[str, tuple[str, ...]] = {
    "grass": ("草地", "草坪", "草原"),
    "beach": ("海滩", "沙滩"),
    "night sky": ("夜空", "星空", "夜晚"),
    "city": ("城市", "街道", "马路"),
    "snow": ("雪地", "雪", "冬天"),
    "sea": ("大海", "海洋", "海", "海面"),
}
_WALK = ("走", "走路", "跑", "奔跑")
GAITS: dict[str, tuple[str, ...]] = {
    "cat": _WALK,
    "dog": _WALK,
    "rabbit": _WALK,
    "bird": ("飞", "飞行", "飞翔"),
    "fish": ("游", "游动", "游泳"),
    "car": ("开", "行驶", "开动"),
    "boat": ("航行", "行驶"),
    "ball": ("滚", "滚动"),
    "robot": ("走", "走路"),
    "flower": ("移动",),
}
_WAYS = {
    "left": ("向左", "往左", "朝左", "向左边", "往左边", "从右向左", "从右往左"),
    "right": ("向右", "往右", "朝右", "向右边", "往右边", "从左向右", "从左往右"),
    "up": ("向上", "往上", "朝上"),
    "down": ("向下", "往下", "朝下"),
}
_WHATEVER_THE_ACTOR: dict[str, tuple[str, ...]] = {
    "up": ("上升", "升起", "往上飞", "升高", "向上飘", "升起来"),
    "down": ("下降", "落下", "掉下来", "往下掉", "下沉", "向下落"),
    "jumping": ("跳", "跳跃", "蹦跳", "跳来跳去", "跳起来", "弹跳", "上下跳"),
    "circling": ("绕圈", "转圈", "绕着圈走", "兜圈", "转圈圈", "绕圈圈"),
    "growing": ("变大", "长大", "越来越大", "变得更大", "逐渐变大"),
    "spinning": ("旋转", "打转", "自转", "翻转", "原地旋转"),
    "staying": ("静止不动", "不动", "一动不动", "站着不动", "停在原地", "待在原地", "停着"),
}
_OPENINGS = ("一段视频", "动画", "卡通", "一个动画", "视频", "画面中")
_ADJECTIVES = ("可爱的", "快乐的", "小小的", "漂亮的", "开心的")
_AROUND = (
    "正在",
    "在",
    "有",
    "和",
    "的",
    "一",
    "它",
    "里",
    "上",
    "中",
    "着",
    "地",
    "慢慢",
    "慢慢地",
    "让它",
    "移动",
)
TAILS = (
    "电影感", "高清", "超高清", "杰作", "最佳质量", "细节丰富", "光影", "写实", "唯美", "特写",
    "镜头缓缓推进", "大师作品", "柔和的光线", "景深", "色彩鲜艳",
)  # fmt: skip


def words() -> list[str]:
    """Every Chinese word that says something of a clip, longest first; each is a piece of the tokenizer."""
    tables = (NOUNS, MEASURES, COLOURS, PLACES, PLACE_NOUNS, GAITS, _WAYS, _WHATEVER_THE_ACTOR)
    found = {word for table in tables for ways in table.values() for word in ways}
    found |= {*_OPENINGS, *_ADJECTIVES, *_AROUND}
    found |= {word.removesuffix("的") for word in found if len(word) > 1}
    return sorted(found, key=lambda word: (-len(word), word))


def meanings() -> dict[str, str]:
    """The English word that says the same, for Chinese words that one of ours says."""
    ways = {**_WHATEVER_THE_ACTOR, **_WAYS}
    english = {"circling": "circling", "jumping": "jumping", "growing": "growing", "spinning": "spinning"}
    english |= {"staying": "still", "night sky": "night"}
    tables = (PLACES, PLACE_NOUNS, COLOURS, NOUNS, ways)
    return {
        word: english.get(name, name) for table in tables for name, said in table.items() for word in said
    }


def doing(actor: str | None, motion: str, rng: random.Random) -> str:
    """One way to say a motion."""
    ways = list(2 * _WHATEVER_THE_ACTOR.get(motion, ()))
    if motion in _WAYS:
        gaits = ("移动",) if actor is None else (*GAITS[actor], "移动")
        ways += [rng.choice(_WAYS[motion]) + rng.choice(gaits) for _ in range(4)]
    return rng.choice(ways)


def subject(actor: str | None, colour: str | None, rng: random.Random) -> str:
    """ "一只红色的猫", or "红猫"."""
    noun = rng.choice(NOUNS[actor]) if actor else "东西"
    measure = rng.choice(MEASURES[actor]) if actor else "一个"
    tint = rng.choice(COLOURS[colour]) if colour else ""
    nice = rng.choice(_ADJECTIVES) if rng.random() < 0.12 else ""
    return ("" if rng.random() < 0.2 else measure) + nice + tint + noun


def caption(words: Words, rng: random.Random, *, complete: bool = False) -> str:
    """A true Chinese sentence about a clip; `complete` names all four words."""
    actor = words.actor if complete or rng.random() > 0.04 else None
    colour = words.colour if complete or rng.random() > 0.15 else None
    placed = complete or rng.random() > 0.1
    moving = complete or rng.random() > 0.1
    action = doing(actor, words.motion, rng) if moving else ""
    if rng.random() < 0.1:
        noun = rng.choice(NOUNS[actor]) if actor else "东西"
        parts = [(rng.choice(COLOURS[colour]) if colour else "") + noun, action]
        parts += [rng.choice(PLACE_NOUNS[words.scene])] if placed else []
        rng.shuffle(parts)
        return "，".join(part for part in parts if part)
    who = subject(actor, colour, rng)
    where = "在" + rng.choice(PLACES[words.scene]) if placed else ""
    draw = rng.random()
    if draw < 0.2 and placed:
        text = f"{where}，{who}{rng.choice(('', '正在', '在'))}{action}"
    elif draw < 0.3 and placed:
        text = f"{rng.choice(PLACES[words.scene])}有{who}{rng.choice(('，', '在', '正在'))}{action}"
    elif draw < 0.4:
        text = f"{who}{rng.choice(('正在', '在'))}{where.removeprefix('在')}{action}"
    else:
        text = f"{who}{where}{action}"
    if rng.random() < 0.1:
        text = f"{rng.choice(_OPENINGS)}：{text}"
    return text + ("。" if rng.random() < 0.4 else "")


def pair(first: Words, second: Words, rng: random.Random) -> str:
    """A sentence about two actors in one picture."""
    place = "在" + rng.choice(PLACES[first.scene]) if rng.random() > 0.1 else ""
    one, two = (subject(words.actor, words.colour, rng) for words in (first, second))
    if rng.random() < 0.4:
        return f"{place}，{one}和{two}。".removeprefix("，")
    acts = (doing(words.actor, words.motion, rng) for words in (first, second))
    return f"{place}，{one}在{next(acts)}，{two}在{next(acts)}".removeprefix("，")
