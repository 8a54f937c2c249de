"""Ends and removes what is over: jobs that waited too long, rows that expired, folders that no row names.

Any process may do it at any time, several at once. Knows the folders DATA/jobs/ID/FENCE; no workers.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from chitu_diffusion.service.settings import ServiceConfig
from chitu_diffusion.service.store import JobStore

logger = logging.getLogger(__name__)
_ASKED_AT_ONCE = 500


def jobs_folder(data: str | Path) -> Path:
    """Where the folders of jobs lie: DATA/jobs."""
    return Path(data) / "jobs"


def sweep(settings: ServiceConfig, store: JobStore) -> None:
    """Once: first the rows, then the folders. A folder that cannot be removed is left for the next time.

    Raises:
        StoreDownError
    """
    store.sweep(queue_ttl_s=settings.queue.ttl_s)
    root = jobs_folder(settings.data)
    try:
        folders = [entry for entry in root.iterdir() if entry.is_dir()]
    except FileNotFoundError:
        return
    for first in range(0, len(folders), _ASKED_AT_ONCE):
        some = folders[first : first + _ASKED_AT_ONCE]
        listed = {folder: _fences(folder) for folder in some}  # before the store is asked: see live_folders
        live = store.live_folders([folder.name for folder in some])
        for folder, fences in listed.items():
            if folder.name not in live:
                _remove(folder)
                continue
            for fence in fences - live[folder.name]:
                _remove(folder / str(fence))


def _fences(folder: Path) -> set[int]:
    """Those that have a folder; whatever else lies there goes with the job."""
    try:
        return {
            int(entry.name) for entry in folder.iterdir() if entry.name.isascii() and entry.name.isdigit()
        }
    except OSError:
        return set()


def _remove(folder: Path) -> None:
    try:
        shutil.rmtree(folder)
    except OSError as error:
        logger.warning("%s cannot be removed now: %s", folder.name, error.strerror or error)
