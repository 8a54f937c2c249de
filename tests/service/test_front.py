"""The HTTP front in this process: fields, errors, limits, ranges, repeated creates, and who sees what."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
from fronts import VIDEO, FakeSupervisor, add_key, client_of, make_front
from starlette.testclient import TestClient

from chitu_diffusion.service.front import Front
from chitu_diffusion.service.jobs import WorkerInfo

ASK = {"prompt": "a red ball", "num_inference_steps": 4, "num_frames": 5, "seed": 7}
OPEN = {("GET", "/"), ("GET", "/health"), ("GET", "/ready"), ("GET", "/version"), ("POST", "/session")}


@pytest.fixture
def client(front: Front) -> TestClient:
    return client_of(front)


def create(client: TestClient, **fields: Any) -> dict[str, Any]:
    answer = client.post("/v1/videos", json={**ASK, **fields})
    assert answer.status_code == 200, answer.text
    return answer.json()


def refused(client: TestClient, **fields: Any) -> dict[str, Any]:
    answer = client.post("/v1/videos", json={**ASK, **fields})
    assert answer.status_code == 400, answer.text
    return answer.json()["error"]


def picture(width: int = 32, height: int = 32) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(file, "PNG")
    return file.getvalue()


def test_the_front_loads_no_torch() -> None:
    code = (
        "import sys, chitu_diffusion.service.serving, chitu_diffusion.service.settings as s\n"
        "from chitu_diffusion.config import EngineConfig\n"
        "from chitu_diffusion.service.planning import Planner\n"
        "Planner(EngineConfig(), s.ServiceConfig())\n"
        "print(*sorted(set(sys.modules) & {'torch', 'numpy', 'PIL', 'av', 'diffusers', 'transformers'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_json_and_both_forms_ask_for_the_same(client: TestClient) -> None:
    fields = {
        **ASK,
        "size": "160x96",
        "guidance_scale": 3.5,
        "flexcache": {"strategy": "teacache", "threshold": 0.2},
    }
    flat = {
        **{k: str(v) for k, v in fields.items()},
        "flexcache[strategy]": "teacache",
        "flexcache[threshold]": "0.2",
    }
    del flat["flexcache"]
    by_json = client.post("/v1/videos", json=fields).json()
    by_form = client.post("/v1/videos", data=flat).json()
    by_parts = client.post("/v1/videos", files={name: (None, value) for name, value in flat.items()}).json()
    store = client.app.state.front.store  # type: ignore[attr-defined]
    jobs = [store.job(video["id"]) for video in (by_json, by_form, by_parts)]
    assert jobs[0].resolved == jobs[1].resolved == jobs[2].resolved
    assert jobs[0].body_sha256 == jobs[1].body_sha256 == jobs[2].body_sha256
    assert (by_json["size"], by_json["status"], by_json["progress"]) == ("160x96", "queued", 0)


def test_seconds_become_whole_frames_and_it_is_said(client: TestClient) -> None:
    video = create(client, num_frames=None, seconds=1, user="me")
    assert video["num_frames"] == 17 and video["seconds"] == "1.0625"
    assert any("17 frames" in note for note in video["notes"]) and any(
        "user" in note for note in video["notes"]
    )
    assert isinstance(create(client, seed=None)["seed"], int)


@pytest.mark.parametrize(
    ("fields", "code", "param", "said"),
    [
        ({"prompt": " "}, "bad_value", "prompt", "sentence"),
        ({"promt": "x"}, "unknown_field", "promt", "'prompt'"),
        ({"flow_shift": 3}, "bad_value", "flow_shift", "use shift"),
        ({"size": "big"}, "bad_value", "size", "832x480"),
        ({"size": "128x124"}, "bad_value", "height", "120 or 128"),
        ({"num_frames": 6}, "bad_value", "num_frames", "4n"),
        ({"seconds": 2}, "bad_value", "seconds", "num_frames"),
        ({"model": "sora-2"}, "bad_value", "model", "wan-tiny"),
        ({"lora": "../../etc/passwd"}, "bad_value", "lora", "name of an adapter"),
        ({"lora": "style"}, "bad_value", "lora", "There are: wan-tiny-4step"),
        ({"flexcache": "teacash"}, "bad_value", "flexcache", "teacache"),
        ({"n": 2}, "bad_value", "n", "each video"),
        ({"hold_at_step": 4}, "bad_value", "hold_at_step", "4 steps"),
        ({"webhook": "http://127.0.0.1/x"}, "bad_value", "webhook", "private"),
        ({"webhook": "file:///etc/passwd"}, "bad_value", "webhook", "URL"),
        ({"metadata": {"a": "b" * 513}}, "bad_value", "metadata", "512"),
        ({"input_reference": "/etc/passwd"}, "bad_value", "input_reference", "paths are not read"),
        ({"save_path": "/tmp/x.mp4"}, "bad_value", "save_path", "/content"),
        ({"seed": -1}, "bad_value", "seed", "0"),
        ({"sampler_recipe": "nope"}, "bad_value", "sampler_recipe", "nope"),
        ({"priority": "high"}, "bad_value", "priority", "whole number"),
    ],
)
def test_what_cannot_be_is_refused_at_submit(
    client: TestClient, fields: dict[str, Any], code: str, param: str, said: str
) -> None:
    error = refused(client, **fields)
    assert (error["code"], error["param"]) == (code, param) and said in error["message"]


def test_pictures_are_looked_at_and_refused_by_name(client: TestClient, front: Front) -> None:
    files = {"input_reference": ("a.png", picture(), "image/png")}
    answer = client.post("/v1/videos", data={"prompt": "a cat"}, files=files)
    assert answer.status_code == 200, answer.text
    (kept,) = front.inputs.iterdir()
    assert front.store.job(answer.json()["id"]).resolved["image"]["path"] == str(kept)
    files = {"input_reference": ("a.png", b"\x89PNG broken", "image/png")}
    error = client.post("/v1/videos", data={"prompt": "a cat"}, files=files).json()["error"]
    assert error["param"] in ("image", "input_reference") and str(front.data) not in error["message"]
    assert list(front.inputs.iterdir()) == [kept]


def test_an_input_video_stays_with_its_job(
    client: TestClient, front: Front, supervisor: FakeSupervisor
) -> None:
    from PIL import Image

    file = io.BytesIO()
    frames = [Image.new("RGB", (64, 64), (40 * n, 0, 0)) for n in range(6)]
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:], duration=100)
    # a GIF is a picture where nobody says which, and a video in the field of videos
    asked = {"prompt": "a red ball", "strength": "0.5"}
    answer = client.post("/v1/videos", data=asked, files={"video": ("a.gif", file.getvalue(), "image/gif")})
    assert answer.status_code == 200, answer.text
    job = front.store.job(answer.json()["id"])
    place = Path(job.resolved["video"]["path"])
    assert place.parent == front.inputs and place.read_bytes() == file.getvalue()
    assert (job.resolved["num_frames"], job.resolved["video"]["frames"]) == (5, 6)
    supervisor.make()
    again = client.post(f"/v1/videos/{job.id}/retry").json()
    assert client.delete(f"/v1/videos/{job.id}").json()["deleted"] and not place.exists()
    kept = front.store.job(again["id"])
    assert Path(kept.resolved["video"]["path"]).read_bytes() == file.getvalue()
    assert kept.seed == job.seed


def test_adapters_are_named_not_pathed(tmp_path: Path) -> None:
    loras = tmp_path / "loras"
    loras.mkdir()
    (loras / "style.safetensors").write_bytes(b"weights")
    front = make_front(tmp_path / "data", loras=str(loras))
    client = client_of(front)
    job = front.store.job(
        create(client, lora=["style:0.5", {"name": "style.safetensors", "strength": 2}])["id"]
    )
    assert [each["strength"] for each in job.resolved["lora"]] == [0.5, 2.0]
    assert {Path(each["path"]).name for each in job.resolved["lora"]} == {"style.safetensors"}
    assert "'style'" in refused(client, lora="stile")["message"]
    for value in ("style:900", "style@mid"):
        error = refused(client, lora=value)
        assert error["param"] == "lora" and str(tmp_path) not in error["message"]


def test_bodies_have_limits_and_kinds(client: TestClient) -> None:
    def code(**how: Any) -> tuple[int, str]:
        answer = client.post("/v1/videos", **how)
        return answer.status_code, answer.json()["error"]["code"]

    kind = {"content-type": "application/json"}
    assert code(content=b"[1]", headers=kind) == (422, "bad_value")
    assert code(content=b"{", headers=kind) == (422, "bad_value")
    assert code(content=b"x", headers={"content-type": "text/plain"}) == (415, "bad_value")
    assert code(content=b"x" * (33 * 2**20), headers=kind) == (413, "too_large")
    assert code(content=iter([b"x" * 2**20] * 33), headers=kind) == (413, "too_large")
    assert code(data={f"f{n}": "1" for n in range(65)}, files={"a": (None, "b")})[0] == 400
    assert client.get("/v1/nothing").json()["error"]["code"] == "not_found"
    assert client.put("/v1/videos").status_code == 405


def test_a_video_s_life(client: TestClient, front: Front, supervisor: FakeSupervisor) -> None:
    first = create(client)["id"]
    second = create(client, seed=8)["id"]
    video = client.get(f"/v1/videos/{second}")
    assert video.json()["queue_position"] == 1 and int(video.headers["openai-poll-after-ms"]) >= 500
    assert (
        client.get(f"/v1/videos/{second}", headers={"if-none-match": video.headers["etag"]}).status_code
        == 304
    )
    assert client.put(f"/v1/videos/{second}/priority", json={"priority": 5}).json()["queue_position"] == 0
    lease = supervisor.claim()
    assert lease.job == second
    supervisor.step(lease)
    seen = client.get(f"/v1/videos/{second}").json()
    assert (seen["status"], seen["progress"], seen["step"], seen["steps"]) == ("in_progress", 50, 1, 2)
    assert 0 < seen["eta_s"] <= 3
    early = client.get(f"/v1/videos/{second}/content")
    assert (early.status_code, early.headers["x-should-retry"]) == (409, "false")
    busy = client.put(f"/v1/videos/{second}/priority", json={"priority": 1})
    assert busy.json()["error"]["code"] == "not_ready"
    supervisor.complete(lease)
    done = client.get(f"/v1/videos/{second}").json()
    assert (done["status"], done["progress"]) == ("completed", 100) and done["completed_at"]
    assert client.post(f"/v1/videos/{second}/cancel").json()["error"]["code"] == "already_ended"
    assert client.post(f"/v1/videos/{first}/cancel").json()["status"] == "cancelled"
    retried = client.post(f"/v1/videos/{first}/retry").json()
    assert retried["remixed_from_video_id"] == first and retried["seed"] == 7 and retried["id"] != first
    remixed = client.post(f"/v1/videos/{second}/remix", json={"prompt": "a blue ball"}).json()
    assert (remixed["prompt"], remixed["seed"], remixed["num_frames"]) == ("a blue ball", 8, 5)
    page = client.get("/v1/videos?limit=2").json()
    assert [each["id"] for each in page["data"]] == [remixed["id"], retried["id"]] and page["has_more"]
    rest = client.get("/v1/videos", params={"after": page["last_id"], "limit": 5}).json()
    assert [each["id"] for each in rest["data"]] == [second, first] and not rest["has_more"]
    assert [each["id"] for each in client.get("/v1/videos?status=completed").json()["data"]] == [second]
    assert client.delete(f"/v1/videos/{second}").json() == {
        "id": second,
        "object": "video.deleted",
        "deleted": True,
    }
    assert client.get(f"/v1/videos/{second}").status_code == 404


def test_a_failed_job_is_an_answer_not_an_error(
    client: TestClient, front: Front, supervisor: FakeSupervisor
) -> None:
    from chitu_diffusion.service.jobs import JobFailure

    video = create(client)["id"]
    front.store.leases.fail(supervisor.claim(), JobFailure("will_not_fit", "too large", next="use less"))
    answer = client.get(f"/v1/videos/{video}")
    assert answer.status_code == 200 and answer.json()["status"] == "failed"
    assert answer.json()["error"]["code"] == "will_not_fit"
    assert client.get(f"/v1/videos/{video}/content").status_code == 409


def test_content_by_ranges(client: TestClient, front: Front, supervisor: FakeSupervisor) -> None:
    video = create(client)["id"]
    job = supervisor.make()
    url = f"/v1/videos/{video}/content"
    whole = client.get(url)
    assert whole.content == VIDEO and whole.headers["content-type"] == "video/mp4"
    assert (
        whole.headers["x-content-type-options"] == "nosniff"
        and f"{video}.mp4" in whole.headers["content-disposition"]
    )
    part = client.get(url, headers={"range": "bytes=10-19"})
    assert (part.status_code, part.content) == (206, VIDEO[10:20])
    assert client.get(url, headers={"range": "bytes=-5"}).content == VIDEO[-5:]
    assert client.get(url, headers={"range": "bytes=999999-"}).status_code == 416
    assert client.get(url, headers={"if-none-match": whole.headers["etag"]}).status_code == 304
    changed = client.get(url, headers={"range": "bytes=0-1", "if-range": '"other"'})
    assert (changed.status_code, changed.content) == (200, VIDEO)
    assert client.head(url).headers["content-length"] == str(len(VIDEO))
    assert client.get(url, params={"variant": "thumbnail"}).status_code == 404
    assert client.get(url, params={"variant": "../x"}).status_code == 400
    (front.data / "jobs" / job.id / "1" / "video.mp4").unlink()
    assert client.get(url).json()["error"]["code"] == "gone"


def test_creates_that_are_repeated(client: TestClient) -> None:
    def post(body: dict[str, Any], **headers: str) -> Any:
        return client.post("/v1/videos", json=body, headers=headers)

    key = {"Idempotency-Key": "k1"}
    first = post(ASK, **key).json()["id"]
    assert post(ASK, **key).json()["id"] == first
    other = post({**ASK, "seed": 9}, **key)
    assert (other.status_code, other.json()["error"]["code"]) == (409, "idempotency_conflict")
    again = {"x-stainless-retry-count": "1"}
    lost = post({**ASK, "seed": 10}).json()["id"]
    assert post({**ASK, "seed": 10}, **again).json()["id"] == lost
    assert post({**ASK, "seed": 10}).json()["id"] != lost
    assert post(ASK, **{"Idempotency-Key": "x" * 201}).status_code == 400


def test_what_no_worker_has_room_for_is_refused(client: TestClient, front: Front) -> None:
    def worker(name: str, model: str = "wan-tiny", state: str = "ready", **fits: object) -> None:
        front.store.workers.put(WorkerInfo(name, "host", 1, model, state, weights_sha256=name, fits=fits))

    tokens = client.post("/v1/videos/estimate", json=ASK).json()["tokens"]
    worker("of another model", "wan2.1-t2v-14b", tokens=10**6)
    assert client.get("/v1/status").json()["reason"] == "NO_WORKER"
    worker("small", tokens=tokens - 1)
    assert client.get("/v1/status").json()["reason"] is None
    assert client.post("/v1/videos/estimate", json=ASK).json()["fits"] is False
    refused = client.post("/v1/videos", json=ASK)
    error = refused.json()["error"]
    assert (refused.status_code, error["code"], error["param"]) == (400, "will_not_fit", "size")
    assert f"{tokens} tokens, and no worker has memory for more than {tokens - 1}; use " in error["message"]
    worker("starting", state="starting")
    assert client.post("/v1/videos", json=ASK).status_code == 200, "it may have room"
    worker("starting", tokens=tokens)
    assert client.post("/v1/videos", json={**ASK, "seed": 4}).status_code == 200
    told = {row["id"]: row for row in client.get("/v1/status").json()["workers"]}
    assert told["small"]["fits"] == {"tokens": tokens - 1} and told["small"]["weights_sha256"] == "small"


def test_estimates_and_what_there_is(client: TestClient) -> None:
    told = client.post("/v1/videos/estimate", json=ASK).json()
    assert told["seconds"] > 0 and told["steps"] == 4 and told["tokens"] > 0 and told["fits"] is None
    assert client.get("/v1/videos").json()["data"] == []
    assert client.get("/v1/models").json()["data"][0]["id"] == "wan-tiny"
    assert (
        client.get("/v1/models/wan-tiny").status_code == 200 and client.get("/v1/models/x").status_code == 404
    )
    assert client.get("/v1/status").json()["reason"] == "NO_WORKER"
    assert client.get("/health").status_code == 200 and client.get("/ready").status_code == 503
    assert client.get("/").status_code == 200 and client.get("/docs").status_code == 200
    document = client.get("/openapi.json").json()
    body = document["paths"]["/v1/videos"]["post"]["requestBody"]["content"]
    assert {"application/json", "multipart/form-data"} <= set(body)
    figures = client.get("/metrics").text
    assert 'chitu_queue_jobs{state="queued"} 0.0' in figures and "chitu_http_seconds" in figures


def test_ready_says_why_not(client: TestClient, front: Front) -> None:
    from chitu_diffusion.service.jobs import WorkerInfo

    def reason() -> Any:
        return client.get("/ready").json()["reason"]

    front.store.workers.put(WorkerInfo("w", "here", 1, "wan-tiny", "starting"))
    assert reason() == "STARTING"
    front.store.workers.put(WorkerInfo("w", "here", 1, "wan-tiny", "ready"))
    assert reason() is None
    front.draining.set()
    assert (
        reason() == "DRAINING" and client.post("/v1/videos", json=ASK).json()["error"]["code"] == "draining"
    )
    front.draining.clear()
    front.settings.min_free_gb = 1e9
    assert reason() == "DISK_LOW"
    refused = client.post("/v1/videos", json=ASK)
    assert refused.status_code == 503 and refused.headers["retry-after"]


def test_full_queues(tmp_path: Path) -> None:
    front = make_front(tmp_path, queue={"max": 3, "per_key": 2})
    ann = client_of(front, authorization=f"Bearer {add_key(front, 'ann')}")
    bob = client_of(front, authorization=f"Bearer {add_key(front, 'bob')}")
    for number in range(2):
        create(ann, seed=number)
    full = ann.post("/v1/videos", json=ASK)
    assert (full.status_code, full.json()["error"]["code"]) == (429, "key_queue_full")
    assert int(full.headers["retry-after-ms"]) > 0
    create(bob)
    assert bob.post("/v1/videos", json=ASK).json()["error"]["code"] == "queue_full"


def routes(front: Front) -> list[tuple[str, str]]:
    from chitu_diffusion.service.app import build_app

    found = [
        (method, route.path)
        for route in build_app(front).routes
        for method in sorted(route.methods - {"HEAD"})  # type: ignore[attr-defined]
    ]
    assert len(found) > 20
    return found


def test_every_route_but_the_open_ones_needs_a_key_and_a_scope(front: Front) -> None:
    nothing = add_key(front, "ann", "metrics")
    key = {"authorization": f"Bearer {nothing}"}
    bare = client_of(front)
    for method, path in routes(front):
        url = path.replace("{video_id}", "video_x").replace("{name:path}", "wan-tiny")
        answer = bare.request(method, url, json={})
        scoped = bare.request(method, url, json={}, headers=key)
        if (method, path) in OPEN:
            assert answer.status_code != 401 or path == "/session", (method, path)
        elif path == "/metrics":
            assert (answer.status_code, scoped.status_code) == (401, 200)
        else:
            assert (answer.status_code, scoped.status_code) == (401, 403), (method, path)
            assert answer.json()["error"]["code"] == "no_key"


def test_owners_do_not_see_each_other(front: Front, supervisor: FakeSupervisor) -> None:
    ann = client_of(front, authorization=f"Bearer {add_key(front, 'ann')}")
    bob = client_of(front, authorization=f"Bearer {add_key(front, 'bob')}")
    boss = client_of(front, authorization=f"Bearer {add_key(front, 'boss', 'admin')}")
    video = create(ann, prompt="a secret cat")["id"]
    supervisor.make()
    for method, path in routes(front):
        if "{video_id}" in path:
            body = {"prompt": "a cat"} if "remix" in path else {"priority": 0}
            answer = bob.request(method, path.replace("{video_id}", video), json=body)
            assert answer.status_code == 404 and "secret" not in answer.text, (method, path)
    assert bob.get("/v1/videos").json()["data"] == [] and len(boss.get("/v1/videos").json()["data"]) == 1
    assert ann.get(f"/v1/videos/{video}/content").content == VIDEO
    assert ann.post("/v1/videos", json={**ASK, "priority": 1}).status_code == 403
    assert boss.get(f"/v1/videos/{video}").status_code == 200


def test_keys_that_open_nothing(front: Front) -> None:
    key = add_key(front, "ann")
    client = client_of(front)

    def status(text: str) -> int:
        return client.get("/v1/videos", headers={"authorization": f"Bearer {text}"}).status_code

    assert status(key) == 200
    assert [status(bad) for bad in (key + "x", key[:-1], "ck_x_y", "ck__", "sk-foo", "")] == [401] * 6
    front.store.keys.revoke(key.split("_")[1])
    assert status(key) == 401 and client.get("/v1/videos").status_code == 401


def test_a_page_s_session(front: Front) -> None:
    key = add_key(front, "ann")
    client = client_of(front)
    opened = client.post("/session", json={"key": key})
    cookie = opened.headers["set-cookie"].lower()
    assert "httponly" in cookie and "samesite=strict" in cookie
    assert client.get("/v1/videos").status_code == 200
    foreign = client.post("/v1/videos", json=ASK, headers={"origin": "http://evil.example"})
    assert foreign.status_code == 403 and client.post("/v1/videos", json=ASK).status_code == 403
    assert client.post("/v1/videos", json=ASK, headers={"origin": "http://127.0.0.1:8000"}).status_code == 200
    assert client.delete("/session", headers={"origin": "http://127.0.0.1:8000"}).status_code == 200
    assert client.get("/v1/videos").status_code == 401
    foreign = client.post("/session", json={"key": key}, headers={"origin": "http://evil.example"})
    assert foreign.status_code == 403
    tries = [client.post("/session", json={"key": "ck_a_b"}).status_code for _ in range(5)]
    assert tries == [401, 401, 401, 401, 429]


def test_without_keys_only_this_machine_s_own_pages(front: Front) -> None:
    from chitu_diffusion.errors import UsageError
    from chitu_diffusion.service.serving import require_safe_address

    client = client_of(front)
    assert client.get("/v1/videos").status_code == 200
    assert client.get("/v1/videos", headers={"host": "evil.example"}).json()["error"]["code"] == "host"
    assert client.get("/v1/videos", headers={"host": "127.0.0.1.evil.example"}).status_code == 403
    assert client.get("/v1/videos", headers={"host": "[::1]:8000"}).status_code == 200
    for odd in ("[::1", "evil.example@127.0.0.1", "127.0.0.1/evil.example", "127.0.0.1?"):
        assert client.get("/v1/videos", headers={"host": odd}).json()["error"]["code"] == "host"
    assert client.get("/v1/videos", headers={"origin": "http://[::1"}).json()["error"]["code"] == "origin"
    foreign = {"origin": "http://evil.example"}
    assert client.post("/v1/videos", json=ASK, headers=foreign).json()["error"]["code"] == "origin"
    assert client.post("/v1/videos", json=ASK, headers={"origin": "null"}).status_code == 403
    assert client.post("/v1/videos", json=ASK, headers={"origin": "http://127.0.0.1:8000"}).status_code == 200
    front.settings.host = "0.0.0.0"
    with pytest.raises(UsageError, match="chitu keys add"):
        require_safe_address(front)
    add_key(front, "ann")
    front.auth._asked_at = float("-inf")  # it asks once a second
    require_safe_address(front)


@pytest.mark.parametrize(
    "name", ["metadata[a][b]", "flexcache[", "cascade[stages][0][height]", "metadata[b]"]
)
def test_a_form_s_names_are_taken_whole(client: TestClient, name: str) -> None:
    form = urlencode([("prompt", "a ball"), ("metadata[b]", "1"), (name, "2")])
    kind = {"content-type": "application/x-www-form-urlencoded"}
    assert client.post("/v1/videos/estimate", content=form, headers=kind).status_code == 400


ODD = ("x", "-1", "1e999", -1, 2**70, 1.5, True, [[]], {"a": {"b": 1}}, "\ud800", "\0")


def test_no_odd_value_is_a_fault(client: TestClient) -> None:
    from chitu_diffusion.service.dialect import FIELDS

    json_type = {"content-type": "application/json"}
    for name in FIELDS:
        for value in ODD:
            body = json.dumps({"prompt": "a cat", "num_frames": 5, name: value})
            answer = client.post("/v1/videos/estimate", content=body, headers=json_type)
            assert answer.status_code in (200, 400, 422), (name, value, answer.text)
    for query in (
        "limit=0",
        "limit=x",
        "limit=101",
        "limit=0100999",
        f"limit=1{'0' * 5000}",
        "order=up",
        "status=done",
        "after=x",
    ):
        assert client.get(f"/v1/videos?{query}").status_code in (400, 404)
    for form in ({"flexcache": "{"}, {"flexcache[a][b]": "1"}, {"[]": "1"}, {"size": "1x1", "size[a]": "2"}):
        assert client.post("/v1/videos/estimate", data={"prompt": "a", **form}).status_code == 400
