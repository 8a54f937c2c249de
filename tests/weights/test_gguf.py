"""GGUF files beside the package that writes them: values, names, shapes; and whatever else may stand in
one.
"""

from __future__ import annotations

import builtins
import random
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fuzzing import within
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter, quants
from gguf_files import random_blocks, write_gguf

from chitu_diffusion.errors import CheckpointError
from chitu_diffusion.models.wan.checkpoint_names import TEXT_TIES, official_text_name
from chitu_diffusion.weights.files import WeightFiles
from chitu_diffusion.weights.loader import match_names

ROUNDED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4", "TQ1_0", "TQ2_0")
BLOCKS = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS")


def one(path: Path, **tensors: torch.Tensor) -> WeightFiles:
    write_gguf(path, {"a.weight": torch.zeros(4), **tensors}, {})
    return WeightFiles(path)


@pytest.mark.parametrize("kind", [*ROUNDED, *BLOCKS])
def test_blocks_have_the_package_s_values(kind: str, tmp_path: Path) -> None:
    values = torch.randn(6, 512)
    held = write_gguf(tmp_path / "a.gguf", {"w": values, "b": torch.randn(6)}, {"w": kind})
    weights = WeightFiles(tmp_path / "a.gguf")
    assert weights.entries["w"].shape == (6, 512) and weights.entries["w"].packing == kind
    assert torch.equal(weights.read("w"), held["w"]) and torch.equal(weights.read("b"), held["b"])
    assert weights.read("w").dtype is torch.float32
    if kind in ROUNDED[:-3]:  # rounding is no better than its bits, and no worse
        assert (weights.read("w") - values).norm() < 0.2 * values.norm()
    raw = weights.read_packed("w")
    assert (
        raw.numel()
        == weights.entries["w"].packed_bytes
        == 3072 // GGML_QUANT_SIZES[kind_of(kind)][0] * (GGML_QUANT_SIZES[kind_of(kind)][1])
    )


def kind_of(name: str) -> GGMLQuantizationType:
    return GGMLQuantizationType[name]


def test_every_type_that_the_package_unpacks_is_read(tmp_path: Path) -> None:
    """Random bits are a file, too; values that are no numbers among them."""
    for kind in quants._type_traits:
        count, size = GGML_QUANT_SIZES[kind]
        data = np.random.default_rng(int(kind)).integers(0, 256, (3, 512 // count * size), np.uint8)
        writer = GGUFWriter(tmp_path / "a.gguf", "wan")
        writer.add_tensor("w", data, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        with np.errstate(all="ignore"):
            expected = torch.from_numpy(quants.dequantize(data, kind))
        found = WeightFiles(tmp_path / "a.gguf").read("w").float()
        assert torch.equal(found.nan_to_num(7), expected.nan_to_num(7)), kind.name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_floats_keep_their_type(dtype: torch.dtype, tmp_path: Path) -> None:
    values = torch.randn(3, 5, 7).to(dtype)
    weights = one(tmp_path / "a.gguf", w=values)
    assert weights.entries["w"].packing is None and torch.equal(weights.read("w"), values)


def test_prefixes_go_and_shapes_are_those_that_were_written(tmp_path: Path) -> None:
    names = {f"model.diffusion_model.{name}": torch.randn(2, 32) for name in ("a.weight", "b.weight")}
    shapes = {"model.diffusion_model.a.weight": (2, 4, 8)}
    write_gguf(tmp_path / "a.gguf", names, dict.fromkeys(names, "Q8_0"), shapes=shapes, architecture=None)
    weights = WeightFiles(tmp_path / "a.gguf")
    assert weights.entries["a.weight"].shape == (2, 4, 8) == tuple(weights.read("a.weight").shape)
    assert weights.entries["b.weight"].shape == (2, 32)


@pytest.mark.parametrize("stored", [(8, 3, 1, 2, 2), (8, 3, 2, 2), (8, 12), (96,), (24, 2, 2)])
def test_a_patch_embedding_has_five_axes_however_it_is_stored(
    stored: tuple[int, ...], tmp_path: Path
) -> None:
    values = torch.randn(8, 3, 1, 2, 2)
    write_gguf(tmp_path / "a.gguf", {"patch_embedding.weight": values.reshape(stored)}, {})
    weights = WeightFiles(tmp_path / "a.gguf")
    match_names({"patch_embedding.weight": (8, 3, 1, 2, 2)}, weights)
    assert torch.equal(weights.read("patch_embedding.weight"), values)


def test_nothing_else_changes_its_shape(tmp_path: Path) -> None:
    weights = one(tmp_path / "a.gguf", w=torch.randn(4, 6))
    with pytest.raises(CheckpointError, match="wrong shape"):
        match_names({"a.weight": (4,), "w": (6, 4)}, weights)
    with pytest.raises(CheckpointError, match="wrong shape"):
        match_names({"a.weight": (4,), "w": (4, 3, 1, 1, 1)}, weights)


def test_t5_s_names_are_told_as_transformers_has_them(tmp_path: Path) -> None:
    """Those of llama.cpp beside the ones of the official file, each on its parameter."""
    theirs = {"attn_q": "attn.q", "attn_k": "attn.k", "attn_v": "attn.v", "attn_o": "attn.o",
              "attn_norm": "norm1", "attn_rel_b": "pos_embedding.embedding", "ffn_gate": "ffn.gate.0",
              "ffn_up": "ffn.fc1", "ffn_down": "ffn.fc2", "ffn_norm": "norm2"}  # fmt: skip
    tensors = {"token_embd.weight": torch.zeros(1), "enc.output_norm.weight": torch.ones(1)}
    tensors |= {f"enc.blk.{n}.{name}.weight": torch.ones(1) for n in (0, 11) for name in theirs}
    write_gguf(tmp_path / "a.gguf", tensors, {}, architecture="t5encoder")
    expected = {"token_embedding.weight", "norm.weight"}
    expected |= {f"blocks.{n}.{name}.weight" for n in (0, 11) for name in theirs.values()}
    found = WeightFiles(tmp_path / "a.gguf").entries
    assert {official_text_name(name) for name in found} == expected
    assert TEXT_TIES["encoder.embed_tokens.weight"] in found


@pytest.mark.parametrize("name", ["llama", "flux", "\x1b[31m"])
def test_another_network_is_named(name: str, tmp_path: Path) -> None:
    write_gguf(tmp_path / "a.gguf", {"w": torch.ones(2)}, {}, architecture=name)
    with pytest.raises(CheckpointError, match=r"another kind of network.*Wan's is 'wan'"):
        WeightFiles(tmp_path / "a.gguf")


def test_without_the_package_the_command_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(tmp_path / "a.gguf", {"w": torch.ones(2)}, {})
    real = builtins.__import__

    def missing(name: str, *rest: Any) -> Any:
        if name == "gguf":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(CheckpointError, match=r"pip install 'gguf>=0\.19'"):
        WeightFiles(tmp_path / "a.gguf")


def test_a_folder_may_hold_one(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"one \.gguf file"):
        WeightFiles(tmp_path / "empty")
    one(tmp_path / "a.gguf")
    assert WeightFiles(tmp_path).files == [tmp_path / "a.gguf"]
    one(tmp_path / "b.gguf")
    with pytest.raises(CheckpointError, match="several GGUF files"):
        WeightFiles(tmp_path)


def header(tensors: int = 1, keys: int = 0, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys)


def text(value: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(value) if length is None else length) + value


def info(axes: tuple[int, ...] = (32,), kind: int = 0, offset: int = 0, name: bytes = b"w") -> bytes:
    shape = struct.pack(f"<I{len(axes)}Q", len(axes), *axes)
    return text(name) + shape + struct.pack("<IQ", kind, offset)


def key(name: bytes, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


MANY = struct.pack("<IQ", 8, 2**60)  # an array of so many strings
HOSTILE = {
    "nothing": (b"", "cut off"),
    "magic alone": (b"GGUF", "cut off"),
    "another magic": (b"GGUX" + bytes(99), "does not begin"),
    "version 1": (header(version=1) + bytes(99), "version 1"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 1, 0) + bytes(99), "byte order"),
    "2^60 tensors": (header(2**60) + bytes(99), "counts 1152921504606846976 tensors"),
    "60000 tensors of which none is there": (header(60_000), "cut off"),
    "2^60 keys": (header(1, 2**60) + bytes(99), "keys"),
    "a name of 2^62 bytes": (header() + text(b"w", 2**62) + bytes(99), "a text in its header"),
    "a name that is no text": (header() + info(name=b"\xff\xfe") + bytes(256), "decode"),
    "2^32 axes": (header() + text(b"w") + struct.pack("<I", 2**32 - 1) + bytes(99), "axes of w"),
    "no axes": (header() + info(()) + bytes(256), "has the shape"),
    "an empty axis": (header() + info((0, 4)) + bytes(256), "has the shape"),
    "2^64 numbers": (header() + info((2**32, 2**32)) + bytes(256), "has the shape"),
    "2^40 numbers": (header() + info((2**40,)) + bytes(256), "truncated"),
    "offset beyond the end": (header() + info(offset=2**63) + bytes(256), "truncated"),
    "two tensors in one place": (
        header(2) + info(name=b"v") + info(offset=32) + bytes(512),
        "v and w lie on",
    ),
    "an offset between": (header() + info(offset=33) + bytes(256), "begins at byte 33"),
    "cut in a name": (header() + text(b"blocks.0.weight")[:12], "truncated"),
    "a type that nobody knows": (header() + info(kind=999) + bytes(256), "type 999"),
    "whole numbers": (header() + info(kind=26) + bytes(256), "not of floats"),
    "half a block": (header() + info((33,), kind=8) + bytes(256), "no whole number of Q8_0 blocks"),
    "a name twice": (header(2) + info() + info() + bytes(256), "stands twice"),
    "two names of one parameter": (
        header(2) + info(name=b"token_embd.weight") + info(name=b"shared.weight") + bytes(256),
        "stands twice",
    ),
    "a value of no type": (header(1, 1) + key(b"k", 99, bytes(8)) + info() + bytes(256), "of type 99"),
    "2^60 strings": (header(1, 1) + key(b"k", 9, MANY) + bytes(256), "strings in k"),
    "2^60 floats": (header(1, 1) + key(b"k", 9, struct.pack("<IQ", 6, 2**60)) + bytes(256), "truncated"),
    "lists of lists": (header(1, 1) + key(b"k", 9, struct.pack("<IQ", 9, 2**60)) + bytes(256), "type 9"),
    "alignment 3": (header(1, 1) + key(b"general.alignment", 4, b"\3\0\0\0") + bytes(256), "power of two"),
    "alignment text": (header(1, 1) + key(b"general.alignment", 8, text(b"x")) + bytes(256), "power of two"),
    "alignment 2^31": (
        header(1, 1) + key(b"general.alignment", 4, b"\0\0\0\x80") + bytes(256),
        "power of two",
    ),
    "another original shape": (
        header(1, 1)
        + key(b"comfy.gguf.orig_shape.w", 9, struct.pack("<IQii", 5, 2, 4, 9))
        + info()
        + bytes(256),
        "differ in size",
    ),
    "a negative original shape": (
        header(1, 1)
        + key(b"comfy.gguf.orig_shape.w", 9, struct.pack("<IQii", 5, 2, -4, -8))
        + info()
        + bytes(256),
        "differ in size",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_what_cannot_be_is_refused_in_words(case: str, tmp_path: Path) -> None:
    data, words = HOSTILE[case]
    file = tmp_path / "a.gguf"
    file.write_bytes(data)
    with within(2.0, case), pytest.raises(CheckpointError, match=words) as caught:
        WeightFiles(file)
    assert str(file) in str(caught.value)


def test_400_spoilt_files(tmp_path: Path) -> None:
    """Cut, flipped and filled at random places, most of them in the header: words, and soon."""
    chance = random.Random(5)
    good = tmp_path / "good.gguf"
    tensors = {f"blocks.{n}.w": torch.randn(4, 256) for n in range(6)} | {"b": torch.randn(5)}
    kinds = {f"blocks.{n}.w": kind for n, kind in enumerate(("Q8_0", "Q4_K", "Q6_K", "Q4_0", "IQ4_XS"))}
    write_gguf(good, tensors, kinds, shapes={"blocks.1.w": (2, 512)})
    whole = good.read_bytes()
    file = tmp_path / "a.gguf"
    said = []
    for number in range(400):
        data = bytearray(whole)
        for _ in range(chance.choice((1, 1, 2, 8))):
            at = min(int(chance.expovariate(1 / 200)), len(data) - 9)
            value = chance.choice(
                (bytes(8), b"\xff" * 8, chance.randbytes(1), b"\xff\xff\xff\x7f", chance.randbytes(8))
            )
            data[at : at + len(value)] = value
        file.write_bytes(data[: chance.randrange(len(data))] if number % 4 == 0 else data)
        with within(2.0, f"case {number}"):
            try:
                weights = WeightFiles(file)
                for name in weights.entries:
                    weights.read(name)
            except CheckpointError as error:
                said.append(str(error))
    assert len(said) > 200 and all(words.isprintable() and len(words) < 4000 for words in said)


def test_a_file_that_became_shorter_is_an_error(tmp_path: Path) -> None:
    weights = one(tmp_path / "a.gguf", w=torch.randn(64, 64))
    with (tmp_path / "a.gguf").open("r+b") as stream:
        stream.truncate(1000)
    with pytest.raises(CheckpointError, match="shorter"):
        weights.read("w")


def test_random_blocks_have_a_size() -> None:
    for kind in BLOCKS:
        blocks = random_blocks((8, 512), kind, 0.1)
        values = quants.dequantize(blocks, kind_of(kind))
        assert values.shape == (8, 512) and 0.05 < values.std() < 0.2
