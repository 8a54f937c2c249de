"""The kinds of model there are, and the parts that a checkpoint may have. Imports no torch.

What a kind does with a request is its class in `pipelines`, under the same name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from chitu_diffusion.errors import CheckpointError

Role = Literal["transformer", "transformer_2", "vae", "text_encoder", "image_encoder"]
PartKind = Literal["encoder", "denoiser", "decoder"]
"""Which stage needs a part: memory follows from it."""


@dataclass(frozen=True)
class Part:
    """A network of a checkpoint.

    Attributes:
        kind: see `PartKind`.
        library, class_name: whose class it is in diffusers' layout.
        stem: how its files begin there.
        official_file: the file that holds it in the official layout; None: a folder with a config, or what
            the model's kind says.
    """

    kind: PartKind
    library: str
    class_name: str
    stem: str = "diffusion_pytorch_model"
    official_file: str | None = None


_TRANSFORMER = Part("denoiser", "diffusers", "WanTransformer3DModel")
PARTS: Mapping[Role, Part] = MappingProxyType(
    {
        "transformer": _TRANSFORMER,  # of two experts the one for high noise
        "transformer_2": _TRANSFORMER,
        "vae": Part("decoder", "diffusers", "AutoencoderKLWan"),
        "text_encoder": Part(
            "encoder", "transformers", "UMT5EncoderModel", "model", "models_t5_umt5-xxl-enc-bf16.pth"
        ),
        "image_encoder": Part(
            "encoder",
            "transformers",
            "CLIPVisionModel",
            "model",
            "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth",
        ),
    }
)
"""By the name of their folder in diffusers' layout."""
OPTIONAL_ROLES: frozenset[Role] = frozenset({"transformer_2", "image_encoder"})
EXPERT_ROLES: tuple[Role, ...] = tuple(role for role, part in PARTS.items() if part.kind == "denoiser")


@dataclass(frozen=True)
class ModelKind:
    """What its checkpoints say of themselves, and what its requests need.

    Attributes:
        class_name: `_class_name` in `model_index.json`.
        model_type: in the official `config.json`.
        frames_type: the same, where the network knows two pictures by their places.
        title: in a sentence.
        takes_image: whether a request has an image.
        image_is_optional: whether it may have none, and is text to video then.
        token_times: whether a known first frame lies in the latent itself, where its tokens are told the time
            0: `expand_timesteps` in `model_index.json`.
        takes_control: whether a request may have a control video with a mask, and reference images; its
            networks are always told of some.
        transformer_class: whose class its networks are in diffusers.
        official_class: likewise, in the official `config.json`.
        vae_file: the official file of its VAE.
        boundary_ratio, flow_shift: of two experts in the official layout, which has no place for them.
    """

    class_name: str
    model_type: str
    title: str
    takes_image: bool = False
    image_is_optional: bool = False
    token_times: bool = False
    takes_control: bool = False
    transformer_class: str = "WanTransformer3DModel"
    official_class: str = "WanModel"
    vae_file: str = "Wan2.1_VAE.pth"
    frames_type: str | None = None
    boundary_ratio: float = 0.875
    flow_shift: float = 12.0

    @property
    def needs_image(self) -> bool:
        """Whether a request without an image cannot be."""
        return self.takes_image and not self.image_is_optional

    def class_name_of(self, role: Role) -> str:
        """The class of a part in diffusers' layout."""
        return self.transformer_class if role in EXPERT_ROLES else PARTS[role].class_name

    def official_file(self, role: Role) -> str | None:
        """The file that holds a part in the official layout; None: a folder with a config."""
        return self.vae_file if role == "vae" else PARTS[role].official_file


TEXT_TO_VIDEO = ModelKind("WanPipeline", "t2v", "text to video")
# Wan2.2, wan/configs/wan_i2v_A14B.py
IMAGE_TO_VIDEO = ModelKind(
    "WanImageToVideoPipeline",
    "i2v",
    "image to video",
    takes_image=True,
    frames_type="flf2v",
    boundary_ratio=0.9,
    flow_shift=5.0,
)
TEXT_IMAGE_TO_VIDEO = ModelKind(
    "WanPipeline",
    "ti2v",
    "text or image to video",
    takes_image=True,
    image_is_optional=True,
    token_times=True,
    vae_file="Wan2.2_VAE.pth",
    flow_shift=5.0,
)
# Wan2.1, wan/vace.py; arXiv:2503.07598
CONTROLLED_VIDEO = ModelKind(
    "WanVACEPipeline",
    "vace",
    "controlled video",
    takes_control=True,
    transformer_class="WanVACETransformer3DModel",
    official_class="VaceWanModel",
)
KINDS: Mapping[str, ModelKind] = MappingProxyType(
    {kind.model_type: kind for kind in (TEXT_TO_VIDEO, IMAGE_TO_VIDEO, TEXT_IMAGE_TO_VIDEO, CONTROLLED_VIDEO)}
)
"""By `model_type` of the official `config.json`. Two may share a `class_name`; its own is then the first."""


def kind_named(name: object, file: object) -> ModelKind:
    """The kind of a `_class_name` or an official `model_type`.

    Args:
        file: where the name stands, for the error.

    Raises:
        CheckpointError: no such kind.
    """
    for kind in KINDS.values():
        if name is not None and name in (kind.class_name, kind.model_type, kind.frames_type):
            return kind
    known = ", ".join(f"{kind.class_name} ({kind.title})" for kind in KINDS.values())
    raise CheckpointError(
        "a kind of model that is not supported", file=file, key="_class_name", expected=known, found=name
    )
