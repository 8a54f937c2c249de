"""OpenAI's Python client against a front behind uvicorn: create, poll, download, list, delete, errors."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from fronts import VIDEO, FakeSupervisor, add_key, listening, make_front

pytestmark = pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    front = make_front(tmp_path_factory.mktemp("data"), queue={"per_key": 3})
    key = add_key(front, "ann")
    with listening(front, FakeSupervisor(front).run) as url:
        yield openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)


def test_create_poll_download_list_remix_delete(client: openai.OpenAI, tmp_path: Path) -> None:
    more = {"num_inference_steps": 4, "flexcache": {"strategy": "teacache"}, "metadata": {"shot": "1"}}
    video = client.videos.create_and_poll(
        prompt="a red ball", model="wan-tiny", size="128x128", seconds="1", extra_body=more
    )
    assert (video.status, video.progress, video.size) == ("completed", 100, "128x128")
    assert client.videos.download_content(video.id).read() == VIDEO
    again = client.videos.remix(video.id, prompt="a blue ball")
    assert again.remixed_from_video_id == video.id and client.videos.poll(again.id).status == "completed"
    page = client.videos.list(limit=1)
    assert [each.id for each in page.data] == [again.id]
    assert [each.id for each in client.videos.list(limit=1)] == [again.id, video.id]
    assert client.videos.delete(video.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.videos.retrieve(video.id)


def test_failures_and_refusals(client: openai.OpenAI) -> None:
    failed = client.videos.create_and_poll(prompt="a broken ball")
    assert failed.status == "failed" and failed.error and failed.error.code == "non_finite"
    with pytest.raises(openai.BadRequestError) as refused:
        client.videos.create(prompt="a ball", size="128x127")
    assert refused.value.param == "height" and refused.value.code == "bad_value"
    assert client.videos.create(prompt="a cat", input_reference=("a.png", _picture(), "image/png")).id
    with pytest.raises(openai.BadRequestError, match="picture"):
        client.videos.create(prompt="a cat", input_reference=("a.png", _picture()[:40], "image/png"))
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="ck_a_b").videos.list()


def test_cancel_and_a_full_queue(client: openai.OpenAI) -> None:
    videos = [client.videos.create(prompt="a slow ball")]
    while client.videos.retrieve(videos[0].id).status == "queued":
        time.sleep(0.02)
    videos += [client.videos.create(prompt="a slow ball") for _ in range(3)]
    with pytest.raises(openai.RateLimitError) as full:
        client.videos.create(prompt="a slow ball")
    assert full.value.code == "key_queue_full"
    for video in videos:
        client.post(f"/videos/{video.id}/cancel", cast_to=object)
    assert {client.videos.poll(video.id).status for video in videos} == {"cancelled"}


def _picture() -> bytes:
    import io

    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (32, 32)).save(file, "PNG")
    return file.getvalue()
