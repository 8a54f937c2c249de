"""The command line put together: which commands there are, and how an error becomes words and an exit code.

    0 done   1 a job failed   2 usage   3 will not fit   4 model missing or corrupt
    5 reproduced, and not the same   130 interrupted

Knows every command group and nothing of what they do.
"""

from __future__ import annotations

import inspect
import shlex
import sys
import traceback
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Annotated

import typer

from chitu_diffusion.cli.batch import batch
from chitu_diffusion.cli.calibrate import calibrate
from chitu_diffusion.cli.console import complain, emit_error, exit_code_of, one_command, printable
from chitu_diffusion.cli.doctor import doctor
from chitu_diffusion.cli.fleet import fleet_app
from chitu_diffusion.cli.generate import generate
from chitu_diffusion.cli.info import config_app, info
from chitu_diffusion.cli.jobs import jobs_app, worker
from chitu_diffusion.cli.launch import CommandLine
from chitu_diffusion.cli.models import models_app
from chitu_diffusion.cli.reproduce import reproduce
from chitu_diffusion.cli.serve import keys_app, serve
from chitu_diffusion.cli.store import store_app
from chitu_diffusion.errors import ChituError, UsageError
from chitu_diffusion.evaluation.commands import app as evaluation_app
from chitu_diffusion.executor.interrupts import signals_as_ctrl_c
from chitu_diffusion.files.reading import cause

if TYPE_CHECKING:
    from chitu_diffusion.config import RankPlace

INTERRUPTED = 130
GROUPS = ("models", "config", "eval", "store", "keys", "jobs", "fleet")


def build() -> typer.Typer:
    """The application."""
    app = typer.Typer(
        name="chitu",
        no_args_is_help=True,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
        help="chitu_diffusion: from a sentence, a picture or a video to a video, with Wan's models.",
        epilog='Begin with: chitu generate "A cat walking on grass"',
    )
    app.callback()(_common)
    app.command()(generate)
    app.command()(batch)
    app.command()(calibrate)
    app.command()(info)
    app.command()(reproduce)
    app.command()(worker)
    app.add_typer(models_app, name="models")
    app.command()(doctor)
    app.add_typer(config_app, name="config")
    app.add_typer(evaluation_app, name="eval")
    app.command()(serve)
    app.add_typer(keys_app, name="keys")
    app.add_typer(store_app, name="store")
    app.add_typer(jobs_app, name="jobs")
    app.add_typer(fleet_app, name="fleet")
    _summarise(app)
    return app


def _summarise(app: typer.Typer) -> None:
    """Lists of commands show each one's first paragraph, wrapped; by itself typer cuts it to one line."""
    for command in app.registered_commands:
        command.short_help = (inspect.getdoc(command.callback) or "").partition("\n\n")[0]
    for group in app.registered_groups:
        if group.typer_instance is not None:
            group.short_help = group.typer_instance.info.help
            _summarise(group.typer_instance)


def _print_version(wanted: bool) -> None:
    if wanted:
        try:
            print(version("chitu_diffusion"))
        except PackageNotFoundError:
            print("chitu_diffusion is not installed; 'pip install -e .' does that")
        raise typer.Exit(0)


def _common(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version_: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and stop."),
    ] = False,
) -> None:
    """chitu_diffusion: from a sentence, a picture or a video to a video, with Wan's models."""


def run(arguments: Sequence[str] | None = None) -> int:
    """Carry out one command line.

    Args:
        arguments: what stands after `chitu`; None takes the process's own.

    Returns:
        the exit code; every error has been told on stderr (with --json: as an event on stdout).
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = words[: words.index("--")] if "--" in words else words
    as_json = "--json" in options
    app = build()
    try:
        with one_command(), signals_as_ctrl_c():
            code = app(args=words, obj=CommandLine(words, run), prog_name="chitu", standalone_mode=False)
        if code == INTERRUPTED:
            complain(_interrupted(words))
        return int(code or 0)
    except KeyboardInterrupt:
        complain(_interrupted(words))
        return INTERRUPTED
    except typer.TyperException as error:
        return _report(error, _usage(error.format_message(), options), error.exit_code, as_json)
    except ChituError as error:
        if "--debug" in options:
            traceback.print_exc()
        return _report(error, str(error), exit_code_of(error), as_json)
    except Exception as error:
        # recorded: told in words here, and as a traceback with --debug
        if "--debug" in options:
            traceback.print_exc()
        named = f" '{error.filename}'" if isinstance(error, OSError) and error.filename else ""
        message = (
            f"unexpected {type(error).__name__}{named}: {cause(error)}. 'chitu --debug ...' shows where; "
            "please report it"
        )
        return _report(error, message, 1, as_json)


def _interrupted(words: Sequence[str]) -> str:
    """How to go on; a rank's own words are not those that were typed."""
    command = f": {printable(shlex.join(['chitu', *words]))}" if _place() is None else ""
    return f"interrupted; give the same command again to go on{command}"


def _place() -> RankPlace | None:
    from chitu_diffusion.config import rank_place

    try:
        return rank_place()
    except UsageError:
        return None  # which is most likely the error that is told


def _usage(message: str, words: Sequence[str]) -> str:
    """What the parser found wrong, and where help stands; a bare group is answered with its help."""
    if message.startswith("Usage:"):
        return message
    deep = 2 if words[:1] and words[0] in GROUPS else 1
    named = [] if message.startswith("No such command") else [word for word in words[:deep] if word.isalpha()]
    stop = "" if message.endswith(("?", ".")) else "."
    return f"{message}{stop} '{' '.join(['chitu', *named])} --help' lists what there is"


def _report(error: Exception, message: str, exit_code: int, as_json: bool) -> int:
    place = _place()
    if place is not None and place.rank > 0:
        if place.launched and isinstance(error, UsageError | typer.TyperException):
            return exit_code  # every rank finds the same, and the first tells it
        message = f"rank {place.rank}: {message}"
    if as_json:
        emit_error(error, message, exit_code)
    else:
        lines = [printable(line) for line in message.splitlines()]
        complain(("" if message.startswith("Usage:") else "error: ") + "\n".join(lines))
    return exit_code
