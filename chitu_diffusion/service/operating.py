"""Routes beside the videos: is it up, what runs, which models, metrics, the page and its session."""

from __future__ import annotations

import base64
import hashlib
import html
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, Response, StreamingResponse

from chitu_diffusion.errors import ChituError
from chitu_diffusion.service import documents, streams
from chitu_diffusion.service.answers import ApiError, error_of
from chitu_diffusion.service.auth import COOKIE, LOCAL, Caller
from chitu_diffusion.service.bodies import discard, read_body
from chitu_diffusion.service.front import Front, Reader, front_of, needs
from chitu_diffusion.service.jobs import StoreDownError, WorkerInfo
from chitu_diffusion.service.limits import CONTENT_POLICY

router = APIRouter()
PAGE = Path(__file__).parent / "page" / "index.html"
_SESSION_S = 30 * 24 * 3600


@router.get("/", include_in_schema=False)
def page() -> Response:
    """The page, which is a client like any other."""
    return FileResponse(PAGE, media_type="text/html", headers={"cache-control": "no-cache", **_page_policy()})


@router.get("/health", **documents.HEALTH)
async def health() -> Response:
    """This process lives."""
    return JSONResponse({"status": "ok"})


@router.get("/ready", **documents.READY)
def ready(request: Request) -> Response:
    """Whether jobs would run: 200, or 503 with the reason."""
    front = front_of(request)
    reason = _why_not_ready(front)
    return JSONResponse({"ready": reason is None, "reason": reason}, 200 if reason is None else 503)


@router.get("/version", **documents.VERSION)
async def about() -> Response:
    """The package's version."""
    return JSONResponse({"version": version_of_package()})


@router.post("/session", **documents.SESSION)
async def open_session(request: Request) -> Response:
    """A page's session: {"key": "ck_..."} becomes a cookie that scripts cannot read."""
    front = front_of(request)
    front.auth.require_own_page(request)
    front.auth.require_try(request.client.host if request.client else "")
    fields, uploads = await read_body(request, front.inputs)
    discard(uploads)
    if not await run_in_threadpool(front.auth.has_keys):
        front.auth.require_local(request)
        return JSONResponse({"owner": LOCAL, "scopes": ["read", "submit"]})
    key = fields.get("key")
    caller = await run_in_threadpool(front.auth.caller_of, key if isinstance(key, str) else "")
    answer = JSONResponse({"owner": caller.owner, "scopes": sorted(caller.scopes)})
    secure = request.url.scheme == "https"
    answer.set_cookie(
        COOKIE, str(key), max_age=_SESSION_S, httponly=True, samesite="strict", secure=secure, path="/"
    )
    return answer


@router.delete("/session", **documents.CLOSED)
def close_session(request: Request, caller: Reader) -> Response:
    """Forget the cookie."""
    answer = JSONResponse({"closed": True})
    answer.delete_cookie(COOKIE, path="/")
    return answer


@router.get("/v1/models", **documents.MODELS)
def models(request: Request, caller: Reader) -> Response:
    """The models that this server makes videos with."""
    return JSONResponse({"object": "list", "data": [front_of(request).planner.defaults()]})


@router.get("/v1/models/{name:path}", **documents.MODEL)
def model(request: Request, caller: Reader, name: str) -> Response:
    """One of them, by name or alias."""
    planner = front_of(request).planner
    if name not in planner.models:
        raise ApiError(404, "not_found", "there is no such model here; GET /v1/models lists what there is")
    return JSONResponse(planner.defaults())


@router.get("/v1/status", **documents.STATUS)
def status(request: Request, caller: Reader) -> Response:
    """The queue and the workers."""
    front = front_of(request)
    now = front.store.now()
    oldest = front.store.oldest_queued_at()
    workers = [
        {
            "id": worker.id,
            "model": worker.model,
            "state": worker.state,
            "weights_sha256": worker.weights_sha256 or None,
            "fits": dict(worker.fits),
            "seen_s": round(now - worker.seen_at, 1),
        }
        for worker in front.store.workers.all()
    ]
    return JSONResponse(
        {
            "version": version_of_package(),
            "ready": _why_not_ready(front) is None,
            "reason": _why_not_ready(front),
            "jobs": {state.value: number for state, number in front.store.counts().items()},
            "oldest_queued_s": None if oldest is None else round(max(0.0, now - oldest), 1),
            "workers": workers,
            "owner": caller.owner,
            "scopes": sorted(caller.scopes),
        }
    )


@router.get("/v1/feed", **documents.FEED)
def feed(request: Request, caller: Reader) -> Response:
    """Changes of one's jobs, as server-sent events."""
    front = front_of(request)
    front.watcher.require_stream(caller.owner)
    stream = front.watcher.feed(caller.sees, caller.owner)
    return StreamingResponse(stream, media_type=streams.MEDIA_TYPE, headers=streams.HEADERS)


def _metrics_caller(request: Request) -> Caller | None:
    front = front_of(request)
    return None if front.settings.metrics_open else needs("metrics")(request)


@router.get("/metrics", include_in_schema=False)
def metrics(request: Request, caller: Annotated[Caller | None, Depends(_metrics_caller)]) -> Response:
    """For Prometheus."""
    text = front_of(request).metrics.text()
    return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")


@router.get("/openapi.json", include_in_schema=False)
def openapi(request: Request, caller: Reader) -> Response:
    """The interface, for machines."""
    document: dict[str, Any] = request.app.openapi()
    return JSONResponse(document)


@router.get("/docs", include_in_schema=False)
def docs(request: Request, caller: Reader) -> Response:
    """The interface, for people: a plain table, for nothing is fetched from elsewhere."""
    document = request.app.openapi()
    rows = [
        f"<tr><td><code>{method.upper()} {html.escape(path)}</code><td>{html.escape(about['description'])}"
        for path, methods in document["paths"].items()
        for method, about in methods.items()
    ]
    return HTMLResponse(
        "<!doctype html><meta charset=utf-8><title>chitu API</title><h1>chitu API</h1>"
        f"<p><a href=/openapi.json>openapi.json</a><table>{''.join(rows)}</table>"
    )


def _why_not_ready(front: Front) -> str | None:
    if front.draining.is_set():
        return "DRAINING"
    try:
        workers = front.workers()
        if front.is_disk_low():
            return "DISK_LOW"
    except ChituError as error:
        return "STORE_DOWN" if isinstance(error, StoreDownError) else error_of(error).code.upper()
    return _why_no_worker(workers)


def _why_no_worker(workers: tuple[WorkerInfo, ...]) -> str | None:
    states = {worker.state for worker in workers}
    if states & {"ready", "busy"}:
        return None
    return "STARTING" if "starting" in states else "NO_WORKER"


@cache
def _page_policy() -> dict[str, str]:
    """The page's one script and one style may run, by their hashes."""
    text = PAGE.read_bytes()
    policy = CONTENT_POLICY
    for tag in (b"script", b"style"):
        inside = text.partition(b"<%s>" % tag)[2].partition(b"</%s>" % tag)[0]
        digest = base64.b64encode(hashlib.sha256(inside).digest()).decode()
        policy += f"; {tag.decode()}-src 'self' 'sha256-{digest}'"
    return {"content-security-policy": policy}


@cache
def version_of_package() -> str | None:
    """None: it is not installed."""
    try:
        return version("chitu_diffusion")
    except PackageNotFoundError:
        return None
