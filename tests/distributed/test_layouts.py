"""The same video on every layout of ranks; each rank sends what the formulas say and nothing more."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import WAN_TINY
from ranks import run_ranks
from running import config_for, latent_and_video, model_of, psnr, relative_error, task_for

from benchmarks.comm_volume import Counting
from benchmarks.comm_volume import traffic as by_formula
from chitu_diffusion.attention import sdpa
from chitu_diffusion.attention.kernels import NOWHERE
from chitu_diffusion.backend import DiffusionBackend
from chitu_diffusion.distributed.plan import ParallelPlan, parse_layout, plan_for
from chitu_diffusion.distributed.process_groups import ProcessGroups
from chitu_diffusion.distributed.ulysses import pieces_for, shard_heads, ulysses
from chitu_diffusion.generator import Generator
from chitu_diffusion.models.components import load_networks
from chitu_diffusion.pipelines import denoising
from chitu_diffusion.task import TaskStatus

HEADS = 4
SHARED = 1  # self-attentions that two branches on one rank have in common: the first
LAYOUTS = {2: ("cfg2", "u2", "r2"), 4: ("u4", "r4", "u2r2", "cfg2u2", "cfg2r2")}
CASES = {
    "plain": {},  # 27 tokens: no layout shares them evenly
    "cache": {"flexcache": {"strategy": "interval", "interval": 2}},
    "unguided": {"guidance_scale": 1.0},
}
SIZE = {"height": 48, "width": 48, "num_frames": 9, "num_inference_steps": 4}
OTHERS = {
    "wan-tiny": (2, 4),
    "experts": (2,),
    "frames": (2, 4),
}  # other models, and the worlds in which they run
OTHER_SIZE = {"height": 48, "width": 48, "num_frames": 5, "num_inference_steps": 3}  # 18 tokens


PICTURES = np.random.default_rng(1).integers(0, 256, (2, 40, 60, 3), dtype=np.uint8)
MORE = {"frames": {"image": PICTURES[0], "last_image": PICTURES[1]}}


def plan_of(layout: str) -> ParallelPlan:
    asked = parse_layout(layout)
    return plan_for(asked["cfg"] * asked["cp"], HEADS, **asked)


def run_case(generator: Generator, case: str, **params) -> dict[str, torch.Tensor]:
    """Latent, and on rank 0 the video."""
    task = task_for(**(params or {**SIZE, **CASES[case]}))
    latent, video = latent_and_video(generator, task)
    assert task.status is TaskStatus.SAVING
    if case == "experts":
        assert "expert 1" in task.notes, "both experts shall have run"
    return {f"{case} latent": latent, **({} if video is None else {f"{case} video": video})}


def folder_of(other: str, folder: Path) -> Path:
    return WAN_TINY if other == "wan-tiny" else folder.with_name(other)


def all_layouts(rank: int, world: int, store: dist.Store, folder: str, out: str) -> None:
    """Every layout of a world on one set of processes; results go to files."""
    configs = {
        name: config_for(folder_of(name, Path(folder)), Path(out))
        for name, worlds in OTHERS.items()
        if world in worlds
    }
    device = torch.device("cpu")
    others = {
        name: load_networks(config, model_of(config), device, torch.float32, encodes=rank == 0)
        for name, config in configs.items()
    }
    for layout in LAYOUTS[world]:
        groups = ProcessGroups(plan_of(layout), rank, store=dist.PrefixStore(layout, store), timeout=30)
        groups.open()
        backend = DiffusionBackend(config_for(Path(folder), Path(out)), groups=groups)
        generator = Generator(backend)
        results: dict[str, torch.Tensor] = {}
        for case in CASES:
            results |= run_case(generator, case)
        results |= one_by_one(folder, out, groups)
        for name, networks in others.items():
            other = DiffusionBackend.from_networks(networks, configs[name], groups)
            results |= run_case(Generator(other), name, **OTHER_SIZE, **MORE.get(name, {}))
        results |= by_hand(generator)
        results |= in_pieces(groups)
        results |= {"sent": torch.tensor(traffic(backend, layout))}
        results |= {
            "encoder": torch.tensor([not weight.is_meta for weight in backend.text_encoder.parameters()]),
            "image encoder": torch.tensor(
                [not weight.is_meta for weight in others["frames"].image_encoder.parameters()]
            ),
        }
        torch.save(results, Path(out, f"{layout}-{rank}.pt"))
        groups.close()


def one_by_one(folder: str, out: str, groups: ProcessGroups | None = None) -> dict[str, torch.Tensor]:
    """A forward for each branch, at level 4 over blocks that are streamed."""
    results = {}
    for name, level in (("one by one", 0), ("one by one, streamed", 4)):
        config = config_for(Path(folder), Path(out))
        config.infer.diffusion.cfg_batch = "sequential"
        config.infer.diffusion.low_mem_level = level
        generator = Generator(DiffusionBackend(config, groups=groups))
        for cached in ("plain", "cache"):
            latent, _ = latent_and_video(generator, task_for(**SIZE, **CASES[cached]))
            results[f"{name}, {cached}"] = latent
    return results


def by_hand(generator: Generator) -> dict[str, torch.Tensor]:
    """The page's forwards, batch 1."""
    latent = torch.randn(1, 4, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    text = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(2))
    time = torch.tensor(500.0)
    return {
        "cp": generator.forward_with_cp(latent, text, time),
        "cfg": generator.forward_with_cfg_parallel(latent, text, time, guidance_scale=3.0),
        # the other branch is the model's own, and the noise follows from the seed on each rank
        "cfg own": generator.forward_with_cfg_parallel(latent, generator.encode_text("a cat"), 500, 3.0),
        "half patches": generator.denoise_loop(resolution=(40, 56), num_frames=5, num_steps=2),
    }


def in_pieces(groups: ProcessGroups) -> dict[str, torch.Tensor]:
    """An attention with three heads a rank over shards of unequal length, in 1, 2 and 4 (that is, 3) pieces a
    sequence.
    """
    group = groups.ulysses
    generator = torch.Generator().manual_seed(7)
    lengths = [3 + rank for rank in range(group.size)]
    whole = torch.randn(3, 2, sum(lengths), 3 * group.size, 8, generator=generator)  # q, k, v of all
    own = slice(sum(lengths[: group.index]), sum(lengths[: group.index + 1]))
    found = [
        ulysses(sdpa, group, lengths, pieces)(*whole[:, :, own].unbind(), NOWHERE) for pieces in (1, 2, 4)
    ]
    return {"pieces": torch.stack([*found, sdpa(*whole.unbind())[:, own]])}


def traffic(backend: DiffusionBackend, layout: str) -> list[int]:
    """Bytes that this rank sends in one guided forward over 32 tokens: ulysses, ring, gather, guidance."""
    groups = backend.groups
    counters = []
    for name in ("ulysses", "ring", "sequence", "branches"):
        counters.append(Counting(vars(groups)[name]))
        setattr(groups, name, counters[-1])
    latent = torch.zeros(1, 4, 2, 8, 8)
    text = torch.zeros(2, 7, 32)
    Generator(backend).forward_with_cp(latent, text, torch.tensor(500.0))
    for name, counter in zip(("ulysses", "ring", "sequence", "branches"), counters, strict=True):
        setattr(groups, name, counter.group)
    return [counter.sent for counter in counters]


def expected_traffic(
    plan: ParallelPlan, tokens: int = 32, dim: int = 16 * HEADS, blocks: int = 2
) -> list[int]:
    """The same by formula, float32: 4 s d (U-1)/U for Ulysses, 2 s d (R-1) for the ring, both a block and a
    branch; but branches on one rank share the first block's."""
    batch = 2 if plan.cfg == 1 else 1
    own = tokens // plan.sequence
    attentions = blocks * batch - SHARED * (batch - 1)
    ulysses = attentions * 4 * own * dim * (plan.ulysses - 1) // plan.ulysses
    ring = attentions * 2 * own * dim * (plan.ring - 1)
    gather = batch * own * 16 * (plan.sequence - 1)  # 2 x 2 patches of 4 channels
    guidance = 4 * 2 * 8 * 8 if plan.cfg == 2 else 0
    return [4 * numbers for numbers in (ulysses, ring, gather, guidance)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tiny_model import write_tiny_model

    folder = tmp_path_factory.mktemp("parallel")
    write_tiny_model(folder / "experts", experts=2, shift=12.0, heads=HEADS)
    write_tiny_model(folder / "frames", image=True, clip=2, heads=HEADS)
    return write_tiny_model(folder / "tiny", heads=HEADS)


@pytest.fixture(scope="module")
def one_process(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    generator = Generator(DiffusionBackend(config_for(model, tmp_path_factory.mktemp("one"))))
    results: dict[str, torch.Tensor] = by_hand(generator)
    for case in CASES:
        results |= run_case(generator, case)
    results |= one_by_one(str(model), str(tmp_path_factory.mktemp("one")))
    for name in OTHERS:
        other = DiffusionBackend(config_for(folder_of(name, model), tmp_path_factory.mktemp("one")))
        results |= run_case(Generator(other), name, **OTHER_SIZE, **MORE.get(name, {}))
    return results


@pytest.fixture(scope="module", params=LAYOUTS)
def ranks_results(
    request, model: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[dict[str, torch.Tensor]]]:
    """layout -> each rank's results."""
    world = request.param
    out = tmp_path_factory.mktemp(f"world{request.param}")
    run_ranks(world, all_layouts, str(model), str(out), errors=out)
    return {
        layout: [torch.load(out / f"{layout}-{rank}.pt", weights_only=True) for rank in range(world)]
        for layout in LAYOUTS[world]
    }


def test_every_layout_makes_the_same_video(ranks_results, one_process) -> None:
    for layout, ranks in ranks_results.items():
        for case in (*CASES, *(name for name, worlds in OTHERS.items() if len(ranks) in worlds)):
            latents = [rank[f"{case} latent"] for rank in ranks]
            error = relative_error(latents[0], one_process[f"{case} latent"])
            assert error < 1e-4, f"{layout}, {case}: relative error {error}"
            assert all(torch.equal(latents[0], other) for other in latents[1:]), (
                f"{layout}, {case}: the ranks differ"
            )
            decibels = psnr(ranks[0][f"{case} video"], one_process[f"{case} video"])
            assert decibels >= 60, f"{layout}, {case}: {decibels} dB"
            assert not any(f"{case} video" in rank for rank in ranks[1:]), "only rank 0 has the video"


def test_branches_one_by_one_give_the_same_latent(ranks_results, one_process) -> None:
    for layout, ranks in ranks_results.items():
        names = [name for name in one_process if "one by one" in name]
        assert len(names) == 4
        for name in names:
            assert relative_error(ranks[0][name], one_process[name]) < 1e-4, f"{layout}, {name}"
            assert all(torch.equal(ranks[0][name], rank[name]) for rank in ranks[1:]), (
                f"{layout}, {name}: the ranks differ"
            )


def test_ulysses_in_pieces_is_the_same_attention(ranks_results) -> None:
    for layout, ranks in ranks_results.items():
        for results in ranks:
            *found, alone = results["pieces"]
            for each in found:
                assert relative_error(each, alone) < 1e-6, layout


@pytest.mark.parametrize("mode", ["auto", "batched", "sequential"])
@pytest.mark.parametrize("layout", ["one", "cfg2", "u2", "r2", "cfg2u2"])
def test_ranks_that_share_a_long_sequence_run_both_branches_at_once(layout: str, mode: str) -> None:
    """By the forwards that are asked for, for no sequence in these tests is so long that one rank would take
    turns.
    """
    shared = SimpleNamespace(size=1 if layout == "one" else plan_of(layout).sequence)
    diffusion = SimpleNamespace(cfg_batch=mode)
    backend: Any = SimpleNamespace(
        args=SimpleNamespace(infer=SimpleNamespace(diffusion=diffusion)),
        groups=SimpleNamespace(sequence=shared),
        spec=SimpleNamespace(transformers=[SimpleNamespace(patch_size=(1, 2, 2))]),
    )
    for tokens, pays in ((4096, True), (4160, layout not in ("one", "cfg2"))):
        latent = torch.empty(1, 16, 1, tokens // 32, 128, device="meta")
        together = mode == "batched" or (mode == "auto" and pays)
        assert denoising._as_batches(backend, latent, (0, 1)) == ([(0, 1)] if together else [(0,), (1,)])


def test_large_exchanges_go_in_two_pieces() -> None:
    assert [pieces_for(6, 75e6), pieces_for(6, 1e6), pieces_for(1, 75e6)] == [2, 1, 1]
    assert shard_heads(3, 2) == [2, 1] and shard_heads(1, 2) == [1]


def test_the_page_forwards_agree_on_every_rank(ranks_results, one_process) -> None:
    for layout, ranks in ranks_results.items():
        for rank, results in enumerate(ranks):
            for name, most in (("cp", 1e-5), ("cfg", 1e-5), ("cfg own", 1e-5), ("half patches", 1e-4)):
                assert relative_error(results[name], one_process[name]) < most, (
                    f"{layout}, rank {rank}, {name}"
                )


def test_ranks_send_what_the_formula_says(ranks_results) -> None:
    for layout, ranks in ranks_results.items():
        for rank, results in enumerate(ranks):
            assert results["sent"].tolist() == expected_traffic(plan_of(layout)), f"{layout}, rank {rank}"


def test_the_package_knows_the_formula() -> None:
    for layout in (word for words in LAYOUTS.values() for word in words):
        plan = plan_of(layout)
        found = by_formula(plan, tokens=32, dim=16 * HEADS, blocks=2, values=16, latent=512, shared=SHARED)
        assert [
            4 * part for part in (found.ulysses, found.ring, found.gather, found.guidance)
        ] == expected_traffic(plan)


@pytest.mark.parametrize("encoder", ["encoder", "image encoder"])
def test_only_rank_0_has_the_encoders(ranks_results, encoder) -> None:
    for ranks in ranks_results.values():
        assert ranks[0][encoder].all()
        assert not any(rank[encoder].any() for rank in ranks[1:])
