"""The shipped model as a thing: its size, its files, and its autoencoder in tiles."""

import torch
from conftest import WAN_TINY
from running import relative_error

from chitu_diffusion.models.folder import read_folder
from chitu_diffusion.models.loading import load_vae

MIB = 2**20


def test_it_travels_light():
    sizes = {file: file.stat().st_size for file in WAN_TINY.rglob("*") if file.is_file()}
    assert sum(sizes.values()) <= 28 * MIB
    assert max(sizes.values()) < 16 * MIB
    assert (WAN_TINY / "README.md").exists()


def test_tiles_are_the_whole_frame():
    vae = load_vae(read_folder(WAN_TINY), dtype=torch.float32)
    latent = vae.encode(torch.rand(1, 5, 3, 96, 128))
    assert relative_error(vae.decode_tiled(latent, tile_size=8), vae.decode(latent)) < 1e-5
