"""The rooms round the VAE and the text encoder, against the libraries' own pipeline."""

from __future__ import annotations

import secrets
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan, WanPipeline
from tiny_model import write_tiny_model
from torch import Tensor

from chitu_diffusion.errors import CheckpointError, UsageError
from chitu_diffusion.models.folder import read_folder
from chitu_diffusion.models.loading import load_text_encoder, load_vae
from chitu_diffusion.models.wan import vae_decoder
from chitu_diffusion.models.wan.text_encoder import TextEncoder, clean_prompt
from chitu_diffusion.models.wan.tokenizer import load_tokenizer
from chitu_diffusion.models.wan.vae import WanVAE


@pytest.fixture(autouse=True)
def fresh_numbers() -> None:
    seed = secrets.randbelow(2**31)
    print("torch seed", seed)  # shown when a test fails
    torch.manual_seed(seed)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model") / "one", seed=secrets.randbelow(2**31))


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> WanPipeline:
    return WanPipeline.from_pretrained(folder)


@pytest.fixture(scope="module")
def vae(folder: Path) -> WanVAE:
    return load_vae(read_folder(folder))


@pytest.fixture(scope="module")
def encoder(folder: Path) -> TextEncoder:
    return load_text_encoder(read_folder(folder))


def by_diffusers(network: AutoencoderKLWan, latent: Tensor) -> Tensor:
    """What `WanPipeline` does after its last step, and then what makes frames of it."""
    mean = torch.tensor(network.config.latents_mean).view(1, -1, 1, 1, 1)
    inverse = 1.0 / torch.tensor(network.config.latents_std).view(1, -1, 1, 1, 1)
    with torch.no_grad():
        pixels = network.decode(latent / inverse + mean, return_dict=False)[0]
    video: Tensor = (pixels / 2 + 0.5).clamp(0, 1).transpose(1, 2)
    return video


# -- VAE


@pytest.mark.parametrize("shape", [(1, 1, 2, 3), (2, 2, 4, 4), (1, 6, 3, 5)])
def test_decode_is_diffusers(shape: tuple[int, int, int, int], vae: WanVAE, pipeline: WanPipeline) -> None:
    latent = torch.randn(shape[0], 4, *shape[1:])
    expected = by_diffusers(pipeline.vae, latent)
    for frames_per_call in (None, 1, 2, 3):
        found = WanVAE(vae.network, frames_per_call).decode(latent)
        assert found.shape == (shape[0], 4 * (shape[1] - 1) + 1, 3, 8 * shape[2], 8 * shape[3])
        assert found.dtype == torch.float32
        # several frames a call round differently in the convolutions
        assert (found - expected).abs().max() < 1e-5


def test_encode_is_diffusers(vae: WanVAE, pipeline: WanPipeline) -> None:
    video = torch.rand(2, 9, 3, 16, 24)
    with torch.no_grad():
        latent = pipeline.vae.encode(video.transpose(1, 2) * 2 - 1).latent_dist.mode()
    mean, deviation = (
        torch.tensor(v).view(1, -1, 1, 1, 1)
        for v in (vae.network.config.latents_mean, vae.network.config.latents_std)
    )
    found = vae.encode(video)
    assert found.shape == (2, 4, 3, 2, 3)
    assert torch.allclose(found, (latent - mean) / deviation, atol=1e-5)


def test_decode_refuses(vae: WanVAE) -> None:
    with pytest.raises(UsageError, match="expected \\[B, 4, T, H, W\\]"):
        vae.decode(torch.zeros(1, 5, 1, 2, 2))
    with pytest.raises(UsageError, match="tile_size"):
        vae.decode_tiled(torch.zeros(1, 4, 1, 2, 2), 0)


# -- text

PROMPTS = [
    "A cat walking on grass",
    "  a red\tfish\n swims   left in the sea ",
    "two dogs &amp;amp; a bird, &quot;jump&quot;",
    "the sky is blue âœ” and â€œstaticâ€",  # UTF-8 once read as Latin
    "",
    "grass " * 700,
]


def test_encode_is_diffusers_pipeline(encoder: TextEncoder, pipeline: WanPipeline) -> None:
    expected, _ = pipeline.encode_prompt(PROMPTS, do_classifier_free_guidance=False, max_sequence_length=512)
    for prompts in (PROMPTS, PROMPTS[:5], PROMPTS[3:4]):
        rows = [PROMPTS.index(prompt) for prompt in prompts]
        found = encoder.encode(prompts)
        assert found.shape == (len(prompts), 512, 32)
        # another length sums the softmax in another order; single values near 0 may differ by more than their
        # own size
        assert (found - expected[rows]).norm() < 1e-5 * expected[rows].norm()
    ends = [len(encoder.tokenizer.ids(clean_prompt(prompt), 512)) for prompt in PROMPTS]
    found = encoder.encode(PROMPTS)
    for row, end in enumerate(ends):
        assert not found[row, end:].any() and found[row, :end].abs().sum(-1).min() > 0
    assert ends[-1] == 512


def test_autocast_does_not_reach_text_and_vae(encoder: TextEncoder, vae: WanVAE) -> None:
    latent = torch.randn(1, 4, 2, 2, 2)
    video = torch.rand(1, 5, 3, 16, 16)
    plain = encoder.encode(PROMPTS[:2]), vae.decode(latent), vae.decode_tiled(latent, 1), vae.encode(video)
    encoder._known.clear()
    with torch.autocast("cpu", torch.float16):
        again = (
            encoder.encode(PROMPTS[:2]),
            vae.decode(latent),
            vae.decode_tiled(latent, 1),
            vae.encode(video),
        )
    for found, expected in zip(again, plain, strict=True):
        assert torch.equal(found, expected)


def test_an_embedding_does_not_depend_on_its_company(encoder: TextEncoder) -> None:
    alone = encoder.encode(PROMPTS[:1])
    encoder._known.clear()
    assert torch.equal(alone, encoder.encode(PROMPTS)[:1])


def test_a_prompt_is_encoded_once(folder: Path) -> None:
    """By content after cleaning; again only when the weights are others, or when it was pushed out."""
    encoder = load_text_encoder(read_folder(folder))
    runs = []
    encoder.network.register_forward_hook(lambda _module, inputs, _output: runs.append(inputs[0].shape))
    device = torch.device("cpu")
    assert encoder.recall(["a cat"], device) is None
    first = encoder.encode(["a cat", "blurry", " a  cat\n"])
    assert len(runs) == 2 and torch.equal(first[0], first[2]) and not torch.equal(first[0], first[1])
    recalled = encoder.recall(["blurry", "a cat"], device)
    assert recalled is not None and torch.equal(recalled, first[[1, 0]]) and len(runs) == 2
    first[0] += 1  # what was handed out is the caller's own
    assert torch.equal(encoder.encode(["a cat"])[0], recalled[1]) and len(runs) == 2
    with torch.no_grad():
        encoder.network.shared.weight.mul_(1.5)
    assert encoder.recall(["a cat"], device) is None
    assert not torch.equal(encoder.encode(["a cat"])[0], recalled[1]) and len(runs) == 3
    encoder.bfloat16()
    assert encoder.encode(["a cat"]).dtype == torch.bfloat16 and len(runs) == 4
    encoder.encode([f"a {word} cat" for word in range(64)])
    assert encoder.recall(["a cat"], device) is None and len(encoder._known) == 64
    assert encoder.recall(["a 63 cat", "a 0 cat"], device) is not None


def test_cleaning() -> None:
    assert clean_prompt(" a &amp;lt;b&amp;gt;\u00a0 c\u2003\r\nd ") == "a <b> c d"
    assert clean_prompt("\x1ca\x1fb&#28;") == "ab"


def test_a_tokenizer_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="tokenizer is missing"):
        load_tokenizer(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="tokenizer cannot be read"):
        load_tokenizer(tmp_path / "empty")


# -- strips, one a rank


@pytest.mark.parametrize("axis", [-1, -2])
def test_strips_are_the_whole_frame_cut_up(axis: int, vae: WanVAE) -> None:
    latent = torch.randn(1, 4, 3, 4, 44)
    latent = latent if axis == -1 else latent.transpose(-1, -2)
    whole = vae.decode(latent)
    for low, high in ((0, 22), (22, 44), (15, 16)):
        expected = whole.narrow(axis, 8 * low, 8 * (high - low))
        assert (vae.decode_strip(latent, low, high, axis) - expected).abs().max() < 1e-5


def test_a_strip_takes_no_neighbour_that_does_not_matter(
    vae: WanVAE, monkeypatch: pytest.MonkeyPatch
) -> None:
    latent = torch.randn(1, 4, 2, 3, 44)
    expected = vae.decode(latent)[..., 8 * 20 : 8 * 22]
    reaches = vae_decoder.reaches(vae.network.decoder)
    assert reaches == [9, 8, 7, 5, 1]  # two residual blocks a stage; with Wan2.1's three: 13, 12, 10, 7, 1
    monkeypatch.setattr(vae_decoder, "reaches", lambda _decoder: [reach - 1 for reach in reaches])
    assert (vae.decode_strip(latent, 20, 22) - expected).abs().max() > 1e-4
