"""Settings from files, the environment and code: where values come from, and what is refused."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from chitu_diffusion.config import EngineConfig, leaves, load_config, rank_place
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


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("infer.diffusion.low_mem_level", -1, "= -1: use 0 to 4"),
        ("infer.diffusion.low_mem_level", 5, "= 5: use 0 to 4"),
        ("infer.diffusion.low_mem_level", "much", "= 'much': use a whole number, 0 to 4"),
        ("checkpoint.every_s", -1, "= -1: use 0"),
        ("ranks.timeout", 0, "= 0: use more than 0"),
        ("ranks.timeout", "long", "= 'long': use a number, more than 0"),
        ("ranks.heartbeat_timeout", 0, "= 0: use 1"),
        ("ranks.copies", "perhaps", "= 'perhaps': use true or false"),
        ("checkpoint.resume", "maybe", "= 'maybe': use 'any', 'exact' or 'never'"),
        ("output.dir", 3, "= 3: use text"),
    ],
)
def test_a_bad_value_says_what_to_use(name: str, value: object, said: str) -> None:
    with pytest.raises(UsageError, match=re.escape(f"{name} {said}")) as raised:
        load_config(flags={name: value}, environment={})
    assert raised.value.field == name and "Input" not in str(raised.value)


@pytest.mark.parametrize("name", [name for name, _ in leaves()])
def test_no_setting_answers_in_pydantic_s_words(name: str) -> None:
    with pytest.raises(UsageError) as raised:
        load_config(flags={name: object()}, environment={})
    assert "use " in str(raised.value) and "Input" not in str(raised.value)


SLURM = {"SLURM_PROCID": "1", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "7"}
MPI = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4", "PMI_RANK": "1", "PMI_SIZE": "4"}


@pytest.mark.parametrize(
    "left",
    [
        SLURM,
        MPI,
        {"RANK": "3"},
        {"WORLD_SIZE": "4", "LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "4"},
        {"RANK": "5", "WORLD_SIZE": "1"},
        {"RANK": "", "WORLD_SIZE": ""},
        {"RANK": "1", "WORLD_SIZE": ""},
        {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "x", "TORCHELASTIC_RUN_ID": "x"},
    ],
    ids=str,
)
def test_variables_that_place_no_rank_are_nobodys(left: dict[str, str]) -> None:
    assert rank_place(left) is None


def test_a_started_rank_is_known_whatever_else_is_left() -> None:
    started = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    place = rank_place({**SLURM, **MPI, **started})
    assert place is not None
    assert (place.rank, place.world, place.local_rank, place.local_world) == (1, 4, 1, 2)
