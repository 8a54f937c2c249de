"""What OpenAPI says of requests beside what FastAPI finds: bodies by form and JSON, answers, and examples."""

from __future__ import annotations

from typing import Any

from chitu_diffusion.service.dialect import FIELDS, INPUTS

Schema = dict[str, Any]
_EXAMPLE = {"prompt": "a red ball rolls over grass", "size": "832x480", "seconds": 5, "seed": 42}
_TYPES: dict[str, Schema] = {
    "prompt": {"type": "string", "maxLength": 20000},
    "size": {"type": "string", "pattern": r"^\d+x\d+$", "example": "832x480"},
    "seconds": {"type": ["number", "string"], "example": 5},
    "flexcache": {"type": ["string", "object"], "example": "teacache"},
    "cascade": {"type": "array", "items": {"type": "object"}},
    "lora": {"type": ["string", "object", "array"], "example": "style:0.8"},
    "metadata": {"type": "object", "maxProperties": 16},
    "guidance_scale": {"type": ["number", "array"]},
    "fps": {"type": ["number", "string"]},
    "extra_params": {"type": "object"},
    "extra_body": {"type": "object"},
}
_TEXTS = (
    "negative_prompt",
    "model",
    "recipe",
    "sampler_recipe",
    "webhook",
    "image_preprocessing",
    "user",
    "quality",
)
_WHOLE = ("width", "height", "num_frames", "num_inference_steps", "seed", "priority", "hold_at_step", "n")
_FILES = ("input_reference", *INPUTS)


def _property(name: str, *, form: bool) -> Schema:
    if name in _FILES:
        data_url = {"type": "string", "description": "data:image/png;base64,..."}
        return {"type": "string", "format": "binary"} if form else data_url
    kind = "string" if name in _TEXTS else "integer" if name in _WHOLE else "number"
    return _TYPES.get(name, {"type": kind})


def _fields(*, form: bool) -> Schema:
    properties = {name: _property(name, form=form) for name in FIELDS}
    return {"type": "object", "required": ["prompt"], "properties": properties, "additionalProperties": False}


def _body(example: Schema, schema: Schema, form: Schema | None = None) -> Schema:
    content: Schema = {"application/json": {"schema": schema, "example": example}}
    if form is not None:
        content |= {
            "multipart/form-data": {"schema": form},
            "application/x-www-form-urlencoded": {"schema": form},
        }
    return {"required": True, "content": content}


_ERROR: Schema = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "code", "param", "next"],
            "properties": {
                name: {"type": ["string", "null"]} for name in ("message", "type", "code", "param", "next")
            },
        }
    },
}
_VIDEO_EXAMPLE: Schema = {
    "id": "video_0123456789abcdef01234567",
    "object": "video",
    "status": "in_progress",
    "progress": 42,
    "stage": "denoising",
    "step": 21,
    "steps": 50,
    "eta_s": 33.0,
}
_CODES = {
    "400": "a value that cannot be, naming it in `param`",
    "401": "no key",
    "403": "the key may not",
    "404": "no such video of yours",
    "409": "not in this state",
    "410": "its files are gone",
    "413": "too large",
    "422": "no JSON object",
    "429": "too many; `retry-after`",
    "503": "not now; `retry-after`",
}


def answers(content: Schema, description: str = "done", status: str = "200") -> Schema:
    """Responses of a route: the good one, and the errors."""
    errors = {
        code: {"description": said, "content": {"application/json": {"schema": _ERROR}}}
        for code, said in _CODES.items()
    }
    return {status: {"description": description, "content": content}, **errors}


_VIDEO = {"application/json": {"schema": {"type": "object"}, "example": _VIDEO_EXAMPLE}}
_MP4 = {"video/mp4": {"schema": {"type": "string", "format": "binary"}}}
_STREAM = {
    "text/event-stream": {"schema": {"type": "string"}},
    "application/json": {"schema": {"type": "object"}},
}
_CREATE_BODY = _body(_EXAMPLE, _fields(form=False), _fields(form=True))
CREATE: Schema = {"requestBody": _CREATE_BODY, "responses": answers(_VIDEO, "the video, queued")}
ESTIMATE: Schema = {"requestBody": _CREATE_BODY, "responses": answers(_VIDEO, "seconds, and whether it fits")}
LIST: Schema = {"responses": answers(_VIDEO, "a page")}
ONE: Schema = {"responses": answers(_VIDEO, "the video")}
CONTENT: Schema = {"responses": answers(_MP4, "the file")}
EVENTS: Schema = {"responses": answers(_STREAM, "events, each with its number")}
REMIX: Schema = {
    "requestBody": _body(
        {"prompt": "a blue ball rolls over grass"},
        {"type": "object", "required": ["prompt"], "properties": {"prompt": _TYPES["prompt"]}},
    ),
    "responses": answers(_VIDEO, "the new video"),
}
PRIORITY: Schema = {
    "requestBody": _body(
        {"priority": 1},
        {"type": "object", "required": ["priority"], "properties": {"priority": {"type": "integer"}}},
    ),
    "responses": answers(_VIDEO, "the video"),
}
