"""Stores that strangers can neither reach nor write into: values by key, where ranks meet.

`SocketStore` asks a `StoreServer` in the launcher over a socket that nobody else holds. `SignedStore` makes
any store safe to read, such as torch's, which listens on all interfaces: what has no valid code is not there.
Both are what torch's own process groups take. Knows keys and bytes; not what they mean.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import json
import secrets
import socket
import threading
import time
from datetime import timedelta
from typing import Any

import torch.distributed as dist

_PREFIX = "chitu/"
_CODE = hashlib.sha256().digest_size
_SHORTEST = 0.0005
_LONGEST = 0.02
_LONGEST_LINE = 1 << 26


class StoreServer:
    """The values, in the launcher. They live as long as it does.

    Attributes:
        secret: fresh, for those who hold an end of a socket.
    """

    def __init__(self) -> None:
        self.secret = secrets.token_hex(_CODE)
        self._values: dict[str, str] = {}
        self._unread: dict[socket.socket, bytes] = {}

    def connect(self) -> socket.socket:
        """A rank's end of a new pair; ours is to be watched for questions."""
        ours, theirs = socket.socketpair()
        ours.settimeout(1.0)  # nobody's full pipe shall keep the others
        self._unread[ours] = b""
        return theirs

    @property
    def connections(self) -> list[socket.socket]:
        """Our ends."""
        return list(self._unread)

    def close(self) -> None:
        """Let go of our ends, as a fork of this process must."""
        for connection in self._unread:
            connection.close()
        self._unread.clear()

    def answer(self, connection: socket.socket) -> bool:
        """Answer what has come over our end; False once the other is closed."""
        try:
            came = connection.recv(1 << 16)
            *lines, rest = (self._unread[connection] + came).split(b"\n")
            self._unread[connection] = rest
            if not came or len(rest) > _LONGEST_LINE:
                raise ConnectionError("closed")
            for line in lines:
                try:
                    mark, *question = json.loads(line)
                    answer = [mark, self._found(*question)]
                except (ValueError, TypeError):
                    continue  # cut by Ctrl+C in the middle; it is not waited for
                connection.sendall(json.dumps(answer).encode() + b"\n")
        except OSError:
            del self._unread[connection]
            connection.close()
            return False
        return True

    def _found(self, action: str, *given: Any) -> str | bool | int | None:
        if action == "secret":
            return self.secret
        if action == "check":
            return all(key in self._values for key in given)
        key = given[0]
        if action == "get":
            return self._values.get(key)
        if action == "delete":
            return self._values.pop(key, None) is not None
        if action == "add":
            return self._add(key, int(given[1]))
        self._values[key] = given[1]
        return True

    def _add(self, key: str, more: int) -> int:
        count = int(base64.b64decode(self._values.get(key, "")) or b"0") + more
        self._values[key] = base64.b64encode(b"%d" % count).decode()
        return count


class _PolledStore(dist.Store):
    """A store whose waiting is looking again, so that Ctrl+C is heard meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self._patience = 60.0

    def peek(self, key: str) -> bytes | None:
        """The value now; None without one."""
        raise NotImplementedError

    def set_timeout(self, timeout: timedelta) -> None:
        """How long `get` and `wait` wait where nobody says."""
        self._patience = timeout.total_seconds()

    def get(self, key: str) -> bytes:
        """The value, once there is one."""
        return self._wait([key], self._patience)[0]

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        """Until all have a value."""
        self._wait(keys, self._patience if timeout is None else timeout.total_seconds())

    def _wait(self, keys: list[str], seconds: float) -> list[bytes]:
        deadline = time.monotonic() + seconds
        pause = _SHORTEST
        found: dict[str, bytes] = {}
        while True:
            for key in keys:
                if key not in found and (value := self.peek(key)) is not None:
                    found[key] = value
            missing = [key for key in keys if key not in found]
            if not missing:
                return [found[key] for key in keys]
            if time.monotonic() > deadline:
                raise dist.DistStoreError(f"nobody has set {missing[0]} within {seconds:g} s")
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST)


class SocketStore(_PolledStore):
    """The launcher's values, over an end of its socket. Any thread may ask.

    Ctrl+C may cut a question short at any place: each answer bears its question's mark, and what bears
    another is passed over.

    Args:
        connection: from `StoreServer.connect`.
        answers_within: seconds after which the launcher is taken for gone.
    """

    def __init__(self, connection: socket.socket, answers_within: float) -> None:
        super().__init__()
        connection.settimeout(answers_within)
        self._connection = connection
        self._lock = threading.Lock()
        self._unread = b""
        self._gone: str | None = None

    def clone(self) -> SocketStore:
        """Itself: threads take turns."""
        return self

    def secret(self) -> bytes:
        """The launcher's, for its ranks."""
        return str(self._ask("secret")).encode()

    def set(self, key: str, value: str | bytes) -> None:
        """Torch's."""
        self._ask("set", key, base64.b64encode(_bytes(value)).decode())

    def peek(self, key: str) -> bytes | None:
        """The value now; None without one."""
        found = self._ask("get", key)
        return None if found is None else base64.b64decode(found)

    def check(self, keys: list[str]) -> bool:
        """Whether all have a value."""
        return bool(self._ask("check", *keys))

    def add(self, key: str, more: int) -> int:
        """Torch's counter."""
        return int(self._ask("add", key, more))

    def delete_key(self, key: str) -> bool:
        """Whether there was one."""
        return bool(self._ask("delete", key))

    def _ask(self, *question: str | int) -> Any:
        with self._lock:
            if self._gone is not None:
                raise dist.DistNetworkError(self._gone)
            mark = secrets.token_hex(8)
            try:
                self._connection.sendall(b"\n" + json.dumps([mark, *question]).encode() + b"\n")
                while True:
                    with contextlib.suppress(ValueError):
                        said, answer = json.loads(self._line())
                        if said == mark:
                            return answer
            except OSError as error:
                self._gone = f"the launcher does not answer: {error}"
                raise dist.DistNetworkError(self._gone) from None

    def _line(self) -> bytes:
        while b"\n" not in self._unread:
            came = self._connection.recv(1 << 16)
            if not came:
                raise ConnectionError("it has ended")
            self._unread += came
        line, _, self._unread = self._unread.partition(b"\n")
        return line


class SignedStore(_PolledStore):
    """Another store's values, each behind a code that only those who know the secret can make: HMAC-SHA256
    over key and value. Keys say whose word it is and the how-manieth, so that one cannot stand for another.

    Args:
        base: anybody may write into it; a connection of our own is made. Ours stand under "chitu/" (torch's
            store of prefixes would not keep a store in Python alive).
        secret: known to the ranks alone.
    """

    def __init__(self, base: dist.Store, secret: bytes) -> None:
        super().__init__()
        self._base: dist.Store = base.clone()  # type: ignore[attr-defined]
        self._base.set_timeout(timedelta(seconds=1))  # only ever asked for what is there
        self._key = secret
        self._standing: dict[str, bytes] = {}

    def clone(self) -> SignedStore:
        """The same store, by a connection of its own."""
        other = SignedStore(self._base, self._key)
        other._standing = self._standing
        return other

    def bind(self, words: bytes) -> None:
        """From now on only what was signed for these words counts: no group's words pass in another."""
        self._key = hmac.digest(self._key, words, "sha256")

    def mend(self) -> None:
        """Put our own values back where others have written over them."""
        for key, sealed in list(self._standing.items()):
            if self._sealed(key) != sealed:
                self._base.set(_PREFIX + key, sealed)  # type: ignore[arg-type]

    def set(self, key: str, value: str | bytes) -> None:
        """Torch's."""
        sealed = self._code(key, _bytes(value)) + _bytes(value)
        self._standing[key] = sealed
        self._base.set(_PREFIX + key, sealed)  # type: ignore[arg-type]

    def peek(self, key: str) -> bytes | None:
        """The value now; None without one, or with one that a stranger wrote."""
        sealed = self._sealed(key)
        if sealed is None or not hmac.compare_digest(sealed[:_CODE], self._code(key, sealed[_CODE:])):
            return None
        return sealed[_CODE:]

    def check(self, keys: list[str]) -> bool:
        """Whether all have a value."""
        return all(self.peek(key) is not None for key in keys)

    def add(self, key: str, more: int) -> int:
        """Torch's counter, which goes unsigned: nothing of ours counts, and torch does so only to wait."""
        return self._base.add(_PREFIX + key, more)

    def delete_key(self, key: str) -> bool:
        """Whether there was one."""
        self._standing.pop(key, None)
        return self._base.delete_key(_PREFIX + key)

    def _sealed(self, key: str) -> bytes | None:
        try:
            return bytes(self._base.get(_PREFIX + key)) if self._base.check([_PREFIX + key]) else None
        except dist.DistStoreError:
            return None  # somebody deleted it in between

    def _code(self, key: str, value: bytes) -> bytes:
        name = key.encode()
        return hmac.digest(self._key, len(name).to_bytes(8) + name + value, "sha256")


def _bytes(value: str | bytes) -> bytes:
    return value.encode() if isinstance(value, str) else bytes(value)
