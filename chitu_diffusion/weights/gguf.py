"""One GGUF file: its header, and its tensors' values or the packed blocks that stand for them.

Knows the format, and what its writers do with Wan's and T5's tensors: shapes stored back to front, or kept
apart where a tensor has more than four axes, and T5's layers under the names of llama.cpp, which are told
here as transformers'. The values of packed blocks are computed by the `gguf` package, whose tables name the
types. The header is read by our own code, since counts and lengths in it may be anything: nothing is believed
before it was compared with the file's size. A fault is a ValueError in words.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from chitu_diffusion.errors import CheckpointError
from chitu_diffusion.files.reading import HeldFile

_PACKAGE = "gguf>=0.19"
GGUF_AXES = 4
"""The most that GGUF knows; some writers go beyond."""
_VERSIONS = (2, 3)
_ARCHITECTURES = ("wan", "t5encoder", "t5", "pig", "cow")
"""`general.architecture` of Wan's and UMT5's files; the last two are a converter's own words. Files of
stable-diffusion.cpp have none."""
_FLOATS = MappingProxyType(
    {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
)
_INTEGERS = ("I8", "I16", "I32", "I64")
_STRING = 8
_ARRAY = 9
_SIZES = MappingProxyType({0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8})
"""Bytes of a value in the header, by its type's number."""
_INT32 = 5
_UINT32 = 4
_ALIGNMENT = 32
_ORIGINAL_SHAPE = "comfy.gguf.orig_shape."
_LONGEST_TEXT = 1 << 20
_LONGEST_NAME = 255
_MOST_AXES = 8
_MOST_TENSORS = 1 << 16
_MOST_KEYS = 1 << 16
_MOST_STRINGS = 1 << 20
"""Of a list in the header; a tokenizer of UMT5 has 256,384 pieces."""
_LARGEST = 1 << 62

_TEXT_TOP = MappingProxyType({"token_embd": "shared", "enc.output_norm": "encoder.final_layer_norm"})
_TEXT_LAYER = MappingProxyType(
    {
        "attn_norm": "layer.0.layer_norm",
        "attn_rel_b": "layer.0.SelfAttention.relative_attention_bias",
        "attn_q": "layer.0.SelfAttention.q",
        "attn_k": "layer.0.SelfAttention.k",
        "attn_v": "layer.0.SelfAttention.v",
        "attn_o": "layer.0.SelfAttention.o",
        "ffn_norm": "layer.1.layer_norm",
        "ffn_gate": "layer.1.DenseReluDense.wi_0",
        "ffn_up": "layer.1.DenseReluDense.wi_1",
        "ffn_down": "layer.1.DenseReluDense.wo",
    }
)


@dataclass(frozen=True)
class GGUFTensor:
    """One tensor of a file.

    Attributes:
        shape: as the network has it, outermost axis first.
        dtype: of its values; those of packed blocks are computed in float32, and are worth 16 bits.
        packing: the type of its blocks, such as "Q4_K"; None for plain floats.
        start: where it begins in the file, in bytes.
        rows, row_bytes: how it lies there; blocks do not go on from one row to the next.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    packing: str | None
    start: int
    rows: int
    row_bytes: int

    @property
    def packed_bytes(self) -> int:
        """What it takes in the file."""
        return self.rows * self.row_bytes


class GGUFFile:
    """A GGUF file; its header is read at once, its tensors when asked for.

    Attributes:
        tensors: by name, T5's by transformers'.

    Raises:
        ValueError: it is truncated, of another kind or version, or says what cannot be.
        CheckpointError: the `gguf` package is missing; says how to get it.
    """

    def __init__(self, path: Path) -> None:
        self._kinds = _kinds(path)
        self._file = HeldFile(path)
        header = _Header(self._file.stream, path.stat().st_size)
        shapes, alignment, infos = header.read()
        data = -(-header.position // alignment) * alignment
        self.tensors: dict[str, GGUFTensor] = {}
        for name, (axes, kind, offset) in infos.items():
            tensor = self._tensor(name, axes, kind, data + offset, shapes.get(name))
            if tensor.start + tensor.packed_bytes > header.size:
                end = tensor.start + tensor.packed_bytes
                raise ValueError(f"{name} ends at byte {end}, and the file has {header.size}: truncated")
            if (ours := _text_name(name)) in self.tensors:
                raise ValueError(f"{ours} stands twice in it")
            if offset % alignment:
                raise ValueError(f"{name} begins at byte {offset} of the tensors, no multiple of {alignment}")
            self.tensors[ours] = tensor
        for before, after in pairwise(sorted(self.tensors, key=lambda name: self.tensors[name].start)):
            if self.tensors[before].start + self.tensors[before].packed_bytes > self.tensors[after].start:
                raise ValueError(f"{before} and {after} lie on the same bytes")

    def read(self, name: str) -> Tensor:
        """A tensor's values on the CPU, in memory of their own; those of packed blocks in float32."""
        tensor = self.tensors[name]
        data = self._file.read(tensor.start, tensor.packed_bytes)
        if tensor.packing is None:
            return torch.frombuffer(data, dtype=tensor.dtype).reshape(tensor.shape)
        from gguf import GGMLQuantizationType, quants

        blocks = np.frombuffer(data, np.uint8).reshape(tensor.rows, tensor.row_bytes)
        with np.errstate(all="ignore"):  # a scale that is no number gives values that are none
            values = quants.dequantize(blocks, GGMLQuantizationType[tensor.packing])
        return torch.from_numpy(values).reshape(tensor.shape)

    def read_packed(self, name: str) -> Tensor:
        """A packed tensor's blocks as they lie in the file, [bytes] uint8 on the CPU."""
        tensor = self.tensors[name]
        return torch.frombuffer(self._file.read(tensor.start, tensor.packed_bytes), dtype=torch.uint8)

    def _tensor(
        self, name: str, axes: tuple[int, ...], number: int, start: int, original: tuple[int, ...] | None
    ) -> GGUFTensor:
        if number not in self._kinds:
            raise ValueError(f"{name} is of type {number}, which the installed gguf does not know; update it")
        kind, block, block_bytes = self._kinds[number]
        if kind in _INTEGERS:
            raise ValueError(f"{name} is of {kind}, not of floats")
        shape = tuple(reversed(axes))
        count = math.prod(shape)
        if not shape or not count or count > _LARGEST:
            raise ValueError(f"{name} has the shape {list(shape)}")
        if shape[-1] % block:
            raise ValueError(f"{name}: a row of {shape[-1]} is no whole number of {kind} blocks of {block}")
        if original is not None and (min(original, default=0) < 1 or math.prod(original) != count):
            raise ValueError(f"{name}: {list(shape)} and its original shape {list(original)} differ in size")
        dtype = _FLOATS.get(kind, torch.bfloat16)
        packing = None if kind in _FLOATS else kind
        row_bytes = shape[-1] // block * block_bytes
        return GGUFTensor(original or shape, dtype, packing, start, count // shape[-1], row_bytes)


def _kinds(path: Path) -> Mapping[int, tuple[str, int, int]]:
    """Types of tensors by number: name, values of a block, and its bytes."""
    try:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    except ImportError as error:
        raise CheckpointError(
            "a GGUF file needs the gguf package, which is not installed",
            file=path,
            remedy=f"pip install '{_PACKAGE}'",
        ) from error
    return {int(kind): (kind.name, *GGML_QUANT_SIZES[kind]) for kind in GGMLQuantizationType}


class _Header:
    """Reads what stands before the tensors: little-endian numbers, strings behind their lengths."""

    def __init__(self, stream: BinaryIO, size: int) -> None:
        self._stream = stream
        self.size = size

    @property
    def position(self) -> int:
        """The byte that is read next."""
        return self._stream.tell()

    def read(self) -> tuple[dict[str, tuple[int, ...]], int, dict[str, tuple[tuple[int, ...], int, int]]]:
        """Original shapes by tensor, the alignment of tensors, and (axes, type, offset) of each tensor."""
        if self._take(4) != b"GGUF":
            raise ValueError("it does not begin as a GGUF file does")
        version = self._number("I")
        if version not in _VERSIONS:
            swapped = " (of a machine with the other byte order?)" if version & 0xFFFF == 0 else ""
            raise ValueError(f"it is of GGUF's version {version}{swapped}; versions 2 and 3 are read")
        tensors = self._count("Q", _MOST_TENSORS, "tensors")
        keys = self._count("Q", _MOST_KEYS, "keys")
        shapes: dict[str, tuple[int, ...]] = {}
        alignment = _ALIGNMENT
        for _ in range(keys):
            key = self._name()
            value = self._value(key)
            if key == "general.architecture" and value not in _ARCHITECTURES:
                raise ValueError(
                    f"its general.architecture is {value!r}: it holds another kind of network; Wan's is "
                    "'wan', its text encoder's 't5encoder'"
                )
            if key == "general.alignment":
                alignment = value if isinstance(value, int) else 0
                if not 1 <= alignment <= 1 << 20 or alignment & (alignment - 1):
                    raise ValueError(f"its general.alignment is {value}, not a power of two")
            if key.startswith(_ORIGINAL_SHAPE) and isinstance(value, tuple):
                shapes[key.removeprefix(_ORIGINAL_SHAPE)] = value
        infos: dict[str, tuple[tuple[int, ...], int, int]] = {}
        for _ in range(tensors):
            name = self._name()
            if name in infos:
                raise ValueError(f"{name} stands twice in it")
            axes = tuple(self._number("Q") for _ in range(self._count("I", _MOST_AXES, f"axes of {name}")))
            infos[name] = (axes, self._number("I"), self._number("Q"))
        return shapes, alignment, infos

    def _value(self, key: str) -> str | int | tuple[int, ...] | None:
        """A value of the header; None for those that nobody asks for, which are stepped over."""
        kind = self._number("I")
        if kind == _STRING:
            return self._text()
        if kind == _UINT32:
            return self._number("I")
        if kind != _ARRAY:
            return self._skip(self._size_of(kind, key))
        inner = self._number("I")
        if inner == _STRING:
            for _ in range(self._count("Q", _MOST_STRINGS, f"strings in {key}")):
                self._skip(self._number("Q"))
            return None
        if inner == _INT32 and key.startswith(_ORIGINAL_SHAPE):
            return tuple(self._number("i") for _ in range(self._count("Q", _MOST_AXES, f"axes in {key}")))
        return self._skip(self._number("Q") * self._size_of(inner, key))

    def _size_of(self, kind: int, key: str) -> int:
        if kind not in _SIZES:
            raise ValueError(f"{key} has a value of type {kind}, which is none")
        return _SIZES[kind]

    def _skip(self, count: int) -> str | None:
        if count > self.size - self.position:
            raise ValueError(f"its header goes on behind its end ({self.size} bytes): truncated")
        self._stream.seek(count, 1)
        return None

    def _count(self, form: str, most: int, of: str) -> int:
        found = self._number(form)
        if found > most:
            raise ValueError(f"it counts {found} {of}; {most} are the most that are read")
        return found

    def _name(self) -> str:
        name = self._text()
        if not name.isprintable() or len(name) > _LONGEST_NAME:
            raise ValueError(f"a name in its header cannot be one: {name[:_LONGEST_NAME]!r}")
        return name

    def _text(self) -> str:
        length = self._number("Q")
        if length > _LONGEST_TEXT:
            raise ValueError(f"a text in its header has {length} bytes")
        return self._take(length).decode("utf-8")

    def _number(self, form: str) -> Any:
        (value,) = struct.unpack(f"<{form}", self._take(struct.calcsize(f"<{form}")))
        return value

    def _take(self, count: int) -> bytes:
        data = self._stream.read(count)
        if len(data) < count:
            raise ValueError(f"its header is cut off at byte {self.size}: truncated")
        return data


def _text_name(name: str) -> str:
    """A tensor's name; llama.cpp's of a T5 encoder as transformers has it."""
    place, _, leaf = name.rpartition(".")
    if place in _TEXT_TOP:
        return f"{_TEXT_TOP[place]}.{leaf}"
    match = re.fullmatch(r"enc\.blk\.(\d{1,4})\.(\w+)", place)
    if match is None or match[2] not in _TEXT_LAYER:
        return name
    return f"encoder.block.{match[1]}.{_TEXT_LAYER[match[2]]}.{leaf}"
