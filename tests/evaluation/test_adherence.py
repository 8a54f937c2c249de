"""Scores: whose file is judged, how shares are summed, and what is written. `training/tests` asks whether the
judge is right.
"""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from chitu_diffusion.config import EngineConfig
from chitu_diffusion.errors import ModelMissingError
from chitu_diffusion.evaluation import adherence as scoring
from chitu_diffusion.evaluation.adherence import Answer, Scores, adherence, wilson, write_scores
from chitu_diffusion.evaluation.judge import CLASSES, judge_accuracy, load_judge, name_parts
from chitu_diffusion.evaluation.prompts import (
    LONG,
    MANNERS,
    NEGATIVE,
    TAIL,
    Words,
    asked_in,
    held_out_pictures,
    held_out_prompts,
)


def test_missing_judge_says_how_to_make_one(tmp_path):
    with pytest.raises(ModelMissingError, match="python -m training --stages judge"):
        load_judge(tmp_path / "none.safetensors")


def test_prompts_are_always_the_same_and_name_known_words():
    for count in (16, 64):
        prompts = held_out_prompts(count)
        assert len({words for _, words in prompts}) == len({prompt for prompt, _ in prompts}) == count
        assert held_out_prompts(count - 5) == prompts[:-5]
        for part, names in CLASSES.items():
            assert {getattr(words, part) for _, words in prompts} <= set(names)


def test_videos_that_are_there_are_judged_and_not_made_again(tmp_path, monkeypatch):
    monkeypatch.setattr(scoring, "make", None)
    colours = {"000-seed0": (220, 30, 30), "000-seed1": (30, 30, 220), "001-seed0": (30, 160, 30)}
    colours["001-seed1"] = (240, 240, 240)
    for name, colour in colours.items():
        np.save(tmp_path / f"{name}.npy", np.full((9, 64, 64, 3), colour, dtype=np.uint8))
    answers = adherence(EngineConfig(infer={"threads": 1}), tmp_path, prompts=2, seeds=2).answers
    asked = held_out_prompts(2)
    judge = load_judge()
    assert [answer.seed for answer in answers] == [0, 1, 0, 1]
    for number, answer in enumerate(answers):
        assert (answer.prompt, answer.asked) == asked[number // 2]
        plain = torch.tensor(list(colours.values())[number]).view(1, 1, 3, 1, 1).expand(1, 9, 3, 64, 64) / 255
        assert answer.found == name_parts(judge, plain)[0]
    assert len({answer.found for answer in answers}) > 1


def test_a_first_frame_is_compared_with_its_picture(tmp_path, monkeypatch):
    """Each value 4 of 255 beside the picture's."""
    monkeypatch.setattr(scoring, "make", None)
    (tmp_path / "picture").mkdir()
    for number, picture in enumerate(held_out_pictures(2)):
        assert picture.shape == (128, 128, 3)
        frame = np.where(picture > 127, picture - 4, picture + 4)
        np.save(tmp_path / "picture" / f"{number:03d}-seed0.npy", np.repeat(frame[None], 9, axis=0))
    scores = adherence(EngineConfig(infer={"threads": 1}), tmp_path, prompts=2, seeds=1, manner="picture")
    near = [answer.first_frame for answer in scores.answers]
    assert near == pytest.approx([20 * np.log10(255 / 4)] * 2, abs=1e-4)
    assert "first frame: 36.1 dB, worst 36.1" in scores.table()


def test_each_manner_asks_the_same_words_its_own_way():
    asked = {manner: asked_in(manner, 64) for manner in MANNERS}
    for rows in asked.values():
        assert [words for *_, words in rows] == [words for *_, words in asked["plain"]]
    assert all(len(prompt.split()) == LONG for prompt, *_ in asked["long"])
    assert {negative for _, negative, _ in asked["negative"]} == {NEGATIVE}
    assert all(prompt.endswith(TAIL) for prompt, *_ in asked["tail"])
    assert not any(prompt.isascii() for prompt, *_ in asked["chinese"])
    assert asked_in("picture", 5) == asked["plain"][:5]


def test_shares_and_files(tmp_path):
    words = Words("cat", "red", "sea", "left")
    found = [words, replace(words, motion="right"), replace(words, motion="up", colour="blue"), words]
    scores = Scores(
        [Answer("a red cat", seed, words, seen) for seed, seen in enumerate(found)], *judge_accuracy()
    )
    assert [scores.share(part) for part in CLASSES] == [1.0, 0.75, 1.0, 0.5]
    write_scores(scores, tmp_path)
    kept = json.loads((tmp_path / "adherence.json").read_text())
    assert kept["videos"] == 4 and kept["scores"]["motion"] == 0.5 and kept["judge_clips"] == 1024
    text = (tmp_path / "adherence.md").read_text()
    assert f"| motion | 50.0% | 15.0% to 85.0% | {kept['judge']['motion']:.1%} |" in text


def test_interval():
    """Wilson's interval against its closed form."""
    assert wilson(0.5, 100) == (pytest.approx(0.4038, abs=1e-3), pytest.approx(0.5962, abs=1e-3))
    assert wilson(1.0, 128) == (pytest.approx(128 / (128 + 1.96**2)), pytest.approx(1.0))
    assert wilson(0.0, 0) == (0.0, 1.0)
