"""The shipped autoencoder on the world it was trained for."""

import pytest
import torch

from chitu_diffusion.evaluation.compare import psnr
from chitu_diffusion.models.folder import read_folder
from chitu_diffusion.models.loading import load_vae
from chitu_diffusion.models.registry import ASSETS, TINY
from training.world import draw, sample_specs


@pytest.fixture(scope="module")
def vae():
    return load_vae(read_folder(ASSETS / TINY), dtype=torch.float32)


def fresh_clips(count: int, frames: int) -> torch.Tensor:
    """[count, frames, 3, 128, 128] in [0, 1]."""
    specs = sample_specs(count, torch.Generator().manual_seed(torch.seed() % 2**31), "all")
    return draw(specs, 128, 128, frames).transpose(1, 2) / 2 + 0.5


def test_reconstruction(vae):
    """35.6 dB is the mean over many clips of the default size; the aim is 30, which four clips reach on
    average.
    """
    found = [psnr(vae.decode(vae.encode(video[None])), video[None]) for video in fresh_clips(4, 33)]
    assert sum(found) / 4 >= 30, (found, torch.initial_seed())


def test_latents_are_normalised(vae):
    """The statistics in the VAE's config are those of its latents: what the transformer sees is near N(0,
    1).
    """
    latent = vae.encode(fresh_clips(2, 17))
    assert latent.mean().abs() < 0.5
    assert 0.6 < latent.std() < 1.5
