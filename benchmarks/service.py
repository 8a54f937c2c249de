"""The service under load, with wan-tiny on one core: what it costs beside `chitu batch`, whether anything
grows, many readers of events, and one owner that floods the queue.

    python -m benchmarks.service                      all sections
    python -m benchmarks.service --sections overhead
    python -m benchmarks.service --small              seconds: only to see that it works

Every section drives a `chitu serve` of its own over HTTP. Wall times mean something on an idle machine only;
the report has the load, and CPU seconds beside them.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import httpx

from benchmarks.report import Report, Section, parser, report_for, run_sections
from benchmarks.served import Served, cpu_s, descriptors, on_cpu, rss_mb, served, wait_for
from chitu_diffusion.service.jobs import Job

MIX = (  # owner, size, frames, steps, priority; one arrives each second
    ("ann", "128x128", 33, 8, 0),
    ("bob", "128x128", 17, 12, 0),
    ("ann", "64x64", 33, 6, 5),
    ("bob", "128x128", 33, 4, 0),
    ("bob", "64x64", 17, 16, 5),
    ("ann", "128x64", 17, 8, 0),
)
ARRIVAL_S = 1.0
TINY = {"prompt": "A red ball rolls on grass", "size": "64x64", "num_frames": 5, "num_inference_steps": 2}
READERS_OF_ONE = 10
SAMPLES = 20
GROWN = {"MB": rss_mb, "descriptors": descriptors}


def overhead(small: bool, report: Report, folder: Path) -> None:
    """Rounds of the same jobs by the service and by `chitu batch`, in turn; who begins alternates."""
    mix = MIX[2:3] if small else MIX
    found: dict[str, list[dict[str, float]]] = {"service": [], "batch": []}
    with served(folder / "overhead", ("ann", "bob")) as server:
        _by_service(server, MIX[2:3], 99)  # what only the first job pays
        for number in range(1 if small else 4):
            calls: list[tuple[str, Callable[[], dict[str, float]]]] = [
                ("service", partial(_by_service, server, mix, number)),
                ("batch", partial(_by_batch, folder / f"batch{number}", mix, number)),
            ]
            for name, call in calls if number % 2 == 0 else calls[::-1]:
                row = call()
                found[name].append(row)
                report.add(
                    "Overhead, rounds", {"round": number, "by": name, **row, "load": os.getloadavg()[0]}
                )
    for column in ("busy_s", "cpu_s"):
        ratios = [
            ours[column] / theirs[column]
            for ours, theirs in zip(found["service"], found["batch"], strict=True)
        ]
        report.add(
            "Overhead",
            {
                "of a job": column,
                "service": statistics.median(row[column] for row in found["service"]),
                "batch": statistics.median(row[column] for row in found["batch"]),
                "overhead_percent": 100 * (statistics.median(ratios) - 1),
                "least_percent": 100 * (min(ratios) - 1),
                "most_percent": 100 * (max(ratios) - 1),
            },
        )


def _fields(size: str, frames: int, steps: int, seed: int) -> dict[str, Any]:
    return {**TINY, "size": size, "num_frames": frames, "num_inference_steps": steps, "seed": seed}


def _by_service(
    server: Served, mix: Sequence[tuple[str, str, int, int, int]], number: int
) -> dict[str, float]:
    """Seconds of a job: leased (`busy_s`), of the worker's and the front's CPU; and between two jobs."""
    pids = server.processes()
    before = {role: cpu_s(pid) for role, pid in pids.items()}
    ids = []
    for place, (owner, size, frames, steps, priority) in enumerate(mix):
        if place:
            time.sleep(ARRIVAL_S)
        ids.append(server.submit(owner, {**_fields(size, frames, steps, number), "priority": priority}))
    jobs = sorted(server.ended(ids), key=lambda job: job.claimed_at or 0.0)
    spent = {role: (cpu_s(pid) - before[role]) / len(ids) for role, pid in pids.items()}
    gaps = [
        (after.claimed_at or 0.0) - max(job.ended_at or 0.0, after.created_at)
        for job, after in zip(jobs, jobs[1:], strict=False)
    ]
    return {
        "busy_s": sum(_busy(job) for job in jobs) / len(ids),
        "cpu_s": spent["worker"],
        "front_cpu_s": spent["front"],
        "between_jobs_s": statistics.mean(gaps) if gaps else 0.0,
    }


def _by_batch(out: Path, mix: Sequence[tuple[str, str, int, int, int]], number: int) -> dict[str, float]:
    """Seconds of a job from the loaded model to the end of the last, and of the process's CPU."""
    out.mkdir()
    rows = []
    for place, (_, size, frames, steps, _) in enumerate(((*MIX[2],), *mix)):
        fields = _fields(size, frames, steps, number if place else 99)
        width, height = map(int, fields.pop("size").split("x"))
        rows.append(json.dumps({**fields, "width": width, "height": height, "id": str(place)}))
    (out / "rows.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    command = [sys.executable, "-m", "chitu_diffusion", "batch", "--json", str(out / "rows.jsonl")]
    command += ["-o", str(out)]
    seen: list[tuple[float, float]] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=on_cpu()) as process:
        for line in process.stdout or ():
            if json.loads(line)["event"] == "end":  # of the first: all only it pays is over
                seen.append((time.monotonic(), cpu_s(process.pid)))
    began, cpu_before = seen[0]
    ended, cpu_after = seen[-1]
    return {"busy_s": (ended - began) / len(mix), "cpu_s": (cpu_after - cpu_before) / len(mix)}


def _busy(job: Job) -> float:
    return (job.ended_at or 0.0) - (job.claimed_at or 0.0)


def growth(small: bool, report: Report, folder: Path) -> None:
    """Jobs one after the other: what each process holds, against how many have ended; then all are swept."""
    jobs = 6 if small else 300
    first = jobs // 3  # until then memory fills that is used again
    retention = 3600.0 if small else 10.0
    samples: list[tuple[int, dict[str, float]]] = []
    with served(folder / "growth", ("ann",), retention_s=retention) as server:
        pids = server.processes()
        for begun in range(0, jobs, each := max(1, jobs // SAMPLES)):
            server.ended([server.submit("ann", {**TINY, "seed": begun + n}) for n in range(each)])
            held = {
                f"{role}, {unit}": float(look(pid))
                for role, pid in pids.items()
                for unit, look in GROWN.items()
            }
            held |= {"rows": float(server.rows()), "files": float(server.files())}
            samples.append((begun + each, held))
        died = server.processes() != pids
        if not small:
            wait_for(lambda: server.rows() == 0, 2 * 30 + retention)
            wait_for(lambda: not any((server.data / "jobs").iterdir()), 60)
        left = {"rows": server.rows(), "files": server.files()}
    for name in samples[0][1]:
        xs, ys = zip(*((number, held[name]) for number, held in samples if number >= first), strict=True)
        slope = statistics.linear_regression(xs, ys).slope
        row = {"what": name, "at_first": samples[0][1][name], "after_a_third": ys[0], "at_last": ys[-1]}
        report.add("Growth", {**row, "slope_per_100_jobs": 100 * slope, "swept": left.get(name)})
    if died:
        report.note("a process was replaced while jobs ran")
    report.note(f"growth: {samples[-1][0]} jobs of 64x64x5, 2 steps; retention {retention:g} s")


def readers(small: bool, report: Report, folder: Path) -> None:
    """The same jobs without readers of their events and with many."""
    owners = [f"owner{n}" for n in range(2 if small else 20)]
    fields = {**TINY, "num_inference_steps": 3 if small else 12}
    with served(folder / "readers", owners) as server:
        for each in (0, READERS_OF_ONE):
            front = server.processes()["front"]
            before = (cpu_s(front), time.monotonic())
            ids = {owner: server.submit(owner, fields) for owner in owners}
            read = asyncio.run(_read_all(server, ids, each))
            jobs = server.ended(list(ids.values()))
            row: dict[str, Any] = {"jobs": len(ids), "readers": len(read)}
            row |= {"front_cpu_s": cpu_s(front) - before[0], "seconds": time.monotonic() - before[1]}
            row |= {"front_mb": rss_mb(front), "front_descriptors": descriptors(front)}
            row["job_s"] = statistics.median(_busy(job) for job in jobs)
            said = {job.id: [event.n for event in server.store.events(job.id)] for job in jobs}
            row["events"] = sum(len(events) for _, events in read)
            row["all_in_order"] = all(events == said[job] for job, events in read)
            report.add("Readers", row)


async def _read_all(server: Served, ids: dict[str, str], each: int) -> list[tuple[str, list[int]]]:
    """(job, numbers of the events) of each reader, once all streams have ended."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=server.url, timeout=600, limits=limits) as http:

        async def read(owner: str, job: str) -> tuple[str, list[int]]:
            numbers = []
            url = f"/v1/videos/{job}/events"
            async with http.stream("GET", url, headers=server.headers(owner)) as stream:
                stream.raise_for_status()
                async for line in stream.aiter_lines():
                    if line.startswith("id: "):
                        numbers.append(int(line[4:]))
            return job, numbers

        return list(await asyncio.gather(*(read(*item) for item in ids.items() for _ in range(each))))


def flood(small: bool, report: Report, folder: Path) -> None:
    """Two owners that submit a job now and then: how long these wait, alone and while a third floods."""
    rounds = 1 if small else 6
    many = 4 if small else 60
    with served(folder / "flood", ("ann", "bob", "eve")) as server:
        server.ended([server.submit("ann", TINY)])
        alone = _busy(server.ended([server.submit("ann", TINY)])[0])
        for flooding in (False, True):
            flood_ids = [server.submit("eve", {**TINY, "seed": n}) for n in range(many if flooding else 0)]
            ids = []
            for number in range(rounds):
                ids += [server.submit(owner, {**TINY, "seed": number}) for owner in ("ann", "bob")]
                time.sleep(5 * alone)
            jobs = server.ended(ids)
            done = sum(server.store.job(job).state.ended for job in flood_ids)
            waits = [(job.claimed_at or 0.0) - job.created_at for job in jobs]
            row: dict[str, Any] = {"flood": len(flood_ids), "flood_done_meanwhile": done, "job_s": alone}
            row["in_order_of_arrival_s"] = alone * len(flood_ids)  # the first one's wait behind the flood
            row |= {"wait_s": statistics.median(waits), "wait_most_s": max(waits)}
            row["wait_most_in_jobs"] = max(waits) / statistics.median(_busy(job) for job in jobs)
            report.add("Flood", row)
            server.ended(flood_ids)


SECTIONS = (
    ("overhead", overhead, "the same jobs by `chitu batch`, in turn", 150),
    ("readers", readers, "200 readers of events", 60),
    ("flood", flood, "one owner floods the queue", 90),
    ("growth", growth, "300 jobs: memory, descriptors, rows, files", 240),
)


def main(words: list[str] | None = None) -> Report:
    """The sections that were asked for."""
    options = parser(__doc__)
    options.add_argument("--sections", nargs="+", default=[], metavar="NAME", help="a wrong name lists all")
    asked = options.parse_args(words)
    asked.device = "cpu"
    report = report_for("The service under load", "service", asked)
    with tempfile.TemporaryDirectory() as folder:
        sections = [
            Section(
                name, about, 0 if asked.small else seconds, partial(measure, asked.small, folder=Path(folder))
            )
            for name, measure, about, seconds in SECTIONS
        ]
        run_sections(sections, report, asked=asked.sections, budget=asked.budget)
    print(*report.write(), sep="\n")
    return report


if __name__ == "__main__":
    raise SystemExit(main().failed)
