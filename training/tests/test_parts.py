"""The training code: each part beside what it must equal, and the road from weights to a folder."""

import pytest
import torch
from diffusers import WanPipeline

from chitu_diffusion.models.wan.transformer import WanTransformer
from training import autoencoder, denoiser, export, latents, text
from training.clock import Clock, learning_rate
from training.muon import Muon, orthogonal


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return text.make_tokenizer(tmp_path_factory.mktemp("run"))


@pytest.mark.parametrize("frames", [1, 5, 9])
def test_whole_clip_is_diffusers_frame_by_frame(frames):
    """Training runs clips whole; diffusers walks them with caches. The same function, float32 rounding
    apart.
    """
    vae = autoencoder.build().eval()
    net = autoencoder.WholeClip(vae)
    video = torch.rand(1, 3, frames, 32, 48) * 2 - 1
    with torch.no_grad():
        mean, log_variance = net.encode(video)
        theirs = vae.encode(video).latent_dist
        torch.testing.assert_close(mean, theirs.mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(log_variance, theirs.logvar, rtol=1e-4, atol=1e-5)
        back = net.decode(mean).clamp(-1, 1)
        torch.testing.assert_close(back, vae.decode(mean).sample, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("shape", [(3, 8, 20), (2, 20, 8), (1, 6, 6)])
def test_orthogonal_brings_singular_values_near_one(shape):
    values = torch.linalg.svdvals(orthogonal(torch.randn(*shape)))
    assert values.min() > 0.3, (
        "Newton-Schulz with these coefficients ends between about 0.7 and 1.2 for usual matrices"
    )
    assert values.max() < 1.35


def test_muon_fits_matrices_and_kernels():
    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(8, 12)), torch.nn.Parameter(torch.randn(4, 3, 2, 2, 2))]
    targets = [torch.randn_like(w) for w in weights]
    solver = Muon(weights, lr=0.2)
    losses = []
    for step in range(200):
        solver.param_groups[0]["lr"] = 0.2 * (1 - step / 200)
        loss = sum((w - t).square().mean() for w, t in zip(weights, targets, strict=True))
        losses.append(loss.item())
        solver.zero_grad()
        loss.backward()
        solver.step()
    assert losses[-1] < 0.02 * losses[0]


def test_padding_row_stands_for_all_padding(tokenizer):
    """41 rows with a bias give what 512 rows give: what is trained is what diffusers runs."""
    torch.manual_seed(1)
    encoder = text.build_encoder(len(tokenizer)).eval()
    model = WanTransformer(denoiser.CONFIG)
    model.init_weights()
    torch.nn.init.normal_(model.proj_out.weight, std=0.05)
    ids = text.tokenize(tokenizer, ["A cat walking on grass", ""])
    with torch.no_grad():
        rows, bias = text.encode(encoder, ids)
        lengths = (ids != 0).sum(1).tolist()
        whole = torch.zeros(2, text.TEXT_POSITIONS, text.WIDTH)
        for row, length in enumerate(lengths):
            whole[row, :length] = rows[row, :length]
        latent = torch.randn(2, 16, 2, 4, 4)
        time = torch.tensor([900.0, 100.0])
        short = model(latent, rows, time, text_bias=bias)
        long = model(latent, whole, time)
    assert (short - long).norm() / long.norm() < 1e-5


def test_gradient_checkpointing_changes_no_gradient(tokenizer):
    torch.manual_seed(2)
    nets = denoiser.build(len(tokenizer), torch.device("cpu"))
    torch.nn.init.normal_(nets.dit.proj_out.weight, std=0.05)
    ids = text.tokenize(tokenizer, ["a red dog"] * 2)
    empty = text.tokenize(tokenizer, [""])[0]
    latent = torch.randn(2, 16, 2, 4, 4)
    gradients = []
    for enabled in (False, True):
        nets.dit.enable_gradient_checkpointing(enabled)
        nets.dit.zero_grad()
        torch.manual_seed(3)
        denoiser.loss_of(nets, latent, ids, empty).backward()
        gradients.append(nets.dit.blocks[0].ffn.net[2].weight.grad.clone())
    torch.testing.assert_close(gradients[0], gradients[1])
    assert gradients[0].abs().max() > 0


def test_weights_survive_keep_and_export(tokenizer, tmp_path):
    """A run's averaged weights -> a folder that diffusers opens, with the very tensors (in bfloat16)."""
    nets = denoiser.build(len(tokenizer), torch.device("cpu"))
    solvers = denoiser.optimizers(nets)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    denoiser.keep(tmp_path / "dit.pt", nets, solvers, step=7, spent=1.5)
    other = denoiser.build(len(tokenizer), torch.device("cpu"))
    assert denoiser.restore(tmp_path / "dit.pt", other, denoiser.optimizers(other), torch.device("cpu")) == (
        7,
        1.5,
    )
    vae = autoencoder.build()
    autoencoder.keep(tmp_path / "vae.pt", vae, [p.detach() for p in vae.parameters()], [], 1, 1.0)
    latents.save_statistics(tmp_path, torch.arange(16.0), torch.ones(16))
    export.export(tmp_path, tmp_path / "out")
    pipeline = WanPipeline.from_pretrained(tmp_path / "out", torch_dtype=torch.float32)
    assert pipeline.vae.config.latents_mean == [float(i) for i in range(16)]
    for name, value in pipeline.transformer.state_dict().items():
        assert torch.equal(value, nets.dit.state_dict()[name].bfloat16().float()), name
    export.start_from(tmp_path / "out", tmp_path / "again")
    again = denoiser.build(len(tokenizer), torch.device("cpu"))
    assert denoiser.take_average(tmp_path / "again", again)
    assert torch.equal(again.dit.proj_out.bias, nets.dit.proj_out.bias.bfloat16().float())
    assert torch.equal(again.encoder.shared.weight, nets.encoder.shared.weight.bfloat16().float())
    started = autoencoder.load(tmp_path / "again", torch.device("cpu"))
    assert torch.equal(started.decoder.conv_in.weight, vae.decoder.conv_in.weight.bfloat16().float())
    assert sum(f.stat().st_size for f in (tmp_path / "out").rglob("*") if f.is_file()) <= 28 * 2**20


def test_dial():
    assert learning_rate(0.0) == 0.0
    assert learning_rate(0.3) == 1.0
    assert learning_rate(1.0) == pytest.approx(0.0, abs=1e-9)
    assert Clock(0.0).over
    clock = Clock(10.0, spent=540.0)
    assert clock.progress == pytest.approx(0.9, abs=1e-3)
    assert not clock.over
