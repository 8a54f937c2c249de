"""The code blocks of the Generator API page (`api_page.txt`, verbatim), run in a namespace that holds what
each takes from its surroundings.

No stand-in for CUDA is needed: autocast, the profiler and the out-of-memory snippet run as written on a CPU,
where memory running out is raised by hand. Stand-ins are what the page leaves open on purpose: the exchanges
of its parallel forwards (`all_to_all`, `all_gather`) and the cutting of its tiles.
"""

import ast
import inspect
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import MakeConfig
from running import CAT, model_of, relative_error, run_to_end

from chitu_diffusion.backend import DiffusionBackend
from chitu_diffusion.flexcache.manager import parse_flexcache
from chitu_diffusion.generator import Generator
from chitu_diffusion.models.components import load_networks
from chitu_diffusion.task import DiffusionTask, DiffusionUserParams, TaskStatus

SIGNATURES = ("init", "encode_text", "denoise_loop", "decode_vae", "generate_step", "generate_multi_stage")
"""Blocks that are a head and a docstring."""

TESTS = {
    "class_definition": "test_signatures",
    **dict.fromkeys(SIGNATURES, "test_signatures"),
    "initialize": "test_initialization",
    "encode": "test_encode_denoise_decode",
    "decode": "test_encode_denoise_decode",
    "denoising_process": "test_denoising_process",
    "workflow": "test_workflow",
    "example_flow": "test_example_flow",
    "forward_with_cp": "test_forward_with_cp",
    "forward_with_cfg_parallel": "test_forward_with_cfg_parallel",
    "forward_with_cache": "test_forward_with_cache_as_drawn_equals_the_generators",
    "gradient_checkpointing": "test_gradient_checkpointing_snippet",
    "decode_vae_tiled": "test_decode_vae_tiled",
    "autocast": "test_autocast_and_progress_snippets",
    "progress": "test_autocast_and_progress_snippets",
    "get_progress": "test_get_progress",
    "out_of_memory": "test_out_of_memory_snippet_goes_on_with_a_new_generator",
    "check_nan": "test_check_nan",
    "complete_example": "test_complete_example",
    "profiling": "test_profiling_snippet",
}
"""Block of the page -> the test that runs it."""


def read_blocks() -> dict[str, str]:
    """The page's code by name."""
    _, *parts = Path(__file__).with_name("api_page.txt").read_text(encoding="utf-8").split("=== ")
    return dict(part.split("\n", 1) for part in parts)


BLOCKS = read_blocks()


@pytest.fixture
def page(tiny_folder, make_config: MakeConfig) -> dict:
    """Names that the page takes for granted: torch, args, and what `Initialization` makes."""
    names = {"torch": torch, "args": make_config(tiny_folder)}
    run("initialize", names)
    return names


def new_task(**values) -> DiffusionTask:
    return DiffusionTask.from_user_request(
        DiffusionUserParams(
            **{"prompt": "A cat walking on grass", "num_inference_steps": 4, "seed": 1, **values}
        )
    )


def run(block: str, names: dict) -> None:
    exec(compile(ast.parse(BLOCKS[block]), f"<the API page: {block}>", "exec"), names)


def test_every_block_of_the_page_has_its_test():
    assert set(TESTS) == set(BLOCKS)
    for block, name in TESTS.items():
        told = "SIGNATURES" if block in SIGNATURES else f'"{block}"'
        assert told in inspect.getsource(globals()[name]), f"{name} does not run {block}"


@pytest.mark.parametrize("block", SIGNATURES)
def test_signatures(block):
    """The page's arguments, in its order and with its defaults, are the first of ours."""
    names = {"torch": torch, "DiffusionBackend": DiffusionBackend, "DiffusionTask": DiffusionTask}
    run("class_definition", names)
    assert names["Generator"].__name__ == Generator.__name__
    run(block, names)
    drawn = "__init__" if block == "init" else block
    theirs = list(inspect.signature(names[drawn]).parameters.values())
    ours = list(inspect.signature(vars(Generator)[drawn]).parameters.values())
    assert block in SIGNATURES and [p.name for p in theirs] == [p.name for p in ours[: len(theirs)]]
    for asked, given in zip(theirs, ours, strict=False):
        assert given.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
        assert asked.default in (inspect.Parameter.empty, given.default)
    assert all(p.default is not inspect.Parameter.empty for p in ours[len(theirs) :])


def test_initialization(page):
    assert isinstance(page["generator"], Generator) and page["generator"].backend is page["backend"]
    names: dict = {"args": None}  # nothing said: the shipped model
    run("initialize", names)
    assert names["backend"].spec.name == "wan-tiny"


def test_workflow(page):
    """The drawn stages, in the drawn order."""
    drawn = [line.split("|")[1].lower() for line in BLOCKS["workflow"].splitlines() if "B -->|" in line]
    seen = [str(event.stage) for event in run_to_end(page["generator"], new_task())]
    assert list(dict.fromkeys(seen)) == [*drawn, "saving"]


# `model` and `scheduler` of a backend take the page's loop
@pytest.mark.parametrize("sampler", ["unipc", "euler"])
def test_denoising_process(tiny_folder, make_config, sampler):
    backend = DiffusionBackend(make_config(tiny_folder, infer__sampler=sampler))
    generator = Generator(backend)
    noise = torch.randn(1, 4, 2, 4, 4)
    embeddings = generator.encode_text([CAT, "blurry"])
    model = backend.model_pool[0]
    expected = generator.denoise_loop(noise, embeddings, num_steps=5, guidance_scale=6.0)
    # padded rows of a text are summed one by one here and once there: rounding, which guidance multiplies
    for text, most in ((embeddings, 1e-4), (model.make_text_kv(embeddings), 0.0)):
        scheduler = backend.scheduler(5)
        names = {
            "num_steps": 5,
            "guidance_scale": 6.0,
            "model": model,
            "scheduler": scheduler,
            "latent": noise,
            "embeddings": text,
            "timestep": scheduler.timestep,
        }
        with torch.no_grad():
            run("denoising_process", names)
        assert relative_error(names["latent"], expected) <= most


def test_example_flow(two_experts_folder, make_config):
    """As written: two sizes, the first with half a patch at its edge. One frame, to be quick."""
    args = make_config(two_experts_folder)
    networks = load_networks(args, model_of(args), torch.device("cpu"), torch.float32)
    defaults = replace(networks.spec.defaults, num_frames=1)
    networks = replace(networks, folder=None, spec=replace(networks.spec, defaults=defaults))
    backend = DiffusionBackend.from_networks(networks, args)
    generator = Generator(backend)
    used = []
    for index, expert in enumerate(backend.model_pool):
        expert.patch_embedding.register_forward_hook(lambda *_, index=index: used.append(index))
    names = {
        "denoise_loop": generator.denoise_loop,
        "upsample": generator.upsample,
        "decode_vae": generator.decode_vae,
        "model_pool": backend.model_pool,
    }
    run("example_flow", names)
    assert used == [0] * 30 + [1] * 20
    assert names["latent_stage1"].shape == (1, 4, 1, 30, 53)
    assert names["latent_stage2"].shape == (1, 4, 1, 60, 106)
    assert names["video"].shape == (1, 1, 3, 480, 848)


def test_forward_with_cp(page):
    """On one rank, which has all of the frames: cutting and exchanging leave them as they are."""
    generator = page["generator"]
    page |= {
        "model": page["backend"].model_pool[0],
        "split_sequence": lambda latent, rank, size: latent.chunk(size, dim=2)[rank],
        "all_to_all": lambda output, group: output,
        "cp_rank": 0,
        "cp_size": 1,
        "cp_group": None,
    }
    run("forward_with_cp", page)
    latent = torch.randn(1, 4, 2, 4, 4)
    embeddings = generator.encode_text([CAT, "ugly"])
    drawn = page["forward_with_cp"](generator, latent, embeddings, 700)
    # folded padding differs by rounding, some 2e-6
    assert torch.allclose(generator.forward_with_cp(latent, embeddings, 700), drawn, atol=1e-5)


def test_forward_with_cfg_parallel(page):
    """Each rank in turn; what the other one sends was computed before."""
    generator = page["generator"]
    model = page["backend"].model_pool[0]
    latent = torch.randn(1, 4, 2, 4, 4)
    embeddings = generator.encode_text(CAT)
    empty = generator.encode_text(page["backend"].spec.defaults.negative_prompt)
    both = [model(latent, text, 700) for text in (embeddings, empty)]
    ours = generator.forward_with_cfg_parallel(latent, embeddings, 700, guidance_scale=3.0)
    for rank in (0, 1):
        sent = []
        page |= {
            "model": model,
            "empty_embeddings": empty,
            "cfg_rank": rank,
            "cfg_group": None,
            "all_gather": lambda output, group, sent=sent: sent.append(output) or both,
            "guidance_scale": 3.0,
        }
        run("forward_with_cfg_parallel", page)
        drawn = page["forward_with_cfg_parallel"](generator, latent, embeddings, 700)
        assert torch.equal(sent[0], both[rank])
        assert torch.allclose(ours, drawn, atol=5e-5)


def test_decode_vae_tiled(page):
    """Tiles are the videos of a batch here: cutting a frame without blending is what the page leaves open."""
    page |= {
        "vae": page["backend"].vae,
        "split_into_tiles": lambda latent, tile_size: latent.split(1),
        "merge_tiles": torch.cat,
    }
    run("decode_vae_tiled", page)
    generator = page["generator"]
    latent = torch.randn(2, 4, 2, 4, 10)
    drawn = page["decode_vae_tiled"](generator, latent)
    assert torch.equal(drawn, generator.decode_vae(latent))
    assert torch.allclose(drawn, generator.decode_vae_tiled(latent), atol=1e-4)


def test_get_progress(page):
    page["DiffusionTask"] = DiffusionTask
    run("get_progress", page)
    generator = page["generator"]
    task = new_task()
    for _ in range(3):
        generator.generate_step(task)
        assert generator.get_progress(task) == page["get_progress"](generator, task)
    assert generator.get_progress(task) == 0.5


def test_check_nan(page):
    run("check_nan", page)
    generator = page["generator"]
    for value, refused in ((torch.zeros(3), False), (torch.tensor([0.0, torch.nan]), True)):
        for check in (page["check_nan"], Generator.check_nan):
            if refused:
                with pytest.raises(ValueError, match="NaN detected in latent"):
                    check(generator, value, "latent")
            else:
                check(generator, value, "latent")


def test_complete_example(tiny_folder, make_config, capsys):
    names = {"args": make_config(tiny_folder)}
    run("complete_example", names)
    printed = capsys.readouterr().out
    task = names["task"]
    assert task.status is TaskStatus.FINISHED, task.error_message
    assert "Progress: 100.0%" in printed and f"Saved to: {task.buffer.save_path}" in printed
    assert task.buffer.save_path.endswith(".mp4")


def test_encode_denoise_decode(page, capsys):
    run("encode", page)
    noise = torch.randn(1, 4, 2, 4, 4)
    page["denoised_latent"] = page["generator"].denoise_loop(noise, page["embeddings"], num_steps=2)
    run("decode", page)
    printed = capsys.readouterr().out
    assert "Embedding shape: torch.Size([1, 512, 32])" in printed
    assert "Video shape: torch.Size([1, 5, 3, 32, 32])" in printed


@pytest.mark.parametrize("unit", [0, 1, 3, 5])
def test_out_of_memory_snippet_goes_on_with_a_new_generator(page, unit, monkeypatch, tmp_path):
    expected = new_task(save_path=str(tmp_path / "expected.npy"))
    for _ in run_to_end(page["generator"], expected):
        pass
    page["task"] = task = new_task(save_path=str(tmp_path / "got.npy"))
    for _ in range(unit):
        page["generator"].generate_step(task)
    first = page["generator"]

    def out_of_memory(*_args, **_kwargs):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    backend = page["backend"]
    monkeypatch.setattr(backend.text_encoder, "encode", out_of_memory)
    monkeypatch.setattr(backend.text_encoder, "recall", lambda *_: None)
    monkeypatch.setattr(backend.sampler, "step", out_of_memory)
    monkeypatch.setattr(backend.vae, "decode", out_of_memory)
    run("out_of_memory", page)
    assert page["args"].infer.diffusion.low_mem_level == 1
    assert page["generator"] is not first and page["generator"].backend.low_mem_level == 1
    while not task.is_finished():
        page["generator"].generate_step(task)
    assert task.status is TaskStatus.FINISHED, task.error_message
    assert np.array_equal(np.load(task.buffer.save_path), np.load(expected.buffer.save_path))


def test_out_of_memory_snippet_without_trouble(page):
    page["task"] = task = new_task()
    run("out_of_memory", page)
    assert task.status is TaskStatus.DENOISING and page["args"].infer.diffusion.low_mem_level == 0


@pytest.mark.filterwarnings("ignore")
def test_profiling_snippet(page, capsys):
    page["task"] = task = new_task()
    run("profiling", page)
    run("profiling", page)
    assert task.current_step == 1 and "aten::" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:User provided device_type")
@pytest.mark.filterwarnings("ignore:.*CUDA is not available")
def test_autocast_and_progress_snippets(page, capsys):
    page["task"] = task = new_task()
    for _ in range(3):
        run("autocast", page)
    run("progress", page)
    assert "Progress: 50.0%" in capsys.readouterr().out
    assert page["output"].step == 2 and task.error is None


def test_gradient_checkpointing_snippet(page, tiny_folder, make_config):
    page["model"] = page["backend"].model_pool[0]
    page["low_mem_level"] = 1
    assert not page["model"].gradient_checkpointing
    run("gradient_checkpointing", page)
    assert page["model"].gradient_checkpointing
    page["args"].infer.diffusion.low_mem_level = 1
    run("initialize", page)
    assert page["backend"].model_pool[0].gradient_checkpointing


def test_forward_with_cache_as_drawn_equals_the_generators(page):
    """The page's pseudocode beside the method."""
    generator = page["generator"]
    network = page["backend"].model_pool[0]
    embeddings = generator.encode_text("A cat walking on grass")
    page["model"] = network
    run("forward_with_cache", page)
    manager = page["backend"].flexcache_manager
    latents = [torch.randn(1, 4, 2, 4, 4) for _ in range(4)]
    results: dict[str, list] = {"page": [], "ours": []}
    for who in results:
        manager.bind(parse_flexcache({"strategy": "interval", "interval": 2, "warmup": 0, "cooldown": 0}, 4))
        for step, latent in enumerate(latents):
            # the page's call leaves it out where it reuses: there it is the features' own
            time = torch.tensor([900])
            if who == "page":
                with torch.no_grad():
                    output = page["forward_with_cache"](None, latent, embeddings, time, step)
                results[who].append(output)
            else:
                results[who].append(generator.forward_with_cache(latent, embeddings, time, step))
    manager.release()
    for step, latent in enumerate(latents):
        assert torch.allclose(results["page"][step], results["ours"][step], atol=1e-5)
        fresh = network(latent, embeddings, torch.tensor([900]))
        assert torch.allclose(results["ours"][step], fresh, atol=1e-4) == (step in (0, 2))
