"""The tensors of an adapter's file by module and part, and the change of a weight that they stand for.

`ENDINGS` says how the parts of all formats are called, `FORMATS` what they give together: a format is one
entry. Knows tensors and files; no network, and no device but that of the weight.

Sources of the formulas: LoRA, arXiv:2106.09685; LoHa and LoCon, arXiv:2108.06098 and 2309.14859; LoKr,
arXiv:2309.14859; DoRA, arXiv:2402.09353.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from chitu_diffusion.errors import CheckpointError
from chitu_diffusion.files.reading import cause, foreign_data, parse_json
from chitu_diffusion.weights.files import WeightFiles

_NAMED = r"(?:\.(?!weight$|bias$)\w+)?"
"""An adapter's own name, as PEFT puts it between."""
_DOWN = rf"lora_A{_NAMED}|lora_down|lora\.down|lora_linear_layer\.down"
_UP = rf"lora_B{_NAMED}|lora_up|lora\.up|lora_linear_layer\.up"
ENDINGS: Mapping[str, str] = MappingProxyType(
    {
        "down": rf"[._](?:{_DOWN})(?:\.weight)?",
        "up": rf"[._](?:{_UP})(?:\.weight)?",
        "up_bias": rf"[._](?:{_UP})\.bias",
        "mid": r"\.lora_mid(?:\.weight)?",
        "alpha": r"\.alpha",
        "dora": rf"\.(?:dora_scale|lora_magnitude_vector{_NAMED})(?:\.weight)?",
        "diff": r"\.diff",
        "diff_b": r"\.diff_b",
        "diff_m": r"\.diff_m",
        "norm": r"\.w_norm",
        "norm_b": r"\.b_norm",
        "set": r"\.set_weight",
        **{
            f"{kind}_{part}": rf"\.{kind}_{part}"
            for kind, parts in (
                ("hada", ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")),
                ("lokr", ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")),
            )
            for part in parts
        },
    }
)
"""Part -> how a key that holds it ends."""
_ENDING = re.compile("(?:" + "|".join(f"(?P<{part}>{ending})" for part, ending in ENDINGS.items()) + ")$")
Parts = Mapping[str, Tensor]
"""float32 tensors of one module, by part, on the weight's device."""


@dataclass
class ModuleChange:
    """What a file holds for one module.

    Attributes:
        keys: the file's own names, by part.
        alpha: numerator of the scale; None where the file names none, and the scale is 1.
    """

    keys: dict[str, str] = field(default_factory=dict)
    alpha: float | None = None


class AdapterFile:
    """An adapter's file, opened: `.safetensors`, or `.pth` and its like read as data.

    Args:
        path: of the file.

    Attributes:
        modules: by the names that stand before the parts' endings.
        unknown: keys whose ending is none of `ENDINGS`.

    Raises:
        CheckpointError: it cannot be read, or is no such file.
    """

    def __init__(self, path: Path) -> None:
        self._weights = WeightFiles(path)
        self.modules: dict[str, ModuleChange] = {}
        self.unknown: list[str] = []
        for key in self._weights.entries:
            found = _ENDING.search(key)
            if found is None or found.lastgroup is None or not found.start():
                self.unknown.append(key)
                continue
            base = key[: found.start()].replace(".processor", "")
            keys = self.modules.setdefault(base, ModuleChange()).keys
            if (other := keys.setdefault(found.lastgroup, key)) != key:
                raise CheckpointError(
                    "an adapter has two tensors for one part of a module", file=path, key=key, found=other
                )
        said = _said_alphas(self._weights)
        for base, change in self.modules.items():
            if "alpha" in change.keys:
                change.alpha = self._alpha(change.keys.pop("alpha"))
            else:
                change.alpha = said(base)

    def _alpha(self, key: str) -> float:
        value = self._weights.read(key)
        if value.numel() != 1 or not value.isfinite():
            raise CheckpointError(
                "an adapter's alpha is no number", file=self._weights.path, key=key, found=list(value.shape)
            )
        return float(value)

    def shape(self, key: str) -> tuple[int, ...]:
        """Of a tensor in the file."""
        return self._weights.entries[key].shape

    def parts(self, change: ModuleChange, device: torch.device) -> dict[str, Tensor]:
        """A module's tensors in float32 on a device."""
        return {part: self._weights.read(key).to(device).float() for part, key in change.keys.items()}


def _said_alphas(weights: WeightFiles) -> Callable[[str], float | None]:
    """The alpha of a module by what diffusers' and PEFT's savers put into the header."""
    path = weights.path
    with foreign_data(
        lambda cause: CheckpointError(f"an adapter's header cannot be read: {cause}", file=path)
    ):
        text = weights.metadata.get("lora_adapter_metadata")
        said = parse_json(text) if text else {}
        fields = said if isinstance(said, dict) else {}
    if any(value is True for name, value in fields.items() if name.endswith("use_rslora")):
        raise CheckpointError(
            "an adapter of rank-stabilised LoRA, whose scale is another",
            file=path,
            key="lora_adapter_metadata",
            expected="use_rslora false",
            remedy="save it with its scale in its weights",
        )

    def alpha_of(base: str) -> float | None:
        prefix = next((name.removesuffix("lora_alpha") for name in fields if name.endswith("lora_alpha")), "")
        owner = base.partition(".")[0] + "."
        prefix = owner if f"{owner}lora_alpha" in fields else prefix
        pattern = fields.get(f"{prefix}alpha_pattern")
        by_module = pattern if isinstance(pattern, dict) else {}
        inner = base.removeprefix(prefix)
        own = next((value for name, value in by_module.items() if _is_module(inner, str(name))), None)
        value = fields.get(f"{prefix}lora_alpha") if own is None else own
        plain = isinstance(value, int | float) and not isinstance(value, bool)
        return float(value) if plain else None  # type: ignore[arg-type]  # `plain` says that it is a number

    return alpha_of


def _is_module(name: str, pattern: str) -> bool:
    """Whether a module is meant by a name, or by its end; PEFT's regular expressions are not followed."""
    return name == pattern or name.endswith(f".{pattern}")


def _lora(parts: Parts, alpha: float | None) -> Tensor:
    """[out, in, ...] of down [r, in, ...], up [out, r, ...] and, for a convolution cut in three, mid."""
    down = parts["down"]
    up = parts["up"].flatten(1)
    scale = 1.0 if alpha is None else alpha / down.shape[0]
    if "mid" in parts:
        change = torch.einsum("or,rs...,si->oi...", up, parts["mid"], down.flatten(1))
    else:
        change = (up @ down.flatten(1)).reshape(up.shape[0], *down.shape[1:])
    return change.mul_(scale)


def _factor(parts: Parts, name: str, core: str) -> Tensor:
    """A factor that may be a product of two itself, `name`_a and _b, around a convolution's core."""
    if name in parts:
        return parts[name]
    a = parts[f"{name}_a"]
    b = parts[f"{name}_b"]
    return a @ b if core not in parts else torch.einsum("ij...,jr,ip->pr...", parts[core], b, a)


def _loha(parts: Parts, alpha: float | None) -> Tensor:
    change = _factor(parts, "hada_w1", "hada_t1") * _factor(parts, "hada_w2", "hada_t2")
    return change.mul_(1.0 if alpha is None else alpha / parts["hada_w1_b"].shape[0])


def _lokr(parts: Parts, alpha: float | None) -> Tensor:
    first = _factor(parts, "lokr_w1", "")
    second = _factor(parts, "lokr_w2", "lokr_t2")
    first = first.reshape(*first.shape, *[1] * (second.ndim - 2))
    ranks = [parts[name].shape[0] for name in ("lokr_w2_b", "lokr_w1_b") if name in parts]
    # of two whole factors alpha says nothing
    return torch.kron(first, second.contiguous()).mul_(alpha / ranks[0] if alpha and ranks else 1.0)


@dataclass(frozen=True)
class Format:
    """How some parts change a weight or what lies beside it.

    Attributes:
        needs: parts without which it is not there.
        takes: further parts.
        change: (parts, alpha) -> what is added to the weight at strength 1; of `replaces` what stands there.
        target: "weight", "bias" or "modulation".
        replaces: whether the value is the new weight itself.
    """

    needs: tuple[str, ...]
    takes: tuple[str, ...]
    change: Callable[[Parts, float | None], Tensor]
    target: str = "weight"
    replaces: bool = False

    def parts_of(self, change: ModuleChange) -> list[str]:
        """Those of a module's parts that this format takes; [] where it is not there."""
        own = [*self.needs, *self.takes]
        return [part for part in own if part in change.keys] if self._is_in(change) else []

    def _is_in(self, change: ModuleChange) -> bool:
        return all(part in change.keys for part in self.needs)


def _plain(part: str) -> Callable[[Parts, float | None], Tensor]:
    return lambda parts, alpha: parts[part]


def _up_bias(parts: Parts, alpha: float | None) -> Tensor:
    return parts["up_bias"] * (1.0 if alpha is None else alpha / parts["down"].shape[0])


def _lokr_format(first: tuple[str, ...], second: tuple[str, ...]) -> Format:
    return Format(first + second, ("lokr_t2", "dora"), _lokr)


_WHOLE = tuple((f"lokr_w{number}",) for number in (1, 2))
_CUT = tuple((f"lokr_w{number}_a", f"lokr_w{number}_b") for number in (1, 2))
FORMATS = (
    Format(("down", "up"), ("mid", "dora"), _lora),
    Format(("down", "up_bias"), (), _up_bias, target="bias"),
    Format(("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"), ("hada_t1", "hada_t2", "dora"), _loha),
    *(_lokr_format(first, second) for first in (_WHOLE[0], _CUT[0]) for second in (_WHOLE[1], _CUT[1])),
    Format(("diff",), (), _plain("diff")),
    Format(("diff_b",), (), _plain("diff_b"), target="bias"),
    Format(("diff_m",), (), _plain("diff_m"), target="modulation"),
    Format(("norm",), (), _plain("norm")),
    Format(("norm_b",), (), _plain("norm_b"), target="bias"),
    Format(("set",), (), _plain("set"), replaces=True),
)
"""All that a module's parts may be; several may stand together."""


def changed_weight(
    kind: Format, parts: Parts, alpha: float | None, value: Tensor, base: Tensor, strength: float
) -> Tensor:
    """A weight with a change of one format added.

    Args:
        kind: the format.
        parts, alpha: of the module.
        value: float32, with the changes of others so far; is written into.
        base: float32, the weight without any; not written into. DoRA and a replaced weight look at it.
        strength: the change's weight.

    Raises:
        ValueError, RuntimeError, IndexError, ZeroDivisionError: shapes that do not fit; see `misfit`.
    """
    change = kind.change(parts, alpha)
    if not _same_axes(change.shape, base.shape):
        raise ValueError(f"shape {list(change.shape)}, here {list(base.shape)}")
    change = change.reshape(base.shape)
    if kind.replaces:
        change = change - base
    if "dora" in parts and "dora" in kind.takes:
        change = _with_magnitude(base + change, parts["dora"]) - base
    return value.add_(change, alpha=strength)


def _with_magnitude(direction: Tensor, magnitude: Tensor) -> Tensor:
    """DoRA: each row (or, by the magnitude's shape, each column) scaled to a length that was trained."""
    flat = direction.flatten(1)
    by_column = magnitude.ndim > 1 and magnitude.shape[0] == 1 and magnitude.numel() == flat.shape[1]
    length = flat.norm(dim=0 if by_column else 1, keepdim=True).clamp_min(torch.finfo(flat.dtype).tiny)
    if magnitude.numel() != length.numel():
        raise ValueError(f"{magnitude.numel()} magnitudes, here {length.numel()}")
    return (flat / length * magnitude.reshape(length.shape)).reshape(direction.shape)


def misfit(kind: Format, file: AdapterFile, change: ModuleChange, shape: tuple[int, ...]) -> str | None:
    """Why a change does not fit a weight of this shape, in words; None where it does. Reads no values."""
    base = torch.empty(shape, device="meta")
    parts = {part: torch.empty(file.shape(key), device="meta") for part, key in change.keys.items()}
    try:
        changed_weight(kind, parts, change.alpha, base.clone(), base, 1.0)
    except (ValueError, RuntimeError, IndexError, ZeroDivisionError) as error:
        return cause(error)
    return None


def _same_axes(found: Sequence[int], shape: Sequence[int]) -> bool:
    """Whether shapes are equal but for axes of length 1."""
    return [size for size in found if size != 1] == [size for size in shape if size != 1]
