"""Ranks that a caller starts: it hands over rank, world and a store, and the environment says nothing. What
`generate` and waiting mean there.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import CONTEXT, run_ranks, wait_for
from running import CAT, config_for

from chitu_diffusion.config import RankPlace
from chitu_diffusion.engine import Engine
from chitu_diffusion.errors import RankLostError, StageError, TaskError, UsageError
from chitu_diffusion.task import TaskStatus

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def live(rank: int, port: int, folder: str, out: str) -> None:
    """A rank's whole life."""
    torch.set_num_threads(1)
    assert not any(name in os.environ for name in NAMES)
    store = dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
    engine = Engine(config_for(Path(folder), Path(out)), place=RankPlace(rank, 2, store=store))
    if engine.is_driver:
        engine.submit(CAT, seed=3, save_path=f"{out}/two.npy")
        engine.run_until_idle()
        engine.close()
    else:
        engine.run_worker()
    assert engine.is_closed()


def test_a_store_of_the_callers_own(tiny_folder: Path, tmp_path: Path, monkeypatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ranks = [
        CONTEXT.Process(target=live, args=(rank, store.port, str(tiny_folder), str(tmp_path)))
        for rank in range(2)
    ]
    for process in ranks:
        process.start()
    wait_for(ranks, 120)
    assert [process.exitcode for process in ranks] == [0, 0]
    config = config_for(tiny_folder, tmp_path)
    # a branch a rank: one after the other on one rank, for a batch of two may round otherwise
    config.infer.diffusion.cfg_batch = "sequential"
    with Engine(config) as engine:
        engine.submit(CAT, seed=3, save_path=str(tmp_path / "one.npy"))
        engine.run_until_idle()
    assert (tmp_path / "one.npy").read_bytes() == (tmp_path / "two.npy").read_bytes()


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ((2, 2), "rank = 2 of 2"),
        ((-1, 2), "rank = -1"),
        ((0, 2, 1, 1), "local_rank = 1 of 1"),
        ((1, 2, None, 1), "local_rank = 1 of 1"),
        ((0, 2, 0, 3), "local_world = 3: use 1 to 2"),
        ((0, 0), "world = 0: use 1 or more"),
        (("0", 2), "rank = '0': use a whole number"),
        ((0, None), "world = None: use a whole number"),
        ((0.0, 2), "rank = 0.0"),
        ((True, 2), "rank = True"),
    ],
)
def test_a_place_that_cannot_be(place: tuple[int, ...], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        RankPlace(*place)


@pytest.mark.parametrize(("store", "said"), [(None, "rank 0 of 2 has no store"), (5, "store is a int; use")])
def test_a_place_without_a_store(tiny_folder: Path, tmp_path: Path, monkeypatch, store, said: str) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UsageError, match=said):
        Engine(config_for(tiny_folder, tmp_path), place=RankPlace(0, 2, store=store))


def test_a_world_of_one_is_no_group(tiny_folder: Path, tmp_path: Path) -> None:
    with Engine(config_for(tiny_folder, tmp_path), place=RankPlace(0, 1)) as engine:
        assert engine.generate(CAT, num_inference_steps=1).frames.shape[0] == 5


# -- Python on ranks


def same_script(rank: int, world: int, store: dist.Store, folder: str, out: str) -> None:
    """Both ranks run it; rank 0 alone has frames, hooks and the last word."""
    engine = Engine(config_for(Path(folder), Path(out)), place=RankPlace(rank, world, store=store))
    driver = engine.is_driver
    first, second = engine.generate([CAT, "a red fish"], num_inference_steps=2, num_frames=1)
    assert first.task.status is TaskStatus.FINISHED and second.task.status is TaskStatus.FINISHED
    assert len(first.frames) == len(second.frames) == driver
    seen = {"seeds": [first.seed, second.seed]}

    steps = []
    task = engine.submit(CAT, callback_on_step_end=lambda *given: steps.append(given[1]))
    seen["events"] = [[event.stage, event.step] for event in task.events()]
    assert steps == ([0, 1, 2, 3] if driver else [])

    def changes(own, step, timestep, given):
        return {"latents": given["latents"] + 1}

    def changes_in_place(own, step, timestep, given):
        given["latents"] += 1
        return given

    # the rank that failed has its own error, the others its words
    for hook in (changes, changes_in_place):
        with pytest.raises(StageError if driver else TaskError, match="one of 2 ranks"):
            engine.generate(CAT, callback_on_step_end=hook)
    looked = engine.generate(CAT, seed=1, callback_on_step_end=lambda *given: given[3])
    assert np.array_equal(looked.frames, engine.generate(CAT, seed=1).frames)

    cancelled = engine.generate(CAT, callback_on_step_end=lambda *given: given[3]["task"].cancel() and None)
    assert cancelled.task.status is TaskStatus.CANCELLED and len(cancelled.frames) == 0
    stopped = engine.submit(CAT, num_inference_steps=900)
    for event in stopped.events():
        if event.step == 2:
            stopped.cancel()
    assert stopped.status is TaskStatus.CANCELLED and stopped.current_step == 2
    unended = engine.submit(CAT, num_inference_steps=900)
    if driver:
        assert not unended.wait(0.3)
        engine.close()
    assert unended.wait(60) and unended.status is TaskStatus.CANCELLED
    engine.close()
    Path(out, f"{rank}.json").write_text(json.dumps(seen))


def test_the_same_script_on_both_ranks(tiny_folder: Path, tmp_path: Path) -> None:
    run_ranks(2, same_script, str(tiny_folder), str(tmp_path), errors=tmp_path, seconds=60)
    mine, other = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert mine == other
    assert not list(tmp_path.glob("*.npy"))


def at_odds(rank: int, world: int, store: dist.Store, folder: str, out: str) -> None:
    """Two ranks that were told different things: both say so."""

    def meet(case: str, mine: int, count: int = 2, **settings: object) -> None:
        config = config_for(Path(folder), Path(out))
        config.ranks.timeout = 3 if case == "twice" else 30
        for name, value in settings.items():
            branch = config.infer.diffusion if name in ("cfg_size", "cp_size") else config.infer
            setattr(branch, name, value)
        Engine(config, place=RankPlace(mine, count, store=dist.PrefixStore(case, store)))

    for case, told in (
        ("dtype", {"dtype": "bfloat16"}),
        ("attn_schedule", {"attn_schedule": "sdpa@1"}),
        ("diffusion", {"cp_size": 2}),
    ):
        with pytest.raises((RankLostError, UsageError), match=f"{case} = .* on rank 1, .* on rank 0"):
            meet(case, rank, **(told if rank else {}))
    with pytest.raises((RankLostError, UsageError), match="world = 3 on rank 1, 2 on rank 0"):
        meet("world", rank, 2 + rank)
    with pytest.raises(
        (UsageError, RankLostError, RuntimeError), match="has come to this store|has waited 3 s"
    ):
        meet("twice", 0)


def test_ranks_that_are_at_odds_say_so(tiny_folder: Path, tmp_path: Path) -> None:
    run_ranks(2, at_odds, str(tiny_folder), str(tmp_path), errors=tmp_path, seconds=90)


def frames_on_the_driver(rank: int, world: int, store: dist.Store, folder: str, out: str) -> None:
    engine = Engine(config_for(Path(folder), Path(out)), place=RankPlace(rank, world, store=store))
    if engine.is_driver:
        np.save(Path(out, "frames.npy"), engine.generate(CAT, seed=1).frames)
        engine.close()
    else:
        engine.run_worker()


def test_rank_0_generates_while_the_other_serves(tiny_folder: Path, tmp_path: Path) -> None:
    run_ranks(2, frames_on_the_driver, str(tiny_folder), str(tmp_path), errors=tmp_path, seconds=60)
    with Engine(config_for(tiny_folder, tmp_path)) as engine:
        alone = engine.generate(CAT, seed=1).frames
    # one level of 255 where a sum of another order rounds to the other side
    assert np.abs(np.load(tmp_path / "frames.npy").astype(int) - alone).max() <= 1
