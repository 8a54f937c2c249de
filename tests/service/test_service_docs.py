"""docs/service.md and docs/operations.md beside the code: commands and programs run, tables name what is."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from fronts import VIDEO, FakeSupervisor, listening, make_front
from pydantic import BaseModel

from chitu_diffusion.cli.app import build
from chitu_diffusion.service.auth import row_of_key
from chitu_diffusion.service.settings import ServiceConfig

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "service.md").read_text(encoding="utf-8")
OPERATIONS = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
NOT_THERE = {"service.replicate_dialect"}
"""Settings that do nothing yet."""
pytestmark = pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")


def blocks(language: str, text: str = PAGE) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.M | re.S)


def setting_rows(branch: type[BaseModel] = ServiceConfig, above: str = "service") -> list[str]:
    found = []
    for name, field in branch.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            found += setting_rows(kind, f"{above}.{name}")
        elif f"{above}.{name}" not in NOT_THERE:
            default = "" if field.default in (None, ()) else json.dumps(field.default)
            found.append(f"| `{above}.{name}` | {default} | {field.description} |")
    return found


def test_the_table_of_settings_is_the_settings() -> None:
    missing = [row for row in setting_rows() if row not in PAGE]
    assert not missing, "write into docs/service.md:\n" + "\n".join(missing)
    assert len(re.findall(r"^\| `service\.", PAGE, flags=re.M)) == len(setting_rows())


def test_the_table_of_routes_is_the_routes(tmp_path: Path) -> None:
    from chitu_diffusion.service.app import build_app

    front = make_front(tmp_path)
    routes = {
        f"{method} {route.path}"
        for route in build_app(front).routes
        for method in route.methods - {"HEAD"}  # type: ignore[attr-defined]
    }
    front.store.close()
    assert set(re.findall(r"^\| `([A-Z]+ /\S*)` \|", PAGE, flags=re.M)) == routes


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    front = make_front(tmp_path_factory.mktemp("data"))
    with listening(front, FakeSupervisor(front).run) as url:
        yield url
    front.store.close()


def test_its_curl_lines_make_a_video(url: str, tmp_path: Path) -> None:
    lines = "".join(blocks("sh")).replace("http://127.0.0.1:8000", url).replace("wait=60", "wait=20")
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", lines], cwd=tmp_path, capture_output=True, text=True, timeout=60,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "ball.mp4").read_bytes() == VIDEO
    assert (tmp_path / "part.mp4").read_bytes() == VIDEO[:100]
    assert "event: completed" in done.stdout and '"error"' not in done.stdout.replace('"error":null', "")


def test_its_programs_run(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    programs = blocks("python")
    assert len(programs) == 1
    for program in programs:
        exec(compile(program.replace("http://127.0.0.1:8000", url), "docs/service.md", "exec"), {})
    assert (tmp_path / "ball.mp4").read_bytes() == VIDEO


def test_its_backup_is_the_database(tmp_path: Path) -> None:
    from chitu_diffusion.service.store import open_store

    front = make_front(tmp_path / "chitu-data")
    front.store.keys.add(row_of_key("ck_abc_0123456789abcdefghijklmn", "ann", ("read",)))
    (line,) = blocks("sh", OPERATIONS)
    subprocess.run(["bash", "-c", line.replace("python", sys.executable, 1)], cwd=tmp_path, check=True)
    front.store.close()
    copy = open_store(f"sqlite:///{tmp_path}/chitu-backup.db")
    assert [key.id for key in copy.keys.all()] == ["abc"]
    copy.close()


def command_of(words: list[str]) -> None:
    command: Any = typer.main.get_command(build())
    left = list(words)
    while hasattr(command, "commands"):
        command = command.commands[left.pop(0)]
    command.make_context("chitu", left)


def test_its_commands_are_those_that_there_are() -> None:
    found = re.findall(
        r"(?:^    |`|&& |'|\d )chitu ((?:serve|worker|store|keys|jobs|fleet)\b[^`\n&#']*)",
        PAGE + OPERATIONS,
        re.M,
    )
    found = [words.split() for words in found]
    assert len(found) > 12
    for words in found:
        if (
            "|" not in words
            and "..." not in words
            and len(words) > 1 + (words[0] in ("store", "keys", "jobs", "fleet"))
        ):
            command_of(words)


def test_tests_that_operations_names_are_there() -> None:
    """In its failure matrix and its page of threats: `FILE::TEST`, or a file."""
    named = re.findall(
        r"`((?:service/|tests/|reliability/|cli/|files/)?test_\w+)(?:::(test_\w+))?`", OPERATIONS
    )
    assert len(named) > 30
    for file, test in named:
        places = list((ROOT / "tests").rglob(f"{file.rpartition('/')[2]}.py"))
        assert places, file
        assert not test or any(f"def {test}(" in place.read_text(encoding="utf-8") for place in places), test
