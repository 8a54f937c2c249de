"""Models in the Hugging Face hub's cache, as downloads leave them: whole, broken off, or without a name for
their snapshot. Reads names and configs, no weights and no torch.

    models--ORG--NAME/  refs/main (the snapshot's name)  snapshots/NAME/ (links)  blobs/
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from chitu_diffusion.errors import CheckpointError
from chitu_diffusion.files.reading import cause, read_json, read_text
from chitu_diffusion.models.folder import EXPERT_FOLDERS, Component, ModelFolder, read_folder

_MARKS = ("model_index.json", "config.json", f"{EXPERT_FOLDERS[0]}/config.json")


def cached_folder(hub_ids: Sequence[str]) -> Path | None:
    """The snapshot of the first of these models that the cache has, whole or not.

    That which `refs/main` names; where nothing readable stands there, the newest.
    """
    from huggingface_hub.constants import HF_HUB_CACHE

    for hub_id in hub_ids:
        place = Path(HF_HUB_CACHE) / f"models--{hub_id.replace('/', '--')}"
        for snapshot in _snapshots(place):
            if any((snapshot / mark).is_file() for mark in _MARKS):
                return snapshot
    return None


def _snapshots(place: Path) -> Iterator[Path]:
    try:
        found = sorted((place / "snapshots").iterdir(), key=lambda entry: entry.stat().st_mtime, reverse=True)
    except OSError:
        return
    try:
        name = read_text(place / "refs" / "main").strip()
    except (OSError, ValueError):
        name = ""
    yield from sorted(found, key=lambda entry: entry.name != name)


def read_whole(snapshot: Path, name: str) -> ModelFolder:
    """The model in a snapshot.

    Args:
        name: what `chitu models pull` calls it.

    Raises:
        CheckpointError: its download was broken off; says what is missing first.
    """
    remedy = f"go on with 'chitu models pull {name}'"
    try:
        folder = read_folder(snapshot)
        missing = [file for part in folder.components.values() for file in _missing(part)]
        if not folder.tokenizer.is_dir():
            missing.append(folder.tokenizer)
        found = str(missing[0]) if missing else None
    except CheckpointError as error:
        raise CheckpointError(
            f"the download of {name} is incomplete or damaged: {error}", file=snapshot, remedy=remedy
        ) from error
    if found is not None:
        raise CheckpointError(
            f"the download of {name} is incomplete: {len(missing)} files or more are missing",
            file=found,
            remedy=remedy,
        )
    return folder


def _missing(part: Component) -> list[Path]:
    """Files of a part's weights that are not there; a link to nothing is not."""
    if not part.weights.is_dir():
        return [] if part.weights.is_file() else [part.weights]
    single = part.weights / f"{part.part.stem}.safetensors"
    index = single.with_name(single.name + ".index.json")
    if not index.exists():
        return [] if single.is_file() or any(part.weights.glob(f"{part.part.stem}-*-of-*")) else [single]
    try:
        named = {str(name) for name in read_json(index)["weight_map"].values()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(f"an index of shards cannot be read: {cause(error)}", file=index) from error
    return [index.parent / name for name in sorted(named) if not (index.parent / name).is_file()]
