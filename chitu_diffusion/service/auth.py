"""Who asks, and what they may: keys with scopes, the page's session, and pages of other sites kept out.

Knows keys and headers; no routes. A key is `ck_ID_SECRET`; the store has a hash of it.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import secrets
import threading
import time
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from starlette.requests import Request

from chitu_diffusion.errors import UsageError
from chitu_diffusion.service.answers import ApiError, retry_later
from chitu_diffusion.service.jobs import ApiKey, OwnerLimits
from chitu_diffusion.service.store import JobStore

SCOPES = ("read", "submit", "metrics", "admin")
"""admin may all, for every owner's jobs."""
COOKIE = "chitu_session"
LOCAL = "local"
"""The owner of jobs where there are no keys."""
_SAFE = ("GET", "HEAD", "OPTIONS")
_KNOWN_S = 1.0
_USED_S = 60.0
_TRIES = 5
_TRY_S = 60.0


@dataclass(frozen=True)
class Caller:
    """Who asks.

    Attributes:
        owner: whose jobs they are.
        limits: of the owner.
        max_priority: the highest that jobs may have; None: any.
    """

    owner: str
    scopes: frozenset[str]
    limits: OwnerLimits = field(default_factory=OwnerLimits)
    max_priority: int | None = None
    key_id: str = ""

    @property
    def sees(self) -> str | None:
        """The owner whose jobs are seen; None: everyone's."""
        return None if "admin" in self.scopes and self.key_id else self.owner


def make_key(
    owner: str,
    name: str,
    scopes: Collection[str] = ("read", "submit"),
    limits: OwnerLimits | None = None,
    max_priority: int = 0,
) -> tuple[ApiKey, str]:
    """A new key's row, and the key itself, which nobody can read from it.

    Raises:
        UsageError: an unknown scope, or none; no name or owner.
    """
    if not (owner.strip() and name.strip()):
        raise UsageError("a key needs a name, and its owner one; use letters", field="name")
    if not scopes:
        raise UsageError(f"a key without scopes opens nothing; use {', '.join(SCOPES)}", field="scopes")
    for scope in scopes:
        if scope not in SCOPES:
            raise UsageError(f"scope {scope!r}: use {', '.join(SCOPES)}", field="scopes")
    key_id = secrets.token_hex(6)
    secret = secrets.token_urlsafe(32)
    row = ApiKey(key_id, owner, name, _hash(secret), tuple(scopes), limits or OwnerLimits(), max_priority)
    return row, f"ck_{key_id}_{secret}"


def row_of_key(text: str, owner: str, scopes: Collection[str]) -> ApiKey:
    """The row of a key that was made elsewhere.

    Raises:
        UsageError: it is no key.
    """
    key_id, secret = _parts(text)
    if len(secret) < 20 or not key_id.isalnum():
        raise UsageError(
            "a key is ck_ID_SECRET, with a secret of 20 letters or more; 'chitu keys add' makes one"
        )
    return ApiKey(key_id, owner, "file", _hash(secret), tuple(scopes))


class Authenticator:
    """Finds out who asks. While the store has no key at all, whoever comes over loopback may all.

    Args:
        cors: origins whose pages may call.
    """

    def __init__(self, store: JobStore, cors: Collection[str] = ()) -> None:
        self._store = store
        self._cors = frozenset(cors)
        self._lock = threading.Lock()
        self._asked_at = float("-inf")
        self._has_keys = False
        self._used: dict[str, float] = {}
        self._tries: dict[str, deque[float]] = {}

    def has_keys(self) -> bool:
        """Whether a key is needed; asked of the store once a second. A revoked key counts, too."""
        with self._lock:
            if not self._has_keys and time.monotonic() - self._asked_at > _KNOWN_S:
                self._has_keys = bool(self._store.keys.all())
                self._asked_at = time.monotonic()
            return self._has_keys

    def caller(self, request: Request, scope: str) -> Caller:
        """Who asks for something of a scope.

        Raises:
            ApiError: 401 or 403.
        """
        if not self.has_keys():
            self.require_local(request)
            return Caller(LOCAL, frozenset(SCOPES))
        scheme, _, bearer = request.headers.get("authorization", "").partition(" ")
        cookie = request.cookies.get(COOKIE)
        text = bearer.strip() if scheme.lower() == "bearer" else cookie or ""
        if not bearer and cookie and request.method not in _SAFE:
            self._require_same_origin(request)
        caller = self.caller_of(text)
        if not caller.scopes & {scope, "admin"}:
            raise ApiError(403, "scope", f"this key may not {scope}", next="use a key with that scope")
        return caller

    def caller_of(self, text: str) -> Caller:
        """Whose key it is.

        Raises:
            ApiError: 401: nobody's, or revoked.
        """
        key_id, secret = _parts(text)
        key = self._store.keys.get(key_id) if key_id else None
        expected = key.sha256 if key is not None else _hash("")
        if not hmac.compare_digest(_hash(secret), expected) or key is None or key.revoked_at is not None:
            said = "no key" if not text else "no such key, or it was revoked"
            raise ApiError(
                401,
                "no_key",
                said,
                next="send Authorization: Bearer ck_...; 'chitu keys add' makes a key",
                headers={"www-authenticate": "Bearer"},
            )
        self._note_use(key.id)
        scopes = frozenset(key.scopes)
        return Caller(key.owner, scopes, key.limits, None if "admin" in scopes else key.max_priority, key.id)

    def require_local(self, request: Request) -> None:
        """Without keys, a request must be for a loopback name (a page whose name was turned to 127.0.0.1
        sends its own), and of no other site's page.

        Raises:
            ApiError: 403.
        """
        host = _host_of(request)
        if not is_loopback(host):
            raise ApiError(
                403,
                "host",
                "without keys this server answers to localhost and 127.0.0.1 alone",
                next="'chitu keys add NAME' makes a key, with which any name may be used",
            )
        self.require_own_page(request)

    def require_own_page(self, request: Request) -> None:
        """A page that asks must be of this server; programs say nothing of pages.

        Raises:
            ApiError: 403.
        """
        if request.headers.get("sec-fetch-site") == "cross-site" or request.headers.get("origin"):
            self._require_same_origin(request)

    def _require_same_origin(self, request: Request) -> None:
        origin = request.headers.get("origin", "")
        own = origin and _netloc(origin) == request.headers.get("host", "")
        if not own and origin not in self._cors:
            raise ApiError(403, "origin", "a page of another site may not do this")

    def require_try(self, address: str) -> None:
        """Count a try to open a session; five a minute an address.

        Raises:
            ApiError: 429.
        """
        now = time.monotonic()
        with self._lock:
            self._tries = {who: tries for who, tries in self._tries.items() if tries[-1] > now - _TRY_S}
            tries = self._tries.setdefault(address, deque(maxlen=_TRIES))
            if len(tries) == _TRIES and tries[0] > now - _TRY_S:
                raise ApiError(429, "rate", "too many tries", headers=retry_later(_TRY_S - (now - tries[0])))
            tries.append(now)

    def _note_use(self, key_id: str) -> None:
        """At most once a minute a key: it is a write."""
        with self._lock:
            if time.monotonic() - self._used.get(key_id, float("-inf")) < _USED_S:
                return
            self._used[key_id] = time.monotonic()
        self._store.keys.touch(key_id)


def is_loopback(host: str) -> bool:
    """Whether a name or address is this machine's own alone."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _host_of(request: Request) -> str:
    """The name that a request is for; empty where its Host is none, or two things at once."""
    netloc = request.headers.get("host", "")
    if len(request.headers.getlist("host")) != 1 or _netloc(f"//{netloc}") != netloc or "@" in netloc:
        return ""
    return urlsplit(f"//{netloc}").hostname or ""


def _netloc(url: str) -> str | None:
    """None: it is no URL."""
    try:
        return urlsplit(url).netloc
    except ValueError:
        return None


def _parts(text: str) -> tuple[str, str]:
    """(id, secret) of `ck_ID_SECRET`; empty texts for anything else."""
    head, _, rest = text.partition("_")
    key_id, _, secret = rest.partition("_")
    return (key_id, secret) if head == "ck" and len(text) <= 300 else ("", "")


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()
