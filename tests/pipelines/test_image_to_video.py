"""Image to video beside diffusers' own `WanImageToVideoPipeline`, and everything that a request with a
picture may be.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import EpsImagePlugin, Image
from ranks import run_ranks
from running import config_for, latent_and_video, psnr, relative_error, run_to_end, task_for
from test_pipeline_parity import diffusers_run

from chitu_diffusion.backend import DiffusionBackend
from chitu_diffusion.distributed.plan import ParallelPlan
from chitu_diffusion.engine import Engine
from chitu_diffusion.errors import UsageError
from chitu_diffusion.executor.worker_group import WorkerGroup
from chitu_diffusion.generator import Generator
from chitu_diffusion.media.image import InputImage
from chitu_diffusion.media.reading import read_frames, read_recipe
from chitu_diffusion.models.convert import convert, verify
from chitu_diffusion.models.registry import FULL_SIZE, resolve_model
from chitu_diffusion.pipelines.encoding import encode_keyframes
from chitu_diffusion.pipelines.request import resolve_task
from chitu_diffusion.task import CascadeStage, DiffusionUserParams

SIZES = {"height": 32, "width": 48, "num_frames": 9, "num_inference_steps": 6}


def picture(height: int = 50, width: int = 70, seed: int = 0) -> Image.Image:
    """Noise on a slope: every pixel differs from its neighbours."""
    numbers = np.random.default_rng(seed)
    slope = np.linspace(0, 200, width)[None, :, None]
    return Image.fromarray((slope + numbers.integers(0, 55, (height, width, 3))).astype(np.uint8))


@pytest.fixture(scope="module", params=["one", "two"])
def beside_diffusers(request, image_folder, image_experts_folder, tmp_path_factory):
    """One folder, of one expert or two, opened by us and by diffusers."""
    from diffusers import WanImageToVideoPipeline

    folder = image_folder if request.param == "one" else image_experts_folder
    pipeline = WanImageToVideoPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return DiffusionBackend(config_for(folder, tmp_path_factory.mktemp("outputs"))), pipeline


@pytest.fixture(scope="module")
def backend(image_folder, tmp_path_factory):
    return DiffusionBackend(config_for(image_folder, tmp_path_factory.mktemp("outputs")))


@pytest.mark.parametrize("guidance", [5.0, 1.0])
@pytest.mark.parametrize("last", [False, True])
def test_parity_with_diffusers(beside_diffusers, guidance, last):
    backend, pipeline = beside_diffusers
    first = picture()
    final = picture(seed=1) if last else None
    request = {**SIZES, "negative_prompt": "blurry", "guidance_scale": guidance}
    task = task_for(image=first, last_image=final, seed=11, **request)
    latent, video = latent_and_video(Generator(backend), task)
    theirs, frames = diffusers_run(pipeline, task.params.prompt, 11, image=first, last_image=final, **request)
    print(f"latent {relative_error(latent, theirs):.1e}, frames {psnr(video, frames):.0f} dB")
    assert relative_error(latent, theirs) < 1e-4
    assert psnr(video, frames) >= 50
    if len(backend.model_pool) == 2:
        assert task.expert == 1  # both have run: the first step is the high-noise one's
    other = task_for(image=picture(seed=5), last_image=final, seed=11, **request)
    assert relative_error(latent_and_video(Generator(backend), other)[0], theirs) > 1e-3


def test_tensors_and_arrays_are_what_diffusers_makes_of_them(beside_diffusers):
    """Of the size asked for, floats are used as they are."""
    backend, pipeline = beside_diffusers
    pixels = torch.rand(3, 32, 48, generator=torch.Generator().manual_seed(4))
    theirs, _ = diffusers_run(
        pipeline, "a cat", 2, image=pixels, negative_prompt="blurry", guidance_scale=3.0, **SIZES
    )
    for image in (pixels, pixels[None], pixels.permute(1, 2, 0).numpy(), pixels.double()):
        task = task_for(
            prompt="a cat", seed=2, image=image, negative_prompt="blurry", guidance_scale=3.0, **SIZES
        )
        assert relative_error(latent_and_video(Generator(backend), task)[0], theirs) < 1e-4


@pytest.mark.parametrize("ending", ["png", "webp", "jpg"])
def test_a_file_is_the_picture_in_it(backend, tmp_path, ending):
    file = tmp_path / f"first.{ending}"
    picture().save(file, lossless=True)
    with Image.open(file) as image:
        pixels = np.array(image.convert("RGB"))
    results = [
        latent_and_video(Generator(backend), task_for(image=image, **SIZES))[0]
        for image in (file, str(file), pixels, Image.fromarray(pixels))
    ]
    assert all(torch.equal(result, results[0]) for result in results[1:])


def test_a_camera_s_orientation_is_followed(tmp_path):
    upright = picture(40, 60)
    exif = Image.Exif()
    exif[274] = 6  # turned by a quarter
    upright.rotate(90, expand=True).save(tmp_path / "turned.png", exif=exif)
    found = InputImage.of("image", tmp_path / "turned.png")
    assert (found.width, found.height) == (60, 40)
    assert np.array_equal(found.resized(40, 60) * 255, np.array(upright))


def test_sizes_follow_the_picture(backend):
    """The model's number of pixels, 32 x 32, in the picture's shape and whole patches."""
    found = {
        size: resolve_task(task_for(image=picture(*size)), backend.spec, "")
        for size in ((40, 40), (30, 120), (120, 30))
    }
    assert [(each.height, each.width) for each in found.values()] == [(32, 32), (16, 64), (64, 16)]
    full = FULL_SIZE["Wan2.2-I2V-A14B"]
    wide = resolve_task(task_for(image=picture(1080 // 8, 1920 // 8)), full, "")
    assert (wide.height, wide.width) == (464, 832)  # 480 * 832 pixels at 16:9, in steps of 16


def test_odd_sizes_are_cut_out_of_whole_patches(backend):
    """24 x 40 is computed as 32 x 48, whose border repeats the picture's edge."""
    first = picture(24, 40)
    latent, video = latent_and_video(
        Generator(backend), task_for(image=first, **SIZES | {"height": 24, "width": 40})
    )
    assert latent.shape[-2:] == (4, 6) and video.shape[-2:] == (24, 40)
    edged = np.pad(np.array(first), ((0, 8), (0, 8), (0, 0)), mode="edge")
    whole, frames = latent_and_video(Generator(backend), task_for(image=edged, **SIZES))
    assert torch.equal(latent, whole) and torch.equal(video, frames[..., :24, :40])


def test_the_recipe_knows_the_picture_and_gives_the_video_again(image_folder, tmp_path, make_config):
    file = tmp_path / "first.png"
    picture().save(file)
    with Engine(make_config(image_folder)) as engine:
        for name, image in (("one.npy", file), ("two.npy", read_back(tmp_path, "one.npy"))):
            image = image() if callable(image) else image
            task = engine.submit(
                DiffusionUserParams(
                    prompt="a cat", seed=1, image=image, save_path=str(tmp_path / name), **SIZES
                )
            )
            engine.run_until_idle()
            assert task.error is None
        assert np.array_equal(read_frames(tmp_path / "one.npy"), read_frames(tmp_path / "two.npy"))
        said = read_recipe(tmp_path / "one.npy")["params"]["image"]
        assert said["path"] == str(file) and len(said["sha256"]) == 64
        picture(seed=9).save(file)
        task = engine.submit(DiffusionUserParams(prompt="a cat", seed=1, image=said, **SIZES))
        while not task.is_finished():
            engine.step()
        assert "has changed" in task.error_message


def read_back(folder, name):
    return lambda: read_recipe(folder / name)["params"]["image"]


REFUSED = [
    ({"image": "nowhere.png"}, "no such file"),
    ({"image": __file__}, "cannot be read as a picture"),
    ({"image": 7}, "use a file's name"),
    ({"image": np.zeros((4, 4, 7), np.uint8)}, r"expected \[H, W, 3\]"),
    ({"image": torch.zeros(4, 4, 3)}, r"expected \[3, H, W\]"),
    ({"image": np.full((4, 4, 3), 300.0)}, "floats from 0 to 1"),
    ({"image": np.full((4, 4, 3), np.nan)}, "floats from 0 to 1"),
    ({"image": np.zeros((0, 4, 3), np.uint8)}, "0 of them|1 to"),
    ({"image": {"path": "x"}}, "use a file's name"),
    ({"image": "bad\0name"}, "image"),
    ({"last_image": "/dev/zero"}, "last_image"),
]


@pytest.mark.parametrize(("values", "said"), REFUSED)
def test_no_picture_is_refused_in_words(values, said):
    with pytest.raises(UsageError, match=said):
        DiffusionUserParams(prompt="a cat", **values)


def test_a_cut_file_is_refused_before_any_work(tmp_path):
    file = tmp_path / "cut.png"
    picture(200, 200).save(file)
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(UsageError, match="cannot be read as a picture"):
        DiffusionUserParams(prompt="a cat", image=file)


def test_what_a_model_can_do_with_a_picture(backend, tiny_folder):
    text = resolve_model(str(tiny_folder)).spec
    with pytest.raises(UsageError, match="use --image FILE"):
        resolve_task(task_for(), backend.spec, "")
    with pytest.raises(UsageError, match="takes none"):
        resolve_task(task_for(image=picture()), text, "")
    with pytest.raises(UsageError, match="num_frames = 5"):
        resolve_task(task_for(image=picture(), last_image=picture(), num_frames=1), backend.spec, "")
    stages = (CascadeStage(16, 16, 2), CascadeStage(32, 32, 2, 0.5))
    with pytest.raises(UsageError, match="image and cascade"):
        resolve_task(task_for(image=picture(), cascade=stages), backend.spec, "")


def test_both_layouts_hold_it(image_experts_folder, tmp_path):
    official = convert(image_experts_folder, tmp_path / "official", "official")
    back = convert(tmp_path / "official", tmp_path / "back", "diffusers")
    for folder in (official, back):
        assert folder.kind.takes_image and all(part.ok for part in verify(folder.path))
    config = json.loads((tmp_path / "official" / "low_noise_model" / "config.json").read_text())
    assert config["model_type"] == "i2v" and config["in_dim"] == 12
    index = json.loads((tmp_path / "back" / "model_index.json").read_text())
    assert index["_class_name"] == "WanImageToVideoPipeline" and index["boundary_ratio"] == 0.875
    (tmp_path / "official" / "chitu.json").unlink()
    assert resolve_model(str(tmp_path / "official"))[0].boundary == 0.9  # as its authors sample


def test_the_command_line(image_folder, tmp_path, chitu):
    picture().save(tmp_path / "first.png")
    words = ("generate", "a cat", "--model", image_folder, "--steps", 2, "--frames", 5, "--seed", 1)
    code, _, err = chitu(*words, "--image", "first.png", "-o", "a.npy", "--set", "infer.threads=1")
    assert code == 0, err
    assert read_frames(tmp_path / "a.npy").shape == (5, 16, 32, 3)  # 1024 pixels at 7:5, in steps of 16
    code, _, err = chitu(*words)
    assert code == 2 and "--image" in err
    code, _, err = chitu(*words, "--image", "nowhere.png")
    assert code == 2 and "--image" in err and "no such file" in err
    rows = [{"prompt": "a dog", "image": "first.png"}, {"prompt": "a cat", "image": "nowhere.png"}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    code, _, err = chitu("batch", "rows.jsonl", "--model", image_folder)
    assert code == 2 and "nowhere.png" in err


def test_one_video_for_a_whole_task(backend):
    """Through saving, by units, as any other task."""
    task = task_for(image=picture(), **SIZES)
    events = list(run_to_end(Generator(backend), task))
    assert events[-1].fraction == 1.0 and task.error is None
    assert task.buffer.conditioning is None


def on_two_ranks(rank: int, world: int, store: dist.Store, folder: str, out: str) -> None:
    """Rank 0 alone has the picture."""
    for number, layout in enumerate(({"ulysses": 2}, {"cfg": 2})):
        place = dist.PrefixStore(str(number), store)
        workers = WorkerGroup(ParallelPlan(**layout), rank, place, device=torch.device("cpu"))
        with Engine(config_for(Path(folder), Path(out)), workers=workers) as engine:
            if engine.is_driver:
                path = f"{out}/{number}.npy"
                engine.submit(DiffusionUserParams("a cat", seed=1, image=picture(), save_path=path, **SIZES))
                engine.run_until_idle()


def test_two_ranks_make_the_same_video(image_folder, tmp_path, make_config):
    with Engine(make_config(image_folder)) as engine:
        path = str(tmp_path / "alone.npy")
        engine.submit(DiffusionUserParams("a cat", seed=1, image=picture(), save_path=path, **SIZES))
        engine.run_until_idle()
    run_ranks(2, on_two_ranks, str(image_folder), str(tmp_path), errors=tmp_path)
    alone = read_frames(tmp_path / "alone.npy").astype(int)
    for number in range(2):
        # the layouts round apart by a bit of float32, and a frame by one of its 256 steps at the most
        assert np.abs(read_frames(tmp_path / f"{number}.npy") - alone).max() <= 1


def test_a_picture_that_is_stretched_is_said(backend):
    said = [run_first(backend, height, width).notes for height, width in ((48, 48), (40, 56))]
    assert "image of 70x50 is stretched to 48x48" in said[0][0] and said[1] == []


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_that_is_left_out_is_said(backend, tmp_path, mode):
    def notes_of(image):
        return " ".join(run_first(backend, 40, 56, image).notes)

    image = picture().convert("L" if mode == "LA" else "RGB")
    image.putalpha(255)
    opaque = image.copy()
    image.putpixel((3, 3), (*image.getpixel((3, 3))[:-1], 0))
    image = image.convert(mode) if mode != "P" else image.quantize()
    image.save(tmp_path / "first.png")
    for given in (image, str(tmp_path / "first.png")):
        assert notes_of(given).count("transparent pixels") == 1
        pixels = InputImage.of("image", given).resized(50, 70)
        assert np.array_equal(pixels, np.float32(image.convert("RGB")) / np.float32(255))
    assert "transparent" not in notes_of(opaque) + notes_of(picture())


def run_first(backend, height, width, image=None):
    task = task_for(image=image or picture(), height=height, width=width, num_frames=5, num_inference_steps=1)
    Generator(backend).generate_step(task)
    assert task.error is None, task.error_message
    return task


def test_only_formats_that_are_decoded_here_are_read(tmp_path, monkeypatch):
    """Pillow gives EPS to Ghostscript, which runs what stands in it."""
    asked = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *given, **more: asked.append(given))
    file = tmp_path / "first.png"
    picture().save(file, format="EPS")
    with pytest.raises(UsageError, match="cannot be read as a picture"):
        DiffusionUserParams(prompt="a cat", image=file)
    assert not asked


def test_a_picture_is_encoded_once(image_folder, tmp_path, make_config, monkeypatch):
    """Its latent is remembered by its content: another seed needs no VAE; another picture or size does."""
    backend = DiffusionBackend(make_config(image_folder))
    runs = []
    features = type(backend.vae)._features
    monkeypatch.setattr(
        type(backend.vae), "_features", lambda vae, *given: runs.append(1) or features(vae, *given)
    )
    first, second = (
        latent_and_video(Generator(backend), task_for(image=picture(), seed=seed, **SIZES))[0]
        for seed in (1, 1)
    )
    assert torch.equal(first, second) and len(runs) == 1
    latent_and_video(Generator(backend), task_for(image=picture(), last_image=picture(), **SIZES))
    latent_and_video(Generator(backend), task_for(image=picture(seed=3), **SIZES))
    latent_and_video(Generator(backend), task_for(image=picture(), **SIZES | {"width": 64}))
    assert len(runs) == 4
    with torch.no_grad():
        next(backend.vae.network.parameters()).mul_(1.5)
    changed, _ = latent_and_video(Generator(backend), task_for(image=picture(), seed=1, **SIZES))
    assert len(runs) == 5 and not torch.equal(changed, first)


@pytest.mark.parametrize("level", [0, 1, 4])
def test_memory_levels_encode_the_same(image_folder, tmp_path, level):
    backend = DiffusionBackend(config_for(image_folder, tmp_path))
    backend.low_mem_level = level
    size = SIZES | {"height": 80, "width": 144}
    request = resolve_task(task_for(image=picture(), **size), backend.spec, "")
    found = encode_keyframes(backend, request)
    with torch.no_grad():
        whole = backend.vae.encode(
            torch.cat(
                [
                    torch.from_numpy(request.image.resized(80, 144)).permute(2, 0, 1)[None, None],
                    torch.full((1, 8, 3, 80, 144), 0.5),
                ],
                dim=1,
            )
        )
    assert relative_error(found[:, 4:], whole) < 1e-5
