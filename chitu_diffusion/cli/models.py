"""`chitu models`: which models there are, fetch one, check one, change its layout.

Knows names and folders; what a checkpoint must hold is known by `models/` and `weights.py`.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from chitu_diffusion.cli import completion
from chitu_diffusion.cli.console import be_quiet, emit_document, say, size, table
from chitu_diffusion.cli.flags import Args, takes_flags
from chitu_diffusion.cli.info import Document
from chitu_diffusion.errors import (
    ChituError,
    ModelError,
    ModelMissingError,
    OutputError,
    UsageError,
    WillNotFitError,
    counted,
)
from chitu_diffusion.files.atomic import free_space
from chitu_diffusion.files.places import expand_home

models_app = typer.Typer(no_args_is_help=True, help="The models: list, fetch, check, convert.")


def _quiet(wanted: bool) -> bool:
    if wanted:
        be_quiet()
    return wanted


Quiet = Annotated[bool, typer.Option("-q", "--quiet", callback=_quiet, help="Tell nothing but errors.")]
ModelName = Annotated[
    str,
    typer.Argument(
        metavar="NAME",
        help="A name from 'chitu models ls', or a Hugging Face id.",
        autocompletion=completion.models,
    ),
]


@models_app.command("ls")
def models_ls(
    folder: Annotated[
        Path | None, typer.Argument(metavar="[FOLDER]", help="Files of weights below it, not names.")
    ] = None,
    json_: Document = False,
) -> int:
    """List every model by name, and the shipped adapters: what kind, how big, and where it lies on this
    machine. With a folder, such as ComfyUI's: what each file of weights in it is.
    """
    if folder is not None:
        from chitu_diffusion.models.single_files import listed_in

        files = listed_in(expand_home(folder))
        if json_:
            emit_document([asdict(file) for file in files])
            return 0
        lines = [(str(file.path), file.what, file.stored, size(file.bytes)) for file in files]
        table(("file", "what", "stored as", "on disk"), lines)
        return 0
    from chitu_diffusion.models.registry import model_names

    rows = [*map(_described, model_names()), *_adapters()]
    if json_:
        emit_document(rows)
        return 0
    cells = [
        (row["name"], row["kind"], row["default"], size(row["bytes"]) if row["bytes"] else "", row["where"])
        for row in rows
    ]
    table(("name", "kind", "default video", "on disk", "where"), cells)
    return 0


def _described(name: str) -> dict[str, Any]:
    from chitu_diffusion.models.registry import resolve_model

    try:
        spec, folder = resolve_model(name)
        if folder is not None:
            from chitu_diffusion.models.loading import check_folder

            check_folder(folder)
    except ChituError as error:
        return {
            "name": name,
            "here": False,
            "kind": "",
            "default": "",
            "bytes": 0,
            "where": f"unusable: {error}",
        }
    own = spec.defaults
    return {
        "name": name,
        "here": folder is not None,
        "kind": spec.kind_in_words,
        "default": f"{own.width}x{own.height}, {own.num_frames} frames, {own.steps} steps",
        "bytes": _bytes_in(folder.path) if folder is not None else 0,
        "where": str(folder.path) if folder is not None else f"not here; chitu models pull {name}",
    }


def _adapters() -> list[dict[str, Any]]:
    from chitu_diffusion.models.registry import TINY
    from chitu_diffusion.sampling.recipes import recipe_named, recipe_of_names
    from chitu_diffusion.task.lora import shipped_adapters

    rows = []
    for name, file in shipped_adapters().items():
        found = recipe_of_names([name])
        rows.append(
            {
                "name": name,
                "here": True,
                "kind": f"adapter of {TINY}, --lora",
                "default": recipe_named(found[0]).describe() if found else "",
                "bytes": file.stat().st_size,
                "where": str(file),
            }
        )
    return rows


def _bytes_in(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


@models_app.command("pull")
def models_pull(
    name: ModelName,
    to: Annotated[
        Path | None, typer.Option("--to", metavar="DIR", help="A folder; else the hub's usual cache.")
    ] = None,
    quiet: Quiet = False,
) -> int:
    """Fetch a model's weights from the Hugging Face hub; goes on where it was broken off."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import disable_progress_bars

    if quiet:
        disable_progress_bars()
    to = expand_home(to)
    hub_id = _hub_id(name)
    say(f"fetching {hub_id} ...")
    try:
        _check_room(hub_id, to)
    except ModelMissingError:
        if to is None and (here := _whole_in_cache(hub_id)) is not None:
            say("the hub cannot be reached, but the model is already here, whole")
            if not quiet:
                print(here)
            return 0
        raise
    try:
        folder = snapshot_download(hub_id, local_dir=to)
    except Exception as error:
        raise _cannot_fetch(hub_id, error) from error
    if to is not None:
        from chitu_diffusion.weights.hashing import ModelFiles
        from chitu_diffusion.weights.manifest import downloaded, write_manifest

        say("hashing what was fetched ...")
        write_manifest(ModelFiles(Path(folder)), "pull", downloaded(Path(folder)))
    say("fetched; 'chitu models verify' checks every tensor and every file's SHA-256")
    if not quiet:
        print(folder)
    return 0


@models_app.command("verify")
@takes_flags
def models_verify(
    args: Args,
    model: Annotated[
        str,
        typer.Argument(
            metavar="NAME|FOLDER|FILE",
            help="A name from 'chitu models ls', a folder, or a transformer's file.",
            autocompletion=completion.models,
        ),
    ] = "wan-tiny",
    deep: Annotated[
        bool, typer.Option("--deep", help="Also read every value and look for NaN and Inf.")
    ] = False,
    json_: Document = False,
) -> int:
    """Check a model: configs, each file's size and SHA-256, each tensor's name and shape. Exit 4 if not
    whole.
    """
    with args.named():
        folder = folder_of(model)
        from chitu_diffusion.models.convert import verify

        findings = verify(folder, deep, args.settings("models."))
    bad = [finding for finding in findings if not finding.ok]
    if json_:
        emit_document({"ok": not bad, "findings": [asdict(finding) for finding in findings]})
    else:
        table(("part", "", "what"), [(f.part, "ok" if f.ok else "BAD", f.message) for f in findings])
        say(f"{folder} is not whole" if bad else f"{folder} is whole")
    return ModelError.exit_code if bad else 0


@models_app.command("convert")
@takes_flags
def models_convert(
    args: Args,
    model: Annotated[str, typer.Argument(metavar="NAME|FOLDER|FILE", help="The model to write anew.")],
    target: Annotated[Path, typer.Argument(metavar="TARGET", help="A folder that does not exist yet.")],
    layout: Annotated[
        Literal["diffusers", "official"] | None,
        typer.Option("--layout", help="By default the one that it does not have; of files diffusers'."),
    ] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option("--dtype", help="Of the stored weights; by default their own."),
    ] = None,
    quiet: Quiet = False,
) -> int:
    """Write a model in the other layout: diffusers' folders, or the official Wan files. Weights in 8 bits
    become bfloat16.
    """
    folder = folder_of(model)
    target = expand_home(target)
    say(f"converting {folder} ...")
    import torch

    from chitu_diffusion.models.convert import convert
    from chitu_diffusion.models.registry import read_model

    parts = args.settings("models.")
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    try:
        with args.named():
            other: Literal["diffusers", "official"] = (
                "official" if read_model(folder, parts).layout == "diffusers" else "diffusers"
            )
            kind = dtypes[dtype] if dtype else None
            written = convert(folder, target, layout or other, dtype=kind, parts=parts)
    except OSError as error:
        raise OutputError(
            f"cannot write {target}: {error.strerror or error}; choose another place"
        ) from error
    say(f"written in {written.layout} layout; 'chitu models verify {target}' checks it")
    if not quiet:
        print(target)
    return 0


def folder_of(model: str) -> Path:
    """Where a model's weights lie on this machine: its folder, or its transformer's file.

    Raises:
        ModelMissingError: no model has that name, or it is known, but not here.
    """
    from chitu_diffusion.models.registry import place_named, resolve_model

    if (named := place_named(model)) is not None:
        return named
    return resolve_model(model).required().path


def _hub_id(name: str) -> str:
    """The hub's name for a model.

    Raises:
        UsageError: the model is shipped, or is a folder.
        ModelMissingError: nobody knows it.
    """
    from chitu_diffusion.models.registry import TINY, full_size_named, resolve_model

    if name.lower() == TINY:
        raise UsageError(f"{TINY} is shipped with chitu_diffusion; there is nothing to fetch", field="name")
    spec = full_size_named(name) or resolve_model(name).spec
    if not spec.hub_ids or Path(name).is_dir():
        raise UsageError(
            f"'{name}' is a folder on this machine; 'chitu models verify {name}' checks it", field="name"
        )
    return next((hub_id for hub_id in spec.hub_ids if hub_id.lower() == name.lower()), spec.hub_ids[0])


def _whole_in_cache(hub_id: str) -> Path | None:
    from chitu_diffusion.models.hub_cache import cached_folder, read_whole

    place = cached_folder((hub_id,))
    try:
        return None if place is None else read_whole(place, hub_id).path
    except ModelError:
        return None


def _check_room(hub_id: str, to: Path | None) -> None:
    """Says how much will come, and refuses what the disk cannot hold."""
    from huggingface_hub import HfApi
    from huggingface_hub.constants import HF_HUB_CACHE

    try:
        files = HfApi().model_info(hub_id, files_metadata=True).siblings or []
    except Exception as error:
        raise _cannot_fetch(hub_id, error) from error
    needed = sum(file.size or 0 for file in files)
    free, place, _ = free_space(to or HF_HUB_CACHE)
    say(f"{size(needed)} in {counted(len(files), 'file')}; {size(free)} free in {place}")
    if needed > free:
        raise WillNotFitError(
            f"{hub_id} needs {size(needed)}, but {place} has {size(free)} free; choose another disk with --to"
        )


def _cannot_fetch(hub_id: str, error: Exception) -> ModelMissingError:
    return ModelMissingError(
        f"cannot fetch {hub_id} ({type(error).__name__}). Is this machine online? If not, copy the model's "
        "folder here from another machine and name it with '--model FOLDER'; wan-tiny needs no download"
    )
