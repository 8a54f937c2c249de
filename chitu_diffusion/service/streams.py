"""Server-sent events: a job's numbered events with replay, and the changes of one's jobs. One task asks the
store for all jobs that are watched; readers wait for it.
"""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from prometheus_client import Gauge
from starlette.concurrency import run_in_threadpool

from chitu_diffusion.service.answers import ApiError, data_of, retry_later, status_of
from chitu_diffusion.service.jobs import JobEvent, JobMissingError, JobState, StoreDownError
from chitu_diffusion.service.store import JobStore

T = TypeVar("T")
logger = logging.getLogger(__name__)
POLL_S = 0.25
KEEP_ALIVE_S = 15.0
MOST_STREAMS = 200
MOST_STREAMS_OF_ONE = 10
_POSITION_S = 2.0
HEADERS = {"cache-control": "no-store", "x-accel-buffering": "no"}
MEDIA_TYPE = "text/event-stream"


class JobWatcher:
    """Knows when a watched job has changed.

    Args:
        gauge: of the streams that are open.
        stopping: streams end when it is set.
    """

    def __init__(self, store: JobStore, gauge: Gauge, stopping: threading.Event) -> None:
        self._store = store
        self._gauge = gauge
        self._stopping = stopping
        self._watched: Counter[str] = Counter()
        self._known: dict[str, tuple[int, JobState]] = {}
        self._by_owner: Counter[str] = Counter()
        self._changed = asyncio.Condition()
        self._asked: dict[tuple[object, ...], asyncio.Task[Any]] = {}
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """In the loop that runs."""
        self._task = asyncio.create_task(self._poll())

    async def stop(self) -> None:
        """No more is asked."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def require_stream(self, who: str) -> None:
        """Whether a caller may open one more stream.

        Raises:
            ApiError: 429: there are too many.
        """
        if self._by_owner.total() >= MOST_STREAMS or self._by_owner[who] >= MOST_STREAMS_OF_ONE:
            raise ApiError(429, "streams", "too many event streams are open", headers=retry_later(5))

    async def events(self, job_id: str, after: int, who: str) -> AsyncIterator[str]:
        """A job's events above a number, as text of the stream; ends after the last one."""
        yield "retry: 1000\n\n"
        said_at = time.monotonic()
        position: int | None = None
        with self._counted(who, job_id):
            while not self._stopping.is_set():
                found = await self._new_events(job_id, after)
                if found is None:
                    return
                events, state = found
                for event in events:
                    after = event.n
                    yield sse(event.kind, _data_of(event), event.n)
                if state.ended:
                    return
                before = position
                position = await self._position(job_id, state)
                if position is not None and position != before:
                    yield sse("queue", {"position": position})
                elif not events and time.monotonic() - said_at > KEEP_ALIVE_S:
                    yield ": here\n\n"
                else:
                    await self._wait_beyond(job_id, after)
                    continue
                said_at = time.monotonic()

    async def feed(self, owner: str | None, who: str) -> AsyncIterator[str]:
        """The newest jobs of an owner whenever one has changed; the first time all of them."""
        yield "retry: 1000\n\n"
        seen: dict[str, tuple[int, int]] = {}
        said_at = time.monotonic()
        with self._counted(who):
            while not self._stopping.is_set():
                try:
                    page = await run_in_threadpool(self._store.jobs, owner, limit=100)
                except StoreDownError:
                    return
                now = {job.id: (job.events, job.priority) for job in page.jobs}
                lines = [
                    sse("job", {"id": job.id, "status": status_of(job), "events": job.events})
                    for job in reversed(page.jobs)
                    if seen.get(job.id) != now[job.id]
                ]
                lines += [sse("gone", {"id": gone}) for gone in seen.keys() - now.keys() if not page.has_more]
                seen = now
                if not lines and time.monotonic() - said_at > KEEP_ALIVE_S:
                    lines = [": here\n\n"]
                for line in lines:
                    said_at = time.monotonic()
                    yield line
                await asyncio.sleep(2 * POLL_S)

    @contextmanager
    def _counted(self, who: str, job_id: str | None = None) -> Iterator[None]:
        """A stream is open, and its job watched."""
        self._by_owner[who] += 1
        self._gauge.inc()
        if job_id is not None:
            self._watched[job_id] += 1
        try:
            yield
        finally:
            self._by_owner[who] -= 1
            self._gauge.dec()
            if job_id is not None:
                self._watched[job_id] -= 1
                if not self._watched[job_id]:
                    del self._watched[job_id]
                    self._known.pop(job_id, None)

    async def _position(self, job_id: str, state: JobState) -> int | None:
        if state is not JobState.QUEUED:
            return None
        try:
            return await self._shared(self._store.queue_position, job_id)
        except StoreDownError:
            return None

    async def _new_events(self, job_id: str, after: int) -> tuple[tuple[JobEvent, ...], JobState] | None:
        """None: the job has gone."""
        try:
            return await self._shared(self._state_and_events, job_id, after)
        except (JobMissingError, StoreDownError):
            return None  # the client comes again

    def _state_and_events(self, job_id: str, after: int) -> tuple[tuple[JobEvent, ...], JobState]:
        """The state is read first, so that an end comes with its event."""
        state = self._store.job(job_id).state
        return self._store.events(job_id, after), state

    async def _shared(self, ask: Callable[..., T], *about: object) -> T:
        """The store's answer, asked once for all readers that wait for the same."""
        key = (ask.__name__, *about)
        task = self._asked.get(key)
        if task is None:
            task = self._asked[key] = asyncio.create_task(run_in_threadpool(ask, *about))
            task.add_done_callback(lambda _: self._asked.pop(key))
        return await asyncio.shield(task)  # a reader that leaves takes nothing from the others

    async def _wait_beyond(self, job_id: str, after: int) -> None:
        """Until the job has a later event, or for a while."""
        try:
            async with asyncio.timeout(_POSITION_S):
                async with self._changed:
                    await self._changed.wait_for(
                        lambda: self._known.get(job_id, (after,))[0] > after or self._stopping.is_set()
                    )
        except TimeoutError:
            return

    async def _poll(self) -> None:
        while True:
            await asyncio.sleep(POLL_S)
            if self._watched:
                try:
                    known = await run_in_threadpool(self._store.last_events, list(self._watched))
                except StoreDownError as error:
                    logger.warning("the store cannot be asked: %s", error)
                    continue
                # one that has gone wakes its readers, too
                gone = dict.fromkeys(self._watched.keys() - known.keys(), (1 << 62, JobState.CANCELLED))
                self._known = {**known, **gone}
            async with self._changed:
                self._changed.notify_all()


def sse(kind: str, data: Any, n: int | None = None) -> str:
    """One event as text."""
    number = "" if n is None else f"id: {n}\n"
    return f"{number}event: {kind}\ndata: {json.dumps(data, ensure_ascii=False)}\n\n"


def _data_of(event: JobEvent) -> dict[str, Any]:
    return {"job": event.job, "n": event.n, "at": event.at, **data_of(event)}
