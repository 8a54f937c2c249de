"""What an index of packages shows of this one: the metadata that a build writes."""

from __future__ import annotations

import re
import runpy
import shutil
import subprocess
import sys
import tomllib
from email import message_from_bytes
from email.message import Message
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BUILD = "from setuptools import build_meta; print(build_meta.prepare_metadata_for_build_wheel('.'))"
ANY_LINK = re.compile(r"\]\(([^)\s]+)\)|(?:src|href)=[\"']([^\"']+)")


def metadata_of(source: Path) -> Message:
    subprocess.run([sys.executable, "-c", BUILD], cwd=source, check=True, capture_output=True, timeout=120)
    (file,) = source.glob("*.dist-info/METADATA")
    return message_from_bytes(file.read_bytes())


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """What a build reads, without the weights."""
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "chitu_diffusion").mkdir()
    (tmp_path / "chitu_diffusion" / "__init__.py").touch()
    return tmp_path


def links_of(page: str) -> list[str]:
    return [first or second for first, second in ANY_LINK.findall(page)]


@pytest.mark.parametrize("repository", [None, "https://example.org/chitu_diffusion"])
def test_metadata_has_no_relative_link(source: Path, repository: str | None) -> None:
    if repository is not None:
        pyproject = source / "pyproject.toml"
        text = pyproject.read_text(encoding="utf-8")
        (table,) = re.findall(r"^\[project\.urls\].*\n", text, re.MULTILINE)
        pyproject.write_text(text.replace(table, f'{table}Repository = "{repository}"\n'), encoding="utf-8")
    found = metadata_of(source)
    page = str(found.get_payload())
    assert "make demo" in page
    assert found["Description-Content-Type"] == "text/markdown"
    assert not [link for link in links_of(page) if not re.match(r"https?://", link)]
    ours = [link for link in links_of(page) if link.startswith("https://example.org/")]
    assert bool(ours) == (repository is not None)
    for link in ours:
        _, _, path = link.removeprefix(f"{repository}/").split("/", 2)
        assert (ROOT / path).exists(), link


def test_metadata_says_who_what_and_under_which_licence(source: Path) -> None:
    found = metadata_of(source)
    assert found["Author"] == "chitu_diffusion maintainers"
    assert found["License-Expression"] == "Apache-2.0"
    assert found["License-File"] == "LICENSE"
    assert "text-to-video" in found["Keywords"]
    assert all(url.split(", ")[-1].startswith("https://") for url in found.get_all("Project-URL", []))
    classifiers = found.get_all("Classifier", [])
    assert "Typing :: Typed" in classifiers
    assert not [name for name in classifiers if name.startswith("License ::")], "the expression says it"


def test_links_and_pictures_become_absolute_or_words() -> None:
    package_page = runpy.run_path(str(ROOT / "setup.py"))["package_page"]
    readme = "![a strip](docs/a.jpg) [design](docs/design.md) [there](https://example.org/x)"
    assert package_page(readme, None) == "(picture: a strip) design [there](https://example.org/x)"
    assert package_page(readme, "https://h.example/r") == (
        "![a strip](https://h.example/r/raw/HEAD/docs/a.jpg) "
        "[design](https://h.example/r/blob/HEAD/docs/design.md) [there](https://example.org/x)"
    )


def test_install_lines_name_the_pinned_torch_and_the_cpu_index() -> None:
    (pinned,) = re.findall(
        r"^torch==\S+", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE
    )
    for name in ("README.md", "docs/install.md"):
        text = (ROOT / name).read_text(encoding="utf-8")
        assert set(re.findall(r"torch==[\w.]+", text)) == {pinned}, name
        assert f"pip install {pinned} --index-url https://download.pytorch.org/whl/cpu" in text, name


def test_lower_bounds_are_what_make_lowest_installs() -> None:
    """Every requirement but torch, tools included: a line that it could not read would go untried."""
    (line,) = re.findall(r"sed -n '([^']*)' pyproject\.toml", (ROOT / "Makefile").read_text(encoding="utf-8"))
    done = subprocess.run(
        ["sed", "-n", line, str(ROOT / "pyproject.toml")], capture_output=True, text=True, check=True
    )
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    asked = [*project["dependencies"], *extras["serve"]]
    asked += [requirement for requirement in extras["dev"] if not requirement.startswith("chitu_diffusion[")]
    assert done.stdout.split() == [requirement.partition(";")[0].replace(">=", "==") for requirement in asked]


def test_the_changelog_has_the_version_or_none_is_released() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    assert "## [Unreleased]" in text
    assert f"## [{version}]" in text or "No version has been released yet" in text
