"""From a model's folder to networks with weights, in either layout.

Joins what others know: the folder's parts (`folder`), the names in its files (`models.wan.checkpoint_names`),
the networks (`models.wan`) and strict reading (`chitu_diffusion.weights.loader`). Which device and dtype is
the caller's business.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from chitu_diffusion.errors import CheckpointError, UsageError
from chitu_diffusion.files.reading import foreign_data
from chitu_diffusion.models.folder import Component, ModelFolder
from chitu_diffusion.models.hollow import hollow
from chitu_diffusion.models.kinds import Role
from chitu_diffusion.models.wan.checkpoint_names import (
    TEXT_TIES,
    official_text_name,
    official_transformer_name,
    official_vae_name,
)
from chitu_diffusion.models.wan.image_encoder import ImageEncoder, build_image_encoder
from chitu_diffusion.models.wan.image_encoder_files import ImageEncoderFiles
from chitu_diffusion.models.wan.text_encoder import TextEncoder, build_text_encoder
from chitu_diffusion.models.wan.tokenizer import Tokenizer, load_tokenizer
from chitu_diffusion.models.wan.transformer import KEEP_FLOAT32, WanConfig, WanTransformer
from chitu_diffusion.models.wan.vae import WanVAE, build_vae
from chitu_diffusion.ops.float8_linear import Float8Plan, float8_weights, to_float8
from chitu_diffusion.ops.fused import Float8Rows
from chitu_diffusion.ops.packed_linear import PackedLinear, names_of, pack_layers, packed_weights
from chitu_diffusion.weights.files import GGUF_ENDING, locate
from chitu_diffusion.weights.loader import LoadProgress, Transform, WeightFiles, load_into, match_names

Device = torch.device | str


@dataclass(frozen=True)
class Blueprint:
    """A network without weights, and how its parameters are called on disk.

    Attributes:
        module: on the meta device.
        official: {parameter: name in the official Wan files}, tied second names left out.
        ties: {second name: first name} of parameters that are one tensor.
        keep_float32: parts of parameter names that stay float32 in a 16-bit network.
    """

    module: nn.Module
    official: Mapping[str, str]
    ties: Mapping[str, str]
    keep_float32: tuple[str, ...]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of every parameter, by name, tied second names left out."""
        return {
            name: tuple(tensor.shape)
            for name, tensor in self.module.state_dict().items()
            if name not in self.ties
        }

    def names(self, layout: Literal["diffusers", "official"]) -> Mapping[str, str]:
        """{parameter: name in the files of that layout}."""
        return self.official if layout == "official" else {}


def blueprint(folder: ModelFolder, role: Role, dtype: torch.dtype | None = None) -> Blueprint:
    """The network that a folder's config describes, before any weight is read.

    Raises:
        CheckpointError: the folder has no such part, or its config is of no network that is supported.
    """
    if role not in folder.components:
        raise CheckpointError(f"the model has no {role}", file=folder.path)
    try:
        # diffusers and transformers have many words for a config that cannot be
        with foreign_data(lambda cause: _unusable(folder, role, cause)):
            return _BLUEPRINTS[role](folder.components[role].config, dtype)
    except UsageError as error:
        raise _unusable(folder, role, str(error)) from error


def _unusable(folder: ModelFolder, role: Role, cause: str) -> CheckpointError:
    place = folder.components[role].weights
    return CheckpointError(f"the config of the {role} cannot be used: {cause}", file=place)


def _vae(config: Mapping[str, Any], dtype: torch.dtype | None) -> Blueprint:
    blocks = int(config.get("num_res_blocks", 2))
    residual = bool(config.get("is_residual"))
    return _blueprint(build_vae(config), lambda name: official_vae_name(name, blocks, residual))


def _text_encoder(config: Mapping[str, Any], dtype: torch.dtype | None) -> Blueprint:
    # transformers' own rule: in float16 the feed-forward's last product overflows
    keep = ("wo",) if dtype is torch.float16 else ()
    return _blueprint(build_text_encoder(config), official_text_name, TEXT_TIES, keep)


def _transformer(config: Mapping[str, Any], dtype: torch.dtype | None) -> Blueprint:
    with hollow():
        network = WanTransformer(WanConfig.from_json(config))
    return _blueprint(network, official_transformer_name, keep_float32=KEEP_FLOAT32)


def _image_encoder(config: Mapping[str, Any], dtype: torch.dtype | None) -> Blueprint:
    # `ImageEncoderFiles` has one name for all layouts
    return _blueprint(build_image_encoder(config), lambda name: name)


def _with_preprocessing(network: nn.Module, folder: ModelFolder) -> nn.Module:
    assert folder.preprocessing is not None  # as `read_folder` has it wherever there is an encoder
    return ImageEncoder(network, folder.preprocessing)


def _with_tokenizer(network: nn.Module, folder: ModelFolder) -> nn.Module:
    return TextEncoder(network, tokenizer_of(folder))


def tokenizer_of(folder: ModelFolder) -> Tokenizer:
    """The tokenizer of a model, which fits its text encoder.

    Raises:
        CheckpointError: it is missing, cannot be read, or belongs to another encoder.
    """
    known = folder.components["text_encoder"].config.get("vocab_size")
    return load_tokenizer(folder.tokenizer, known)


_BLUEPRINTS: Mapping[Role, Callable[[Mapping[str, Any], torch.dtype | None], Blueprint]] = MappingProxyType(
    {
        "text_encoder": _text_encoder,
        "image_encoder": _image_encoder,
        "transformer": _transformer,
        "transformer_2": _transformer,
        "vae": _vae,
    }
)
"""A part's config -> its network without weights."""
_WRAPPERS: Mapping[Role, Callable[[nn.Module, ModelFolder], nn.Module]] = MappingProxyType(
    {
        "text_encoder": _with_tokenizer,
        "image_encoder": _with_preprocessing,
        "vae": lambda network, folder: WanVAE(network),
    }
)
"""What speaks this project's shapes around a network that is not ours."""


def load_part(
    folder: ModelFolder,
    role: Role,
    *,
    device: Device = "cpu",
    dtype: torch.dtype | None = None,
    progress: LoadProgress | None = None,
    float8: Float8Plan | None = None,
    packed: bool = False,
) -> nn.Module:
    """A part of a model with its weights.

    On the meta device nothing but a GGUF file's header is read: sizes without weights, for a rank that does
    not run it.

    Args:
        folder: of `read_folder`.
        role: which.
        device, dtype: where and as what; None keeps the stored dtype. `KEEP_FLOAT32` stays float32.
        progress: called with (bytes read, bytes in all).
        float8: which linear layers of a transformer are rounded to 8 bits, each as soon as it is read.
        packed: whether a transformer's other linear layers keep the packed blocks of a GGUF file.

    Raises:
        CheckpointError: files or tensors that are not what the config says.
        UsageError: a plan for 8 bits that does not fit the network.
    """
    network = _loaded(folder, role, device, dtype, progress, float8, packed)
    return _WRAPPERS[role](network, folder).eval() if role in _WRAPPERS else network


class Originals:
    """A part's files, open for as long as this is held: what each parameter was, by our name.

    Raises:
        CheckpointError: missing or damaged files.
    """

    def __init__(self, folder: ModelFolder, role: Role) -> None:
        self._weights = open_weights(folder, role)
        plan = blueprint(folder, role)
        self._names = names_in(self._weights, folder, plan)
        match_names(plan.shapes(), self._weights, names=self._names, ties=plan.ties)

    def read(self, name: str) -> Tensor:
        """A parameter's values, on the CPU; those stored in 8 bits or in blocks in float32."""
        return self._weights.read(self._names.get(name, name))

    def read_float8_rows(self, name: str) -> Float8Rows | None:
        """Of a weight that is stored in rows of 8 bits, these; see `WeightFiles.read_float8_rows`."""
        found = self._weights.read_float8_rows(self._names.get(name, name))
        return None if found is None else Float8Rows(*found)


def load_transformer(
    folder: ModelFolder, role: Literal["transformer", "transformer_2"] = "transformer", **options: Any
) -> WanTransformer:
    """`load_part` of a diffusion transformer; of two experts, "transformer" is the high-noise one."""
    network = load_part(folder, role, **options)
    assert isinstance(network, WanTransformer)
    return network


def load_vae(folder: ModelFolder, **options: Any) -> WanVAE:
    """`load_part` of the VAE."""
    vae = load_part(folder, "vae", **options)
    assert isinstance(vae, WanVAE)
    return vae


def load_text_encoder(folder: ModelFolder, **options: Any) -> TextEncoder:
    """`load_part` of the text encoder."""
    encoder = load_part(folder, "text_encoder", **options)
    assert isinstance(encoder, TextEncoder)
    return encoder


def open_weights(folder: ModelFolder, role: Role, *, mapped: bool = True) -> WeightFiles:
    """The weights' files of one part, headers checked; `mapped` as in `WeightFiles`.

    Raises:
        CheckpointError: missing or damaged files.
    """
    component = folder.components[role]
    part = component.part
    files = WeightFiles(
        component.weights,
        part.stem,
        shards_first=_shards_first(component),
        mapped=mapped,
        within=component.within,
    )
    return ImageEncoderFiles(files) if role == "image_encoder" else files


def check_part(folder: ModelFolder, role: Role) -> tuple[WeightFiles, Mapping[str, str]]:
    """Whether the files of a part hold what its config says: every tensor's name and shape, no values.

    Returns:
        the files, and which stored tensor fills which parameter: {our name: name in the files}.

    Raises:
        CheckpointError: they do not.
    """
    weights = open_weights(folder, role)
    plan = blueprint(folder, role)
    return weights, match_names(plan.shapes(), weights, names=names_in(weights, folder, plan), ties=plan.ties)


def names_in(weights: WeightFiles, folder: ModelFolder, plan: Blueprint) -> Mapping[str, str]:
    """{parameter: name in these files}: those of the folder's layout, unless more of the other's are there,
    as in files that people made for other programs.
    """
    own = plan.names("official" if folder.layout == "official" else "diffusers")
    other = plan.names("diffusers" if folder.layout == "official" else "official")
    found, others = (
        sum(names.get(name, name) in weights.entries for name in plan.official) for names in (own, other)
    )
    return own if found >= others else other


def check_folder(folder: ModelFolder) -> None:
    """`check_part` of every part, and the tokenizer.

    Raises:
        CheckpointError: one is not whole.
    """
    for role in folder.components:
        check_part(folder, role)
    tokenizer_of(folder)


def weight_files(folder: ModelFolder) -> list[Path]:
    """The files with the weights of all parts.

    Raises:
        CheckpointError: a part has none, or not all.
    """
    files = []
    for component in folder.components.values():
        found, _ = locate(component.weights, component.part.stem, _shards_first(component))
        files += found
    return files


def _shards_first(component: Component) -> bool:
    return component.part.library == "diffusers"


def _blueprint(
    module: nn.Module,
    official: Callable[[str], str],
    ties: Mapping[str, str] | None = None,
    keep_float32: tuple[str, ...] = (),
) -> Blueprint:
    ties = ties or {}
    names = {name: official(name) for name in module.state_dict() if name not in ties}
    return Blueprint(module, names, ties, keep_float32)


def _loaded(
    folder: ModelFolder,
    role: Role,
    device: Device,
    dtype: torch.dtype | None,
    progress: LoadProgress | None,
    float8: Float8Plan | None = None,
    packed: bool = False,
) -> nn.Module:
    plan = blueprint(folder, role, dtype)
    transformer = plan.module if isinstance(plan.module, WanTransformer) else None
    eight_bit = (
        []
        if transformer is None or float8 is None
        else to_float8(list(transformer.blocks), float8, transformer.vace_blocks)
    )
    in_blocks = [] if transformer is None or not packed else _pack(folder, role, plan)
    if torch.device(device).type == "meta":
        network = nn.Module.to(plan.module, dtype).eval().requires_grad_(False)  # diffusers' own warns
        for rounded in eight_bit:
            rounded.quantise_weight()
        for layer in in_blocks:
            layer.forget_values()
        return network
    transforms: list[Transform] = []
    if eight_bit:
        transforms.append(float8_weights(plan.module, Originals(folder, role).read_float8_rows))
    if in_blocks:
        transforms.append(packed_weights(plan.module))
    weights = open_weights(folder, role)
    load_into(
        plan.module,
        weights,
        device=device,
        dtype=dtype,
        keep_float32=plan.keep_float32,
        names=names_in(weights, folder, plan),
        ties=plan.ties,
        progress=progress,
        transforms=transforms,
        packed=names_of(plan.module, in_blocks),
    )
    return plan.module.eval().requires_grad_(False)


def _pack(folder: ModelFolder, role: Role, plan: Blueprint) -> list[PackedLinear]:
    """Readies the linear layers of the blocks whose weights are packed in a GGUF file, if there is one."""
    place = folder.components[role].weights
    if place.suffix != GGUF_ENDING and not any(place.glob(f"*{GGUF_ENDING}")):
        return []
    weights, names = check_part(folder, role)
    packings = {
        name: packing
        for name, key in names.items()
        if name.startswith(("blocks.", "vace_blocks."))
        and (packing := weights.entries[key].packing) is not None
    }
    return pack_layers(plan.module, packings)
