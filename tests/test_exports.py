"""The public names: a name that goes, or comes, is a decision and not an accident."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import chitu_diffusion

ROOT = Path(__file__).parent.parent
PUBLIC = {
    "BackendState",
    "CascadeStage",
    "ChituError",
    "DiffusionBackend",
    "DiffusionScheduler",
    "DiffusionTask",
    "DiffusionTaskPool",
    "DiffusionUserParams",
    "Engine",
    "EngineConfig",
    "Generator",
    "Progress",
    "RankPlace",
    "TaskStatus",
    "VideoResult",
    "__version__",
    "chitu_generate",
    "chitu_init",
    "chitu_is_terminated",
    "chitu_start",
    "chitu_terminate",
    "load_config",
}
PAGE = {
    "chitu_diffusion.backend": ["DiffusionBackend"],
    "chitu_diffusion.generator": ["Generator"],
    "chitu_diffusion.task": ["DiffusionTask", "DiffusionTaskPool", "DiffusionUserParams"],
    "chitu_diffusion.scheduler": ["DiffusionScheduler"],
}
"""Modules that the API page imports from, and what it takes."""


def test_public_names() -> None:
    assert set(chitu_diffusion.__all__) == PUBLIC, (
        "a public name came or went: change PUBLIC here and docs/ with it"
    )


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_public_name_resolves(name: str) -> None:
    assert getattr(chitu_diffusion, name) is not None


def test_dir_lists_the_public_names() -> None:
    assert set(dir(chitu_diffusion)) >= PUBLIC


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = chitu_diffusion.no_such_name


def test_type_checkers_see_the_installed_package(tmp_path: Path) -> None:
    """They look along the path and run no import hooks; without `py.typed` all that they find is `Any`."""
    program = "from importlib.machinery import PathFinder as f; print(f.find_spec('chitu_diffusion').origin)"
    done = subprocess.run(
        [sys.executable, "-I", "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"it is installed by a hook: 'make install' again\n{done.stderr}"
    assert Path(done.stdout.strip()).with_name("py.typed").exists()


FIRST_IMPORTS = """
import os
import diffusers.models.autoencoders.autoencoder_kl_wan, transformers, torch  # once for all, and none of ours

for line in %r:
    child = os.fork()
    if not child:
        exec(line)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, line
"""


def test_the_page_can_import() -> None:
    """Each of its modules, when it is the first of ours."""
    lines = [f"from {module} import {', '.join(names)}" for module, names in sorted(PAGE.items())]
    subprocess.run([sys.executable, "-c", FIRST_IMPORTS % lines], cwd=ROOT, check=True)
