"""A transformer that attends to an image's rows, too, as Wan2.1's image to video: against diffusers'."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from small_networks import CONFIG, inputs, reference, relative_error, twin

from chitu_diffusion.errors import UsageError

IMAGE = replace(CONFIG, image_dim=32, added_kv_proj_dim=CONFIG.dim)


@pytest.mark.parametrize("images", [1, 2])
@torch.no_grad()
def test_an_image_is_attended_to_as_in_diffusers(images: int) -> None:
    """Wan2.1's image to video (one image) and first-and-last-frame (two, with learned positions)."""
    config = replace(IMAGE, pos_embed_seq_len=514 if images == 2 else None)
    model = reference(config)
    ours = twin(model, config)
    latent, _, timestep = inputs(2, 2, 6, 4, config)
    # diffusers takes what stands before the last 512 rows for the image; ours are apart, and equal rows of
    # the text are folded
    text = torch.cat([torch.randn(2, 9, config.text_dim), torch.zeros(2, 503, config.text_dim)], dim=1)
    image = torch.randn(2 * images, 257, 32)
    expected = model(latent, timestep, text, encoder_hidden_states_image=image, return_dict=False)[0]
    rows = image.reshape(2, 257 * images, 32)
    found = ours(latent, ours.make_text_kv(text, image=rows), timestep)
    assert relative_error(found, expected) < 1e-5
    other = ours(latent, ours.make_text_kv(text, image=rows.flip(0)), timestep)
    assert relative_error(other, expected) > 1e-2


@torch.no_grad()
def test_one_image_is_every_branchs_and_its_keys_are_kept() -> None:
    ours = twin(reference(IMAGE), IMAGE)
    latent, text, timestep = inputs(1, 1, 4, 4)
    image = torch.randn(1, 10, 32)
    both = ours.make_text_kv(torch.cat([text, text.flip(1)]), image=image)
    found = ours(latent, both, timestep)
    held = both.bytes
    assert torch.equal(ours(latent, both, timestep), found) and both.bytes == held
    for branch, words in zip(found.chunk(2), (text, text.flip(1)), strict=True):
        assert relative_error(branch, ours(latent, ours.make_text_kv(words, image=image), timestep)) < 1e-5


@torch.no_grad()
def test_an_image_that_does_not_fit_is_refused() -> None:
    ours = twin(reference(IMAGE), IMAGE)
    latent, text, timestep = inputs(1, 1, 4, 4)
    with pytest.raises(UsageError, match=r"attends to an image, too; use make_text_kv\(text, image"):
        ours(latent, text, timestep)
    for wrong in (torch.zeros(1, 4, 31), torch.zeros(2, 4, 32), torch.zeros(4, 32), "an image"):
        with pytest.raises(UsageError, match=r"image is .*\[1 or 1, I, 32\]"):
            ours.make_text_kv(text, image=wrong)
    with pytest.raises(UsageError, match="attends to no image"):
        twin(reference(CONFIG)).make_text_kv(text, image=torch.zeros(1, 4, 32))
