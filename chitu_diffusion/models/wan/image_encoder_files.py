"""What CLIP's vision tower is called in files, and what lies beside it there. Sources of the facts:
transformers' `CLIPVisionModel` and Wan-Video/Wan2.1, wan/modules/clip.py, which keeps q, k and v as one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from chitu_diffusion.errors import CheckpointError
from chitu_diffusion.files.reading import foreign_data
from chitu_diffusion.models.wan.image_encoder import TOWER
from chitu_diffusion.weights.files import Stored, WeightFiles

_OFFICIAL = "visual."
# ours -> official, and how many axes are ours: there they begin with ones
_TOP = {
    "embeddings.class_embedding": ("cls_embedding", 1),
    "embeddings.position_embedding.weight": ("pos_embedding", 2),
    "embeddings.patch_embedding.weight": ("patch_embedding.weight", 4),
}
_PLACES = {
    "pre_layrnorm": "pre_norm",
    "post_layernorm": "post_norm",
    "layer_norm1": "norm1",
    "layer_norm2": "norm2",
    "self_attn.out_proj": "attn.proj",
    "mlp.fc1": "mlp.0",
    "mlp.fc2": "mlp.2",
}
_QKV = "attn.to_qkv"
_THREE = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_BESIDE = re.compile(
    r"(visual|text)_projection\..*|logit_scale|text_model\..*|.*\.position_ids|log_scale|textual\..*|visual\.head"
)
"""Of CLIP's other half, or what follows from the sizes: neither diffusers nor Wan's authors need it here."""


class ImageEncoderFiles(WeightFiles):
    """A tower's tensors under transformers' names and in its shapes, whichever the files have.

    Args:
        stored: the files.
    """

    def __init__(self, stored: WeightFiles) -> None:
        self.path = stored.path
        self._opened = stored
        # our name -> (name in the files, which third of its rows; None: all)
        self._pieces: dict[str, tuple[str, int | None]] = {}
        self.entries: dict[str, Stored] = {}
        self.eight_bit = stored.eight_bit
        for key, found in stored.entries.items():
            for name, part, shape in _named(key, found.shape):
                self._pieces[name] = (key, part)
                self.entries[name] = replace(found, shape=shape)

    def unused(self) -> list[Path]:
        """Weights that lie in the folder and that nobody reads."""
        return self._opened.unused()

    @property
    def files(self) -> list[Path]:
        """The files that hold the tensors."""
        return self._opened.files

    @property
    def on_disk(self) -> list[Stored]:
        """As they are stored, without what belongs to them."""
        return self._opened.on_disk

    def read(self, key: str, widen_on: torch.device | str = "cpu") -> Tensor:
        """The tensor of that name, as `WeightFiles` reads it."""
        stored, part = self._pieces[key]
        entry = self.entries[key]
        whole = self._opened.read(stored, widen_on)
        with foreign_data(
            lambda cause: CheckpointError(f"a tensor cannot be read: {cause}", file=entry.file, key=stored)
        ):
            return (whole if part is None else whole.chunk(len(_THREE))[part]).reshape(entry.shape)


def _named(key: str, shape: tuple[int, ...]) -> Iterator[tuple[str, int | None, tuple[int, ...]]]:
    """What a stored tensor is: names, thirds and shapes."""
    if _BESIDE.fullmatch(key):
        return
    if not key.startswith(_OFFICIAL):
        yield f"{TOWER}.{key.removeprefix(f'{TOWER}.')}", None, shape
        return
    own = key.removeprefix(_OFFICIAL)
    for ours, (theirs, axes) in _TOP.items():
        if own == theirs:
            ones = all(size == 1 for size in shape[:-axes])
            yield f"{TOWER}.{ours}", None, shape[-axes:] if ones else shape
            return
    home, inner, kind = _split(own)
    if inner == _QKV and shape[0] % len(_THREE) == 0:
        for part, name in enumerate(_THREE):
            yield f"{home}{name}.{kind}", part, (shape[0] // len(_THREE), *shape[1:])
        return
    known = {theirs: ours for ours, theirs in _PLACES.items()}
    yield f"{home}{known.get(inner, inner)}.{kind}", None, shape


def _split(own: str) -> tuple[str, str, str]:
    """An official name -> what ours begins with, the module in a layer, "weight" or "bias"."""
    place, _, kind = own.rpartition(".")
    layer = re.fullmatch(r"transformer\.(\d+)\.(.+)", place)
    return (
        (f"{TOWER}.", place, kind)
        if layer is None
        else (f"{TOWER}.encoder.layers.{layer[1]}.", layer[2], kind)
    )


def official_image_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A tower's tensors by our names -> as Wan's authors keep them, without what they have beside it."""
    official: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        own = name.removeprefix(f"{TOWER}.")
        if own in _TOP:
            theirs, axes = _TOP[own]
            ones = (1,) * (3 - axes)
            official[_OFFICIAL + theirs] = tensor.reshape(*ones, *tensor.shape)
            continue
        place, _, kind = own.rpartition(".")
        layer = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)", place)
        home, inner = (
            (_OFFICIAL, place) if layer is None else (f"{_OFFICIAL}transformer.{layer[1]}.", layer[2])
        )
        if inner in _THREE[1:]:
            continue
        if inner == _THREE[0]:
            three = [tensors[name.replace(inner, each)] for each in _THREE]
            official[f"{home}{_QKV}.{kind}"] = torch.cat(three)
        else:
            official[f"{home}{_PLACES[inner]}.{kind}"] = tensor
    return official
