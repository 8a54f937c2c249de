"""A command that was cut short goes on when it is given again: killed, told to end, or interrupted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Chitu
from ranks import CONTEXT

from chitu_diffusion.cli.resume import checkpoint_root, job_key
from chitu_diffusion.config import EngineConfig
from chitu_diffusion.errors import UsageError
from chitu_diffusion.task import DiffusionUserParams

ENOUGH = 60


class Run:
    """`chitu WORDS` in a process of its own, with a pause in every step."""

    def __init__(self, folder: Path, words: list[str]) -> None:
        self._said = folder / f"{len(list(folder.glob('*.said')))}.said"
        self._process = CONTEXT.Process(
            target=slow_run, args=(str(folder), str(self._said), words), daemon=True
        )
        self._process.start()

    def send(self, name: str) -> None:
        os.kill(self._process.pid, getattr(signal, name))

    def end(self) -> tuple[int, str]:
        """The exit code, and what it said."""
        self._process.join(ENOUGH)
        assert self._process.exitcode is not None, "it hangs"
        return self._process.exitcode, self._said.read_text()

    def kill(self) -> None:
        self._process.kill()
        self._process.join()


def slow_run(folder: str, said: str, words: list[str]) -> None:
    from chitu_diffusion.cli.app import run
    from chitu_diffusion.sampling.solvers import Sampler

    os.chdir(folder)
    os.environ["CHITU_CACHE_DIR"] = str(Path(folder, "cache"))
    sys.stdout = sys.stderr = Path(said).open("w", buffering=1)  # noqa: SIM115
    step = Sampler.step

    def slowly(*given):
        time.sleep(0.1)
        return step(*given)

    Sampler.step = slowly
    sys.exit(run(words))


@pytest.fixture
def begin(tiny_folder: Path, tmp_path: Path):
    """Starts a command line."""
    settings = ["--model", str(tiny_folder), "--set", "infer.threads=1", "--set", "checkpoint.every_s=0"]
    started: list[Run] = []

    def start(*words: str) -> Run:
        started.append(Run(tmp_path, [*words, *settings]))
        return started[-1]

    yield start
    for run in started:
        run.kill()


def steps_saved(folder: Path, after: float = 0.0) -> int:
    """The newest checkpoint's, of those that were written after a time."""
    files = (folder / "cache").glob("checkpoints/*/*/*.safetensors")
    names = [file.name for file in files if written_at(file) > after]
    return max((int(name.rpartition("step")[2].partition(".")[0]) for name in names), default=-1)


def written_at(file: Path) -> float:
    try:
        return file.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def wait_for_step(folder: Path, step: int) -> None:
    deadline = time.monotonic() + ENOUGH
    while steps_saved(folder) < step:
        assert time.monotonic() < deadline
        time.sleep(0.01)


WORDS = ("a cat", "--seed", "7", "--steps", "16", "--cache", "easycache:warmup=3,threshold=5")


@pytest.fixture
def undisturbed(tiny_folder: Path, chitu: Chitu, tmp_path: Path) -> bytes:
    assert chitu("generate", *WORDS, "-o", "whole.npy", "--model", tiny_folder)[0] == 0
    return np.load(tmp_path / "whole.npy").tobytes()


@pytest.mark.parametrize("signals", [("SIGKILL", "SIGKILL"), ("SIGTERM", "SIGHUP"), ("SIGINT",)], ids=str)
def test_the_same_command_goes_on(
    begin, tmp_path: Path, undisturbed: bytes, signals: tuple[str, ...]
) -> None:
    for number, name in enumerate(signals, start=1):
        run = begin("generate", *WORDS, "-o", "a.npy")
        wait_for_step(tmp_path, 4 * number)
        run.send(name)
        code, said = run.end()
        if name == "SIGKILL":
            assert code == -signal.SIGKILL
        else:
            assert code == 130 and f"saved at step {steps_saved(tmp_path)} of 16" in said
    left = steps_saved(tmp_path)
    code, said = begin("generate", *WORDS, "-o", "a.npy").end()
    assert code == 0 and f"going on at step {left} of 16" in said, said
    assert np.load(tmp_path / "a.npy").tobytes() == undisturbed
    assert steps_saved(tmp_path) == -1 and not list(tmp_path.glob("cache/checkpoints/*"))


def test_two_ranks_go_on(chitu: Chitu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHITU_CACHE_DIR", str(tmp_path / "cache"))
    words = ["generate", "a cat", "--seed", "7", "--steps", "20", "--size", "32x32", "--frames", "5"]
    words += ["--cache", "taylorseer", "--device", "cpu", "--set", "checkpoint.every_s=0"]
    command = [sys.executable, "-m", "chitu_diffusion", *words, "--gpus", "2", "--parallel", "cfg2"]

    def start(path: str) -> subprocess.Popen[str]:
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen([*command, "-o", path], cwd=tmp_path, text=True, **pipes)

    launcher = start("a.npy")
    wait_for_step(tmp_path, 6)
    launcher.kill()
    launcher.communicate(timeout=ENOUGH)
    last = start("a.npy")
    said = last.communicate(timeout=ENOUGH)[1]
    assert last.returncode == 0 and "going on at step" in said and "not exact" not in said, said
    assert not list(tmp_path.glob("cache/checkpoints/*"))
    # a branch a rank is one branch after the other here, to the bit
    code, _, said = chitu(*words, "--set", "infer.diffusion.cfg_batch=sequential", "-o", "whole.npy")
    assert code == 0, said
    assert (tmp_path / "a.npy").read_bytes() == (tmp_path / "whole.npy").read_bytes()


def test_rank_0_alone_takes_the_folder(chitu: Chitu, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other ranks have it from rank 0; each taking one for itself was a race."""
    taken = []

    def root(key: str | None, cache: Path | None) -> nullcontext[None]:
        taken.append(key)
        return nullcontext()

    def stop(*given: object, **named: object) -> None:
        raise UsageError("far enough")

    monkeypatch.setattr("chitu_diffusion.cli.runner.checkpoint_root", root)
    monkeypatch.setattr("chitu_diffusion.engine.Engine.__init__", stop)
    for rank in ("0", "1"):
        for name in ("RANK", "LOCAL_RANK"):
            monkeypatch.setenv(name, rank)
        for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
            monkeypatch.setenv(name, "2")
        assert chitu("generate", "a cat")[0] != 0
    assert len(taken) == 2 and taken[0] is not None and taken[1] is None


def test_without_a_seed_it_is_the_same_video_all_the_same(begin, tmp_path: Path) -> None:
    words = ("generate", "a cat", "--steps", "12")
    run = begin(*words)
    wait_for_step(tmp_path, 3)
    run.send("SIGKILL")
    seed = run.end()[1].partition("seed ")[2].split()[0]
    again = begin(*words)
    deadline = time.monotonic() + ENOUGH
    while "going on at step" not in (said := again._said.read_text() if again._said.exists() else ""):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert f"seed {seed}\n" in said
    other = begin(*words)  # while that one runs, this is another video
    assert "going on" not in other.end()[1] and again.end()[0] == 0
    made = sorted(file.name for file in (tmp_path / "outputs").iterdir())
    assert len(made) == 2 and sum(f"seed{seed}." in name for name in made) == 1, (seed, made)


def test_a_batch_goes_on_in_the_middle_of_a_row(begin, tmp_path: Path) -> None:
    rows = [{"prompt": f"a {name}", "id": name} for name in ("cat", "dog", "fish")]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = ("batch", "p.jsonl", "-o", "many", "--steps", "6", "--seed", "3")
    run = begin(*words)
    deadline = time.monotonic() + ENOUGH
    first = tmp_path / "many" / "cat.mp4"
    while not (first.exists() and steps_saved(tmp_path, after=first.stat().st_mtime) >= 2):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    run.send("SIGINT")
    code, said = run.end()
    assert code == 130
    assert "1 of 3 rows done, 2 left\n" in said
    assert f"give the same command again to go on: chitu {' '.join(words)} --model" in said
    said = begin(*words).end()[1]
    assert "1 of 3 rows done already" in said and '[2/3] "a dog"' in said and "going on at step" in said
    assert sorted(file.name for file in (tmp_path / "many").iterdir()) == ["cat.mp4", "dog.mp4", "fish.mp4"]
    assert not list(tmp_path.glob("cache/checkpoints/*"))


def test_no_resume_and_other_weights_start_over(
    begin, chitu: Chitu, tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = begin("generate", *WORDS, "-o", "a.npy")
    wait_for_step(tmp_path, 3)
    run.kill()
    monkeypatch.setenv("CHITU_CACHE_DIR", str(tmp_path / "cache"))
    given = ("generate", *WORDS, "-o", "a.npy", "--model", tiny_folder)
    code, _, said = chitu(*given, "--set", "infer.sampler=euler")
    assert code == 0 and "starting over: it was made with sampler unipc, here euler" in said
    run = begin("generate", *WORDS, "-o", "a.npy", "--overwrite")
    wait_for_step(tmp_path, 3)
    run.kill()
    code, _, said = chitu(*given, "--no-resume", "--overwrite")
    assert code == 0 and "going on" not in said and "starting over" not in said
    code, _, said = chitu(*given)
    assert code == 0 and "going on" not in said, "what was started over from is gone"
    run = begin("generate", *WORDS, "-o", "a.npy", "--no-resume")
    wait_for_step(tmp_path, 3)
    run.kill()
    code, _, said = chitu(*given)
    assert code == 0 and "going on at step" in said, "a run that started over is saved as any other"


# -- names and locks


def test_the_name_holds_all_that_was_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = EngineConfig()
    asked = {"prompt": "a cat", "seed": 1, "save_path": "a.mp4"}

    def key(**more: object) -> str:
        return job_key(DiffusionUserParams(**{**asked, **more}), [], config)  # type: ignore[arg-type]

    others = [
        {"prompt": "a dog"}, {"seed": 2}, {"save_path": "b.mp4"}, {"num_inference_steps": 3},
        {"flexcache": "pab"}, {"guidance_scale": 2.0}, {"num_frames": 5}, {"height": 64},
        {"negative_prompt": "x"},
    ]  # fmt: skip
    assert len({key(), *(key(**more) for more in others)}) == 1 + len(others)
    assert key(save_path=str(tmp_path / "a.mp4")) == key()
    requests = [DiffusionUserParams(prompt="a", seed=seed, save_path=f"{seed}.mp4") for seed in (1, 2)]
    one, other = (job_key(request, ["seed", "save_path"], config) for request in requests)
    assert one == other


def test_a_folder_is_one_runs_at_a_time(tmp_path: Path) -> None:
    with checkpoint_root("k", tmp_path) as one, checkpoint_root("k", tmp_path) as two:
        assert one is not None and two is not None and one != two
        (one / "task").mkdir(parents=True)
    with checkpoint_root("k", tmp_path) as again:
        assert again == one
        (again / "task").rmdir()
    assert not list((tmp_path / "checkpoints").iterdir())
    (tmp_path / "file").touch()
    for key, cache in (("k", None), (None, tmp_path), ("k", tmp_path / "file")):
        with checkpoint_root(key, cache) as none:
            assert none is None


def test_what_nobody_came_back_for_is_let_go(tmp_path: Path) -> None:
    with checkpoint_root("old", tmp_path) as old:
        (old / "task").mkdir(parents=True)
    long_ago = time.time() - 15 * 86400
    os.utime(old, (long_ago, long_ago))
    with checkpoint_root("new", tmp_path) as new:
        (new / "task").mkdir(parents=True)
        assert not old.exists() and new.exists()
