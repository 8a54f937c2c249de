"""What an attention is told of where it is called; and a sparse kernel that lives on that, also on ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from running import config_for, latent_and_video, relative_error, task_for
from tiny_model import write_tiny_model
from torch import Tensor

from chitu_diffusion.attention import KERNELS, AttentionContext, AttentionKernel, attention_kernel, sdpa
from chitu_diffusion.backend import DiffusionBackend
from chitu_diffusion.distributed.plan import ParallelPlan
from chitu_diffusion.distributed.process_groups import ProcessGroups
from chitu_diffusion.distributed.ring import ring
from chitu_diffusion.errors import UsageError
from chitu_diffusion.generator import Generator
from chitu_diffusion.task import CascadeStage

SIZE = {"height": 48, "width": 48, "num_frames": 9, "num_inference_steps": 4}
GRID = (3, 3, 3)  # 27 tokens: two ranks share them unevenly
BLOCKS = 2


# -- a sparse kernel, as whoever adds one writes it


def within_frames(q: Tensor, k: Tensor, v: Tensor, where: AttentionContext) -> Tensor:
    """From step 1 on tokens attend to their own frame alone."""
    if where.step is None or where.step < 1:
        return sdpa(q, k, v, where)
    frames = where.grid[0]
    batch = len(q)
    # [B, S, H, D] -> [B * frames, tokens of a frame, H, D]
    parts = [x.unflatten(1, (frames, -1)).flatten(0, 1) for x in (q, k, v)]
    return sdpa(*parts).unflatten(0, (batch, frames)).flatten(1, 2)


FRAMES = AttentionKernel("frames", exact=False, run=within_frames, whole_sequence=True)


def masked(q: Tensor, k: Tensor, v: Tensor, where: AttentionContext) -> Tensor:
    """The same by a mask over all scores, in float64."""
    frames, rows, columns = where.grid
    frame = torch.arange(frames).repeat_interleave(rows * columns)
    seen = (frame[:, None] == frame) | torch.tensor(where.step is None or where.step < 1)
    scores = torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double()) / q.shape[-1] ** 0.5
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v.double()).to(q.dtype)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("sparse") / "tiny")


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> Callable[[AttentionKernel], str]:
    """Puts a kernel into the table, which is the one line that adding it takes."""

    def register(kernel: AttentionKernel) -> str:
        monkeypatch.setitem(KERNELS, kernel.name, kernel)
        return kernel.name

    return register


def latent_with(kernel: str, folder: Path, out: Path, groups: ProcessGroups | None = None) -> Tensor:
    config = config_for(folder, out)
    config.infer.attn_type = kernel
    return latent_and_video(Generator(DiffusionBackend(config, groups=groups)), task_for(**SIZE))[0]


def test_a_sparse_kernel_is_its_masked_reference(registered, model: Path, tmp_path: Path) -> None:
    found = latent_with(registered(FRAMES), model, tmp_path)
    expected = latent_with(registered(AttentionKernel("masked", exact=False, run=masked)), model, tmp_path)
    # float32 against float64 in the attention alone, over 4 steps
    assert relative_error(found, expected) < 1e-5
    # the mask does something: a kernel that took no notice of it would be seen
    assert relative_error(latent_with("sdpa", model, tmp_path), expected) > 1e-3


def on_ulysses(rank: int, world: int, store: dist.Store, folder: str, out: str) -> None:
    KERNELS["frames"] = FRAMES
    groups = ProcessGroups(ParallelPlan(ulysses=world), rank, store=store, timeout=30)
    groups.open()
    torch.save(latent_with("frames", Path(folder), Path(out), groups), Path(out, f"{rank}.pt"))
    groups.close()


def test_a_sparse_kernel_on_two_ranks_is_its_masked_reference(
    registered, model: Path, tmp_path: Path
) -> None:
    expected = latent_with(registered(AttentionKernel("masked", exact=False, run=masked)), model, tmp_path)
    run_ranks(2, on_ulysses, str(model), str(tmp_path), errors=tmp_path)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    assert torch.equal(*ranks)
    assert relative_error(ranks[0], expected) < 1e-5


def test_a_ring_refuses_a_kernel_that_needs_the_whole_sequence(registered, model: Path, tmp_path) -> None:
    """Also one that gives the log-sum-exp: a ring's part of the keys has no grid."""

    def with_lse(q: Tensor, k: Tensor, v: Tensor, where: AttentionContext) -> tuple[Tensor, Tensor]:
        raise AssertionError("a ring runs it")

    kernel = AttentionKernel(
        "frames", exact=False, run=within_frames, run_with_lse=with_lse, whole_sequence=True
    )
    registered(kernel)
    with pytest.raises(UsageError, match="'frames': ring attention cannot use it, for it looks at the whole"):
        attention_kernel("frames", for_ring=True)
    config = config_for(model, tmp_path)
    config.infer.attn_type = "frames"
    with pytest.raises(UsageError, match="use auto, .*fused.*, or Ulysses alone") as refused:
        DiffusionBackend(config, groups=ProcessGroups(ParallelPlan(ring=2)))
    assert "frames" not in str(refused.value).partition("; use")[2]
    group: Any = SimpleNamespace(size=2)
    with pytest.raises(UsageError, match="the whole sequence"):
        ring(kernel, group, [14, 13])


# -- what every call is told


@pytest.fixture
def watched(registered) -> Iterator[list[AttentionContext]]:
    """What a kernel called "look" was told, call by call."""
    seen: list[AttentionContext] = []

    def look(q: Tensor, k: Tensor, v: Tensor, where: AttentionContext) -> Tensor:
        seen.append(where)
        return sdpa(q, k, v, where)

    registered(AttentionKernel("look", exact=True, run=look))
    return seen


def looking(model: Path, tmp_path: Path, **diffusion: Any) -> Generator:
    config = config_for(model, tmp_path)
    config.infer.attn_type = "look"
    for name, value in diffusion.items():
        setattr(config.infer.diffusion, name, value)
    return Generator(DiffusionBackend(config))


@pytest.mark.parametrize("level", [0, 4])
@pytest.mark.parametrize("cfg", ["batched", "sequential"])
def test_each_block_of_each_step_is_told_where_it_is(watched, model, tmp_path, level: int, cfg: str) -> None:
    generator = looking(model, tmp_path, low_mem_level=level, cfg_batch=cfg)
    latent_and_video(generator, task_for(**SIZE))
    # branches one after the other share the first block's attention, so that the second asks for the rest
    blocks = [*range(BLOCKS), *(range(1, BLOCKS) if cfg == "sequential" else ())]
    steps = SIZE["num_inference_steps"]
    assert watched == [
        AttentionContext(GRID, block, BLOCKS, step, steps) for step in range(steps) for block in blocks
    ]


def test_a_cascade_counts_steps_over_its_stages(watched, model: Path, tmp_path: Path) -> None:
    stages = (CascadeStage(32, 32, 2), CascadeStage(48, 48, 3, strength=0.5))
    latent_and_video(looking(model, tmp_path), task_for(cascade=stages, num_frames=9))
    first = [where for where in watched if where.block == 0]
    assert [(where.step, where.num_steps) for where in first] == [(step, 5) for step in range(5)]
    assert [where.grid for where in first] == [(3, 2, 2)] * 2 + [GRID] * 3


def test_a_cache_leaves_the_tasks_steps_as_they_are(watched, model: Path, tmp_path: Path) -> None:
    flexcache = {"strategy": "interval", "interval": 2}
    latent_and_video(
        looking(model, tmp_path), task_for(**{**SIZE, "num_inference_steps": 6}, flexcache=flexcache)
    )
    steps = sorted({where.step for where in watched})
    assert 0 in steps and 5 in steps and len(steps) < 6
    assert {where.num_steps for where in watched} == {6}


def test_loops_by_hand_count_and_forwards_by_hand_do_not(watched, model: Path, tmp_path: Path) -> None:
    generator = looking(model, tmp_path)
    latent = torch.randn(1, 4, 3, 6, 6)
    text = torch.randn(2, 7, 32)
    generator.denoise_loop(latent, text, num_steps=3)
    assert [(where.step, where.num_steps) for where in watched if where.block == 0] == [
        (step, 3) for step in range(3)
    ]
    watched.clear()
    generator.forward_with_cp(latent, text, torch.tensor(500.0))
    assert watched == [AttentionContext(GRID, block, BLOCKS) for block in range(BLOCKS)]
    watched.clear()
    generator.forward_with_cache(latent, text, torch.tensor(500.0), step_idx=2)
    assert {where.step for where in watched} == {2}
