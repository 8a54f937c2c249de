"""Adapters in whole videos: beside diffusers, taking turns, at every memory level, in 8 bits, on ranks, and
from checkpoints, batches and recipes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_files import lora_of, write
from ranks import run_ranks
from running import CAT, config_for, model_of, relative_error
from safetensors.torch import load_file
from torch import Tensor
from torch._dynamo.utils import counters

from chitu_diffusion.adapters.placing import parameter_shapes
from chitu_diffusion.backend import DiffusionBackend
from chitu_diffusion.config import EngineConfig, RankPlace
from chitu_diffusion.engine import Engine
from chitu_diffusion.errors import UsageError
from chitu_diffusion.memory.offload import OffloadManager, OffloadPart
from chitu_diffusion.models.components import load_networks
from chitu_diffusion.models.kinds import EXPERT_ROLES, PARTS
from chitu_diffusion.models.wan.checkpoint_names import official_transformer_name
from chitu_diffusion.models.wan.transformer import WanTransformer
from chitu_diffusion.task import DiffusionUserParams
from chitu_diffusion.task.lora import Lora

SHAPES = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 3}


def adapter(
    folder: Path,
    place: Path,
    seed: int = 0,
    blocks: tuple[int, ...] = (0, 1),
    alpha: float | None = None,
    **style: Any,
) -> Path:
    """Factors for all linear layers of some blocks of the model in `folder`, under official
    names."""
    torch.manual_seed(seed)
    sizes = {
        official_transformer_name(name).removesuffix(".weight"): shape
        for name, shape in parameter_shapes(model_of(config_for(folder, place)).spec.transformers[0]).items()
        if any(name.startswith(f"blocks.{block}.") for block in blocks)
        and len(shape) == 2
        and name.endswith(".weight")
    }
    return lora_of(place / f"adapter-{seed}.safetensors", sizes, alpha=alpha, strength=0.2, **style)[0]


def settings(folder: Path, place: Path, **infer: Any) -> EngineConfig:
    config = config_for(folder, place)
    for name, value in infer.items():
        setattr(config.infer, name, value)
    return config


def latent_of(config: EngineConfig, lora: object, *, seed: int = 3, **more: Any) -> Tensor:
    """The last latent of a video."""
    latents: list[Tensor] = []
    with Engine(config) as engine:
        engine.generate(
            CAT,
            seed=seed,
            lora=lora,
            callback_on_step_end=lambda engine, step, time, values: latents.append(values["latents"]) or {},
            **{**SHAPES, **more},
        )
    return latents[-1]


@pytest.mark.parametrize(
    ("strength", "alpha", "style"),
    [
        (1.0, None, {}),
        (-0.6, 1.5, {}),
        (0.8, 1.5, {"prefix": "lora_unet_", "underscores": True}),  # diffusers wants alpha here
    ],
    ids=["ComfyUI", "ComfyUI with alpha", "Kohya"],
)
def test_latents_are_those_of_diffusers_with_the_adapter_fused(
    tiny_folder, tmp_path, strength, style, alpha
) -> None:
    from diffusers import WanPipeline

    path = adapter(tiny_folder, tmp_path, alpha=alpha, **style)
    pipe = WanPipeline.from_pretrained(tiny_folder)
    pipe.set_progress_bar_config(disable=True)

    def theirs() -> Tensor:
        from chitu_diffusion.sampling.noise import initial_noise

        noise = initial_noise((1, 4, 2, 4, 4), 3)
        return pipe(
            CAT,
            negative_prompt="blurry, ugly",
            guidance_scale=5.0,
            latents=noise,
            output_type="latent",
            max_sequence_length=512,
            **SHAPES,
        ).frames

    plain = theirs()
    # diffusers' own reading of the file; what its fusing adds is the product (that needs PEFT)
    factors = pipe.lora_state_dict(str(path))
    weights = dict(pipe.transformer.named_parameters())
    with torch.no_grad():
        for key in [key for key in factors if key.endswith(".lora_A.weight")]:
            name = key.removeprefix("transformer.").removesuffix(".lora_A.weight")
            change = factors[key.replace("lora_A", "lora_B")] @ factors[key]
            weights[f"{name}.weight"].add_(change, alpha=strength)
    assert len(factors) == 2 * 2 * 10  # both factors of each linear layer of two blocks
    fused = theirs()
    ours = latent_of(config_for(tiny_folder, tmp_path), f"{path}:{strength}")
    assert relative_error(fused, plain) > 0.05  # the adapter weighs something
    assert relative_error(ours, fused) < 1e-4


CACHES = [
    None,
    {"strategy": "teacache", "threshold": 1.2},
    {"strategy": "easycache", "threshold": 0.6, "warmup": 1},
    {"strategy": "pab", "low": 0.0, "high": 1000.0},
]


@pytest.mark.parametrize("flexcache", CACHES, ids=str)
def test_tasks_take_turns_and_none_leaves_anything_behind(tiny_folder, tmp_path, flexcache) -> None:
    config = config_for(tiny_folder, tmp_path)
    config.scheduler.policy = "fair"
    sets = [None, f"{adapter(tiny_folder, tmp_path, 1)}", [f"{adapter(tiny_folder, tmp_path, 2, (1,))}:0.7"]]
    more = {"flexcache": flexcache, "num_inference_steps": 6}
    solo = [latent_of(config, lora, **more) for lora in sets]
    assert all(relative_error(a, b) > 0.01 for a, b in zip(solo, solo[1:], strict=False))
    order = []
    latents: dict[str, Tensor] = {}

    def keep(engine: Engine, step: int, time: float, values: dict[str, Any]) -> dict[str, Any]:
        order.append(values["task"].task_id)
        latents[values["task"].task_id] = values["latents"]
        return {}

    with Engine(config) as engine:
        before = {name: value.clone() for name, value in engine.backend.model_pool[0].state_dict().items()}
        for index, lora in enumerate(sets):
            engine.submit(
                CAT,
                seed=3,
                lora=lora,
                task_id=str(index),
                role=str(index),
                callback_on_step_end=keep,
                **{**SHAPES, **more},
            )
        engine.run_until_idle()
        assert [order.count(str(index)) for index in range(3)] == [6, 6, 6]
        assert sum(a != b for a, b in zip(order, order[1:], strict=False)) > 10  # they really took turns
        engine.backend.use_adapters()
        after = engine.backend.model_pool[0].state_dict()
        assert all(torch.equal(after[name], value) for name, value in before.items())
    assert all(torch.equal(latents[str(index)], expected) for index, expected in enumerate(solo))


def test_forwards_by_hand_have_no_adapter(tiny_folder, tmp_path) -> None:
    latent = torch.randn(1, 4, 2, 4, 4)
    with Engine(config_for(tiny_folder, tmp_path)) as engine:
        text = engine.generator.encode_text(["a cat", "a dog"])
        ways = [
            lambda: engine.generator.forward_with_cp(latent, text, 500.0),
            lambda: engine.generator.denoise_loop(latent, text, num_steps=2),
        ]
        before = [way() for way in ways]
        for way, expected in zip(ways, before, strict=True):
            engine.generate(CAT, lora=str(adapter(tiny_folder, tmp_path)), seed=1, **SHAPES)
            assert torch.equal(way(), expected)


@pytest.mark.parametrize("level", [1, 2, 3, 4])
def test_every_memory_level_gives_the_same_bits(tiny_folder, tmp_path, level) -> None:
    path = str(adapter(tiny_folder, tmp_path))
    config = config_for(tiny_folder, tmp_path)
    expected = latent_of(config, path)
    config.infer.diffusion.low_mem_level = level
    assert torch.equal(latent_of(config, path), expected)
    # what was merged at one level counts at another
    with Engine(config) as engine:
        engine.generate(CAT, lora=path, seed=1, **SHAPES)
        engine.backend.low_mem_level = 4
        latents = []
        keep = lambda engine, step, time, values: latents.append(values["latents"]) or {}  # noqa: E731
        engine.generate(CAT, lora=path, seed=3, callback_on_step_end=keep, **SHAPES)
        engine.generate(CAT, seed=3, callback_on_step_end=keep, **SHAPES)
    assert torch.equal(latents[2], expected)
    assert torch.equal(latents[-1], latent_of(config_for(tiny_folder, tmp_path), None))


def test_copies_on_the_device_and_at_home_are_both_written(tiny_folder, tmp_path) -> None:
    """With two memories, as beside a GPU."""
    config = config_for(tiny_folder, tmp_path)
    networks = load_networks(config, model_of(config), torch.device("cpu"), torch.float32)
    backend = DiffusionBackend.from_networks(networks, config)
    parts = {
        role: OffloadPart(
            part, PARTS[role].kind, list(part.blocks) if isinstance(part, WanTransformer) else ()
        )
        for role, part in networks.parts.items()
    }
    manager = OffloadManager(torch.device("cpu"), parts=parts, level=0, apart=True)
    backend.offload = manager
    network = backend.model_pool[0]
    manager.offload_all()
    manager.use("transformer")
    before = {name: value.clone() for name, value in network.state_dict().items()}
    for adapted in backend._adapted:
        adapted._offload = manager
    backend.use_adapters([Lora(str(adapter(tiny_folder, tmp_path)))])
    merged = {name: value.clone() for name, value in network.state_dict().items()}
    assert any(not torch.equal(merged[name], before[name]) for name in before)
    manager.offload_all()
    assert all(torch.equal(value, merged[name]) for name, value in network.state_dict().items())
    backend.use_adapters()
    manager.use("transformer")
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize("originals", [True, False])
def test_8_bits_are_rounded_from_what_was_merged(tiny_folder, tmp_path, originals) -> None:
    """As if the merged weights had been the model's own."""
    path = adapter(tiny_folder, tmp_path)
    given: dict[str, Any] = {
        "quant": "fp8",
        "quant_keep": "attn2",
        "quant_from": 0.0,
        "quant_originals": originals,
    }
    found = latent_of(settings(tiny_folder, tmp_path, **given), str(path))
    with Engine(config_for(tiny_folder, tmp_path)) as engine:
        engine.backend.use_adapters([Lora(str(path))])
        merged = {name: value.clone() for name, value in engine.backend.model_pool[0].state_dict().items()}
    import shutil

    folder = shutil.copytree(tiny_folder, tmp_path / "merged", ignore=shutil.ignore_patterns("manifest.json"))
    write(folder / "transformer" / "diffusion_pytorch_model.safetensors", merged)
    assert torch.equal(found, latent_of(settings(folder, tmp_path, **given), None))
    plain = settings(tiny_folder, tmp_path, **given)
    expected = latent_of(plain, None)
    with Engine(plain) as engine:
        engine.generate(CAT, lora=str(path), seed=1, **SHAPES)
        latents = []
        keep = lambda engine, step, time, values: latents.append(values["latents"]) or {}  # noqa: E731
        engine.generate(CAT, seed=3, callback_on_step_end=keep, **SHAPES)
    assert torch.equal(latents[-1], expected)


def changed_experts(engine: Engine, before: list[dict[str, Tensor]]) -> list[bool]:
    return [
        any(not torch.equal(value, old[name]) for name, value in expert.state_dict().items())
        for expert, old in zip(engine.backend.model_pool, before, strict=True)
    ]


def test_each_expert_gets_its_own(two_experts_folder, tmp_path) -> None:
    path = adapter(two_experts_folder, tmp_path)
    # as diffusers saves two: each expert's under its own prefix
    both = tmp_path / "both.safetensors"
    tensors = {key.removeprefix("diffusion_model."): value for key, value in load_file(path).items()}
    high = {f"transformer.{key}": value for key, value in tensors.items()}
    low = {f"transformer_2.{key}": 2 * value for key, value in tensors.items()}
    write(both, {**high, **low})
    config = config_for(two_experts_folder, tmp_path)
    with Engine(config) as engine:
        before = [
            {name: value.clone() for name, value in expert.state_dict().items()}
            for expert in engine.backend.model_pool
        ]
        for lora, expected in (
            (f"{path}@high:0.8", [True, False]),
            (f"{path}@low", [False, True]),
            (f"{path}", [True, True]),
            (f"{both}", [True, True]),
            (f"{both}@low", [False, True]),
            (None, [False, False]),
        ):
            engine.backend.use_adapters(DiffusionUserParams(CAT, lora=lora).lora)
            assert changed_experts(engine, before) == expected, lora
        engine.backend.use_adapters([Lora(str(both))])
        name = "blocks.0.attn1.to_q.weight"
        changes = [
            expert.state_dict()[name] - old[name]
            for expert, old in zip(engine.backend.model_pool, before, strict=True)
        ]
        assert relative_error(changes[1], 4 * changes[0]) < 1e-5  # both factors are twice as large
    assert not torch.equal(latent_of(config, f"{path}@low"), latent_of(config, f"{path}@high"))


def test_one_transformer_has_no_experts(tiny_folder, tmp_path) -> None:
    path = adapter(tiny_folder, tmp_path)
    with (
        Engine(config_for(tiny_folder, tmp_path)) as engine,
        pytest.raises(UsageError, match="leave '@low' out"),
    ):
        engine.generate(CAT, lora=f"{path}@low", **SHAPES)


def test_of_networks_in_memory_copies_are_kept(tiny_folder, tmp_path) -> None:
    from dataclasses import replace

    config = config_for(tiny_folder, tmp_path)
    networks = load_networks(config, model_of(config), torch.device("cpu"), torch.float32)
    backend = DiffusionBackend.from_networks(replace(networks, folder=None, originals={}), config)
    network = backend.model_pool[0]
    before = {name: value.clone() for name, value in network.state_dict().items()}
    backend.use_adapters([Lora(str(adapter(tiny_folder, tmp_path, 1)))])
    backend.use_adapters([Lora(str(adapter(tiny_folder, tmp_path, 2)))])
    backend.use_adapters()
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def _on_two_ranks(
    rank: int, world: int, store: Any, folder: str, place: str, lora: str, expected: Tensor
) -> None:
    config = config_for(Path(folder), Path(place))
    latents = []
    with Engine(config, place=RankPlace(rank, world, store=store)) as engine:
        if not engine.is_driver:
            engine.run_worker()
            return
        keep = lambda engine, step, time, values: latents.append(values["latents"]) or {}  # noqa: E731
        engine.generate(CAT, seed=3, lora=lora, callback_on_step_end=keep, **SHAPES)
        engine.generate(CAT, seed=3, callback_on_step_end=keep, **SHAPES)
    assert relative_error(latents[2], expected) < 1e-4
    assert relative_error(latents[-1], expected) > 0.01


def test_a_plan_of_steps_is_refused_beside_an_adapter(tiny_folder, tmp_path) -> None:
    path = str(adapter(tiny_folder, tmp_path))
    with (
        Engine(config_for(tiny_folder, tmp_path)) as engine,
        pytest.raises(UsageError, match="without adapters"),
    ):
        engine.generate(CAT, lora=path, flexcache={"strategy": "plan", "speedup": 2}, **SHAPES)


@pytest.mark.usefixtures("gelu_apart")
def test_nothing_is_compiled_again(tiny_folder, tmp_path) -> None:
    torch._dynamo.reset()
    counters.clear()
    backend = DiffusionBackend(config_for(tiny_folder, tmp_path))
    network = backend.model_pool[0]
    latent = torch.randn(1, 4, 2, 4, 4)
    text = torch.randn(1, 7, 32)
    loras = [Lora(str(adapter(tiny_folder, tmp_path)))]
    backend.use_adapters(loras)
    expected = network(latent, text, 500.0)
    backend.use_adapters()
    network.compile_blocks(backend="eager")
    network(latent, text, 500.0)
    graphs = counters["stats"]["unique_graphs"]
    assert graphs > 0
    backend.use_adapters(loras)
    assert torch.equal(network(latent, text, 500.0), expected)
    assert counters["stats"]["unique_graphs"] == graphs
    torch._dynamo.reset()


def test_two_ranks_merge_alike(tiny_folder, tmp_path) -> None:
    path = str(adapter(tiny_folder, tmp_path))
    expected = latent_of(config_for(tiny_folder, tmp_path), path)
    errors = tmp_path / "errors"
    errors.mkdir()
    run_ranks(2, _on_two_ranks, str(tiny_folder), str(tmp_path), path, expected, errors=errors)


def test_a_checkpoint_goes_on_with_the_same_adapters_alone(tiny_folder, tmp_path) -> None:
    path = str(adapter(tiny_folder, tmp_path))
    config = config_for(tiny_folder, tmp_path)
    expected = latent_of(config, path)
    folder = tmp_path / "checkpoints"

    def begin(lora: object, steps: int) -> tuple[int, list[Tensor]]:
        latents: list[Tensor] = []
        keep = lambda engine, step, time, values: latents.append(values["latents"]) or {}  # noqa: E731
        with Engine(config) as engine:
            task = engine.submit(
                CAT, seed=3, lora=lora, checkpoints=folder, task_id="t", callback_on_step_end=keep, **SHAPES
            )
            begun = task.current_step
            for _ in range(steps):
                engine.step()
        return begun, latents

    assert begin(path, 3)[0] == 0  # encoded, and two denoising steps
    assert begin(f"{path}:0.5", 0)[0] == 0
    moved = Path(path).rename(tmp_path / "elsewhere.safetensors")  # known by its hash, wherever it lies
    begun, latents = begin(str(moved), 3)
    assert begun == 2 and torch.equal(latents[-1], expected)


def test_the_command_line_makes_repeats_and_skips_it(chitu, tiny_folder, tmp_path) -> None:
    path = adapter(tiny_folder, tmp_path, 1)
    other = adapter(tiny_folder, tmp_path, 2)
    common = ["--model", tiny_folder, "--device", "cpu", "--dtype", "float32"]
    words = ["generate", CAT, *common, "--seed", 1, "--steps", 2, "--lora", f"{path}:0.8", "--lora", other]
    code, _, said = chitu(*words, "--dry-run")
    assert code == 0 and "lora    adapter-1.safetensors:0.8, adapter-2.safetensors:1" in said
    assert chitu(*words, "-o", "a.npy")[0] == 0
    from chitu_diffusion.media.reading import read_recipe

    made = read_recipe(Path("a.npy"))
    assert [each["strength"] for each in made["adapters"]] == [0.8, 1.0]
    assert made["adapters"][0]["sha256"] == Lora(str(path)).sha256
    again = ("reproduce", "a.npy", "--check", "--device", "cpu", "--model", tiny_folder)
    code, out, _ = chitu(*again)
    assert code == 0 and "the same" in out
    assert chitu(*again, "--lora", path)[0] == 5
    rows = [
        {"prompt": CAT, "lora": [f"{path}:0.8", str(other)], "id": "a"},
        {"prompt": CAT, "lora": str(path), "id": "b"},
        {"prompt": CAT, "id": "c"},
    ]
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    batch = ["batch", "rows.jsonl", *common, "--seed", 1, "--steps", 2, "-o", "out"]
    assert chitu(*batch)[0] == 0
    assert "3 done already" in chitu(*batch, "--dry-run")[2]
    rows[1]["lora"] = f"{path}:0.9"
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    code, _, said = chitu(*batch, "--dry-run")
    assert code == 2 and "shows something else" in said and "line 2" in said and "line 1" not in said


def test_a_table_of_rows_may_name_adapters(chitu, tiny_folder, tmp_path) -> None:
    path = adapter(tiny_folder, tmp_path)
    cell = json.dumps([f"{path}:0.5"]).replace('"', '""')
    Path("rows.csv").write_text(f'prompt,lora\na cat,{path}@high\na cat,"{cell}"\n')
    code, _, said = chitu("batch", "rows.csv", "--model", tiny_folder, "--dry-run")
    assert code == 2 and "leave '@high' out" in said and "line 3" not in said


def test_bad_adapters_are_refused_before_anything_loads(chitu, nothing_loads, tiny_folder, tmp_path) -> None:
    path = write(tmp_path / "other.safetensors", {"x.lora_up.weight": torch.ones(2, 2)})
    words = ("generate", CAT, "--model", tiny_folder, "--lora")
    assert "--lora '" in chitu(*words, "missing")[2]
    for text, said in (
        (path, "none of its 1 names"),
        (f"{path}:nan", "strength nan"),
        (tmp_path, "a folder"),
    ):
        code, _, err = chitu(*words, text)
        assert code == 2 and said in err, err


def test_keys_without_a_place_are_told_with_the_video(tiny_folder, tmp_path) -> None:
    path = adapter(tiny_folder, tmp_path)
    write(path, {**load_file(path), "blocks.7.self_attn.q.lora_up.weight": torch.ones(4, 4)})
    with Engine(config_for(tiny_folder, tmp_path)) as engine:
        result = engine.generate(CAT, lora=str(path), seed=1, **SHAPES)
    assert any(
        "1 key(s) have no place here: blocks.7.self_attn.q.lora_up.weight" in note
        for note in result.task.notes
    )


def test_a_text_to_video_adapter_on_an_image_to_video_network(image_folder, tmp_path) -> None:
    path = adapter(image_folder, tmp_path)
    expected = load_file(path)
    write(path, {**expected, "diffusion_model.patch_embedding.diff": torch.ones(32, 4, 1, 2, 2)})
    config = config_for(image_folder, tmp_path)
    from chitu_diffusion.adapters.merging import check_adapters

    (note,) = check_adapters([Lora(str(path))], model_of(config).spec.transformers)
    assert "patch_embedding.diff (shape [32, 4, 1, 2, 2], here [32, 12, 1, 2, 2])" in note
    backend = DiffusionBackend(config)
    network = backend.model_pool[0]
    before = network.patch_embedding.weight.clone()
    backend.use_adapters([Lora(str(path))])
    assert torch.equal(network.patch_embedding.weight, before) and EXPERT_ROLES[0] == "transformer"
