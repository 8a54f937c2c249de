"""The command line: words, exit codes, and that bad values are refused before anything is loaded."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Chitu

from chitu_diffusion.cli.console import duration, printable, quoted, size
from chitu_diffusion.cli.options import parse_cache, parse_guidance, parse_seeds, parse_size, path_for_seed
from chitu_diffusion.errors import CheckpointError, OutputError, StageError, UsageError, WillNotFitError
from chitu_diffusion.media.reading import read_frames, read_recipe

ROOT = Path(__file__).parents[2]
WAN_TINY = ROOT / "chitu_diffusion" / "assets" / "wan-tiny"
CHITU = [sys.executable, "-m", "chitu_diffusion"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}


def events(text: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in text.splitlines()]


# -- refused before anything is loaded


@pytest.mark.usefixtures("nothing_loads")
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["a cat", "--frames", "32"], "--frames 32: frames must be 4n+1: 29 or 33"),
        (["a cat", "--size", "100x100"], "--size height 100: must be a multiple of 8: 96 or 104"),
        (["a cat", "--size", "big"], "--size big: use WIDTHxHEIGHT in pixels"),
        (["a cat", "--steps", "0"], "--steps 0: must be a whole number from 1 to 1000"),
        (["a cat", "--fps", "0"], "--fps 0"),
        (["a cat", "--guidance-scale", "lots"], "--guidance-scale lots: a number"),
        (["a cat", "--guidance-scale", "nan"], "must be a number from 0 to 100"),
        (["a cat", "--guidance-scale", "4,3"], "has one transformer; use one number"),
        (["a cat", "--seed", "5..3"], "rising range"),
        (["a cat", "--seed", "-1"], "--seed -1"),
        (["a cat", "--cache", "telepathy"], "--cache"),
        (["a cat", "-o", "cat.avi"], "'.avi' is not a format; use .mp4, .gif or .npy"),
        (["a cat", "--low-mem-level", "9"], "--low-mem-level 9"),
        (["a cat", "--dtype", "fp8"], "--dtype 'fp8'"),
        (["a cat", "--quality", "11"], "--quality 11"),
        (["a cat", "--set", "infer.difusion.up=2"], "Did you mean 'diffusion'?"),
        (["a cat", "--set", "nonsense"], "use NAME=VALUE"),
        (["a cat", "--config", "missing.toml"], "missing.toml"),
        (
            ["a cat", "--set", "infer.dtype.x=3", "--dtype", "float32"],
            "'dtype' is 'float32' elsewhere in the settings",
        ),
        (["a cat", "--set", "infer.threads=100000"], "infer.threads"),
        (["a cat", "-o", "x" * 300 + "/a.mp4"], "File name too long"),
        (["a cat", "--profile", "/dev/null"], "--profile /dev/null: File exists"),
        ([""], "PROMPT '': must be a sentence"),
        (["  "], "must be a sentence"),
        (["a cat", "-o", "-"], "videos are not written to stdout"),
        (["\x07\u200b "], "must be a sentence"),
        (["a cat", "--xyzzy"], "No such option: --xyzzy. 'chitu generate --help'"),
        (["a cat", "--frames", "many"], "--frames"),
        ([], "Missing argument"),
    ],
)
def test_bad_values_are_refused(chitu: Chitu, tiny_folder: Path, words: list[str], said: str) -> None:
    code, out, err = chitu("generate", *words, "--model", tiny_folder)
    assert (code, out) == (2, "")
    assert said in err
    assert err.startswith("error: ")
    assert "Traceback" not in err
    assert err.count("\n") == 1


@pytest.mark.usefixtures("nothing_loads")
def test_missing_model_is_4_and_says_how_to_get_it(chitu: Chitu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chitu_diffusion.models.registry.cached_folder", lambda spec: None)
    code, _, err = chitu("generate", "a cat", "--model", "Wan2.1-T2V-14B")
    assert code == 4
    assert "chitu models pull Wan2.1-T2V-14B" in err


@pytest.mark.usefixtures("nothing_loads")
def test_json_errors_are_events(chitu: Chitu, tiny_folder: Path) -> None:
    for words in (["--frames", "32"], ["--bogus"]):
        code, out, err = chitu("generate", "a cat", "--json", "--model", tiny_folder, *words)
        (event,) = events(out)
        assert (code, err) == (2, "")
        assert event["event"] == "error"
        assert event["exit_code"] == 2
    assert (
        events(chitu("generate", "x", "--json", "--frames", 32, "--model", tiny_folder)[1])[0]["field"]
        == "num_frames"
    )


@pytest.mark.usefixtures("nothing_loads")
def test_bad_values_come_before_torch(tiny_folder: Path) -> None:
    code = (
        "import sys; from chitu_diffusion.cli.app import run;"
        f"code = run(['generate', 'x', '--frames', '32', '--model', {str(tiny_folder)!r}]);"
        "assert 'torch' not in sys.modules, 'torch was imported'; sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 2, done.stderr


# -- help


def test_help_is_quick() -> None:
    best = min(processor_seconds("--help") for _ in range(4))
    assert best < 0.5, f"chitu --help took {best:.2f} s; something heavy is imported at import time"


def test_first_words_come_at_once(tiny_folder: Path) -> None:
    """What is refused last has been checked as every run is before its first line."""
    words = ("generate", "cat", "--model", str(tiny_folder), "--profile", f"{os.devnull}/x")
    best = min(processor_seconds(*words, code=2) for _ in range(4))
    assert best < 1, f"the first line came after {best:.2f} s; import heavy things after it"


def processor_seconds(*words: str, code: int = 0) -> float:
    """Of a whole command in a process of its own; unlike wall time, it does not depend on what else is
    running.
    """
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([*CHITU, *words], capture_output=True, env=ENVIRONMENT, check=False)
    assert done.returncode == code, done.stderr
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.parametrize(
    "words",
    [
        ["generate"],
        ["batch"],
        ["info"],
        ["doctor"],
        ["models"],
        ["models", "pull"],
        ["config", "show"],
        ["eval"],
    ],
)
def test_every_command_has_help(chitu: Chitu, words: list[str]) -> None:
    code, out, _ = chitu(*words, "--help")
    assert code == 0
    assert f"Usage: chitu {' '.join(words)}" in out


@pytest.mark.parametrize("group", [(), ("models",), ("config",), ("eval",)])
def test_summaries_are_shown_whole(
    chitu: Chitu, monkeypatch: pytest.MonkeyPatch, group: tuple[str, ...]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    lines = chitu(*group, "--help")[1].partition("Commands:\n")[2].partition("\n\n")[0].splitlines()
    assert max(map(len, lines)) <= 80
    listed = " ".join(" ".join(lines).split())
    for name in (line.split()[0] for line in lines if line[:3].strip()):
        text = chitu(*group, name, "--help")[1].partition("\n\n")[2].partition("\n\n")[0]
        assert " ".join([name, *text.split()]) in listed


def test_a_bare_command_shows_help(chitu: Chitu) -> None:
    code, _, err = chitu()
    assert code == 2
    assert err.startswith("Usage: chitu")


# -- generate


def test_generate_makes_a_video(chitu: Chitu, tiny_folder: Path) -> None:
    code, out, err = chitu(
        "generate", "A [bold]cat[/bold] walks", "--model", tiny_folder, "--seed", 3, "-o", "new/cat.mp4"
    )
    assert code == 0, err
    assert out == "new/cat.mp4\n"
    assert err.startswith("loading ")
    for said in ("seed 3", "step 4 of 4", "s/step", "decoding", "loaded in", "done in", "[bold]cat[/bold]"):
        assert said in err
    assert read_frames("new/cat.mp4").shape == (5, 32, 32, 3)
    recipe = read_recipe("new/cat.mp4")
    assert recipe["prompt"] == "A [bold]cat[/bold] walks"
    assert recipe["seed"] == 3
    assert recipe["params"]["num_inference_steps"] == 4


def test_several_seeds_give_several_files(chitu: Chitu, tiny_folder: Path) -> None:
    code, out, _ = chitu(
        "generate", "cat", "--model", tiny_folder, "--seed", "3..4", "--steps", 1, "-o", "cat.npy"
    )
    assert code == 0
    assert out.split() == ["cat-seed3.npy", "cat-seed4.npy"]
    assert [read_recipe(name)["seed"] for name in out.split()] == [3, 4]
    first, second = (read_frames(name) for name in out.split())
    assert (first != second).any()


def test_a_drawn_seed_is_told_and_makes_the_same_video(chitu: Chitu, tiny_folder: Path) -> None:
    _, _, err = chitu("generate", "cat", "--model", tiny_folder, "--steps", 1, "-o", "a.npy")
    seed = read_recipe("a.npy")["seed"]
    assert f"seed {seed}" in err
    chitu("generate", "cat", "--model", tiny_folder, "--steps", 1, "-o", "b.npy", "--seed", seed)
    assert (read_frames("a.npy") == read_frames("b.npy")).all()


@pytest.mark.parametrize(
    "prompt", ["../../../../tmp/evil", "/etc/passwd", "a/b\\c", "-- x; rm -rf ~", "\x1b[2Jcat\x07"]
)
def test_a_prompt_never_becomes_a_path(chitu: Chitu, tiny_folder: Path, tmp_path: Path, prompt: str) -> None:
    code, out, err = chitu("generate", "--model", tiny_folder, "--steps", 1, "--", prompt)
    assert code == 0, err
    (made,) = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert made == tmp_path / out.strip()
    assert made.parent == tmp_path / "outputs"
    assert "\x1b" not in err
    assert read_recipe(made)["prompt"] == prompt


def test_json_tells_the_whole_story(chitu: Chitu, tiny_folder: Path) -> None:
    code, out, _ = chitu("generate", "cat", "--json", "--model", tiny_folder, "--seed", 1, "-o", "frames/")
    told = events(out)
    assert code == 0
    names = ["loading", "loaded", "begin", *["progress"] * (len(told) - 4), "end"]
    assert [event["event"] for event in told] == names
    assert told[2]["seed"] == 1
    steps = [event["step"] for event in told if event.get("stage") == "denoising"]
    assert steps == [1, 2, 3, 4]
    assert told[-1]["path"] == "frames"
    assert told[-1]["status"] == "finished"


@pytest.mark.usefixtures("nothing_loads")
def test_dry_run_makes_nothing(chitu: Chitu, tiny_folder: Path, tmp_path: Path) -> None:
    code, _, err = chitu("generate", "cat", "--dry-run", "--model", tiny_folder, "--seed", 1)
    assert code == 0
    for said in ("32x32, 5 frames at 8 fps", "4 steps, guidance 5.0, seed 1", "nothing was made"):
        assert said in err
    code, out, _ = chitu("generate", "cat", "--dry-run", "--json", "--model", tiny_folder, "--seed", 1)
    (plan,) = events(out)
    assert plan["tasks"][0]["num_inference_steps"] == 4
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("nothing_loads")
def test_a_dry_run_tells_cache_and_kernels_as_they_are_typed(chitu: Chitu) -> None:
    words = ("--attn-schedule", "math@50%", "--gpus", 2, "--dry-run")
    err = chitu("generate", "cat", "--cache", "teacache:threshold=0.25", *words)[2]
    assert "cache teacache:threshold=0.25, math attention after 25 of 50 steps" in err
    assert "ranks   2: cfg 2 x ulysses 1 x ring 1" in err and "{" not in err
    (plan,) = events(chitu("generate", "cat", *words, "--json")[1])
    assert plan["ranks"] == {"cfg": 2, "ulysses": 1, "ring": 1}


@pytest.mark.parametrize("words", [("generate", "cat", "--seed", "1..2"), ("batch", "p.txt", "-o", "many")])
@pytest.mark.parametrize("more", [(), ("--dry-run",)])
def test_a_folder_is_read_and_a_request_resolved_once(
    chitu: Chitu,
    tiny_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: tuple[str, ...],
    more: tuple[str, ...],
) -> None:
    from chitu_diffusion.models import registry
    from chitu_diffusion.pipelines import request

    seen: list[str] = []
    read_folder = registry.read_folder
    resolve_request = request.resolve_request
    monkeypatch.setattr(registry, "read_folder", lambda *a: seen.append("read") or read_folder(*a))
    monkeypatch.setattr(
        request, "resolve_request", lambda *a, **k: seen.append("resolved") or resolve_request(*a, **k)
    )
    Path("p.txt").write_text("cat\ndog\n")
    assert chitu(*words, *more, "--model", tiny_folder, "--steps", "1")[0] == 0
    assert seen == ["read", "resolved", "resolved"]


def test_profile_writes_a_trace_and_a_table(chitu: Chitu, tiny_folder: Path) -> None:
    code, _, err = chitu(
        "generate", "cat", "--model", tiny_folder, "--steps", 1, "-o", "a.npy", "--profile", "p"
    )
    assert code == 0
    assert json.loads(Path("p/trace.json").read_text())["traceEvents"]
    assert "aten::" in Path("p/ops.txt").read_text()
    assert "trace.json" in err


def test_a_failed_task_is_told_in_words(
    chitu: Chitu, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OutputError("cannot write the video: the disk is full; free some space")

    monkeypatch.setattr("chitu_diffusion.pipelines.stages.write_video", full)
    code, out, err = chitu("generate", "cat", "--model", tiny_folder, "--steps", 1)
    assert (code, out) == (1, "")
    assert "the disk is full" in err
    assert "Traceback" not in err


def test_corrupt_model_is_4(chitu: Chitu, tiny_folder: Path, tmp_path: Path) -> None:
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(tiny_folder, broken)
    (weights,) = (broken / "transformer").glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:1000])
    code, _, err = chitu("generate", "cat", "--model", broken)
    assert code == 4
    assert weights.name in err
    assert chitu("models", "verify", broken)[0] == 4


def test_interrupt_is_130_and_leaves_nothing(tiny_folder: Path, tmp_path: Path) -> None:
    words = [
        "generate",
        "cat",
        "--model",
        str(tiny_folder),
        "--steps",
        "1000",
        "--size",
        "128x128",
        "-o",
        "cat.mp4",
    ]
    with subprocess.Popen(
        [*CHITU, *words], cwd=tmp_path, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "denoising" in line:
                break
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
        assert process.wait(timeout=30) == 130
    assert "interrupted" in rest
    assert "Traceback" not in rest
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UsageError("x"), 2),
        (WillNotFitError("x"), 3),
        (CheckpointError("x"), 4),
        (StageError("denoising", 3, WillNotFitError("x")), 3),
        (StageError("denoising", 3, RuntimeError("x")), 1),
        (RuntimeError("x"), 1),
    ],
)
def test_exit_codes(
    chitu: Chitu, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, code: int
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("chitu_diffusion.cli.runner.run_jobs", fail)
    found, _, err = chitu("generate", "cat", "--model", tiny_folder)
    assert found == code
    assert "Traceback" not in err
    assert "Traceback" in chitu("--debug", "generate", "cat", "--model", tiny_folder)[2]


@pytest.mark.parametrize(("closed", "told"), [("2>&-", "cat.npy\n"), (">&- 2>&-", "")])
def test_closed_streams_do_not_mix(tiny_folder: Path, tmp_path: Path, closed: str, told: str) -> None:
    command = f'"$0" -m chitu_diffusion generate cat --steps 1 -o cat.npy --model "$1" {closed}'
    words = ["sh", "-c", command, sys.executable, str(tiny_folder)]
    done = subprocess.run(words, cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
    assert (done.returncode, done.stdout) == (0, told)


def test_interrupted_import_is_quiet(tmp_path: Path) -> None:
    (tmp_path / "typer.py").write_text("raise KeyboardInterrupt")
    environment = {**ENVIRONMENT, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    done = subprocess.run([*CHITU, "--help"], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr) == (130, "")


# -- small parts


def test_small_parsers() -> None:
    assert parse_size("832x480") == (832, 480)
    assert parse_seeds("7") == [7]
    assert parse_seeds("7..9") == [7, 8, 9]
    assert parse_guidance("4,3") == (4.0, 3.0)
    assert parse_cache("interval") == "interval"
    assert parse_cache("teacache:threshold=0.1,warmup=2") == {
        "strategy": "teacache",
        "threshold": 0.1,
        "warmup": 2,
    }
    assert path_for_seed("out/cat.mp4", 3) == "out/cat-seed3.mp4"
    assert path_for_seed("out/cat/", 3) == "out/cat-seed3/"
    for bad in ("", "1..", "..2", "1...2", "x", "9" * 40, "0..100000"):
        with pytest.raises(UsageError):
            parse_seeds(bad)


def test_small_words() -> None:
    assert [duration(s) for s in (0.4213, 12.34, 65, 3725)] == [
        "0.42 s",
        "12.3 s",
        "1 min 05 s",
        "1 h 02 min",
    ]
    assert [size(n) for n in (512, 2048, 3 * 2**30)] == ["512 B", "2.0 KiB", "3.0 GiB"]
    assert quoted("x" * 100) == f'"{"x" * 57}..."'
    assert "\x1b" not in printable("a\x1b[2J\nb")


# -- the shipped model


@pytest.mark.skipif(not (WAN_TINY / "model_index.json").exists(), reason="wan-tiny is not in this checkout")
def test_the_shipped_model_makes_a_video(chitu: Chitu) -> None:
    code, _, err = chitu("generate", "A cat walking on grass", "--steps", 4, "--seed", 1, "-o", "cat.mp4")
    assert code == 0, err
    frames = read_frames("cat.mp4")
    assert frames.shape[0] == 33
    assert frames.std() > 10


def test_a_video_waits_for_no_import_that_it_does_not_need(tmp_path: Path) -> None:
    """Half of a small video's processor time was imports: transformers, diffusers, torch's compiler."""
    code = (
        "import sys; from chitu_diffusion.cli.app import run; run(sys.argv[1:]);"
        "print({'transformers', 'diffusers', 'torch._dynamo', 'sympy'} & {*sys.modules})"
    )
    words = ("generate", "cat", "--steps", "1", "--size", "32x32", "--frames", "5", "-o", "x.npy")
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        capture_output=True,
        env=ENVIRONMENT,
        cwd=tmp_path,
        check=False,
        text=True,
    )
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "set()", done.stdout + done.stderr


@pytest.mark.parametrize("command", [("info", "x.mp4"), ("reproduce", "x.mp4")], ids=lambda words: words[0])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], ids=["SIGTERM", "SIGHUP"])
def test_every_command_hears_signals_as_ctrl_c(chitu, monkeypatch, number, command) -> None:
    before = signal.getsignal(number)
    monkeypatch.setattr(
        "chitu_diffusion.media.reading.read_recipe", lambda path: os.kill(os.getpid(), number)
    )
    code, _, said = chitu(*command)
    assert code == 130 and "interrupted" in said and signal.getsignal(number) is before
