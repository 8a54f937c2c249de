"""The table of flags: one row is all that a flag needs, and commands that share a flag share its row."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Annotated

import pytest
import typer
from conftest import Chitu

from chitu_diffusion.cli.flags import FLAGS, Args, Flag, takes_flags
from chitu_diffusion.config import EngineConfig, leaves
from chitu_diffusion.task import DiffusionUserParams

Call = Callable[..., Args]
COMMANDS = ("generate", "batch", "calibrate", "doctor", "config show")


def command_of(name: str, *more: Flag) -> Call:
    """A command of that name, of the table and `more` rows: words to what its function gets."""

    def command(prompt: Annotated[str, typer.Argument()], args: Args) -> Args:
        return args

    command.__name__ = name
    app = typer.Typer(rich_markup_mode=None)
    app.command()(takes_flags(command, (*FLAGS, *more)))
    return lambda *words: app(args=list(words), standalone_mode=False)


@pytest.mark.parametrize("command", ["generate", "batch"])
def test_a_new_flag_is_one_row(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    pose = Flag("--pose", "generate batch", "A dancer's poses.", field="pose", metavar="FILE")
    compiled = Flag("--compile", "generate batch", "Compile the blocks.", bool, setting="infer.compile")
    alone = Flag("--no-sound", "generate batch", "Begin anew.", bool)
    call = command_of(command, pose, compiled, alone)
    call("--help")
    shown = capsys.readouterr().out
    assert re.search(r"--pose FILE +A dancer's poses\.\n", shown)
    args = call("cat", "--pose", "cat.png", "--frames", "5", "--compile", "--no-sound")
    assert args.request_fields() == {"pose": "cat.png", "num_frames": 5}
    config, origins = args.load_config()
    assert config.infer.compile and origins["infer.compile"] == "flag"
    assert args["no_sound"] is True
    without = call("cat")
    assert without.request_fields() == {} and without["pose"] is None and without["no_sound"] is False
    assert without.load_config()[1]["infer.compile"] == "default"


def test_a_row_reaches_only_its_commands() -> None:
    with pytest.raises(typer.TyperException, match="No such option: --profile"):
        command_of("batch")("cat", "--profile", "p")


def test_values_go_where_their_rows_say() -> None:
    call = command_of("generate")
    args = call(
        "cat", "--size", "64x32", "--low-mem-level", "0", "--parallel", "cfg2u2", "--set", "infer.threads=2"
    )
    assert args.request_fields() == {"width": 64, "height": 32}
    config, origins = args.load_config()
    diffusion = config.infer.diffusion
    assert (diffusion.cfg_size, diffusion.cp_size, diffusion.ulysses_degree) == (2, 2, 2)
    assert config.infer.threads == 2
    assert origins["infer.diffusion.low_mem_level"] == "flag"


def test_rows_name_fields_and_settings_that_there_are() -> None:
    request_fields = {field.name for field in fields(DiffusionUserParams)}
    settings = {name for name, _ in leaves(EngineConfig)} | {"*"}
    for flag in FLAGS:
        assert set(flag.field.split()) <= request_fields, flag
        assert not flag.setting or flag.setting in settings, flag
        assert not (flag.field and flag.setting), flag


def test_no_command_has_a_flag_twice() -> None:
    for command in {name for flag in FLAGS for name in flag.commands.split()}:
        names = [name for flag in FLAGS if command in flag.commands.split() for name in flag.names.split()]
        assert sorted(names) == sorted(set(names)), command


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_every_row_of_the_command_in_order(chitu: Chitu, command: str) -> None:
    name = command.replace(" ", "_")
    rows = [flag for flag in FLAGS if name in flag.commands.split()]
    code, out, _ = chitu(*command.split(), "--help")
    assert code == 0
    shown = " ".join(["", *out.partition("Options:")[2].split()])
    places = [shown.index(f" {flag.names.replace(' ', ', ')} ") for flag in rows]
    assert places == sorted(places)
    assert all(flag.help in shown for flag in rows)


@pytest.mark.usefixtures("nothing_loads")
@pytest.mark.parametrize(
    ("setting", "bad", "flag"),
    [
        ("infer.dtype", "fp8", "--dtype"),
        ("output.quality", "11", "--quality"),
        ("models.name", "x", "--model"),
    ],
)
def test_an_error_names_where_the_value_came_from(
    chitu: Chitu, monkeypatch: pytest.MonkeyPatch, setting: str, bad: str, flag: str
) -> None:
    def told(*words: str) -> str:
        code, _, err = chitu("generate", "cat", *words)
        assert code == (4 if setting == "models.name" else 2)
        return err

    branch, name = setting.split(".")
    Path("c.toml").write_text(f"[{branch}]\n{name} = {json.dumps(int(bad) if bad.isdigit() else bad)}\n")
    assert told("--config", "c.toml").startswith(f"error: file c.toml: {setting} = ")
    assert told("--config", "c.toml", flag, bad).startswith(f"error: {flag} ")
    assert told("--set", f"{setting}={bad}").startswith(f"error: --set {setting} ")
    variable = f"CHITU_{branch}__{name}".upper()
    monkeypatch.setenv(variable, bad)
    assert told("--config", "c.toml").startswith(f"error: env {variable}: {setting} = ")


@pytest.mark.usefixtures("nothing_loads")
def test_a_bad_flag_is_no_rows_fault(chitu: Chitu) -> None:
    Path("p.txt").write_text("a cat\na dog\n")
    assert chitu("batch", "p.txt", "--frames", "32")[2].startswith("error: --frames 32: ")


def test_a_batch_takes_what_a_video_takes() -> None:
    """But for a trace, which is of one video."""

    def names(command: str) -> set[str]:
        return {flag.key for flag in FLAGS if command in flag.commands.split()}

    assert names("generate") - names("batch") == {"profile"}
