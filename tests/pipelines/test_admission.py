"""A request that ranks cannot share is refused when it is handed in, with the size that they can."""

from __future__ import annotations

from pathlib import Path

import pytest

from chitu_diffusion.backend import DiffusionBackend
from chitu_diffusion.config import EngineConfig
from chitu_diffusion.distributed.plan import ParallelPlan
from chitu_diffusion.errors import UsageError, WillNotFitError
from chitu_diffusion.pipelines import admission
from chitu_diffusion.pipelines.admission import Admission
from chitu_diffusion.task import DiffusionTask, DiffusionUserParams

# tokens are 16x16 pixels, begun ones count: (width, height, frames, tokens)
SIZES = [(16, 16, 1, 1), (8, 8, 1, 1), (16, 16, 5, 2), (32, 16, 1, 2), (24, 24, 1, 4), (24, 8, 1, 2)]


@pytest.mark.parametrize(("width", "height", "frames", "tokens"), SIZES)
def test_fewer_tokens_than_ranks_are_refused(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, width: int, height: int, frames: int, tokens: int
) -> None:
    backend = DiffusionBackend(EngineConfig(models={"name": str(tiny_folder)}))

    def admit(plan: ParallelPlan, width: int, height: int) -> None:
        monkeypatch.setattr(backend.groups, "plan", plan)
        params = DiffusionUserParams(prompt="cat", width=width, height=height, num_frames=frames)
        Admission(backend).admit(DiffusionTask.from_user_request(params), in_memory=True)

    admit(ParallelPlan(cfg=2, ulysses=tokens), width, height)
    with pytest.raises(UsageError, match=f"{tokens} token.* cannot be shared by {tokens + 1} ranks") as error:
        admit(ParallelPlan(ring=tokens + 1), width, height)
    fitting = str(error.value).partition("; use ")[2].partition(" ")[0]
    admit(ParallelPlan(ring=tokens + 1), *(int(side) for side in fitting.split("x")))


def test_the_longest_video_that_there_is_room_for(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = DiffusionBackend(EngineConfig(models={"name": str(tiny_folder)}))
    own = backend.spec.defaults

    def admit(frames: int) -> int:
        params = DiffusionUserParams(prompt="cat", width=own.width, height=own.height, num_frames=frames)
        Admission(backend).admit(DiffusionTask.from_user_request(params), in_memory=True)
        return backend.spec.tokens(frames, own.height, own.width)

    room = Admission(backend)._peak(21, own.height, own.width, 0) + 1
    for name in ("total_memory", "usable_memory"):
        monkeypatch.setattr(admission, name, lambda device: room)
    assert Admission(backend).most_tokens() == admit(21)
    with pytest.raises(WillNotFitError, match="use 21 frames"):
        admit(25)
    monkeypatch.setattr(admission, "total_memory", lambda device: 1)
    assert Admission(backend).most_tokens() == 0
