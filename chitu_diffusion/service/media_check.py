"""Files that clients upload, looked at in a process of its own with little memory and time: what they are,
and their sizes. What a broken or hostile file does there is no more than an error here.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from chitu_diffusion.errors import UsageError
from chitu_diffusion.files.reading import parse_json

_MEMORY = 4 * 2**30
_SECONDS = 20
_SLOTS = threading.BoundedSemaphore(2)
"""How many are looked at together."""
_PICTURES = (b"\x89PNG", b"\xff\xd8\xff", b"RIFF", b"BM", b"II*\x00", b"MM\x00*")
"""How the files of pictures begin; all others are tried as videos."""


def checked_media(field: str, path: str) -> tuple[str, dict[str, Any]]:
    """("image" or "video", what `InputImage` or `InputVideo` takes) of an upload.

    Raises:
        UsageError: it is neither, or too large.
    """
    kind = kind_of(_head(path)) if field == "input_reference" else field
    kind = "video" if kind == "video" else "image"
    try:
        with _SLOTS:
            done = subprocess.run(
                [sys.executable, "-m", "chitu_diffusion.service.media_check", kind, path],
                capture_output=True,
                timeout=2 * _SECONDS,
                check=False,
            )
        answer = parse_json(done.stdout) if done.returncode == 0 else {"problem": "it cannot be read"}
    except (subprocess.TimeoutExpired, ValueError):
        answer = {"problem": "it cannot be read in time"}
    if "problem" in answer:
        said = str(answer["problem"]).replace(path, "the upload")
        raise UsageError(said if said.startswith(kind) else f"{field}: {said}", field=field)
    return kind, answer


def kind_of(head: bytes) -> str:
    """ "image" or "video", by how a file begins."""
    is_picture = head.startswith(_PICTURES) and not (head[:4] == b"RIFF" and head[8:12] != b"WEBP")
    return "image" if is_picture else "video"


def _head(path: str) -> bytes:
    with Path(path).open("rb") as file:
        return file.read(16)


def _facts(kind: str, path: str) -> Mapping[str, Any]:
    from chitu_diffusion.media.image import InputImage
    from chitu_diffusion.media.input_video import InputVideo

    given = InputVideo.of(path) if kind == "video" else InputImage.of("image", path)
    return {} if given is None else given.to_mapping()


def main(kind: str, path: str) -> None:
    """Print what a file is, as JSON, under limits."""
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (_SECONDS, _SECONDS))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    try:
        print(json.dumps(_facts(kind, path)))
    except (UsageError, MemoryError) as error:
        print(json.dumps({"problem": str(error) or "it needs too much memory"}))


if __name__ == "__main__":
    main(*sys.argv[1:3])
