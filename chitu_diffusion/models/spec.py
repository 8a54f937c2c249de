"""Which models there are, and what each one asks for when a request says nothing.

Torch-free, so that a request can be checked against its model before anything is loaded. Weights are not read
here; a folder's configs are.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from chitu_diffusion.errors import CheckpointError, ModelMissingError, UsageError, nearest
from chitu_diffusion.flexcache.calibration import Calibration, read_calibration
from chitu_diffusion.flexcache.schedule import NOTHING_MEASURED, Measured
from chitu_diffusion.models.folder import METADATA_FILE, ModelFolder, read_folder
from chitu_diffusion.models.wan.cache_coefficients import WAN_1_3B, WAN_14B
from chitu_diffusion.models.wan.config import WanConfig

logger = logging.getLogger(__name__)

TINY = "wan-tiny"
ASSETS = Path(__file__).resolve().parent.parent / "assets"

# The negative prompt that Wan's authors sample with (Wan2.1, wan/configs/shared_config.py).
_NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，"
    "残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，"
    "三条腿，背景人很多，倒着走"
)


@dataclass(frozen=True)
class LatentGeometry:
    """How pixels become latents.

    Attributes:
        stride: pixels a latent cell spans along (frames, rows, columns); the first frame stands alone.
        channels: of the latent.
    """

    stride: tuple[int, int, int] = (4, 8, 8)
    channels: int = 16

    def latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(C, T, H, W) of the latent of a video of 4n + 1 frames."""
        frames, rows, columns = self.stride
        return self.channels, (num_frames - 1) // frames + 1, height // rows, width // columns


_METADATA_KEYS = frozenset(
    {"name", "defaults", "measured", "boundary_ratio", "vae", "text_encoder", "scheduler", "transformer"}
)
"""What a folder's `chitu.json` may say."""


@dataclass(frozen=True)
class Defaults:
    """What a request gets where it says nothing.

    Attributes:
        guidance: one scale per expert, high noise first.
        shift: of the flow's noise schedule, as the authors sample; None leaves it to the checkpoint's
            scheduler.
        negative_prompt: the other branch of classifier-free guidance.
    """

    height: int = 480
    width: int = 832
    num_frames: int = 81
    fps: int = 16
    steps: int = 50
    guidance: tuple[float, ...] = (5.0,)
    shift: float | None = None
    negative_prompt: str = _NEGATIVE_PROMPT


@dataclass(frozen=True)
class ModelSpec:
    """A model, without its weights.

    Attributes:
        name: what settings and `chitu models` call it.
        transformers: one config, or two for experts: high noise first.
        boundary: of two experts, the share of the 1000 timesteps below which the second takes over.
        hub_ids: on the Hugging Face hub; diffusers' layout first, then the official one.
        text_tokens, text_dim: shape of the text embeddings.
        measured: on this model, for caches that rest on it.
        calibration: what `chitu calibrate` left in its folder, or None.
    """

    name: str
    transformers: tuple[WanConfig, ...]
    boundary: float | None = None
    hub_ids: tuple[str, ...] = ()
    geometry: LatentGeometry = field(default_factory=LatentGeometry)
    defaults: Defaults = field(default_factory=Defaults)
    text_tokens: int = 512
    measured: Measured = field(default_factory=lambda: NOTHING_MEASURED)
    calibration: Calibration | None = None

    @property
    def text_dim(self) -> int:
        """Width of the text embeddings."""
        return self.transformers[0].text_dim

    @property
    def size_step(self) -> tuple[int, int]:
        """Height and width must be multiples of these: the VAE's stride times the patch."""
        _, rows, columns = self.geometry.stride
        _, patch_rows, patch_columns = self.transformers[0].patch_size
        return rows * patch_rows, columns * patch_columns

    def tokens(self, num_frames: int, height: int, width: int) -> int:
        """Length of the sequence that the transformer sees."""
        _, frames, rows, columns = self.geometry.latent_shape(num_frames, height, width)
        patch = self.transformers[0].patch_size
        return (frames // patch[0]) * (rows // patch[1]) * (columns // patch[2])


_SMALL = WanConfig(num_attention_heads=12, ffn_dim=8960, num_layers=30)
_LARGE = WanConfig()

FULL_SIZE: Mapping[str, ModelSpec] = MappingProxyType(
    {
        spec.name: spec
        for spec in (
            ModelSpec(
                "Wan2.1-T2V-1.3B",
                (_SMALL,),
                hub_ids=("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "Wan-AI/Wan2.1-T2V-1.3B"),
                defaults=Defaults(shift=5.0),
                measured=WAN_1_3B,
            ),
            ModelSpec(
                "Wan2.1-T2V-14B",
                (_LARGE,),
                hub_ids=("Wan-AI/Wan2.1-T2V-14B-Diffusers", "Wan-AI/Wan2.1-T2V-14B"),
                defaults=Defaults(shift=5.0),
                measured=WAN_14B,
            ),
            ModelSpec(
                "Wan2.2-T2V-A14B",
                (_LARGE, _LARGE),
                boundary=0.875,
                hub_ids=("Wan-AI/Wan2.2-T2V-A14B-Diffusers", "Wan-AI/Wan2.2-T2V-A14B"),
                defaults=Defaults(steps=40, guidance=(4.0, 3.0), shift=12.0),
                measured=WAN_14B,
            ),
        )
    }
)

# Where a folder says nothing and looks like no full-size model: what suits wan-tiny's size.
_SMALL_DEFAULTS = Defaults(height=128, width=128, num_frames=33, negative_prompt="")


def model_names() -> list[str]:
    """Every name that `resolve_model` knows without a folder."""
    return [TINY, *FULL_SIZE]


def resolve_model(name: str, ckpt_dir: str | Path | None = None) -> tuple[ModelSpec, Path | None]:
    """The model that a name, a Hugging Face id or a folder means, and where its weights lie.

    Args:
        name: one of `model_names()`, a hub id of one, or a folder in either layout; names in any letter case.
        ckpt_dir: the weights' folder, where it is not the shipped one or the hub's cache.

    Returns:
        The spec, and the folder, or None if the model is not on this machine.

    Raises:
        UsageError: a name that is neither; names the nearest.
        ModelMissingError, CheckpointError: the folder holds no readable model, or one of other sizes than
            `name` has.
    """
    spec = _by_name(name)
    if ckpt_dir is not None:
        folder = folder_named(ckpt_dir)
        if folder is None:
            raise ModelMissingError(
                f"there is no folder {ckpt_dir}; 'chitu models ls' shows the models on this machine"
            )
        return _checked_against(spec, spec_of_folder(folder)), folder
    if spec is not None:
        return spec, _in_hub_cache(spec)
    if name.lower() == TINY:
        return spec_of_folder(ASSETS / TINY), ASSETS / TINY
    folder = folder_named(name)
    if folder is not None:
        return spec_of_folder(folder), folder
    known = [*model_names(), *(hub for full in FULL_SIZE.values() for hub in full.hub_ids)]
    raise UsageError(
        f"models.name = {name!r}: no such model or folder.{nearest(name, known)}", field="models.name"
    )


def folder_named(name: str | Path) -> Path | None:
    """The folder that a name means, if there is one; '~' is the home folder."""
    try:
        folder = Path(name).expanduser()
        return folder if folder.is_dir() else None
    except (OSError, RuntimeError):  # no such user's home, or a name that no file system takes
        return None


def spec_of_folder(path: str | Path) -> ModelSpec:
    """The spec of the model in a folder: from its configs, its `chitu.json`, and the full-size model it
    equals, if any.

    Raises:
        ModelMissingError, CheckpointError: no model, or not one that is supported.
    """
    folder = read_folder(path)
    try:
        return _spec_of(folder)
    except CheckpointError:
        raise
    except (
        TypeError,
        ValueError,
        AttributeError,
    ) as error:  # UsageError among them: a network that is not supported
        raise CheckpointError(f"a config of the model cannot be used: {error}", file=folder.path) from error


def _spec_of(folder: ModelFolder) -> ModelSpec:
    for key in folder.metadata:
        if key not in _METADATA_KEYS:
            known = sorted(_METADATA_KEYS)
            raise CheckpointError(
                "an unknown note", file=folder.path / METADATA_FILE, key=key, expected=known
            )
    transformers = tuple(
        WanConfig.from_json(folder.components[role].config)
        for role in ("transformer", "transformer_2")
        if role in folder.components
    )
    if len(transformers) == 2 and folder.boundary_ratio is None:
        raise CheckpointError(
            "two transformers, but nothing says where the second takes over",
            file=folder.path / "model_index.json",
            key="boundary_ratio",
            expected="a number between 0 and 1",
        )
    twin = next((spec for spec in FULL_SIZE.values() if spec.transformers == transformers), None)
    vae, calibration = folder.components["vae"].config, _calibration_of(folder.path)
    measured = _folder_measured(folder, twin.measured if twin else NOTHING_MEASURED)
    return ModelSpec(
        name=str(folder.metadata.get("name") or (twin.name if twin else folder.path.resolve().name)),
        transformers=transformers,
        boundary=folder.boundary_ratio if len(transformers) == 2 else None,
        hub_ids=twin.hub_ids if twin else (),
        geometry=LatentGeometry(channels=int(vae.get("z_dim", 16))),
        defaults=_folder_defaults(folder, twin.defaults if twin else _SMALL_DEFAULTS, len(transformers)),
        measured=measured if calibration is None else MappingProxyType({**measured, **calibration.measured}),
        calibration=calibration,
    )


def _calibration_of(folder: Path) -> Calibration | None:
    """A file that cannot be used is as none: only what rests on it fails, and measuring again replaces it."""
    try:
        return read_calibration(folder)
    except CheckpointError as error:
        logger.warning("%s", error)
        return None


def write_metadata(path: str | Path, name: str, defaults: Defaults, **more: Any) -> None:
    """Writes a folder's `chitu.json`: the model's name and defaults, and whatever else `more` says."""
    metadata = {"name": name, "defaults": dataclasses.asdict(defaults), **more}
    Path(path, METADATA_FILE).write_text(
        json.dumps(metadata, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )


def _folder_defaults(folder: ModelFolder, base: Defaults, experts: int) -> Defaults:
    said = dict(folder.metadata.get("defaults", {}))
    known = {f.name for f in dataclasses.fields(Defaults)}
    for key in said:
        if key not in known:
            raise CheckpointError(
                "an unknown default", file=folder.path / METADATA_FILE, key=key, expected=sorted(known)
            )
    guidance = said.get("guidance", base.guidance)
    said["guidance"] = tuple(guidance) if isinstance(guidance, list | tuple) else (guidance,)
    if len(said["guidance"]) == 1:
        said["guidance"] *= experts
    if folder.scheduler.get("flow_shift") is not None:
        # what the checkpoint's own scheduler says counts for more than what its twin's authors sample with
        said.setdefault("shift", float(folder.scheduler["flow_shift"]))
    return dataclasses.replace(base, **said)


def _folder_measured(folder: ModelFolder, base: Measured) -> Measured:
    """What the folder's metadata says was measured on it, over what its twin's authors measured."""
    said = {
        str(name): tuple(float(value) for value in values)
        for name, values in folder.metadata.get("measured", {}).items()
    }
    return MappingProxyType({**base, **said})


def _by_name(name: str) -> ModelSpec | None:
    for spec in FULL_SIZE.values():
        if name.lower() in (spec.name.lower(), *(hub.lower() for hub in spec.hub_ids)):
            return spec
    return None


def _checked_against(asked: ModelSpec | None, found: ModelSpec) -> ModelSpec:
    if asked is not None and asked.transformers != found.transformers:
        raise CheckpointError(
            f"the folder does not hold {asked.name}", expected=asked.transformers, found=found.transformers
        )
    return found


def _in_hub_cache(spec: ModelSpec) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    for hub_id in spec.hub_ids:
        for file in ("model_index.json", "config.json", "high_noise_model/config.json"):
            found = try_to_load_from_cache(hub_id, file)
            if isinstance(found, str):
                return Path(found).parents[file.count("/")]
    return None


def missing_model(spec: ModelSpec) -> ModelMissingError:
    """The error for a known model that is not on this machine; it says how to get it."""
    return ModelMissingError(
        f"{spec.name} is not on this machine. Get it with 'chitu models pull {spec.name}', "
        "or point models.ckpt_dir at a folder that holds it"
    )
