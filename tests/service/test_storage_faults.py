"""A data folder that takes no files: answers say so, and nothing is left half."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
from fronts import client_of

from chitu_diffusion.service.front import Front


@pytest.mark.parametrize(
    ("number", "status"), [(errno.ENOSPC, 503), (errno.EROFS, 503), (errno.EDQUOT, 503), (errno.EBADF, 500)]
)
def test_an_upload_to_a_folder_that_takes_none_is_tried_later(
    front: Front, monkeypatch: pytest.MonkeyPatch, number: int, status: int
) -> None:
    def full(*_: object) -> None:
        raise OSError(number, "not now")

    monkeypatch.setattr(Path, "write_bytes", full)
    sent = {"input_reference": ("a.png", b"x" * 10, "image/png")}
    answer = client_of(front).post("/v1/videos", data={"prompt": "a ball"}, files=sent)
    code = answer.json()["error"]["code"]
    assert (answer.status_code, code) == (status, "storage" if status == 503 else "fault")
    assert ("retry-after" in answer.headers) == (status == 503)
    assert not any(front.inputs.glob("*")) and not front.store.jobs().jobs
