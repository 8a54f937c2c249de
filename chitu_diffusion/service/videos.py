"""`/v1/videos`: OpenAI's routes and ours beside them. Each asks the store and answers; it keeps nothing."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

from fastapi import APIRouter, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse

from chitu_diffusion.errors import UsageError
from chitu_diffusion.service import documents, streams
from chitu_diffusion.service.answers import ApiError, data_of, poll_after_ms, video_of
from chitu_diffusion.service.auth import Caller
from chitu_diffusion.service.bodies import FILE_FIELDS, discard, linked, read_body
from chitu_diffusion.service.dialect import Upload, VideoRequest, request_of_fields
from chitu_diffusion.service.documents import parameter
from chitu_diffusion.service.front import Front, Reader, Submitter, front_of
from chitu_diffusion.service.jobs import Artifact, Job, JobState
from chitu_diffusion.service.webhooks import is_private

router = APIRouter(prefix="/v1/videos")
RETRIED_WITHIN_S = 600.0
_LONGEST_KEY = 200
_WAIT_S = 0.25
_ENDINGS = {
    "video": ".mp4",
    "thumbnail": ".webp",
    "spritesheet": ".webp",
    "preview": ".webp",
    "partial": ".mp4",
}
_STATUSES = ("in_progress", *(state.value for state in JobState))


@router.post("", **documents.CREATE)
async def create(request: Request, caller: Submitter) -> Response:
    """Make a video: it is queued when this answers. `Idempotency-Key` makes it safe to repeat; `Prefer:
    wait=N` waits up to N seconds (60) for its end.
    """
    front = front_of(request)
    fields, uploads = await read_body(request, front.inputs)
    job = await run_in_threadpool(_submit, request, caller, uploads, lambda: request_of_fields(fields))
    wait = re.search(r"\bwait=(\d{1,3})\b", request.headers.get("prefer", ""))
    if wait is not None:
        job = await _ended(front, job, min(60.0, float(wait[1])))
    return await run_in_threadpool(_video, front, job)


@router.post("/estimate", **documents.ESTIMATE)
async def estimate(request: Request, caller: Reader) -> Response:
    """How long a request would take, and whether it fits; nothing is made."""
    front = front_of(request)
    fields, uploads = await read_body(request, front.inputs)

    def planned() -> dict[str, Any]:
        try:
            plan = front.planner.plan(request_of_fields(fields), uploads)
            return front.planner.estimate(plan, front.workers())
        finally:
            discard(uploads)

    return JSONResponse(await run_in_threadpool(planned))


@router.post("/sync", **documents.SYNC)
async def sync(request: Request, caller: Submitter) -> Response:
    """Make a video and answer with its bytes; whoever leaves before cancels it."""
    front = front_of(request)
    fields, uploads = await read_body(request, front.inputs)
    job = await run_in_threadpool(_submit, request, caller, uploads, lambda: request_of_fields(fields))
    while not job.state.ended:
        if await request.is_disconnected():
            await run_in_threadpool(front.store.cancel, job.id)
            return Response(status_code=408)
        job = await _ended(front, job, 1.0)
    if job.state is not JobState.COMPLETED:
        code = "cancelled" if job.error is None else job.error.code
        raise ApiError(500, code, "the video was not made" if job.error is None else job.error.message)
    return await run_in_threadpool(_file, request, front, job, "video")


@router.get("", **documents.LIST)
def listed(
    request: Request,
    caller: Reader,
    after: str | None = None,
    limit: Annotated[str, parameter("integer", minimum=1, maximum=100)] = "20",
    order: Annotated[str, parameter("string", enum=["asc", "desc"])] = "desc",
    status: Annotated[str | None, parameter("string", enum=list(_STATUSES))] = None,
) -> Response:
    """One's own videos, the newest first."""
    front = front_of(request)
    if not (limit.isascii() and limit.isdigit() and len(limit) < 4 and 1 <= int(limit) <= 100):
        raise UsageError(f"limit = {limit[:20]}: use 1 to 100", field="limit")
    if order not in ("asc", "desc"):
        raise UsageError(f"order = {order[:20]}: use asc or desc", field="order")
    page = front.store.jobs(
        caller.sees, after=after, limit=int(limit), newest_first=order == "desc", states=_states(status)
    )
    now = front.store.now()
    data = [video_of(job, now, preview=_preview_step(front, job)) for job in page.jobs]
    ends = {"first_id": data[0]["id"] if data else None, "last_id": data[-1]["id"] if data else None}
    return JSONResponse({"object": "list", "data": data, "has_more": page.has_more, **ends})


@router.get("/{video_id}", **documents.RETRIEVE)
def retrieve(request: Request, caller: Reader, video_id: str) -> Response:
    """A video's state; `openai-poll-after-ms` says when to ask again."""
    front = front_of(request)
    job = front.store.job(video_id, caller.sees)
    etag = f'"{job.events}.{job.priority}.{job.step}.{job.state}"'
    if request.headers.get("if-none-match") == etag:
        return Response(status_code=304, headers={"etag": etag})
    answer = _video(front, job)
    answer.headers["etag"] = etag
    return answer


@router.delete("/{video_id}", **documents.DELETE)
def delete(request: Request, caller: Submitter, video_id: str) -> Response:
    """Remove a video and its files; one that runs is cancelled first."""
    front = front_of(request)
    job = front.store.job(video_id, caller.sees)
    front.store.delete(video_id, caller.sees)
    discard(_uploads_of(front, job))  # one that runs is cancelled, whatever its worker finds
    return JSONResponse({"id": video_id, "object": "video.deleted", "deleted": True})


@router.head("/{video_id}/content", include_in_schema=False)
@router.get("/{video_id}/content", **documents.CONTENT)
def content(
    request: Request,
    caller: Reader,
    video_id: str,
    variant: Annotated[str, parameter("string", enum=list(_ENDINGS))] = "video",
) -> Response:
    """A finished video's file, or its thumbnail or spritesheet; ranges are answered."""
    front = front_of(request)
    if variant not in _ENDINGS:
        raise UsageError(f"variant = {variant[:40]}: use {', '.join(_ENDINGS)}", field="variant")
    return _file(request, front, front.store.job(video_id, caller.sees), variant)


@router.get("/{video_id}/preview", **documents.PREVIEW)
def preview(request: Request, caller: Reader, video_id: str) -> Response:
    """The newest strip of frames of a video that is being made (WebP); 404 until there is one."""
    front = front_of(request)
    job = front.store.job(video_id, caller.sees)
    newest = _newest_preview(front, job)
    if newest is None:
        raise ApiError(404, "not_found", "there is no preview yet")
    fence, step, file = newest
    etag = f'"{fence}-{step}"'
    if request.headers.get("if-none-match") == etag:
        return Response(status_code=304, headers={"etag": etag})
    try:
        picture = file.read_bytes()
    except FileNotFoundError:  # the video has ended just now
        raise ApiError(404, "not_found", "there is no preview any more") from None
    headers = {"etag": etag, "cache-control": "no-cache"}
    return Response(picture, media_type="image/webp", headers=headers)


@router.get("/{video_id}/events", **documents.EVENTS)
def events(
    request: Request,
    caller: Reader,
    video_id: str,
    after: Annotated[str, parameter("integer", minimum=0, maximum=10**9 - 1)] = "0",
) -> Response:
    """What has happened to a video, from an event on: as server-sent events (204 where none will come), or as
    JSON with `Accept: application/json`.
    """
    front = front_of(request)
    job = front.store.job(video_id, caller.sees)
    last = request.headers.get("last-event-id") or after
    if not (last.isascii() and last.isdigit() and len(last) < 10):
        raise UsageError(f"after = {last[:20]}: use the number of an event", field="after")
    if "application/json" in request.headers.get("accept", ""):
        rows = front.store.events(video_id, int(last))
        data = [{"n": row.n, "at": row.at, "event": row.kind, "data": data_of(row)} for row in rows]
        return JSONResponse({"object": "list", "data": data})
    if job.state.ended and int(last) >= job.events:
        return Response(status_code=204)
    front.watcher.require_stream(caller.owner)
    stream: AsyncIterator[str] = front.watcher.events(video_id, int(last), caller.owner)
    return StreamingResponse(stream, media_type=streams.MEDIA_TYPE, headers=streams.HEADERS)


@router.post("/{video_id}/cancel", **documents.ONE)
def cancel(request: Request, caller: Submitter, video_id: str) -> Response:
    """Stop a video: at once where it waits, else at its next step."""
    front = front_of(request)
    return _video(front, front.store.cancel(video_id, caller.sees))


@router.post("/{video_id}/continue", **documents.ONE)
def go_on(request: Request, caller: Submitter, video_id: str) -> Response:
    """Let a video that is held at a step go on."""
    front = front_of(request)
    return _video(front, front.store.release(video_id, caller.sees))


@router.post("/{video_id}/retry", **documents.ONE)
def retry(request: Request, caller: Submitter, video_id: str) -> Response:
    """Make a video of the same request and seed again, as a new job."""
    return _again(request, caller, video_id, None)


@router.post("/{video_id}/remix", **documents.REMIX)
async def remix(request: Request, caller: Submitter, video_id: str) -> Response:
    """Make a video again with another prompt, as a new job; the seed stays."""
    fields, uploads = await read_body(request, front_of(request).inputs)
    discard(uploads)
    prompt = fields.get("prompt")
    if set(fields) != {"prompt"} or not isinstance(prompt, str):
        raise UsageError("remix takes a prompt, and nothing else", field="prompt")
    return await run_in_threadpool(_again, request, caller, video_id, prompt)


@router.put("/{video_id}/priority", **documents.PRIORITY)
async def priority(request: Request, caller: Submitter, video_id: str) -> Response:
    """Move a video that waits; larger goes first. {"priority": n}"""
    front = front_of(request)
    fields, uploads = await read_body(request, front.inputs)
    discard(uploads)
    wanted = request_of_fields({"prompt": "-", "priority": fields.get("priority")}).priority
    if set(fields) != {"priority"}:
        raise UsageError("send priority, a whole number", field="priority")
    _check_priority(caller, wanted)
    job = await run_in_threadpool(front.store.set_priority, video_id, wanted, caller.sees)
    return await run_in_threadpool(_video, front, job)


def _again(request: Request, caller: Caller, video_id: str, prompt: str | None) -> Response:
    front = front_of(request)
    old = front.store.job(video_id, caller.sees)
    if prompt is None and not old.state.ended:
        raise ApiError(409, "not_ready", f"job {video_id} has not ended", headers={"x-should-retry": "false"})
    kept = _uploads_of(front, old)
    asked = {name: value for name, value in old.request.items() if name not in kept}
    wanted = request_of_fields({**asked, "seed": old.seed})
    wanted = wanted if prompt is None else wanted.with_prompt(prompt)
    uploads: dict[str, Upload] = {}
    try:
        for name, upload in kept.items():
            uploads[name] = linked(upload, front.inputs)
    except FileNotFoundError:  # swept, or its video was deleted just now
        discard(uploads)
        raise ApiError(410, "gone", "the files of that request are gone; send them anew") from None
    return _video(front, _submit(request, caller, uploads, lambda: wanted, parent=old.id))


def _submit(
    request: Request, caller: Caller, uploads: Mapping[str, Upload], parsed: Any, *, parent: str | None = None
) -> Job:
    """Check a request and queue it; its files go where there is no new job of them."""
    front = front_of(request)
    kept = False
    try:
        front.require_room()
        wanted: VideoRequest = parsed()
        _check_priority(caller, wanted.priority)
        _check_webhook(front, wanted.webhook)
        planned = front.planner.plan(wanted, uploads)
        front.planner.require_fit(planned, front.workers())
        new = front.planner.new_job(planned, wanted, uploads)
        new = replace(new, owner=caller.owner, parent=parent, **_repeated(request))
        submitted = front.store.submit(new, _limits(front, caller))
        kept = submitted.created
        return submitted.job
    finally:
        if not kept:
            discard(uploads)


def _limits(front: Front, caller: Caller) -> Any:
    per_key = front.settings.queue.per_key
    own = caller.limits.max_queued
    return replace(caller.limits, max_queued=per_key if own is None else own)


def _repeated(request: Request) -> dict[str, Any]:
    """How an earlier job may be meant: by the client's key, or a client that says that it tries again."""
    key = request.headers.get("idempotency-key")
    if key is not None and not (0 < len(key) <= _LONGEST_KEY and key.isprintable()):
        raise UsageError(f"Idempotency-Key: use 1 to {_LONGEST_KEY} letters", field="idempotency-key")
    count = request.headers.get("x-stainless-retry-count", "0")
    again = count.isascii() and count.isdigit() and int(count[:6]) > 0
    return {"idempotency_key": key, "retried_within_s": RETRIED_WITHIN_S if again else None}


def _check_priority(caller: Caller, wanted: int) -> None:
    if caller.max_priority is not None and wanted > caller.max_priority:
        raise ApiError(
            403,
            "scope",
            f"priority = {wanted}: this key may have {caller.max_priority} at most",
            param="priority",
        )


def _check_webhook(front: Front, url: str | None) -> None:
    if url is None:
        return
    if front.settings.webhooks.off:
        raise UsageError("webhook: this server sends none", field="webhook")
    try:
        parts = urlsplit(url)
        host = (parts.hostname or "") if parts.port != 0 else ""
        named = host if ":" in host else host.encode("idna").decode()
    except ValueError:
        raise UsageError("webhook: it is no URL", field="webhook") from None
    odd = not url.isprintable() or " " in url or "@" in parts.netloc
    if parts.scheme not in ("http", "https") or not host or odd:
        raise UsageError("webhook: use a URL such as https://example.com/hook", field="webhook")
    if is_private(named) and host not in front.settings.webhooks.allow:
        raise UsageError(
            "webhook: it goes to a private address; service.webhooks.allow names those", field="webhook"
        )


def _states(status: str | None) -> tuple[JobState, ...]:
    if status is None:
        return ()
    if status == "in_progress":
        return JobState.RUNNING, JobState.HELD
    if status not in _STATUSES:
        raise UsageError(f"status = {status[:40]}: use {', '.join(_STATUSES)}", field="status")
    return (JobState(status),)


def _video(front: Front, job: Job) -> JSONResponse:
    now = front.store.now()
    position = front.store.queue_position(job.id) if job.state is JobState.QUEUED else None
    headers = {} if job.state.ended else {"openai-poll-after-ms": str(poll_after_ms(job, now))}
    return JSONResponse(video_of(job, now, position, _preview_step(front, job)), headers=headers)


def _preview_step(front: Front, job: Job) -> int | None:
    newest = None if job.state.ended or not job.attempt else _newest_preview(front, job)
    return None if newest is None else newest[1]


def _newest_preview(front: Front, job: Job) -> tuple[int, int, Path] | None:
    """(fence, step, file)."""
    found = [
        (int(file.parent.name), int(file.stem.rpartition("-")[2]), file)
        for file in (front.data / "jobs" / job.id).glob("*/preview-*.webp")
        if file.parent.name.isdigit() and file.stem.rpartition("-")[2].isdigit()
    ]
    return max(found, default=None)


async def _ended(front: Front, job: Job, seconds: float) -> Job:
    """The job once it has ended, or as it is after a while."""
    for _ in range(round(seconds / _WAIT_S)):
        if job.state.ended or front.draining.is_set():
            break
        await asyncio.sleep(_WAIT_S)
        job = await run_in_threadpool(front.store.job, job.id)
    return job


def _file(request: Request, front: Front, job: Job, variant: str) -> Response:
    if not job.state.ended:
        raise ApiError(409, "not_ready", f"job {job.id} has not ended", headers={"x-should-retry": "false"})
    artifact = front.store.artifacts(job.id).get(variant)
    if artifact is None:
        done = job.state is JobState.COMPLETED
        said = f"job {job.id} is {job.state}, and has no {variant}"
        raise ApiError(
            404 if done else 409,
            "not_found" if done else "not_ready",
            said,
            headers={"x-should-retry": "false"},
        )
    path = (front.data / artifact.path).resolve()
    if not path.is_relative_to(front.data.resolve()) or not path.is_file():
        raise ApiError(410, "gone", f"the file of job {job.id} is gone; retry makes it again")
    return _sent(request, job, artifact, path)


def _sent(request: Request, job: Job, artifact: Artifact, path: Path) -> Response:
    etag = f'"{artifact.sha256}"'
    if request.headers.get("if-none-match") == etag:
        return Response(status_code=304, headers={"etag": etag})
    return FileResponse(
        path,
        media_type=artifact.media_type,
        filename=f"{job.id}{_ENDINGS[artifact.variant]}",
        content_disposition_type="inline",
        headers={"etag": etag, "cache-control": "private, no-cache"},
    )


def _uploads_of(front: Front, job: Job) -> dict[str, Upload]:
    """The files that came with a job's request, by the names that they came by."""
    given = {name: job.request.get(name) for name in FILE_FIELDS}
    return {
        name: Upload(str(front.inputs / about["file"]), about["sha256"])
        for name, about in given.items()
        if isinstance(about, Mapping)
    }
