"""What a kernel needs of device, dtype, head size and packages, and what to do where something is lacking.

Knows no kernel. A unmet is told before anything is loaded, in the words of the person who asked for the
kernel.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SIXTEEN_BITS = (torch.bfloat16, torch.float16)
_LOWEST = (0, 0)
_HIGHEST = (99, 9)


@dataclass(frozen=True)
class Unmet:
    """Why something cannot be used here.

    Attributes:
        reason: what is missing.
        remedy: what to do about it.
    """

    reason: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.reason}; {self.remedy}"


@dataclass(frozen=True)
class Package:
    """A package that is installed by hand.

    Attributes:
        module: what is imported.
        distribution: what is installed.
        install: how.
        at_least: the least version, or none.
    """

    module: str
    distribution: str
    install: str
    at_least: tuple[int, ...] = ()

    def version(self) -> str | None:
        """The installed version; None if it is not there, "unknown" for a module without a distribution."""
        if find_spec(self.module) is None:
            return None
        try:
            return version(self.distribution)
        except PackageNotFoundError:
            return "unknown"

    def unmet(self) -> Unmet | None:
        """What is wrong with it."""
        found = self.version()
        if found is None:
            return Unmet(f"the module {self.module} is not installed", self.install)
        if self.at_least and _numbers(found) < self.at_least:
            wanted = ".".join(map(str, self.at_least))
            return Unmet(f"{self.distribution} is {found}, older than {wanted}", self.install)
        return None


@dataclass(frozen=True)
class Requirements:
    """Where a kernel runs.

    Attributes:
        devices: device types.
        dtypes: of q, k and v.
        head_dim_step, head_dim_most: head sizes are multiples of the one up to the other.
        compute: least and greatest CUDA compute capability, both included.
        package: that brings it; None: torch does.
    """

    devices: tuple[str, ...] = ("cpu", "cuda")
    dtypes: tuple[torch.dtype, ...] = FLOATS
    head_dim_step: int = 1
    head_dim_most: int | None = None
    compute: tuple[tuple[int, int], tuple[int, int]] = (_LOWEST, _HIGHEST)
    package: Package | None = None

    def unmet(
        self, device: torch.device, dtype: torch.dtype | None = None, head_dim: int | None = None
    ) -> Unmet | None:
        """The first thing that is missing, or None; what is not known yet (None) is taken to be right."""
        unmet = self.unmet_by_device(device)
        if unmet is None and self.package is not None:
            unmet = self.package.unmet()
        if unmet is None and dtype is not None and dtype not in self.dtypes:
            able = " or ".join(_name(each) for each in self.dtypes)
            unmet = Unmet(
                f"it takes {able}, not {_name(dtype)}", f"set infer.dtype to {_name(self.dtypes[0])}"
            )
        if unmet is None and head_dim is not None and not self._takes(head_dim):
            most = "" if self.head_dim_most is None else f" up to {self.head_dim_most}"
            able = f"multiples of {self.head_dim_step}{most}"
            unmet = Unmet(f"it takes heads of {able} channels, not {head_dim}", "choose another kernel")
        return unmet

    def _takes(self, head_dim: int) -> bool:
        return head_dim % self.head_dim_step == 0 and (
            self.head_dim_most is None or head_dim <= self.head_dim_most
        )

    def unmet_by_device(self, device: torch.device) -> Unmet | None:
        """Why the device itself cannot run it: nothing that could be installed would help."""
        if device.type not in self.devices:
            able = " or ".join("an NVIDIA GPU" if each == "cuda" else each for each in self.devices)
            return Unmet(
                f"it runs on {able}, not on {device.type}", "choose another kernel, or another infer.device"
            )
        if device.type == "cuda" and self.compute != (_LOWEST, _HIGHEST):
            found = torch.cuda.get_device_capability(device)
            (least, most) = self.compute
            if not least <= found <= most:
                span = (
                    f"{_dotted(least)} or later"
                    if most == _HIGHEST
                    else f"{_dotted(least)} to {_dotted(most)}"
                )
                return Unmet(
                    f"it wants CUDA compute capability {span}, this GPU has {_dotted(found)}",
                    "choose another kernel",
                )
        return None


def _dotted(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))


def _numbers(text: str) -> tuple[int, ...]:
    """The leading numbers of a version: "2.2.0+cu130" is (2, 2, 0); an unknown one is taken for new."""
    if not text[:1].isdigit():
        return (10**6,)
    parts = text.split("+")[0].split(".")
    return tuple(int("".join(digit for digit in part if digit.isdigit()) or 0) for part in parts)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
