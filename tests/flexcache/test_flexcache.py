"""Caches in the engine's hands: exact when they never reuse, state that belongs to the task, refusals with a
remedy.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from running import config_for, latent_and_video, relative_error, task_for

from chitu_diffusion.backend import DiffusionBackend
from chitu_diffusion.cli.options import parse_cache
from chitu_diffusion.engine import Engine
from chitu_diffusion.errors import UsageError, WillNotFitError
from chitu_diffusion.evaluation.calibrate import fit
from chitu_diffusion.evaluation.traces import trace
from chitu_diffusion.flexcache.registry import STRATEGIES, cache_bytes, parse_flexcache, parse_strategy
from chitu_diffusion.generator import Generator
from chitu_diffusion.models.wan.presets import FULL_SIZE
from chitu_diffusion.pipelines.request import cache_shapes, resolve_request
from chitu_diffusion.task import DiffusionUserParams, TaskStatus

STEPS = 10
RATIOS = [1.0, *[0.97] * (STEPS - 1)]

NEVER = {
    "blockdance": {"group": 1},
    "cfg_gate": {"start": 1.0},
    "dbcache": {"threshold": 0},
    "easycache": {"threshold": 0, "warmup": 1},
    "fbcache": {"threshold": 0},
    "interval": {"interval": 1},
    "magcache": {"threshold": 0, "ratios": RATIOS},
    "meancache": {"fresh": STEPS},
    "pab": {"self_range": 1, "cross_range": 1},
    "plan": {"fresh": STEPS},
    "taylorseer": {"interval": 1},
    "teacache": {"threshold": 0},
}
OFTEN = {
    "blockdance": {"start": 0.2, "boundary": 0.5},
    "cfg_gate": {"interval": 3},
    "dbcache": {"threshold": 9.0, "first_blocks": 1, "last_blocks": 0, "warmup": 2},
    "easycache": {"threshold": 0.6, "warmup": 2},
    "fbcache": {"threshold": 9.0, "warmup": 2},
    "interval": {"interval": 2},
    "magcache": {"ratios": RATIOS},
    "meancache": {"fresh": 6},
    "pab": {"low": 0.0, "high": 1000.0},
    "plan": {"speedup": 1.6},
    "taylorseer": {"warmup": 1},
    "teacache": {"threshold": 1.2},
}
COMBINED = [
    {"strategy": "teacache", "threshold": 1.2, "level": "velocity", "predictor": "velocity"},
    {"strategy": "teacache", "threshold": 1.2, "predictor": "taylor"},
    {"strategy": "interval", "level": "module", "predictor": "taylor", "order": 2},
    {"strategy": "taylorseer", "level": "velocity", "warmup": 1, "order": 2},
    {"strategy": "meancache", "fresh": 6, "predictor": "reuse", "level": "step"},
    {"strategy": "blockdance", "form": "residual", "start": 0.2, "boundary": 0.5},
    {"strategy": "easycache", "threshold": 0.6, "warmup": 2, "fill": "predictor", "predictor": "taylor"},
    {"strategy": "cfg_gate", "fill": "drop", "interval": 0},
    {"strategy": "pab", "ffn_range": 4, "predictor": "taylor", "low": 0.0, "high": 1000.0},
]


@pytest.fixture(scope="module")
def backend(tiny_folder, tmp_path_factory):
    backend = DiffusionBackend(config_for(tiny_folder, tmp_path_factory.mktemp("outputs")))
    run = trace(backend, {"prompt": "A cat walking on grass", "seed": 1, "num_inference_steps": STEPS})
    backend.use_calibration(fit([run], {"guidance": [5.0, 5.0]}))
    return backend


@pytest.fixture(scope="module")
def exact(backend):
    return latent_of(backend, None)


def latent_of(backend, flexcache, seed: int = 3) -> torch.Tensor:
    task = task_for(num_inference_steps=STEPS, seed=seed, flexcache=flexcache)
    return latent_and_video(Generator(backend), task)[0]


def test_every_strategy_is_tried_here() -> None:
    assert set(NEVER) == set(OFTEN) == set(STRATEGIES)


@pytest.mark.parametrize("name", NEVER)
def test_a_cache_that_never_reuses_changes_no_bit(backend, exact, name) -> None:
    assert torch.equal(latent_of(backend, {"strategy": name, **NEVER[name]}), exact)


@pytest.mark.parametrize("own", [*({"strategy": name, **OFTEN[name]} for name in OFTEN), *COMBINED], ids=str)
def test_a_cache_saves_and_stays_near(backend, exact, own) -> None:
    task = task_for(num_inference_steps=STEPS, flexcache=own)
    close = latent_and_video(Generator(backend), task)[0]
    assert 1e-7 < relative_error(close, exact) < 0.5
    assert f"cache {own['strategy']} saved work in" in task.notes[-1] and " in 0 of" not in task.notes[-1]


@pytest.fixture(scope="module")
def between_images(frames_folder, tmp_path_factory):
    """A model that attends to an image encoder's rows, a request's pictures, and its exact latent."""
    backend = DiffusionBackend(config_for(frames_folder, tmp_path_factory.mktemp("outputs")))
    pictures = np.random.default_rng(1).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    asked = {"image": pictures[0], "last_image": pictures[1], "num_inference_steps": STEPS}
    run = trace(backend, {"prompt": "A cat walking on grass", "seed": 1, **asked})
    backend.use_calibration(fit([run], {"guidance": [5.0, 5.0]}))
    return Generator(backend), asked, latent_and_video(Generator(backend), task_for(**asked))[0]


@pytest.mark.parametrize("name", NEVER)
def test_every_cache_goes_with_an_image_encoder(between_images, name) -> None:
    generator, asked, exact = between_images
    for own in (NEVER, OFTEN):
        task = task_for(**asked, flexcache={"strategy": name, **own[name]})
        error = relative_error(latent_and_video(generator, task)[0], exact)
        assert error == 0 if own is NEVER else 1e-7 < error < 0.5


def test_tasks_with_different_caches_take_turns(backend) -> None:
    caches = [{"strategy": name, **parameters} for name, parameters in OFTEN.items()] + COMBINED
    alone = [latent_of(backend, own, seed) for seed, own in enumerate(caches)]
    tasks = [task_for(num_inference_steps=STEPS, seed=seed, flexcache=own) for seed, own in enumerate(caches)]
    while tasks[0].status is not TaskStatus.DECODING:
        for task in tasks:
            Generator(backend).generate_step(task)
    for task, latent in zip(tasks, alone, strict=True):
        assert torch.equal(task.buffer.latent, latent), task.params.flexcache


@pytest.mark.parametrize("name", OFTEN)
def test_one_branch_after_the_other_decides_and_gives_the_same(
    backend, tiny_folder, make_config, name
) -> None:
    own = {"strategy": name, **OFTEN[name]}
    sequential = DiffusionBackend(make_config(tiny_folder, infer__diffusion__cfg_batch="sequential"))
    sequential.use_calibration(backend.spec.calibration)
    assert relative_error(latent_of(sequential, own), latent_of(backend, own)) < 1e-4


@pytest.mark.parametrize("name", ["easycache", "fbcache", "meancache", "plan", "taylorseer"])
def test_a_step_that_ran_out_of_memory_is_run_again_to_the_same_bits(backend, monkeypatch, name) -> None:
    own = {"strategy": name, **OFTEN[name]}
    expected = latent_of(backend, own)
    task = task_for(num_inference_steps=STEPS, flexcache=own)
    generator = Generator(backend)
    generator.generate_step(task)
    while task.status is TaskStatus.DENOISING:
        with monkeypatch.context() as patch:
            patch.setattr(backend.sampler, "step", out_of_memory)
            with pytest.raises(torch.OutOfMemoryError):
                generator.generate_step(task)
        generator.generate_step(task)
    assert torch.equal(task.buffer.latent, expected)


def out_of_memory(*_args: object, **_kwargs: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


def test_an_experts_switch_drops_what_was_kept_and_runs_in_full(two_experts_folder, make_config) -> None:
    backend = DiffusionBackend(make_config(two_experts_folder))
    exact = latent_of(backend, None)
    for name in ("meancache", "taylorseer", "fbcache", "teacache"):
        task = task_for(num_inference_steps=STEPS, flexcache={"strategy": name, **OFTEN[name]})
        generator = Generator(backend)
        experts = []
        plans = []
        while task.status is not TaskStatus.DECODING:
            generator.generate_step(task)
            assert task.error is None, task.error_message
            if task.buffer.cache is not None and task.current_step:
                experts.append(task.expert)
                plans.append(next(iter(task.buffer.cache["plan"].values())))
                for records in task.buffer.cache["records"].values():
                    assert all(experts[record["step"]] == task.expert for record in records)
        switch = experts.index(1)
        assert plans[0][switch - 1 : switch + 2] == ["compute"] * 3 and plans[0] == plans[-1]
        assert relative_error(task.buffer.latent, exact) < 0.5


def test_compiled_blocks_stay_compiled_when_a_cache_is_switched_on(tiny_folder, make_config) -> None:
    backend = DiffusionBackend(make_config(tiny_folder))
    torch._dynamo.reset()
    backend.model_pool[0].compile_blocks(backend="eager", fullgraph=True)
    expected = latent_of(backend, None)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for name in ("meancache", "teacache", "fbcache", "blockdance", "easycache", "pab"):
            latent_of(backend, {"strategy": name, **OFTEN[name]})
        assert torch.equal(latent_of(backend, None), expected)
    torch._dynamo.reset()


def test_state_is_plain_data(backend) -> None:
    for name in OFTEN:
        task = task_for(num_inference_steps=STEPS, flexcache={"strategy": name, **OFTEN[name]})
        generator = Generator(backend)
        for _ in range(6):
            generator.generate_step(task)
        assert task.error is None, task.error_message
        # tensors are the only thing JSON does not know
        json.dumps(task.buffer.cache, default=lambda value: value.tolist())


# -- refusals


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("teacashe", "Did you mean 'teacache'"),
        ({"strategy": "teacache", "treshold": 0.1}, "Did you mean 'threshold'"),
        ({"strategy": "meancache", "predictor": "tailor"}, "Did you mean 'taylor'"),
        ({"strategy": "teacache", "predictor": "velocity"}, "use level=velocity"),
        ({"strategy": "taylorseer", "order": 3}, "from 0 to 2"),
        ({"strategy": "pab", "level": "step"}, "There are: module"),
        ({"strategy": "pab", "self_range": "two"}, "a whole number from 1"),
        ({"strategy": "teacache", "coefficients": "1,2"}, "a list of numbers"),
        ({"strategy": "fbcache", "threshold": -1}, "a number from 0"),
        (7, "a strategy's name"),
        ({"strategy": "interval", "warmup": 9, "cooldown": 9}, "at most the task's 10 steps"),
    ],
)
def test_refusals_say_what_would_do(value, said) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        parse_flexcache(value, STEPS)
    assert caught.value.field == "flexcache"


def test_the_command_lines_words() -> None:
    name, strategy = parse_strategy(parse_cache("meancache:fresh=30,predictor=reuse"))
    assert name == "meancache" and (strategy.fresh, strategy.predictor) == (30, "reuse")


def shapes_of(model: str):
    spec = FULL_SIZE[model]
    resolved = resolve_request(DiffusionUserParams("a cat"), spec, seed=0, task_id="t", output_dir=".")
    return cache_shapes(resolved, spec, 2)


def test_memory_is_known_from_shapes() -> None:
    """The figures of arithmetic on the published sizes: 32,760 tokens in bfloat16, a branch."""
    small = shapes_of("Wan2.1-T2V-1.3B")
    large = shapes_of("Wan2.1-T2V-14B")
    taylor = cache_bytes("taylorseer", large) / 2
    pab = cache_bytes("pab", small) / 2
    assert taylor == 3 * 40 * 2 * 32760 * 5120 * 2 and round(taylor / 2**30) == 75
    assert pab == 2 * 30 * 32760 * 1536 * 2
    assert cache_bytes("meancache", large) < 2**27
    assert cache_bytes(None, large) == 0
    with pytest.raises(
        UsageError, match=r"149.96 GiB \(74.98 GiB a branch\).*meancache would keep 0.0\d GiB"
    ) as caught:
        cache_bytes({"strategy": "taylorseer", "cache_memory_gb": 40}, large)
    assert "taylorseer with level=step would keep 1.25 GiB" in str(caught.value)


def test_what_a_run_keeps_is_no_more_than_was_stated(backend) -> None:
    for own in [*({"strategy": name, **OFTEN[name]} for name in OFTEN), *COMBINED]:
        task = task_for(num_inference_steps=STEPS, flexcache=own)
        generator = Generator(backend)
        generator.generate_step(task)
        stated = cache_bytes(own, cache_shapes(task.resolved, backend.spec, 4))
        most = 0
        while task.buffer.cache is not None:
            generator.generate_step(task)
            most = max(most, bytes_in(task.buffer.cache))
        assert 0 < most <= stated, own


def bytes_in(thing: object) -> int:
    """Of the tensors in nested plain data, each counted once."""
    found: dict[int, int] = {}

    def walk(value: object) -> None:
        if isinstance(value, torch.Tensor):
            storage = value.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes() if value.dim() else 0
        elif isinstance(value, dict):
            for inner in value.values():
                walk(inner)
        elif isinstance(value, list | tuple):
            for inner in value:
                walk(inner)

    walk(thing)
    return sum(found.values())


def test_caps_hold_before_a_task_is_taken_in(tiny_folder, make_config, monkeypatch) -> None:
    with Engine(make_config(tiny_folder, infer__diffusion__cache_memory_gb=1e-5)) as engine:
        with pytest.raises(UsageError, match="above cache_memory_gb = 1e-05"):
            engine.submit(DiffusionUserParams("a cat", flexcache="taylorseer"))
        engine.submit(DiffusionUserParams("a cat", flexcache="meancache"))
    with Engine(make_config(tiny_folder)) as engine:
        peak = engine.backend.memory_estimate().peak(4, 8, 5, 32, 32)
        monkeypatch.setattr("chitu_diffusion.pipelines.admission.usable_memory", lambda device: peak + 1)
        with pytest.raises(WillNotFitError, match="use flexcache meancache"):
            engine.submit(DiffusionUserParams("a cat", flexcache="taylorseer"))
