"""Each format of adapter beside arithmetic in float64, on a small network; what has no place is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from adapter_files import ALPHA, RANK, factors, lora_of, product, write
from small_networks import CONFIG, reference, twin
from torch import Tensor

from chitu_diffusion.adapters.merging import AdaptedNetwork, check_adapters
from chitu_diffusion.adapters.placing import _modules, parameter_shapes
from chitu_diffusion.errors import UsageError
from chitu_diffusion.memory.offload import OffloadManager, OffloadPart
from chitu_diffusion.models.wan.checkpoint_names import official_transformer_name
from chitu_diffusion.models.wan.transformer import WanConfig, WanTransformer
from chitu_diffusion.task.lora import Lora

CPU = torch.device("cpu")
ROUNDING = 1e-6
"""Sums of some 60 float32 products of size 1."""
SHAPES = parameter_shapes(CONFIG)
LINEAR = [name[:-7] for name, shape in SHAPES.items() if name.endswith(".weight") and len(shape) > 1]
OFFICIAL = {official_transformer_name(f"{name}.weight").removesuffix(".weight"): name for name in LINEAR}


@pytest.fixture
def network() -> WanTransformer:
    return twin(reference(CONFIG))


def adapted(network: WanTransformer) -> AdaptedNetwork:
    offload = OffloadManager(CPU, parts={"": OffloadPart(network, "denoiser")})
    return AdaptedNetwork(network, CPU, offload, "", None, 0)


def state_of(network: WanTransformer) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in network.state_dict().items()}


def check(network: WanTransformer, lora: Lora, expected: dict[str, Tensor]) -> None:
    """Merged, the weights are those expected; all others, and taken out all, are the very bits."""
    before = state_of(network)
    own = adapted(network)
    own.use([lora])
    for name, value in network.state_dict().items():
        if name in expected:
            error = (value.double() - expected[name]).abs().max() / expected[name].abs().max()
            assert error < ROUNDING, (name, float(error))
            assert not torch.equal(value, before[name]), name
        else:
            assert torch.equal(value, before[name]), name
    own.use([])
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


LAYOUTS = {
    "ComfyUI": {},
    "PEFT ends": {"ends": (".lora_A.weight", ".lora_B.weight"), "alpha": None},
    "an adapter's name": {"ends": (".lora_A.default.weight", ".lora_B.default.weight"), "prefix": ""},
    "bare": {"prefix": ""},
    "bare ends": {"ends": (".lora_A", ".lora_B")},
    "Kohya": {"prefix": "lora_unet_", "underscores": True},
    "Kohya, two lines": {"prefix": "lora_unet__", "underscores": True},
    "LyCORIS": {"prefix": "lycoris_", "underscores": True},
    "old diffusers": {"ends": ("_lora.down.weight", "_lora.up.weight"), "prefix": "unet."},
    "PEFT's wrapper": {"prefix": "base_model.model."},
}


@pytest.mark.parametrize("diffusers_names", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_finds_every_linear_layer(network, tmp_path, layout, diffusers_names) -> None:
    theirs = {name: name for name in LINEAR} if diffusers_names else OFFICIAL
    sizes = {their: SHAPES[f"{name}.weight"] for their, name in theirs.items()}
    path, changes = lora_of(tmp_path / "a.safetensors", sizes, **LAYOUTS[layout])
    strength = -0.7
    before = state_of(network)
    expected = {
        f"{theirs[their]}.weight": before[f"{theirs[their]}.weight"].double() + strength * change
        for their, change in changes.items()
    }
    lora = Lora(str(path), strength)
    assert check_adapters([lora], [CONFIG]) == []
    check(network, lora, expected)


Q = "blocks.1.attn1.to_q.weight"
FFN = "blocks.0.ffn.net.0.proj.weight"
Make = Callable[[Tensor], tuple[dict[str, Tensor], Tensor]]
"""weight -> (parts by ending, the weight at strength 1 in float64)."""


def loha(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    rows, columns = weight.shape
    a, c = torch.randn(2, rows, RANK)
    b, d = torch.randn(2, RANK, columns)
    parts = {
        ".hada_w1_a": a,
        ".hada_w1_b": b,
        ".hada_w2_a": c,
        ".hada_w2_b": d,
        ".alpha": torch.tensor(ALPHA),
    }
    return parts, weight.double() + ALPHA / RANK * (a.double() @ b.double()) * (c.double() @ d.double())


def lokr(cut: bool) -> Make:
    def make(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        rows, columns = weight.shape
        first = torch.randn(4, 5)
        if not cut:
            second = torch.randn(rows // 4, columns // 5)
            parts = {".lokr_w1": first, ".lokr_w2": second, ".alpha": torch.tensor(7.0)}
            return parts, weight.double() + torch.kron(first.double(), second.double())
        a = torch.randn(rows // 4, RANK)
        b = torch.randn(RANK, columns // 5)
        parts = {".lokr_w1": first, ".lokr_w2_a": a, ".lokr_w2_b": b, ".alpha": torch.tensor(ALPHA)}
        change = torch.kron(first.double(), a.double() @ b.double())
        return parts, weight.double() + ALPHA / RANK * change

    return make


def dora(by_column: bool) -> Make:
    def make(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        down, up = factors(tuple(weight.shape))
        magnitude = torch.rand(1, weight.shape[1]) if by_column else torch.rand(weight.shape[0], 1)
        turned = weight.double() + product(down, up, ALPHA / RANK)
        length = turned.pow(2).sum(0 if by_column else 1, keepdim=True).sqrt()
        parts = {".lora_down.weight": down, ".lora_up.weight": up, ".dora_scale": magnitude}
        return {**parts, ".alpha": torch.tensor(ALPHA)}, magnitude.double() * turned / length

    return make


def diff(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    change = torch.randn_like(weight)
    return {".diff": change}, weight.double() + change.double()


def replaced(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    new = torch.randn_like(weight)
    return {".set_weight": new}, new.double()


KINDS: dict[str, Make] = {
    "LoHa": loha,
    "LoKr": lokr(False),
    "LoKr, cut": lokr(True),
    "DoRA by row": dora(False),
    "DoRA by column": dora(True),
    "difference": diff,
    "replaced": replaced,
}


@pytest.mark.parametrize("strength", [1.0, 0.4])
@pytest.mark.parametrize("name", [Q, FFN])
@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_change_are_their_formulas(network, tmp_path, kind, name, strength) -> None:
    weight = network.state_dict()[name]
    parts, full = KINDS[kind](weight)
    base = "diffusion_model." + official_transformer_name(name).removesuffix(".weight")
    path = write(tmp_path / "a.safetensors", {base + end: value for end, value in parts.items()})
    check(network, Lora(str(path), strength), {name: weight.double() + strength * (full - weight.double())})


def test_a_convolution_and_its_three_factors(network, tmp_path) -> None:
    name = "patch_embedding.weight"
    weight = network.state_dict()[name]
    out, channels, *kernel = weight.shape
    down = torch.randn(RANK, channels, 1, 1, 1)
    mid = torch.randn(RANK, RANK, *kernel)
    up = torch.randn(out, RANK, 1, 1, 1)
    tensors = {"lora_down": down, "lora_up": up, "lora_mid": mid}
    path = write(
        tmp_path / "a.safetensors",
        {f"patch_embedding.{part}.weight": value for part, value in tensors.items()},
    )
    rows = [part.double().flatten(1) for part in (up, down)]
    change = torch.einsum("or,rsabc,si->oiabc", rows[0], mid.double(), rows[1])
    check(network, Lora(str(path)), {name: weight.double() + change})


def test_differences_of_norms_biases_modulation_and_patches(network, tmp_path) -> None:
    here = {
        "blocks.1.norm3.diff": "blocks.1.norm2.weight",
        "blocks.1.norm3.diff_b": "blocks.1.norm2.bias",
        "blocks.2.self_attn.norm_q.diff": "blocks.2.attn1.norm_q.weight",
        "blocks.2.cross_attn.norm_k.w_norm": "blocks.2.attn2.norm_k.weight",
        "blocks.0.self_attn.o.diff_b": "blocks.0.attn1.to_out.0.bias",
        "blocks.0.diff_m": "blocks.0.scale_shift_table",
        "blocks.1.modulation.diff": "blocks.1.scale_shift_table",
        "head.diff_m": "scale_shift_table",
        "head.head.diff": "proj_out.weight",
        "head.head.diff_b": "proj_out.bias",
        "patch_embedding.diff": "patch_embedding.weight",
        "patch_embedding.diff_b": "patch_embedding.bias",
        "text_embedding.2.diff": "condition_embedder.text_embedder.linear_2.weight",
        "time_projection.1.diff_b": "condition_embedder.time_proj.bias",
    }
    before = state_of(network)
    changes = {key: torch.randn(SHAPES[name]) for key, name in here.items()}
    path = write(
        tmp_path / "a.safetensors", {f"diffusion_model.{key}": each for key, each in changes.items()}
    )
    lora = Lora(str(path), 0.5)
    assert check_adapters([lora], [CONFIG]) == []
    check(
        network,
        lora,
        {name: before[name].double() + 0.5 * changes[key].double() for key, name in here.items()},
    )


def test_alpha_by_metadata_with_its_pattern_and_the_bias_of_up(network, tmp_path) -> None:
    names = ("blocks.0.attn1.to_q", "blocks.1.attn1.to_k")
    tensors = {}
    made = {}
    for name in names:
        made[name] = factors(SHAPES[f"{name}.weight"])
        tensors[f"transformer.{name}.lora_A.weight"], tensors[f"transformer.{name}.lora_B.weight"] = made[
            name
        ]
    bias = torch.randn(SHAPES[f"{names[0]}.bias"])
    tensors[f"transformer.{names[0]}.lora_B.bias"] = bias
    said = {"transformer.lora_alpha": 6, "transformer.r": RANK, "transformer.alpha_pattern": {names[1]: 12}}
    path = write(tmp_path / "a.safetensors", tensors, {"lora_adapter_metadata": json.dumps(said)})
    before = state_of(network)
    expected = {
        f"{name}.weight": before[f"{name}.weight"].double() + product(*made[name], alpha / RANK)
        for name, alpha in zip(names, (6, 12), strict=True)
    }
    expected[f"{names[0]}.bias"] = before[f"{names[0]}.bias"].double() + 6 / RANK * bias.double()
    check(network, Lora(str(path)), expected)
    write(path, tensors, {"lora_adapter_metadata": json.dumps({"transformer.use_rslora": True})})
    with pytest.raises(UsageError, match="rank-stabilised"):
        check_adapters([Lora(str(path))], [CONFIG])


def test_several_add_up_from_the_base_in_their_order(network, tmp_path) -> None:
    sizes = {"blocks.0.self_attn.q": SHAPES["blocks.0.attn1.to_q.weight"]}
    (one, first), (two, second) = (lora_of(tmp_path / f"{n}.safetensors", sizes) for n in range(2))
    before = state_of(network)
    own = adapted(network)
    name = "blocks.0.attn1.to_q.weight"
    change = 0.8 * first["blocks.0.self_attn.q"] - 2 * second["blocks.0.self_attn.q"]
    both = [Lora(str(one), 0.8), Lora(str(two), -2)]
    own.use(both)
    merged = network.state_dict()[name].clone()
    assert (merged.double() - before[name].double() - change).abs().max() < ROUNDING * before[
        name
    ].abs().max()
    for _ in range(3):  # whatever came between, the bits are the same
        own.use([Lora(str(two), 3)])
        own.use(both)
        assert torch.equal(network.state_dict()[name], merged)
    own.use([Lora(str(one), 0)])
    assert torch.equal(network.state_dict()[name], before[name])


def test_in_place_and_rounded_once_in_16_bits(tmp_path) -> None:
    network = twin(reference(CONFIG)).to(torch.bfloat16)
    where = {name: value.data_ptr() for name, value in network.named_parameters()}
    sizes = {name: SHAPES[f"{OFFICIAL[name]}.weight"] for name in OFFICIAL}
    path, changes = lora_of(tmp_path / "a.safetensors", sizes)
    before = state_of(network)
    adapted(network).use([Lora(str(path))])
    assert where == {name: value.data_ptr() for name, value in network.named_parameters()}
    for theirs, change in changes.items():
        name = f"{OFFICIAL[theirs]}.weight"
        exact = before[name].double() + change
        # half a unit in the last of 8 bits, and float32's own rounding where a sum is near zero
        assert ((network.state_dict()[name].double() - exact).abs() <= exact.abs() * 2**-8 + ROUNDING).all()


def test_a_merge_that_was_cut_short_leaves_nothing_behind(network, tmp_path, monkeypatch) -> None:
    sizes = {name: SHAPES[f"{OFFICIAL[name]}.weight"] for name in OFFICIAL}
    path, _ = lora_of(tmp_path / "a.safetensors", sizes)
    before = state_of(network)
    own = adapted(network)
    write_one = AdaptedNetwork._write
    left = [4]

    def cut(self: AdaptedNetwork, name: str, merged: Tensor, *rows: None) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise torch.OutOfMemoryError("no more")
        write_one(self, name, merged)

    monkeypatch.setattr(AdaptedNetwork, "_write", cut)
    with pytest.raises(torch.OutOfMemoryError):
        own.use([Lora(str(path))])
    monkeypatch.undo()
    assert any(not torch.equal(value, before[name]) for name, value in network.state_dict().items())
    own.use([])
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_what_has_no_place_is_named_key_by_key(network, tmp_path) -> None:
    shape = SHAPES["blocks.0.attn1.to_q.weight"]
    path, _ = lora_of(tmp_path / "a.safetensors", {"blocks.0.self_attn.q": shape})
    from safetensors.torch import load_file

    odd = {
        "diffusion_model.blocks.99.self_attn.q.lora_down.weight": torch.ones(RANK, shape[1]),
        "diffusion_model.blocks.0.self_attn.k.lora_down.weight": torch.ones(RANK, shape[1]),  # without its up
        "diffusion_model.patch_embedding.diff": torch.ones(shape[0], 99, 1, 2, 2),
        "lora_te_layers_0.lora_up.weight": torch.ones(4, 4),
        "a note": torch.ones(1),
    }
    write(path, {**load_file(path), **odd})
    (note,) = check_adapters([Lora(str(path))], [CONFIG])
    assert "5 key(s)" in note and all(key in note for key in odd), note
    assert f"here {list(SHAPES['patch_embedding.weight'])}" in note
    adapted(network).use([Lora(str(path))])


REFUSED: dict[str, tuple[dict[str, Tensor], str]] = {
    "another network's": (
        {"lora_unet_down_blocks_0.lora_down.weight": torch.ones(2, 2)},
        "none of its 1 names",
    ),
    "zero": (
        {
            "blocks.0.self_attn.q.lora_down.weight": torch.ones(2, 60),
            "blocks.0.self_attn.q.lora_up.weight": torch.zeros(60, 2),
        },
        "all of its changes are zero",
    ),
    "of alpha zero": (
        {
            "blocks.0.self_attn.q.lora_down.weight": torch.ones(2, 60),
            "blocks.0.self_attn.q.lora_up.weight": torch.ones(60, 2),
            "blocks.0.self_attn.q.alpha": torch.zeros(()),
        },
        "all of its changes are zero",
    ),
    "not finite": (
        {"blocks.0.self_attn.q.diff": torch.full((60, 60), float("inf"))},
        "it has NaN or Inf .blocks.0.self_attn.q.diff",
    ),
    "misshapen": (
        {
            "blocks.0.self_attn.q.lora_down.weight": torch.ones(2, 60),
            "blocks.0.self_attn.q.lora_up.weight": torch.ones(60, 3),
        },
        "none of its 1 names",
    ),
    "without a rank": (
        {
            "blocks.0.self_attn.q.hada_w1_a": torch.ones(60, 0),
            "blocks.0.self_attn.q.hada_w1_b": torch.ones(0, 60),
            "blocks.0.self_attn.q.hada_w2_a": torch.ones(60, 0),
            "blocks.0.self_attn.q.hada_w2_b": torch.ones(0, 60),
            "blocks.0.self_attn.q.alpha": torch.ones(1),
        },
        "none of its 1 names",
    ),
    "far too large": (  # 4 TB, were it made
        {
            "blocks.0.self_attn.q.lokr_w1": torch.ones(1000, 1000),
            "blocks.0.self_attn.q.lokr_w2": torch.ones(1000, 1000),
        },
        "none of its 1 names",
    ),
    "magnitudes of another layer": (
        {
            "blocks.0.self_attn.q.lora_down.weight": torch.ones(2, 60),
            "blocks.0.self_attn.q.lora_up.weight": torch.ones(60, 2),
            "blocks.0.self_attn.q.dora_scale": torch.ones(61, 1),
        },
        "61 magnitudes, here 60",
    ),
    "two adapters in one": (
        {f"blocks.0.self_attn.q.lora_A.{name}.weight": torch.ones(2, 60) for name in ("first", "second")},
        "two tensors for one part",
    ),
    "alpha that is no number": (
        {
            "blocks.0.self_attn.q.diff": torch.ones(60, 60),
            "blocks.0.self_attn.q.alpha": torch.tensor(float("nan")),
        },
        "alpha is no number",
    ),
    "nothing": ({}, "none of its 0 names"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_an_adapter_that_does_nothing_is_refused(tmp_path, kind) -> None:
    tensors, said = REFUSED[kind]
    path = write(tmp_path / "a.safetensors", tensors)
    with pytest.raises(UsageError, match=said):
        check_adapters([Lora(str(path))], [CONFIG])


def test_a_change_that_is_lost_in_rounding_is_refused(tmp_path) -> None:
    network = twin(reference(CONFIG)).to(torch.bfloat16)
    sizes = {"blocks.0.self_attn.q": SHAPES["blocks.0.attn1.to_q.weight"]}
    path, _ = lora_of(tmp_path / "a.safetensors", sizes, strength=1e-8)
    own = adapted(network)
    with pytest.raises(UsageError, match="smaller than a rounding"):
        own.use([Lora(str(path))])
    own.use([])


@pytest.mark.parametrize("strength", [1e25, float("nan")])
def test_a_merge_that_is_not_finite_is_refused_and_leaves_nothing(network, tmp_path, strength) -> None:
    before = state_of(network)
    sizes = {"blocks.0.self_attn.q": SHAPES["blocks.0.attn1.to_q.weight"]}
    path, _ = lora_of(tmp_path / "a.safetensors", sizes, strength=strength)
    own = adapted(network)
    with pytest.raises(UsageError, match=r"blocks.0.* would have NaN or Inf in float32"):
        own.use([Lora(str(path))])
    own.use([])
    assert all(torch.equal(value, before[name]) for name, value in state_of(network).items())


def test_names_of_both_layouts_never_meet() -> None:
    config = WanConfig.from_json(
        {**CONFIG.to_json(), "image_dim": 8, "added_kv_proj_dim": 60, "pos_embed_seq_len": 4}
    )
    table = _modules(config)
    for name in parameter_shapes(config):
        owner = name.rpartition(".")[0] if name.endswith(("weight", "bias")) else name
        theirs = official_transformer_name(name)
        other = theirs.rpartition(".")[0] if theirs.endswith(("weight", "bias")) else theirs
        assert table[owner.replace(".", "_")] == owner and table[other.replace(".", "_")] == owner


def test_a_file_that_changed_since_the_request_is_refused(tmp_path) -> None:
    sizes = {"blocks.0.self_attn.q": SHAPES["blocks.0.attn1.to_q.weight"]}
    path, _ = lora_of(tmp_path / "a.safetensors", sizes)
    lora = Lora(str(path))
    lora_of(tmp_path / "a.safetensors", sizes)
    with pytest.raises(UsageError, match="has changed since"):
        check_adapters([lora], [CONFIG])


@pytest.mark.parametrize("data", [b"", b"\x80\x04pickle", b"\xff" * 64], ids=["empty", "pickle", "garbage"])
@pytest.mark.parametrize("ending", [".safetensors", ".pt", ".txt"])
def test_a_file_that_is_no_adapter_is_refused_in_words(tmp_path: Path, ending: str, data: bytes) -> None:
    path = tmp_path / f"a{ending}"
    path.write_bytes(data)
    with pytest.raises(UsageError, match="it cannot be used: ") as raised:
        check_adapters([Lora(str(path))], [CONFIG])
    assert "chitu models" not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("a.safetensors", ("a.safetensors", 1.0, None)),
        ("a.safetensors:0.8", ("a.safetensors", 0.8, None)),
        ("a.safetensors@high:-0.5", ("a.safetensors", -0.5, "high")),
        ("a.safetensors@low", ("a.safetensors", 1.0, "low")),
        ("b:2", ("b:2", 1.0, None)),
        ("c@low", ("c@low", 1.0, None)),
        ("c@low:2", ("c@low", 2.0, None)),
    ],
)
def test_the_text_of_an_adapter(tmp_path, monkeypatch, text, read) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.safetensors", "b:2", "c@low"):
        Path(name).write_bytes(b"x")
    lora = Lora.of(text)
    assert (Path(lora.path).name, lora.strength, lora.expert) == read


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("missing.safetensors", "missing.safetensors'.*cannot be read"),
        ("a:nan", "strength nan"),
        ("a:99", "-20 to 20"),
        ({"path": "a", "scale": 1}, "use path, strength and expert"),
        ({"path": "a", "expert": "middle"}, "'high' or 'low'"),
        ({"path": "a", "strength": "1"}, "strength '1'"),
        (3, "FILE:0.8"),
        (["a"] * 65, "at most 64"),
        (".", "a folder"),
    ],
)
def test_what_cannot_be_an_adapter_is_refused_in_words(tmp_path, monkeypatch, value, said) -> None:
    from chitu_diffusion.task import DiffusionUserParams

    monkeypatch.chdir(tmp_path)
    Path("a").write_bytes(b"x")
    with pytest.raises(UsageError, match=said) as raised:
        DiffusionUserParams("a cat", lora=value)
    assert raised.value.field == "lora"
