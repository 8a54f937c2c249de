"""Requests that Schemathesis makes of the interface's own description, fitting and not, to a server with
jobs: none is a fault, and each answer is one that the description promises.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import requests
import schemathesis
from fronts import FakeSupervisor, listening, make_front
from hypothesis import HealthCheck, given, seed, settings
from schemathesis import GenerationMode
from schemathesis.checks import CHECKS, load_all_checks

NAMES = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
    "unsupported_method",
    "allow_header_conformance",
)
ENDLESS = ("/v1/feed",)


def checks() -> list[Any]:
    load_all_checks()
    return [CHECKS.get_one(name) for name in NAMES]


@contextmanager
def server(folder: Path) -> Iterator[str]:
    front = make_front(folder)
    with listening(front, FakeSupervisor(front).run) as url:
        yield url
    front.store.close()


def strategies(operation: Any, made: list[str]) -> Iterator[Any]:
    """Fitting requests and others, of videos that there are not and of some that there are."""
    places = [{}, *({"path_parameters": {"video_id": video}} for video in made)]
    modes = [GenerationMode.POSITIVE]
    if operation.body or operation.query:  # else nothing can be wrong about it
        modes.append(GenerationMode.NEGATIVE)
    for mode in modes:
        for place in places:
            yield operation.as_strategy(generation_mode=mode, **place)


@contextmanager
def videos(url: str) -> Iterator[list[str]]:
    """One that is done soon, and one that runs until it is cancelled."""
    made = [
        requests.post(f"{url}/v1/videos", json={"prompt": prompt}, timeout=10).json()["id"]
        for prompt in ("a ball", "a slow ball")
    ]
    yield made
    requests.post(f"{url}/v1/videos/{made[1]}/cancel", timeout=10)


def tried(url: str, most: int, *, whole: bool = True) -> Counter[int]:
    """How many answers there were by status; each is checked.

    Args:
        most: requests of an operation, a kind of data and a video.
        whole: of videos that there are, too.
    """
    found: Counter[int] = Counter()
    wanted = checks()
    session = requests.Session()
    document = session.get(f"{url}/openapi.json", timeout=10).json()

    def ask(case: Any) -> None:
        answer = case.call(base_url=url, session=session, timeout=30)
        found[answer.status_code] += 1
        case.validate_response(answer, checks=wanted)

    for result in schemathesis.openapi.from_dict(document).get_all_operations():
        operation = result.ok()
        if operation.path in ENDLESS:
            continue
        with videos(url) if whole and "{video_id}" in operation.path else nullcontext([]) as made:
            # the events of one that runs would be waited for
            for strategy in strategies(operation, made[:1] if operation.path.endswith("/events") else made):
                check = settings(
                    max_examples=most, deadline=None, database=None, suppress_health_check=list(HealthCheck)
                )(seed(1)(given(strategy)(ask)))
                check()
    return found


def test_a_few_generated_requests(tmp_path: Path) -> None:
    with server(tmp_path) as url:
        found = tried(url, 1, whole=False)
    assert found.total() > 30 and found[200] > 5


def test_many_generated_requests(tmp_path: Path) -> None:
    with server(tmp_path) as url:
        found = tried(url, 18)
    assert found.total() >= 600
