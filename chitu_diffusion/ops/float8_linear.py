"""Linear layers in 8 bits: float8 (e4m3) rows times float8 columns, one scale for each row and each column.

Every token's row is scaled by its own largest magnitude when it comes by, every output channel of a weight
once, when it is loaded: "row-wise dynamic" scaling, which 8-bit matrix products of sm_89 and later take as
they are. It is lossy: some 3.6 % relative error in one product with Gaussian numbers (two roundings of 3
mantissa bits). So by default the first and last block, keys and values of the text (computed once a prompt)
and the first quarter of the steps, in which the picture's layout is found, stay in 16 bits.

Two ways to run those first steps. `originals=True` keeps the 16-bit weights beside the 8-bit ones: exact
there, three bytes a weight. `originals=False` keeps the 8-bit ones alone, one byte, and the first steps
multiply 16-bit rows by widened weights: half of the rounding is there from the start. 14B (28.6 GB in 16
bits) needs 40 GB the first way, 17 GB the second.

Where no 8-bit products are (CPU, GPUs before sm_89) the same numbers are multiplied in float32: it shows what
8 bits do to a video, slower than 16 bits would. This file knows linear layers and their names; not which
network, step or setting.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chitu_diffusion.errors import UsageError, nearest
from chitu_diffusion.ops.fused import Float8Rows, can_fuse, quantise

KEEP_BY_DEFAULT = ("edges", "attn2.to_k", "attn2.to_v")
_EDGES = "edges"
_MULTIPLE = 16
"""8-bit products want widths in multiples of this."""


@dataclass(frozen=True)
class Float8Plan:
    """Which linear layers are multiplied in 8 bits.

    Attributes:
        keep: layers that stay as they are: "edges" (the first and last block), or part of a name inside a
            block, such as "attn2.to_k" or "ffn".
        originals: whether the 16-bit weights stay beside the 8-bit ones (see this file's head).
    """

    keep: tuple[str, ...] = KEEP_BY_DEFAULT
    originals: bool = True

    @classmethod
    def from_text(cls, keep: str, originals: bool) -> Float8Plan:
        """From a comma-separated list of what to keep."""
        return cls(tuple(word.strip() for word in keep.split(",") if word.strip()), originals)


class Float8Linear(nn.Linear):
    """A linear layer with its weight in 8 bits.

    Takes over the parameters of `linear`. `quantise_weight` rounds what they hold, `float8_weights` what is
    read.

    Attributes:
        weight: [out, in], 16 or 32 bits; None once dropped.
        weight_float8, weight_scale: [out, in] float8 and [out, 1] float32.
        fused: whether rows are rounded by a kernel, where it can run.
        in_float8: whether rows are multiplied in 8 bits now; see `set_float8`.
        emulated: whether that happens in float32, for want of 8-bit products.
    """

    weight_float8: Tensor
    weight_scale: Tensor

    def __init__(self, linear: nn.Linear, originals: bool = True) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.weight = linear.weight
        self.bias = linear.bias
        self._originals = originals
        self.fused = True
        self.in_float8 = True
        self.emulated = True
        # not in the state dict: checkpoints hold `weight`
        self.register_buffer("weight_float8", None, persistent=False)
        self.register_buffer("weight_scale", None, persistent=False)

    @torch.no_grad()
    def quantise_weight(self) -> None:
        """Rounds the weight, and drops it unless it is to stay."""
        parts = self.rounded(self.weight)
        self.weight_float8 = parts["weight_float8"]
        self.weight_scale = parts["weight_scale"]
        if "weight" not in parts:
            self.register_parameter("weight", None)

    def rounded(self, weight: Tensor, rows: Float8Rows | None = None) -> dict[str, Tensor]:
        """What this layer keeps of a weight [out, in], by attribute: `weight` only if it is to stay.

        Args:
            weight: in 16 or 32 bits.
            rows: the same in 8 bits, where it came so; None rounds it here.
        """
        rows = rows or quantise(weight)
        parts = {"weight_float8": rows.values, "weight_scale": rows.scale}
        return {**parts, "weight": weight} if self._originals else parts

    def forward(self, x: Tensor | Float8Rows) -> Tensor:
        """x [..., in] -> [..., out], in x's dtype; `Float8Rows` in the bias's. Rows are rounded here unless
        they are already.

        Raises:
            TypeError: rows in 8 bits while this layer multiplies in 16.
        """
        if not self.in_float8:
            if isinstance(x, Float8Rows):
                raise TypeError("rows in 8 bits for a layer that multiplies in 16; see set_float8")
            return F.linear(x, self._wide(x.dtype), self.bias)
        if isinstance(x, Float8Rows):
            return self._product(x, self.weight_scale.dtype if self.bias is None else self.bias.dtype)
        return self._product(quantise(x, fused=self.fused and can_fuse(x)), x.dtype)

    def _product(self, x: Float8Rows, dtype: torch.dtype) -> Tensor:
        # [M, in], [M, 1]
        rows = x.values.flatten(0, -2)
        scale = x.scale.flatten(0, -2)
        if self.emulated:
            y = F.linear(rows.float(), self.weight_float8.float()) * scale * self.weight_scale.t()
            y = (y if self.bias is None else y + self.bias.float()).to(dtype)
        else:
            y = torch._scaled_mm(
                rows,
                self.weight_float8.t(),  # [in, out], column by column
                scale_a=scale,
                scale_b=self.weight_scale.t(),
                bias=self.bias,
                out_dtype=dtype,
                use_fast_accum=True,
            )
        return y.unflatten(0, x.values.shape[:-1])

    def _wide(self, dtype: torch.dtype) -> Tensor:
        if self._originals:
            return self.weight
        return (self.weight_float8.float() * self.weight_scale).to(dtype)


def wants_float8(layer: object) -> bool:
    """Whether a linear layer multiplies in 8 bits now, so that its rows may be made in 8 bits too."""
    return isinstance(layer, Float8Linear) and layer.in_float8


@cache
def has_float8_products(device: torch.device) -> bool:
    """Whether the device multiplies float8: sm_89 (Ada), sm_90 (Hopper) and later. Asked once a device."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def to_float8(
    blocks: Sequence[nn.Module], plan: Float8Plan, others: Iterable[nn.Module] = ()
) -> list[Float8Linear]:
    """Puts `Float8Linear` in the place of linear layers, in every block alike but for those that are kept.

    Layers that hold their values are rounded at once, one after the other; on the meta device nothing is, and
    weights go through `float8_weights` when they are read. Calling it again changes nothing. Widths that are
    no multiple of 16 stay.

    Args:
        blocks: of one network, in order.
        plan: what to keep.
        others: blocks beside them, of which none is the first or the last.

    Returns:
        The 8-bit layers, block by block.

    Raises:
        UsageError: a word of the keep-list that fits no layer, or one that keeps them all.
    """
    edges = {0, len(blocks) - 1} if _EDGES in plan.keep else set()
    blocks = [*blocks, *others]
    names = {
        name for block in blocks for name, module in block.named_modules() if isinstance(module, nn.Linear)
    }
    _check_words(plan.keep, names)
    layers: list[Float8Linear] = []
    for index, block in enumerate(blocks):
        if index in edges:
            continue
        for name, module in list(block.named_modules()):
            if not isinstance(module, nn.Linear) or any(_inside(word, name) for word in plan.keep):
                continue
            if module.in_features % _MULTIPLE or module.out_features % _MULTIPLE:
                continue
            layers.append(_replaced(block, name, module, plan.originals))
    if not layers:
        raise UsageError(
            f"quant_keep = {','.join(plan.keep)!r} keeps every layer of {len(blocks)} block(s) in 16 bits; "
            "name fewer, or set infer.quant=none",
            field="infer.quant_keep",
        )
    return layers


StoredRows = Callable[[str], Float8Rows | None]
"""A parameter's name -> its values in 8 bits as a file has them, on the CPU; None where it has no such."""


def float8_weights(
    network: nn.Module, stored: StoredRows = lambda name: None
) -> Callable[[str, Tensor], Mapping[str, Tensor]]:
    """A transform for `weights.loader.load_into` that rounds the weights of a network's 8-bit layers as they
    are read, so that one at a time is there in full. What is stored in 8 bits is taken as it is.
    """

    def transform(name: str, tensor: Tensor) -> Mapping[str, Tensor]:
        owner, _, leaf = name.rpartition(".")
        layer = network.get_submodule(owner)
        if leaf != "weight" or not isinstance(layer, Float8Linear):
            return {name: tensor}
        rows = rows_on(stored(name), tensor.device)
        return {f"{owner}.{part}": value for part, value in layer.rounded(tensor, rows).items()}

    return transform


def rows_on(rows: Float8Rows | None, device: torch.device) -> Float8Rows | None:
    """Rows that may not be there, on a device."""
    return rows and Float8Rows(*(part.to(device, copy=True) for part in rows))


def set_float8(layers: Iterable[Float8Linear], in_float8: bool, device: torch.device | None = None) -> None:
    """Multiply in 8 bits from now on, or in 16.

    Args:
        layers: of `to_float8`.
        in_float8: which.
        device: on which they will run; None is where they are.
    """
    for layer in layers:
        layer.in_float8 = in_float8
        layer.emulated = not has_float8_products(device or layer.weight_float8.device)


def float8_begins(share: float, shift: float) -> float:
    """The timestep, 0 to 1000, at and below which a schedule with this shift has left `share` of its steps
    behind.

    Steps are even before the shift s = shift: sigma = s u / (1 + (s - 1) u) with u from 1 to 0. Half a
    timestep is added, since solvers round. It looks at the time alone, so that every rank, stage and number
    of steps follows one rule.
    """
    rest = 1 - share
    return 1000 * shift * rest / (1 + (shift - 1) * rest) + 0.5


def _replaced(block: nn.Module, name: str, linear: nn.Linear, originals: bool) -> Float8Linear:
    if isinstance(linear, Float8Linear):
        return linear
    layer = Float8Linear(linear, originals)
    layer.train(linear.training)
    owner, _, leaf = name.rpartition(".")
    setattr(block.get_submodule(owner), leaf, layer)
    if linear.weight.device.type != "meta":
        layer.quantise_weight()
    return layer


def _inside(word: str, name: str) -> bool:
    """Whether a dotted word is part of a dotted name: "attn2.to_k" has "attn2" and "to_k", not "to"."""
    return f".{word}." in f".{name}."


def _check_words(words: Iterable[str], names: set[str]) -> None:
    for word in words:
        if word != _EDGES and not any(_inside(word, name) for name in names):
            raise UsageError(
                f"quant_keep: no layer is called {word!r}.{nearest(word, names | {_EDGES})}",
                field="infer.quant_keep",
            )
