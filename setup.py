"""The text of the package's page: README.md without its relative links, which lead nowhere there.

They become absolute where `[project.urls]` of pyproject.toml names a `Repository`, and plain words without.
All else about the package stands in pyproject.toml.
"""

import re
import tomllib
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
RELATIVE_LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!\w+:)([^)\s]+)\)")


def package_page(readme: str, repository: str | None) -> str:
    """Markdown whose links all hold outside the repository; pictures are links to raw files."""

    def outside(link: re.Match[str]) -> str:
        picture, words, target = link.groups()
        if repository is None:
            return f"(picture: {words})" if picture else words
        return f"{picture}[{words}]({repository}/{'raw' if picture else 'blob'}/HEAD/{target})"

    return RELATIVE_LINK.sub(outside, readme)


if __name__ == "__main__":
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    setup(
        long_description=package_page(
            (ROOT / "README.md").read_text(encoding="utf-8"), project["urls"].get("Repository")
        ),
        long_description_content_type="text/markdown",
    )
