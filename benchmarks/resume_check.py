"""Does a video that was cut short and went on in another process have the very bits of one that was not?

    python -m benchmarks.resume_check                  # one rank, and two where there are two GPUs
    python -m benchmarks.resume_check --device cpu     # the same on processes of the CPU, wan-tiny at 64x64

One process makes each video whole, and again up to four of its steps, where it stops and leaves a checkpoint;
another one goes on from each. `wan-tiny` at its own size, 8 steps, with the attention kernel that `auto`
picks. `benchmarks.gpu_check` prints the same table after that of the kernels.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from benchmarks.report import table_of
from chitu_diffusion.config import EngineConfig, set_nccl_defaults
from chitu_diffusion.distributed.plan import ParallelPlan
from chitu_diffusion.engine import Engine
from chitu_diffusion.executor.worker_group import WorkerGroup
from chitu_diffusion.task import DiffusionUserParams

STEPS = 8
CUTS = (1, 3, 5, 7)
CACHES: dict[str, Any] = {
    "none": None,
    "teacache": {"strategy": "teacache", "threshold": 0.2},
    "taylorseer": {"strategy": "taylorseer"},
}
LAYOUTS = ("ulysses", "ring", "cfg")
SMALL = {"height": 64, "width": 64, "num_frames": 5}


def asked(cache: str, path: Path, small: bool) -> DiffusionUserParams:
    """A request."""
    return DiffusionUserParams(
        prompt="A cat walking on grass",
        seed=1,
        num_inference_steps=STEPS,
        flexcache=CACHES[cache],
        save_path=str(path),
        **(SMALL if small else {}),
    )


def engine_on(device: str, workers: WorkerGroup | None) -> Engine:
    """wan-tiny, which writes a checkpoint after every unit."""
    place = device if workers is None else str(workers.groups.device)
    config = EngineConfig(infer={"device": place, "threads": 1}, checkpoint={"every_s": 0})
    return Engine(config, workers=workers)


def make_parts(engine: Engine, folder: Path, small: bool) -> None:
    """Every video whole; and cut short after each of the steps in `CUTS`."""
    for cache in CACHES:
        engine.submit(asked(cache, folder / f"{cache}.npy", small))
        engine.run_until_idle()
        for cut in CUTS:
            place = folder / f"{cache}-{cut}"
            task = engine.submit(asked(cache, folder / f"{cache}-{cut}.npy", small), checkpoints=place)
            for _ in range(1 + cut):  # the text, then the steps
                engine.step()
            engine.cancel(task.task_id)


def go_on(engine: Engine, folder: Path, small: bool) -> None:
    """From each checkpoint to the end; what came of it goes to `rows.json`."""
    rows = []
    for cache in CACHES:
        whole = np.load(folder / f"{cache}.npy").astype(float)
        for cut in CUTS:
            path = folder / f"{cache}-{cut}.npy"
            task = engine.submit(asked(cache, path, small), checkpoints=folder / f"{cache}-{cut}")
            found = task.resumed
            engine.run_until_idle()
            error = float(np.abs(np.load(path) - whole).max())
            said = "not resumed" if found is None or found.step != cut else "" if found.exact else "not exact"
            rows.append({"cache": cache, "cut after step": cut, "largest difference": error, "said": said})
    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")


def one_rank(
    rank: int, world: int, port: int, layout: str, device: str, folder: str, resuming: bool, small: bool
) -> None:
    """A process's life."""
    os.environ["CHITU_CACHE_DIR"] = str(Path(folder, "cache"))
    workers = None
    if world > 1:
        set_nccl_defaults()
        store = dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
        place = torch.device("cuda", rank) if device == "cuda" else torch.device(device)
        plan = ParallelPlan(**{layout: world})
        workers = WorkerGroup(plan, rank, dist.PrefixStore(f"{layout}/{resuming}", store), device=place)
    engine = engine_on(device, workers)
    if engine.is_driver:
        (go_on if resuming else make_parts)(engine, Path(folder), small)
    engine.close()


def rows_of(layout: str, device: str, small: bool) -> list[dict[str, Any]]:
    """All cuts of one layout, "one GPU" for a single rank."""
    world = 1 if layout == "one" else 2
    folder = tempfile.mkdtemp(prefix="chitu-resume-")
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("spawn")
    try:
        for resuming in (False, True):
            given = (world, store.port, layout, device, folder, resuming, small)
            ranks = [context.Process(target=one_rank, args=(rank, *given)) for rank in range(world)]
            for process in ranks:
                process.start()
            for process in ranks:
                process.join()
            if any(process.exitcode for process in ranks):
                return [{"layout": layout, "verdict": f"exit codes {[p.exitcode for p in ranks]}"}]
        rows: list[dict[str, Any]] = json.loads(Path(folder, "rows.json").read_text(encoding="utf-8"))
    finally:
        shutil.rmtree(folder)
    for row in rows:
        same = row["largest difference"] == 0
        row["verdict"] = row["said"] or ("ok" if same else "OTHER BITS")
    return [{"layout": layout, **{name: row[name] for name in row if name != "said"}} for row in rows]


def resume_rows(device: str, small: bool) -> list[dict[str, Any]]:
    """A row for each layout, cache and cut; two ranks where there are two GPUs, or on the CPU."""
    layouts = ["one"]
    if device == "cpu" or torch.cuda.device_count() > 1:
        layouts += LAYOUTS
    return [row for layout in layouts for row in rows_of(layout, device, small)]


def main(words: list[str] | None = None) -> int:
    """The command line; 1 if a video is not the same."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    given = options.parse_args(words)
    rows = resume_rows(given.device, small=given.device == "cpu")
    print(table_of(rows))
    return int(any(row["verdict"] != "ok" for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
