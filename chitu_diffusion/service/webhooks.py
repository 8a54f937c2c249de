"""Tells clients that a job has ended: sends what lies in the store's outbox, signed by Standard Webhooks.
Dead or slow targets hold nothing up but their own deliveries. Any number of fronts may send.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import hmac
import ipaddress
import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

from chitu_diffusion.errors import UsageError
from chitu_diffusion.files.atomic import new_file
from chitu_diffusion.files.reading import read_text
from chitu_diffusion.service.jobs import Delivery, StoreDownError
from chitu_diffusion.service.settings import WebhookSettings
from chitu_diffusion.service.store import JobStore

logger = logging.getLogger(__name__)
_TIMEOUT_S = 5.0
_WHOLE_S = 10.0
"""A target that sends a byte now and then is slow, too."""
_LEASE_S = 60.0
_EVERY_S = 1.0
_AT_ONCE = 8
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_PREFIX = "whsec_"
SECRET_FILE = "webhook-secret"


class WebhookSender:
    """Sends deliveries.

    Args:
        secret: `whsec_...`, what they are signed with.
        count: called with ok, failed or given_up for each.
    """

    def __init__(
        self, store: JobStore, settings: WebhookSettings, secret: str, count: Callable[[str], None]
    ) -> None:
        self._store = store
        self._allow = frozenset(settings.allow)
        self._key = key_of_secret(secret)
        self._count = count

    def run(self, stop: threading.Event) -> None:
        """Send until `stop` is set."""
        with ThreadPoolExecutor(_AT_ONCE, "webhooks") as pool:
            while not stop.is_set():
                try:
                    due = self._store.outbox.claim(_AT_ONCE, _LEASE_S)
                    list(pool.map(self._deliver, due))
                except StoreDownError as error:
                    logger.warning("no webhooks were sent: %s", error)
                    due = ()
                if not due:
                    stop.wait(_EVERY_S)

    def _deliver(self, delivery: Delivery) -> None:
        status = self._send(delivery)
        if status is not None and 200 <= status < 300:
            self._store.outbox.done(delivery, status)
            self._count("ok")
            return
        again = self._store.outbox.failed(delivery, status)
        self._count("given_up" if again is None else "failed")
        logger.warning("webhook %s: %s", delivery.id, "no answer" if status is None else f"HTTP {status}")

    def _send(self, delivery: Delivery) -> int | None:
        """HTTP's status; None where there was no answer."""
        import httpx  # a tenth of the front's start

        try:
            parts = urlsplit(delivery.url)
            host = parts.hostname or ""
            address = self._address(host, parts.port or (443 if parts.scheme == "https" else 80))
            at = f"[{address}]" if ":" in address else address
            url = parts._replace(netloc=at if parts.port is None else f"{at}:{parts.port}").geturl()
            body = json.dumps(delivery.body, separators=(",", ":"), ensure_ascii=False)
            headers = signed(self._key, delivery.id, int(time.time()), body) | {"host": parts.netloc}
            return asyncio.run(_posted(url, body.encode(), headers, host))
        except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError) as error:
            logger.info("webhook %s: %s", delivery.id, type(error).__name__)
            return None

    def _address(self, host: str, port: int) -> str:
        """An address of the host, found and checked here, and then used: a name that points elsewhere a
        moment later changes nothing.
        """
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        addresses = [str(each[4][0]) for each in found]
        if host not in self._allow and any(map(is_private, addresses)):
            raise UsageError(f"webhooks do not go to private addresses; service.webhooks.allow names {host}")
        return addresses[0]


async def _posted(url: str, body: bytes, headers: dict[str, str], host: str) -> int:
    """HTTP's status.

    Raises:
        httpx.HTTPError, OSError: there was no answer in time.
    """
    import httpx

    async with (
        asyncio.timeout(_WHOLE_S),
        httpx.AsyncClient(timeout=_TIMEOUT_S, follow_redirects=False, trust_env=False) as client,
        client.stream(
            "POST", url, content=body, headers=headers, extensions={"sni_hostname": host}
        ) as answer,
    ):
        return answer.status_code  # what it says is not read


def signed(key: bytes, delivery_id: str, at: int, body: str) -> dict[str, str]:
    """Standard Webhooks' headers."""
    text = f"{delivery_id}.{at}.{body}".encode()
    signature = base64.b64encode(hmac.digest(key, text, hashlib.sha256)).decode()
    return {
        "content-type": "application/json",
        "user-agent": "chitu_diffusion",
        "webhook-id": delivery_id,
        "webhook-timestamp": str(at),
        "webhook-signature": f"v1,{signature}",
    }


def key_of_secret(secret: str) -> bytes:
    """The bytes of `whsec_BASE64`.

    Raises:
        UsageError: it is none.
    """
    try:
        key = base64.b64decode(secret.removeprefix(_PREFIX), validate=True)
    except (binascii.Error, ValueError):
        key = b""
    if len(key) < 16:
        raise UsageError(
            "service.webhooks.secret: use whsec_ and 24 bytes or more in base64",
            field="service.webhooks.secret",
        )
    return key


def kept_secret(data: Path, given: str | None) -> str:
    """The secret of settings, or that of the data folder, made the first time."""
    if given is not None:
        return given
    file = data / SECRET_FILE
    if not file.exists():
        with new_file(file) as part:
            part.write_text(
                _PREFIX + base64.b64encode(secrets.token_bytes(24)).decode() + "\n", encoding="utf-8"
            )
            os.chmod(part, 0o600)
    return read_text(file).strip()


def is_private(host: str) -> bool:
    """Whether an address, in any way that a resolver reads (127.1), is of no public network, or a name this
    machine's own; other names are asked when something is sent.
    """
    name = host.lower().rstrip(".")
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(name.partition("%")[0])
    except ValueError:
        try:
            address = ipaddress.ip_address(socket.inet_aton(name))
        except (OSError, UnicodeError):
            return False
    return not all(each.is_global for each in (address, *_inside(address)))


def _inside(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> list[ipaddress.IPv4Address]:
    """The IPv4 addresses that packets to an IPv6 address go to: mapped, 6to4, Teredo, NAT64."""
    if isinstance(address, ipaddress.IPv4Address):
        return []
    found = [address.ipv4_mapped, address.sixtofour, *(address.teredo or ())]
    if address in _NAT64:
        found.append(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
    return [each for each in found if each is not None]
