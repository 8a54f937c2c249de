"""The engine's settings: one typed tree, read from defaults, a file, the environment and flags.

This is the only file that reads the environment. It knows nothing of requests (`task.py`) and
loads no tensors. Order of precedence, weakest first: defaults, a TOML file, `CHITU_*` variables
(`CHITU_INFER__DIFFUSION__LOW_MEM_LEVEL=2`), flags given as dotted names.
"""

from __future__ import annotations

import os
import sys
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from chitu_diffusion.attn_schedule import AttnSchedule
from chitu_diffusion.errors import ChituError, ModelMissingError, UsageError, nearest, what_to_use
from chitu_diffusion.files.places import expand_home, made_folder, temporary_folder
from chitu_diffusion.files.reading import read_toml
from chitu_diffusion.sampling.registry import AUTO, SAMPLER_HELP, SOLVERS

if TYPE_CHECKING:
    SamplerName = str
else:
    SamplerName = Literal[(AUTO, *SOLVERS)]

if TYPE_CHECKING:
    import torch.distributed as dist

ENVIRONMENT_PREFIX = "CHITU_"
_SERVICE = "service"
"""The branch of settings that is the service's."""
_RENAMED = {"up": "ulysses_degree", "lost_after": "heartbeat_timeout"}
Origins = dict[str, str]


class Settings(BaseModel):
    """A branch of the tree. Unknown names are refused, and every assignment is checked."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True, validate_default=True)

    def __setattr__(self, name: str, value: Any) -> None:
        try:
            super().__setattr__(name, value)
        except ValidationError as error:
            raise usage_error(type(self), error) from None


class ModelSettings(Settings):
    """Which checkpoint."""

    name: str = Field("wan-tiny", description="a model's name, its Hugging Face id, a folder or a file")
    ckpt_dir: str | None = Field(None, description="place of the weights, where it is not the usual cache")
    low_noise_model: str | None = Field(
        None, description="second expert's file, where the model is a file; none: merged"
    )
    text_encoder: str | None = Field(None, description="its file, likewise; by default found near the model")
    vae: str | None = Field(None, description="its file, likewise")
    image_encoder: str | None = Field(None, description="its file, likewise")
    tokenizer: str | None = Field(None, description="its folder, likewise")


class DiffusionSettings(Settings):
    """How denoising is laid out over memory and ranks."""

    low_mem_level: int = Field(0, ge=0, le=4, description="0 all resident .. 4 blocks streamed one by one")
    cfg_size: int = Field(1, ge=1, le=2, description="ranks that share the two guidance branches")
    cp_size: int = Field(1, ge=1, description="ranks that share one sequence of tokens")
    cfg_batch: Literal["auto", "batched", "sequential"] = Field(
        "auto",
        description=(
            "both guidance branches in one forward, or one after the other; auto: batched where it is faster"
        ),
    )
    cache_memory_gb: float | None = Field(
        None,
        ge=0,
        description="refuse a request whose flexcache would keep more than this, in GiB; None is no limit",
    )
    ulysses_degree: int | None = Field(None, ge=1, description="Ulysses degree inside cp_size; None picks it")


class InferSettings(Settings):
    """How the networks run."""

    diffusion: DiffusionSettings = Field(default_factory=DiffusionSettings)
    attn_type: str = Field("auto", description="attention kernel; 'auto' is the fastest exact one")
    attn_schedule: str | None = Field(
        None,
        description=(
            "another attention kernel for a task's later steps: sage@10 after 10 steps, fa3_fp8@25% after a "
            "quarter of them; lossy where the kernel is"
        ),
    )
    device: str = Field("auto", description="'auto', 'cpu', 'cuda' or 'cuda:N'")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="of weights and matrix products; auto: float32 on CPU, bfloat16 on a GPU"
    )
    threads: int | None = Field(
        None, ge=1, le=1024, description="CPU threads; None leaves torch's own choice"
    )
    fused: bool = Field(
        True, description="on a GPU, one kernel for each norm, gate, turn or GELU, and the text attention"
    )
    compile: bool = Field(
        False, description="torch.compile the transformer's blocks: seconds once for each size, then faster"
    )
    quant: Literal["none", "fp8"] = Field(
        "none", description="linear layers in 8 bits: lossy; faster from Ada and Hopper on"
    )
    quant_keep: str = Field(
        "edges,attn2.to_k,attn2.to_v",
        description="layers that fp8 leaves alone; 'edges' is the first and last block",
    )
    quant_from: float = Field(
        0.25, ge=0, le=1, description="share of the schedule that stays in 16 bits before fp8 begins"
    )
    quant_originals: bool = Field(
        True, description="16-bit weights stay beside fp8 for these first steps; false: half the memory"
    )
    packed: bool = Field(
        True, description="a GGUF file's weights stay packed, the same numbers; false unpacks while loading"
    )
    sampler: SamplerName = Field(
        AUTO, description=f"solver of the flow's equation; {AUTO}: the model's own; {SAMPLER_HELP}"
    )

    @field_validator("attn_schedule")
    @classmethod
    def _has_schedule(cls, text: str | None) -> str | None:
        AttnSchedule.from_text(text)
        return text


class OutputSettings(Settings):
    """Where videos go when a request names no path."""

    dir: str = Field("outputs", description="folder for videos without a save_path")
    quality: int = Field(8, ge=0, le=10, description="of H.264: 10 is visually lossless, 0 the smallest file")

    @field_validator("dir")
    @classmethod
    def _with_home(cls, folder: str) -> str:
        return expand_home(folder)


class SchedulerSettings(Settings):
    """Whose step is next."""

    policy: Literal["fifo", "priority", "fair"] = Field("fifo", description="fair shares steps over roles")
    keep_ended: int = Field(
        100, ge=0, description="ended tasks that the engine keeps for whoever asks; older ones leave"
    )


class CheckpointSettings(Settings):
    """Tasks as files, where whoever runs them asks for it."""

    every_s: float = Field(
        10.0, ge=0, description="least seconds between two checkpoints of a task; 0: after every work unit"
    )
    cache_limit_mb: float = Field(
        512.0, ge=0, description="a larger flexcache stays out of checkpoints, and begins empty after one"
    )
    resume: Literal["any", "exact", "never"] = Field(
        "any", description="exact: only where the very same video follows; never: start over"
    )


class RankSettings(Settings):
    """When several ranks share the work: how long they wait for each other."""

    timeout: float = Field(
        60.0, gt=0, description="seconds without progress after which ranks stop waiting for each other"
    )
    heartbeat_timeout: float = Field(
        8.0, ge=1, description="seconds of silence after which a rank is taken for lost"
    )
    copies: bool = Field(
        True,
        description="ranks of one machine write into each other's GPUs, not through NCCL, where they can",
    )


class EngineConfig(Settings):
    """Everything the engine is told at its start.

    `EngineConfig()` alone means the shipped `wan-tiny` on this machine's best device.

    Raises:
        UsageError: an unknown name (with the nearest known one) or a value that cannot be,
            at construction and at each later assignment.
    """

    models: ModelSettings = Field(default_factory=ModelSettings)
    infer: InferSettings = Field(default_factory=InferSettings)
    output: OutputSettings = Field(default_factory=OutputSettings)
    scheduler: SchedulerSettings = Field(default_factory=SchedulerSettings)
    checkpoint: CheckpointSettings = Field(default_factory=CheckpointSettings)
    ranks: RankSettings = Field(default_factory=RankSettings)

    def __init__(self, **data: Any) -> None:
        try:
            super().__init__(**data)
        except ValidationError as error:
            raise usage_error(type(self), error) from None

    def frozen_copy(self) -> EngineConfig:
        """A deep copy, so that the owner's later edits do not reach a running backend."""
        return self.model_copy(deep=True)


def usage_error(branch: type[BaseModel], error: ValidationError) -> UsageError:
    """pydantic's report as one sentence: field, value, and what to use."""
    first = error.errors()[0]
    *path, last = (str(part) for part in first["loc"])
    name = ".".join([*path, last])
    owner: type[BaseModel] = branch
    for part in path:
        owner = _branch_of(owner, part) or owner
    if first["type"] in ("extra_forbidden", "no_such_attribute"):
        if _RENAMED.get(last) in owner.model_fields:
            return UsageError(f"setting '{name}' is called '{_RENAMED[last]}' now", field=name)
        return UsageError(f"unknown setting '{name}'.{nearest(last, owner.model_fields)}", field=name)
    limits = owner.model_fields[last].metadata if last in owner.model_fields else ()
    return UsageError(f"{name} = {first['input']!r}: {what_to_use(first, limits)}", field=name)


def _branch_of(owner: type[BaseModel], name: str) -> type[BaseModel] | None:
    field = owner.model_fields.get(name)
    kind = field.annotation if field else None
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def leaves(branch: type[BaseModel] = EngineConfig, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every setting as (dotted name, pydantic field)."""
    for name, field in branch.model_fields.items():
        inner = _branch_of(branch, name)
        if inner is None:
            yield prefix + name, field
        else:
            yield from leaves(inner, f"{prefix}{name}.")


def _put(tree: dict[str, Any], dotted: str, value: Any) -> None:
    *path, last = dotted.split(".")
    for part in path:
        branch = tree.setdefault(part, {})
        if not isinstance(branch, dict):
            raise UsageError(
                f"{dotted}: '{part}' is {branch!r} elsewhere in the settings, not a table", field=dotted
            )
        tree = branch
    tree[last] = value


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _from_text(text: str, kind: Any) -> Any:
    """A variable's text as the setting's type: numbers are parsed by pydantic, 'none' is None."""
    allows_none = get_origin(kind) in (Union, types.UnionType) and type(None) in get_args(kind)
    return None if allows_none and text.lower() in ("", "none") else text


def load_config(
    file: str | Path | None = None,
    flags: Mapping[str, Any] | None = None,
    environment: Mapping[str, str] | None = None,
    kind: type[EngineConfig] = EngineConfig,
) -> tuple[EngineConfig, Origins]:
    """Join defaults, file, environment and flags.

    Args:
        file: a TOML file whose tables mirror the tree. None reads the file that `CHITU_CONFIG` names, if any.
        flags: dotted name -> value; None values are left out.
        environment: defaults to the process's own.
        kind: the tree, which may have the service's branch; settings of it are left out otherwise.

    Returns:
        the settings, and for each dotted name where its value came from.

    Raises:
        UsageError: an unreadable file, an unknown name, a bad value.
    """
    environment = os.environ if environment is None else environment
    kinds = {name: field.annotation for name, field in leaves(kind)}
    others = () if _SERVICE in kind.model_fields else (f"{_SERVICE}.",)
    tree: dict[str, Any] = {}
    origins: Origins = dict.fromkeys(kinds, "default")
    file = expand_home(file or environment.get("CHITU_CONFIG") or None)
    if file is not None:
        for name, value in _flatten(read_toml(Path(file))):
            if name.startswith(others):
                continue
            _put(tree, name, value)
            origins[name] = f"file {file}"
    variables = {ENVIRONMENT_PREFIX + name.upper().replace(".", "__"): name for name in kinds}
    for variable, dotted in variables.items():
        if variable in environment:
            _put(tree, dotted, _from_text(environment[variable], kinds[dotted]))
            origins[dotted] = f"env {variable}"
    for variable in environment:
        if variable.startswith(tuple(f"{ENVIRONMENT_PREFIX}{_SERVICE.upper()}__" for _ in others)):
            continue
        if variable.startswith(ENVIRONMENT_PREFIX) and "__" in variable and variable not in variables:
            path, _, last = variable.rpartition("__")
            renamed = f"{path}__{_RENAMED.get(last.lower(), last).upper()}"
            if renamed in variables:
                raise UsageError(f"variable {variable} is called {renamed} now", field=variable)
            raise UsageError(f"unknown variable {variable}.{nearest(variable, variables)}", field=variable)
    for name, value in (flags or {}).items():
        if value is not None:
            _put(tree, name, _from_text(value, kinds.get(name)) if isinstance(value, str) else value)
            origins[name] = "flag"
    try:
        return kind(**tree), origins
    except UsageError as error:
        raise with_origin(error, origins) from error.__cause__


def with_origin(error: UsageError | ModelMissingError, origins: Origins) -> ChituError:
    """An error about a setting, beginning with the file or variable that its value came from."""
    about = str(error.field)
    found = (origin for name, origin in origins.items() if name == about or name.startswith(f"{about}."))
    origin = next(found, "")
    named = origin.startswith(("file ", "env "))
    return type(error)(f"{origin}: {error}", field=error.field) if named else error


@dataclass(frozen=True)
class RankPlace:
    """This process among those that share the work.

    Launchers tell it by the environment. Whoever starts the processes himself (Ray, a test) makes one in each
    of them, and hands it to `Engine(args, place=...)`.

    Args:
        rank, world: its number, from 0, and their number.
        local_rank, local_world: within its machine; None: all are on one. `local_rank`'s GPU is "cuda".
        store: where they meet, such as `torch.distributed.TCPStore(host, port, is_master=rank == 0)`; None
            takes the launcher's.
        launched: torchrun, or `--gpus`, started this process and watches it.

    Numbers that cannot be are a UsageError.
    """

    rank: int
    world: int
    local_rank: int | None = None
    local_world: int | None = None
    store: dist.Store | None = None
    launched: bool = False

    def __post_init__(self) -> None:
        for name in ("rank", "world", "local_rank", "local_world"):
            value = vars(self)[name]
            if type(value) is not int and (value is not None or name in ("rank", "world")):
                raise UsageError(f"{name} = {value!r}: use a whole number", field=name)
        local_world = self.world if self.local_world is None else self.local_world
        local_rank = self.rank if self.local_rank is None else self.local_rank
        for name, count, most in (("world", self.world, None), ("local_world", local_world, self.world)):
            if count < 1 or (most is not None and count > most):
                use = "1 or more" if most is None else f"1 to {most}"
                raise UsageError(f"{name} = {count}: use {use}", field=name)
        for name, place, count in (("rank", self.rank, self.world), ("local_rank", local_rank, local_world)):
            if not 0 <= place < count:
                raise UsageError(f"{name} = {place} of {count}: use 0 to {count - 1}", field=name)


RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
LEFTOVER_HINT = f"if another tool left its variables over: 'unset {' '.join(RANK_VARIABLES)}'"
_MORE = ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_RESTART_COUNT")
_OURS = ("CHITU_RANKS_SOCKET", "CHITU_RANKS_SECRET", "CHITU_RANKS_SECRET_FILE")


def rank_variables(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """What the environment says of ranks: torchrun, our launcher, and the secret; nothing where empty."""
    given = os.environ if environment is None else environment
    return {name: given[name] for name in (*RANK_VARIABLES, *_MORE, *_OURS) if given.get(name)}


def set_rank_variables(values: Mapping[str, object]) -> None:
    """These, and nothing that another tool said of ranks."""
    for name in rank_variables():
        del os.environ[name]
    os.environ.update({name: str(value) for name, value in values.items()})


def rank_place(environment: Mapping[str, str] | None = None) -> RankPlace | None:
    """Where a launcher put this process; None for one that was started alone. Variables that cannot be are a
    UsageError, which names those to unset."""
    found = rank_variables(environment)
    if "RANK" not in found or found.get("WORLD_SIZE", "1") == "1":
        return None
    texts = [found.get(name, "") for name in RANK_VARIABLES[:4]]
    launched = "TORCHELASTIC_RUN_ID" in found or "CHITU_RANKS_SOCKET" in found
    try:
        return RankPlace(*map(int, texts), launched=launched)  # type: ignore[arg-type, misc]
    except ValueError:  # a UsageError is one, too
        told = (
            f"{', '.join(RANK_VARIABLES[:4])} = {', '.join(texts)}: torchrun sets four numbers, ranks below"
        )
        raise UsageError(f"{told} their counts; {LEFTOVER_HINT}", field="RANK") from None


def require_ray_token() -> None:
    """Before Ray is imported: it asks for a token, and shows one, whatever the environment says."""
    os.environ["RAY_AUTH_MODE"] = "token"


_NCCL_DEFAULTS = {
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
    "TORCH_NCCL_ENABLE_MONITORING": "0",
    "TORCH_NCCL_HIGH_PRIORITY": "1",
}


def set_openmp_defaults() -> None:
    """Before torch is imported: threads that wait give their core away soon, unless the environment
    decides.
    """
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = "10000"


def set_nccl_defaults(*, one_machine: bool = False) -> None:
    """What torch's groups shall do, unless the environment says otherwise; to be called before the first is
    made. On one machine they meet on loopback alone.

    Errors are not handled there: its watchdog and monitor would end the process, where `executor.heartbeat`
    ends a task or names the rank. Exchanges of high priority need not wait for a kernel's last wave.
    """
    for name, value in _NCCL_DEFAULTS.items():
        os.environ.setdefault(name, value)
    for library in ("GLOO", "NCCL") if one_machine and sys.platform == "linux" else ():
        os.environ.setdefault(f"{library}_SOCKET_IFNAME", "lo")


_TORCHS_CACHE = "TORCHINDUCTOR_CACHE_DIR"


def set_torch_cache() -> None:
    """Before torch is imported, which then makes a folder for compiled code, and ends where it cannot."""
    given = os.environ.get(_TORCHS_CACHE)
    if not (made_folder(Path(given)) if given else temporary_folder()):
        os.environ[_TORCHS_CACHE] = str(_kept_code() or Path(__file__).parent)


def keep_compiled_code() -> None:
    """Has torch keep compiled kernels where they outlive a restart, unless the environment names a place; a
    UsageError where torch could compile nothing."""
    if temporary_folder() is None:
        raise UsageError("compile = True: no temporary folder; name one with TMPDIR", field="infer.compile")
    if kept := _kept_code():
        os.environ.setdefault(_TORCHS_CACHE, str(kept))


def _kept_code() -> Path | None:
    folder = cache_dir()
    return None if folder is None else made_folder(folder / "inductor")


def cache_dir(environment: Mapping[str, str] | None = None) -> Path | None:
    """Where small remembered facts live (hashes of weights, kernel timings): `CHITU_CACHE_DIR`, else
    `XDG_CACHE_HOME/chitu_diffusion`, else `~/.cache/chitu_diffusion`; None where none of them is absolute."""
    environment = os.environ if environment is None else environment
    own = environment.get("CHITU_CACHE_DIR")
    base = Path(environment.get("XDG_CACHE_HOME", ""))
    try:
        if own:
            return Path(expand_home(own))
        base = base if base.is_absolute() else Path.home() / ".cache"
    except RuntimeError:  # a user without a home, as in some containers
        return None
    return base / "chitu_diffusion" if base.is_absolute() else None
