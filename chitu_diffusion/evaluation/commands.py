"""`chitu eval ...`: the measuring commands. Knows flags and output; the measuring is done beside it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from chitu_diffusion.errors import UsageError, counted, nearest
from chitu_diffusion.files.places import expand_home, make_folder

Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="Tell nothing but errors and the result.")]
app = typer.Typer(
    no_args_is_help=True, help="Measure videos: adherence to the prompt, fidelity to a reference."
)


@app.callback()
def _group() -> None:
    """Measure videos: adherence to the prompt, fidelity to a reference."""


@app.command()
def adherence(
    model: Annotated[
        str, typer.Option("--model", help="The shipped model, or a folder trained on the same world.")
    ] = "wan-tiny",
    prompts: Annotated[int, typer.Option("--prompts", min=1, max=64, help="Held-out prompts.")] = 64,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Videos of each prompt.")] = 2,
    manner: Annotated[
        str,
        typer.Option(
            "--manner",
            help="plain, negative (a usual negative prompt), tail (of style), long, chinese, picture.",
        ),
    ] = "plain",
    lora: Annotated[
        list[str] | None, typer.Option("--lora", metavar="FILE[:STRENGTH]", help="An adapter; repeatable.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option("--steps", help="Denoising steps; the model's own by default.")
    ] = None,
    device: Annotated[str | None, typer.Option("--device", help="cpu, cuda, cuda:N.")] = None,
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Folder for frames and scores of one setting.")
    ] = Path("outputs/adherence"),
    json_: Annotated[bool, typer.Option("--json", help="Print the scores as JSON.")] = False,
    quiet: Quiet = False,
) -> None:
    """Score the model on prompts whose combinations it has never seen. Goes on where it stopped."""
    from chitu_diffusion.config import load_config
    from chitu_diffusion.evaluation.adherence import Answer, write_scores
    from chitu_diffusion.evaluation.adherence import adherence as measure
    from chitu_diffusion.evaluation.prompts import MANNERS

    output = expand_home(output)
    make_folder("-o", output)
    config, _ = load_config(flags={"models.name": model, "infer.device": device})
    if manner not in MANNERS:
        raise UsageError(f"--manner {manner}.{nearest(manner, MANNERS)}", field="manner")
    settings: dict[str, Any] = {"lora": lora or None, "num_inference_steps": steps}

    def report(done: int, total: int, answer: Answer) -> None:
        wrong = [part for part in ("actor", "colour", "scene", "motion") if not answer.right(part)]
        found = f"not as asked: {', '.join(wrong)} ({answer.found})" if wrong else "as asked"
        say(f"[{done}/{total}] {answer.prompt!r}, seed {answer.seed}: {found}")

    say = _teller(quiet)
    say(f"loading {model} ...")
    scores = measure(
        config, output, prompts=prompts, seeds=seeds, manner=manner, settings=settings, on_video=report
    )
    place = output if manner == "plain" else output / manner
    write_scores(scores, place)
    summary = f"{scores.table()}\n{counted(len(scores.answers), 'video')}, {place}/adherence.json"
    print(json.dumps(scores.to_mapping()) if json_ else summary)


@app.command()
def compare(
    a: Annotated[
        Path, typer.Argument(metavar="A", help="The reference: .npy, a folder of png frames, .mp4 or .gif.")
    ],
    b: Annotated[Path, typer.Argument(metavar="B", help="The video that is compared with it.")],
    fps: Annotated[float, typer.Option("--fps", min=1, help="Of the side-by-side video.")] = 16,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for figures and pictures.")] = Path(
        "outputs/compare"
    ),
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the comparison of two other videos.")
    ] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """PSNR, SSIM, LPIPS (where installed) and flicker of two videos; a contact sheet and both in one."""
    from chitu_diffusion.evaluation.compare import compare_files, refuse_other_comparison

    output = expand_home(output)
    if not overwrite:
        refuse_other_comparison(a, b, output)
    found = compare_files(a, b, output, fps=fps)
    for name in (a, b):
        if name.suffix.lower() in (".mp4", ".gif"):
            print(
                f"{name} was encoded with a loss of its own; .npy would show the model's alone",
                file=sys.stderr,
                flush=True,
            )
    print(
        json.dumps(found.to_mapping())
        if json_
        else f"{found.table()}\n{output}/contact.png, {output}/side_by_side.mp4"
    )


@app.command()
def cache(
    model: Annotated[
        str, typer.Option("--model", help="A name ('chitu models ls'), or a folder.")
    ] = "wan-tiny",
    prompts: Annotated[
        str,
        typer.Option(
            "--prompts", metavar="N | FILE", help="N held-out prompts (1 to 64), or a file with one a line."
        ),
    ] = "16",
    seeds: Annotated[
        str, typer.Option("--seeds", metavar="A..B", help="One video of each prompt for each.")
    ] = "0..2",
    steps: Annotated[
        int | None, typer.Option("--steps", help="Denoising steps; the model's own by default.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--settings", help="steps=N, kernel=NAME, or as --cache; repeatable. All methods by default."
        ),
    ] = None,
    device: Annotated[str | None, typer.Option("--device", help="cpu, cuda, cuda:N.")] = None,
    dtype: Annotated[str | None, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")] = None,
    workers: Annotated[
        int, typer.Option("--workers", min=1, max=64, help="Processes that share the device.")
    ] = 1,
    output: Annotated[Path, typer.Option("-o", "--output", help="For table, numbers and picture.")] = Path(
        "outputs/cache"
    ),
    work: Annotated[
        Path | None, typer.Option("--work", help="Folder for rows and frames; OUTPUT/work by default.")
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print the numbers as JSON.")] = False,
    quiet: Quiet = False,
) -> None:
    """Caches x settings against full compute: speed, fidelity, adherence. Goes on where it stopped."""
    from chitu_diffusion.config import load_config
    from chitu_diffusion.evaluation.cache_rows import VideoRow
    from chitu_diffusion.evaluation.cache_table import (
        SETTINGS,
        check_settings,
        evaluate,
        table,
        videos_for,
        write_results,
    )

    output = expand_home(output)
    work = expand_home(work)
    videos = videos_for(prompts, seeds)
    chosen = list(dict.fromkeys(settings or SETTINGS))
    check_settings(chosen)
    make_folder("-o", output)
    make_folder("--work", work or output / "work")
    config, _ = load_config(flags={"models.name": model, "infer.device": device, "infer.dtype": dtype})
    asked: dict[str, Any] = {} if steps is None else {"num_inference_steps": steps}

    def report(done: int, total: int, row: VideoRow) -> None:
        near = row.error or ("" if row.psnr is None else f"{row.psnr:.1f} dB")
        say(f"[{done}/{total}] {row.setting}, {row.prompt!r}, seed {row.seed}: {near}")

    say = _teller(quiet)
    lines, about = evaluate(
        config, videos, work or output / "work", chosen=chosen, settings=asked, workers=workers, on_row=report
    )
    write_results(lines, about, output)
    print(
        (output / "cache.json").read_text(encoding="utf-8")
        if json_
        else f"{table(lines)}\n{output}/cache.json, .md, .png"
    )


def _teller(quiet: bool) -> Callable[[str], None]:
    """Tells progress on stderr, or nothing."""
    return lambda text: None if quiet else print(text, file=sys.stderr, flush=True)
