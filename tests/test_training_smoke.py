"""Training runs, and what it writes is what scoring reads. `make test-training` runs its own tests."""

import json

import torch

from chitu_diffusion.evaluation.judge import CLASSES, load_judge
from training import judging


def test_a_judge_is_trained_on_drawn_clips(tmp_path):
    judging.train(tmp_path, minutes=0.01, device=torch.device("cpu"), batch=4, clips=16, test_clips=4)
    card = json.loads((tmp_path / "judge.json").read_text())
    assert card["steps"] > 0 and card["test_clips"] == 4 and set(card["accuracy"]) == set(CLASSES)
    logits = load_judge(tmp_path / "judge.safetensors")(torch.rand(2, 5, 3, 64, 64))
    assert {part: values.shape for part, values in logits.items()} == {
        part: (2, len(names)) for part, names in CLASSES.items()
    }
