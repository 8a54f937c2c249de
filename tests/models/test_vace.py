"""The network with a control stream beside diffusers' own, on every road of one device."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from small_networks import COMPILED, EverySite, inputs, reference, relative_error, twin

from chitu_diffusion.errors import UsageError
from chitu_diffusion.memory.offload import BlockPrefetcher, PinnedMemory
from chitu_diffusion.models.wan.transformer import WanTransformer
from chitu_diffusion.ops.float8_linear import Float8Linear, Float8Plan, to_float8

CONFIG = replace(COMPILED, vace_layers=(0, 2, 3), vace_in_channels=10)


@pytest.fixture(scope="module")
def theirs():
    torch.manual_seed(0)
    return reference(CONFIG)


@pytest.fixture
def ours(theirs):
    return twin(theirs, CONFIG)


def given(batch: int = 2):
    torch.manual_seed(1)
    latent, text, time = inputs(batch, 3, 4, 6, CONFIG)
    return latent, text, time, torch.randn(batch, 10, 3, 4, 6)


@torch.no_grad()
@pytest.mark.parametrize("scale", [1.0, (0.5, 2.0, -1.0)])
def test_parity_with_diffusers(theirs, ours, scale):
    latent, text, time, control = given()
    scales = torch.tensor(scale) if isinstance(scale, tuple) else None
    expected = theirs(
        latent,
        time,
        text,
        control_hidden_states=control,
        control_hidden_states_scale=scales,
        return_dict=False,
    )[0]
    found = ours(latent, text, time, control=control, control_scale=scale)
    assert relative_error(found, expected) < 1e-5  # float32 sums in another order
    assert relative_error(ours(latent, text, time), expected) > 0.1
    cached = ours(latent, text, time, control=control, control_scale=scale, cache=EverySite())
    assert relative_error(cached, expected) < 1e-5


@torch.no_grad()
def test_branches_share_what_they_have_in_common(ours):
    latent, text, time, control = given(1)
    texts = torch.cat([text, text.flip(1)])
    kv = ours.make_text_kv(texts)
    both = ours(latent, kv, time, control=control)
    apart = torch.cat([ours(latent, one[None], time, control=control) for one in texts])
    assert relative_error(both, apart) < 1e-5
    assert torch.equal(ours(latent, kv, time, control=control), both)  # by keys that were kept


@torch.no_grad()
def test_a_streamed_stack_is_the_network(ours):
    latent, text, time, control = given()
    expected = ours(latent, text, time, control=control)
    stream = BlockPrefetcher(ours.stack, torch.device("cpu"), PinnedMemory(torch.device("cpu")), {})
    assert len(stream) == 8 and torch.equal(
        ours(latent, text, time, control=control, blocks=stream), expected
    )


@torch.no_grad()
def test_eight_bits_and_compiled_pieces_take_the_control_stream_too(theirs, ours):
    latent, text, time, control = given()
    exact = ours(latent, text, time, control=control)
    torch._dynamo.reset()
    compiled = twin(theirs, CONFIG)
    compiled.compile_blocks(backend="eager")
    assert relative_error(compiled(latent, text, time, control=control), exact) < 1e-5
    torch._dynamo.reset()
    layers = to_float8(list(ours.blocks), Float8Plan(keep=()), ours.vace_blocks)
    assert isinstance(ours.vace_blocks[0].proj_in, Float8Linear)
    assert len(layers) == 8 * 10 + 4  # products of each block, and what the control stream has besides
    rounded = relative_error(ours(latent, text, time, control=control), exact)
    assert 1e-3 < rounded < 0.3
    whole = twin(theirs, CONFIG)
    kept = to_float8(list(whole.blocks), Float8Plan(keep=("edges",)), whole.vace_blocks)
    assert len(kept) == len(layers) - 2 * 10 and not isinstance(whole.blocks[0].attn1.to_q, Float8Linear)


def test_what_cannot_be_is_refused_in_words(ours):
    latent, text, time, control = given()
    with pytest.raises(UsageError, match=r"control is \[2, 10, 3, 4, 4\]; use \[2, 10, 3, 4, 6\]"):
        ours(latent, text, time, control=control[..., :4])
    with pytest.raises(UsageError, match="control_scale has 2 numbers; use one, or 3"):
        ours(latent, text, time, control=control, control_scale=(1.0, 1.0))
    plain = WanTransformer(replace(CONFIG, vace_layers=None, vace_in_channels=None))
    with pytest.raises(UsageError, match="takes no control"):
        plain(latent, text, time, control=control)
    for layers, said in (((1, 2), "rise from 0"), ((0, 5), "at most 4"), ((), "rise from 0")):
        with pytest.raises(UsageError, match=said):
            replace(CONFIG, vace_layers=layers)
    with pytest.raises(UsageError, match="go together"):
        replace(CONFIG, vace_in_channels=None)
