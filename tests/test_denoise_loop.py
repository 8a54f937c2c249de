"""What `denoise_loop` begins with: sizes of half patches, a latent to refine, a model of the pool."""

from __future__ import annotations

import pytest
import torch
from running import CAT, config_for, latent_and_video, relative_error, task_for

from chitu_diffusion.backend import DiffusionBackend
from chitu_diffusion.generator import Generator
from chitu_diffusion.sampling.noise import initial_noise, upsample_latent
from chitu_diffusion.task import CascadeStage


@pytest.fixture(scope="module")
def generator(tiny_folder, tmp_path_factory) -> Generator:
    return Generator(DiffusionBackend(config_for(tiny_folder, tmp_path_factory.mktemp("outputs"))))


@pytest.fixture(scope="module")
def experts(two_experts_folder, tmp_path_factory) -> Generator:
    return Generator(DiffusionBackend(config_for(two_experts_folder, tmp_path_factory.mktemp("outputs"))))


def test_all_that_is_left_out_is_the_model_s_own(generator):
    """Noise of the seed, the model's size and frames, the empty prompt beside the model's negative one."""
    text = generator.encode_text(["", generator.backend.spec.defaults.negative_prompt])
    noise = initial_noise((1, 4, 2, 4, 4), 7)
    expected = generator.denoise_loop(noise, text, 3, 5.0)
    assert torch.equal(generator.denoise_loop(num_steps=3, guidance_scale=None, seed=7), expected)
    larger = generator.denoise_loop(resolution=(48, 16), num_frames=9, num_steps=1)
    assert larger.shape == (1, 4, 3, 6, 2)


@pytest.mark.parametrize(
    "size",
    [(8, 8), (8, 24), (24, 40), (40, 16), (56, 56), (32, 72)],
    ids=lambda size: "x".join(map(str, size)),
)
def test_every_multiple_of_8_is_padded_and_cut(generator, size):
    text = generator.encode_text(CAT)
    rows, columns = (pixels // 8 for pixels in size)
    noise = initial_noise((1, 4, 1, rows + rows % 2, columns + columns % 2), 3)
    whole = generator.denoise_loop(noise, text, 3)
    found = generator.denoise_loop(None, text, 3, resolution=size, num_frames=1, seed=3)
    assert found.shape == (1, 4, 1, rows, columns) and found.is_contiguous()
    assert torch.equal(found, whole[..., :rows, :columns])
    assert generator.decode_vae(found).shape == (1, 1, 3, *size)


def test_a_latent_of_half_patches_is_padded_with_the_seed_s_noise(generator):
    text = generator.encode_text(CAT)
    noise = initial_noise((2, 4, 2, 5, 7), 3)
    found = generator.denoise_loop(noise, text, 3)
    assert found.shape == noise.shape
    assert torch.equal(generator.denoise_loop(noise, text, 3), found)
    other = generator.denoise_loop(noise, text, 3, seed=1)
    assert 0 < relative_error(other, found) < 0.5  # what is attended beside it is other noise
    # where whole patches need none, the seed does nothing
    even = noise[..., :4, :6]
    assert torch.equal(generator.denoise_loop(even, text, 3, seed=1), generator.denoise_loop(even, text, 3))


def test_the_flow_by_hand_is_the_cascade(experts):
    """Two models, two sizes, the default strength: to the bit what a task of these stages computes."""
    stages = (CascadeStage(32, 48, 3, expert=0), CascadeStage(64, 96, 2, strength=0.5, expert=1))
    expected, _ = latent_and_video(experts, task_for(cascade=stages, guidance_scale=5.0))
    given = {"embeddings": experts.encode_text([CAT, "blurry, ugly"]), "guidance_scale": 5.0, "seed": 3}
    high, low = experts.backend.model_pool
    base = experts.denoise_loop(model=high, resolution=(32, 48), num_steps=3, **given)
    for init in (base, experts.upsample(base)):
        found = experts.denoise_loop(model=low, init_latent=init, resolution=(64, 96), num_steps=2, **given)
        assert torch.equal(found, expected)
    by_index = experts.denoise_loop(model=1, init_latent=experts.upsample(base), num_steps=2, **given)
    assert torch.equal(by_index, expected)
    gentle = experts.denoise_loop(model=low, init_latent=base, num_steps=2, strength=0.05, **given)
    assert relative_error(gentle, base) < relative_error(
        experts.denoise_loop(model=low, init_latent=base, num_steps=2, strength=0.9, **given), base
    )


def test_a_named_model_runs_all_steps_and_none_leaves_it_to_the_timestep(experts):
    pool = experts.backend.model_pool
    used = []
    hooks = [
        network.patch_embedding.register_forward_hook(lambda *_, index=index: used.append(index))
        for index, network in enumerate(pool)
    ]
    runs = []
    for model in (0, pool[1], None):
        used.clear()
        experts.denoise_loop(model=model, num_steps=8)
        runs.append(list(used))
    assert runs[:2] == [[0] * 8, [1] * 8]
    assert runs[2] == sorted(runs[2]) and set(runs[2]) == {0, 1}
    for hook in hooks:
        hook.remove()


def test_an_init_latent_of_half_patches_keeps_its_size(generator):
    clean = torch.randn(1, 4, 2, 5, 7)
    found = generator.denoise_loop(init_latent=clean, num_steps=2, strength=0.01)
    assert found.shape == clean.shape
    # the least noise there is: what comes back is near what was given
    assert relative_error(found, clean) < 0.2
    resized = generator.denoise_loop(init_latent=clean, resolution=(24, 56), num_steps=2)
    assert resized.shape == (1, 4, 2, 3, 7)


def test_upsampling(generator):
    latent = torch.randn(2, 4, 3, 5, 6)
    assert torch.equal(generator.upsample(latent), upsample_latent(latent, 10, 12))
    assert generator.upsample(latent, 1.5).shape == (2, 4, 3, 8, 9)
    assert generator.upsample(latent, scale=0.5).shape == (2, 4, 3, 2, 3)
    flat = torch.full((1, 4, 1, 3, 3), 0.25)
    assert torch.allclose(generator.upsample(flat, 3), torch.full((1, 4, 1, 9, 9), 0.25))


def test_the_negative_prompt_is_the_model_s_own_where_one_branch_is_given(generator):
    latent = initial_noise((1, 4, 2, 4, 4), 0)
    text = generator.encode_text([CAT, generator.backend.spec.defaults.negative_prompt])
    whole = generator.forward_with_cfg_parallel(latent, text, 700, 3.0)
    assert torch.equal(generator.forward_with_cfg_parallel(latent, text[:1], 700, 3.0), whole)
    alone = generator.forward_with_cfg_parallel(latent, text[:1], 700, 1.0)
    assert torch.equal(alone, generator.forward_with_cp(latent, text[:1], 700).float())
