"""The service's settings (`service.*`), beside the engine's in `config.py`, which knows no service."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator

from chitu_diffusion.config import EngineConfig, Settings, load_config
from chitu_diffusion.errors import UsageError
from chitu_diffusion.files.places import expand_home, make_folder
from chitu_diffusion.files.reading import cause

if TYPE_CHECKING:
    from chitu_diffusion.service.store import JobStore

DATABASE_FILE = "chitu.db"
"""SQLite's, in the data folder."""


class QueueSettings(Settings):
    """How much may wait, and for how long."""

    max: int = Field(1000, ge=1, description="jobs that wait, of all owners")
    per_key: int = Field(100, ge=1, description="jobs that wait, of one owner")
    ttl_s: float = Field(86400, gt=0, description="a job that waited this long, or was held this long, ends")


class PreviewSettings(Settings):
    """The strip of frames shown while a job runs."""

    every_s: float = Field(2, ge=0, description="seconds between previews, at least; 0 makes none")
    frames: int = Field(4, ge=1, le=16, description="frames in the strip")


class RecycleSettings(Settings):
    """When a worker that has no job is replaced by a new one."""

    jobs: int = Field(0, ge=0, description="after so many jobs; 0: whatever their number")
    grown_gb: float = Field(
        4, ge=0, description="when its main memory grew by this beyond its first job's; 0: never"
    )


class WebhookSettings(Settings):
    """Who is told that a job has ended."""

    off: bool = Field(False, description="refuse webhooks")
    allow: tuple[str, ...] = Field((), description="private hosts that webhooks may go to")
    secret: str | None = Field(
        None, description="what they are signed with (whsec_...); None makes one, in DATA/webhook-secret"
    )


class LogSettings(Settings):
    """What front, supervisors and workers write to stderr."""

    format: Literal["text", "json"] = Field("text", description="text, or a JSON object a line")
    level: Literal["debug", "info", "warning", "error"] = Field(
        "warning", description="info: also each answer, claim and end of a job"
    )


class ServiceConfig(Settings):
    """The whole tree of `chitu serve` and `chitu worker`."""

    host: str = Field("127.0.0.1", description="address to listen on; others than loopback need a key")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on")
    data: str = Field("chitu-data", description="folder of the jobs' files, and of SQLite's database")
    store: str | None = Field(None, description="database URL; None is SQLite's DATA/chitu.db")
    store_file: str | None = Field(None, description="file that holds the database URL, in place of `store`")
    workers: int = Field(1, ge=0, description="workers beside this front; 0: they run elsewhere")
    gpus_per_worker: int = Field(0, ge=0, description="GPUs of each worker; 0 is one, or the CPU")
    lease_s: float = Field(30, gt=0, description="a worker unheard of for this long loses its job")
    beat_s: float = Field(5, gt=0, description="seconds between a lease's heartbeats")
    retention_s: float = Field(604800, gt=0, description="an ended job and its files are kept this long")
    drain_s: float = Field(60, ge=0, description="seconds that running jobs may take to park on SIGTERM")
    queue: QueueSettings = Field(default_factory=QueueSettings)
    preview: PreviewSettings = Field(default_factory=PreviewSettings)
    recycle: RecycleSettings = Field(default_factory=RecycleSettings)
    webhooks: WebhookSettings = Field(default_factory=WebhookSettings)
    logs: LogSettings = Field(default_factory=LogSettings)
    loras: str | None = Field(None, description="folder of the adapters that requests may name")
    min_free_gb: float = Field(2, ge=0, description="jobs are refused where the disk has less left")
    metrics_open: bool = Field(False, description="/metrics needs no key")
    cors: tuple[str, ...] = Field((), description="origins whose pages may call; none by default")
    replicate_dialect: bool = Field(False, description="also answer in Replicate's form")

    @field_validator("data", "loras", "store_file")
    @classmethod
    def _with_home(cls, folder: str | None) -> str | None:
        return expand_home(folder)

    def store_url(self) -> str:
        """The database's URL for SQLAlchemy.

        Raises:
            UsageError: `store` and `store_file` are both there, or the file cannot be read or holds nothing.
        """
        if self.store_file is None:
            return self.store or f"sqlite:///{self.data}/{DATABASE_FILE}"
        if self.store is not None:
            raise UsageError("service.store and service.store_file are both set; use one", field="store_file")
        try:
            url = Path(self.store_file).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"store_file = {self.store_file}: {cause(error)}", field="store_file") from error
        if not url:
            raise UsageError(
                f"store_file = {self.store_file}: it is empty; write the URL", field="store_file"
            )
        return url


class ServeConfig(EngineConfig):
    """The engine's settings and the service's, as one tree: `[service]` in a file, `CHITU_SERVICE__PORT`."""

    service: ServiceConfig = Field(default_factory=ServiceConfig)


def load_service(
    file: str | Path | None = None,
    flags: Mapping[str, Any] | None = None,
    environment: Mapping[str, str] | None = None,
) -> tuple[ServiceConfig, EngineConfig]:
    """Settings of the service and of its engine, from file, environment and flags; see `load_config`."""
    config, _ = load_config(file, flags, environment, ServeConfig)
    if not isinstance(config, ServeConfig):
        raise TypeError(f"load_config gave a {type(config).__name__}")
    return config.service, EngineConfig(**config.model_dump(exclude={"service"}))


def store_of(settings: ServiceConfig) -> JobStore:
    """The store that settings name; the data folder is made where SQLite's database lies in it.

    Raises:
        UsageError: the folder cannot be made or written to.
        SchemaError, StoreDownError: see `open_store`.
    """
    from chitu_diffusion.service.store import open_store

    if settings.store is None and settings.store_file is None:
        make_folder("service.data", Path(settings.data))
    return open_store(settings.store_url(), most_queued=settings.queue.max, retention_s=settings.retention_s)
