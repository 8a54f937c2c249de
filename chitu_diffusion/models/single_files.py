"""Models whose parts are files of their own, wherever they lie: named by their transformer's file, or by a
folder as ComfyUI has them.

    diffusion_models/  text_encoders/  vae/  clip_vision/            (and one such tree under split_files/)

What a part is, its tensors tell (`detection`); where the others lie is told, or looked for in these folders
beside it; of two experts the names tell which is which. Reads headers, no weights but a tokenizer's bytes.
"""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from chitu_diffusion.config import cache_dir
from chitu_diffusion.errors import CheckpointError, ModelMissingError, UsageError
from chitu_diffusion.files.reading import foreign_data
from chitu_diffusion.models import limits
from chitu_diffusion.models.detection import TITLES, USUAL_HEAD, described, parts_within, transformer_in
from chitu_diffusion.models.folder import (
    METADATA_FILE,
    TOKENIZER_FOLDER,
    Component,
    ModelFolder,
    checked_table,
    noted_preprocessing,
    read_json,
    usual_configs,
    usual_scheduler,
)
from chitu_diffusion.models.kinds import EXPERT_ROLES, ModelKind, Role, kind_named
from chitu_diffusion.models.wan.config import WanConfig
from chitu_diffusion.models.wan.presets import FULL_SIZE
from chitu_diffusion.models.wan.tokenizer_files import kept_tokenizer
from chitu_diffusion.weights.files import ENDINGS, TensorFile, WeightFiles, few, open_tensors

logger = logging.getLogger(__name__)

NO_EXPERT = "none"
"""In place of a second expert's file: there is none, though models of these sizes have one."""
_FOLDERS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "transformer": ("diffusion_models", "unet", "checkpoints"),
        "text_encoder": ("text_encoders", "clip"),
        "vae": ("vae",),
        "image_encoder": ("clip_vision",),
        "tokenizer": ("tokenizer", TOKENIZER_FOLDER, "umt5-xxl"),
    }
)
"""Where the parts of a model lie, in whatever folder holds them all."""
_WORDS: Mapping[str, str] = MappingProxyType({"text_encoder": "t5", "vae": "vae", "image_encoder": "clip"})
"""What the names of their files have."""
_ANOTHER = "qwen"
"""What the names of a VAE have that has Wan's tensors to the last shape, and other numbers."""
_UP = 3
"""How many folders above a file are looked at."""
_MOST_LISTED = 1000
_NOISE = re.compile(r"((?<![A-Za-z])(?i:high|low)(?=(?i:noise)|[^A-Za-z]|$)|(?:High|Low)(?=Noise|[^a-z]|$))")
_NOISE_FOLDER = re.compile(r"(?<![a-z])(high|low)(?=[-_ ]?noise)", re.IGNORECASE)
"""The word that tells an expert, in the name of its file ("t2vHighV2" is one, too), or else of the folder."""
_OF_TWO = re.compile(r"wan.?2[._-]?2|a14b", re.IGNORECASE)
_OF_ONE = re.compile(r"wan.?2[._-]?1(?!\d)", re.IGNORECASE)
"""Which of Wan's versions a file is of, by its name: only Wan2.2 has two experts."""
_SWAPPED = {"high": "low", "low": "high", "HIGH": "LOW", "LOW": "HIGH", "High": "Low", "Low": "High"}


@dataclass(frozen=True)
class _Opened:
    """A file of weights, its header read.

    Attributes:
        parts: the networks in it, see `parts_within`.
    """

    file: TensorFile
    parts: Mapping[str, str]

    def within(self, part: str) -> str:
        """What the names of a part begin with where the file has others besides."""
        return self.parts[part] if len(self.parts) > 1 else ""


def read_files(path: Path, given: Mapping[str, str]) -> ModelFolder:
    """The model of a transformer's file, or of a folder with such files.

    Args:
        path: the file; of two experts either, if names tell the other. Or a folder, if it holds one model.
        given: where the parts lie that are told: by role, "low_noise_model" or "tokenizer".

    Raises:
        UsageError: a file of another kind; several that fit; experts that names do not tell apart.
        ModelMissingError: a part was not found; tells where it was looked for.
        CheckpointError: a file that cannot be read, or is of no network that is supported.
    """
    with foreign_data(lambda cause: CheckpointError(f"the model's files cannot be read: {cause}", file=path)):
        return _read(_chosen(path) if path.is_dir() else path, given)


def holds_files(folder: Path) -> bool:
    """Whether a folder is one with files of single networks."""
    return _tree(folder) is not None


@dataclass(frozen=True)
class ListedFile:
    """A file of weights as a list shows it.

    Attributes:
        path: where.
        what: which networks it holds, or why it cannot be used.
        stored: types of its numbers, most bytes first.
        bytes: its size.
    """

    path: Path
    what: str
    stored: str
    bytes: int


def listed_in(folder: Path) -> list[ListedFile]:
    """The files of weights in a folder and below it, each told by its tensors.

    Raises:
        ModelMissingError: there is no such folder.
    """
    if not folder.is_dir():
        raise ModelMissingError(f"there is no folder {folder}")
    files = (file for file in sorted(folder.rglob("*")) if file.suffix in ENDINGS and file.is_file())
    return [_listed(file) for file in itertools.islice(files, _MOST_LISTED)]


def _listed(path: Path) -> ListedFile:
    size = path.stat().st_size
    try:
        file = open_tensors(path)
        opened = _Opened(file, parts_within(file.entries))
        what = described(file.entries)
        if "transformer" in opened.parts:
            kind, config = _transformer(opened, *_noted(path))
            dim = config["num_attention_heads"] * config["attention_head_dim"]
            what = f"{what}, {kind.title}, {config['num_layers']} blocks of {dim}"
    except CheckpointError as error:
        return ListedFile(path, f"unusable: {error}", "", size)
    sizes: dict[str, int] = {}
    for stored in file.entries.values():
        name = stored.packing or str(stored.dtype).removeprefix("torch.")
        sizes[name] = sizes.get(name, 0) + (stored.packed_bytes or stored.bytes)
    return ListedFile(path, what, "/".join(sorted(sizes, key=lambda name: -sizes[name])), size)


def _read(path: Path, given: Mapping[str, str]) -> ModelFolder:
    opened = _opened(path, "transformer", "models.name")
    metadata, note = _noted(path)
    kind, config = _transformer(opened, metadata, note)
    experts = _experts(opened, config, kind, given.get("low_noise_model"))
    components: dict[Role, Component] = {}
    for role, file in zip(EXPERT_ROLES, experts, strict=False):
        own = opened if file == path else _opened(file, "transformer", "models.low_noise_model")
        found = _transformer(own, metadata, note)
        if found != (kind, config):
            raise CheckpointError(
                "two experts are not of one model", file=file, expected=config, found=found[1]
            )
        components[role] = Component(role, file, config, own.within("transformer"))
    missing: dict[str, list[Path]] = {}
    for role, usual in usual_configs(kind, config).items():
        place, looked = _place_of(role, path, opened, given.get(role), config)
        if place is None:
            missing[role] = looked
            continue
        table = checked_table(note, metadata, role, usual)
        components[role] = Component(role, place.file.path, table, place.within(role))
    tokenizer, looked = _tokenizer(path, components.get("text_encoder"), given.get("tokenizer"))
    if tokenizer is None:
        missing["tokenizer"] = looked
    if missing or tokenizer is None:
        raise _missing(path, opened, missing)
    limits.check_limits(metadata, limits.BOUNDARY, note)
    return ModelFolder(
        components["transformer"].weights,
        "files",
        kind,
        components,
        tokenizer,
        checked_table(note, metadata, "scheduler", usual_scheduler(kind, len(experts))),
        metadata.get("boundary_ratio", kind.boundary_ratio) if len(experts) == 2 else None,
        metadata,
        noted_preprocessing(note, metadata) if "image_encoder" in components else None,
    )


def _noted(path: Path) -> tuple[dict[str, Any], Path]:
    """What a note beside a file says, as others' folders in `chitu.json`; and where it lies, or would."""
    note = path.with_suffix(f".{METADATA_FILE}")
    return read_json(note) if note.exists() else {}, note


def _opened(path: Path, part: str, setting: str) -> _Opened:
    """A file that must hold a part."""
    file = open_tensors(path)
    opened = _Opened(file, parts_within(file.entries))
    if part not in opened.parts:
        raise UsageError(
            f"{setting} = '{path}': this is {described(file.entries)}; use the file of the {TITLES[part]}",
            field=setting,
        )
    return opened


def _transformer(
    opened: _Opened, metadata: Mapping[str, Any], note: Path
) -> tuple[ModelKind, Mapping[str, Any]]:
    """A transformer's kind and config; what a note beside the file says of it stands above its tensors."""
    path = opened.file.path
    noted = checked_table(note, metadata, "transformer", {})
    weights = WeightFiles(path, within=opened.within("transformer"))
    shapes = {name: stored.shape for name, stored in weights.entries.items()}
    model_type, config = transformer_in(shapes, path, noted.get("attention_head_dim", USUAL_HEAD))
    kind = kind_named(model_type, path)
    whole = {**config, **noted}
    limits.check_limits(whole, limits.TRANSFORMER, path)
    return kind, whole


def _experts(opened: _Opened, config: Mapping[str, Any], kind: ModelKind, low: str | None) -> list[Path]:
    """One transformer's file, or two: high noise first. Two that were merged are one: of them "none" says so,
    and so does a checkpoint with all parts in one file.

    Raises:
        UsageError: nothing tells which of two it is, or where the other lies.
    """
    path = opened.file.path
    if low == NO_EXPERT:
        return [path]
    found = _NOISE.findall(path.stem) or _NOISE_FOLDER.findall(path.parent.name)
    word = found[-1].lower() if found else ""
    own = WanConfig.from_json(config)
    counts = {len(spec.transformers) for spec in FULL_SIZE.values() if own in spec.transformers}
    if low is not None:
        other = Path(low).expanduser()
        if other.exists() and other.samefile(path):
            raise UsageError(
                f"models.low_noise_model = '{low}' is the file of the high-noise model, too; use the other "
                "expert's",
                field="models.low_noise_model",
            )
        if word == "low":
            raise UsageError(
                f"models.low_noise_model is given, and models.name = '{path}' is called low too; name the "
                "high-noise model there",
                field="models.low_noise_model",
            )
        return [path, other]
    if counts == {1} or _OF_ONE.search(path.name):
        return [path]
    if word:
        places = _with_other_word(path)
        beside = next((place for place in places if place.is_file()), None)
        if beside is None:
            wanted = "low" if word == "high" else "high"
            raise UsageError(
                f"models.name = '{path}' is one of two experts, and the {wanted}-noise model was not found: "
                f"{' or '.join(map(str, places))}; use models.low_noise_model (--low-noise-model FILE), and "
                "the high-noise model as models.name (--model FILE)",
                field="models.name",
            )
        return [path, beside] if word == "high" else [beside, path]
    whole = len(opened.parts) > 1
    if not whole and (counts == {2} or (2 in counts and _OF_TWO.search(path.name))):
        raise UsageError(
            f"models.name = '{path}' is one of the two experts of a {kind.title} model, and its name does "
            "not tell which; use the high-noise model there, and models.low_noise_model "
            f"(--low-noise-model FILE) for the other; or {NO_EXPERT}, if both were merged into this one",
            field="models.name",
        )
    return [path]


def _with_other_word(path: Path) -> list[Path]:
    """Where the other of two experts may lie: the same names with "low" for "high", or the other way."""

    def swapped(name: str) -> str:
        return _NOISE.sub(lambda found: _SWAPPED.get(found[1], _SWAPPED[found[1].lower()]), name)

    places = [
        path.with_name(swapped(path.name)),
        path.parent.with_name(swapped(path.parent.name)) / path.name,
    ]
    places.append(places[1].with_name(places[0].name))
    return [place for place in dict.fromkeys(places) if place != path]


def _place_of(
    role: Role, path: Path, main: _Opened, given: str | None, config: Mapping[str, Any]
) -> tuple[_Opened | None, list[Path]]:
    """The file of a part: as told, in the transformer's file, or found near it; and where it was looked for.

    Raises:
        UsageError: what was told is another kind of file; several that fit.
    """
    if given is not None:
        return _opened(Path(given).expanduser(), role, f"models.{role}"), []
    if role in main.parts:
        return main, []
    looked = []
    for folder in _near(role, path):
        looked.append(folder)
        near = _weights_in(folder, inside=folder != path.absolute().parent)
        named = [file for file in near if _is_called(role, file) and not file.samefile(path)]
        fitting = [each for each in map(_looked_at, named) if each and _fits(role, each, config)]
        ours = [each for each in fitting if "wan" in each.file.path.name.lower()]
        fitting = ours if len(ours) == 1 else fitting
        if len(fitting) > 1:
            names = few(each.file.path.name for each in fitting)
            raise UsageError(
                f"models.{role}: several files in {folder} fit: {names}; use one of them "
                f"(--{role.replace('_', '-')} FILE)",
                field=f"models.{role}",
            )
        if fitting:
            return fitting[0], looked
    return None, looked


def _is_called(role: Role, file: Path) -> bool:
    name = file.name.lower()
    return _WORDS[role] in name and _ANOTHER not in name


def _looked_at(path: Path) -> _Opened | None:
    """A file that nobody named; of one that is no file of tensors a warning tells."""
    try:
        file = open_tensors(path)
    except CheckpointError as error:
        logger.warning("passed over: %s", error)
        return None
    return _Opened(file, parts_within(file.entries))


def _fits(role: Role, opened: _Opened, config: Mapping[str, Any]) -> bool:
    """Whether a file has a part that can be of this model: a VAE by its convolutions over time and the
    channels of its latents.
    """
    if role != "vae" or role not in opened.parts:
        return role in opened.parts
    before = opened.parts["vae"]
    names = (f"{before}{name}.weight" for name in ("decoder.conv1", "decoder.conv_in"))
    name = next(name for name in names if name in opened.file.entries)
    shape = opened.file.entries[name].shape
    return len(shape) == 5 and shape[1] == config["out_channels"]


def _near(part: str, path: Path) -> Iterator[Path]:
    """Folders that may hold a part of the model of a file: beside it first, then above."""
    yield path.absolute().parent
    for above in [*path.absolute().parents][: _UP + 1]:
        yield from (above / name for name in _FOLDERS[part] if (above / name).is_dir())


def _weights_in(folder: Path, inside: bool = True) -> list[Path]:
    """The files of weights in a folder and, if wanted, in those right in it."""
    found = []
    for place in sorted(folder.iterdir())[:_MOST_LISTED]:
        files = sorted(place.iterdir())[:_MOST_LISTED] if inside and place.is_dir() else [place]
        found += [file for file in files if file.suffix in ENDINGS and file.is_file()]
    return found


def _tokenizer(path: Path, encoder: Component | None, given: str | None) -> tuple[Path | None, list[Path]]:
    """The tokenizer's folder: as told, made of the bytes in the text encoder's file, or found near it; and
    where it was looked for.
    """
    if given is not None:
        return Path(given).expanduser(), []
    if encoder is not None:
        file = open_tensors(encoder.weights, mapped=False)
        key = next((name for name in file.entries if name.rpartition(".")[2] == "spiece_model"), None)
        kept = cache_dir()
        if key is not None and kept is not None:
            with foreign_data(
                lambda cause: CheckpointError(
                    f"the tokenizer in a text encoder's file cannot be read: {cause}",
                    file=encoder.weights,
                    key=key,
                    remedy="use models.tokenizer (--tokenizer FOLDER) for the folder of UMT5's tokenizer",
                )
            ):
                return kept_tokenizer(file.read(key).numpy().tobytes(), kept), []
    looked = [path.absolute().parent]
    for folder in [*_near("tokenizer", path)][1:]:
        looked.append(folder)
        if any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
            return folder, looked
    return None, looked


def _missing(path: Path, opened: _Opened, missing: Mapping[str, list[Path]]) -> ModelMissingError:
    said = []
    for part, looked in missing.items():
        usual = ", ".join(f"{name}/" for name in _FOLDERS[part])
        said.append(
            f"its {TITLES[part]} was not found in {', '.join(map(str, looked))}, nor in {usual} above; use "
            f"models.{part} (--{part.replace('_', '-')})"
        )
    return ModelMissingError(
        f"models.name = '{path}' is {described(opened.file.entries)}; {'; '.join(said)}", field="models.name"
    )


def _tree(folder: Path) -> Path | None:
    """Where a folder holds transformers as files of their own."""
    places = (folder / above / "diffusion_models" for above in ("", "split_files", "models"))
    return next((place for place in places if place.is_dir()), None)


def _chosen(folder: Path) -> Path:
    """The transformer in a folder that holds one model.

    Raises:
        ModelMissingError, UsageError: it holds none, or several.
    """
    place = _tree(folder)
    files = [] if place is None else _weights_in(place)
    found = [file for file in files if (each := _looked_at(file)) and "transformer" in each.parts]
    firsts = []
    for file in found:
        words = _NOISE.findall(file.stem)
        high = any(other in found for other in _with_other_word(file)) if words else False
        if not (high and words[-1].lower() == "low"):
            firsts.append(file)
    if not firsts:
        raise ModelMissingError(f"{place or folder} holds no transformer of Wan", field="models.name")
    if len(firsts) > 1:
        raise UsageError(
            f"models.name = '{folder}' holds {len(firsts)} models: {few(file.name for file in firsts)}; name "
            f"one of the files, such as {firsts[0]}",
            field="models.name",
        )
    return firsts[0]
