"""The snippets of the Generator API page, as they stand there; only the line that makes `args` is ours."""

import ast

import numpy as np
import pytest
import torch
from conftest import MakeConfig
from running import run_to_end

from chitu_diffusion.task import DiffusionTask, DiffusionUserParams, TaskStatus

INITIALIZE = """
from chitu_diffusion.backend import DiffusionBackend
from chitu_diffusion.generator import Generator

backend = DiffusionBackend(args)
generator = Generator(backend)
"""

ENCODE = """
embeddings = generator.encode_text("A cat walking on grass")
print(f"Embedding shape: {embeddings.shape}")
"""

DECODE = """
video = generator.decode_vae(denoised_latent)
print(f"Video shape: {video.shape}")
"""

AUTOCAST = """
# Automatic mixed precision
with torch.amp.autocast(device_type="cuda", dtype=torch.float16):
    output = generator.generate_step(task)
"""

PROGRESS = """
progress = generator.get_progress(task)
print(f"Progress: {progress * 100:.1f}%")
"""

OUT_OF_MEMORY = """
try:
    generator.generate_step(task)
except torch.cuda.OutOfMemoryError:
    # Clear cache and retry with lower memory mode
    torch.cuda.empty_cache()
    args.infer.diffusion.low_mem_level += 1
    generator = Generator(DiffusionBackend(args))
    generator.generate_step(task)
"""

COMPLETE_EXAMPLE = """
from chitu_diffusion.backend import DiffusionBackend
from chitu_diffusion.generator import Generator
from chitu_diffusion.task import DiffusionTask, DiffusionUserParams

# Initialize
backend = DiffusionBackend(args)
generator = Generator(backend)

# Create task
params = DiffusionUserParams(
    prompt="A cat walking on grass",
    num_inference_steps=50,
    guidance_scale=7.0
)
task = DiffusionTask.from_user_request(params)

# Generate
print("Starting generation...")
while not task.is_finished():
    generator.generate_step(task)
    progress = generator.get_progress(task)
    print(f"\\rProgress: {progress * 100:.1f}%", end="")

print(f"\\nDone! Saved to: {task.buffer.save_path}")
"""

PROFILING = """
import torch.profiler as profiler

with profiler.profile(
    activities=[profiler.ProfilerActivity.CPU, profiler.ProfilerActivity.CUDA],
    record_shapes=True
) as prof:
    generator.generate_step(task)

print(prof.key_averages().table(sort_by="cuda_time_total", row_limit=10))
"""

GRADIENT_CHECKPOINTING = """
# Enabled automatically for low memory mode
if low_mem_level >= 1:
    model.enable_gradient_checkpointing()
"""

FORWARD_WITH_CACHE = '''
def forward_with_cache(self, latent, embeddings, timestep, step_idx):
    """
    Forward pass with FlexCache enabled.

    Reuses features from previous steps when possible.
    """
    cache_manager = backend.flexcache_manager

    # Check if we can reuse cache
    if cache_manager.should_reuse(step_idx):
        cached_features = cache_manager.get_cache()
        output = model.forward_with_cache(latent, embeddings, cached_features)
    else:
        output = model(latent, embeddings, timestep)
        cache_manager.update_cache(output.intermediate_features)

    return output
'''


@pytest.fixture
def page(tiny_folder, make_config: MakeConfig) -> dict:
    """Names that the page takes for granted: torch, args, and what `Initialization` makes."""
    names = {"torch": torch, "args": make_config(tiny_folder)}
    exec(INITIALIZE, names)
    return names


def new_task(**values) -> DiffusionTask:
    return DiffusionTask.from_user_request(
        DiffusionUserParams(
            **{"prompt": "A cat walking on grass", "num_inference_steps": 4, "seed": 1, **values}
        )
    )


def run(snippet: str, names: dict) -> None:
    exec(compile(ast.parse(snippet), "<the API page>", "exec"), names)


def test_complete_example(tiny_folder, make_config, capsys):
    names = {"args": make_config(tiny_folder)}
    run(COMPLETE_EXAMPLE, names)
    printed = capsys.readouterr().out
    task = names["task"]
    assert task.status is TaskStatus.FINISHED, task.error_message
    assert "Progress: 100.0%" in printed and f"Saved to: {task.buffer.save_path}" in printed
    assert task.buffer.save_path.endswith(".mp4")


def test_encode_denoise_decode(page, capsys):
    run(ENCODE, page)
    noise = torch.randn(1, 4, 2, 4, 4)
    page["denoised_latent"] = page["generator"].denoise_loop(noise, page["embeddings"], num_steps=2)
    run(DECODE, page)
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
    run(OUT_OF_MEMORY, page)
    assert page["args"].infer.diffusion.low_mem_level == 1
    assert page["generator"] is not first and page["generator"].backend.low_mem_level == 1
    while not task.is_finished():
        page["generator"].generate_step(task)
    assert task.status is TaskStatus.FINISHED, task.error_message
    assert np.array_equal(np.load(task.buffer.save_path), np.load(expected.buffer.save_path))


def test_out_of_memory_snippet_without_trouble(page):
    page["task"] = task = new_task()
    run(OUT_OF_MEMORY, page)
    assert task.status is TaskStatus.DENOISING and page["args"].infer.diffusion.low_mem_level == 0


@pytest.mark.filterwarnings("ignore")
def test_profiling_snippet(page, capsys):
    page["task"] = task = new_task()
    run(PROFILING, page)
    run(PROFILING, page)
    assert task.current_step == 1 and "aten::" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:User provided device_type")
@pytest.mark.filterwarnings("ignore:.*CUDA is not available")
def test_autocast_and_progress_snippets(page, capsys):
    page["task"] = task = new_task()
    for _ in range(3):
        run(AUTOCAST, page)
    run(PROGRESS, page)
    assert "Progress: 50.0%" in capsys.readouterr().out
    assert page["output"].step == 2 and task.error is None


def test_gradient_checkpointing_snippet(page, tiny_folder, make_config):
    page["model"] = page["backend"].model_pool[0]
    page["low_mem_level"] = 1
    assert not page["model"].gradient_checkpointing
    run(GRADIENT_CHECKPOINTING, page)
    assert page["model"].gradient_checkpointing
    page["args"].infer.diffusion.low_mem_level = 1
    run(INITIALIZE, page)
    assert page["backend"].model_pool[0].gradient_checkpointing


def test_forward_with_cache_as_drawn_equals_the_generators(page):
    """The page's pseudocode beside the method."""
    from chitu_diffusion.flexcache.manager import parse_flexcache

    generator = page["generator"]
    network = page["backend"].model_pool[0]
    embeddings = generator.encode_text("A cat walking on grass")
    page["model"] = network
    run(FORWARD_WITH_CACHE, page)
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
