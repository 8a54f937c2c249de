"""What strangers hand over: payloads that would run, names that would lead elsewhere, noise on every port."""

from __future__ import annotations

import base64
import json
import os
import pickle
import random
import shutil
import socket
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from card import Card
from conftest import MakeConfig
from injecting import frames_sha256
from listening import ports_of

from benchmarks.faults import Lines, ranks_of, steps_of, waits_for
from chitu_diffusion.backend import DiffusionBackend
from chitu_diffusion.config import load_config
from chitu_diffusion.engine import Engine
from chitu_diffusion.errors import ChituError
from chitu_diffusion.media.reading import read_frames, read_recipe
from chitu_diffusion.models.convert import convert, verify
from chitu_diffusion.pipelines.checkpoint import load_task


class Payload:
    """Unpickled, it makes a file."""

    def __init__(self, canary: Path) -> None:
        self._canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self._canary),)


def test_no_payload_is_run(tiny_folder: Path, make_config: MakeConfig, tmp_path: Path, card: Card) -> None:
    canary = tmp_path / "canary"
    pickled = pickle.dumps(Payload(canary))
    backend = DiffusionBackend(make_config(tiny_folder))
    official = convert(tiny_folder, tmp_path / "official", "official").path
    tried = 0

    def door(open_it: Callable[[], Any]) -> None:
        nonlocal tried
        tried += 1
        with suppress(ChituError):
            open_it()
        assert not canary.exists(), tried

    def pth(file: Path, number: int) -> None:
        if number == 0:
            torch.save({"w": Payload(canary)}, file)
        elif number == 1:
            file.write_bytes(pickled)
        else:
            with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as bomb:
                bomb.writestr("archive/data.pkl", pickled)
                bomb.writestr("archive/data/0", b"\0" * 2**26)

    for file in official.glob("*.pth"):
        kept = file.read_bytes()
        for number in range(3):
            pth(file, number)
            door(lambda: verify(official))
            door(lambda: DiffusionBackend(make_config(official)))
        file.write_bytes(kept)
    for number, ending in enumerate((".npy", ".mp4", ".gif", ".safetensors", ".toml", ".yaml", ".json")):
        file = tmp_path / f"x{ending}"
        file.write_bytes(pickled)
        if ending == ".npy":
            np.save(file, np.array([Payload(canary)], object), allow_pickle=True)
        if ending == ".yaml":
            file.write_text(f"!!python/object/apply:os.mkdir ['{canary}']")
        for read in (read_frames, read_recipe):
            door(lambda read=read, file=file: read(file))
        door(lambda file=file: load_task(file, backend))
        door(lambda file=file: load_config(file, {}, {}))
        assert number < 7
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "evil"))
    settings = folder / "tokenizer" / "tokenizer_config.json"
    evil = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
    settings.write_text(json.dumps(json.loads(settings.read_text()) | evil))
    for place in (folder, folder / "tokenizer"):
        (place / "evil.py").write_text(f"import os\nos.mkdir({str(canary)!r})\nclass Evil: ...\n")
    door(lambda: verify(folder))
    door(lambda: DiffusionBackend(make_config(folder)))
    card.add(payloads=tried, executed=int(canary.exists()))


HOSTILE = (
    "../",
    "/",
    "..\\",
    "~/",
    "%2e%2e/",
    "\u202e",
    "CON",
    "a" * 300,
    "\u732b",
    ":",
    "\n",
    "*",
    "$(touch x)",
    " ",
    "-",
)


@contextmanager
def written_outside(folder: Path) -> Iterator[list[str]]:
    """What is opened for writing, made, or renamed outside of a folder meanwhile."""
    found: list[str] = []
    active = [True]

    def look(event: str, given: tuple[Any, ...]) -> None:
        if not active[0] or event not in ("open", "os.mkdir", "os.rename", "os.symlink", "os.link"):
            return
        writes = event != "open" or (isinstance(given[2], int) and given[2] & (os.O_WRONLY | os.O_RDWR))
        places = (
            [str(place) for place in given[:2] if isinstance(place, str)] if event != "open" else [given[0]]
        )
        for place in places if writes else []:
            if isinstance(place, str) and place != os.devnull:
                real = os.path.realpath(place)
                if not real.startswith(str(folder)):
                    found.append(f"{event} {place}")

    sys.addaudithook(look)
    try:
        yield found
    finally:
        active[0] = False


def test_no_name_leads_out_of_the_folder(
    tiny_folder: Path, make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, card: Card
) -> None:
    """Prompts and ids, which become names of files where none was asked for."""
    monkeypatch.setenv("CHITU_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    chance = random.Random(5)
    cases = card.rounds(60, 300)
    with Engine(make_config(tiny_folder)) as engine, written_outside(tmp_path.resolve()) as outside:
        for number in range(cases):
            text = "".join(chance.choices(HOSTILE, k=chance.randint(1, 5)))
            more = {"task_id": f"{text}{number}"} if number % 2 else {}
            with suppress(ChituError):
                task = engine.submit(text or "x", seed=number, num_inference_steps=1, num_frames=1, **more)
                engine.run_until_idle(raise_on_failure=False)
                assert task.is_finished()
    card.add(names=cases, escapes=len(outside))
    assert not outside


def words_of_strangers(number: int) -> Iterator[bytes]:
    """Noise, beginnings of torch's own store protocol for each key it might have, and pickles."""
    chance = random.Random(6)
    evil = base64.b64encode(pickle.dumps(Payload(Path("pwned"))))
    keys = [
        f"chitu/{name}/{rank}".encode()
        for name in ("heartbeat", "nonce", "status", "secret")
        for rank in (0, 1)
    ]
    keys += [b"torch.rendezvous.chitu", b"default_pg/0//0"]
    for _ in range(number):
        key = chance.choice(keys)
        stored = b"\0" + len(key).to_bytes(8, "little") + key + len(evil).to_bytes(8, "little") + evil
        yield chance.choice(
            [chance.randbytes(chance.choice((1, 8, 60, 4096))), stored, evil, b"GET / HTTP/1.1\r\n\r\n"]
        )


def test_noise_on_every_port_of_a_whole_run(
    tiny_folder: Path, make_config: MakeConfig, tmp_path: Path, card: Card
) -> None:
    """`--gpus 2` from the command line, and up to 2,000 words to its ports while it works."""
    asked = ["--seed", "3", "--steps", "150", "--model", str(tiny_folder), "--device", "cpu"]
    words = ["generate", "a cat", *asked, "--gpus", "2", "--parallel", "cfg2", "--json", "-o", "two.npy"]
    environment = {**os.environ, "CHITU_CACHE_DIR": str(tmp_path / "cache")}
    run = subprocess.Popen(
        [sys.executable, "-m", "chitu_diffusion", *words],
        cwd=tmp_path,
        env=environment | {"PYTHONPATH": str(Path(__file__).parents[2])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    said = Lines(run.stdout)
    told = Lines(run.stderr)
    assert waits_for(lambda: run.poll() is not None or any(steps_of(line) >= 1 for line in said.lines)), (
        told.lines
    )
    ports = sorted(ports_of([run.pid, *ranks_of(run.pid).values()]))
    assert ports, told.lines
    sent = 0
    for word in words_of_strangers(2000):
        with suppress(OSError), socket.create_connection(ports[sent % len(ports)], timeout=2) as stranger:
            stranger.sendall(word)
            sent += 1
        if run.poll() is not None:
            break
    assert run.wait(100) == 0, told.lines
    config = make_config(tiny_folder, infer__diffusion__cfg_batch="sequential")  # as a branch a rank
    with Engine(config) as engine:
        engine.submit("a cat", seed=3, num_inference_steps=150, save_path=str(tmp_path / "one.npy"))
        engine.run_until_idle()
    equal = frames_sha256(tmp_path / "one.npy") == frames_sha256(tmp_path / "two.npy")
    beyond = [host for host, _ in ports if host not in ("127.0.0.1", "::1")]
    card.add(words=sent, ports=len(ports), ports_beyond_loopback=len(beyond), equal=equal)
    assert sent > 200 and equal and not beyond and not (tmp_path / "pwned").exists()
