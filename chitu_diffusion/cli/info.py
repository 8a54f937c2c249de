"""`chitu info` and `chitu config show`: what a file says about itself, and where each setting came from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from chitu_diffusion.cli.console import emit_document, printable, table
from chitu_diffusion.cli.flags import Args, takes_flags

Document = Annotated[bool, typer.Option("--json", help="The answer as one JSON document.")]

config_app = typer.Typer(no_args_is_help=True, help="The settings: what they are and where they came from.")


def info(
    file: Annotated[
        Path, typer.Argument(help="A video that chitu wrote: .mp4, .gif, .npy or a folder of frames.")
    ],
    json_: Document = False,
) -> int:
    """Show the recipe inside a video: prompt, parameters, seed, model, versions."""
    from chitu_diffusion.media.reading import read_recipe

    recipe = read_recipe(file)
    if json_:
        emit_document(recipe)
        return 0
    rows = list(_flat(recipe))
    width = max((len(name) for name, _ in rows), default=0)
    for name, value in rows:
        print(f"{printable(name):<{width}}  {value}")
    return 0


def _flat(tree: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Leaves as (dotted name, text that cannot steer a terminal)."""
    rows: list[tuple[str, str]] = []
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            rows += _flat(value, f"{prefix}{name}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            rows.append((prefix + name, printable(text)))
    return rows


@config_app.command("show")
@takes_flags
def config_show(args: Args, json_: Document = False) -> int:
    """Show each setting, its value, and whether it came from a default, a file, the environment or a flag."""
    from chitu_diffusion.config import leaves

    chosen, origins = args.load_config()
    values = dict(_leaf_values(chosen.model_dump()))
    if json_:
        emit_document({name: {"value": values[name], "origin": origins[name]} for name in values})
        return 0
    meanings = {name: field.description or "" for name, field in leaves()}
    table(
        ("setting", "value", "from", "meaning"),
        [
            (name, "none" if value is None else value, origins[name], meanings[name])
            for name, value in values.items()
        ],
    )
    return 0


def _leaf_values(tree: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for name, value in tree.items():
        rows += (
            _leaf_values(value, f"{prefix}{name}.") if isinstance(value, dict) else [(prefix + name, value)]
        )
    return rows
