"""A kernel that takes over late in a task: at which step, on which layout, and what is said of it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from running import config_for, latent_and_video, relative_error, run_to_end, task_for
from tiny_model import write_tiny_model
from torch import Tensor

from chitu_diffusion.attention import KERNELS, AttentionKernel, sdpa
from chitu_diffusion.attention.kernels import dense, math_with_lse
from chitu_diffusion.attention.requirements import Requirements
from chitu_diffusion.attn_schedule import AttnSchedule
from chitu_diffusion.backend import DiffusionBackend
from chitu_diffusion.config import EngineConfig
from chitu_diffusion.distributed.plan import parse_layout, plan_for
from chitu_diffusion.distributed.process_groups import ProcessGroups
from chitu_diffusion.engine import Engine
from chitu_diffusion.errors import CannotResumeError, UsageError
from chitu_diffusion.flexcache.manager import parse_flexcache
from chitu_diffusion.generator import Generator
from chitu_diffusion.media.reading import read_recipe
from chitu_diffusion.pipelines.checkpoint import load_task, save_task
from chitu_diffusion.task import CascadeStage

MakeConfig = Callable[..., EngineConfig]
STEPS = 6


def flat_with_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Another attention than it should be, and by far, so that no step of it is overlooked."""
    return math_with_lse(0.5 * q, k, v)


FLAT = AttentionKernel(
    "flat",
    exact=False,
    run=dense(lambda q, k, v: flat_with_lse(q, k, v)[0]),
    run_with_lse=dense(flat_with_lse),
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("late") / "tiny")


@pytest.fixture
def flat(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Puts it into the table, and notes which kernel ran in turn; one call a step with two blocks is two."""
    ran: list[str] = []

    def noting(kernel: AttentionKernel) -> AttentionKernel:
        def run(q: Tensor, k: Tensor, v: Tensor, where: object) -> Tensor:
            ran.append(kernel.name)
            return kernel(q, k, v)

        return replace(kernel, run=run)

    monkeypatch.setitem(KERNELS, "flat", noting(FLAT))
    monkeypatch.setitem(KERNELS, "sdpa", noting(sdpa))
    return ran


def scheduled_config(folder: Path, out: Path, schedule: str | None) -> EngineConfig:
    config = config_for(folder, out)
    config.infer.attn_schedule = schedule
    return config


def by_step(ran: list[str]) -> list[str]:
    """The kernel of each step, of a model of two blocks and batched branches; both must be alike."""
    assert ran[::2] == ran[1::2]
    return ran[::2]


# -- the words


@pytest.mark.parametrize(
    ("text", "steps", "first"),
    [
        ("sage@0", 50, 0),
        ("sage@10", 50, 10),
        ("sage@60", 50, 60),
        ("fa3_fp8@25%", 50, 13),  # 12.5 steps are over after the thirteenth
        ("fa3_fp8@25%", 4, 1),
        ("fa3_fp8@7%", 100, 7),  # 0.07 * 100 is more than 7 in floats
        ("fa3_fp8@12.5%", 8, 1),
        ("fa3_fp8@100%", 8, 8),
    ],
)
def test_a_schedule_begins_after_steps_or_a_share_of_them(text: str, steps: int, first: int) -> None:
    schedule = AttnSchedule.from_text(text)
    assert schedule is not None and schedule.begins(steps) == first
    assert schedule.begins(None) == (None if "%" in text else first)


@pytest.mark.parametrize(
    "text", ["sage", "sage@", "@5", "sage@0.25", "sage@-1", "sage@101%", "auto@5", "sage@5s"]
)
def test_other_words_are_refused_with_the_right_ones(text: str) -> None:
    with pytest.raises(UsageError, match=r"attn_schedule = .*: use KERNEL@STEPS or KERNEL@PERCENT%"):
        EngineConfig(infer={"attn_schedule": text})


def test_a_kernel_that_is_not_there_is_refused_before_weights_are_read(model, tmp_path, monkeypatch) -> None:
    from chitu_diffusion import backend

    monkeypatch.setattr(backend, "load_networks", lambda *_: pytest.fail("weights were read"))
    for text, said in (
        ("fa3_fp9@5", "attn_schedule = 'fa3_fp9': no such kernel. Did you mean 'fa3_fp8'"),
        ("sage@5", "attn_schedule = 'sage': it runs on an NVIDIA GPU, not on cpu.* Here: sdpa, fused, math"),
    ):
        with pytest.raises(UsageError, match=said) as refused:
            DiffusionBackend(scheduled_config(model, tmp_path, text))
        assert refused.value.field == "infer.attn_schedule"
    with pytest.raises(UsageError, match="attn_schedule = 'sdpa': ring attention cannot use it"):
        DiffusionBackend(
            scheduled_config(model, tmp_path, "sdpa@1"), groups=ProcessGroups(plan_for(2, 2, cp=2, ulysses=1))
        )


# -- the right kernel at each step


@pytest.mark.parametrize(
    ("schedule", "late"), [("flat@4", 2), ("flat@50%", 3), ("flat@0", 6), ("flat@9", 0), (None, 0)]
)
def test_the_late_kernel_runs_from_its_step_on(flat, model, tmp_path, schedule, late: int) -> None:
    backend = DiffusionBackend(scheduled_config(model, tmp_path, schedule))
    latent_and_video(Generator(backend), task_for(num_inference_steps=STEPS))
    assert by_step(flat) == ["sdpa"] * (STEPS - late) + ["flat"] * late
    assert backend.attn_backend.name == "sdpa"  # "auto" is still the exact one


def test_a_cascade_counts_over_all_of_its_stages(flat, model, tmp_path: Path) -> None:
    stages = (CascadeStage(32, 32, 2), CascadeStage(48, 48, 4, strength=0.5))
    generator = Generator(DiffusionBackend(scheduled_config(model, tmp_path, "flat@50%")))
    latent_and_video(generator, task_for(cascade=stages))
    assert by_step(flat) == ["sdpa"] * 3 + ["flat"] * 3


def test_steps_that_a_cache_skips_count(flat, model, tmp_path: Path) -> None:
    generator = Generator(DiffusionBackend(scheduled_config(model, tmp_path, "flat@3")))
    cache = {"strategy": "interval", "interval": 2}
    latent_and_video(generator, task_for(num_inference_steps=STEPS, flexcache=cache))
    assert "flat" in flat and len(by_step(flat)) < STEPS
    assert by_step(flat).count("sdpa") < 3, "steps were counted by forwards"


def on_ranks(rank: int, world: int, store: dist.Store, folder: str, out: str) -> None:
    KERNELS["flat"] = FLAT
    for layout in ("u2", "r2", "cfg2"):
        asked = parse_layout(layout)
        plan = plan_for(world, 2, **asked)
        groups = ProcessGroups(plan, rank, store=dist.PrefixStore(layout, store), timeout=30)
        groups.open()
        backend = DiffusionBackend(scheduled_config(Path(folder), Path(out), "flat@50%"), groups=groups)
        latent, _ = latent_and_video(Generator(backend), task_for(num_inference_steps=4))
        torch.save(latent, Path(out, f"{layout}-{rank}.pt"))
        groups.close()


def test_every_layout_changes_at_the_same_step(model: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(KERNELS, "flat", FLAT)
    found = {}
    for schedule in ("flat@1", "flat@50%", "flat@3"):
        generator = Generator(DiffusionBackend(scheduled_config(model, tmp_path, schedule)))
        found[schedule] = latent_and_video(generator, task_for(num_inference_steps=4))[0]
    run_ranks(2, on_ranks, str(model), str(tmp_path), errors=tmp_path)
    for layout in ("u2", "r2", "cfg2"):
        for rank in range(2):
            latent = torch.load(tmp_path / f"{layout}-{rank}.pt", weights_only=True)
            # as between layouts without a schedule; a step sooner or later is a hundred times as far
            assert relative_error(latent, found["flat@50%"]) < 1e-5, (layout, rank)
            for other in ("flat@1", "flat@3"):
                assert relative_error(latent, found[other]) > 1e-4, (layout, rank, other)


@pytest.mark.parametrize("cut", [2, 4])
def test_a_resumed_task_goes_on_with_the_right_kernel(flat, model, tmp_path: Path, cut: int) -> None:
    config = scheduled_config(model, tmp_path, "flat@50%")
    whole = task_for(num_inference_steps=STEPS)
    latent, _ = latent_and_video(Generator(DiffusionBackend(config)), whole)
    flat.clear()
    task = task_for(num_inference_steps=STEPS)
    backend = DiffusionBackend(config)
    generator = Generator(backend)
    while task.current_step < cut:
        generator.generate_step(task)
    save_task(task, tmp_path / "task.safetensors", backend)
    again = DiffusionBackend(config)
    resumed = load_task(tmp_path / "task.safetensors", again)
    assert torch.equal(latent_and_video(Generator(again), resumed)[0], latent)
    assert by_step(flat) == ["sdpa"] * 3 + ["flat"] * 3
    assert resumed.resumed.exact
    for other in (None, "flat@51%", "math@50%"):
        with pytest.raises(CannotResumeError, match="attention schedule"):
            load_task(
                tmp_path / "task.safetensors", DiffusionBackend(scheduled_config(model, tmp_path, other))
            )


def test_the_8_bit_kernel_runs_late_by_emulation(monkeypatch, model, tmp_path: Path) -> None:
    """By the numbers that the kernel has on a GPU, computed on a CPU."""
    monkeypatch.setitem(KERNELS, "fa3_fp8", replace(KERNELS["fa3_fp8"], requires=Requirements()))
    latents = []
    for schedule in (None, "fa3_fp8@50%", "fa3_fp8@0"):
        generator = Generator(DiffusionBackend(scheduled_config(model, tmp_path, schedule)))
        latents.append(latent_and_video(generator, task_for(num_inference_steps=8))[0])
    exact, late, always = latents
    # 8 bits err by 4 % in one attention, which random weights hand on by a tenth at most. Which of the two
    # errs less they do not decide: that is measured on trained ones (benchmarks.fidelity)
    for found in (late, always):
        assert 1e-4 < relative_error(found, exact) < 0.02
    assert not torch.equal(late, always)


# -- what is said of it


def test_the_recipe_says_it_and_that_it_is_lossy(flat, model, tmp_path: Path) -> None:
    for schedule, said in (
        ("flat@50%", {"kernel": "flat", "lossy": True, "after_share": 0.5}),
        ("math@3", {"kernel": "math", "lossy": False, "after_steps": 3.0}),
        (None, None),
    ):
        task = task_for(num_inference_steps=4)
        for _ in run_to_end(Generator(DiffusionBackend(scheduled_config(model, tmp_path, schedule))), task):
            pass
        recipe = read_recipe(task.buffer.save_path)
        assert recipe["attn_schedule"] == said and recipe["attention"] == "sdpa"


def test_a_step_that_is_never_reached_is_told(flat, model, tmp_path: Path, caplog) -> None:
    said = "flat attention after 9 of 4 steps: never reached"
    with (
        caplog.at_level(logging.WARNING, "chitu_diffusion"),
        Engine(scheduled_config(model, tmp_path, "flat@9")) as engine,
    ):
        engine.submit(task_for(num_inference_steps=4).params)
        assert said in caplog.text
        caplog.clear()
        engine.submit(task_for(num_inference_steps=10).params)
        assert "never" not in caplog.text


def test_a_dry_run_says_from_which_step_on(chitu, nothing_loads) -> None:
    asked = ("generate", "a cat", "--steps", "8", "--dry-run", "--set")
    code, out, err = chitu(*asked, "infer.attn_schedule=math@25%")
    assert code == 0 and "math attention after 2 of 8 steps" in out + err and "never" not in out + err
    code, out, err = chitu(*asked, "infer.attn_schedule=math@20")
    assert code == 0 and "math attention after 20 of 8 steps: never reached" in out + err
    code, out, err = chitu(*asked, "infer.attn_schedule=math@x")
    assert code == 2 and "use KERNEL@STEPS or KERNEL@PERCENT%" in err


def test_a_batch_makes_again_what_another_schedule_made(chitu, model, tmp_path: Path) -> None:
    (tmp_path / "rows.txt").write_text("a cat\n")
    words = (
        "batch",
        "rows.txt",
        "--model",
        model,
        "--steps",
        "2",
        "--device",
        "cpu",
        "--seed",
        "1",
        "-o",
        "out",
    )
    later = ("--set", "infer.attn_schedule=math@1")
    file = tmp_path / "out"
    assert chitu(*words)[0] == 0
    (video,) = file.glob("*.mp4")
    assert read_recipe(video)["attn_schedule"] is None
    assert chitu(*words, *later)[0] == 2  # it shows something else
    assert chitu(*words, *later, "--overwrite")[0] == 0
    assert read_recipe(video)["attn_schedule"]["kernel"] == "math"


def test_a_forward_by_hand_knows_the_steps_of_the_bound_task(flat, model, tmp_path) -> None:
    """Half of the steps are a number only where somebody knows how many there are."""
    backend = DiffusionBackend(scheduled_config(model, tmp_path, "flat@50%"))
    generator = Generator(backend)
    latent = torch.zeros(1, 4, 2, 4, 4)
    text = generator.encode_text("a cat")
    flat.clear()
    for step in range(4):
        backend.flexcache_manager.bind(parse_flexcache("interval", 4))
        generator.forward_with_cache(latent, text, 500, step)
    assert by_step(flat) == ["sdpa", "sdpa", "flat", "flat"]
    backend.flexcache_manager.release()
    flat.clear()
    generator.forward_with_cache(latent, text, 500, 3)
    assert by_step(flat) == ["sdpa"]
