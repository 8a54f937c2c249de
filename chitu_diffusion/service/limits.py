"""What stands between the network and the routes: sizes of bodies, safe headers, and times by route."""

from __future__ import annotations

import logging
import re
import secrets
import time
from collections.abc import Callable

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from chitu_diffusion.service.answers import ApiError
from chitu_diffusion.service.bodies import MOST_BODY, MOST_UPLOAD
from chitu_diffusion.service.logs import logged_about

logger = logging.getLogger(__name__)
_ID = re.compile(r"video_[0-9a-f]{24}")

CONTENT_POLICY = (
    "default-src 'self'; img-src 'self' blob: data:; media-src 'self' blob:; frame-ancestors 'none'; "
    "base-uri 'none'; form-action 'self'; object-src 'none'"
)
"""Nothing from elsewhere, and no script or style inside a document, but those whose hashes are added."""
MOST_HEADERS = 16 * 1024
HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "x-frame-options": "DENY",
    "cross-origin-resource-policy": "same-origin",
    "content-security-policy": CONTENT_POLICY,
}
Observe = Callable[[str, int, float], None]


class Guard:
    """ASGI middleware.

    Args:
        observe: called with route, status and seconds of each answer.
    """

    def __init__(self, app: ASGIApp, observe: Observe) -> None:
        self._app = app
        self._observe = observe

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = secrets.token_hex(8)
        with logged_about(request=request):
            await self._answer(scope, receive, send, request)

    async def _answer(self, scope: Scope, receive: Receive, send: Send, request: str) -> None:
        began = time.monotonic()
        status = [500]
        headers = Headers(scope=scope)
        large = headers.get("content-type", "").startswith(("multipart/", "application/json"))
        most = MOST_UPLOAD if large and scope["path"].startswith("/v1/videos") else MOST_BODY
        seen = [0]

        async def counted() -> Message:
            message = await receive()
            seen[0] += len(message.get("body", b""))
            if seen[0] > most:
                raise too_large(most)
            return message

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                status[0] = message["status"]
                found = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    found.setdefault(name, value)
                found["x-request-id"] = request
                if scope["path"].startswith("/v1/"):
                    found.setdefault("cache-control", "no-store")
            await send(message)

        try:
            length = headers.get("content-length", "")
            error = None
            if sum(len(name) + len(value) for name, value in scope["headers"]) > MOST_HEADERS:
                error = ApiError(431, "too_large", f"the headers are larger than {MOST_HEADERS} bytes")
            elif length.isdigit() and int(length[:20]) > most:
                error = too_large(most)
            if error is not None:
                await JSONResponse(error.body(), error.status)(scope, receive, with_headers)
            else:
                await self._app(scope, counted, with_headers)
        finally:
            route = scope.get("route")
            path = "other" if route is None else str(route.path)
            seconds = time.monotonic() - began
            self._observe(path, status[0], seconds)
            video = (scope.get("path_params") or {}).get("video_id", "")
            with logged_about(job=str(video) if _ID.fullmatch(str(video)) else None):
                logger.info("%s %s: %d in %.3f s", scope["method"], path, status[0], seconds)


def too_large(most: int) -> ApiError:
    """413."""
    return ApiError(413, "too_large", f"the body is larger than {most} bytes; send less")
