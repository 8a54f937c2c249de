"""Controlled video beside diffusers' own `WanVACEPipeline`, and everything that a request of it may be."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from ranks import run_ranks
from running import CAT, config_for, latent_and_video, psnr, relative_error, task_for
from safetensors.torch import save_file
from test_image_to_video import picture
from test_pipeline_parity import diffusers_run
from test_video_to_video import film, pictures

from chitu_diffusion.adapters.merging import check_adapters
from chitu_diffusion.backend import DiffusionBackend
from chitu_diffusion.distributed.plan import ParallelPlan
from chitu_diffusion.engine import Engine
from chitu_diffusion.errors import CheckpointError, UsageError
from chitu_diffusion.executor.worker_group import WorkerGroup
from chitu_diffusion.flexcache.registry import STRATEGIES
from chitu_diffusion.generator import Generator
from chitu_diffusion.media.reading import read_frames, read_recipe
from chitu_diffusion.models.convert import convert, verify
from chitu_diffusion.models.registry import resolve_model
from chitu_diffusion.pipelines.checkpoint import load_task, save_task
from chitu_diffusion.pipelines.controlled_video import encode_control
from chitu_diffusion.pipelines.request import resolve_task
from chitu_diffusion.pipelines.stages import to_frames
from chitu_diffusion.sampling.noise import initial_noise
from chitu_diffusion.task import CascadeStage, Conditioning, TaskStatus

SIZES = {"height": 32, "width": 48, "num_frames": 9, "num_inference_steps": 2, "negative_prompt": "blurry"}
TALL = {**SIZES, "height": 48, "width": 32, "num_frames": 5}


@pytest.fixture(scope="module")
def backend(control_folder, tmp_path_factory):
    return DiffusionBackend(config_for(control_folder, tmp_path_factory.mktemp("outputs")))


@pytest.fixture(scope="module")
def pipeline(control_folder):
    from diffusers import WanVACEPipeline

    pipeline = WanVACEPipeline.from_pretrained(control_folder, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def masks(frames: int, height: int, width: int) -> list[Image.Image]:
    """A soft disc that moves: some of it lies between black and white."""
    rows, columns = np.mgrid[:height, :width]
    found = []
    for frame in range(frames):
        far = np.hypot(rows - height / 2, columns - (frame + 2) * width / 12)
        found.append(
            Image.fromarray((255 * np.clip(height / 3 - far, 0, 4) / 4).astype(np.uint8)).convert("RGB")
        )
    return found


def given(name: str, frames: int, height: int, width: int) -> dict[str, object]:
    """Inputs of a request, as both take them; both stretch videos of twice the size by Lanczos."""
    video = pictures(film(frames, 2 * height, 2 * width))
    return {
        "text": {},
        "video": {"video": video},
        "mask": {"video": video, "mask": masks(frames, 2 * height, 2 * width)},
        "references": {"reference_images": [picture(50, 70), picture(70, 41, seed=2)]},
        "all": {
            "video": video,
            "mask": masks(frames, 2 * height, 2 * width),
            "reference_images": [picture()],
            "conditioning_scale": [0.5, 1.5],
        },
    }[name]


@pytest.mark.parametrize(
    ("name", "sizes", "guidance", "seed"),
    [
        ("text", SIZES, 5.0, 11),
        ("video", SIZES, 5.0, 12),
        ("mask", TALL, 1.0, 11),
        ("mask", SIZES, 5.0, 11),
        ("references", TALL, 5.0, 12),
        ("all", SIZES, 5.0, 12),
        ("all", TALL, 1.0, 11),
    ],
)
def test_parity_with_diffusers(backend, pipeline, name, sizes, guidance, seed):
    more = given(name, sizes["num_frames"], sizes["height"], sizes["width"])
    request = {**sizes, **more, "guidance_scale": guidance}
    latent, video = latent_and_video(Generator(backend), task_for(seed=seed, **request))
    theirs, frames = diffusers_run(pipeline, CAT, seed, **request)
    print(f"latent {relative_error(latent, theirs):.1e}, frames {psnr(video, frames):.0f} dB")
    assert latent.shape == theirs.shape and video.shape == frames.shape
    assert relative_error(latent, theirs) < 1e-4  # float32 sums in another order
    assert psnr(video, frames) >= 50
    if more:
        plain = latent_and_video(Generator(backend), task_for(seed=seed, **sizes, guidance_scale=guidance))[0]
        assert relative_error(latent[:, :, -plain.shape[2] :], plain) > 3e-3  # far above the error


def controlled(**more):
    """A task with every input."""
    return task_for(**{**SIZES, **given("all", 9, 32, 48), **more})


@pytest.mark.usefixtures("gelu_apart")
def test_every_memory_level_and_way_of_guidance_makes_the_same(control_folder, backend, make_config):
    expected, video = latent_and_video(Generator(backend), controlled())
    for level in range(1, 5):
        other = DiffusionBackend(make_config(control_folder, infer__diffusion__low_mem_level=level))
        latent, frames = latent_and_video(Generator(other), controlled())
        # encoding in tiles rounds otherwise
        assert relative_error(latent, expected) < 1e-5 and psnr(frames, video) >= 60
    apart = DiffusionBackend(make_config(control_folder, infer__diffusion__cfg_batch="sequential"))
    assert relative_error(latent_and_video(Generator(apart), controlled())[0], expected) < 1e-4


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_cache_goes_with_a_control_or_says_why(backend, strategy):
    """Where a cache answers for all blocks, the control stream rests, too; else it runs on."""
    steps = {"num_inference_steps": 12}
    task = controlled(flexcache=strategy, **steps)
    generator = Generator(backend)
    while task.status in (TaskStatus.PENDING, TaskStatus.ENCODING, TaskStatus.DENOISING):
        generator.generate_step(task)
    if task.status is TaskStatus.FAILED:
        said = ("were measured on", "was not calibrated", "no plan")
        assert strategy in ("plan", "magcache") and any(words in task.error_message for words in said)
        return
    exact = latent_and_video(generator, controlled(**steps))[0]
    assert relative_error(task.buffer.latent, exact) < 0.5


LAYOUTS = {2: ({"cfg": 2},), 4: ({"ulysses": 2, "ring": 2},)}


def on_ranks(rank: int, world: int, store: dist.Store, folder: str, out: str) -> None:
    """Rank 0 alone has the pictures; of 24 tokens each has a share."""
    for number, layout in enumerate(LAYOUTS[world]):
        place = dist.PrefixStore(str(number), store)
        workers = WorkerGroup(ParallelPlan(**layout), rank, place, device=torch.device("cpu"))
        with Engine(config_for(Path(folder), Path(out)), workers=workers) as engine:
            if engine.is_driver:
                engine.submit(replace(controlled().params, save_path=f"{out}/{world}.{number}.npy"))
                engine.run_until_idle()


@pytest.mark.parametrize("world", LAYOUTS)
def test_ranks_make_the_video_of_one(control_folder, backend, tmp_path, world):
    expected = to_frames(latent_and_video(Generator(backend), controlled())[1]).astype(int)
    run_ranks(world, on_ranks, str(control_folder), str(tmp_path), errors=tmp_path)
    for number in range(len(LAYOUTS[world])):
        # the layouts round apart by a bit of float32, and a frame by one of its 256 steps at the most
        assert np.abs(read_frames(tmp_path / f"{world}.{number}.npy") - expected).max() <= 1


def test_a_video_goes_on_where_it_was_saved(backend, tmp_path):
    generator = Generator(backend)
    expected = latent_and_video(generator, controlled())[0]
    task = controlled()
    for _ in range(2):
        generator.generate_step(task)
    save_task(task, tmp_path / "half", backend)
    again = load_task(tmp_path / "half", backend)
    assert again.current_step == 1 and again.resumed.exact
    assert again.buffer.conditioning.control_scale == (0.5, 1.5)
    assert torch.equal(latent_and_video(generator, again)[0], expected)


def test_one_mask_serves_for_all_frames_in_every_form(backend):
    """A picture, its array and tensor, a film of one frame; another picture makes another video."""
    mask = masks(1, 32, 48)[0]
    array = np.asarray(mask)
    video = film()

    def latent(given):
        return latent_and_video(Generator(backend), task_for(video=video, mask=given, **SIZES))[0]

    expected = latent([mask] * 9)
    for form in (mask, array, array[..., 0], torch.from_numpy(array).permute(2, 0, 1), array[None], [mask]):
        assert torch.equal(latent(form), expected)
    assert not torch.equal(latent(mask.transpose(Image.Transpose.FLIP_LEFT_RIGHT)), expected)


def test_odd_sizes_and_a_loop_by_hand(backend):
    """A size of half patches is cut out of whole ones; the page's loop is the task's."""
    odd = task_for(**{**SIZES, "height": 40, "width": 24, "num_frames": 5}, reference_images=picture())
    latent, video = latent_and_video(Generator(backend), odd)
    assert latent.shape == (1, 4, 3, 6, 4) and video.shape == (1, 5, 3, 40, 24)
    generator = Generator(backend)
    task = controlled(guidance_scale=3.0)
    expected = latent_and_video(generator, task)[0]
    control = encode_control(backend, task.resolved)
    assert control.shape == (1, 72, 4, 4, 6)
    text = generator.encode_text([CAT, "blurry"])
    told = Conditioning(text, control_latents=control, control_scale=(0.5, 1.5))
    found = generator.denoise_loop(initial_noise((1, 4, 4, 4, 6), 3), told, 2, 3.0)
    assert relative_error(found, expected) < 1e-6
    with pytest.raises(UsageError, match="use Conditioning"):
        generator.forward_with_cp(torch.randn(1, 4, 3, 4, 6), text, 500)
    with pytest.raises(UsageError, match=r"control is \[1, 72, 4, 4, 6\]"):
        generator.forward_with_cp(torch.randn(1, 4, 3, 4, 6), told, 500)


def test_what_is_refused_in_words(backend, tiny_folder):
    spec = backend.spec
    for more, said in (
        ({"video": film(), "strength": 0.5}, "--conditioning-scale"),
        ({"mask": picture()}, "it is of a video"),
        ({"video": film(), "mask": film(5), "num_frames": 9}, "it has 5 frames, and 9 of the video"),
        ({"conditioning_scale": (1.0, 1.0, 1.0)}, "use one, or 2"),
        ({"image": picture()}, "takes none"),
        ({"cascade": (CascadeStage(16, 16, 2), CascadeStage(32, 32, 2, 0.5))}, "one size alone"),
    ):
        with pytest.raises(UsageError, match=said):
            resolve_task(task_for(**more), spec, "")
    plain = resolve_model(str(tiny_folder)).spec
    for more in ({"mask": picture(), "video": film()}, {"reference_images": picture()}):
        with pytest.raises(UsageError, match=r"takes none; .* Wan2\.1-VACE-14B"):
            resolve_task(task_for(**more), plain, "")
    for scale in ("much", 11, (1.0, None), True):
        with pytest.raises(UsageError, match="conditioning_scale = "):
            task_for(conditioning_scale=scale)
    with pytest.raises(UsageError, match="at most 16"):
        task_for(reference_images=[picture()] * 17)
    with pytest.raises(UsageError, match="mask is a dict|mask = "):
        task_for(video=film(), mask={"path": "mask.png"})


def test_both_layouts_hold_the_same_model(control_folder, backend, tmp_path, make_config):
    official = tmp_path / "official"
    convert(control_folder, official, "official")
    said = json.loads((official / "config.json").read_text())
    assert (said["model_type"], said["_class_name"]) == ("vace", "VaceWanModel")
    assert said["vace_layers"] == [0, 1] and said["vace_in_dim"] == 72
    back = tmp_path / "back"
    convert(official, back, "diffusers")
    assert all(found.ok for folder in (official, back) for found in verify(folder))
    expected = latent_and_video(Generator(backend), controlled())[0]
    for folder in (official, back):
        other = DiffusionBackend(make_config(folder))
        assert torch.equal(latent_and_video(Generator(other), controlled())[0], expected)


def test_the_command_line_and_its_reproduction(control_folder, tmp_path, chitu):
    picture().save(tmp_path / "hat.png")
    picture(20, 30, seed=4).save(tmp_path / "shoe.png")
    masks(1, 32, 48)[0].save(tmp_path / "mask.png")
    np.save(tmp_path / "film.npy", film())
    words = ("--model", control_folder, "--steps", 2, "--seed", 1)
    inputs = ("--video", "film.npy", "--mask", "mask.png", "--reference-image", "hat.png")
    inputs += ("--reference-image", "shoe.png", "--conditioning-scale", 0.5)
    code, out, err = chitu("generate", "a cat", *words, *inputs, "--dry-run", "--json")
    plan = json.loads(out.splitlines()[-1])["tasks"][0]
    assert code == 0 and plan["tokens"] == 4 * plan["height"] * plan["width"] // 256, err
    code, _, err = chitu("generate", "a cat", *words, *inputs, "-o", "cat.npy")
    assert code == 0, err
    params = read_recipe(tmp_path / "cat.npy")["params"]
    assert [Path(each["path"]).name for each in params["reference_images"]["images"]] == [
        "hat.png",
        "shoe.png",
    ]
    assert params["conditioning_scale"] == 0.5 and params["mask"]["sha256"] and params["strength"] is None
    assert chitu("reproduce", "cat.npy", "--model", control_folder, "--check")[0] == 0
    code, _, err = chitu("generate", "a cat", *words, *inputs, "-o", "cat.npy")
    assert code == 0, err  # the same again stands already
    picture(20, 30, seed=5).save(tmp_path / "shoe.png")
    code, _, err = chitu("reproduce", "cat.npy", "--model", control_folder, "--check")
    assert code == 2 and "reference_images" in err and "changed" in err
    row = {
        "prompt": "a cat",
        "seed": 1,
        "reference_images": ["hat.png"],
        "num_frames": 5,
        "save_path": "b.npy",
    }
    (tmp_path / "rows.jsonl").write_text(json.dumps({**row, "conditioning_scale": [1, 0.5]}))
    code, _, err = chitu("batch", "rows.jsonl", "--model", control_folder, "--steps", 1)
    assert code == 0, err
    code, _, err = chitu("generate", "a cat", *words, *inputs[:2], "--strength", 0.5)
    assert code == 2 and "--strength" in err and "--conditioning-scale" in err


@pytest.mark.parametrize(
    "changed", [{"vace_in_channels": 80}, {"vace_layers": None, "vace_in_channels": None}]
)
def test_a_stream_that_does_not_fit_is_refused(control_folder, tmp_path, changed):
    folder = tmp_path / "model"
    shutil.copytree(control_folder, folder)
    file = folder / "transformer" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changed}))
    with pytest.raises(CheckpointError, match="control stream does not fit"):
        resolve_model(str(folder))


def test_an_adapter_of_the_control_stream_is_merged(backend, tmp_path):
    """In official names, as VACE adapters have them."""
    torch.manual_seed(0)
    tensors = {}
    for name in ("vace_blocks.0.before_proj", "vace_blocks.1.after_proj", "vace_blocks.1.self_attn.q"):
        tensors[f"diffusion_model.{name}.lora_down.weight"] = torch.randn(2, 32)
        tensors[f"diffusion_model.{name}.lora_up.weight"] = torch.randn(32, 2)
    save_file(tensors, tmp_path / "control.safetensors")
    network = backend.model_pool[0]
    places = [
        network.vace_blocks[0].proj_in,
        network.vace_blocks[1].proj_out,
        network.vace_blocks[1].attn1.to_q,
    ]
    before = [place.weight.clone() for place in places]
    lora = task_for(lora=str(tmp_path / "control.safetensors")).params.lora
    assert check_adapters(lora, backend.spec.transformers) == []
    backend.use_adapters(lora)
    deltas = [place.weight - old for place, old in zip(places, before, strict=True)]
    pairs = list(tensors.values())
    for delta, down, up in zip(deltas, pairs[::2], pairs[1::2], strict=True):
        assert relative_error(delta, up @ down) < 1e-5
    backend.use_adapters()
    assert all(torch.equal(place.weight, old) for place, old in zip(places, before, strict=True))
