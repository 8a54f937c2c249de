"""What OpenAPI says beside what FastAPI finds: bodies by form and JSON, answers, and an example of each."""

from __future__ import annotations

from typing import Any

from fastapi import Query
from starlette.responses import Response

from chitu_diffusion.service.dialect import FIELDS, INPUTS, MOST_METADATA
from chitu_diffusion.service.jobs import JobState

Schema = dict[str, Any]
_ID = "video_0123456789abcdef01234567"
_EXAMPLE = {"prompt": "a red ball rolls over grass", "size": "832x480", "seconds": 5, "seed": 42}
_WHOLE_TEXT = {"type": ["integer", "string", "null"], "pattern": r"^\s*[+-]?\d+(\.0*)?\s*$"}
_NUMBER_TEXT = {"type": ["number", "string", "null"]}
_TYPES: dict[str, Schema] = {
    "prompt": {"type": "string", "maxLength": 20000, "minLength": 1},
    "size": {"type": ["string", "null"], "pattern": r"^(\s*\d{1,6}\s*[xX*]\s*\d{1,6}\s*)?$"},
    "seconds": {**_NUMBER_TEXT, "exclusiveMinimum": 0, "maximum": 3600},
    "flexcache": {"type": ["string", "object", "null"], "examples": ["teacache"]},
    "cascade": {"type": ["array", "string", "null"], "items": {"type": "object"}},
    "lora": {"type": ["string", "object", "array", "null"], "examples": ["style:0.8"]},
    "metadata": {"type": ["object", "string", "null"], "maxProperties": MOST_METADATA},
    "guidance_scale": {"type": ["number", "string", "array", "null"]},
    "fps": {"type": ["number", "string", "null"]},
    "extra_params": {"type": ["object", "string", "null"]},
    "extra_body": {"type": ["object", "string", "null"]},
    "user": {},
    "quality": {},
}
_TEXTS = ("negative_prompt", "model", "recipe", "sampler_recipe", "webhook", "image_preprocessing")
_WHOLE = ("width", "height", "num_frames", "num_inference_steps", "seed", "priority", "hold_at_step", "n")
_FILES = ("input_reference", *INPUTS)


def _property(name: str, *, form: bool) -> Schema:
    if name in _FILES:
        data_url = {"type": ["string", "object", "null"], "description": "data:image/png;base64,..."}
        return {"type": "string", "format": "binary"} if form else data_url
    kinds = (
        {"type": ["string", "null"]} if name in _TEXTS else _WHOLE_TEXT if name in _WHOLE else _NUMBER_TEXT
    )
    return _TYPES.get(name, kinds)


def _fields(*, form: bool) -> Schema:
    properties = {name: _property(name, form=form) for name in FIELDS}
    return {"type": "object", "required": ["prompt"], "properties": properties, "additionalProperties": False}


def _object(**properties: Any) -> Schema:
    """All of them are there; a type's name, or a whole schema."""
    schemas = {
        name: {"type": kind} if isinstance(kind, str | list) else kind for name, kind in properties.items()
    }
    return {"type": "object", "required": list(properties), "properties": schemas}


_NUMBER = ["number", "null"]
_TEXT = ["string", "null"]
_INTEGER = ["integer", "null"]
_ERROR_EXAMPLE = {"message": "size = 7: use WIDTHxHEIGHT, such as 832x480", "type": "invalid_request_error"}
_ERROR = _object(error=_object(message="string", type="string", code="string", param=_TEXT, next=_TEXT))
_VIDEO = _object(
    id="string",
    object={"const": "video"},
    model="string",
    progress="integer",
    created_at="integer",
    status={"enum": ["queued", "in_progress", "completed", "failed", "cancelled"]},
    completed_at=_INTEGER,
    expires_at=_INTEGER,
    size="string",
    seconds="string",
    prompt=_TEXT,
    error=["object", "null"],
    remixed_from_video_id=_TEXT,
    state={"enum": [state.value for state in JobState]},
    stage=_TEXT,
    step=_INTEGER,
    steps=_INTEGER,
    eta_s=_NUMBER,
    queue_position=_INTEGER,
    priority="integer",
    attempt="integer",
    resumed_from=_INTEGER,
    cancel_requested="boolean",
    notes="array",
    seed=_INTEGER,
    num_frames="integer",
    fps=["number", "string"],
    metadata=["object", "null"],
    seconds_by_stage="object",
    content_url=_TEXT,
    preview_url=_TEXT,
    request="object",
)
_VIDEO_REF = {"$ref": "#/components/schemas/Video"}
_VIDEO_EXAMPLE: Schema = {
    "id": _ID,
    "object": "video",
    "model": "wan2.1-t2v-1.3b",
    "status": "in_progress",
    "progress": 42,
    "created_at": 1800000000,
    "completed_at": None,
    "expires_at": None,
    "size": "832x480",
    "seconds": "5.0625",
    "prompt": "a red ball rolls over grass",
    "error": None,
    "remixed_from_video_id": None,
    "state": "running",
    "stage": "denoising",
    "step": 21,
    "steps": 50,
    "eta_s": 33.0,
    "queue_position": None,
    "priority": 0,
    "attempt": 1,
    "resumed_from": None,
    "cancel_requested": False,
    "notes": ["5 s at 16 fps became 81 frames, 5.06 s"],
    "seed": 42,
    "num_frames": 81,
    "fps": 16,
    "metadata": {},
    "seconds_by_stage": {},
    "content_url": None,
    "preview_url": f"/v1/videos/{_ID}/preview?step=20",
    "request": _EXAMPLE,
}
_PAGE = _object(
    object={"const": "list"},
    data={"type": "array", "items": _VIDEO_REF},
    has_more="boolean",
    first_id=_TEXT,
    last_id=_TEXT,
)
_ESTIMATE = _object(
    object={"const": "video.estimate"},
    model="string",
    seconds="number",
    is_measured="boolean",
    fits=["boolean", "null"],
    tokens="integer",
    steps="integer",
    size="string",
    num_frames="integer",
    fps=["number", "string"],
    notes="array",
)
_ESTIMATE_EXAMPLE = {
    "object": "video.estimate",
    "model": "wan2.1-t2v-1.3b",
    "seconds": 61.5,
    "is_measured": True,
    "fits": None,
    "tokens": 32760,
    "steps": 50,
    "size": "832x480",
    "num_frames": 81,
    "fps": 16,
    "notes": [],
}
_MODEL = _object(
    id="string", object={"const": "model"}, owned_by="string", aliases="array", defaults="object"
)
_MODEL_EXAMPLE = {
    "id": "wan-tiny",
    "object": "model",
    "created": 0,
    "owned_by": "chitu",
    "aliases": [],
    "kind": "text to video",
    "takes_image": False,
    "needs_image": False,
    "defaults": {"size": "128x128", "num_frames": 33},
}
_STATUS_EXAMPLE = {
    "version": "0.1.0",
    "ready": True,
    "reason": None,
    "jobs": {"queued": 2, "running": 1},
    "oldest_queued_s": 3.2,
    "workers": [{"id": "gpu1-0", "model": "wan-tiny", "state": "busy", "seen_s": 0.4}],
    "owner": "ann",
    "scopes": ["read", "submit"],
}
_EVENT_EXAMPLE = {
    "n": 3,
    "at": 1800000003.5,
    "event": "step",
    "data": {"step": 1, "steps": 50, "eta_s": 60.1},
}
_STREAM_EXAMPLE = 'id: 3\nevent: step\ndata: {"step": 1, "steps": 50, "eta_s": 60.1}\n\n'
_CODES = {
    "400": ("a value that cannot be, naming it in `param`", "bad_value"),
    "401": ("no key", "no_key"),
    "403": ("the key may not", "scope"),
    "404": ("no such thing of yours", "not_found"),
    "405": ("another method is taken here", "method"),
    "408": ("the body was too slow", "slow_body"),
    "409": ("not in this state", "not_ready"),
    "410": ("its files are gone", "gone"),
    "413": ("too large", "too_large"),
    "415": ("neither form nor JSON", "bad_value"),
    "422": ("no JSON object", "bad_value"),
    "429": ("too many; `retry-after`", "queue_full"),
    "431": ("headers too large", "too_large"),
    "503": ("not now; `retry-after`", "store_down"),
}


def _error(said: str, code: str) -> Schema:
    example = {"error": {**_ERROR_EXAMPLE, "code": code, "param": None, "next": None}}
    return {"description": said, "content": _json({"$ref": "#/components/schemas/Error"}, example)}


def _json(schema: Schema, example: Any) -> Schema:
    return {"application/json": {"schema": schema, "example": example}}


def _body(schema: Schema, example: Schema, form: Schema | None = None) -> Schema:
    kinds = () if form is None else ("multipart/form-data", "application/x-www-form-urlencoded")
    forms = {kind: {"schema": form, "example": example} for kind in kinds}
    return {"required": True, "content": _json(schema, example) | forms}


def _route(said: str, content: Schema, body: Schema | None = None, **others: Schema) -> Schema:
    """What a route's decorator takes.

    Args:
        others: answers of this route alone, by `_` and the status.
    """
    found: Schema = {"200": {"description": said, "content": content}}
    found |= {status.removeprefix("_"): about for status, about in others.items()}
    extra = {} if body is None else {"requestBody": body}
    return {"responses": found, "response_class": Response, "openapi_extra": extra}


def completed(document: Schema) -> Schema:
    """FastAPI's document with what all routes share: schemas, and the errors that any may answer with."""
    errors = {status: _error(*about) for status, about in _CODES.items()}
    document["components"] = {"schemas": {"Error": _ERROR, "Video": _VIDEO}, "responses": errors}
    for operations in document["paths"].values():
        for operation in operations.values():
            own = operation["responses"]
            own.pop("422", None)  # FastAPI's, of parameters that it would check
            operation["responses"] = {
                code: {"$ref": f"#/components/responses/{code}"} for code in errors
            } | own
    return document


_UNCHANGED: Schema = {"_304": {"description": "not changed: the ETag is the same"}}
_ONE = _json(_VIDEO_REF, _VIDEO_EXAMPLE)
_CREATE_BODY = _body(_fields(form=False), _EXAMPLE, _fields(form=True))
_MP4 = {kind: {"schema": {"type": "string", "format": "binary"}} for kind in ("video/mp4", "image/webp")}
_FAILED: Schema = {"_500": _error("the video could not be made; `code` says why", "non_finite")}
CREATE = _route("the video, queued", _ONE, _CREATE_BODY)
SYNC = _route("the file", {"video/mp4": _MP4["video/mp4"]}, _CREATE_BODY, **_FAILED)
ESTIMATE = _route("seconds, and whether it fits", _json(_ESTIMATE, _ESTIMATE_EXAMPLE), _CREATE_BODY)
LIST = _route(
    "a page",
    _json(
        _PAGE,
        {"object": "list", "data": [_VIDEO_EXAMPLE], "has_more": False, "first_id": _ID, "last_id": _ID},
    ),
)
ONE = _route("the video", _ONE)
RETRIEVE = _route("the video", _ONE, **_UNCHANGED)
_DELETED = {"id": _ID, "object": "video.deleted", "deleted": True}
DELETE = _route("it is gone", _json(_object(id="string", object="string", deleted="boolean"), _DELETED))
CONTENT = _route(
    "the file",
    _MP4,
    _206={"description": "a range of it", "content": _MP4},
    _416={"description": "no such range"},
    **_UNCHANGED,
)
PREVIEW = _route("the strip", {"image/webp": _MP4["image/webp"]}, **_UNCHANGED)
EVENTS = _route(
    "events, each with its number",
    {
        "text/event-stream": {"example": _STREAM_EXAMPLE},
        **_json(
            _object(object={"const": "list"}, data="array"), {"object": "list", "data": [_EVENT_EXAMPLE]}
        ),
    },
    _204={"description": "it has ended, and all was told"},
)
FEED = _route("changes", {"text/event-stream": {"example": "event: job\ndata: {}\n\n"}})
_REMIX = {**_object(prompt=_TYPES["prompt"]), "additionalProperties": False}
REMIX = _route("the new video", _ONE, _body(_REMIX, {"prompt": "a blue ball rolls over grass"}, _REMIX))
_RANK = {
    **_object(priority={"type": ["integer", "string"], "minimum": -1000, "maximum": 1000}),
    "additionalProperties": False,
}
PRIORITY = _route("the video", _ONE, _body(_RANK, {"priority": 1}, _RANK))
MODELS = _route(
    "models",
    _json(
        _object(object={"const": "list"}, data={"type": "array", "items": _MODEL}),
        {"object": "list", "data": [_MODEL_EXAMPLE]},
    ),
)
MODEL = _route("the model", _json(_MODEL, _MODEL_EXAMPLE))
STATUS = _route(
    "queue and workers", _json(_object(ready="boolean", reason=_TEXT, jobs="object"), _STATUS_EXAMPLE)
)
HEALTH = _route("it lives", _json(_object(status="string"), {"status": "ok"}))
_READY = _object(ready="boolean", reason=_TEXT)
READY = _route(
    "jobs run",
    _json(_READY, {"ready": True, "reason": None}),
    _503={"description": "they do not", "content": _json(_READY, {"ready": False, "reason": "NO_WORKER"})},
)
VERSION = _route("the version", _json(_object(version=_TEXT), {"version": "0.1.0"}))
_KEY = {"type": "object", "properties": {"key": {"type": "string"}}}
_OPENED = _object(owner="string", scopes="array")
SESSION = _route(
    "a cookie",
    _json(_OPENED, {"owner": "ann", "scopes": ["read", "submit"]}),
    _body(_KEY, {"key": "ck_0123456789ab_SECRET"}, _KEY),
)
CLOSED = _route("no cookie", _json(_object(closed="boolean"), {"closed": True}))


def parameter(kind: str, **more: Any) -> Any:
    """A query's parameter that the route itself reads from text, so that its errors are like all others."""
    return Query(json_schema_extra={"type": kind, **more})
