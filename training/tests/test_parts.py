"""The training code: each part beside what it must equal, and the road from weights to a folder."""

import math
from types import SimpleNamespace

import pytest
import torch
from diffusers import WanPipeline, WanTransformer3DModel
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast

from chitu_diffusion.models.kinds import TEXT_IMAGE_TO_VIDEO
from chitu_diffusion.models.registry import TINY, resolve_model
from chitu_diffusion.models.wan.transformer import WanTransformer
from training import adapters, autoencoder, denoiser, export, latents, sampling, text
from training.clock import Clock, learning_rate
from training.muon import Muon, orthogonal
from training.world import chinese, vocabulary_corpus


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
    dit = denoiser.build(len(tokenizer), torch.device("cpu")).dit
    torch.nn.init.normal_(dit.proj_out.weight, std=0.05)
    latent = torch.randn(2, 16, 2, 4, 4)
    words = torch.randn(2, 8, text.WIDTH)
    gradients = []
    for enabled in (False, True):
        dit.enable_gradient_checkpointing(enabled)
        dit.zero_grad()
        dit(latent, words, torch.tensor([300.0, 800.0])).square().mean().backward()
        gradients.append(dit.blocks[0].ffn.net[2].weight.grad.clone())
    torch.testing.assert_close(gradients[0], gradients[1])
    assert gradients[0].abs().max() > 0


def test_the_loss_passes_over_a_known_first_frame(monkeypatch, tokenizer):
    """With every first frame known, the velocity there counts for nothing, and the network sees it clean."""
    monkeypatch.setattr(denoiser, "PICTURE_SHARE", 1.0)
    latent = torch.randn(3, 16, 3, 4, 4)
    seen = []

    def velocity(x, words, bias, time, first):
        seen.append((x, time, first))
        return torch.cat([torch.full_like(x[:, :, :1], 99.0), torch.zeros_like(x[:, :, 1:])], dim=2)

    error = denoiser.velocity_error(velocity, latent, None, None)
    x, time, first = seen[0]
    assert torch.equal(x[:, :, 0], latent[:, :, 0])
    assert (first == 0).all()
    assert (time > 0).all()
    assert error < 10, "noise - latent has variance 2; 99 squared would show"


def test_some_captions_are_dropped(tokenizer):
    nothing = denoiser.unconditional(tokenizer, torch.device("cpu"))
    ids = text.tokenize(tokenizer, ["a red dog"] * 4000)
    torch.manual_seed(5)
    found = denoiser.dropped(ids, nothing)
    empty = (found == nothing[0]).all(1).float().mean()
    same = (found == ids[0]).all(1).float().mean()
    # three deviations of a share of 4000
    assert abs(empty - denoiser.EMPTY_SHARE) < 0.014
    assert abs(same - 1 + denoiser.EMPTY_SHARE + denoiser.NEGATIVE_SHARE) < 0.02


def test_a_grown_tokenizer_reads_old_captions_as_before(tmp_path):
    lines = list(vocabulary_corpus(2000, seed=12))
    old = PreTrainedTokenizerFast(tokenizer_object=text.train_tokenizer(lines), unk_token=text.UNKNOWN)
    old.save_pretrained(tmp_path)
    text.grow_tokenizer(tmp_path)
    grown = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    text.grow_tokenizer(tmp_path)
    assert len(PreTrainedTokenizerFast.from_pretrained(tmp_path)) == len(grown)
    assert old(lines).input_ids == grown(lines).input_ids
    assert grown.unk_token_id not in grown("一只红色的猫在草地上向左走。").input_ids
    rows = text.grown_rows(torch.randn(len(old), 8), grown)
    assert len(rows) == len(grown)


def test_an_adapter_changes_nothing_until_it_has_learned(tokenizer, tmp_path):
    torch.manual_seed(6)
    nets = denoiser.build(len(tokenizer), torch.device("cpu"))
    torch.nn.init.normal_(nets.dit.proj_out.weight, std=0.05)
    student, found = adapters.wrapped(nets, rank=4, compiled=False)
    inputs = (
        torch.randn(2, 16, 2, 4, 4),
        torch.randn(2, 8, text.WIDTH),
        torch.zeros(2, 8),
        torch.rand(2),
        torch.rand(2),
    )
    with torch.no_grad():
        assert torch.equal(student.velocity(*inputs), nets.velocity(*inputs))
    average = [torch.randn_like(p) * 0.1 for each in found.values() for p in (each.down, each.up)]
    adapters.use(found, average)
    adapters.save(tmp_path / "a.safetensors", found, average, "test")
    pipeline = WanTransformer3DModel.from_config(denoiser.CONFIG.to_json()).eval()
    pipeline.load_state_dict(nets.dit.state_dict())
    values = load_file(tmp_path / "a.safetensors")
    with torch.no_grad():
        for name in found:
            down, up = (values[f"transformer.{name}.lora_{part}.weight"].float() for part in "AB")
            pipeline.get_submodule(name).weight += up @ down
        times = torch.stack([inputs[4], inputs[3]], dim=1).repeat_interleave(4, dim=1)
        theirs = pipeline(inputs[0], times, inputs[1], return_dict=False)[0]
        ours = student.velocity(*inputs)
    # the file is in bfloat16
    assert (ours - theirs).norm() / theirs.norm() < 5e-3


def test_the_teacher_passes_the_students_levels():
    line = adapters.teacher_levels()
    assert set(adapters.student_levels()) <= set(line)
    assert line == sorted(line, reverse=True)
    assert len(line) == 25


def test_the_guided_solver_is_of_second_order(tokenizer):
    """On v = x - s, whose solution is known, half the step leaves a quarter of the error."""
    nets = SimpleNamespace(velocity=lambda x, words, bias, time, first: x - time.view(-1, 1, 1, 1, 1) / 1000)
    empty = sampling.Asked(torch.zeros(1, 1, 1), torch.zeros(1, 1))
    noise = torch.full((1, 1, 1, 1, 1), 0.5, dtype=torch.float64)
    # x' = x - s from (1, 0.5): x = s + 1 - 1.5 exp(s - 1)
    exact = 1 - 1.5 * math.exp(-1)
    errors = []
    for steps in (16, 32):
        line = torch.linspace(1, 0, steps + 1, dtype=torch.float64).tolist()
        found = sampling.guided(nets, empty, empty, noise, line, guidance=1.0)[-1]
        errors.append(abs(float(found) - exact))
    assert 3.0 < errors[0] / errors[1] < 5.0


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
    spec = resolve_model(str(tmp_path / "out")).spec
    assert spec.kind == TEXT_IMAGE_TO_VIDEO and spec.defaults.steps == 50 and spec.defaults.guidance == (5.0,)
    assert spec.words == resolve_model(TINY).spec.words  # what is shipped says what the world says
    assert set(chinese.words()) < set(spec.words)


def test_dial():
    assert learning_rate(0.0) == 0.0
    assert learning_rate(0.3) == 1.0
    assert learning_rate(1.0) == pytest.approx(0.0, abs=1e-9)
    assert Clock(0.0).over
    clock = Clock(10.0, spent=540.0)
    assert clock.progress == pytest.approx(0.9, abs=1e-3)
    assert not clock.over
