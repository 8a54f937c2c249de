"""Events as they happen, over real connections: replay after a break at another front, the end, limits; and
webhooks that OpenAI's own client verifies.
"""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from fronts import FakeSupervisor, client_of, listening, make_front
from job_stores import MakeUrl

from chitu_diffusion.service.database import Database
from chitu_diffusion.service.front import Front
from chitu_diffusion.service.migrate import bring_up_to_date

ASK = {"prompt": "a red ball", "num_inference_steps": 4, "num_frames": 5, "seed": 7}


@pytest.fixture
def two_fronts(tmp_path: Path, fresh_url: MakeUrl) -> Iterator[tuple[Front, str, str]]:
    """Two on one store and folder, and the first of them; on SQLite and on PostgreSQL."""
    url = fresh_url()
    bring_up_to_date(Database(url), asked=True)
    with ExitStack() as stack:
        fronts = [make_front(tmp_path, url) for _ in range(2)]
        urls = [stack.enter_context(listening(front)) for front in fronts]
        yield fronts[0], urls[0], urls[1]


def read(lines: Iterator[str], most: int = 1000) -> list[tuple[int | None, str, dict[str, Any]]]:
    """Numbered events up to a number of them."""
    found: list[tuple[int | None, str, dict[str, Any]]] = []
    number: int | None = None
    kind = ""
    for line in lines:
        name, _, value = line.partition(": ")
        if name == "id":
            number = int(value)
        elif name == "event":
            kind = value
        elif name == "data":
            found.append((number, kind, json.loads(value)))
            number = None
            if len([each for each in found if each[0]]) == most:
                return found
    return found


def test_readers_of_one_job_ask_the_store_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    front = make_front(tmp_path)
    video = client_of(front).post("/v1/videos", json=ASK).json()["id"]
    supervisor = FakeSupervisor(front)
    supervisor.make()
    asked: list[int] = []
    events = front.store.events
    monkeypatch.setattr(front.store, "events", lambda *about: asked.append(about[1]) or events(*about))

    async def text() -> str:
        return "".join([part async for part in front.watcher.events(video, 0, "ann")])

    async def of_many() -> list[str]:
        return list(await asyncio.gather(*(text() for _ in range(10))))

    found = asyncio.run(of_many())
    assert set(found) == {found[0]} and "event: completed" in found[0]
    assert asked == [0]
    front.store.close()


def test_a_reader_that_drops_goes_on_at_another_front(two_fronts: tuple[Front, str, str]) -> None:
    front, first, second = two_fronts
    supervisor = FakeSupervisor(front)
    with httpx.Client(timeout=10) as client:
        video = client.post(f"{first}/v1/videos", json=ASK).json()["id"]
        path = f"/v1/videos/{video}/events"

        def work() -> None:
            lease = supervisor.claim()
            for step in range(1, 5):
                supervisor.step(lease, step, 4)
                time.sleep(0.1)
            supervisor.complete(lease)

        with client.stream("GET", first + path) as stream:
            assert stream.headers["content-type"].startswith("text/event-stream")
            thread = threading.Thread(target=work)
            thread.start()
            early = [each for each in read(stream.iter_lines(), 3) if each[0]]
        with client.stream("GET", second + path, headers={"last-event-id": str(early[-1][0])}) as stream:
            late = [each for each in read(stream.iter_lines()) if each[0]]
        thread.join()
        seen = early + late
        assert [number for number, _, _ in seen] == list(range(1, 8))
        assert [kind for _, kind, _ in seen] == ["queued", "started", *["step"] * 4, "completed"]
        after = client.get(second + path, headers={"last-event-id": "7"})
        assert after.status_code == 204 and client.get(f"{first}{path}?after=7").status_code == 204
        rows = client.get(first + path, headers={"accept": "application/json"}).json()["data"]
        assert [row["n"] for row in rows] == list(range(1, 8))
        assert client.get(f"{first}{path}?after=x").status_code == 400


def test_the_queue_s_position_and_the_feed(two_fronts: tuple[Front, str, str]) -> None:
    _, first, second = two_fronts
    with httpx.Client(timeout=10) as client:
        ahead, video = (
            client.post(f"{first}/v1/videos", json={**ASK, "seed": n}).json()["id"] for n in (1, 2)
        )
        with (
            client.stream("GET", f"{second}/v1/videos/{video}/events") as stream,
            client.stream("GET", f"{second}/v1/feed") as feed,
        ):
            lines = stream.iter_lines()
            assert read(lines, 1)[0][1] == "queued"
            places = (json.loads(line[6:]) for line in lines if '"position"' in line)
            assert next(places) == {"position": 1}
            news = (json.loads(line[6:])["id"] for line in feed.iter_lines() if line.startswith("data: "))
            assert [next(news), next(news)] == [ahead, video]
            client.post(f"{first}/v1/videos/{ahead}/cancel")
            assert next(news) == ahead
            assert next(places) == {"position": 0}


def test_streams_end_when_the_server_does_and_have_limits(
    front: Front, monkeypatch: pytest.MonkeyPatch
) -> None:
    from chitu_diffusion.service import streams

    monkeypatch.setattr(streams, "MOST_STREAMS_OF_ONE", 1)
    with listening(front) as url, httpx.Client(timeout=10) as client:
        video = client.post(f"{url}/v1/videos", json=ASK).json()["id"]
        with client.stream("GET", f"{url}/v1/videos/{video}/events") as stream:
            lines = stream.iter_lines()
            next(lines)
            read(lines, 1)
            second = client.get(f"{url}/v1/videos/{video}/events")
            assert (second.status_code, second.json()["error"]["code"]) == (429, "streams")
            assert "chitu_sse_streams 1.0" in client.get(f"{url}/metrics").text
            front.draining.set()
            assert list(lines)[-1:] in ([], [""])


class Target:
    """A server that keeps what is posted to it."""

    def __init__(self, statuses: list[int]) -> None:
        self.got: list[tuple[dict[str, str], str]] = []
        target = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"])).decode()
                target.got.append(({name.lower(): value for name, value in self.headers.items()}, body))
                self.send_response(statuses.pop(0) if statuses else 200)
                self.send_header("location", "/elsewhere")
                self.end_headers()

            def log_message(self, *args: object) -> None: ...

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/hook?a=1"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


def test_webhooks_are_signed_repeated_and_go_to_no_private_place(tmp_path: Path) -> None:
    import openai

    from chitu_diffusion.service.webhooks import WebhookSender, is_private, kept_secret

    target = Target([302, 500])
    front = make_front(tmp_path, webhooks={"allow": ["127.0.0.1"]})
    client = client_of(front)
    video = client.post("/v1/videos", json={**ASK, "webhook": target.url}).json()["id"]
    FakeSupervisor(front).make()
    secret = kept_secret(front.data, None)
    assert secret == kept_secret(front.data, None)
    assert (front.data / "webhook-secret").stat().st_mode & 0o077 == 0
    counted: list[str] = []

    def sender(**settings: Any) -> WebhookSender:
        allowed = front.settings.webhooks.model_copy(update=settings)
        return WebhookSender(front.store, allowed, secret, counted.append)

    for _ in range(3):
        (delivery,) = front.store.outbox.claim(lease_s=0)
        sender()._deliver(delivery)
        front.store._database._clock = lambda: time.time() + 1000 * len(counted)  # past the pauses
    assert counted == ["failed", "failed", "ok"] and front.store.outbox.claim() == ()
    assert sender(allow=())._send(delivery) is None and len(target.got) == 3
    ids = {headers["webhook-id"] for headers, _ in target.got}
    assert len(ids) == 1
    headers, body = target.got[-1]
    hooks = openai.OpenAI(api_key="x", webhook_secret=secret).webhooks
    event = hooks.unwrap(body, headers)
    assert (event.type, event.data.id) == ("video.completed", video)
    with pytest.raises(openai.InvalidWebhookSignatureError):
        hooks.unwrap(body.replace("completed", "failed"), headers)
    private = (
        "localhost",
        "10.0.0.1",
        "169.254.169.254",
        "::1",
        "fe80::1%eth0",
        "::ffff:10.0.0.1",
        "0.0.0.0",
        "localhost.",
        "127.1",
        "2130706433",
        "64:ff9b::7f00:1",
        "2002:7f00:1::",
    )
    assert all(map(is_private, private)) and not is_private("8.8.8.8") and not is_private("example.com")


@pytest.mark.parametrize(
    "url",
    [
        "http://example.com:99999/",
        "http://example.com:0/",
        "http://example.com:x/",
        "http://a b/",
        "http://example.com/\n",
        f"http://{'a' * 64}.com/",
        "http://:word@example.com/",
        "http://127.1/",
        "http://\u2460\u2461\u2466.0.0.1/",
    ],
)
def test_a_webhook_that_could_never_be_sent_is_refused_at_once(front: Front, url: str) -> None:
    refused = client_of(front).post("/v1/videos", json={**ASK, "webhook": url})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "webhook")


def test_a_target_that_answers_byte_by_byte_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from chitu_diffusion.service import webhooks

    monkeypatch.setattr(webhooks, "_WHOLE_S", 0.3)
    listener = socket.create_server(("127.0.0.1", 0))
    left = threading.Event()

    def drip() -> None:
        connection, _ = listener.accept()
        with connection, suppress(OSError):
            connection.sendall(b"HTTP/1.1 200 OK\r\nx: ")
            while not left.wait(0.05):
                connection.sendall(b"x")

    threading.Thread(target=drip, daemon=True).start()
    front = make_front(tmp_path, webhooks={"allow": ["127.0.0.1"]})
    url = f"http://127.0.0.1:{listener.getsockname()[1]}/"
    client_of(front).post("/v1/videos", json={**ASK, "webhook": url})
    FakeSupervisor(front).make()
    (delivery,) = front.store.outbox.claim()
    counted: list[str] = []
    sender = webhooks.WebhookSender(
        front.store, front.settings.webhooks, webhooks.kept_secret(front.data, None), counted.append
    )
    thread = threading.Thread(target=sender._deliver, args=(delivery,), daemon=True)
    thread.start()
    thread.join(3)  # ten times the limit
    left.set()
    listener.close()
    assert counted == ["failed"]
