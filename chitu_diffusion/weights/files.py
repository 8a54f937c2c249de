"""Files of tensors: what lies in them and whether they are whole. The reading half of
`chitu_diffusion.weights.loader`.

Knows safetensors (one or many shards, with or without an index), torch's `.pth` and, through
`chitu_diffusion.weights.gguf`, GGUF; no modules, no networks. Headers are checked against the file's size
before any value is read. What weights in 8 bits stand for is known by `stored`. A fault is a
`CheckpointError` that names file and key.
"""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from safetensors import safe_open
from torch import Tensor

from chitu_diffusion.errors import CheckpointError
from chitu_diffusion.files.reading import (
    MOST_BYTES,
    HeldFile,
    foreign_data,
    parse_json,
    read_json,
    require_regular,
)
from chitu_diffusion.weights.gguf import GGUF_AXES, GGUFFile
from chitu_diffusion.weights.stored import (
    BESIDE,
    FLOAT_TYPES,
    STORED_TYPES,
    WIDENED,
    EightBit,
    Stored,
    find_eight_bit,
)

__all__ = ["Stored", "TensorFile", "WeightFiles", "few", "locate", "open_tensors"]

INDEX_ENDING = ".safetensors.index.json"
_LONGEST_NAME = 255
_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "model.", "net.", "module.")
"""That others put before all names of one network: ComfyUI, trainers, torch's own wrappers."""
_TORCH = (".pth", ".pt", ".bin")
GGUF_ENDING = ".gguf"
ENDINGS = (".safetensors", GGUF_ENDING, *_TORCH)
# Reading a hostile pickle through weights_only is safe from here on: CVE-2025-32434 and its relatives are
# closed.
_SAFE_PICKLE = (2, 10)


class TensorFile(Protocol):
    """One file of tensors, under its own names.

    Attributes:
        path: where.
        entries: what lies in it.
        metadata: what it says of itself.
    """

    path: Path
    entries: dict[str, Stored]
    metadata: Mapping[str, str]

    def read(self, key: str) -> Tensor:
        """A tensor's stored values, on the CPU."""
        ...


class _SafetensorsFile:
    """One `.safetensors` file; its header is read at once, its tensors when asked for."""

    def __init__(self, path: Path, mapped: bool) -> None:
        self.path = path
        with foreign_data(
            lambda cause: CheckpointError(f"a weights file cannot be read: {cause}", file=path)
        ):
            self._file = HeldFile(path)
            self.entries, self.metadata, self._start = _safetensors_header(path)
        self._mapped = mapped
        self._handle: Any = None  # opened with the first tensor: a map of a large file may not fit in memory

    def read(self, key: str) -> Tensor:
        """The tensor, on the CPU; if mapped, backed by the file where the platform can do that."""
        self._file.require_unchanged()
        if self._mapped and self._handle is None and self._file.has_name(self.path):
            self._handle = safe_open(str(self.path), framework="pt", device="cpu")
        if self._handle is not None:
            return cast(Tensor, self._handle.get_tensor(key))
        stored = self.entries[key]
        data = self._file.read(self._start + stored.position, stored.bytes)
        if not data:
            return torch.empty(stored.shape, dtype=stored.dtype)
        return torch.frombuffer(data, dtype=stored.dtype).reshape(stored.shape)


class _TorchFile:
    """One file of torch.save that holds a flat {name: tensor}; mapped, not read, where its format allows."""

    def __init__(self, path: Path, mapped: bool) -> None:
        self.path = path
        self.metadata: Mapping[str, str] = {}
        with foreign_data(
            lambda cause: CheckpointError(f"a weights file cannot be read: {cause}", file=path)
        ):
            self._file = HeldFile(path)
        self._tensors = _torch_tensors(path, mapped)
        self.entries = {
            key: Stored(path, tuple(tensor.shape), tensor.dtype, place)
            for place, (key, tensor) in enumerate(self._tensors.items())
        }

    def read(self, key: str) -> Tensor:
        """The tensor, on the CPU."""
        self._file.require_unchanged()
        return self._tensors[key]


class _GGUFFile:
    """One `.gguf` file; its header is read at once, its tensors when asked for, never mapped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata: Mapping[str, str] = {}
        with foreign_data(lambda cause: CheckpointError(f"a GGUF file cannot be read: {cause}", file=path)):
            self._file = GGUFFile(path)
        self.entries = {
            key: Stored(path, found.shape, found.dtype, found.start, found.packing, found.packed_bytes)
            for key, found in self._file.tensors.items()
        }
        self.read = self._file.read
        self.read_packed = self._file.read_packed


class WeightFiles:
    """The tensors of one network on disk, by name, whatever files they lie in.

    Args:
        path: a `.safetensors`, `.pth` or `.gguf` file, an index of shards, or a folder that holds them.
        stem: in a folder, how the files begin ("diffusion_pytorch_model", "model").
        shards_first: of an index of shards and a single file side by side, whether the shards count, as for
            diffusers, or the single file, as for transformers.
        mapped: tensors may be backed by their files, which is quick; but one that becomes shorter meanwhile
            ends the process by SIGBUS. Else it is an error, and a `.pth` is in memory as a whole.
        within: in files that hold several networks, what the names of this one begin with.

    Attributes:
        entries: name -> where and what. Names are the files' own, less a prefix that all of them have. A
            weight in 8 bits stands here as what is read of it; its scales do not.
        eight_bit: those of them whose stored values are not what is read.
        metadata: what the files say of themselves.

    Raises:
        CheckpointError: a file is missing, truncated or mislabelled, holds numbers that are neither floats
            nor a known form of 8 bits, or weights and scales that do not fit.
    """

    def __init__(
        self,
        path: str | Path,
        stem: str = "diffusion_pytorch_model",
        *,
        shards_first: bool = True,
        mapped: bool = True,
        within: str = "",
    ) -> None:
        self.path = Path(path)
        paths, weight_map = locate(self.path, stem, shards_first)
        self._files: dict[Path, TensorFile] = {file: open_tensors(file, mapped) for file in paths}
        if weight_map is not None:
            _check_index(self.path, weight_map, self._files)
        self.metadata = {key: said for file in self._files.values() for key, said in file.metadata.items()}
        stored: dict[str, Stored] = {}
        for file in self._files.values():
            for key, found in file.entries.items():
                if key in stored:
                    raise CheckpointError(
                        "a tensor stands in two shards", file=stored[key].file, key=key, found=file.path
                    )
                stored[key] = found
        short = {key: key.removeprefix(within) for key in stored if key.startswith(within)}
        common = _common_prefix(name for name in short.values() if name not in BESIDE)
        self._keys = {name.removeprefix(common): key for key, name in short.items()}
        self._stored = {name: stored[key] for name, key in self._keys.items()}
        self.eight_bit, beside = find_eight_bit(
            self._stored, self.metadata, self._read_stored, within + common
        )
        self.entries = {
            name: _readable(name, found, self.eight_bit.get(name))
            for name, found in self._stored.items()
            if name not in beside
        }

    def unused(self) -> list[Path]:
        """Weights that lie in the folder and that nobody reads."""
        near = self.path.iterdir() if self.path.is_dir() else ()
        return sorted(file for file in near if file.suffix in ENDINGS and file not in self._files)

    @property
    def on_disk(self) -> list[Stored]:
        """`entries` as they are stored, those in 8 bits too, without what belongs to them."""
        return [self._stored[name] for name in self.entries]

    @property
    def files(self) -> list[Path]:
        """The files that hold the tensors."""
        return list(self._files)

    def read(self, key: str, widen_on: torch.device | str = "cpu") -> Tensor:
        """The tensor of that name, on the CPU, in its stored dtype; do not write into it. A weight in 8 bits
        is float32, on the device `widen_on`, so that whoever wants fewer bits rounds once.
        """
        found = self.eight_bit.get(key)
        if found is None:
            return self._read_stored(key)
        scale = None if found.scale is None else self._read_stored(found.scale)
        return found.widened(self._read_stored(key).to(widen_on), scale)

    def read_float8_rows(self, key: str) -> tuple[Tensor, Tensor] | None:
        """A weight that is stored as rows of float8_e4m3fn, [N, K], and the scale of each, [N, 1] float32, as
        they are, on the CPU; None for any other.
        """
        found = self.eight_bit.get(key)
        if found is None or found.stored.dtype != torch.float8_e4m3fn or found.block:
            return None
        values = self._read_stored(key)
        scale = torch.ones(1) if found.scale is None else self._read_stored(found.scale)
        return values, found.rows(scale).expand(len(values), 1).contiguous()

    def _read_stored(self, name: str) -> Tensor:
        stored = self._stored[name]
        key = self._keys[name]
        with foreign_data(
            lambda cause: CheckpointError(f"a tensor cannot be read: {cause}", file=stored.file, key=key)
        ):
            return self._files[stored.file].read(key).reshape(stored.shape)

    def read_packed(self, key: str) -> Tensor:
        """The blocks of a tensor that has a `packing`, as they are stored: [bytes] uint8, on the CPU."""
        stored = self._stored[key]
        file = self._files[stored.file]
        assert isinstance(file, _GGUFFile)  # no other has packed tensors
        with foreign_data(
            lambda cause: CheckpointError(f"a tensor cannot be read: {cause}", file=stored.file, key=key)
        ):
            return file.read_packed(self._keys[key])

    def unflatten(self, key: str, shape: tuple[int, ...]) -> bool:
        """Lets a tensor have the shape that its network has, where its file cannot say so: GGUF allows four
        axes, a patch embedding has five. False where that is not the reason why they differ.
        """
        stored = self._stored[key]
        fits = torch.Size(stored.shape).numel() == torch.Size(shape).numel() and len(shape) > GGUF_AXES
        if fits := fits and isinstance(self._files[stored.file], _GGUFFile):
            self._stored[key] = self.entries[key] = replace(stored, shape=shape)
        return fits


def locate(path: Path, stem: str, shards_first: bool) -> tuple[list[Path], dict[str, str] | None]:
    """The files of a network as `WeightFiles` takes them, none of them opened, and an index's {key: file
    name} if there is one.

    Raises:
        CheckpointError: one is not there.
    """
    if path.is_dir():
        single = path / f"{stem}.safetensors"
        index = path / (stem + INDEX_ENDING)
        if index.exists() and (shards_first or not single.exists()):
            return _indexed(index)
        if single.exists():
            return [single], None
        shards = sorted(path.glob(f"{stem}-*-of-*.safetensors"))
        if shards:
            return _complete(shards), None
        packed = sorted(path.glob(f"*{GGUF_ENDING}"))
        if len(packed) == 1:
            return packed, None
        raise CheckpointError(
            "there are no weights" if not packed else "there are several GGUF files, and one is needed",
            file=path,
            expected=f"{stem}.safetensors, shards of it, or one {GGUF_ENDING} file",
            found=few(sorted(file.name for file in path.iterdir() if file.suffix in ENDINGS)) or "neither",
        )
    if not path.exists():
        raise CheckpointError("a weights file is missing", file=path)
    return _indexed(path) if path.name.endswith(INDEX_ENDING) else ([path], None)


def _common_prefix(names: Iterable[str]) -> str:
    """What stands before every name and belongs to none; "" for nothing."""
    listed = list(names)
    return next((one for one in _PREFIXES if listed and all(name.startswith(one) for name in listed)), "")


def _indexed(index: Path) -> tuple[list[Path], dict[str, str]]:
    with foreign_data(
        lambda cause: CheckpointError(f"an index of shards cannot be read: {cause}", file=index)
    ):
        weight_map = read_json(index)["weight_map"]
        pairs = {str(key): str(name) for key, name in weight_map.items()}
    for key, name in pairs.items():
        plain = Path(name).name == name and len(name.encode()) <= _LONGEST_NAME and name.isprintable()
        if not plain or not name.endswith(".safetensors"):
            raise CheckpointError(
                "an index names something that is no shard beside it", file=index, key=key, found=name
            )
        if not (index.parent / name).exists():
            raise CheckpointError("a shard is missing", file=index.parent / name, key=key)
    return [index.parent / name for name in sorted(set(pairs.values()))], pairs


def _complete(shards: list[Path]) -> list[Path]:
    total = shards[0].stem.rpartition("-of-")[2]
    stem = shards[0].stem.rpartition("-of-")[0].rpartition("-")[0]
    expected = [
        f"{stem}-{number:0{len(total)}d}-of-{total}.safetensors" for number in range(1, int(total) + 1)
    ]
    found = [shard.name for shard in shards]
    if found != expected:
        absent = sorted(set(expected) - set(found)) or sorted(set(found) - set(expected))
        raise CheckpointError(
            "the shards are not one complete set",
            file=shards[0].parent,
            expected=expected[-1],
            found=few(absent),
        )
    return shards


def _check_index(path: Path, weight_map: Mapping[str, str], files: Mapping[Path, TensorFile]) -> None:
    for file in files.values():
        named = {key for key, name in weight_map.items() if name == file.path.name}
        lacking = sorted(named - file.entries.keys())
        unnamed = sorted(file.entries.keys() - named)
        if lacking:
            raise CheckpointError(
                "a shard lacks what the index says it holds", file=file.path, key=few(lacking)
            )
        if unnamed:
            raise CheckpointError(
                f"a shard holds what the index of {path} does not say", file=file.path, key=few(unnamed)
            )


def open_tensors(path: Path, mapped: bool = True) -> TensorFile:
    """Opens one file, by its ending; `mapped` as in `WeightFiles`.

    Raises:
        CheckpointError: it is none, or damaged.
    """
    with foreign_data(lambda cause: CheckpointError(f"a weights file cannot be read: {cause}", file=path)):
        require_regular(path)
    if path.suffix == ".safetensors":
        return _SafetensorsFile(path, mapped)
    if path.suffix in _TORCH:
        return _TorchFile(path, mapped)
    if path.suffix == GGUF_ENDING:
        return _GGUFFile(path)
    raise CheckpointError("not a weights file", file=path, expected=", ".join(ENDINGS))


def _safetensors_header(path: Path) -> tuple[dict[str, Stored], Mapping[str, str], int]:
    """Reads a header: 8 bytes of its length (little endian), then JSON {name: {dtype, shape,
    data_offsets}}; what the file says of itself; and where the header ends.
    """
    size = path.stat().st_size
    with foreign_data(
        lambda cause: CheckpointError(
            f"a weights file has no readable header: {cause}", file=path, found=f"{size} bytes"
        )
    ):
        with path.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8).ljust(8, b"\xff"))
            if length > min(MOST_BYTES, size - 8):
                raise CheckpointError(
                    "a weights file is truncated or no safetensors file", file=path, found=f"{size} bytes"
                )
            header = parse_json(stream.read(length).decode("utf-8"))
        said = header.pop("__metadata__", None) or {}
        metadata = {str(key): str(value) for key, value in said.items()}
        places = {key: tuple(map(int, info["data_offsets"])) for key, info in header.items()}
        found = {
            key: (str(info["dtype"]), tuple(map(int, info["shape"])), places[key][0])
            for key, info in header.items()
        }
    expected = 8 + length + max((end for _, end in places.values()), default=0)
    if size != expected:
        word = "truncated" if size < expected else "longer than its header says"
        raise CheckpointError(
            f"a weights file is {word}", file=path, expected=f"{expected} bytes", found=f"{size} bytes"
        )
    entries = {
        key: Stored(path, shape, _known_type(path, key, kind), start)
        for key, (kind, shape, start) in found.items()
    }
    end = 0
    for key in sorted(places, key=lambda key: places[key]):  # as the format has it: one after the other
        start = end
        end += entries[key].bytes
        if places[key] != (start, end):
            raise CheckpointError(
                "a tensor does not lie where the ones before it end, or has another size",
                file=path,
                key=key,
                expected=f"bytes {start} to {end}",
                found=f"{places[key][0]} to {places[key][1]}",
            )
    return entries, metadata, 8 + length


def _torch_tensors(path: Path, mapped: bool) -> dict[str, Tensor]:
    release = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if release < _SAFE_PICKLE:
        raise CheckpointError(
            "this torch is too old to read a .pth file safely",
            file=path,
            expected="torch >= " + ".".join(map(str, _SAFE_PICKLE)),
            found=torch.__version__,
            remedy="update torch, or convert the file to safetensors elsewhere",
        )
    with foreign_data(
        lambda cause: CheckpointError(
            f"a weights file cannot be read: {cause}", file=path, found=f"{path.stat().st_size} bytes"
        )
    ):
        data = torch.load(
            path, map_location="cpu", weights_only=True, mmap=mapped and zipfile.is_zipfile(path)
        )
    if not isinstance(data, dict) or not all(isinstance(value, Tensor) for value in data.values()):
        raise CheckpointError(
            "not a flat table of tensors", file=path, expected="{name: tensor}", found=type(data).__name__
        )
    for key, value in data.items():
        if value.device.type != "cpu" or value.layout != torch.strided or value.is_quantized:
            raise CheckpointError(
                "a tensor has no plain values",
                file=path,
                key=str(key),
                expected="numbers on the CPU",
                found=f"{value.device}, {value.layout}",
            )
    return {str(key): value for key, value in data.items()}


def _known_type(path: Path, key: str, kind: str) -> torch.dtype:
    if kind not in STORED_TYPES:
        raise _no_floats(path, key, kind)
    return STORED_TYPES[kind]


def _readable(name: str, stored: Stored, eight_bit: EightBit | None) -> Stored:
    """What is read of a tensor: floats."""
    if stored.dtype in FLOAT_TYPES.values():
        return stored
    if eight_bit is None:
        kind = next((kind for kind, dtype in STORED_TYPES.items() if dtype == stored.dtype), "")
        raise _no_floats(stored.file, name, kind or str(stored.dtype))
    return replace(stored, dtype=WIDENED)


def _no_floats(path: Path, key: str, found: str) -> CheckpointError:
    return CheckpointError(
        "a tensor is not of floats", file=path, key=key, expected=" or ".join(FLOAT_TYPES), found=found
    )


def few(names: Iterable[str]) -> str:
    """The first three names and how many more, for a message."""
    listed = list(names)
    return ", ".join(listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "")
