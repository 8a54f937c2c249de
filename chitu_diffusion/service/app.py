"""The HTTP application put together: routes, limits, and how an error becomes an answer."""

from __future__ import annotations

import errno
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, cast

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse, Response

from chitu_diffusion.errors import ChituError
from chitu_diffusion.service import documents, limits, operating, videos
from chitu_diffusion.service.answers import ApiError, error_of, retry_later
from chitu_diffusion.service.front import Front

logger = logging.getLogger(__name__)
_STORAGE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE, errno.EACCES, errno.EPERM)
"""What a folder says that takes no files now; others are faults of ours."""


class _Application(FastAPI):
    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is None:
            self.openapi_schema = documents.completed(super().openapi())
        return self.openapi_schema


def build_app(front: Front) -> FastAPI:
    """The application."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        front.watcher.start()
        yield
        await front.watcher.stop()

    app = _Application(
        title="chitu_diffusion",
        version=operating.version_of_package() or "unknown",
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
    )
    app.state.front = front
    app.add_middleware(limits.Guard, observe=front.metrics.observe)
    if front.settings.cors:
        app.add_middleware(
            CORSMiddleware, allow_origins=front.settings.cors, allow_methods=["*"], allow_headers=["*"]
        )
    for router in (operating.router, videos.router):
        app.router.routes.extend(router.routes)  # flat: the table that the tests walk
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(ChituError, _chitu_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(OSError, _storage)
    app.add_exception_handler(Exception, _fault)
    return app


def _answer(error: ApiError) -> Response:
    return JSONResponse(error.body(), error.status, error.headers)


async def _api_error(request: Request, error: Exception) -> Response:
    return _answer(cast(ApiError, error))


async def _chitu_error(request: Request, error: Exception) -> Response:
    return _answer(error_of(cast(ChituError, error)))


async def _http_error(request: Request, error: Exception) -> Response:
    found = cast(HTTPException, error)
    said: dict[int, Any] = {404: ("not_found", "there is nothing at this address")}
    said[405] = ("method", f"{request.method} is not taken here")
    code, message = said.get(found.status_code, ("bad_value", "the request cannot be read"))
    return _answer(ApiError(found.status_code, code, message, headers=found.headers))


async def _storage(request: Request, error: Exception) -> Response:
    if cast(OSError, error).errno not in _STORAGE:
        raise error
    logger.error("%s %s: %s", request.method, request.url.path, error)
    headers = retry_later(60)
    return _answer(
        ApiError(503, "storage", "the data folder takes no files now; try again later", headers=headers)
    )


async def _fault(request: Request, error: Exception) -> Response:
    logger.error("%s %s: %s", request.method, request.url.path, error, exc_info=error)
    return _answer(ApiError(500, "fault", "an unexpected fault; the server's log says more"))
