"""`chitu batch`: rows checked, made, skipped when done, and failing alone."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from conftest import Chitu

from chitu_diffusion.cli import dry_run
from chitu_diffusion.config import EngineConfig
from chitu_diffusion.errors import OutputError
from chitu_diffusion.media.reading import read_frames, read_recipe
from chitu_diffusion.models.registry import FoundModel
from chitu_diffusion.task import DiffusionUserParams


def last_event(text: str) -> dict[str, object]:
    return json.loads(text.splitlines()[-1])


def test_batch_makes_skips_and_remakes(chitu: Chitu, tiny_folder: Path) -> None:
    Path("p.txt").write_text("# prompts\na red cat\n\na blue dog\n", encoding="utf-8")
    words = ("batch", "p.txt", "-o", "out", "--model", tiny_folder, "--steps", 1)
    code, _, err = chitu(*words)
    assert code == 0, err
    assert [read_recipe(f"out/000{n}.mp4")["prompt"] for n in (1, 2)] == ["a red cat", "a blue dog"]
    made = Path("out/0001.mp4").stat().st_mtime_ns

    code, _, err = chitu(*words)
    assert code == 0
    assert "2 done already, 0 to make" in err
    assert Path("out/0001.mp4").stat().st_mtime_ns == made

    Path("p.txt").write_text("a red cat\na green dog\n", encoding="utf-8")
    code, _, err = chitu(*words)
    assert code == 0
    assert "1 of 2 rows are done already and are skipped: line 1\n" in err
    assert '[2/2] "a green dog"' in err and "[1/" not in err
    assert read_recipe("out/0002.mp4")["prompt"] == "a green dog"
    assert Path("out/0001.mp4").stat().st_mtime_ns == made


@pytest.mark.parametrize(
    "other", [("--set", "infer.quant_keep=", "--quant", "fp8"), ("--set", "infer.sampler=euler")]
)
def test_a_video_of_other_settings_is_not_this_one(
    chitu: Chitu, tiny_folder: Path, other: tuple[str, ...]
) -> None:
    """A lossy video is not passed off as the exact one."""
    Path("p.txt").write_text("a red cat\n", encoding="utf-8")
    words = ("batch", "p.txt", "-o", "out", "--model", tiny_folder, "--steps", 1, "--dtype", "float32")
    for flags, told in ((other, None), ((), None), ((), "1 done already"), (other, None)):
        code, _, err = chitu(*words, *flags)
        assert code == 0 and (told or "") in err and ("done already" in err) == (told is not None), err


def test_batch_rows_have_their_own_values(chitu: Chitu, tiny_folder: Path) -> None:
    rows = [
        {"prompt": "猫", "seed": 5, "num_frames": 9, "save_path": "sub/cat.npy"},
        {"prompt": "dog", "guidance_scale": 1, "save_path": "frames/"},
    ]
    Path("rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    code, out, err = chitu(
        "batch", "rows.jsonl", "-o", "out", "--model", tiny_folder, "--steps", 1, "--seed", 8, "--json"
    )
    assert code == 0, err
    assert read_frames("out/sub/cat.npy").shape[0] == 9
    assert read_recipe("out/sub/cat.npy")["seed"] == 5
    assert read_recipe("out/frames")["seed"] == 8
    summary = last_event(out)
    assert summary["event"] == "summary"
    assert summary["failed"] == 0


def test_batch_reads_csv(chitu: Chitu, tiny_folder: Path) -> None:
    Path("rows.csv").write_text(
        'prompt,seed,num_frames,guidance_scale\n"a cat, red",4,5,2.5\ndog,,,\n', encoding="utf-8"
    )
    code, _, err = chitu("batch", "rows.csv", "-o", "out", "--model", tiny_folder, "--steps", 1)
    assert code == 0, err
    first = read_recipe("out/0001.mp4")
    assert (first["prompt"], first["seed"], first["params"]["guidance_scale"]) == ("a cat, red", 4, 2.5)


@pytest.mark.usefixtures("nothing_loads")
def test_batch_names_every_bad_row_before_loading(chitu: Chitu, tiny_folder: Path, tmp_path: Path) -> None:
    lines = [
        '{"prompt": "good"}',
        "not json",
        '{"prompt": "x", "num_frames": 32}',
        '{"prompt": "x", "framse": 33}',
        '{"prompt": "x", "save_path": "../out.mp4"}',
        '{"prompt": "x", "save_path": "/tmp/out.mp4"}',
        '{"prompt": "x", "save_path": "x.avi"}',
        '{"seed": 1}',
        "[1]",
        '{"prompt": "x", "save_path": "0001.mp4"}',
        '{"prompt": "x", "flexcache": "telepathy"}',
    ]
    Path("rows.jsonl").write_text("\n".join(lines), encoding="utf-8")
    code, out, err = chitu("batch", "rows.jsonl", "-o", "out", "--model", tiny_folder)
    assert (code, out) == (2, "")
    assert "10 bad rows" in err
    for number in range(2, 12):
        assert f"line {number}: " in err
    assert "29 or 33" in err
    assert "Did you mean 'num_frames'?" in err or "unknown field 'framse'" in err
    assert sorted(os.listdir(tmp_path)) == ["rows.jsonl"]


def test_one_failing_row_does_not_stop_the_others(
    chitu: Chitu, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from chitu_diffusion.media import video
    from chitu_diffusion.pipelines import stages

    def sometimes(frames: object, path: str, **more: object) -> Path:
        if "0002" in str(path):
            raise OutputError("the disk is full")
        return video.write_video(frames, path, **more)

    monkeypatch.setattr(stages, "write_video", sometimes)
    Path("p.txt").write_text("one\ntwo\nthree\n")
    code, out, _ = chitu("batch", "p.txt", "-o", "out", "--model", tiny_folder, "--steps", 1)
    assert code == 1
    assert sorted(os.listdir("out")) == ["0001.mp4", "0003.mp4"]
    assert "the disk is full" in out
    assert out.count("finished") == 2


@pytest.mark.parametrize("name", ["rows.xml", "missing.txt", "empty.txt", "binary.txt"])
def test_batch_files_that_cannot_be(chitu: Chitu, tiny_folder: Path, name: str) -> None:
    Path("empty.txt").write_text("\n")
    Path("binary.txt").write_bytes(b"\xff\xfe\x00")
    code, _, err = chitu("batch", name, "--model", tiny_folder)
    assert code == 2
    assert name in err


CLASHES = [
    [{"prompt": "a", "task_id": "t"}, {"prompt": "b", "task_id": "t"}],
    [{"prompt": "a", "save_path": "f"}, {"prompt": "b", "save_path": "f/"}],
    [{"prompt": "a", "save_path": "f/x.mp4"}, {"prompt": "b", "save_path": "f/"}],
    [{"prompt": "a", "save_path": "f/"}, {"prompt": "b", "save_path": "f/x.mp4"}],
    [{"prompt": "a"}, {"prompt": "b", "save_path": "."}],
]


@pytest.mark.usefixtures("nothing_loads")
@pytest.mark.parametrize("rows", CLASHES)
def test_rows_that_get_in_each_others_way_are_refused(
    chitu: Chitu, tiny_folder: Path, rows: list[dict[str, str]]
) -> None:
    Path("rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    code, _, err = chitu("batch", "rows.jsonl", "-o", "out", "--model", tiny_folder)
    assert code == 2
    assert "line 2: " in err and "line 1 has the same" in err


STAGE = '"height": 32, "width": 32, "num_inference_steps": 2'


@pytest.mark.usefixtures("nothing_loads")
@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("r.jsonl", "[" * 100_000, "not JSON"),
        ("r.csv", "prompt\n" + "x" * 140_000, "not CSV: field larger"),
        ("r.csv", "prompt,prompt\na,b\n", "a name twice"),
        ("r.csv", "prompt,seed\na,1,2\n", "more cells than the header"),
        ("r.csv", "prompt,cascade\na,b\n", "cascade = 'b': use stages"),
        ("r.jsonl", '{"prompt": "x", "cascade": 5}', "use stages"),
        ("r.jsonl", '{"prompt": "x", "cascade": [5]}', "use stages"),
        ("r.jsonl", '{"prompt": "x", "cascade": [{}]}', "a stage lacks height"),
        ("r.jsonl", '{"prompt": "x", "cascade": [{"size": 3}]}', "cascade has no field 'size'"),
        (
            "r.jsonl",
            '{"prompt": "x", "cascade": [{"height": null, "width": 32, "num_inference_steps": 2}]}',
            "needs height",
        ),
        (
            "r.jsonl",
            f'{{"prompt": "x", "cascade": [{{{STAGE}}}, {{{STAGE}, "strength": 1e-9}}]}}',
            "from 0.01 to 1",
        ),
        ("r.jsonl", f'{{"prompt": "x", "cascade": [{{{STAGE}, "strength": true}}]}}', "from 0.01 to 1"),
        ("r.jsonl", '{"prompt": "x", "role": "\\ud800"}', "role is not valid text"),
    ],
)
def test_rows_of_the_wrong_kind(chitu: Chitu, tiny_folder: Path, name: str, text: str, said: str) -> None:
    Path(name).write_text(text)
    code, _, err = chitu("batch", name, "--model", tiny_folder)
    assert code == 2
    assert "1 bad rows" in err and said in err


def test_only_line_ends_end_a_line(chitu: Chitu, tiny_folder: Path) -> None:
    for name, text in (("p.txt", "a\u2028b\x0cc\x85d\r\n"), ("p.csv", "prompt\r\na\u2028b\x0cc\r\n")):
        Path(name).write_text(text, encoding="utf-8", newline="")
        assert (
            len(last_event(chitu("batch", name, "--dry-run", "--json", "--model", tiny_folder)[1])["rows"])
            == 1
        )


def test_a_dry_run_tells_stale_rows_from_done_ones(chitu: Chitu, tiny_folder: Path) -> None:
    words = ("batch", "p.txt", "-o", "out", "--model", tiny_folder, "--steps", 1)
    Path("p.txt").write_text("one\ntwo\n")
    chitu(*words)
    Path("p.txt").write_text("one\nthree\n")
    rows = last_event(chitu(*words, "--dry-run", "--json")[1])["rows"]
    assert [row["status"] for row in rows] == ["done before", "to make"]


@pytest.mark.parametrize("flag", [("--speedup", "2"), ("--fidelity", "40dB")])
def test_a_calibrated_plan_is_for_rows_that_name_no_cache(
    chitu: Chitu, monkeypatch: pytest.MonkeyPatch, flag: tuple[str, str]
) -> None:
    seen: list[object] = []

    def task_for(model: FoundModel, config: EngineConfig, params: DiffusionUserParams, *more: object):
        seen.append(params.flexcache)
        return dry_run.task_for(model, config, params)

    monkeypatch.setattr("chitu_diffusion.cli.batch.task_for", task_for)
    Path("p.jsonl").write_text('{"prompt": "one"}\n{"prompt": "two", "flexcache": "teacache"}\n')
    code, _, err = chitu("batch", "p.jsonl", *flag, "--dry-run")
    assert code == 0 and "dB to expect" in err, err
    assert seen[0]["strategy"] == "plan" and seen[1] == "teacache"
    code, _, err = chitu("batch", "p.jsonl", *flag, "--cache", "teacache", "--dry-run")
    assert code == 2 and "use one of them" in err
