"""`chitu generate`: one sentence, one video for each seed.

Knows how flags become requests and in which order things are checked: all of it before torch is
imported. The work itself is `runner.py`'s.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from chitu_diffusion.cli import options
from chitu_diffusion.cli.dry_run import check_room, find_model, picked_cache, print_plan, task_for
from chitu_diffusion.cli.existing import refuse_others
from chitu_diffusion.cli.flags import Args, takes_flags
from chitu_diffusion.cli.launch import check_layout, launch
from chitu_diffusion.cli.resume import VideoJob, job_key, run_key
from chitu_diffusion.files.places import make_folder

if TYPE_CHECKING:
    from chitu_diffusion.config import EngineConfig
    from chitu_diffusion.models.registry import FoundModel
    from chitu_diffusion.task import DiffusionUserParams


@takes_flags
def generate(
    prompt: Annotated[str, typer.Argument(help="What the video shows.", show_default=False)],
    args: Args,
    context: typer.Context,
) -> int:
    """Make a video from a sentence.

    Example: chitu generate "A cat walking on grass" -o cat.mp4 --seed 42
    """
    config, _ = args.load_config()
    asked = {"prompt": options.parse_text(prompt), **args.request_fields()}
    with args.named():
        requests = requests_for_seeds(asked, config.output.dir)
    model = find_model(config, args)
    cache = picked_cache(model.spec, args)
    gpus = args["gpus"]
    with args.named():
        layout = check_layout(config, model.spec, gpus)
        tasks = [task_for(model, config, replace(params, **cache), layout) for params in requests]
        if not args["overwrite"]:
            refuse_others(tasks, model, config)
        check_room(tasks, config)
    if args["dry_run"]:
        with args.named():
            return print_plan(config, model, tasks, layout, as_json=args["json"])
    make_folder("--profile", args["profile"])
    if gpus and gpus > 1:
        return launch(context.find_root().obj, gpus, config)
    drawn = [name for name in ("seed", "save_path") if asked.get(name) is None]
    if "seed" in drawn:
        for task in tasks:
            task.params = replace(task.params, seed=None)  # that of an unfinished video will do as well
    folder = config.output.dir if "save_path" in drawn else None
    jobs = [VideoJob(task, job_key(task.params, drawn, config), folder) for task in tasks]
    key = run_key([job.key for job in jobs])
    with args.named():
        return make_videos(config, model, jobs, key, profile=args["profile"], as_json=args["json"])


def requests_for_seeds(asked: dict[str, Any], folder: str) -> list[DiffusionUserParams]:
    """One checked request for each seed, each with a file name of its own.

    Args:
        asked: fields of the request, but `seed` is a list of them or missing, and `save_path` one name for
            all or missing.
        folder: for files without a name.

    Raises:
        UsageError: a bad value or a name that cannot be written.
    """
    from chitu_diffusion.media.video import check_save_path
    from chitu_diffusion.task import DiffusionUserParams, draw_seed

    seeds = asked.get("seed") or [draw_seed()]
    output = asked.get("save_path")
    requests = []
    for seed in seeds:
        path = output if output is not None else options.default_path(folder, seed)
        if output is not None and len(seeds) > 1:
            check_save_path(output)
            path = options.path_for_seed(output, seed)
        requests.append(DiffusionUserParams(**{**asked, "seed": seed, "save_path": path}))
        check_save_path(path)
    return requests


def make_videos(
    config: EngineConfig,
    model: FoundModel,
    jobs: list[VideoJob],
    key: str | None,
    *,
    profile: Path | None,
    as_json: bool,
) -> int:
    """Run the requests; the paths go to stdout."""
    from chitu_diffusion.cli.progress import make_reporter
    from chitu_diffusion.cli.runner import exit_code_for, run_jobs
    from chitu_diffusion.task import TaskStatus

    tasks = run_jobs(config, model, jobs, make_reporter(as_json=as_json), key=key, profile=profile)
    if not as_json:
        for task in tasks:
            if task.status is TaskStatus.FINISHED:
                print(task.buffer.save_path, flush=True)
    return exit_code_for(tasks)
