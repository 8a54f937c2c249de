"""Bodies of requests: JSON or forms, with files, in limits of size and time. Files go into a folder."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import os
import secrets
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request

from chitu_diffusion.errors import UsageError
from chitu_diffusion.files.atomic import new_file
from chitu_diffusion.files.reading import parse_json
from chitu_diffusion.service.answers import ApiError
from chitu_diffusion.service.dialect import INPUTS, Upload, unflattened

MOST_BODY = 2**20
MOST_UPLOAD = 32 * 2**20
MOST_PARTS = 64
BODY_S = 30.0
FILE_FIELDS = ("input_reference", *INPUTS)
_ENDINGS = {
    "image/png": ".png",
    "image/jpeg": ".jpg",
    "image/webp": ".webp",
    "image/gif": ".gif",
    "video/mp4": ".mp4",
    "video/webm": ".webm",
    "video/quicktime": ".mov",
    "video/x-matroska": ".mkv",
}


async def read_body(request: Request, folder: Path) -> tuple[dict[str, Any], dict[str, Upload]]:
    """A request's fields, and its files, which lie in `folder` now.

    Raises:
        ApiError: 408 slow, 413 too large, 415 neither form nor JSON, 422 no JSON object.
        UsageError: a file in a field that takes none.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    try:
        async with asyncio.timeout(BODY_S):
            if kind in ("multipart/form-data", "application/x-www-form-urlencoded"):
                return await _read_form(request, folder)
            if kind not in ("application/json", ""):
                raise ApiError(
                    415, "bad_value", "send JSON, a form or multipart/form-data", param="content-type"
                )
            return await _read_json(request, folder)
    except (TimeoutError, ClientDisconnect):
        raise ApiError(408, "slow_body", f"the body did not come in {BODY_S:g} s") from None


def discard(uploads: Mapping[str, Upload]) -> None:
    """Remove files that nobody needs."""
    for upload in uploads.values():
        Path(upload.path).unlink(missing_ok=True)


def linked(upload: Upload, folder: Path) -> Upload:
    """The same file for another job: a name of its own."""
    path = folder / f"{secrets.token_hex(12)}{Path(upload.path).suffix}"
    os.link(upload.path, path)
    os.utime(path)
    return replace(upload, path=str(path))


def sweep(folder: Path, older_than_s: float) -> None:
    """Remove files whose jobs are long gone."""
    for file in folder.glob("*"):
        with suppress(FileNotFoundError):  # another front was first
            if file.stat().st_mtime < time.time() - older_than_s:
                file.unlink()


async def _read_json(request: Request, folder: Path) -> tuple[dict[str, Any], dict[str, Upload]]:
    body = await request.body()
    try:
        fields = parse_json(body)
    except (ValueError, RecursionError):
        raise ApiError(422, "bad_value", "the body is no JSON") from None
    if not isinstance(fields, dict):
        raise ApiError(422, "bad_value", "the body must be a JSON object")
    files = {name: fields.pop(name) for name in FILE_FIELDS if fields.get(name) is not None}
    uploads: dict[str, Upload] = {}
    try:
        for name, value in files.items():
            uploads[name] = await run_in_threadpool(_put, *_data_url(name, value), folder)
    except BaseException:
        discard(uploads)
        raise
    return fields, uploads


def _data_url(name: str, value: Any) -> tuple[bytes, str]:
    """The bytes of `data:image/png;base64,...`, as it is or in OpenAI's {"image_url": ...}, and its type."""
    if isinstance(value, Mapping) and set(value) <= {"image_url", "url"} and value:
        value = next(iter(value.values()))
    text = value if isinstance(value, str) else ""
    head, _, data = text.partition(",")
    if not head.startswith("data:") or not head.endswith(";base64"):
        raise UsageError(
            f"{name}: send the file in a multipart form, or as data:image/png;base64,...; URLs and paths "
            "are not read",
            field=name,
        )
    try:
        return base64.b64decode(data, validate=True), head[5:-7]
    except (binascii.Error, ValueError):
        raise UsageError(f"{name}: its base64 is broken", field=name) from None


async def _read_form(request: Request, folder: Path) -> tuple[dict[str, Any], dict[str, Upload]]:
    try:
        form = await request.form(max_files=len(FILE_FIELDS), max_fields=MOST_PARTS, max_part_size=MOST_BODY)
    except HTTPException as error:
        raise ApiError(400, "bad_value", "the form is broken, or has too many parts") from error
    uploads: dict[str, Upload] = {}
    fields: list[tuple[str, Any]] = []
    try:
        for name, value in form.multi_items():
            if isinstance(value, str):
                fields.append((name, value))
            elif name not in FILE_FIELDS or name in uploads:
                raise UsageError(f"{name[:100]}: no file is taken there", field=name[:100])
            elif value.size:
                uploads[name] = await run_in_threadpool(_put, await value.read(), value.content_type, folder)
        table = unflattened(fields)
        for name in FILE_FIELDS:
            text = table.pop(name, None)
            if text:
                uploads[name] = await run_in_threadpool(_put, *_data_url(name, text), folder)
        return table, uploads
    except BaseException:
        discard(uploads)
        raise
    finally:
        await form.close()


def _put(data: bytes, media_type: str | None, folder: Path) -> Upload:
    ending = _ENDINGS.get((media_type or "").lower(), "")
    if not ending and data[4:8] == b"ftyp":
        ending = ".mp4"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{secrets.token_hex(12)}{ending}"
    with new_file(path) as part:
        part.write_bytes(data)
    return Upload(str(path.absolute()), hashlib.sha256(data).hexdigest(), media_type or "")
