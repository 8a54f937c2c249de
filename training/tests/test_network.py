"""The training's forward beside diffusers' own, with a time for each token."""

import torch
from diffusers import WanTransformer3DModel

from chitu_diffusion.models.wan.transformer import WanTransformer
from training import denoiser, network, text


def test_two_times_are_diffusers_time_of_each_token(tmp_path):
    """Float32 against float32, whose order of sums differs: 1e-5 of the velocity."""
    torch.manual_seed(0)
    dit = WanTransformer(denoiser.CONFIG)
    dit.init_weights()
    torch.nn.init.normal_(dit.proj_out.weight, std=0.05)
    theirs = WanTransformer3DModel.from_config(denoiser.CONFIG.to_json()).eval()
    theirs.load_state_dict(dit.state_dict())
    encoder = text.build_encoder(64).eval()
    ids = torch.randint(1, 64, (2, 20))
    ids[0, 5:] = 0
    latent = torch.randn(2, 16, 3, 8, 12)
    time = torch.tensor([700.0, 200.0])
    first = torch.tensor([0.0, 200.0])
    each = time[:, None].repeat(1, 3 * 24)
    each[:, :24] = first[:, None]
    with torch.no_grad():
        rows, bias = text.encode(encoder, ids)
        whole = torch.zeros(2, text.TEXT_POSITIONS, text.WIDTH)
        for row, length in enumerate((ids != 0).sum(1).tolist()):
            whole[row, :length] = rows[row, :length]
        ours = network.Velocity(dit)(latent, rows, bias, time, first)
        expected = theirs(latent, each, whole, return_dict=False)[0]
    assert (ours - expected).norm() / expected.norm() < 1e-5
