"""Tokens of the first latent frame with a time of their own (Wan2.2-TI2V-5B), beside diffusers' network
with a time for each token.
"""

from __future__ import annotations

import math

import pytest
import torch
from small_networks import CONFIG, EverySite, inputs, reference, relative_error, twin

from chitu_diffusion.attention import sdpa


@torch.no_grad()
@pytest.mark.parametrize("grid", [(3, 6, 4), (1, 4, 8)])
def test_a_known_first_frame_has_a_time_of_its_own(grid) -> None:
    """Beside diffusers' network with a time for each token; each sample of a batch has its own two."""
    theirs = reference(CONFIG)
    ours = twin(theirs)
    latent, text, timestep = inputs(2, *grid)
    first = torch.tensor([0.0, 250.0])
    each = timestep[:, None].repeat(1, math.prod(grid) // 4)
    each[:, : grid[1] * grid[2] // 4] = first[:, None]
    expected = theirs(latent, each, text, return_dict=False)[0]
    found = ours(latent, text, timestep, first_timestep=first)
    assert relative_error(found, expected) < 1e-5  # float32 sums in another order
    assert grid[0] == 1 or relative_error(ours(latent, text, timestep), expected) > 1e-2
    again = ours.forward_with_cache(latent, text, found.intermediate_features)
    assert relative_error(again, found) < 1e-6
    at_sites = ours(latent, text, timestep, first_timestep=first, cache=EverySite())
    assert relative_error(at_sites, found) < 1e-6
    both = ours(latent, torch.cat([text, text.flip(0)]), timestep, first_timestep=first)
    assert relative_error(both[:2], found) < 1e-6


@torch.no_grad()
def test_one_time_for_all_tokens_is_a_time_for_each() -> None:
    ours = twin(reference(CONFIG))
    latent, text, timestep = inputs(2, 2, 4, 4)
    same = ours(latent, text, timestep, first_timestep=timestep)
    assert relative_error(same, ours(latent, text, timestep)) < 1e-6


@torch.no_grad()
@pytest.mark.parametrize("cut", [1, 3, 4, 5, 11])
def test_a_share_of_the_tokens_has_its_own_times(cut: int) -> None:
    """The first frame's 4 tokens of 12 may end anywhere in a rank's share."""
    ours = twin(reference(CONFIG))
    whole = ours.embed(*inputs(2, 3, 4, 4), first_timestep=0.0)
    block = ours.blocks[0]
    text = whole.text.keys(0, block.text_keys)
    parts = [whole.of_tokens(0, cut), whole.of_tokens(cut, 12)]
    assert sum(len(part.modulation.rows[0]) for part in parts) == (2 if cut == 4 else 3)
    found = [
        block(part.tokens, text, part.modulation, None, sdpa)  # all but the self-attention
        for part in parts
    ]
    expected = block(whole.tokens, text, whole.modulation, None, sdpa)
    assert relative_error(torch.cat(found, 1), expected) < 1e-6
    heads = [ours.final_layer(part.tokens, part.time) for part in parts]
    assert relative_error(torch.cat(heads, 1), ours.final_layer(whole.tokens, whole.time)) < 1e-6


def test_two_times_have_gradients() -> None:
    ours = twin(reference(CONFIG))
    latent, text, timestep = inputs(2, 2, 4, 4)
    ours(
        latent, text, timestep, first_timestep=torch.tensor([0.0, float(timestep[1])])
    ).square().mean().backward()
    assert all(parameter.grad is not None for parameter in ours.parameters())
