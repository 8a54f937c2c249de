"""An adapter as a request names it: which file, how strongly, for which expert. Checked where it is made,
known by its SHA-256. What the file holds is read elsewhere; imports no torch.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from chitu_diffusion.errors import CheckpointError, UsageError, nearest, plain_number
from chitu_diffusion.files.reading import cause, require_regular
from chitu_diffusion.weights.hashing import SHA256, hashes_of

Expert = Literal["high", "low"]
EXPERTS: tuple[Expert, ...] = ("high", "low")
MOST_STRENGTH = 20.0
MOST_ADAPTERS = 64
SHIPPED = Path(__file__).resolve().parent.parent / "assets" / "adapters"
_USE = "use FILE, FILE:0.8, FILE@high:0.8 or FILE@low"


@dataclass(frozen=True)
class Lora:
    """A LoRA, or one of its kin, of a request.

    Args:
        path: of the file, or the name of a shipped adapter; becomes absolute.
        strength: by which its change is multiplied, -20 to 20; 1 is as it was trained.
        expert: "high" or "low" noise, of a model with two; None is every transformer.
        sha256: of the file; None has it read now.

    Raises:
        UsageError: a value that cannot be, or a file that cannot be read.
    """

    path: str
    strength: float = 1.0
    expert: Expert | None = None
    sha256: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "strength", plain_number(self.strength))
        number = isinstance(self.strength, int | float) and not isinstance(self.strength, bool)
        if not number or not math.isfinite(self.strength) or abs(self.strength) > MOST_STRENGTH:
            raise UsageError(
                f"lora = {str(self.path)!r}: strength {self.strength!r}: must be a number from "
                f"{-MOST_STRENGTH:g} to {MOST_STRENGTH:g}; 1 is as it was trained",
                field="lora",
            )
        object.__setattr__(self, "strength", float(self.strength))
        if self.expert not in (None, *EXPERTS):
            raise UsageError(
                f"lora = {str(self.path)!r}: expert {self.expert!r}: use 'high' or 'low'", field="lora"
            )
        if not isinstance(self.path, str | os.PathLike) or not str(self.path) or "\0" in str(self.path):
            raise UsageError(f"lora = {self.path!r}: use a file's name", field="lora")
        path = os.path.expanduser(self.path)
        own = None if os.path.exists(path) else shipped_adapters().get(str(self.path).lower())
        object.__setattr__(self, "path", os.path.abspath(own or path))
        if self.sha256 is None:
            object.__setattr__(self, "sha256", self.hashed())
        elif not isinstance(self.sha256, str) or SHA256.fullmatch(self.sha256) is None:
            raise UsageError(f"lora = {self.path!r}: sha256 {self.sha256!r}: leave it out", field="lora")

    @classmethod
    def of(cls, value: Any) -> Lora:
        """From "FILE", "FILE:0.8", "FILE@high:0.8", a table of its fields, or itself.

        Raises:
            UsageError: something else.
        """
        if isinstance(value, cls):
            return value
        if isinstance(value, Mapping):
            if "path" not in value or set(value) - {"path", "strength", "expert", "sha256"}:
                raise UsageError(
                    f"lora = {dict(value)!r}: use path, strength and expert ('high' or 'low')", field="lora"
                )
            return cls(**value)
        if isinstance(value, os.PathLike):
            return cls(os.fspath(value))
        if not isinstance(value, str):
            raise UsageError(f"lora = {value!r}: {_USE}", field="lora")
        return cls(*_read(value))

    def hashed(self) -> str:
        """SHA-256 of the file as it is now; one that did not change is not read again.

        Raises:
            UsageError: it cannot be read.
        """
        try:
            state = require_regular(self.path)
            return _sha256(self.path, state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino)
        except (OSError, ValueError, CheckpointError) as error:
            hint = nearest(Path(self.path).name, shipped_adapters()) if not Path(self.path).suffix else ""
            raise UsageError(
                f"lora = {self.path!r}: it cannot be read: {cause(error)}{hint and f'.{hint}'}", field="lora"
            ) from error

    def is_for(self, expert: int) -> bool:
        """Whether it changes a transformer: 0, or 1 for the low-noise one."""
        return self.expert is None or EXPERTS.index(self.expert) == expert

    def about(self) -> dict[str, Any]:
        """What a video follows from, as JSON values: not where the file lies."""
        return {"sha256": self.sha256, "strength": self.strength, "expert": self.expert}

    def __str__(self) -> str:
        expert = "" if self.expert is None else f"@{self.expert}"
        return f"{Path(self.path).name}{expert}:{self.strength:g}"


def shipped_adapters() -> dict[str, Path]:
    """The adapters of the shipped model: files by name."""
    return {file.stem: file for file in sorted(SHIPPED.glob("*.safetensors"))}


def checked_loras(value: Any) -> tuple[Lora, ...] | None:
    """A request's adapters, in whichever form they come; none at all is None.

    Raises:
        UsageError: something else, or too many.
    """
    if value is None:
        return None
    given = value if isinstance(value, list | tuple) else [value]
    if len(given) > MOST_ADAPTERS:
        raise UsageError(f"lora: {len(given)} adapters; use at most {MOST_ADAPTERS}", field="lora")
    return tuple(Lora.of(each) for each in given) or None


def _read(text: str) -> tuple[str, float, Expert | None]:
    """`FILE@high:0.8` -> (FILE, 0.8, "high"). A file whose own name has a colon or an @ is taken first."""
    if os.path.exists(os.path.expanduser(text)):
        return text, 1.0, None
    path = text
    strength = 1.0
    head, colon, tail = text.rpartition(":")
    if colon:
        try:
            strength = float(tail)
            path = head
        except ValueError:
            path = text
    head, at, name = path.rpartition("@")
    if not at or os.path.exists(os.path.expanduser(path)):
        return path, strength, None
    for expert in EXPERTS:
        if name == expert:
            return head, strength, expert
    return path, strength, None


@lru_cache(maxsize=256)
def _sha256(path: str, *stamp: int) -> str:
    """Of a file that looks so; `stamp` is its size, times and inode."""
    return hashes_of([Path(path)])[Path(path)]
