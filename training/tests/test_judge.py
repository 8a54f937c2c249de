"""The shipped judge and the scores it gives: right on drawn clips of any size, wrong where the clip shows
something else.
"""

import numpy as np
import pytest
import torch

from chitu_diffusion.config import EngineConfig
from chitu_diffusion.evaluation.adherence import adherence
from chitu_diffusion.evaluation.judge import CLASSES, judge_accuracy, load_judge, name_parts
from chitu_diffusion.evaluation.prompts import held_out_prompts
from training.judging import accuracy_on_drawn_clips
from training.world import draw, sample_specs, specs_for

SEED = int(np.random.SeedSequence().entropy % 2**31)


@pytest.fixture(scope="module")
def judge():
    return load_judge()


def test_judge_knows_fresh_clips(judge):
    """As its card says, of 32 fresh ones but for two."""
    card, _ = judge_accuracy()
    for part, share in accuracy_on_drawn_clips(judge, 32, seed=SEED).items():
        assert share >= card[part] - 2 / 32, (part, share, SEED)


@pytest.mark.parametrize(("height", "width", "frames"), [(96, 160, 33), (160, 96, 33), (128, 128, 17)])
def test_judge_knows_other_sizes(judge, height, width, frames):
    specs = sample_specs(8, torch.Generator().manual_seed(SEED), "all")
    found = name_parts(judge, draw(specs, height, width, frames).transpose(1, 2) / 2 + 0.5)
    wrong = sum(a != b for a, b in zip(found, specs.words(), strict=True))
    assert wrong <= 2, (SEED, found, specs.words())


def write_clips(folder, words) -> None:
    folder.mkdir()
    video = draw(specs_for(words, torch.Generator().manual_seed(SEED)), 128, 128, 33)
    for number, clip in enumerate(video):
        frames = (clip.permute(1, 2, 3, 0) / 2 + 0.5).mul(255).round().to(torch.uint8).numpy()
        np.save(folder / f"{number:03d}-seed0.npy", frames)


def test_scores_tell_right_from_wrong(tmp_path):
    """Drawn clips of the prompts score high, shifted ones low."""
    asked = [words for _, words in held_out_prompts(8)]
    write_clips(tmp_path / "right", asked)
    write_clips(tmp_path / "wrong", [*asked[3:], *asked[:3]])
    config = EngineConfig(infer={"threads": 1})
    right = adherence(config, tmp_path / "right", prompts=8, seeds=1)
    wrong = adherence(config, tmp_path / "wrong", prompts=8, seeds=1)
    for part in CLASSES:
        assert right.share(part) >= 7 / 8, (part, SEED)
    assert sum(wrong.share(part) for part in CLASSES) / 4 < 0.5
