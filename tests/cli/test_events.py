"""Every line that `--json` prints is one of those that docs/events.md lists; and what `--quiet` leaves."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from conftest import WAN_TINY, Chitu

from chitu_diffusion.cli.console import one_command, say
from chitu_diffusion.cli.progress import BarReporter
from chitu_diffusion.engine import Engine
from chitu_diffusion.errors import OutputError
from chitu_diffusion.task import EVENT_SCHEMA, DiffusionTask, DiffusionUserParams, Progress, TaskStatus

DOCUMENT = Path(__file__).parent.parent.parent / "docs" / "events.md"
SPARED = {"shapes"}
"""Fields that are there under a condition."""


def listed() -> Mapping[str, set[str]]:
    """The fields of each event by the document's table."""
    rows = re.findall(r"^\| `(\w+)` \| [^|]+ \| (.+) \|$", DOCUMENT.read_text(), re.MULTILINE)
    return {event: set(re.findall(r"`(\w+)`", fields)) for event, fields in rows}


def checked(out: str, since: datetime) -> list[dict[str, Any]]:
    """The events of an output, each as the document says, in the order of their times."""
    told = [json.loads(line) for line in out.splitlines()]
    fields = listed()
    last = since
    for event in told:
        assert event["schema"] == EVENT_SCHEMA
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", event["time"]), event["time"]
        moment = datetime.fromisoformat(event["time"])
        assert last <= moment <= datetime.now(UTC), "not in order"
        last = moment
        own = set(event) - {"event", "schema", "time"}
        assert own - SPARED == fields[event["event"]] - SPARED and own <= fields[event["event"]], event
    return told


@pytest.fixture
def since() -> datetime:
    now = datetime.now(UTC)
    return now.replace(microsecond=now.microsecond // 1000 * 1000)  # as exact as the events


def names(told: list[dict[str, Any]]) -> list[str]:
    return [event["event"] for event in told]


def test_the_document_has_the_version() -> None:
    assert f"| `schema` | version of the events, {EVENT_SCHEMA}." in DOCUMENT.read_text()
    assert len(listed()) == 12


def test_generate_and_reproduce(chitu: Chitu, tiny_folder: Path, since: datetime) -> None:
    words = ("generate", "cat", "--model", tiny_folder, "--seed", 1, "-o", "a.npy", "--json")
    told = checked(chitu(*words)[1], since)
    assert names(told) == ["loading", "loaded", "begin", *["progress"] * 7, "end"]
    assert all(event["eta"] > 0 for event in told[3:-2]) and told[-2]["eta"] is None
    assert names(checked(chitu(*words, "--dry-run")[1], since)) == ["plan"]
    words = ("reproduce", "a.npy", "--model", tiny_folder, "--json")
    assert names(checked(chitu(*words)[1], since))[-1] == "reproduced"
    other = checked(chitu(*words, "--check", "--set", "infer.sampler=euler")[1], since)[-1]
    assert not other["same"]


def test_batch(chitu: Chitu, tiny_folder: Path, since: datetime, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("p.jsonl").write_text('{"prompt": "a"}\n{"prompt": ""}\n{"prompt": "b"}\n')
    words = ("batch", "p.jsonl", "-o", "out", "--model", tiny_folder, "--steps", 1, "--json", "--skip-bad")
    assert checked(chitu(*words, "--dry-run")[1], since)[-1]["event"] == "summary"

    def full(*_: object, **__: object) -> None:
        raise OutputError("cannot write the video: the disk is full; free some space")

    with monkeypatch.context() as patch:
        patch.setattr("chitu_diffusion.pipelines.stages.write_video", full)
        code, out, _ = chitu(*words)
    told = checked(out, since)
    assert code == 1 and [event["status"] for event in told if event["event"] == "end"] == ["failed"] * 2
    code, out, _ = chitu(*words)
    summary = checked(out, since)[-1]
    assert code == 1 and [row["status"] for row in summary["rows"]] == ["finished", "bad row", "finished"]
    assert [type(row["seconds"]) for row in summary["rows"]] == [float, type(None), float]


def test_what_fails_before_anything_is_loaded(chitu: Chitu, tiny_folder: Path, since: datetime) -> None:
    for words in (("generate", "cat", "--frames", 32), ("batch", "none.txt"), ("reproduce", "no.mp4")):
        (error,) = checked(chitu(*words, "--model", tiny_folder, "--json")[1], since)
        assert error["exit_code"] == 2


def test_what_is_cut_short_and_goes_on(
    chitu: Chitu, tiny_folder: Path, since: datetime, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CHITU_CACHE_DIR", str(tmp_path / "cache"))
    words = ("generate", "cat", "--model", tiny_folder, "--seed", 1, "-o", "a.npy", "--json")
    step = Engine.step

    def interrupted(engine: Engine) -> Progress | None:
        event = step(engine)
        if event is not None and event.step == 2:
            raise KeyboardInterrupt
        return event

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "step", interrupted)
        code, out, _ = chitu(*words)
    assert code == 130 and names(checked(out, since))[-1] == "saved"
    assert "resumed" in names(checked(chitu(*words)[1], since))


def test_calibrate(chitu: Chitu, since: datetime, monkeypatch: pytest.MonkeyPatch) -> None:
    """With nothing measured: the line alone is looked at."""
    from types import SimpleNamespace

    monkeypatch.setattr(
        "chitu_diffusion.evaluation.calibrate.calibrate", lambda *_, **__: SimpleNamespace(table=())
    )
    monkeypatch.setattr("chitu_diffusion.flexcache.calibration.write_calibration", lambda *_: Path("x"))
    told = checked(chitu("calibrate", "--model", WAN_TINY, "-o", "c", "--json")[1], since)
    assert names(told) == ["calibration"]


def test_python_hears_the_same(make_config, tiny_folder: Path) -> None:
    heard: list[Progress] = []
    with Engine(make_config(tiny_folder), on_event=heard.append) as engine:
        told = list(engine.submit("a cat").events())
    assert told == heard
    times = [event.time for event in told]
    assert times == sorted(times) and {event.schema for event in told} == {EVENT_SCHEMA}


# -- quiet


def test_quiet_leaves_the_paths(chitu: Chitu, tiny_folder: Path) -> None:
    words = ("generate", "dragon", "--model", tiny_folder, "--steps", 1, "-o", "a.npy", "-q")
    assert chitu(*words, "--seed", "1..2") == (0, "a-seed1.npy\na-seed2.npy\n", "")
    Path("p.txt").write_text("# a comment\na\nb\n")
    words = ("batch", "p.txt", "-o", "out", "--model", tiny_folder, "--steps", 1, "--quiet")
    code, out, err = chitu(*words)
    assert (code, err) == (0, "")
    assert len(out.split()) == 2 and all(Path(name).is_file() for name in out.split())
    assert chitu(*words) == (0, out, ""), "what was done before stands, too"


def test_quiet_reproduces_and_converts_in_silence(chitu: Chitu, tiny_folder: Path) -> None:
    chitu("generate", "cat", "--model", tiny_folder, "--steps", 2, "--seed", 1, "-o", "a.npy")
    assert chitu("reproduce", "a.npy", "--model", tiny_folder, "-q") == (0, "", "")
    code, out, err = chitu(
        "reproduce", "a.npy", "--model", tiny_folder, "-q", "--check", "--set", "infer.sampler=euler"
    )
    assert (code, out) == (5, "") and err.startswith("not the same: PSNR")
    assert chitu("models", "convert", tiny_folder, "official", "-q") == (0, "", "")


def test_quiet_tells_errors_and_keeps_exit_codes(
    chitu: Chitu, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (
        chitu("generate", "cat", "--model", "no-such", "-q")[0]
        == chitu("generate", "cat", "--model", "no-such")[0]
    )
    code, out, err = chitu("generate", "cat", "--model", tiny_folder, "--frames", 32, "-q")
    assert (code, out) == (2, "") and err.startswith("error: ")

    def full(*_: object, **__: object) -> None:
        raise OutputError("cannot write the video: the disk is full; free some space")

    monkeypatch.setattr("chitu_diffusion.pipelines.stages.write_video", full)
    code, out, err = chitu("generate", "cat", "--model", tiny_folder, "--steps", 1, "-q")
    assert (code, out) == (1, "") and err.startswith('error: "cat"') and "disk is full" in err


def test_quiet_ends_with_its_command(chitu: Chitu, capsys: pytest.CaptureFixture[str]) -> None:
    chitu("generate", "cat", "--dry-run", "-q")
    with one_command():
        say("heard")
    assert capsys.readouterr().err == "heard\n"


# -- the bar


def test_the_bar_counts_down_and_never_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    bar = BarReporter()
    task = DiffusionTask.from_user_request(DiffusionUserParams("a cat", seed=1))
    bar.begin(task, 1, 1)
    shown = []
    for eta in (12.0, 0.001, None):
        event = Progress("a", TaskStatus.DECODING, TaskStatus.DENOISING, 4, 4, 0.5, eta)
        bar.advance(event)
        with bar._console.capture() as capture:
            bar._console.print(bar._bars)
        shown.append(capture.get())
    bar.close()
    assert re.search(r"1[12]\.\d s left", shown[0])
    assert "a moment left" in shown[1] and "left" not in shown[2]
