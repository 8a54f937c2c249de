"""Requests as clients write them (OpenAI's fields and other servers') in the engine's own names; text numbers
of forms become numbers. Knows no model, no HTTP and no SQL.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from chitu_diffusion.errors import UsageError, nearest
from chitu_diffusion.files.reading import parse_json

INPUTS = ("image", "last_image", "video")
ENGINE_FIELDS = (
    "prompt", "negative_prompt", "width", "height", "num_frames", "fps", "num_inference_steps",
    "guidance_scale", "seed", "flexcache", "cascade", "strength", "shift", "sampler_recipe",
    "image_preprocessing",
)  # fmt: skip
OWN_FIELDS = (
    "model", "size", "seconds", "guidance_scale_2", "recipe", "lora", "priority", "hold_at_step", "webhook",
    "metadata", "n", "user", "quality", "extra_params", "extra_body", "input_reference", *INPUTS,
)  # fmt: skip
FIELDS = (*ENGINE_FIELDS, *OWN_FIELDS)
"""What a request may say."""
_WHOLE = ("width", "height", "num_frames", "num_inference_steps", "seed", "priority", "hold_at_step", "n")
_NUMBERS = (*_WHOLE, "guidance_scale", "guidance_scale_2", "strength", "shift", "seconds")
_JSON_TEXT = ("flexcache", "cascade", "lora", "metadata", "extra_params", "extra_body", "guidance_scale")
_OTHERS = MappingProxyType(
    {
        "true_cfg_scale": "use guidance_scale",
        "flow_shift": "use shift",
        "response_format": "the video is at /content of its job",
        "save_path": "the video is at /content of its job",
        "role": "the key says who asks",
        "task_id": "ids are made here",
        "enhance_prompt": "prompts are taken as they are",
        "image_url": "URLs are not fetched; send the file itself as input_reference",
        "callback_url": "use webhook",
        "webhook_url": "use webhook",
    }
)
"""Fields of other servers, and what to use."""
MOST_METADATA = 16
LONGEST_METADATA = 512
_SIZE = re.compile(r"(\d{1,6})\s*[xX*]\s*(\d{1,6})")


@dataclass(frozen=True)
class Upload:
    """A file that came with a request: where it was put, its hash, and the media type that it was said to
    be of.
    """

    path: str
    sha256: str
    media_type: str = ""


@dataclass(frozen=True)
class VideoRequest:
    """A request in the engine's names.

    Attributes:
        fields: of `DiffusionUserParams`, but pictures, videos and adapters.
        asked: as it came, numbers parsed; JSON values, kept with the job.
        seconds: length where no number of frames is asked for.
        loras: (name, strength, expert) of the adapters.
    """

    fields: Mapping[str, Any]
    asked: Mapping[str, Any]
    model: str | None = None
    seconds: float | None = None
    priority: int = 0
    hold_at_step: int | None = None
    webhook: str | None = None
    loras: tuple[tuple[str, float, str | None], ...] = ()
    notes: tuple[str, ...] = field(default=())

    def with_prompt(self, prompt: str) -> VideoRequest:
        """The same with other words."""
        return dataclasses.replace(
            self, fields={**self.fields, "prompt": prompt}, asked={**self.asked, "prompt": prompt}
        )


def unflattened(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """A form's pairs as a table: `a[b]` is a table in it, `a[]` and a repeated `a` a list. Names of any other
    shape stay whole, for whoever knows the fields to refuse.

    Raises:
        UsageError: a name is both, or one of a table comes twice.
    """
    tree: dict[str, Any] = {}
    for name, value in pairs:
        parts = re.fullmatch(r"([^\[\]]+)(?:\[([^\[\]]*)\])?", name)
        head, inner = (name, None) if parts is None else parts.groups()
        if inner:
            branch = tree.setdefault(head, {})
            if not isinstance(branch, dict):
                raise UsageError(f"{head} is a value and a table; use one of them", field=head)
            if inner in branch:
                raise UsageError(f"{name[:100]} comes twice; send it once", field=head)
            branch[inner] = _parsed_number(value)
        elif inner is not None or head in tree:
            there = tree.setdefault(head, [])
            tree[head] = [*(there if isinstance(there, list) else [there]), value]
        else:
            tree[head] = value
    return tree


def request_of_fields(given: Mapping[str, Any]) -> VideoRequest:
    """A request's fields, files apart.

    Raises:
        UsageError: an unknown name, or a value that cannot be, naming the field.
    """
    values, notes = _known(_spread(given))
    for name in _NUMBERS:
        if isinstance(values.get(name), str):
            values[name] = _number(name, values[name])
    asked = dict(values)
    width, height = _size(values)
    fields = {name: values[name] for name in ENGINE_FIELDS if values.get(name) is not None}
    fields |= {"width": width, "height": height} if width is not None else {}
    second = values.get("guidance_scale_2")
    if second is not None:
        first = fields.get("guidance_scale")
        if not isinstance(first, int | float):
            raise UsageError("guidance_scale_2 is beside guidance_scale; give both", field="guidance_scale_2")
        fields["guidance_scale"] = (first, second)
    if values.get("recipe") is not None:
        fields["sampler_recipe"] = values["recipe"]
    if values.get("n") not in (None, 1):
        raise UsageError(f"n = {values['n']!r}: use 1; send a request for each video", field="n")
    return VideoRequest(
        fields=fields,
        asked=asked,
        model=_text("model", values.get("model")),
        seconds=_seconds(values),
        priority=_whole("priority", values.get("priority"), -1000, 1000) or 0,
        hold_at_step=_whole("hold_at_step", values.get("hold_at_step"), 1, 1000),
        webhook=_text("webhook", values.get("webhook")),
        loras=_loras(values.get("lora")),
        notes=tuple(notes),
    )


def _spread(given: Mapping[str, Any]) -> dict[str, Any]:
    """Tables that clients put their more fields into, beside the others; JSON text parsed."""
    values = dict(given)
    for name in _JSON_TEXT:
        text = values.get(name)
        if isinstance(text, str) and text.lstrip()[:1] in ("{", "["):
            try:
                values[name] = parse_json(text)
            except ValueError:
                raise UsageError(f"{name}: it is no JSON; use a name, or an object", field=name) from None
    for name in ("extra_params", "extra_body"):
        more = values.pop(name, None)
        if more is not None and not isinstance(more, Mapping):
            raise UsageError(f"{name}: use a JSON object", field=name)
        values |= more or {}
    return values


def _known(given: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    notes = []
    values = {}
    for name, value in given.items():
        if name in _OTHERS:
            raise UsageError(f"'{name}' is not taken here: {_OTHERS[name]}", field=name)
        if name not in FIELDS:
            raise UsageError(f"unknown field '{name[:100]}'.{nearest(name[:100], FIELDS)}", field=name[:100])
        if name in ("user", "quality"):
            notes.append(f"{name} changes nothing here")
        elif value is not None and not (value == "" and name not in ("prompt", "negative_prompt")):
            values[name] = value
    _check_metadata(values.get("metadata", {}))
    return values, notes


def _check_metadata(metadata: object) -> None:
    fits = (
        isinstance(metadata, Mapping)
        and len(metadata) <= MOST_METADATA
        and all(len(str(part)) <= LONGEST_METADATA for pair in metadata.items() for part in pair)
        and all(isinstance(value, str | int | float) for value in metadata.values())
    )
    if not fits:
        raise UsageError(
            f"metadata: use at most {MOST_METADATA} names with texts of at most {LONGEST_METADATA} "
            "characters",
            field="metadata",
        )


def _size(values: Mapping[str, Any]) -> tuple[int | None, int | None]:
    size = values.get("size")
    if size is None:
        return None, None
    found = _SIZE.fullmatch(size.strip()) if isinstance(size, str) else None
    if found is None:
        raise UsageError(f"size = {size!r:.100}: use WIDTHxHEIGHT, such as 832x480", field="size")
    width, height = map(int, found.groups())
    for name, value in (("width", width), ("height", height)):
        if values.get(name) not in (None, value):
            raise UsageError(f"size and {name} differ; use one of them", field="size")
    return width, height


def _seconds(values: Mapping[str, Any]) -> float | None:
    seconds = values.get("seconds")
    if seconds is None:
        return None
    if values.get("num_frames") is not None:
        raise UsageError("seconds and num_frames: use one of them", field="seconds")
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 < seconds <= 3600:
        raise UsageError(f"seconds = {seconds!r:.100}: use a number above 0, such as 4", field="seconds")
    return float(seconds)


def _loras(value: Any) -> tuple[tuple[str, float, str | None], ...]:
    found = []
    for each in value if isinstance(value, list) else [] if value is None else [value]:
        if isinstance(each, Mapping) and set(each) <= {"name", "strength", "expert"}:
            name = each.get("name")
            strength = each.get("strength", 1.0)
            expert = each.get("expert")
        else:
            name, _, tail = each.partition(":") if isinstance(each, str) else (None, "", "")
            name, _, after = name.partition("@") if name else (None, "", "")
            strength = _parsed_number(tail or "1")
            expert = after or None
        if not isinstance(name, str) or not re.fullmatch(r"[\w-][\w.-]{0,199}", name):
            raise UsageError(
                "lora: use the name of an adapter that this server has, NAME or NAME:0.8", field="lora"
            )
        if isinstance(strength, bool) or not isinstance(strength, int | float):
            raise UsageError(f"lora {name}: strength must be a number", field="lora")
        found.append((name, float(strength), expert))
    return tuple(found)


def _text(name: str, value: Any) -> str | None:
    if value is None or (isinstance(value, str) and len(value) <= 2000):
        return value
    raise UsageError(f"{name}: must be text of at most 2000 characters", field=name)


def _whole(name: str, value: Any, low: int, high: int) -> int | None:
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and low <= value <= high):
        return value
    raise UsageError(f"{name} = {value!r:.100}: use a whole number from {low} to {high}", field=name)


def _number(name: str, text: str) -> Any:
    """A form's number; a pair for two experts."""
    if name == "guidance_scale" and "," in text:
        return [_number(name, part) for part in text.split(",")]
    value = _parsed_number(text.strip())
    if isinstance(value, str):
        kind = "a whole number" if name in _WHOLE else "a number"
        raise UsageError(f"{name} = {text!r:.100}: use {kind}", field=name)
    return value


def _parsed_number(text: Any) -> Any:
    """A number where a text is one; anything else as it is."""
    if isinstance(text, str) and re.fullmatch(r"[+-]?(\d{1,20}(\.\d*)?|\.\d+)([eE][+-]?\d{1,3})?", text):
        value = json.loads(text) if re.fullmatch(r"-?(0|[1-9]\d*)", text) else float(text)
        return value if abs(value) < 1e300 else text
    return text
