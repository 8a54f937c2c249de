"""Which model a name, a hub id or a folder means, and where its weights lie.

Weights are not read here; a folder's configs are, once.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from chitu_diffusion.errors import CheckpointError, ModelMissingError, UsageError, nearest
from chitu_diffusion.files.atomic import write_text
from chitu_diffusion.flexcache.calibration import Calibration, read_calibration
from chitu_diffusion.flexcache.schedule import NOTHING_MEASURED, Measured
from chitu_diffusion.models.folder import METADATA_FILE, ModelFolder, is_model_folder, read_folder
from chitu_diffusion.models.hub_cache import cached_folder, read_whole
from chitu_diffusion.models.kinds import EXPERT_ROLES, IMAGE_TO_VIDEO
from chitu_diffusion.models.limits import MOST_MEASURED, MOST_SHIFT, Limit, check_limits
from chitu_diffusion.models.spec import Defaults, LatentGeometry, ModelSpec
from chitu_diffusion.models.wan.config import WanConfig
from chitu_diffusion.models.wan.presets import FULL_SIZE, SMALL_DEFAULTS
from chitu_diffusion.sampling.noise_levels import TRAINED_STEPS, is_falling
from chitu_diffusion.sampling.recipes import NO_RECIPE, recipe_named, recipe_of_names
from chitu_diffusion.sampling.registry import SOLVERS
from chitu_diffusion.task.params import MAX_PROMPT

if TYPE_CHECKING:
    from chitu_diffusion.config import ModelSettings

logger = logging.getLogger(__name__)

TINY = "wan-tiny"
ASSETS = Path(__file__).resolve().parent.parent / "assets"
_METADATA_KEYS = frozenset(
    {"name", "defaults", "measured", "boundary_ratio", "vae", "text_encoder", "scheduler", "transformer"}
    | {"words", "trained_sizes", "recipe", "image_encoder", "image_processor"}
)
"""What a folder's `chitu.json` may say."""
_LONGEST_NAME = 200
_MEASURED = Limit(-1e9, 1e9, whole=False, most=MOST_MEASURED)


class FoundModel(NamedTuple):
    """A model, and its folder as it was read; None for a model that is not on this machine."""

    spec: ModelSpec
    folder: ModelFolder | None

    def required(self) -> ModelFolder:
        """The folder.

        Raises:
            ModelMissingError: there is none; the message tells how to get it.
        """
        if self.folder is None:
            raise missing_model(self.spec)
        return self.folder


def model_names() -> list[str]:
    """Every name that `resolve_model` knows without a folder."""
    return [TINY, *FULL_SIZE]


def model_of(settings: ModelSettings) -> FoundModel:
    """The model that settings name; see `resolve_model`."""
    parts = settings.model_dump(exclude={"name", "ckpt_dir"}, exclude_none=True)
    return resolve_model(settings.name, settings.ckpt_dir, parts)


def resolve_model(
    name: str, ckpt_dir: str | Path | None = None, parts: Mapping[str, str] | None = None
) -> FoundModel:
    """The model that a name, a Hugging Face id or a folder means, and where its weights lie.

    Args:
        name: one of `model_names()`, a hub id of one, a folder in either layout, or a transformer's file;
            names in any letter case.
        ckpt_dir: the weights' folder or file, where it is not the shipped one or the hub's cache.
        parts: where parts of a model lie whose transformer is a file, as in `ModelSettings`.

    Returns:
        the spec, and the folder, or None if the model is not on this machine.

    Raises:
        UsageError: a file that is no transformer's; says what is in it. Parts of a model that is whole.
        ModelMissingError: a name that is none of these; names the nearest.
        ModelMissingError, CheckpointError: the folder holds no readable model, or one of other sizes than
            `name` has; a download that was broken off.
    """
    spec = full_size_named(name)
    if ckpt_dir is not None:
        path = place_named(ckpt_dir)
        if path is None:
            raise ModelMissingError(
                f"there is no folder {ckpt_dir}; 'chitu models ls' shows the models on this machine"
            )
        return _checked_against(spec, _found(path, parts, spec))
    if spec is not None:
        cached = cached_folder(spec.hub_ids)
        if cached is None:
            return FoundModel(spec, None)
        _refuse_parts(name, parts)
        return _checked_against(spec, _model_in(read_whole(cached, spec.name), spec))
    path = ASSETS / TINY if name.lower() == TINY else place_named(name)
    if path is not None:
        return _found(path, parts)
    known = [*model_names(), *(hub for full in FULL_SIZE.values() for hub in full.hub_ids)]
    raise ModelMissingError(
        f"models.name = {name!r}: no such model or folder.{nearest(name, known)}", field="models.name"
    )


def place_named(name: str | Path) -> Path | None:
    """The folder or file that a name means, if there is one; '~' is the home folder."""
    try:
        place = Path(name).expanduser()
        return place if place.is_dir() or place.is_file() else None
    except (OSError, RuntimeError, ValueError):  # no such user's home, or a name that no file system takes
        return None


def read_model(path: Path, parts: Mapping[str, str] | None = None) -> ModelFolder:
    """The model in a folder, or of a transformer's file.

    Args:
        parts: as for `resolve_model`.

    Raises:
        UsageError, ModelMissingError, CheckpointError: as `resolve_model`.
    """
    path = path.expanduser()
    if not path.is_file() and (is_model_folder(path) or not path.is_dir()):
        _refuse_parts(path, parts)
        return read_folder(path)
    from chitu_diffusion.models.single_files import holds_files, read_files

    if path.is_file() or holds_files(path):
        return read_files(path, parts or {})
    return read_folder(path)  # which says what is lacking


def _refuse_parts(model: object, parts: Mapping[str, str] | None) -> None:
    for part in parts or {}:
        raise UsageError(
            f"models.{part}: {model} is a whole model; leave it out, or name a transformer's file",
            field=f"models.{part}",
        )


def _found(path: Path, parts: Mapping[str, str] | None, asked: ModelSpec | None = None) -> FoundModel:
    return _model_in(read_model(path, parts), asked)


def _model_in(folder: ModelFolder, asked: ModelSpec | None) -> FoundModel:
    return FoundModel(spec_of_folder(folder, asked), folder)


def spec_of_folder(folder: ModelFolder, asked: ModelSpec | None = None) -> ModelSpec:
    """The spec of the model in a folder: from its configs, its `chitu.json`, and the full-size model it
    equals, if any.

    Args:
        asked: the full-size model that somebody named, of several that have the same sizes.

    Raises:
        CheckpointError: not a model that is supported.
    """
    try:
        return _spec_of(folder, asked)
    except CheckpointError:
        raise
    except (TypeError, ValueError, AttributeError) as error:
        # UsageError among them: a network that is not supported
        raise CheckpointError(f"a config of the model cannot be used: {error}", file=folder.path) from error


def _spec_of(folder: ModelFolder, asked: ModelSpec | None) -> ModelSpec:
    name = folder.metadata.get("name") or ""
    if not isinstance(name, str) or len(name) > _LONGEST_NAME or not name.isprintable():
        raise CheckpointError(
            "a note cannot be used",
            file=folder.note,
            key="name",
            expected=f"a name of at most {_LONGEST_NAME} characters that can be printed",
            found=repr(name),
        )
    for key in folder.metadata:
        if key not in _METADATA_KEYS:
            known = sorted(_METADATA_KEYS)
            raise CheckpointError("an unknown note", file=folder.note, key=key, expected=known)
    transformers = tuple(
        WanConfig.from_json(folder.components[role].config)
        for role in EXPERT_ROLES
        if role in folder.components
    )
    _check_image_encoder(folder, transformers)
    geometry = LatentGeometry.of_vae(folder.components["vae"].config)
    _check_control(folder, transformers, geometry)
    if len(transformers) == 2 and folder.boundary_ratio is None:
        raise CheckpointError(
            "two transformers, but nothing says where the second takes over",
            file=folder.path / "model_index.json",
            key="boundary_ratio",
            expected="a number between 0 and 1",
        )
    twin = _twin(transformers, folder, asked)
    own = twin.defaults if twin else _merged_defaults(transformers)
    calibration = None if folder.layout == "files" else _calibration_of(folder.path)
    measured = _folder_measured(folder, twin.measured if twin else NOTHING_MEASURED)
    return ModelSpec(
        name=name or (twin.name if twin else _own_name(folder)),
        transformers=transformers,
        kind=folder.kind,
        boundary=folder.boundary_ratio if len(transformers) == 2 else None,
        hub_ids=twin.hub_ids if twin else (),
        geometry=geometry,
        defaults=_folder_defaults(folder, own, len(transformers)),
        measured=measured if calibration is None else MappingProxyType({**measured, **calibration.measured}),
        calibration=calibration,
        authors_shift=own.shift if own is not SMALL_DEFAULTS else None,
        words=tuple(str(word).lower() for word in folder.metadata.get("words", ())),
        trained_sizes=tuple(
            (int(height), int(width), int(frames))
            for height, width, frames in folder.metadata.get("trained_sizes", ())
        ),
        own_recipe=_own_recipe(folder),
    )


def _own_name(folder: ModelFolder) -> str:
    return folder.path.stem if folder.layout == "files" else folder.path.resolve().name


def _twin(
    transformers: tuple[WanConfig, ...], folder: ModelFolder, asked: ModelSpec | None
) -> ModelSpec | None:
    """The full-size model of these networks: of several the one that was asked for, else that the folder or
    its files are called by, else the first.
    """
    twins = [spec for spec in FULL_SIZE.values() if spec.transformers == transformers]
    if asked in twins:
        return asked
    names = " ".join(folder.names()).lower() if len(twins) > 1 else ""
    # "Wan2_1" and "wan21" are as good as "Wan2.1"
    return max(
        twins, key=lambda spec: sum(word in names for word in spec.name.lower().split("-")), default=None
    )


def _merged_defaults(transformers: tuple[WanConfig, ...]) -> Defaults:
    """Of a network that two experts of a full-size model were merged into: theirs, guided as for low noise.
    Of any other a small model's.
    """
    for spec in FULL_SIZE.values():
        if len(transformers) == 1 and spec.transformers == transformers * 2:
            return dataclasses.replace(spec.defaults, guidance=spec.defaults.guidance[-1:])
    return SMALL_DEFAULTS


def _check_image_encoder(folder: ModelFolder, transformers: tuple[WanConfig, ...]) -> None:
    """An image encoder where, and only where, the networks attend to its rows, and one of their width."""
    first = transformers[0]
    if first.image_dim is None:
        return
    place = folder.path / "model_index.json" if folder.layout == "diffusers" else folder.note
    if (
        "image_encoder" not in folder.components
        or folder.preprocessing is None
        or not folder.kind.takes_image
    ):
        raise CheckpointError(
            "its transformer attends to an image encoder's rows, and the folder has no image encoder",
            file=place,
            key="image_encoder",
            expected=f"{IMAGE_TO_VIDEO.class_name} with a CLIPVisionModel",
            found=folder.kind.class_name,
        )
    config = {"hidden_size": 768, "image_size": 224, "patch_size": 32}  # where it says nothing, CLIP's own
    config |= folder.components["image_encoder"].config
    rows = (config["image_size"] // config["patch_size"]) ** 2 + 1
    for key, expected, found in (
        ("hidden_size", first.image_dim, config["hidden_size"]),
        ("rows of two pictures", first.pos_embed_seq_len or 2 * rows, 2 * rows),
        ("crop_size", config["image_size"], folder.preprocessing.side),
    ):
        if expected != found:
            raise CheckpointError(
                "the image encoder does not fit", file=place, key=key, expected=expected, found=found
            )


def _check_control(
    folder: ModelFolder, transformers: tuple[WanConfig, ...], geometry: LatentGeometry
) -> None:
    """A control stream where, and only where, the kind has one, of two latents and a mask's pixels."""
    stride = geometry.stride
    channels = 2 * geometry.channels + stride[1] * stride[2] if folder.kind.takes_control else None
    for role, config in zip(EXPERT_ROLES, transformers, strict=False):
        if config.vace_in_channels != channels:
            raise CheckpointError(
                f"the control stream does not fit a {folder.kind.title} model",
                file=folder.components[role].weights,
                key="vace_in_channels",
                expected=channels,
                found=config.vace_in_channels,
            )


def _own_recipe(folder: ModelFolder) -> tuple[str, str] | None:
    """The sampler recipe of a folder's weights, by the note in it, else by its name or a file's."""
    noted = folder.metadata.get("recipe")
    found: tuple[str, str] | None = None
    if noted is not None:
        found = (str(noted), METADATA_FILE)
    elif not {"sigmas", "timesteps", "sampler"} & set(folder.metadata.get("defaults", {})):
        found = recipe_of_names(folder.names())
    if found is not None and found[0] != NO_RECIPE:
        try:
            recipe_named(found[0])
        except UsageError as error:
            raise CheckpointError(f"{found[1]}: {error}", file=folder.path, key="recipe") from error
        return found
    return None


def _calibration_of(folder: Path) -> Calibration | None:
    """A file that cannot be used is as none: only what rests on it fails, and measuring again replaces it."""
    try:
        return read_calibration(folder)
    except CheckpointError as error:
        logger.warning("%s", error)
        return None


def write_metadata(path: str | Path, name: str, defaults: Defaults, **more: Any) -> None:
    """Writes a folder's `chitu.json`: the model's name and defaults, and whatever else `more` says."""
    said = {key: value for key, value in dataclasses.asdict(defaults).items() if value is not None}
    metadata = {"name": name, "defaults": said, **more}
    write_text(Path(path, METADATA_FILE), json.dumps(metadata, indent=2, ensure_ascii=False) + "\n")


def _folder_defaults(folder: ModelFolder, base: Defaults, experts: int) -> Defaults:
    said: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in folder.metadata.get("defaults", {}).items()
    }
    for key, value in said.items():
        _check_default(folder, key, value)
    guidance = said.get("guidance", base.guidance)
    said["guidance"] = guidance if isinstance(guidance, tuple) else (guidance,)
    if len(said["guidance"]) == 1:
        said["guidance"] *= experts
    _check_list(folder, said, base)
    # the official layout has no place for a shift: there it is a note of ours, or nothing
    has_shift = folder.layout == "diffusers" or "scheduler" in folder.metadata or base.shift is None
    for key in ("flow_shift", "shift"):
        if has_shift and folder.scheduler.get(key) is not None:
            # the checkpoint's own scheduler counts for more than what its twin's authors sample with
            said.setdefault("shift", float(folder.scheduler[key]))
    return dataclasses.replace(base, **said)


def _within(limit: Limit) -> tuple[Callable[[Any], bool], str]:
    return limit.allows, str(limit)


_GUIDANCE = Limit(0, 100, whole=False)
_MOST_STEPS = 1000
_EXPECTED: Mapping[str, tuple[Callable[[Any], bool], str]] = MappingProxyType(
    {
        **dict.fromkeys(("height", "width"), _within(Limit(1, 8192))),
        "num_frames": _within(Limit(1, 4001)),
        "fps": _within(Limit(1, 240)),
        "steps": _within(Limit(1, _MOST_STEPS)),
        "guidance": (
            lambda value: (
                0 < len(scales := value if isinstance(value, tuple) else (value,)) <= len(EXPERT_ROLES)
                and all(map(_GUIDANCE.allows, scales))
            ),
            f"{_GUIDANCE}, or a list with one for each expert",
        ),
        "shift": _within(Limit(1e-6, MOST_SHIFT, whole=False, optional=True)),
        "negative_prompt": (
            lambda value: isinstance(value, str) and len(value) <= MAX_PROMPT,
            f"text of at most {MAX_PROMPT} characters",
        ),
        "sampler": (lambda value: value in SOLVERS, " or ".join(SOLVERS)),
        "sigmas": (
            lambda value: value is None or (is_falling(value, 1) and len(value) <= _MOST_STEPS),
            "a falling list of noise levels, the first at most 1, the last above 0",
        ),
        "timesteps": (
            lambda value: value is None or (is_falling(value, TRAINED_STEPS) and len(value) <= _MOST_STEPS),
            f"a falling list of numbers, the first at most {TRAINED_STEPS}, the last above 0",
        ),
    }
)
"""Of each default that a folder may name, what it must be."""


def _check_default(folder: ModelFolder, key: str, value: Any) -> None:
    if key not in _EXPECTED:
        raise CheckpointError("an unknown default", file=folder.note, key=key, expected=sorted(_EXPECTED))
    is_good, expected = _EXPECTED[key]
    if not is_good(value):
        raise _bad_default(folder, key, expected, value)


def _bad_default(folder: ModelFolder, key: str, expected: str, found: Any) -> CheckpointError:
    file = folder.note
    return CheckpointError(
        "a default cannot be used", file=file, key=key, expected=expected, found=repr(found)
    )


def _check_list(folder: ModelFolder, said: dict[str, Any], base: Defaults) -> None:
    """What a folder says of its noise levels fits together; its number of steps is their number."""
    sigmas = said.get("sigmas")
    timesteps = said.get("timesteps")
    listed = sigmas or timesteps
    if listed is None:
        return
    able = [name for name, kind in SOLVERS.items() if kind.takes_list]
    said.setdefault("steps", len(listed))
    sampler = said.get("sampler", base.sampler)
    for key, value, is_good, expected in (
        ("sampler", sampler, sampler in able, f"{' or '.join(able)}, which take a list of noise levels"),
        ("steps", said["steps"], said["steps"] == len(listed), f"{len(listed)}, as many as are listed"),
        ("timesteps", timesteps, not timesteps or len(timesteps) == len(listed), "one for each of sigmas"),
    ):
        if not is_good:
            raise _bad_default(folder, key, expected, value)


def _folder_measured(folder: ModelFolder, base: Measured) -> Measured:
    """What the folder's metadata says was measured on it, over what its twin's authors measured."""
    measured = folder.metadata.get("measured", {})
    check_limits(measured, dict.fromkeys(measured, _MEASURED), folder.note)
    said = {str(name): tuple(float(value) for value in values) for name, values in measured.items()}
    return MappingProxyType({**base, **said})


def full_size_named(name: str) -> ModelSpec | None:
    """The full-size model of a name or hub id, in any letter case; None for none."""
    for spec in FULL_SIZE.values():
        if name.lower() in (spec.name.lower(), *(hub.lower() for hub in spec.hub_ids)):
            return spec
    return None


def _checked_against(asked: ModelSpec | None, found: FoundModel) -> FoundModel:
    if asked is None or asked.transformers == found.spec.transformers:
        return found
    mine, theirs = (spec.transformers for spec in (asked, found.spec))
    differing = {
        name: (getattr(mine[0], name), getattr(theirs[0], name))
        for name in (field.name for field in dataclasses.fields(WanConfig))
        if getattr(mine[0], name) != getattr(theirs[0], name)
    }
    if len(mine) != len(theirs):
        differing["transformers"] = (len(mine), len(theirs))
    raise CheckpointError(
        f"the folder does not hold {asked.name}",
        file=None if found.folder is None else found.folder.path,
        expected={name: pair[0] for name, pair in differing.items()},
        found={name: pair[1] for name, pair in differing.items()},
        remedy=f"name its own model, or leave out the name: it holds {found.spec.name}",
    )


def missing_model(spec: ModelSpec) -> ModelMissingError:
    """The error for a known model that is not on this machine; it says how to get it."""
    return ModelMissingError(
        f"{spec.name} is not on this machine. Get it with 'chitu models pull {spec.name}', or point "
        "models.ckpt_dir at a folder that holds it"
    )
