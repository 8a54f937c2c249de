"""What stands between the network and the routes: sizes of bodies, safe headers, and times by route."""

from __future__ import annotations

import time
from collections.abc import Callable

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from chitu_diffusion.service.answers import ApiError
from chitu_diffusion.service.bodies import MOST_BODY, MOST_UPLOAD

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
            self._observe(path, status[0], time.monotonic() - began)


def too_large(most: int) -> ApiError:
    """413."""
    return ApiError(413, "too_large", f"the body is larger than {most} bytes; send less")
