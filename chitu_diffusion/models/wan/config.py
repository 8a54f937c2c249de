"""The shape of a Wan transformer, as data. Knows no tensors and imports no torch."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from chitu_diffusion.errors import UsageError

TRAINED_STEPS = 1000
"""Timesteps run from this, pure noise, to 0; an expert boundary is a share of it."""

_QK_NORM = "rms_norm_across_heads"
_NO_SIZES = ("patch_size", "cross_attn_norm", "qk_norm", "eps", "vace_layers")
_OPTIONAL = ("image_dim", "added_kv_proj_dim", "pos_embed_seq_len", "vace_in_channels")

# Fields of diffusers' config.json that belong to other Wan models (animate). None (or False) is what
# the others say there; anything else means parts that `WanTransformer` does not have.
_FOREIGN_FIELDS = ("add_img_emb",)


@dataclass(frozen=True)
class WanConfig:
    """Sizes of a `WanTransformer`; field names are those of diffusers' `transformer/config.json`.

    Attributes:
        patch_size: (frames, rows, columns) of latent that make one token.
        in_channels: of the latent, and of what is concatenated to it.
        rope_max_seq_len: the longest grid axis, in tokens, that rotary positions exist for.
        qk_norm: always "rms_norm_across_heads": RMSNorm of q and k over all heads together.
        image_dim: of an image encoder's rows, which every block attends to beside the text (Wan2.1's image to
            video); None: there is none.
        added_kv_proj_dim: width of these rows in the blocks, `dim`; None where `image_dim` is.
        pos_embed_seq_len: how many rows have learned positions; None: they have none.
        vace_layers: blocks after which a block of the control stream adds its hint (VACE, arXiv:2503.07598),
            rising from 0; None: there is no such stream.
        vace_in_channels: of the control latents; None where `vace_layers` is.

    Raises:
        UsageError: a value that no such network can have.
    """

    patch_size: tuple[int, int, int] = (1, 2, 2)
    num_attention_heads: int = 40
    attention_head_dim: int = 128
    in_channels: int = 16
    out_channels: int = 16
    text_dim: int = 4096
    freq_dim: int = 256
    ffn_dim: int = 13824
    num_layers: int = 40
    cross_attn_norm: bool = True
    qk_norm: str = _QK_NORM
    eps: float = 1e-6
    rope_max_seq_len: int = 1024
    image_dim: int | None = None
    added_kv_proj_dim: int | None = None
    pos_embed_seq_len: int | None = None
    vace_layers: tuple[int, ...] | None = None
    vace_in_channels: int | None = None

    def __post_init__(self) -> None:
        """Checks what the network's arithmetic relies on."""
        if len(self.patch_size) != 3:
            raise UsageError(
                f"patch_size must have three numbers (frames, rows, columns), not {self.patch_size}"
            )
        sizes = {name: value for name, value in dataclasses.asdict(self).items() if name not in _NO_SIZES}
        sizes |= {f"patch_size[{axis}]": value for axis, value in enumerate(self.patch_size)}
        for name, value in sizes.items():
            if name in _OPTIONAL and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UsageError(f"{name} must be a whole number from 1, not {value!r}")
        if isinstance(self.eps, bool) or not isinstance(self.eps, int | float) or not 0 < self.eps < 1:
            raise UsageError(f"eps must be a number between 0 and 1, not {self.eps!r}")
        if self.attention_head_dim % 2 or self.freq_dim % 2:
            raise UsageError(
                "attention_head_dim and freq_dim must be even (rotary pairs, cosine-sine pairs); they are "
                f"{self.attention_head_dim} and {self.freq_dim}"
            )
        if self.added_kv_proj_dim != (None if self.image_dim is None else self.dim):
            raise UsageError(
                f"added_kv_proj_dim must be {self.dim} (heads x head size) with an image_dim, and null "
                "without; "
                f"image_dim is {self.image_dim}, added_kv_proj_dim {self.added_kv_proj_dim}"
            )
        layers = self.vace_layers
        if (layers is None) != (self.vace_in_channels is None):
            raise UsageError(
                f"vace_layers and vace_in_channels go together; they are {layers} and {self.vace_in_channels}"
            )
        if layers is not None and (
            layers[:1] != (0,) or list(layers) != sorted(set(layers)) or layers[-1] >= self.num_layers
        ):
            raise UsageError(
                f"vace_layers must rise from 0 to at most {self.num_layers - 1}, the last block; they are "
                f"{list(layers)}"
            )
        if self.qk_norm != _QK_NORM:
            raise UsageError(f"qk_norm {self.qk_norm!r} is not supported; Wan models use {_QK_NORM!r}")

    @property
    def dim(self) -> int:
        """Width of the residual stream."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def patch_values(self) -> int:
        """Numbers in one token's patch of one channel."""
        frames, rows, columns = self.patch_size
        return frames * rows * columns

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "WanConfig":
        """Reads diffusers' `transformer/config.json`, already parsed.

        Missing fields take the class's defaults (they are diffusers' own). Keys that start with "_" are
        diffusers' bookkeeping and are passed over.

        Raises:
            UsageError: a field of a model that is not supported, or an unknown field.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        values: dict[str, Any] = {}
        for key, value in data.items():
            if key.startswith("_") or key == "window_size":
                continue
            if key in _FOREIGN_FIELDS:
                if value:
                    raise UsageError(
                        f"transformer config has {key}={value!r}: Wan models with such parts are not "
                        "supported"
                    )
            elif key not in known:
                raise UsageError(f"transformer config has an unknown field {key!r} (value {value!r})")
            else:
                values[key] = value
        if "patch_size" in values:
            values["patch_size"] = tuple(values["patch_size"])
        if values.get("vace_layers") is not None:
            values["vace_layers"] = tuple(values["vace_layers"])
        if "out_channels" in values and values["out_channels"] is None:
            values["out_channels"] = values.get("in_channels", cls.in_channels)
        return cls(**values)

    def to_json(self) -> dict[str, Any]:
        """The fields as diffusers writes them into `transformer/config.json`."""
        data = dataclasses.asdict(self)
        data["patch_size"] = list(self.patch_size)
        if self.vace_layers is None:
            del data["vace_layers"], data["vace_in_channels"]
            return {"_class_name": "WanTransformer3DModel", **data}
        return {"_class_name": "WanVACETransformer3DModel", **data, "vace_layers": list(self.vace_layers)}
