"""Settings from files, the environment and code: where values come from, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from chitu_diffusion.config import EngineConfig, load_config
from chitu_diffusion.errors import UsageError

RENAMED = [
    ("infer.diffusion.up", "infer.diffusion.ulysses_degree", 2),
    ("ranks.lost_after", "ranks.heartbeat_timeout", 8.0),
]


@pytest.mark.parametrize(("old", "new", "value"), RENAMED)
def test_a_setting_s_old_name_is_refused_with_the_new_one(
    old: str, new: str, value: object, tmp_path: Path
) -> None:
    room, _, key = old.rpartition(".")
    word = new.rpartition(".")[2]
    file = tmp_path / "chitu.toml"
    file.write_text(f"[{room}]\n{key} = {value}\n", encoding="utf-8")
    variable = f"CHITU_{old.replace('.', '__').upper()}"
    branch = EngineConfig()
    for part in room.split("."):
        branch = getattr(branch, part)
    with pytest.raises(UsageError, match=rf"{old}.* is called '{word}'"):
        load_config(file, environment={})
    with pytest.raises(UsageError, match=rf"{old}.* is called '{word}'"):
        load_config(flags={old: str(value)}, environment={})
    with pytest.raises(UsageError, match=rf"{variable} is called CHITU_{new.replace('.', '__').upper()}"):
        load_config(environment={variable: str(value)})
    with pytest.raises(UsageError, match=f"is called '{word}'"):
        setattr(branch, key, value)


def test_what_is_named_last_counts() -> None:
    variables = {"CHITU_INFER__DIFFUSION__ULYSSES_DEGREE": "2", "CHITU_RANKS__HEARTBEAT_TIMEOUT": "4"}
    config, origins = load_config(flags={"ranks.heartbeat_timeout": "6"}, environment=variables)
    assert config.infer.diffusion.ulysses_degree == 2
    assert config.ranks.heartbeat_timeout == 6
    assert origins["ranks.heartbeat_timeout"] == "flag"
