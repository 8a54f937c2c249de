"""Wan2.1's image to video and first-and-last-frame, whose networks attend to an image encoder's rows, beside
diffusers' own `WanImageToVideoPipeline`.
"""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from PIL import Image
from running import CAT, config_for, latent_and_video, psnr, relative_error, task_for
from test_image_to_video import picture
from test_pipeline_parity import diffusers_run
from tiny_model import write_tiny_model

from chitu_diffusion.backend import DiffusionBackend
from chitu_diffusion.errors import UsageError
from chitu_diffusion.generator import Generator
from chitu_diffusion.memory.offload import OffloadManager, OffloadPart
from chitu_diffusion.models.convert import convert
from chitu_diffusion.models.image_preprocessing import ImagePreprocessing
from chitu_diffusion.models.kinds import PARTS
from chitu_diffusion.models.registry import FULL_SIZE
from chitu_diffusion.models.wan.image_encoder import ImageEncoder
from chitu_diffusion.pipelines.request import resolve_task

SIZES = {"height": 32, "width": 48, "num_frames": 9, "num_inference_steps": 3, "negative_prompt": "blurry"}
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
LONG = {**SIZES, "height": 48, "width": 32, "num_frames": 5}


@pytest.fixture(scope="module")
def folders(frames_folder, tmp_path_factory):
    """By the number of pictures that the networks tell apart."""
    one = write_tiny_model(tmp_path_factory.mktemp("models") / "one", image=True, clip=1, seed=5)
    return {1: one, 2: frames_folder}


@pytest.fixture(scope="module")
def backends(folders, tmp_path_factory):
    outputs = tmp_path_factory.mktemp("outputs")
    return {clip: DiffusionBackend(config_for(folder, outputs)) for clip, folder in folders.items()}


@pytest.fixture(scope="module")
def pipelines(folders):
    from diffusers import WanImageToVideoPipeline

    made = {clip: WanImageToVideoPipeline.from_pretrained(folder) for clip, folder in folders.items()}
    for pipeline in made.values():
        pipeline.set_progress_bar_config(disable=True)
    return made


@pytest.mark.parametrize("clip", [1, 2])
@pytest.mark.parametrize(
    ("sizes", "guidance", "seed"), [(SIZES, 5.0, 11), (LONG, 5.0, 12), (SIZES, 1.0, 12), (LONG, 1.0, 11)]
)
def test_parity_with_diffusers(backends, pipelines, clip, sizes, guidance, seed):
    images = {"image": picture(), "last_image": picture(60, 44, seed=1) if clip == 2 else None}
    request = {**sizes, "guidance_scale": guidance}
    task = task_for(seed=seed, **images, **request)
    latent, video = latent_and_video(Generator(backends[clip]), task)
    theirs, frames = diffusers_run(pipelines[clip], task.params.prompt, seed, **images, **request)
    print(f"latent {relative_error(latent, theirs):.1e}, frames {psnr(video, frames):.0f} dB")
    assert relative_error(latent, theirs) < 1e-4
    assert psnr(video, frames) >= 50


@pytest.mark.parametrize(("other", "bound"), [(0, 1e-4), (3, None)])
def test_a_last_image_without_places_is_seen_by_the_vae_alone(backends, pipelines, monkeypatch, other, bound):
    """diffusers fails there, having rows of two pictures for one latent; with the first's alone it is ours,
    with another picture's it is not.
    """
    images = {"image": picture(), "last_image": picture(seed=1)}
    latent, _ = latent_and_video(Generator(backends[1]), task_for(seed=2, **images, **SIZES))
    rows = pipelines[1].encode_image(picture(seed=other), torch.device("cpu"))
    monkeypatch.setattr(pipelines[1], "encode_image", lambda images, device: rows)
    theirs, _ = diffusers_run(pipelines[1], CAT, 2, **images, **SIZES)
    error = relative_error(latent, theirs)
    assert error < bound if bound else error > 1e-3


@pytest.mark.parametrize("size", [(28, 28), (50, 70), (311, 97), (28, 1000), (1, 1), (3, 2), (720, 1280)])
def test_the_encoder_is_shown_what_transformers_shows_it(backends, pipelines, size):
    shown = picture(*size)
    expected = pipelines[1].image_processor(images=shown, return_tensors="pt")["pixel_values"]
    found = backends[1].image_encoder.preprocessing.cropped(np.asarray(shown))
    assert (found - expected).abs().max() < 1e-6


@pytest.mark.parametrize(
    "size", [(480, 832), (832, 480), (720, 1280), (33, 900), (900, 33), (223, 224), (20, 50)]
)
@pytest.mark.parametrize("side", [28, 224])
def test_the_middle_is_rounded_as_transformers_rounds_it(size, side):
    """Noise, of which a shift by a fiftieth of a pixel shows."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    shown = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    processor = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    expected = processor(images=Image.fromarray(shown), return_tensors="pt")["pixel_values"]
    found = ImagePreprocessing(edge=side, side=side).cropped(shown)
    assert (found - expected).abs().max() < 1e-6


def test_the_official_layout_gives_the_same_bits(backends, folders, make_config, tmp_path):
    for clip, images in ((1, {}), (2, {"last_image": picture(seed=1)})):
        convert(folders[clip], tmp_path / f"{clip}", "official")
        official = DiffusionBackend(make_config(tmp_path / f"{clip}"))
        first, second = (
            latent_and_video(Generator(backend), task_for(image=picture(), **images, **SIZES))[0]
            for backend in (backends[clip], official)
        )
        assert torch.equal(first, second)


@pytest.mark.parametrize("size", [(1, 3000), (9000, 2), (5, 5)])
@pytest.mark.parametrize("way", ["cropped", "squashed"])
def test_the_encoder_is_shown_pictures_of_any_shape(backends, size, way):
    """A flat colour stays that colour."""
    preprocessing = backends[1].image_encoder.preprocessing
    found = getattr(preprocessing, way)(np.full((*size, 3), 128, np.uint8))
    expected = (128 / 255 - torch.tensor(CLIP_MEAN)) / torch.tensor(CLIP_STD)
    assert found.shape == (1, 3, 28, 28) and torch.allclose(found.mean(dim=(0, 2, 3)), expected, atol=1e-5)


@torch.no_grad()
def test_official_preprocessing_is_the_authors(backends, pipelines):
    """Written down from their code (wan/image2video.py, modules/clip.py), with diffusers' own networks."""
    task = task_for(image=picture(), image_preprocessing="official", **SIZES)
    Generator(backends[1]).generate_step(task)
    assert task.error is None, task.error_message
    found = task.buffer.conditioning
    image = torch.from_numpy(np.array(picture())).permute(2, 0, 1)[None] / 255 * 2 - 1
    frame = torch.nn.functional.interpolate(image, size=(32, 48), mode="bicubic")
    video = torch.cat([frame[:, :, None], torch.zeros(1, 3, 8, 32, 48)], dim=2)
    vae = pipelines[1].vae
    latent = vae.encode(video).latent_dist.mode()
    mean, std = (
        torch.tensor(each).view(1, -1, 1, 1, 1) for each in (vae.config.latents_mean, vae.config.latents_std)
    )
    assert relative_error(found.concat_latents[:, 4:], (latent - mean) / std) < 1e-5
    square = torch.nn.functional.interpolate(image, size=(28, 28), mode="bicubic") * 0.5 + 0.5
    means, stds = (torch.tensor(each).view(3, 1, 1) for each in (CLIP_MEAN, CLIP_STD))
    states = pipelines[1].image_encoder((square - means) / stds, output_hidden_states=True).hidden_states
    assert relative_error(found.image, states[-2]) < 1e-5
    usual = task_for(image=picture(), **SIZES)
    Generator(backends[1]).generate_step(usual)
    assert relative_error(usual.buffer.conditioning.image, found.image) > 1e-2
    assert relative_error(usual.buffer.conditioning.concat_latents, found.concat_latents) > 1e-3


def test_both_branches_share_the_pictures_keys(frames_folder, make_config, monkeypatch):
    """Run one after the other, as a long sequence's are."""
    backend = DiffusionBackend(make_config(frames_folder, infer__diffusion__cfg_batch="sequential"))
    asked = []
    for block in backend.model_pool[0].blocks:
        keys = block.attn2.image_keys
        monkeypatch.setattr(block.attn2, "image_keys", lambda rows, keys=keys: asked.append(1) or keys(rows))
    task = task_for(image=picture(), last_image=picture(seed=1), guidance_scale=5.0, **SIZES)
    latent_and_video(Generator(backend), task)
    assert len(asked) == len(backend.model_pool[0].blocks)


def test_a_picture_is_encoded_once(backends, monkeypatch):
    """Again by the same picture, in whichever form; anew with another preprocessing."""
    encoder = backends[2].image_encoder
    fresh = ImageEncoder(copy.deepcopy(encoder.network), encoder.preprocessing)
    monkeypatch.setitem(backends[2]._networks.parts, "image_encoder", fresh)
    seen = []
    fresh.network.vision_model.register_forward_hook(lambda *given: seen.append(1))
    used = []
    monkeypatch.setattr(backends[2].offload, "use", used.append)

    def rows(**more):
        task = task_for(**{"image": picture(), "last_image": picture(seed=1)} | SIZES | more)
        Generator(backends[2]).generate_step(task)
        assert task.error is None, task.error_message
        return task.buffer.conditioning.image

    first = rows()
    assert first.shape == (1, 10, 24) and len(seen) == 2
    assert torch.equal(rows(height=48), first) and len(seen) == 2 and used.count("image_encoder") == 1
    assert torch.equal(rows(last_image=picture())[:, :5], first[:, :5]) and len(seen) == 2
    assert not torch.equal(rows(image_preprocessing="official"), first) and len(seen) == 4
    with torch.no_grad():
        next(fresh.network.parameters()).add_(1)
    assert not torch.equal(rows(), first) and len(seen) == 6


@pytest.mark.parametrize("level", [1, 2, 3, 4])
def test_every_memory_level_gives_the_same_bits(backends, frames_folder, make_config, level):
    images = {"image": picture(), "last_image": picture(seed=1)}
    expected, _ = latent_and_video(Generator(backends[2]), task_for(**images, **SIZES))
    lower = DiffusionBackend(make_config(frames_folder, infer__diffusion__low_mem_level=level))
    found, _ = latent_and_video(Generator(lower), task_for(**images, **SIZES))
    assert torch.equal(found, expected)


def test_the_encoder_leaves_the_device_from_level_2(frames_folder, make_config):
    """On a CPU whose memory is pretended to be two."""
    backend = DiffusionBackend(make_config(frames_folder))
    parts = {role: OffloadPart(part, PARTS[role].kind) for role, part in backend._networks.parts.items()}
    backend.offload = OffloadManager(torch.device("cpu"), parts=parts, level=2, apart=True)
    backend.offload.place()
    Generator(backend).generate_step(task_for(image=picture(), last_image=picture(), **SIZES))
    assert backend.offload.on_device() == {"transformer", "vae"}
    assert backend.memory_estimate().parts["image_encoder"][0] == "encoder"


def test_what_a_request_must_and_may_have(backends, image_folder, frames_folder):
    two = backends[2].spec
    with pytest.raises(UsageError, match="--last-image FILE"):
        resolve_task(task_for(image=picture()), two, "")
    with pytest.raises(UsageError, match="use diffusers or official"):
        task_for(image=picture(), image_preprocessing="nearest")
    text = FULL_SIZE["Wan2.1-T2V-14B"]
    with pytest.raises(UsageError, match="it is of an image"):
        resolve_task(task_for(image_preprocessing="official"), text, "")
    assert resolve_task(task_for(image=picture()), backends[1].spec, "").image_preprocessing == "diffusers"
    assert resolve_task(task_for(), text, "").image_preprocessing is None


def test_a_shape_that_no_video_has_is_refused():
    with pytest.raises(UsageError, match=r"^image: it has 3000x1 pixels, .* 34608x16; use height and width"):
        resolve_task(task_for(image=np.zeros((1, 3000, 3), np.uint8)), FULL_SIZE["Wan2.2-I2V-A14B"], "")


@pytest.mark.parametrize(
    ("model", "shape", "size"),
    [
        ("Wan2.1-I2V-14B-480P", (1080, 1920), (464, 832)),
        ("Wan2.1-I2V-14B-480P", (480, 832), (480, 832)),
        ("Wan2.1-I2V-14B-480P", (1000, 1000), (624, 624)),
        ("Wan2.1-I2V-14B-720P", (720, 1280), (720, 1280)),
        ("Wan2.1-FLF2V-14B-720P", (1920, 1080), (1280, 720)),
        ("Wan2.2-I2V-A14B", (576, 1000), (464, 832)),  # 479.6 rows are not 480
    ],
)
def test_a_picture_gives_the_authors_size(model, shape, size):
    spec = FULL_SIZE[model]
    assert spec.size_of_shape(*shape) == size
    ratio = shape[0] / shape[1]
    area = spec.defaults.height * spec.defaults.width
    # the small number is for floats, in which 480 is 479.99999999999994, and would be 464
    theirs = [(np.sqrt(exact) + 1e-9) // 8 // 2 * 2 * 8 for exact in (area * ratio, area / ratio)]
    assert list(size) == theirs


def test_the_plan_says_what_the_picture_decides(frames_folder, tmp_path, chitu):
    picture(40, 80).save(tmp_path / "first.png")
    images = ("--image", "first.png", "--last-image", "first.png")
    words = ("generate", "a cat", "--model", frames_folder, *images)
    code, out, err = chitu(*words, "--image-preprocessing", "official", "--dry-run")
    assert code == 0, err
    assert "32x16 is the image's shape at the model's own area" in out + err
    assert "last image of 80x40" not in out + err
    code, out, err = chitu(*words, "--size", "48x32", "--dry-run", "--json")
    assert code == 0 and "own area" not in out and "last image of 80x40 is stretched to 48x32" in out
    assert '"image_preprocessing": "diffusers"' in out
    code, _, err = chitu(*words, "--image-preprocessing", "nearest")
    assert code == 2 and "--image-preprocessing 'nearest': use diffusers or official" in err
