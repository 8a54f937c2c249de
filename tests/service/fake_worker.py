"""A forkserver whose workers speak the pipe and compute nothing.

A job's `resolved`: steps, step_s; and what goes wrong: kill_at and stick_at (steps at which its first worker
dies or sticks), poison (kills each worker before its first step), failure. previews,
says_pid: it tells of them; grows: bytes that it has more from then on.
"""

from __future__ import annotations

import hashlib
import os
import queue
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

from chitu_diffusion.service.forkserver import serve
from chitu_diffusion.service.pipe import LineChannel

TICK_S = 0.05


def work(end: socket.socket, about: dict[str, Any]) -> None:
    channel = LineChannel(end)
    channel.send("started", pid=os.getpid())
    commands: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()

    def read() -> None:
        for message in channel.messages():
            commands.put(message)
        os._exit(1)

    rss = [1]

    def tick() -> None:
        while True:
            channel.send("tick", rss=rss[0], gpu_bytes=0)
            time.sleep(TICK_S)

    for beside in (read, tick):
        threading.Thread(target=beside, daemon=True).start()
    os.chdir(about["data"])
    channel.send("ready", layout="fake")
    while True:
        command = commands.get()
        if command["kind"] == "run":
            rss[0] += command["params"].get("grows", 0)
            run(command, channel, commands)


def run(command: dict[str, Any], channel: LineChannel, commands: queue.SimpleQueue[dict[str, Any]]) -> None:
    params = command["params"]
    about = {"job": command["job"], "fence": command["fence"]}
    folder = Path("jobs", command["job"], str(command["fence"]))
    folder.mkdir(parents=True, exist_ok=True)
    step = 0
    state = str(params["seed"])
    first = command["fence"] == 1
    for saved in command["checkpoints"][:1]:
        step = saved["step"]
        state = Path(saved["path"]).read_text(encoding="utf-8")
        channel.send("resumed", **about, from_step=step, exact=True, differs=[])
    if params.get("says_pid"):
        channel.send("note", **about, message=str(os.getpid()))
    if params.get("poison"):
        os.kill(os.getpid(), signal.SIGKILL)
    if params.get("failure"):
        channel.send("ended", **about, state="failed", failure=params["failure"], may_pass=True)
        return
    while step < params["steps"]:
        wishes = {commands.get()["kind"] for _ in range(commands.qsize())}
        if "cancel" in wishes:
            channel.send("ended", **about, state="cancelled")
            return
        held = command["hold_at_step"] is not None and step >= command["hold_at_step"]
        if held or "park" in wishes:
            channel.send("held" if held else "parked", **about, step=step)
            return
        if first and params.get("kill_at") == step:
            os.kill(os.getpid(), signal.SIGKILL)
        while first and params.get("stick_at") == step:
            time.sleep(1)
        time.sleep(params["step_s"])
        step += 1
        state = hashlib.sha256(f"{state} {step}".encode()).hexdigest()
        said = {"stage": "denoising", "status": "denoising", "step": step, "steps": params["steps"]}
        said |= {
            "fraction": step / params["steps"],
            "seconds": params["step_s"],
            "eta_s": 1.0,
            "saved": False,
        }
        channel.send("progress", **about, **said, at=time.time())
        if params.get("previews"):
            channel.send("preview", **about, step=step)
        channel.send("checkpoint", **about, step=step, seconds=0.01, **written(folder / f"step{step}", state))
    video = written(folder / "video.mp4", state)
    artifact = {"variant": "video", "media_type": "video/mp4", **video}
    channel.send("ended", **about, state="completed", artifacts=[artifact], seconds={"denoising": 1.0})


def written(file: Path, text: str) -> dict[str, Any]:
    file.write_text(text, encoding="utf-8")
    digest = hashlib.sha256(text.encode()).hexdigest()
    return {"path": str(file), "bytes": len(text), "sha256": digest}


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])), work)
