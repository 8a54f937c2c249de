"""`chitu eval cache`: caches x settings against full compute on one model, as a table, its numbers and a
picture.

Controls stand among the rows: fewer steps, and another exact attention kernel, whose distance from full
compute is the noise floor. Knows rows and workers; no strategy.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from chitu_diffusion.attention import attention_kernel
from chitu_diffusion.config import EngineConfig
from chitu_diffusion.errors import TaskError, UsageError
from chitu_diffusion.evaluation.cache_line import Line
from chitu_diffusion.evaluation.cache_rows import FULL, Place, Video, VideoRow, make_row
from chitu_diffusion.evaluation.calibrate import describe
from chitu_diffusion.evaluation.compare import mean_interval
from chitu_diffusion.evaluation.prompts import held_out_prompts
from chitu_diffusion.evaluation.workers import Workers
from chitu_diffusion.files.atomic import write_text
from chitu_diffusion.files.reading import cause, read_text
from chitu_diffusion.flexcache.registry import parse_setting, parse_strategy
from chitu_diffusion.models.registry import model_of
from chitu_diffusion.pipelines.request import parse_seeds

SETTINGS = (
    "steps=30",
    "steps=25",
    "steps=20",
    "steps=17",
    "kernel=math",
    "kernel=fused",
    "plan:speedup=1.25",
    "plan:speedup=1.6",
    "plan:speedup=2",
    "plan:speedup=2.5",
    "plan:speedup=3",
    "plan:speedup=4",
    "plan:speedup=5",
    "meancache:fresh=30",
    "meancache:fresh=25",
    "meancache:fresh=17",
    "blockdance",
    "pab",
    "interval:interval=2",
    "cfg_gate",
    "teacache:threshold=0.1",
    "teacache:threshold=0.2",
    "magcache",
    "easycache",
    "fbcache",
    "dbcache",
    "taylorseer",
)
"""Controls, plans, and each method as it was published or, where nothing was published for such a model, as
it stands here.
"""


def videos_for(prompts: str, seeds: str) -> list[Video]:
    """The videos of `--prompts` (a number of held-out prompts, or a file with one a line) and `--seeds`
    (A..B).

    Raises:
        UsageError: neither 1 to 64 nor a readable file with a line in it, or no seeds.
    """
    numbers = parse_seeds(seeds) or [0]
    if prompts.isascii() and prompts.isdigit():
        asked: list[tuple[str, Any]] = [
            (said, asdict(words)) for said, words in held_out_prompts(int(prompts))
        ]
    else:
        asked = [(prompt, None) for prompt in read_prompts(prompts)]
    return [Video(prompt, seed, words) for prompt, words in asked for seed in numbers]


def read_prompts(file: str | Path) -> list[str]:
    """The lines of a file that say something, each once.

    Raises:
        UsageError: it cannot be read, or says nothing.
    """
    try:
        lines = [line.strip() for line in read_text(file).splitlines()]
    except (OSError, ValueError) as error:
        raise UsageError(
            f"--prompts {file}: {cause(error)}; use a text file with one prompt a line", field="prompts"
        ) from error
    # twice the same would be one video counted twice
    found = list(dict.fromkeys(line for line in lines if line))
    if not found:
        raise UsageError(f"--prompts {file}: no prompt in it; use one a line", field="prompts")
    return found


def check_settings(chosen: Sequence[str]) -> None:
    """Each is a number of steps, a kernel or a cache.

    Raises:
        UsageError: one is none; the nearest is named.
    """
    for setting in chosen:
        kind, equals, value = setting.partition("=")
        if equals and kind == "steps":
            if not (value.isascii() and value.isdigit()) or int(value) < 1:
                raise UsageError(f"--settings {setting}: use steps=30", field="settings")
        elif equals and kind == "kernel":
            attention_kernel(value)
        else:
            parse_strategy(parse_setting(setting))


def evaluate(
    config: EngineConfig,
    videos: Sequence[Video],
    work: Path,
    *,
    chosen: Sequence[str] = SETTINGS,
    settings: Mapping[str, Any] | None = None,
    workers: int = 1,
    on_row: Callable[[int, int, VideoRow], None] = lambda done, total, row: None,
) -> tuple[list[Line], dict[str, Any]]:
    """Makes every video that is not there yet, and sums up.

    Args:
        videos: each is made by full compute and by every setting.
        work: rows and frames are kept here; the same call goes on where it stopped.
        chosen: "steps=N", "kernel=NAME", or a cache as `--cache` takes it.
        settings: fields of `DiffusionUserParams` that differ from the model's defaults.
        workers: processes that share the device.
        on_row: called with (rows done, rows in all, row).

    Returns:
        a line for full compute and each setting, and what was measured on.
    """
    work.mkdir(parents=True, exist_ok=True)
    rows: dict[tuple[str, str, int], VideoRow] = {}
    total = len(videos) * (1 + len(chosen))

    def take(row: VideoRow) -> None:
        rows[row.setting, row.prompt, row.seed] = row
        on_row(len(rows), total, row)

    with Workers(config, workers) as processes:
        processes.submit(describe, dict(settings or {}))
        about = processes.result()[1]
        place = Place(work, json.dumps(about, sort_keys=True), _calibration_of(config))

        def begin(setting: str, video: Video) -> None:
            known = place.known(setting, video)
            if known is None:
                processes.submit(make_row, setting, video, dict(settings or {}), place)
                return
            take(known)
            follow(known, video)

        def follow(row: VideoRow, video: Video) -> None:
            # the others are compared with full compute's frames
            for other in chosen if row.setting == FULL and row.error is None else ():
                begin(other, video)

        for video in videos:
            begin(FULL, video)
        while processes.waiting:
            (_, video, _, _), row = processes.result()
            take(row)
            follow(row, video)
    return sum_up(list(rows.values()), chosen), about | {"workers": workers}


def _calibration_of(config: EngineConfig) -> str:
    """A name for what the model's caches rest on."""
    spec, _ = model_of(config.models)
    found = spec.calibration
    if found is None:
        return ""
    return hashlib.sha256(
        json.dumps([found.moments, found.gain, *found.measured.items()]).encode()
    ).hexdigest()


def sum_up(rows: Sequence[VideoRow], chosen: Sequence[str]) -> list[Line]:
    """A line for full compute and each setting, with the plan's distance at equal speed.

    Raises:
        TaskError: full compute itself failed.
    """
    full = {(row.prompt, row.seed): row for row in rows if row.setting == FULL}
    failed = next((row.error for row in full.values() if row.error is not None), None)
    if failed is not None:
        raise TaskError(f"full compute failed: {failed}")
    lines = [
        _line(setting, [row for row in rows if row.setting == setting], full) for setting in (FULL, *chosen)
    ]
    plans = sorted(
        (line.fewer, line.psnr[0])
        for line in lines
        if line.setting.startswith("plan") and line.psnr is not None
    )
    return [_beside(line, plans) for line in lines]


def _line(setting: str, rows: Sequence[VideoRow], full: Mapping[tuple[str, int], VideoRow]) -> Line:
    made = [row for row in rows if row.error is None]
    error = next((row.error for row in rows if row.error is not None), None)
    if not made:
        return Line(setting, 0, error=error)
    pairs = [(row, full[row.prompt, row.seed]) for row in made]
    saved = 1 - sum(row.work for row in made) / sum(exact.work for _, exact in pairs)
    cost = sum((1 - row.work / exact.work) * exact.forward_seconds for row, exact in pairs)
    seconds = sum(row.seconds for row in made)
    exact_seconds = sum(exact.seconds for _, exact in pairs)
    judged = [row.right for row in made if row.right is not None]
    moving = [row.flicker[1] - row.flicker[0] for row in made if row.flicker is not None]
    psnr = [row.psnr for row in made if row.psnr is not None]
    ssim = [row.ssim for row in made if row.ssim is not None]
    return Line(
        setting,
        len(made),
        saved=saved,
        faster=exact_seconds / seconds,
        psnr=mean_interval(psnr) if psnr else None,
        ssim=mean_interval(ssim) if ssim else None,
        adherence=sum(judged) / len(judged) if judged else None,
        flicker=sum(moving) / len(moving) if moving else None,
        kept_of_saving=(exact_seconds - seconds) / cost if saved > 1e-3 else None,
        error=error,
    )


def _beside(line: Line, plans: Sequence[tuple[float, float]]) -> Line:
    """With the plans' PSNR at the line's speed, linear between them."""
    if line.psnr is None or line.setting.startswith("plan"):
        return line
    for (slow, more), (fast, less) in zip(plans, plans[1:], strict=False):
        if slow <= line.fewer <= fast:
            share = (line.fewer - slow) / (fast - slow) if fast > slow else 0.0
            return Line(**{**asdict(line), "above": more + share * (less - more) - line.psnr[0]})
    return line


def table(lines: Sequence[Line]) -> str:
    """Markdown."""
    head = (
        "setting",
        "forwards saved",
        "fewer",
        "faster",
        "PSNR, dB",
        "SSIM",
        "as asked",
        "flicker",
        "kept",
        "plan above",
    )
    text = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    for line in lines:
        if line.videos == 0:
            text.append(f"| `{line.setting}` | {line.error} |" + " |" * (len(head) - 2))
            continue
        cells = [
            f"`{line.setting}`",
            f"{line.saved:.1%}",
            f"{line.fewer:.2f}x",
            f"{line.faster:.2f}x",
            "" if line.psnr is None else f"{line.psnr[0]:.1f} ({line.psnr[1]:.1f} to {line.psnr[2]:.1f})",
            "" if line.ssim is None else f"{line.ssim[0]:.4f} ({line.ssim[1]:.4f} to {line.ssim[2]:.4f})",
            "" if line.adherence is None else f"{line.adherence:.1%}",
            "" if line.flicker is None else f"{line.flicker:+.3f}",
            "" if line.kept_of_saving is None else f"{line.kept_of_saving:.0%}",
            "" if line.above is None else f"{line.above:+.1f} dB",
        ]
        text.append("| " + " | ".join(cells) + " |")
    return "\n".join(text)


def write_results(lines: Sequence[Line], about: Mapping[str, Any], folder: Path) -> None:
    """`cache.json`, `cache.md` and `cache.png` in a folder."""
    from chitu_diffusion.evaluation.cache_plot import draw

    folder.mkdir(parents=True, exist_ok=True)
    said = {**about, "lines": [asdict(line) | {"fewer": line.fewer} for line in lines]}
    write_text(folder / "cache.json", json.dumps(said, indent=1) + "\n")
    size = "x".join(map(str, about["size"]))
    title = (
        f"{about['model']}, {about['steps']} steps, guidance {about['guidance'][0]:g}, {size}, "
        f"{lines[0].videos} videos"
    )
    where = f"{about['device']}, {about['dtype']}, timed with {about['workers']} process(es) on the device"
    write_text(folder / "cache.md", f"{title}; {where}.\n\n{table(lines)}\n")
    draw(lines, title, folder / "cache.png")
