"""Our transformer against diffusers', and what the rest of the project relies on in it."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from small_networks import (
    CONFIG,
    inputs,
    official_control_names,
    official_names,
    reference,
    reference_class,
    relative_error,
    twin,
)
from torch import Tensor, nn

from chitu_diffusion.attention import KERNELS, attention_kernel, math, sdpa
from chitu_diffusion.errors import UsageError
from chitu_diffusion.flexcache.interface import Level, Site, SiteInputs
from chitu_diffusion.models.wan.block import GeluLinear, WanBlock
from chitu_diffusion.models.wan.checkpoint_names import official_transformer_name
from chitu_diffusion.models.wan.presets import FULL_SIZE
from chitu_diffusion.models.wan.transformer import KEEP_FLOAT32, WanConfig, WanTransformer
from chitu_diffusion.ops.fused import rotate


@pytest.fixture(autouse=True)
def fresh_numbers() -> None:
    seed = secrets.randbelow(2**31)
    print("torch seed", seed)  # shown when a test fails
    torch.manual_seed(seed)


@pytest.mark.parametrize("shape", [(1, 1, 2, 2), (2, 3, 6, 10), (1, 5, 14, 6), (2, 2, 2, 18)])
@pytest.mark.parametrize(
    "config", [CONFIG, replace(CONFIG, cross_attn_norm=False, patch_size=(1, 1, 2), out_channels=4)]
)
@torch.no_grad()
def test_forward_is_diffusers(shape: tuple[int, int, int, int], config: WanConfig) -> None:
    model = reference(config)
    latent, text, timestep = inputs(*shape, config)
    expected = model(latent, timestep, text, return_dict=False)[0]
    found = twin(model, config)(latent, text, timestep)
    assert found.shape == (shape[0], config.out_channels, *shape[1:])
    # float32 rounding through three blocks gives some 2e-7
    assert relative_error(found, expected) < 1e-5


@torch.no_grad()
def test_whole_timesteps_and_one_for_all() -> None:
    model = reference(CONFIG)
    ours = twin(model)
    latent, text, _ = inputs(2, 2, 4, 6)
    for timestep in (torch.tensor([999, 999]), torch.tensor([1, 1]), torch.tensor([0, 0])):
        expected = model(latent, timestep, text, return_dict=False)[0]
        assert relative_error(ours(latent, text, timestep), expected) < 1e-5
        assert relative_error(ours(latent, text, timestep[:1]), expected) < 1e-5


@torch.no_grad()
def test_bfloat16_is_as_exact_as_diffusers() -> None:
    model = reference(CONFIG)
    ours = twin(model)
    latent, text, timestep = inputs(2, 3, 6, 6)
    exact = model(latent, timestep, text, return_dict=False)[0]
    for network in (model, ours):
        for name, parameter in network.named_parameters():
            if set(name.split(".")).isdisjoint(KEEP_FLOAT32):
                parameter.data = parameter.data.bfloat16()
    args = (latent.bfloat16(), text.bfloat16(), timestep)
    theirs = relative_error(model(args[0], timestep, args[1], return_dict=False)[0], exact)
    mine = ours(*args)
    assert mine.dtype == torch.bfloat16
    # both are a few roundings of 2^-9 away from float32; ours may not be farther by more than chance
    assert relative_error(mine, exact) < 1.5 * theirs < 0.1


@pytest.mark.parametrize("name", sorted(FULL_SIZE))
def test_full_size_names_and_shapes(name: str) -> None:
    spec = FULL_SIZE[name]
    for config in set(spec.transformers):
        fields = {key: value for key, value in config.to_json().items() if not key.startswith("_")}
        with torch.device("meta"):
            ours = WanTransformer(config)
            theirs = reference_class(config)(**fields)
        shapes = {key: tuple(value.shape) for key, value in ours.state_dict().items()}
        assert shapes == {key: tuple(value.shape) for key, value in theirs.state_dict().items()}
        count = sum(parameter.numel() for parameter in ours.parameters())
        # of the patch embedding
        more = config.dim * config.patch_values * (config.in_channels - config.out_channels)
        more += (config.pos_embed_seq_len or 0) * (config.image_dim or 0)
        counts = {"Wan2.1-T2V-1.3B": 1_418_996_800, "Wan2.2-TI2V-5B": 4_999_787_712}
        counts |= {"Wan2.1-VACE-1.3B": 2_153_972_032, "Wan2.1-VACE-14B": 17_337_592_896}
        large = 14_288_491_584 if config.image_dim is None else 16_394_469_184
        assert count - more == counts.get(name, large)
        expected = official_names(config.num_layers, config.image_dim, config.pos_embed_seq_len)
        expected |= official_control_names(len(config.vace_layers or ()))
        assert {official_transformer_name(key) for key in shapes} == expected


class Asked:
    """A cache that computes always, or answers by a rule, and notes where it was asked."""

    def __init__(
        self, *levels: Level, answer: Callable[[Site, SiteInputs], Tensor | None] = lambda site, inputs: None
    ) -> None:
        self.levels = frozenset(levels)
        self.answer = answer
        self.sites: list[Site] = []

    def at(self, site: Site, compute: Callable[[], Tensor], inputs: SiteInputs) -> Tensor:
        self.sites.append(site)
        given = self.answer(site, inputs)
        return compute() if given is None else given


@pytest.mark.parametrize(
    "levels",
    [("step",), ("block",), ("attention",), ("cross", "ffn"), ("step", "block", "attention", "cross", "ffn")],
)
@torch.no_grad()
def test_a_cache_that_computes_changes_no_bit(levels: tuple[Level, ...]) -> None:
    ours = twin(reference(CONFIG))
    args = inputs(1, 2, 4, 4)
    cache = Asked(*levels)
    assert torch.equal(ours(*args, cache=cache), ours(*args))
    assert {site.level for site in cache.sites} == set(levels)
    assert len(cache.sites) == sum(1 if level == "step" else CONFIG.num_layers for level in levels)
    assert all(site.depth == CONFIG.num_layers for site in cache.sites)


@torch.no_grad()
def test_blocks_can_be_skipped_with_a_stored_residual() -> None:
    ours = twin(reference(CONFIG))
    args = inputs(1, 2, 4, 4)
    states: dict[int, Tensor] = {}

    def note(site: Site, inputs: SiteInputs) -> None:
        states[site.block] = inputs.entering

    ours(*args, cache=Asked("block", answer=note))
    embedded = ours.embed(*args)
    rest = ours.run_blocks(embedded) - states[1]  # what blocks 1 and 2 add

    def skip(site: Site, inputs: SiteInputs) -> Tensor | None:
        return (None, inputs.entering + rest, inputs.entering)[site.block]

    assert relative_error(ours(*args, cache=Asked("block", answer=skip)), ours(*args)) < 1e-6


@torch.no_grad()
def test_features_of_one_forward_replace_the_blocks_of_another() -> None:
    ours = twin(reference(CONFIG))
    latent, text, timestep = inputs(2, 2, 4, 4)
    output = ours(latent, text, timestep)
    assert type(output + 0) is Tensor
    again = ours.forward_with_cache(latent, text, output.intermediate_features)
    assert relative_error(again, output) < 1e-6
    later = ours.forward_with_cache(latent, text, output.intermediate_features, timestep - 20)
    assert not torch.equal(later, again)
    with pytest.raises(ValueError, match="cached features"):
        ours.forward_with_cache(latent[:, :, :1], text, output.intermediate_features)


@torch.no_grad()
def test_a_time_may_be_a_number_or_any_tensor_of_one() -> None:
    ours = twin(reference(CONFIG))
    latent, text, _ = inputs(2, 1, 4, 4)
    expected = ours(latent, text, torch.tensor([300.0, 300.0]))
    moving = torch.tensor(300.0)
    for timestep in (300, 300.0, moving, torch.tensor([300]), torch.tensor([300.0]).bfloat16()):
        # one time for all is one row of the time embedding's product: another order of sums
        assert relative_error(ours(latent, text, timestep), expected) < 1e-6
    output = ours(latent, text, moving)
    moving.fill_(20.0)  # as a solver does
    assert output.intermediate_features.timestep.tolist() == [300.0]


@torch.no_grad()
def test_guidance_branches_come_along_the_batch() -> None:
    ours = twin(reference(CONFIG))
    latent, text, timestep = inputs(2, 2, 4, 4)
    other = torch.randn_like(text)
    both = ours(latent, torch.cat([text, other]), timestep)
    prepared = ours(latent, ours.make_text_kv(torch.cat([text, other])), timestep)
    for found in (both, prepared):
        for branch, words in zip(found.chunk(2), (text, other), strict=True):
            assert relative_error(branch, ours(latent, words, timestep)) < 1e-5


@torch.no_grad()
def test_pieces_work_on_shards_of_the_sequence() -> None:
    """Sharded after `embed`, each shard attending to all keys, gathered after `final_layer`: the same
    velocity.
    """
    ours = twin(reference(CONFIG))
    args = inputs(2, 3, 6, 6)
    whole = ours.embed(*args)
    bounds = [(0, 5), (5, 27)]  # uneven
    inner: list[Tensor] = []
    shards = [
        replace(whole, tokens=whole.tokens[:, a:b], rope=(whole.rope[0][a:b], whole.rope[1][a:b]))
        for a, b in bounds
    ]
    # one block at a time over both shards, with the keys and values of both: what a parallel attention will
    # do
    block = ours.blocks[0]
    assert isinstance(block, WanBlock)
    text = whole.text.keys(0, block.text_keys)
    kept: list[tuple[Tensor, Tensor]] = []

    def collect(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        kept.append((k, v))
        return q

    for shard in shards:
        block.self_attention(shard.tokens, whole.modulation, shard.rope, text.v.dtype, collect)
    keys = torch.cat([k for k, _ in kept], 1)
    values = torch.cat([v for _, v in kept], 1)
    for shard in shards:
        inner.append(
            block(shard.tokens, text, shard.modulation, shard.rope, lambda q, k, v: sdpa(q, keys, values))
        )
    expected = block(whole.tokens, text, whole.modulation, whole.rope, sdpa)
    assert relative_error(torch.cat(inner, 1), expected) < 1e-5
    parts = torch.cat([ours.final_layer(part, whole.time) for part in inner], 1)
    assert (
        relative_error(
            ours.unpatchify(parts, whole.grid),
            ours.unpatchify(ours.final_layer(expected, whole.time), whole.grid),
        )
        < 1e-5
    )


@torch.no_grad()
def test_blocks_may_come_from_a_stream() -> None:
    ours = twin(reference(CONFIG))
    args = inputs(1, 1, 4, 4)
    lent: list[int] = []

    def stream() -> Iterator[nn.Module]:
        for index, block in enumerate(ours.blocks):
            lent.append(index)
            yield block

    assert torch.equal(ours(*args, blocks=stream()), ours(*args))
    assert lent == [0, 1, 2]


def test_checkpointing_gives_the_same_gradients() -> None:
    ours = twin(reference(CONFIG))
    args = inputs(1, 2, 4, 4)

    def gradients() -> list[Tensor]:
        ours.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            velocity = ours(*args)
        velocity.float().square().mean().backward()
        return [parameter.grad.clone() for parameter in ours.parameters() if parameter.grad is not None]

    plain = gradients()
    assert len(plain) == len(list(ours.parameters()))
    ours.enable_gradient_checkpointing()
    for found, expected in zip(gradients(), plain, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_autocast_leaves_the_stream_in_the_weights_dtype(stored: torch.dtype) -> None:
    ours = twin(reference(CONFIG))
    args = inputs(1, 2, 4, 4)
    expected = ours(*args)
    ours.to(stored)
    cache = Asked("block", "ffn", answer=lambda site, inputs: kinds.append(inputs.entering.dtype))
    kinds: list[torch.dtype] = []
    with torch.autocast("cpu", torch.float16):
        found = ours(*args, cache=cache)
    assert set(kinds) == {stored}
    assert found.dtype == torch.float16
    # 16-bit products through three blocks
    assert relative_error(found, expected) < 0.05


def test_a_fresh_network_starts_at_zero_and_learns() -> None:
    ours = WanTransformer(CONFIG)
    ours.init_weights()
    latent, text, timestep = inputs(4, 1, 4, 4)
    assert not ours(latent, text, timestep).any()
    optimiser = torch.optim.AdamW(ours.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        loss = (ours(latent, text, timestep) - latent).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.usefixtures("gelu_apart")
@torch.no_grad()
def test_blocks_compile_whole_and_once() -> None:
    ours = twin(reference(CONFIG))
    args = inputs(1, 2, 4, 4)
    expected = ours(*args)
    torch._dynamo.reset()
    ours.compile_blocks(backend="eager", fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert torch.equal(ours(*args), expected)
        assert torch.equal(ours(*args, cache=Asked("step", "block")), expected)
        assert torch.equal(ours(*args), expected)
    torch._dynamo.reset()


@torch.no_grad()
def test_a_cpus_own_ways_are_the_plain_ones() -> None:
    """Turning as complex numbers is the same arithmetic; GELU inside the product rounds otherwise, by a few
    bits.
    """
    x = torch.randn(2, 30, 3, 20)
    angles = torch.rand(30, 10) * 6
    rope = (angles.cos(), angles.sin())
    for dtype in (torch.float32, torch.bfloat16):
        even, odd = x.to(dtype).float().unflatten(-1, (10, 2)).unbind(-1)
        cos, sin = (part[:, None] for part in rope)
        expected = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)
        found = rotate(x.to(dtype), rope)
        assert found.dtype == dtype and relative_error(found, expected) < 1e-7 + torch.finfo(dtype).eps
    layer = GeluLinear(24, 40)
    rows = torch.randn(2, 9, 24) * 3
    exact = torch.nn.functional.gelu(layer.double().proj(rows.double()), approximate="tanh")
    fused = layer.float()(rows)
    with torch.enable_grad():
        plain = layer(rows)
    assert plain.requires_grad and not fused.requires_grad
    assert relative_error(fused, exact) < 1e-6 and relative_error(plain, exact) < 1e-6


@torch.no_grad()
def test_kernels_agree_with_float64() -> None:
    q = torch.randn(2, 9, 3, 8)
    k = torch.randn(2, 1500, 3, 8)
    v = torch.randn(2, 1500, 3, 8)
    scores = torch.einsum("bshd,blhd->bshl", q.double(), k.double()) / 8**0.5
    expected = torch.einsum("bshl,blhd->bshd", scores.softmax(-1), v.double())
    for kernel in (each for each in KERNELS.values() if each.why_unavailable(q.device) is None):
        assert kernel.exact
        assert relative_error(kernel(q, k, v), expected) < 1e-6
        assert kernel.supports_ring == (kernel.run_with_lse is not None)
    assert math.run_with_lse is not None
    out, lse = math.run_with_lse(k, k, v)  # 1500 queries: more than one slab of rows
    assert out.shape == v.shape and lse.shape == (2, 1500, 3)
    assert (
        relative_error(lse, (torch.einsum("bshd,blhd->bshl", k.double(), k.double()) / 8**0.5).logsumexp(-1))
        < 1e-6
    )
    assert attention_kernel("auto").exact
    with pytest.raises(UsageError, match="'sdpa'"):
        attention_kernel("spda")


@pytest.mark.parametrize(
    ("latent", "timestep", "text", "words"),
    [
        ((1, 5, 1, 4, 4), (1,), (1, 7, 24), "use \\[B, 6, T, H, W\\]"),
        ((1, 6, 1, 3, 4), (1,), (1, 7, 24), "multiples of the patch"),
        ((2, 6, 1, 4, 4), (3,), (2, 7, 24), "timestep is \\[3\\]"),
        ((2, 6, 1, 4, 4), (2,), (1, 7, 24), "embeddings are \\[1, 7, 24\\]; use \\[2, L, 24\\]"),
        ((1, 6, 1, 4, 2050), (1,), (1, 7, 24), "longest axis"),
        ((1, 6, 1, 4), (1,), (1, 7, 24), "latent is \\[1, 6, 1, 4\\]"),
        ((1, 6, 1, 4, 4), (1, 1), (1, 7, 24), "timestep is \\[1, 1\\]"),
        ((1, 6, 1, 4, 4), (1,), (1, 0, 24), "embeddings are"),
    ],
)
def test_shapes_that_cannot_be(
    latent: tuple[int, ...], timestep: tuple[int, ...], text: tuple[int, ...], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        WanTransformer(CONFIG)(torch.zeros(latent), torch.zeros(text), torch.zeros(timestep))


@pytest.mark.parametrize(
    ("position", "value", "words"),
    [
        (0, [1.0], "latent is a list"),
        (0, torch.zeros(1, 6, 1, 4, 4, dtype=torch.int64), "latent is torch.int64"),
        (0, torch.zeros(1, 6, 1, 4, 4, device="meta"), "latent is on meta"),
        (1, None, "embeddings is a NoneType"),
        (1, torch.zeros(1, 7, 24, device="meta"), "embeddings is on meta"),
        (2, "500", "timestep = '500'"),
        (2, True, "timestep = True"),
        (2, 1000.5, "timestep = 1000.5; use 0 to 1000"),
        (2, torch.tensor([-1]), "use 0 to 1000"),
        (2, torch.tensor(float("nan")), "timestep = nan"),
    ],
)
def test_inputs_of_another_kind_are_refused_in_words(position: int, value: object, words: str) -> None:
    args: list[object] = [torch.zeros(1, 6, 1, 4, 4), torch.zeros(1, 7, 24), 500]
    args[position] = value
    with pytest.raises(ValueError, match=words):
        WanTransformer(CONFIG)(*args)  # type: ignore[arg-type]


def test_features_must_be_features() -> None:
    with pytest.raises(ValueError, match="cached_features is a NoneType; use the intermediate_features"):
        WanTransformer(CONFIG).forward_with_cache(torch.zeros(1, 6, 1, 4, 4), torch.zeros(1, 7, 24), None)  # type: ignore[arg-type]


def test_config_refuses_other_models() -> None:
    data = CONFIG.to_json()
    assert WanConfig.from_json(data) == CONFIG
    for key, value in (
        ("image_dim", 1280),
        ("added_kv_proj_dim", 5120),
        ("pos_embed_seq_len", 0),
        ("qk_norm", "layer"),
        ("colour", "red"),
        ("freq_dim", 33),
    ):
        with pytest.raises(UsageError, match=key):
            WanConfig.from_json({**data, key: value})
