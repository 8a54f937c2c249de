"""Files of tensors: what lies in them and whether they are whole. The reading half of
`chitu_diffusion.weights.loader`.

Knows safetensors (one or many shards, with or without an index), torch's `.pth` and, through
`chitu_diffusion.weights.gguf`, GGUF; no modules, no networks. Headers are checked against the file's size
before any value is read. A fault is a `CheckpointError` that names file and key.
"""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, cast

import torch
from safetensors import safe_open
from torch import Tensor

from chitu_diffusion.errors import CheckpointError
from chitu_diffusion.files.reading import (
    MOST_BYTES,
    cause,
    foreign_data,
    parse_json,
    read_json,
    require_regular,
)
from chitu_diffusion.weights.gguf import GGUF_AXES, GGUFFile

FLOAT_TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
INDEX_ENDING = ".safetensors.index.json"
_LONGEST_NAME = 255
_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "model.", "net.", "module.")
"""That others put before all names of one network: ComfyUI, trainers, torch's own wrappers."""
_TORCH_ENDINGS = (".pth", ".pt", ".bin")
GGUF_ENDING = ".gguf"
_ENDINGS = (".safetensors", GGUF_ENDING, *_TORCH_ENDINGS)
# Reading a hostile pickle through weights_only is safe from here on: CVE-2025-32434 and its relatives are
# closed.
_SAFE_PICKLE = (2, 10)


@dataclass(frozen=True)
class Stored:
    """One tensor in a file: where, its shape and dtype, and its place in the file's order.

    `packing` is the type of a GGUF file's blocks, such as "Q4_K", and `packed_bytes` what they take; their
    values are read in float32.
    """

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype
    position: int
    packing: str | None = None
    packed_bytes: int = 0

    @property
    def bytes(self) -> int:
        """Size of its values."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()


class _TensorFile(Protocol):
    path: Path
    entries: dict[str, Stored]

    def read(self, key: str) -> Tensor: ...


class _SafetensorsFile:
    """One `.safetensors` file; its header is read at once, its tensors when asked for."""

    def __init__(self, path: Path, mapped: bool) -> None:
        self.path = path
        with foreign_data(
            lambda cause: CheckpointError(f"a weights file cannot be read: {cause}", file=path)
        ):
            self.entries, self._start = _safetensors_entries(path)
            self._mapped = mapped
            self._handle = safe_open(str(path), framework="pt", device="cpu")

    def read(self, key: str) -> Tensor:
        """The tensor, on the CPU; if mapped, backed by the file where the platform can do that."""
        if self._mapped:
            return cast(Tensor, self._handle.get_tensor(key))
        stored = self.entries[key]
        data = bytearray(stored.bytes)
        with self.path.open("rb") as stream:
            stream.seek(self._start + stored.position)
            if stream.readinto(data) < len(data):
                raise OSError("the file has become shorter since it was opened")
        if not data:
            return torch.empty(stored.shape, dtype=stored.dtype)
        return torch.frombuffer(data, dtype=stored.dtype).reshape(stored.shape)


class _TorchFile:
    """One file of torch.save that holds a flat {name: tensor}; mapped, not read, where its format allows."""

    def __init__(self, path: Path, mapped: bool) -> None:
        self.path = path
        self._tensors = _torch_tensors(path, mapped)
        self.entries = {
            key: Stored(
                path, tuple(tensor.shape), _checked_float(path, key, str(tensor.dtype), tensor.dtype), place
            )
            for place, (key, tensor) in enumerate(self._tensors.items())
        }

    def read(self, key: str) -> Tensor:
        """The tensor, on the CPU."""
        return self._tensors[key]


class _GGUFFile:
    """One `.gguf` file; its header is read at once, its tensors when asked for, never mapped."""

    def __init__(self, path: Path) -> None:
        self.path = path
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

    Attributes:
        entries: name -> where and what. Names are the files' own, less a prefix that all of them have.

    Raises:
        CheckpointError: a file is missing, truncated or mislabelled, or holds numbers that are not floats.
    """

    def __init__(
        self,
        path: str | Path,
        stem: str = "diffusion_pytorch_model",
        *,
        shards_first: bool = True,
        mapped: bool = True,
    ) -> None:
        self.path = Path(path)
        paths, weight_map = locate(self.path, stem, shards_first)
        self._files: dict[Path, _TensorFile] = {file: _open(file, mapped) for file in paths}
        if weight_map is not None:
            _check_index(self.path, weight_map, self._files)
        self.entries: dict[str, Stored] = {}
        for file in self._files.values():
            for key, stored in file.entries.items():
                if key in self.entries:
                    raise CheckpointError(
                        "a tensor stands in two shards", file=self.entries[key].file, key=key, found=file.path
                    )
                self.entries[key] = stored
        self._prefix = _common_prefix(self.entries)
        self.entries = {key.removeprefix(self._prefix): stored for key, stored in self.entries.items()}

    def unused(self) -> list[Path]:
        """Weights that lie in the folder and that nobody reads."""
        near = self.path.iterdir() if self.path.is_dir() else ()
        return sorted(file for file in near if file.suffix in _ENDINGS and file not in self._files)

    @property
    def files(self) -> list[Path]:
        """The files that hold the tensors."""
        return list(self._files)

    def read(self, key: str) -> Tensor:
        """The tensor of that name, on the CPU, in its stored dtype; do not write into it."""
        stored = self.entries[key]
        with foreign_data(
            lambda cause: CheckpointError(f"a tensor cannot be read: {cause}", file=stored.file, key=key)
        ):
            return self._files[stored.file].read(self._prefix + key).reshape(stored.shape)

    def read_packed(self, key: str) -> Tensor:
        """The blocks of a tensor that has a `packing`, as they are stored: [bytes] uint8, on the CPU."""
        stored = self.entries[key]
        file = self._files[stored.file]
        assert isinstance(file, _GGUFFile)  # no other has packed tensors
        with foreign_data(
            lambda cause: CheckpointError(f"a tensor cannot be read: {cause}", file=stored.file, key=key)
        ):
            return file.read_packed(self._prefix + key)

    def unflatten(self, key: str, shape: tuple[int, ...]) -> bool:
        """Lets a tensor have the shape that its network has, where its file cannot say so: GGUF allows four
        axes, a patch embedding has five. False where that is not the reason why they differ.
        """
        stored = self.entries[key]
        fits = torch.Size(stored.shape).numel() == torch.Size(shape).numel() and len(shape) > GGUF_AXES
        if fits := fits and isinstance(self._files[stored.file], _GGUFFile):
            self.entries[key] = replace(stored, shape=shape)
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
            found=few(sorted(file.name for file in path.iterdir() if file.suffix in _ENDINGS)) or "neither",
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


def _check_index(path: Path, weight_map: Mapping[str, str], files: Mapping[Path, _TensorFile]) -> None:
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


def _open(path: Path, mapped: bool) -> _TensorFile:
    with foreign_data(lambda cause: CheckpointError(f"a weights file cannot be read: {cause}", file=path)):
        require_regular(path)
    if path.suffix == ".safetensors":
        return _SafetensorsFile(path, mapped)
    if path.suffix in _TORCH_ENDINGS:
        return _TorchFile(path, mapped)
    if path.suffix == GGUF_ENDING:
        return _GGUFFile(path)
    raise CheckpointError("not a weights file", file=path, expected=", ".join(_ENDINGS))


def _safetensors_entries(path: Path) -> tuple[dict[str, Stored], int]:
    """Reads a header: 8 bytes of its length (little endian), then JSON {name: {dtype, shape,
    data_offsets}}; and where it ends.
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
        header.pop("__metadata__", None)
        ends = [int(info["data_offsets"][1]) for info in header.values()]
        found = {
            key: (str(info["dtype"]), tuple(map(int, info["shape"])), int(info["data_offsets"][0]))
            for key, info in header.items()
        }
    expected = 8 + length + max(ends, default=0)
    if size != expected:
        word = "truncated" if size < expected else "longer than its header says"
        raise CheckpointError(
            f"a weights file is {word}", file=path, expected=f"{expected} bytes", found=f"{size} bytes"
        )
    entries = {
        key: Stored(path, shape, _checked_float(path, key, kind, FLOAT_TYPES.get(kind)), start)
        for key, (kind, shape, start) in found.items()
    }
    return entries, 8 + length


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


def _checked_float(path: Path, key: str, found: str, dtype: torch.dtype | None) -> torch.dtype:
    if found.upper().startswith(("F8_", "TORCH.FLOAT8")):
        raise CheckpointError(
            "these are weights in 8-bit floats (fp8), which are not opened yet",
            file=path,
            key=key,
            expected=" or ".join(FLOAT_TYPES),
            found=found,
            remedy="use the model's 16-bit files; --quant fp8 rounds them while loading",
        )
    if dtype not in FLOAT_TYPES.values():
        raise CheckpointError(
            "a tensor is not of floats", file=path, key=key, expected=" or ".join(FLOAT_TYPES), found=found
        )
    assert dtype is not None
    return dtype


def describe_file(path: Path) -> str:
    """What a single file of weights is, in words, by its first bytes and its tensors' names."""
    try:
        require_regular(path)
        with path.open("rb") as stream:
            if stream.read(4) == b"GGUF":
                return "a GGUF file: one network alone"
        names = list(_open(path, mapped=True).entries)
    except (OSError, ValueError) as error:
        return f"a file that cannot be read: {cause(error)}"
    except CheckpointError as error:
        return f"a file of weights that are not opened: {error}"
    ours = "blocks.0.self_attn.q.weight"
    if any(name.endswith(ours) and name != ours for name in names):
        return "a Wan transformer alone, each name behind a prefix as ComfyUI has it"
    return "a Wan transformer alone" if ours in names else f"a single file of {len(names)} tensors"


def few(names: Iterable[str]) -> str:
    """The first three names and how many more, for a message."""
    listed = list(names)
    return ", ".join(listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "")
