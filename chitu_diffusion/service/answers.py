"""What clients are answered: videos in OpenAI's shape, and errors. Knows jobs; no SQL, no routes."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from chitu_diffusion.errors import ChituError, UsageError, WillNotFitError
from chitu_diffusion.service.jobs import Job, JobEvent, JobState, StoreError

STATUS_CODES = MappingProxyType(
    {
        "not_found": 404,
        "already_ended": 409,
        "not_ready": 409,
        "idempotency_conflict": 409,
        "lease_lost": 409,
        "queue_full": 429,
        "key_queue_full": 429,
        "store_down": 503,
    }
)
"""HTTP's, of a store's error."""
_STATUS = MappingProxyType({JobState.RUNNING: "in_progress", JobState.HELD: "in_progress"})
_RETRY_AFTER_S = 10.0


class ApiError(Exception):
    """An answer that is an error.

    Args:
        status: HTTP's.
        code: the word that clients may decide by.
        message: what and why, without paths, prompts or another library's text.
        param: the field at fault.
        next: what to do.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        param: str | None = None,
        next: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param
        self.next = next
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """As JSON values."""
        kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
        default = "server_error" if self.status >= 500 else "invalid_request_error"
        error = {"message": str(self), "type": kinds.get(self.status, default), "code": self.code}
        return {"error": error | {"param": self.param, "next": self.next}}


def retry_later(seconds: float) -> dict[str, str]:
    """Headers that tell when to ask again."""
    return {"retry-after": f"{max(1, round(seconds))}", "retry-after-ms": f"{round(1000 * seconds)}"}


def error_of(error: ChituError) -> ApiError:
    """The answer for an error that the package raised on purpose."""
    if isinstance(error, StoreError):
        status = STATUS_CODES[error.code]
        headers = retry_later(_RETRY_AFTER_S) if status in (429, 503) else {}
        if status == 409:
            headers = {"x-should-retry": "false"}
        said = "the database does not answer; try again later" if status == 503 else str(error)
        return ApiError(status, error.code, said, headers=headers)
    if isinstance(error, WillNotFitError):
        return ApiError(400, "will_not_fit", str(error), param="size")
    field = error.field if isinstance(error, UsageError) else None
    unknown = field is not None and (f"unknown field '{field}'" in str(error))
    return ApiError(400, "unknown_field" if unknown else "bad_value", str(error), param=field)


def status_of(job: Job) -> str:
    """The API's word for a job's state."""
    return _STATUS.get(job.state, job.state.value)


def video_of(job: Job, now: float, position: int | None = None, preview: int | None = None) -> dict[str, Any]:
    """A job as OpenAI's video object, with ours beside it.

    Args:
        now: by the store's clock.
        position: in the queue; None: it does not wait, or nobody asked.
        preview: the step of the newest preview; None: there is none.
    """
    resolved = job.resolved
    done = job.state is JobState.COMPLETED
    frames = resolved.get("num_frames") or 0
    fps = resolved.get("fps") or 1
    return {
        "id": job.id,
        "object": "video",
        "model": job.model,
        "status": status_of(job),
        "progress": 100 if done else min(99, int(100 * (job.fraction or 0))),
        "created_at": int(job.created_at),
        "completed_at": int(job.ended_at) if done and job.ended_at else None,
        "expires_at": int(job.expires_at) if job.expires_at else None,
        "size": f"{resolved.get('width')}x{resolved.get('height')}",
        "seconds": f"{frames / rate_number(fps):g}",
        "prompt": resolved.get("prompt"),
        "error": _error_of_job(job),
        "remixed_from_video_id": job.parent,
        "state": job.state.value,
        "stage": job.stage,
        "step": job.step,
        "steps": job.steps,
        "eta_s": None if job.eta_at is None else round(max(0.0, job.eta_at - now), 1),
        "queue_position": position,
        "priority": job.priority,
        "attempt": job.attempt,
        "resumed_from": next((saved.step for saved in job.checkpoints if saved.fence < job.fence), None),
        "cancel_requested": job.cancel_requested_at is not None,
        "notes": list(job.notes),
        "seed": job.seed,
        "num_frames": frames,
        "fps": fps,
        "metadata": job.request.get("metadata", {}),
        "seconds_by_stage": dict(job.seconds),
        "content_url": f"/v1/videos/{job.id}/content" if done else None,
        "preview_url": None if preview is None else _preview_url(job.id, preview),
        "request": {name: _asked(value) for name, value in job.request.items()},
    }


def data_of(event: JobEvent) -> dict[str, Any]:
    """What an event tells a client, beside its kind."""
    if event.kind == "preview":
        return {**event.data, "url": _preview_url(event.job, event.data["step"])}
    return dict(event.data)


def _preview_url(job_id: str, step: int) -> str:
    return f"/v1/videos/{job_id}/preview?step={step}"


def _asked(value: Any) -> Any:
    """A field of a request; of a file, which had a name of ours, its hash alone."""
    return {"sha256": value["sha256"]} if isinstance(value, Mapping) and "sha256" in value else value


def rate_number(fps: int | float | str) -> float:
    """Frames per second as a number: a fraction is stored as text."""
    above, _, below = str(fps).partition("/")
    return float(above) / float(below or 1)


def poll_after_ms(job: Job, now: float) -> int:
    """When a client that polls should ask again: a tenth of what is left, 0.5 s to 10 s; 1 s where nobody
    knows.
    """
    wait = 1.0 if job.eta_at is None else (job.eta_at - now) / 10
    return round(1000 * min(10.0, max(0.5, wait)))


def _error_of_job(job: Job) -> dict[str, Any] | None:
    failure = job.error
    if failure is None:
        return None
    return {
        "code": failure.code,
        "message": failure.message,
        "stage": failure.stage,
        "step": failure.step,
        "rank": failure.rank,
        "cause": failure.cause,
        "next": failure.next,
    }
