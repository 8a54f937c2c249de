"""The shipped model as a thing: its size, its files, its autoencoder, and tiles of real frames."""

import pytest
import torch
from conftest import WAN_TINY
from running import psnr

from chitu_diffusion.models.folder import read_folder
from chitu_diffusion.models.loading import load_vae
from training.world import draw, sample_specs

MIB = 2**20


@pytest.fixture(scope="module")
def vae():
    torch.set_num_threads(1)
    return load_vae(read_folder(WAN_TINY), dtype=torch.float32)


@pytest.fixture(scope="module")
def clips():
    """[2, 17, 3, 128, 128] in [0, 1], fresh."""
    specs = sample_specs(2, torch.Generator().manual_seed(torch.seed() % 2**31), "all")
    return draw(specs, 128, 128, 17).transpose(1, 2) / 2 + 0.5


def test_it_travels_light():
    sizes = {file: file.stat().st_size for file in WAN_TINY.rglob("*") if file.is_file()}
    assert sum(sizes.values()) <= 28 * MIB
    assert max(sizes.values()) < 16 * MIB
    assert (WAN_TINY / "README.md").exists()


def test_reconstruction(vae):
    """35.6 dB is the mean over many clips of the default size; the aim is 30, which four clips reach on
    average.
    """
    specs = sample_specs(4, torch.Generator().manual_seed(torch.seed() % 2**31), "all")
    videos = draw(specs, 128, 128, 33).transpose(1, 2) / 2 + 0.5
    found = [psnr(vae.decode(vae.encode(video[None])), video[None]) for video in videos]
    assert sum(found) / 4 >= 30, (found, specs.words())


def test_tiles_of_real_frames_have_no_seams(vae, clips):
    latent = vae.encode(clips)
    whole, tiled = vae.decode(latent), vae.decode_tiled(latent, tile_size=8)
    assert psnr(tiled, whole) >= 45
    # a seam would be a step at the tiles' edge, column 64, that the untiled decode does not have
    step = (tiled[..., 64] - tiled[..., 63]).abs().mean() - (whole[..., 64] - whole[..., 63]).abs().mean()
    assert step.abs() < 1e-3


def test_latents_are_normalised(vae, clips):
    """The statistics in the VAE's config are those of its latents: what the transformer sees is near N(0,
    1).
    """
    latent = vae.encode(clips)
    assert latent.mean().abs() < 0.5
    assert 0.6 < latent.std() < 1.5
