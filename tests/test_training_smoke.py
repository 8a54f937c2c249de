"""Training runs, and what it writes is what scoring reads. `make test-training` runs its own tests."""

import json
import sys
from pathlib import Path

import pytest
import torch

from chitu_diffusion.evaluation.judge import CLASSES, load_judge
from training import __main__ as training
from training import judging


def test_a_judge_is_trained_on_drawn_clips(tmp_path):
    judging.train(tmp_path, minutes=0.01, device=torch.device("cpu"), batch=4, clips=16, test_clips=4)
    card = json.loads((tmp_path / "judge.json").read_text())
    assert card["steps"] > 0 and card["test_clips"] == 4 and set(card["accuracy"]) == set(CLASSES)
    logits = load_judge(tmp_path / "judge.safetensors")(torch.rand(2, 5, 3, 64, 64))
    assert {part: values.shape for part, values in logits.items()} == {
        part: (2, len(names)) for part, names in CLASSES.items()
    }


@pytest.mark.parametrize("flag", ["--run", "--out"])
def test_a_folder_that_cannot_be_made_is_refused_before_the_training(
    flag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = {"--run": "run", "--out": "out", flag: f"{__file__}/x"}
    words = [word for pair in folders.items() for word in pair]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["training", "--stages", "export", *words])
    with pytest.raises(SystemExit, match=f"{flag} .*/x: Not a directory; use another folder"):
        training.main()
