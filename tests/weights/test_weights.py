"""Reading, writing and refusing weights; both layouts; folders and names of models."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_model import write_tiny_model
from torch import Tensor, nn

from chitu_diffusion.errors import CheckpointError, ModelMissingError, UsageError
from chitu_diffusion.models.convert import convert, verify
from chitu_diffusion.models.folder import read_folder
from chitu_diffusion.models.kinds import TEXT_TO_VIDEO
from chitu_diffusion.models.loading import load_text_encoder, load_transformer, load_vae
from chitu_diffusion.models.registry import TINY, model_names, resolve_model, spec_of_folder
from chitu_diffusion.models.wan.presets import FULL_SIZE
from chitu_diffusion.models.wan.transformer import KEEP_FLOAT32
from chitu_diffusion.weights.loader import WeightFiles, load_into, save_weights

STEM = "diffusion_pytorch_model"
INDEX = f"{STEM}.safetensors.index.json"


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model") / "two", experts=2, seed=5)


@pytest.fixture(scope="module")
def official(experts: Path) -> Path:
    target = experts.with_name("official")
    convert(experts, target, "official", max_shard_bytes=40_000)
    return target


class Pair(nn.Module):
    """Two layers and a buffer, enough to fill."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 3)
        self.norm1 = nn.LayerNorm(3)
        self.register_buffer("scale", torch.ones(2))


def empty() -> Pair:
    with torch.device("meta"):
        return Pair()


def tensors() -> dict[str, Tensor]:
    return {name: torch.randn(value.shape) for name, value in Pair().state_dict().items()}


def same(found: nn.Module, expected: nn.Module) -> None:
    left = found.state_dict()
    right = expected.state_dict()
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert torch.equal(value, right[name]), name


# -- what goes right


def test_both_layouts_give_the_same_tensors(experts: Path, official: Path, tmp_path: Path) -> None:
    ours = read_folder(experts)
    theirs = read_folder(official)
    assert (ours.layout, theirs.layout) == ("diffusers", "official")
    assert (official / "high_noise_model" / INDEX).exists()  # many shards
    high = load_transformer(ours)
    low = load_transformer(ours, "transformer_2")
    same(load_transformer(theirs), high)
    same(load_transformer(theirs, "transformer_2"), low)
    assert not torch.equal(high.proj_out.weight, low.proj_out.weight)
    same(load_vae(theirs), load_vae(ours))
    same(load_text_encoder(theirs), load_text_encoder(ours))
    assert theirs.boundary_ratio == ours.boundary_ratio == 0.875
    assert theirs.components["vae"].config["latents_mean"] == ours.components["vae"].config["latents_mean"]
    assert spec_of_folder(read_folder(official)) == spec_of_folder(read_folder(experts))


def test_there_and_back_opens_in_diffusers(official: Path, experts: Path, tmp_path: Path) -> None:
    from diffusers import WanPipeline

    back = convert(official, tmp_path / "back", "diffusers")
    pipeline = WanPipeline.from_pretrained(back.path)
    origin = WanPipeline.from_pretrained(experts)
    for part in ("transformer", "transformer_2", "vae", "text_encoder"):
        same(getattr(pipeline, part), getattr(origin, part))
    assert pipeline.config.boundary_ratio == 0.875
    assert dict(pipeline.scheduler.config) == dict(origin.scheduler.config)
    assert pipeline.tokenizer("a red fish").input_ids == origin.tokenizer("a red fish").input_ids
    assert spec_of_folder(read_folder(back.path)) == spec_of_folder(read_folder(experts))


def test_convert_of_a_bad_source_leaves_nothing(experts: Path, official: Path, tmp_path: Path) -> None:
    """The last part that is written is the one at fault, so that much stands already."""
    spoilt = shutil.copytree(experts, tmp_path / "spoilt")
    (spoilt / "text_encoder" / "config.json").write_text("{}")
    with pytest.raises(CheckpointError):
        convert(spoilt, tmp_path / "new" / "target", "official")
    assert os.listdir(tmp_path) == ["spoilt"]


@pytest.mark.parametrize("layout", ["diffusers", "official"])
def test_a_source_that_shrinks_under_convert_is_an_error(
    experts: Path, tmp_path: Path, layout: Literal["diffusers", "official"], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not a SIGBUS: nothing is mapped."""
    source = shutil.copytree(experts, tmp_path / "source")
    read = WeightFiles.read

    def shrinks(self: WeightFiles, key: str) -> Tensor:
        file = self.entries[key].file
        if "vae" in str(file):
            os.truncate(file, 5000)
        return read(self, key)

    monkeypatch.setattr(WeightFiles, "read", shrinks)
    with pytest.raises(CheckpointError, match="has become shorter"):
        convert(source, tmp_path / "target", layout)
    assert os.listdir(tmp_path) == ["source"]


@pytest.mark.parametrize("offsets", [([0, 64], [0, 64]), ([0, 32], [32, 128]), ([4, 68], [64, 128])])
def test_tensors_that_lie_on_each_other_are_refused(
    tmp_path: Path, offsets: tuple[list[int], list[int]]
) -> None:
    """Without safetensors' own reader, too, which a long work goes without."""
    file = tmp_path / "w.safetensors"
    header = {
        key: {"dtype": "F32", "shape": [4, 4], "data_offsets": place}
        for key, place in zip("ab", offsets, strict=True)
    }
    said = json.dumps(header).encode()
    end = max(place[1] for place in offsets)
    file.write_bytes(struct.pack("<Q", len(said)) + said + bytes(end))
    with pytest.raises(CheckpointError, match="does not lie where"):
        WeightFiles(file, mapped=False)


def test_verify_likes_both_layouts_and_finds_a_nan(official: Path, experts: Path, tmp_path: Path) -> None:
    for folder in (official, experts):
        findings = verify(folder, deep=True)
        assert all(finding.ok for finding in findings), findings
        parts = ["folder", "transformer", "transformer_2", "vae", "text_encoder", "tokenizer", "scheduler"]
        assert [finding.part for finding in findings] == parts
    spoilt = shutil.copytree(experts, tmp_path / "spoilt")
    file = spoilt / "vae" / f"{STEM}.safetensors"
    values = load_file(file)
    values["decoder.conv_in.bias"][1] = torch.nan
    save_file(values, file)
    shutil.rmtree(spoilt / "tokenizer")
    bad = {finding.part: finding.message for finding in verify(spoilt, deep=True) if not finding.ok}
    assert set(bad) == {"vae", "tokenizer"} and "decoder.conv_in.bias" in bad["vae"]
    assert [finding.ok for finding in verify(tmp_path)] == [False]


def test_dtype_and_what_stays_float32(experts: Path) -> None:
    model = load_transformer(read_folder(experts), dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        kept = not set(name.split(".")).isdisjoint(KEEP_FLOAT32)
        assert parameter.dtype == (torch.float32 if kept else torch.bfloat16), name
        assert not parameter.requires_grad
    kept_names = {name.split(".")[-1] for name, p in model.named_parameters() if p.dtype == torch.float32}
    assert kept_names == {"scale_shift_table", "weight", "bias"}


@pytest.mark.parametrize("limit", [10**9, 30])
def test_save_and_load(tmp_path: Path, limit: int) -> None:
    values = tensors()
    (tmp_path / f"{STEM}-00001-of-00009.safetensors").write_bytes(b"of an older save")
    files = save_weights(
        values, tmp_path, dtype=torch.bfloat16, keep_float32=("norm1",), max_shard_bytes=limit
    )
    assert sorted(tmp_path.iterdir()) == sorted(files)  # no .part, nothing stale
    assert len(files) == (1 if limit > 30 else 3)  # two shards and their index
    module = empty()
    seen: list[tuple[int, int]] = []
    load_into(module, WeightFiles(tmp_path), progress=lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1] == (12 + 3 + 2) * 2 + 6 * 4
    for name, value in module.state_dict().items():
        kept = name.startswith("norm1")
        assert value.dtype == (torch.float32 if kept else torch.bfloat16)
        assert torch.equal(value, values[name] if kept else values[name].bfloat16())
    if limit == 30:  # shards without their index still are a set
        (tmp_path / INDEX).unlink()
        assert len(WeightFiles(tmp_path).entries) == 5
        files[1].unlink()
        with pytest.raises(CheckpointError, match="not one complete set"):
            WeightFiles(tmp_path)


def test_a_pth_is_the_same_as_safetensors(tmp_path: Path) -> None:
    values = tensors()
    torch.save(values, tmp_path / "new.pth")
    torch.save(values, tmp_path / "old.pth", _use_new_zipfile_serialization=False)  # cannot be mapped
    for name in ("new.pth", "old.pth"):
        module = empty()
        load_into(module, WeightFiles(tmp_path / name), names={"first.weight": "first.weight"})
        assert all(torch.equal(value, values[key]) for key, value in module.state_dict().items())


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="counts memory in Linux's way")
def test_loading_makes_no_second_copy(tmp_path: Path) -> None:
    """Anonymous memory grows by the weights and one tensor, not by twice the weights."""
    with torch.device("meta"):
        module = nn.Sequential(*(nn.Linear(2048, 2048, bias=False) for _ in range(12)))
    save_weights({f"{i}.weight": torch.ones(2048, 2048) for i in range(12)}, tmp_path, max_shard_bytes=10**8)

    def anonymous() -> int:
        status = Path("/proc/self/status").read_text().split("RssAnon:")[1]
        return int(status.split()[0]) * 1024

    before = anonymous()
    most = [0]

    def watch(done: int, total: int) -> None:
        most[0] = max(most[0], anonymous())

    doubled = [lambda name, tensor: {name: tensor.mul_(2)}]
    load_into(module, WeightFiles(tmp_path), dtype=torch.bfloat16, progress=watch, transforms=doubled)
    weights = 12 * 2048 * 2048 * 2
    assert most[0] - before < 1.3 * weights + 2048 * 2048 * 4


def test_tensors_go_through_transforms_in_order_as_they_are_read(tmp_path: Path) -> None:
    """A rank-1 delta on one matrix, as an adapter adds it, and after it one that splits what came of it."""
    stored = tensors()
    save_weights(stored, tmp_path)
    up = torch.randn(3, 1)
    down = torch.randn(1, 4)

    def add(name: str, tensor: Tensor) -> dict[str, Tensor]:
        return {name: tensor + up @ down if name == "first.weight" else tensor}

    def split(name: str, tensor: Tensor) -> dict[str, Tensor]:
        if name != "first.weight":
            return {name: tensor}
        return {"first.sign": tensor.sign(), "first.size": tensor.abs()}

    changed = empty()
    load_into(changed, WeightFiles(tmp_path), transforms=[add])
    for name, value in changed.state_dict().items():
        delta = up @ down if name == "first.weight" else torch.zeros(())
        assert torch.equal(value, stored[name] + delta), name
    assert isinstance(changed.first.weight, nn.Parameter)
    apart = empty()
    load_into(apart, WeightFiles(tmp_path), transforms=[add, split])
    assert torch.equal(apart.first.sign * apart.first.size, changed.first.weight)
    # what came in its place is not what checkpoints hold
    assert apart.first.weight is None and not {"first.sign", "first.size"} & apart.state_dict().keys()


def test_tied_names_may_stand_singly_or_twice(experts: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(experts, tmp_path / "model")
    file = folder / "text_encoder" / "model.safetensors"
    values = load_file(file)
    first = "shared.weight"
    second = "encoder.embed_tokens.weight"
    table = values.pop(first, None)
    table = values.pop(second) if table is None else table
    expected = load_text_encoder(read_folder(experts))
    for names in ((first,), (second,), (first, second)):
        save_file({**values, **{name: table.clone() for name in names}}, file, metadata={"format": "pt"})
        found = load_text_encoder(read_folder(folder))
        same(found, expected)
        assert found.network.encoder.embed_tokens.weight is found.network.shared.weight
    save_file({**values, first: table, second: table + 1}, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="two names of one tensor"):
        load_text_encoder(read_folder(folder))


# -- what goes wrong


def rewrite(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        values = tensors()
        change(values)
        save_file(values, folder / f"{STEM}.safetensors")

    return spoil


def sharded(change: Callable[[dict[str, Any], Path], Any]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        save_weights(tensors(), folder, max_shard_bytes=30)
        index = folder / INDEX
        data = json.loads(index.read_text())
        change(data["weight_map"], folder)
        index.write_text(json.dumps(data))

    return spoil


def truncated(folder: Path) -> None:
    save_file(tensors(), folder / f"{STEM}.safetensors")
    os.truncate(folder / f"{STEM}.safetensors", os.path.getsize(folder / f"{STEM}.safetensors") - 5)


def two_homes(weight_map: dict[str, str], folder: Path) -> None:
    shard = folder / f"{STEM}-00002-of-00004.safetensors"
    save_file({**load_file(shard), "scale": torch.ones(2)}, shard)


def no_index(folder: Path) -> None:
    sharded(two_homes)(folder)
    (folder / INDEX).unlink()


def lose_key(weight_map: dict[str, str], folder: Path) -> None:
    shard = folder / weight_map["first.weight"]
    values = load_file(shard)
    values["first.wait"] = values.pop("first.weight")
    save_file(values, shard)


FAULTS: dict[str, tuple[Callable[[Path], Any], str, str | None]] = {
    "missing": (rewrite(lambda v: v.pop("first.bias")), "missing", "first.bias"),
    "extra": (rewrite(lambda v: v.update(more=torch.ones(1))), "does not have", "more"),
    "misshapen": (
        rewrite(lambda v: v.update(scale=torch.ones(3))),
        "wrong shape; .*expected: \\[2\\]; found: \\[3\\]",
        "scale",
    ),
    "transposed": (
        rewrite(lambda v: v.update({"first.weight": torch.ones(4, 3)})),
        "wrong shape",
        "first.weight",
    ),
    "integers": (
        rewrite(lambda v: v.update(scale=torch.ones(2, dtype=torch.int32))),
        "not of floats.*found: I32",
        "scale",
    ),
    "truncated": (truncated, "truncated; .*expected: \\d+ bytes; found: \\d+ bytes", None),
    "no header": (
        lambda f: (f / f"{STEM}.safetensors").write_bytes(b"not it"),
        "truncated or no safetensors",
        None,
    ),
    "page of html": (
        lambda f: (f / f"{STEM}.safetensors").write_bytes(b"<html>404</html>"),
        "truncated or no safetensors",
        None,
    ),
    "bad header": (
        lambda f: (f / f"{STEM}.safetensors").write_bytes(struct.pack("<Q", 2) + b"[]"),
        "no readable header",
        None,
    ),
    "no files": (lambda f: None, "there are no weights", None),
    "shard missing": (sharded(lambda m, f: (f / m["scale"]).unlink()), "a shard is missing", "scale"),
    "shard lacks key": (sharded(lose_key), "lacks what the index says", "first.weight"),
    "shard holds more": (sharded(lambda m, f: m.pop("first.bias")), "does not say", "first.bias"),
    "two shards": (sharded(two_homes), "does not say", "scale"),
    "two shards, no index": (no_index, "stands in two shards", "scale"),
    "index elsewhere": (
        sharded(lambda m, f: m.update(scale="../../secret.safetensors")),
        "no shard beside it",
        "scale",
    ),
    "index is no index": (
        lambda f: (f / INDEX).write_text('{"weight_map": 3}'),
        "index of shards cannot be read",
        None,
    ),
}


@pytest.mark.parametrize("fault", sorted(FAULTS))
def test_a_faulty_checkpoint_is_refused_by_name(fault: str, tmp_path: Path) -> None:
    spoil, words, key = FAULTS[fault]
    spoil(tmp_path)
    module = empty()
    with pytest.raises(CheckpointError, match=words) as caught:
        load_into(module, WeightFiles(tmp_path))
    assert str(tmp_path) in str(caught.value.file)
    assert key is None or key in str(caught.value.key)
    assert "chitu models" in str(caught.value)
    assert all(value.is_meta for value in module.state_dict().values())  # nothing was loaded


class Hostile:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch pwned",)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"first.weight": Hostile()}, "cannot be read"),
        ({"model": {"first.weight": torch.ones(1)}}, "not a flat table"),
        ([torch.ones(1)], "not a flat table"),
        ({"first.weight": torch.ones(1, dtype=torch.int64)}, "not of floats"),
        (None, "cannot be read"),
    ],
)
def test_a_faulty_pth_is_refused(
    content: object, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "weights.pth"
    torch.save(content if content is not None else tensors(), file)
    if content is None:
        os.truncate(file, os.path.getsize(file) // 2)
    with pytest.raises(CheckpointError, match=words) as caught:
        WeightFiles(file)
    assert caught.value.file == file
    assert not (tmp_path / "pwned").exists()


def test_faults_of_folders(experts: Path, official: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelMissingError, match="no folder"):
        read_folder(tmp_path / "nowhere")
    with pytest.raises(ModelMissingError, match="holds no model"):
        read_folder(tmp_path)
    spoilt = shutil.copytree(experts, tmp_path / "spoilt")
    index = spoilt / "model_index.json"
    for changed, words in (({"_class_name": "FluxPipeline"}, "WanPipeline"),):
        index.write_text(json.dumps({**json.loads((experts / "model_index.json").read_text()), **changed}))
        with pytest.raises(CheckpointError, match=words):
            read_folder(spoilt)
    index.write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_folder(spoilt)
    spoilt = shutil.copytree(official, tmp_path / "official")
    vae_file, text_file = (str(TEXT_TO_VIDEO.official_file(role)) for role in ("vae", "text_encoder"))
    (spoilt / vae_file).unlink()
    (spoilt / text_file).write_bytes(b"PK")
    bad = {finding.part: finding.message for finding in verify(spoilt) if not finding.ok}
    assert set(bad) == {"vae", "text_encoder"} and vae_file in bad["vae"] and text_file in bad["text_encoder"]
    with pytest.raises(UsageError, match="exists already"):
        convert(experts, official, "official")


# -- names


def test_names_ids_and_folders(experts: Path) -> None:
    wan21 = ("T2V-1.3B", "T2V-14B", "I2V-14B-480P", "I2V-14B-720P", "FLF2V-14B-720P")
    wan21 += ("VACE-1.3B", "VACE-14B")
    wan22 = ("T2V-A14B", "I2V-A14B", "TI2V-5B")
    assert model_names() == [
        TINY,
        *(f"Wan2.1-{name}" for name in wan21),
        *(f"Wan2.2-{name}" for name in wan22),
    ]
    for spec in FULL_SIZE.values():
        for name in (spec.name, spec.name.lower(), *spec.hub_ids):
            assert resolve_model(name)[0] == spec
    with pytest.raises(ModelMissingError, match=r"'Wan2\.1-T2V-14B'"):
        resolve_model("Wan2.1-T2V-14")
    spec, folder = resolve_model(str(experts))
    assert folder.path == experts and spec.boundary == 0.875 and len(spec.transformers) == 2
    assert spec.name == "random-tiny" and spec.defaults.guidance == (4.0, 3.0) and spec.defaults.shift == 3.0
    assert spec.text_dim == 32 and spec.geometry.channels == 4
    with pytest.raises(CheckpointError, match=r"does not hold Wan2\.2-T2V-A14B"):
        resolve_model("Wan2.2-T2V-A14B", experts)


def test_full_size_facts() -> None:
    large = FULL_SIZE["Wan2.2-T2V-A14B"]
    assert large.tokens(81, 480, 832) == 32_760 and large.tokens(81, 720, 1280) == 75_600
    assert large.geometry.latent_shape(81, 480, 832) == (16, 21, 60, 104)
    assert large.latent_shape(81, 240, 424) == (16, 21, 30, 54)
    assert large.tokens(81, 1080, 1920) == 21 * 68 * 120
    assert (large.defaults.steps, large.defaults.shift, large.defaults.guidance) == (40, 12.0, (4.0, 3.0))
