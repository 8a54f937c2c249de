"""`chitu batch`: a file of sentences, a folder of videos.

Knows three row formats and when a row is done already (its file is there and the recipe inside
says the same as the row). All rows are checked before anything is loaded. A row names its file by
its number, or by a plain `save_path` inside the output folder; a prompt never becomes a path.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Annotated, Any

import typer

from chitu_diffusion.cli import options
from chitu_diffusion.cli.console import duration, emit, printable, say, table
from chitu_diffusion.cli.dry_run import find_model, task_for
from chitu_diffusion.cli.flags import Args, takes_flags
from chitu_diffusion.cli.launch import check_layout, launch
from chitu_diffusion.cli.resume import VideoJob, job_key, run_key
from chitu_diffusion.errors import UsageError
from chitu_diffusion.files.reading import cause, parse_json, read_text

if TYPE_CHECKING:
    from chitu_diffusion.config import EngineConfig
    from chitu_diffusion.models.spec import ModelSpec
    from chitu_diffusion.task import DiffusionTask, DiffusionUserParams

MakeTask = Callable[["DiffusionUserParams"], "DiffusionTask"]
_TOO_MANY = "\n"
"""Where csv puts cells beyond the header's; no header has this name."""
WHOLE_NUMBERS = ("height", "width", "num_frames", "fps", "num_inference_steps", "seed", "priority")


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
        path = Path(row.path)
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
    guidance_scale, seed, save_path, image, last_image, flexcache, role and priority. The flags fill in what a
    row leaves out.
    """
    config, _ = args.load_config()
    model = find_model(config)
    gpus = args["gpus"]
    as_json = args["json"]
    if gpus:
        check_layout(config, model.spec, gpus)
    rows = read_rows(
        file, args["output"], args.request_fields(), lambda params: task_for(model, config, params)
    )
    todo = [row for row in rows if not is_done(row, model.spec, config)]
    left = {row.line for row in todo}
    done = len(rows) - len(todo)
    if args["dry_run"] or not todo:
        say(f"{len(rows)} rows: {done} done already, {len(todo)} to make")
        _summary(rows, left, {}, as_json=as_json)
        return 0
    if gpus and gpus > 1:
        return launch(context.find_root().obj, gpus, config)
    if done and not as_json:
        say(f"{done} of {len(rows)} rows are done already and are skipped")
    from chitu_diffusion.cli.progress import make_reporter
    from chitu_diffusion.cli.runner import run_jobs

    jobs = [VideoJob(row.task, job_key(row.params, (), config)) for row in todo]
    places = [str(path.absolute()) for path in (file, args["output"])]
    key = run_key(places)
    tasks = run_jobs(config, model, jobs, make_reporter(as_json=as_json), key=key)
    return _summary(
        rows, left, {row.line: task for row, task in zip(todo, tasks, strict=True)}, as_json=as_json
    )


def _summary(rows: list[Row], left: Set[int], tasks: Mapping[int, DiffusionTask], *, as_json: bool) -> int:
    """The closing table; 1 if a row failed."""
    lines = []
    failed = 0
    for row in rows:
        task = tasks.get(row.line)
        if task is None:
            status = "to make" if row.line in left else "done before"
            spent = ""
            seed = row.params.seed
            result = row.path
        else:
            good = task.status == "finished"
            failed += not good
            status = str(task.status)
            spent = duration(task.get_elapsed_time())
            seed = task.seed
            result = row.path if good else task.error_message or ""
        lines.append((row.line, status, "" if seed is None else seed, spent, result))
    if as_json:
        names = ("line", "status", "seed", "seconds", "result")
        emit("summary", failed=failed, rows=[dict(zip(names, line, strict=True)) for line in lines])
    else:
        table(("line", "status", "seed", "time", "file or error"), lines)
    return 1 if failed else 0


def is_done(row: Row, spec: ModelSpec, config: EngineConfig) -> bool:
    """Whether the row's file is there, of the same model, and its recipe agrees with row and settings."""
    from chitu_diffusion.media.reading import read_recipe
    from chitu_diffusion.pipelines.recipe import attn_schedule_of, quant_of
    from chitu_diffusion.sampling.noise_levels import levels_as_lists

    if not Path(row.path).exists():
        return False
    try:
        recipe = read_recipe(row.path)
    except UsageError:
        return False
    made = recipe.get("params")
    if not isinstance(made, dict) or recipe.get("model") != spec.name:
        return False
    # settings that make another video; "auto" attention is exact, and which exact kernel it was is no matter
    sampler = recipe.get("sampler")
    asked = {"name": spec.defaults.sampler, **levels_as_lists(spec.defaults.levels)}
    kernel = config.infer.attn_type
    if (
        recipe.get("quant") != quant_of(config)
        or recipe.get("attn_schedule") != attn_schedule_of(config)
        or not isinstance(sampler, dict)
        or any(sampler.get(key) != value for key, value in asked.items())
    ):
        return False
    if kernel != "auto" and recipe.get("attention") != kernel:
        return False
    mine = json.loads(json.dumps((row.task.resolved or row.params).to_mapping(), default=str))
    ignored = {"save_path", "task_id", "role", "priority"} | ({"seed"} if row.params.seed is None else set())
    return all(made.get(name) == value for name, value in mine.items() if name not in ignored)


def read_rows(file: Path, folder: Path, defaults: Mapping[str, Any], make_task: MakeTask) -> list[Row]:
    """Every row of the file, checked.

    Args:
        file: .txt, .jsonl or .csv.
        folder: where the videos go.
        defaults: fields for rows that leave them out.
        make_task: fills in the model's own values, and refuses what the model cannot do.

    Raises:
        UsageError: an unreadable file, no rows, or bad rows: all of them are listed by line number.
    """
    from chitu_diffusion.media.video import check_save_path

    readers: Mapping[str, Callable[[str], Iterator[tuple[int, Any]]]] = {
        ".txt": _txt,
        ".jsonl": _jsonl,
        ".csv": _csv,
    }
    reader = readers.get(file.suffix.lower())
    if reader is None:
        raise UsageError(f"'{file}': use .txt, .jsonl or .csv", field="file")
    try:
        text = read_text(file, encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read '{file}': {cause(error)}", field="file") from error
    rows: list[Row] = []
    problems: list[str] = []
    taken = Taken()
    for number, (line, values) in enumerate(reader(text), start=1):
        try:
            params = _request(number, values, folder, defaults)
            row = Row(line, params, make_task(params))
            check_save_path(row.path)
            taken.claim(row)
            rows.append(row)
        except UsageError as error:
            problems.append(f"line {line}: {printable(str(error))}")
    if problems:
        raise UsageError(
            f"{len(problems)} bad rows in '{file}', nothing was made:\n  " + "\n  ".join(problems),
            field="file",
        )
    if not rows:
        raise UsageError(f"'{file}' has no rows", field="file")
    return rows


def _request(number: int, values: Any, folder: Path, defaults: Mapping[str, Any]) -> DiffusionUserParams:
    from chitu_diffusion.task import DiffusionUserParams

    if isinstance(values, UsageError):
        raise values
    given = {name: value for name, value in values.items() if value is not None}
    name = given.pop("save_path", f"{number:04d}.mp4")
    plain = isinstance(name, str) and name and "\\" not in name and not PurePosixPath(name).is_absolute()
    if not plain or ".." in PurePosixPath(name).parts:
        raise UsageError(
            f"save_path = {name!r}: use a plain name inside the output folder", field="save_path"
        )
    path = f"{folder / name}/" if name.endswith("/") else str(folder / name)
    return DiffusionUserParams.from_mapping({**defaults, **given, "save_path": path})


def _txt(text: str) -> Iterator[tuple[int, Any]]:
    for line, content in enumerate(text.split("\n"), start=1):  # splitlines() would cut at form feeds too
        if content.strip() and not content.lstrip().startswith("#"):
            yield line, {"prompt": content.strip()}


def _jsonl(text: str) -> Iterator[tuple[int, Any]]:
    for line, content in enumerate(text.split("\n"), start=1):
        if not content.strip():
            continue
        try:
            values = parse_json(content, checks_text=False)
        except ValueError as error:
            yield line, UsageError(f"not JSON: {error}")
            continue
        yield (
            line,
            values if isinstance(values, dict) else UsageError('use an object such as {"prompt": "..."}'),
        )


def _csv(text: str) -> Iterator[tuple[int, Any]]:
    reader = csv.DictReader(io.StringIO(text), restkey=_TOO_MANY)
    try:
        names = list(reader.fieldnames or ())
        if len(set(names)) < len(names):
            yield 1, UsageError("the header has a name twice")
            return
        for record in reader:
            yield reader.line_num, _record(record)
    except csv.Error as error:
        yield reader.line_num, UsageError(f"not CSV: {error}")


def _record(record: Mapping[str, str]) -> Any:
    if _TOO_MANY in record:
        return UsageError("more cells than the header has names")
    try:
        return {name: _cell(name, cell) for name, cell in record.items() if cell}
    except ValueError as error:
        return UsageError(str(error))


def _cell(name: str, text: str) -> Any:
    if name in WHOLE_NUMBERS:
        try:
            return int(text)
        except ValueError:
            raise ValueError(f"{name} = {text!r}: must be a whole number") from None
    if name == "guidance_scale":
        return options.parse_guidance(text)
    return options.parse_cache(text) if name == "flexcache" else text
