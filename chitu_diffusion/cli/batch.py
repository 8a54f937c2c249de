"""`chitu batch`: a file of sentences, a folder of videos.

Knows when a row is done already (its file is whole, and the recipe inside is the one that it would get) and
that a file which shows something else stays. All rows are checked before anything is loaded. A row names its
file by a plain `save_path` inside the output folder, by its `id` or `task_id`, or by a hash of what it asks
for; a prompt never becomes a path. How rows are written is known by `rows`.
"""

from __future__ import annotations

import hashlib
import json
import os
import textwrap
from collections import Counter
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field, fields
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Annotated, Any

import typer

from chitu_diffusion.cli.console import complain, duration, emit, printable, say, table
from chitu_diffusion.cli.dry_run import (
    check_room,
    find_model,
    forecast,
    forecast_text,
    look_ahead,
    picked_cache,
    say_layout,
    task_for,
)
from chitu_diffusion.cli.existing import fingerprint_here, other_text, other_video
from chitu_diffusion.cli.flags import Args, takes_flags
from chitu_diffusion.cli.launch import check_layout, launch
from chitu_diffusion.cli.resume import VideoJob, job_key, run_key
from chitu_diffusion.cli.rows import read_values
from chitu_diffusion.errors import UsageError, counted
from chitu_diffusion.files.places import expand_home

if TYPE_CHECKING:
    from chitu_diffusion.config import EngineConfig
    from chitu_diffusion.distributed.plan import ParallelPlan
    from chitu_diffusion.models.registry import FoundModel
    from chitu_diffusion.task import DiffusionTask, DiffusionUserParams

MakeTask = Callable[["DiffusionUserParams"], "DiffusionTask"]
_NAME_LENGTH = 12
"""Hexadecimal digits of a file's name that stands for what a row asks for."""
_NOT_IN_NAMES = ("role", "priority")


@dataclass(frozen=True)
class Row:
    """One line of the file: its number (from 1), the checked request, and its task, resolved."""

    line: int
    params: DiffusionUserParams
    task: DiffusionTask

    @property
    def path(self) -> str:
        """Where its video goes."""
        return str(self.params.save_path)


@dataclass
class Taken:
    """What earlier rows write and are called: their lines by file, by folder above a file, by task id."""

    files: dict[Path, int] = field(default_factory=dict)
    folders: dict[Path, int] = field(default_factory=dict)
    labels: dict[str, int] = field(default_factory=dict)

    def claim(self, row: Row) -> None:
        """Note a row.

        Raises:
            UsageError: an earlier row has its file, a folder above or below it, or its task id.
        """
        path = Path(os.path.realpath(row.path))  # a folder may have two names, one of them a link
        label = row.params.task_id
        other = next(
            (self.files[place] for place in (path, *path.parents) if place in self.files),
            self.folders.get(path),
        )
        if other is not None:
            raise UsageError(
                f"save_path = {row.path!r}: line {other} has the same, or a folder above or below it"
            )
        if label is not None and label in self.labels:
            raise UsageError(f"task_id = {label!r}: line {self.labels[label]} has the same")
        self.files[path] = row.line
        self.folders |= dict.fromkeys(path.parents, row.line)
        if label is not None:
            self.labels[label] = row.line


@takes_flags
def batch(
    file: Annotated[
        Path,
        typer.Argument(help="prompts.txt (one a line), .jsonl (one object a line) or .csv (with a header)."),
    ],
    args: Args,
    context: typer.Context,
) -> int:
    """Make a video for each row of a file; rows that are done already are skipped.

    A row may hold prompt, negative_prompt, height, width, num_frames, fps, num_inference_steps,
    guidance_scale, shift, sampler_recipe, seed, save_path, image, last_image, image_preprocessing, video,
    mask, reference_images, conditioning_scale, strength, lora, flexcache, role and priority. The flags fill
    in what a row leaves out. Its file is called after its id, or else by what the row asks for.
    """
    from chitu_diffusion.task import DiffusionUserParams

    file = expand_home(file)
    config, _ = args.load_config()
    model = find_model(config, args)
    gpus = args["gpus"]
    as_json = args["json"]
    asked = {**args.request_fields(), **picked_cache(model.spec, args)}
    with args.named():
        layout = check_layout(config, model.spec, gpus)
        DiffusionUserParams(**{"prompt": "-", **asked})  # what is wrong with a flag is no row's fault
    rows, bad = read_rows(file, args["output"], asked, lambda params: task_for(model, config, params, layout))
    rows, todo = look_at(rows, bad, model, config, overwrite=args["overwrite"])
    refuse(file, bad, skip=args["skip_bad"])
    check_room([row.task for row in todo], config)
    left = {row.line for row in todo}
    done = len(rows) - len(todo)
    if args["dry_run"] or not todo:
        say_layout(layout)
        time = forecast_text(*forecast(config, model.spec, [row.task for row in todo], layout))
        say(f"{counted(len(rows), 'row')}: {done} done already, {len(todo)} to make")
        made = {row.line: row.task for row in todo if args["dry_run"]}
        with args.named():
            _look_ahead(config, model, made, layout)
        if todo:
            say(time)
        return _summary(rows, left, made, bad, args)
    if gpus and gpus > 1:
        return launch(context.find_root().obj, gpus, config)
    if done and not as_json:
        lines = ", ".join(str(row.line) for row in rows if row.line not in left)
        named = textwrap.shorten(lines, 60, placeholder=" ...")
        say(f"{done} of {counted(len(rows), 'row')} done already and skipped: line {named}")
    from chitu_diffusion.cli.progress import make_reporter
    from chitu_diffusion.cli.runner import run_jobs

    jobs = [
        VideoJob(row.task, job_key(row.params, (), config), place=(number, len(rows)))
        for number, row in enumerate(rows, start=1)
        if row.line in left
    ]
    places = [str(path.absolute()) for path in (file, args["output"])]
    key = run_key(places)
    try:
        tasks = run_jobs(config, model, jobs, make_reporter(as_json=as_json), key=key)
    except KeyboardInterrupt:
        stand = done + sum(row.task.status == "finished" for row in todo)
        complain(f"{stand} of {counted(len(rows), 'row')} done, {len(rows) - stand} left")
        raise
    made = {row.line: task for row, task in zip(todo, tasks, strict=True)}
    return _summary(rows, left, made, bad, args)


def _look_ahead(
    config: EngineConfig, model: FoundModel, tasks: Mapping[int, DiffusionTask], layout: ParallelPlan | None
) -> None:
    """Say what the run would, of tasks by their lines; those that it would refuse have failed then."""
    from chitu_diffusion.task import TaskStatus

    if not tasks:
        return
    found = look_ahead(config, model, list(tasks.values()), layout)
    say(f"device {found.device}, dtype {found.dtype}, attention {found.attention}")
    for line, task in tasks.items():
        outlook = found.outlooks[task.task_id]
        for note in outlook.notes:
            say(f"line {line}: {note}")
        if outlook.problem is not None:
            task.end(TaskStatus.FAILED, outlook.problem)


def _summary(
    rows: list[Row], left: Set[int], tasks: Mapping[int, DiffusionTask], bad: Mapping[int, str], args: Args
) -> int:
    """The closing table, or after `--quiet` the files that stand, made now or before; 1 if a row failed or
    was bad."""
    lines: list[tuple[int, str, int | None, float | None, str]] = [
        (line, "bad row", None, None, why) for line, why in bad.items()
    ]
    failed = len(bad)
    for row in rows:
        task = tasks.get(row.line)
        if task is None or not task.is_finished():
            status = "to make" if row.line in left else "done before"
            spent = None
            seed = row.params.seed
            result = row.path
        else:
            good = task.status == "finished"
            failed += not good
            status = str(task.status)
            spent = round(task.get_elapsed_time(), 3)
            seed = task.seed
            result = row.path if good else task.error_message or ""
        lines.append((row.line, status, seed, spent, result))
    lines.sort(key=lambda line: line[0])
    if args["json"]:
        names = ("line", "status", "seed", "seconds", "result")
        emit("summary", failed=failed, rows=[dict(zip(names, line, strict=True)) for line in lines])
    elif not args["quiet"]:
        shown = [
            (line, status, "" if seed is None else seed, "" if spent is None else duration(spent), result)
            for line, status, seed, spent, result in lines
        ]
        table(("line", "status", "seed", "time", "file or error"), shown)
    else:
        for line in lines:
            if line[1] in ("finished", "done before"):
                print(line[-1], flush=True)
    return 1 if failed else 0


def read_rows(
    file: Path, folder: Path, defaults: Mapping[str, Any], make_task: MakeTask
) -> tuple[list[Row], dict[int, str]]:
    """Every row of the file, checked.

    Args:
        file: .txt, .jsonl or .csv.
        folder: where the videos go.
        defaults: fields for rows that leave them out.
        make_task: fills in the model's own values, and refuses what the model cannot do.

    Returns:
        the good rows, and what is wrong with the others, by line number.

    Raises:
        UsageError: an unreadable file, or no rows.
    """
    from chitu_diffusion.config import rank_place
    from chitu_diffusion.media.video import check_save_path
    from chitu_diffusion.task import DiffusionUserParams

    place = rank_place()
    known = {"id", *(f.name for f in fields(DiffusionUserParams))}
    note = say if place is None or place.rank == 0 else lambda text: None
    rows: list[Row] = []
    bad: dict[int, str] = {}
    taken = Taken()
    named: Counter[str] = Counter()
    for line, values in read_values(file, known, note):
        try:
            params = _request(values, folder, defaults, named)
            row = Row(line, params, make_task(params))
            check_save_path(row.path)
            taken.claim(row)
            rows.append(row)
        except UsageError as error:
            bad[line] = printable(str(error))
    if not rows and not bad:
        raise UsageError(f"'{file}' has no rows", field="file")
    return rows, bad


def _request(
    values: Any, folder: Path, defaults: Mapping[str, Any], named: Counter[str]
) -> DiffusionUserParams:
    from chitu_diffusion.task import DiffusionUserParams

    if isinstance(values, UsageError):
        raise values
    given = {name: value for name, value in values.items() if value is not None}
    own = given.pop("id", None)
    own = given.get("task_id") if own is None else own
    name = given.pop("save_path", None)
    if name is None and own is None:
        name = _name_of(DiffusionUserParams.from_mapping({**given}), given, named)
    elif name is None:
        name = f"{own}.mp4"
        if not isinstance(own, str | int) or isinstance(own, bool) or "/" in name:
            raise UsageError(f"id = {own!r}: use a plain name, without '/'", field="id")
    plain = isinstance(name, str) and name and "\\" not in name and not PurePosixPath(name).is_absolute()
    if not plain or ".." in PurePosixPath(name).parts:
        raise UsageError(
            f"save_path = {name!r}: use a plain name inside the output folder", field="save_path"
        )
    path = f"{folder / name}/" if name.endswith("/") else str(folder / name)
    return DiffusionUserParams.from_mapping({**defaults, **given, "save_path": path})


def _name_of(params: DiffusionUserParams, given: Mapping[str, Any], named: Counter[str]) -> str:
    """A file's name by what a row asks for, wherever in the list it stands; flags have no part in it."""
    asked = {name: value for name, value in params.to_mapping().items() if name in given}
    for name in _NOT_IN_NAMES:
        asked.pop(name, None)
    name = hashlib.sha256(json.dumps(asked, sort_keys=True, default=str).encode()).hexdigest()[:_NAME_LENGTH]
    named[name] += 1
    return f"{name}.mp4" if named[name] == 1 else f"{name}-{named[name]}.mp4"


def look_at(
    rows: list[Row], bad: dict[int, str], model: FoundModel, config: EngineConfig, *, overwrite: bool
) -> tuple[list[Row], list[Row]]:
    """All rows that can be, and those of them that are to be made.

    Args:
        bad: gets the rows whose place has a file that shows something else.
        overwrite: such a file may be replaced.
    """
    here = fingerprint_here(config, model)
    todo = []
    for row in rows:
        other = other_video(row.path, row.task, model.spec, config.output.quality, here)
        if other is None:
            continue
        if other and not overwrite:
            bad[row.line] = other_text(row.path, other, "file or folder")
        else:
            todo.append(row)
    return [row for row in rows if row.line not in bad], todo


def refuse(file: Path, bad: Mapping[int, str], *, skip: bool) -> None:
    """Tell of bad rows.

    Raises:
        UsageError: there are some, and they are not to be skipped.
    """
    if not bad:
        return
    lines = "\n  ".join(f"line {line}: {why}" for line, why in sorted(bad.items()))
    if not skip:
        count = counted(len(bad), "bad row")
        raise UsageError(
            f"{count} in '{file}', nothing was made (--skip-bad makes the others):\n  {lines}", field="file"
        )
    complain(f"{counted(len(bad), 'bad row')} left out:\n  {lines}")
