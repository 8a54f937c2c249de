"""How ranks meet: in whose store, with what secret, and that all of them have come.

Whoever starts the ranks has the store: our launcher, torchrun, or a caller. Nothing in it is believed that
was not signed (`distributed.stores`). Knows variables and files of secrets; no task.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import shutil
import socket
import stat
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from chitu_diffusion.config import LEFTOVER_HINT, RankPlace, RankSettings, rank_variables
from chitu_diffusion.distributed.stores import SignedStore, SocketStore
from chitu_diffusion.errors import RankLostError, UsageError

logger = logging.getLogger(__name__)

_SECRET_BYTES = 16
"""At least; 32 random ones are what we make."""
_LONGEST_SECRET = 4096
_COUNT = 4
"""Bytes of a number of ranks."""
_SECRET = "chitu/secret"
_FOLDER = "chitu-ranks-"
_GLANCE = 0.002
_SAID_AFTER = 3.0
_HOW = (
    "make one with '(umask 077; openssl rand -hex 32 > ranks.secret)', copy it to every machine, and start "
    "there with 'CHITU_RANKS_SECRET_FILE=ranks.secret torchrun ...'"
)


def launchers_store(place: RankPlace, settings: RankSettings) -> tuple[dist.Store, bytes | None]:
    """Where whoever started this process lets ranks meet, and the secret that it gave them.

    Raises:
        UsageError: the environment does not say where.
        RankLostError: nobody is there.
    """
    found = rank_variables()
    if "CHITU_RANKS_SOCKET" in found:
        try:
            connection = socket.socket(fileno=os.dup(int(found["CHITU_RANKS_SOCKET"])))
        except (OSError, ValueError):
            told = "CHITU_RANKS_SOCKET is another process's"
            raise UsageError(f"{told}: 'unset CHITU_RANKS_SOCKET'; {LEFTOVER_HINT}", field="RANK") from None
        store = SocketStore(connection, settings.heartbeat_timeout)
        return store, store.secret()
    where = (found.get("MASTER_ADDR", ""), found.get("MASTER_PORT", ""))
    if not where[0] or not where[1].isdecimal() or int(where[1]) > 65535:
        raise UsageError(
            f"rank {place.rank} of {place.world}: MASTER_ADDR and MASTER_PORT must say where the ranks meet; "
            f"{LEFTOVER_HINT}",
            field="RANK",
        )
    port = int(where[1])
    agents = found.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    serves = place.rank == 0 and not agents
    if not serves:
        whom = "the launcher" if agents else f"rank 0 of {place.world}"
        _wait(
            lambda: "" if _listens(where[0], port) else f"{whom} at {where[0]}:{port}",
            place.rank,
            settings.timeout,
        )
    try:
        timeout = timedelta(seconds=settings.timeout)
        tcp = dist.TCPStore(where[0], port, is_master=serves, wait_for_workers=False, timeout=timeout)
    except dist.DistError as error:
        told = f"rank {place.rank} of {place.world} cannot meet the others at {where[0]}:{port}"
        raise RankLostError(f"{told} ({str(error).splitlines()[0]}); {LEFTOVER_HINT}") from None
    return dist.PrefixStore(f"attempt/{found.get('TORCHELASTIC_RESTART_COUNT', 0)}", tcp), None


def ranks_secret() -> bytes | None:
    """The user's, from the file or the variable.

    Raises:
        UsageError: a file that cannot be read, or that others can, or a secret that is too short.
    """
    found = rank_variables()
    file = found.get("CHITU_RANKS_SECRET_FILE")
    if file is not None:
        secret = _read_private(Path(file), links=True)
        if secret is None:
            told = f"CHITU_RANKS_SECRET_FILE={file}: no file of yours that is closed to others"
            raise UsageError(f"{told}; {_HOW}", field="CHITU_RANKS_SECRET_FILE")
    elif "CHITU_RANKS_SECRET" in found:
        secret = found["CHITU_RANKS_SECRET"].encode()
    else:
        return None
    secret = secret.strip()
    if len(secret) < _SECRET_BYTES:
        raise UsageError(
            f"the ranks' secret has {len(secret)} characters: use {_SECRET_BYTES} or more; {_HOW}",
            field="CHITU_RANKS_SECRET",
        )
    return secret


def check_secret(place: RankPlace, secret: bytes | None) -> None:
    """Ranks of several machines are not let to meet without one.

    Raises:
        UsageError: the line to type.
    """
    if secret is None and place.local_world not in (None, place.world):
        raise UsageError(
            f"rank {place.rank} of {place.world}, {place.local_world} of them on this machine: ranks of "
            f"several machines need a secret; {_HOW}; {LEFTOVER_HINT}",
            field="CHITU_RANKS_SECRET",
        )


def meet(rank: int, size: int, store: dist.Store, secret: bytes | None, timeout: float) -> SignedStore:
    """Wait until every rank has come, and agree with them on a key that no other group ever had.

    Args:
        rank, size: ours, and how many there are.
        store: where; strangers may write into it.
        secret: None: all are on one machine, and rank 0 hands one over by a private file.
        timeout: seconds, until those who did not come are named.

    Raises:
        UsageError: another process has this rank, or another rank another size.
        RankLostError: not all came.
    """
    own = size.to_bytes(_COUNT) + secrets.token_bytes(32)
    nonces = {rank: own}
    signed = None if secret is None else SignedStore(store, secret)
    folder = None
    if signed is None and rank == 0:
        _require_first(_handed_over(store), rank, size)
        folder, fresh = _write_private()
        signed = SignedStore(store, fresh)
    if signed is not None:
        _require_first(signed, rank, size)
        signed.set(f"nonce/{rank}", own)

    def missing() -> str:
        nonlocal signed
        if folder is not None:
            store.set(_SECRET, folder.name)
        if signed is None:
            signed = _handed_over(store)
            if signed is None:
                return f"rank 0 of {size}"
            _require_first(signed, rank, size)
            signed.set(f"nonce/{rank}", own)
        signed.mend()
        for other in range(size):
            if other not in nonces and (nonce := signed.peek(f"nonce/{other}")) is not None:
                nonces[other] = nonce  # kept: a stranger may write over it at once
                world = int.from_bytes(nonce[:_COUNT])
                if world != size:
                    said = sorted([(rank, size), (other, world)], reverse=True)
                    told = ", ".join(f"{count} on rank {whose}" for whose, count in said)
                    raise UsageError(f"world = {told}: give all ranks the same world", field="world")
        late = [str(other) for other in range(size) if other not in nonces]
        return f"rank{'s' if len(late) > 1 else ''} {', '.join(late)} of {size}" if late else ""

    try:
        _wait(missing, rank, timeout)
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
    assert signed is not None
    signed.bind(b"".join(nonces[other] for other in range(size)))
    return signed


def _require_first(signed: SignedStore | None, rank: int, size: int) -> None:
    if signed is not None and signed.peek(f"nonce/{rank}") is not None:
        raise UsageError(
            f"rank {rank} of {size} has come to this store before; give each process a rank of its own, and "
            "each "
            "engine a store: torch.distributed.PrefixStore(NAME, store)",
            field="rank",
        )


def _wait(missing: Callable[[], str], rank: int, timeout: float) -> None:
    """Until nobody is missing; says for whom."""
    found = rank_variables()
    hint = f"; {LEFTOVER_HINT}" if "RANK" in found and "CHITU_RANKS_SOCKET" not in found else ""
    began = time.monotonic()
    said = False
    while whom := missing():
        waited = time.monotonic() - began
        if waited > timeout:
            raise RankLostError(f"rank {rank} has waited {timeout:g} s for {whom}, in vain{hint}")
        if waited > _SAID_AFTER and not said:
            logger.warning("rank %d waits for %s, %g s at most%s", rank, whom, timeout, hint)
            said = True
        time.sleep(_GLANCE if waited < 1 else 10 * _GLANCE)


def _listens(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=1).close()
    except (OSError, ValueError):
        return False
    return True


def _write_private() -> tuple[Path, bytes]:
    """A folder that is closed to others, with a fresh secret in it."""
    folder = Path(tempfile.mkdtemp(prefix=_FOLDER))
    secret = secrets.token_hex(32).encode()
    with os.fdopen(os.open(folder / "secret", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(secret)
    return folder, secret


def _handed_over(store: dist.Store) -> SignedStore | None:
    """By rank 0's secret, from the folder that the store names: one that is ours and closed to others, and by
    which rank 0 has signed."""
    if not store.check([_SECRET]):
        return None
    name = store.get(_SECRET).decode(errors="replace")
    if not re.fullmatch(rf"{_FOLDER}\w+", name, re.ASCII):
        return None
    secret = _read_private(Path(tempfile.gettempdir(), name, "secret"))
    signed = None if secret is None else SignedStore(store, secret)
    return signed if signed is not None and signed.peek("nonce/0") is not None else None


def _read_private(file: Path, *, links: bool = False) -> bytes | None:
    """What is in a small file of ours that nobody else may read or write; None if it is no such file."""
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | (0 if links else os.O_NOFOLLOW))
    except (OSError, ValueError):
        return None
    with os.fdopen(descriptor, "rb") as opened:
        facts = os.fstat(descriptor)
        private = (
            stat.S_ISREG(facts.st_mode) and facts.st_uid in (os.getuid(), 0) and not facts.st_mode & 0o077
        )
        return opened.read(_LONGEST_SECRET) if private else None
