"""`chitu batch`: rows checked, made, skipped when done, and failing alone."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
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


def by_prompt(folder: str = "out") -> dict[str, Path]:
    """The files of a folder by what they show."""
    return {str(read_recipe(file)["prompt"]): file for file in Path(folder).iterdir()}


def test_batch_makes_skips_and_remakes(chitu: Chitu, tiny_folder: Path) -> None:
    Path("p.txt").write_text("# prompts\na red cat\n\na blue dog\n", encoding="utf-8")
    words = ("batch", "p.txt", "-o", "out", "--model", tiny_folder, "--steps", 1)
    code, _, err = chitu(*words)
    assert code == 0, err
    assert "1 line(s) that begin with '#' are comments and left out (line 1)" in err
    cat = by_prompt()["a red cat"]
    assert set(by_prompt()) == {"a red cat", "a blue dog"}
    made = cat.stat().st_mtime_ns

    code, _, err = chitu(*words)
    assert code == 0
    assert "2 done already, 0 to make" in err
    assert cat.stat().st_mtime_ns == made

    Path("p.txt").write_text("a new first line\na red cat\na green dog\n", encoding="utf-8")
    code, _, err = chitu(*words)
    assert code == 0
    assert "1 of 3 rows done already and skipped: line 2\n" in err
    assert '[3/3] "a green dog"' in err and "[2/" not in err
    assert set(by_prompt()) == {"a red cat", "a blue dog", "a green dog", "a new first line"}
    assert cat.stat().st_mtime_ns == made


@pytest.mark.parametrize(
    "other",
    [
        ("--set", "infer.quant_keep=", "--quant", "fp8"),
        ("--set", "infer.sampler=euler"),
        ("--quality", 3),
        ("--dtype", "bfloat16"),
        ("--steps", 2),
    ],
)
def test_a_video_of_other_settings_is_not_this_one(
    chitu: Chitu, tiny_folder: Path, other: tuple[str, ...]
) -> None:
    """A lossy video is not passed off as the exact one."""
    Path("p.txt").write_text("a red cat\n", encoding="utf-8")
    words = ("batch", "p.txt", "-o", "out", "--model", tiny_folder, "--steps", 1, "--dtype", "float32")
    for flags, made in ((other, True), ((), False), (("--overwrite",), True), ((), None), (other, False)):
        before = [(file, file.stat().st_mtime_ns) for file in Path("out").glob("*")]
        code, _, err = chitu(*words, *flags)
        if made is False:
            assert code == 2 and "shows something else (" in err and "--overwrite" in err
        else:
            assert code == 0 and ("done already" in err) == (made is None), err
        assert (before == [(file, file.stat().st_mtime_ns) for file in Path("out").glob("*")]) == (not made)


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
    first = read_recipe(by_prompt()["a cat, red"])
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
        '{"prompt": "x", "id": "a/b"}',
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
        if more["recipe"]["prompt"] == "two":
            raise OutputError("the disk is full")
        return video.write_video(frames, path, **more)

    monkeypatch.setattr(stages, "write_video", sometimes)
    Path("p.txt").write_text("one\ntwo\nthree\n")
    code, out, _ = chitu("batch", "p.txt", "-o", "out", "--model", tiny_folder, "--steps", 1)
    assert code == 1
    assert set(by_prompt()) == {"one", "three"}
    assert "the disk is full" in out
    assert out.count("finished") == 2


@pytest.mark.parametrize("name", ["rows.xml", "missing.txt", "empty.txt", "binary.txt"])
def test_batch_files_that_cannot_be(chitu: Chitu, tiny_folder: Path, name: str) -> None:
    Path("empty.txt").write_text("\n")
    Path("binary.txt").write_bytes(b"\xff\xfe\x00")
    code, _, err = chitu("batch", name, "--model", tiny_folder)
    assert code == 2
    assert name in err


@pytest.mark.usefixtures("nothing_loads")
@pytest.mark.parametrize("names", [("r/x.mp4", "l/x.mp4"), ("r/", "l/"), ("l/", "r/x.mp4")])
def test_one_place_under_two_names_is_one_place(
    chitu: Chitu, tiny_folder: Path, names: tuple[str, str]
) -> None:
    Path("out/r").mkdir(parents=True)
    Path("out/l").symlink_to("r")
    rows = [json.dumps({"prompt": name, "save_path": name}) for name in names]
    Path("rows.jsonl").write_text("\n".join(rows))
    code, _, err = chitu("batch", "rows.jsonl", "-o", "out", "--model", tiny_folder)
    assert code == 2
    assert "line 2: " in err and "line 1 has the same" in err


CLASHES = [
    [{"prompt": "a", "task_id": "t"}, {"prompt": "b", "task_id": "t"}],
    [{"prompt": "a", "save_path": "f"}, {"prompt": "b", "save_path": "f/"}],
    [{"prompt": "a", "save_path": "f/x.mp4"}, {"prompt": "b", "save_path": "f/"}],
    [{"prompt": "a", "save_path": "f/"}, {"prompt": "b", "save_path": "f/x.mp4"}],
    [{"prompt": "a"}, {"prompt": "b", "save_path": "."}],
    [{"prompt": "a", "id": "x"}, {"prompt": "b", "save_path": "x.mp4"}],
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
        ("r.csv", 'prompt\n"a\nb\nc\n', "not CSV: unexpected end of data; no row from here on is read"),
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
    assert "1 bad row in" in err and said in err


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


def test_a_second_list_overwrites_nothing(chitu: Chitu, tiny_folder: Path) -> None:
    """Rows that ask for one file are told, one by one, before any work; a flag allows it."""
    words = ("-o", "out", "--model", tiny_folder, "--steps", 1)
    for name, prompt in (("one.jsonl", "a car"), ("two.jsonl", "a bird")):
        Path(name).write_text(json.dumps({"id": 7, "prompt": prompt, "seed": 1}) + "\n")
    assert chitu("batch", "one.jsonl", *words)[0] == 0
    before = Path("out/7.mp4").read_bytes()
    code, _, err = chitu("batch", "two.jsonl", *words)
    assert code == 2 and "line 1: 'out/7.mp4' shows something else (prompt a car, here a bird)" in err
    with Path("two.jsonl").open("a") as file:
        file.write('{"prompt": "a fish"}\n')
    code, out, err = chitu("batch", "two.jsonl", *words, "--skip-bad", "--json")
    assert code == 1
    assert [row["status"] for row in last_event(out)["rows"]] == ["bad row", "finished"]
    assert Path("out/7.mp4").read_bytes() == before
    assert chitu("batch", "two.jsonl", *words, "--overwrite")[0] == 0
    assert read_recipe("out/7.mp4")["prompt"] == "a bird"


def test_other_weights_are_another_video(chitu: Chitu, tiny_folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = Path(shutil.copytree(tiny_folder, tmp_path / "model"))
    Path("p.txt").write_text("a cat\n")
    words = ("batch", "p.txt", "-o", "out", "--model", model, "--steps", 1, "--dry-run")
    assert chitu(*words[:-1])[0] == 0
    assert "1 done already" in chitu(*words)[2]
    file = next((model / "transformer").glob("*.safetensors"))
    values = load_file(file)
    values[min(values)] += 1
    save_file(values, file)
    code, _, err = chitu(*words)
    assert code == 2 and "(weights " in err


@pytest.mark.parametrize("ending", ["mp4", "gif", "npy", "/"])
@pytest.mark.parametrize("kept", [0.6, 500])
def test_a_cut_video_costs_its_row_only(chitu: Chitu, tiny_folder: Path, ending: str, kept: float) -> None:
    names = [f"{name}.{ending}" if ending != "/" else f"{name}/" for name in "ab"]
    rows = [{"prompt": name, "save_path": name} for name in names]
    Path("p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = ("batch", "p.jsonl", "-o", "out", "--model", tiny_folder, "--steps", 1, "--json")
    assert chitu(*words)[0] == 0
    file = Path("out", names[0])
    file = max(file.glob("*.png")) if file.is_dir() else file
    data = file.read_bytes()
    file.write_bytes(data[: int(kept * len(data) if kept < 1 else min(kept, len(data) // 2))])
    code, out, err = chitu(*words)
    assert code == 0, err
    assert [row["status"] for row in last_event(out)["rows"]] == ["finished", "done before"]
    assert len(read_frames(f"out/{names[0]}")) == len(read_frames(f"out/{names[1]}"))


def test_a_file_of_another_kind_stays(chitu: Chitu, tiny_folder: Path) -> None:
    from chitu_diffusion.media.video import write_video

    Path("out").mkdir()
    Path("out/a.mp4").write_text("dear diary")
    write_video(np.zeros((5, 16, 16, 3), np.uint8), "out/b.mp4", fps=8)
    os.mkfifo("out/c.mp4")
    Path("p.jsonl").write_text("\n".join(json.dumps({"prompt": name, "id": name}) for name in "abc"))
    code, _, err = chitu("batch", "p.jsonl", "-o", "out", "--model", tiny_folder)
    assert code == 2
    for line in (1, 2, 3):
        assert f"line {line}: 'out/" in err
    assert Path("out/a.mp4").read_text() == "dear diary"


def test_names_in_progress_are_nobody_s(chitu: Chitu, tiny_folder: Path) -> None:
    rows = [{"prompt": name, "save_path": name} for name in ("a.mp4.part/", "a.mp4")]
    Path("p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    code, _, err = chitu("batch", "p.jsonl", "-o", "out", "--model", tiny_folder, "--steps", 1)
    assert code == 0, err
    assert sorted(os.listdir("out")) == ["a.mp4", "a.mp4.part"]


def planned(chitu: Chitu, tiny_folder: Path, name: str, data: bytes) -> tuple[list[dict[str, object]], str]:
    Path(name).write_bytes(data)
    code, out, err = chitu("batch", name, "-o", "out", "--model", tiny_folder, "--dry-run", "--json")
    assert code == 0, err
    return last_event(out)["rows"], err


@pytest.mark.usefixtures("nothing_loads")
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_encodings_of_windows(chitu: Chitu, tiny_folder: Path, encoding: str) -> None:
    rows, _ = planned(chitu, tiny_folder, "p.txt", "a cat, 猫\r\na dog\r\n".encode(encoding))
    plain, _ = planned(chitu, tiny_folder, "q.txt", "a cat, 猫\na dog\n".encode())
    assert len(rows) == 2 and rows == plain


@pytest.mark.usefixtures("nothing_loads")
def test_a_file_in_another_encoding_is_told_how_to_be_read(chitu: Chitu, tiny_folder: Path) -> None:
    Path("p.txt").write_bytes("猫在草地上".encode("gbk"))
    code, _, err = chitu("batch", "p.txt", "--model", tiny_folder)
    assert code == 2 and "is not UTF-8 at byte 2" in err and "iconv -f GBK" in err


@pytest.mark.usefixtures("nothing_loads")
@pytest.mark.parametrize(
    "text",
    [
        'prompt;seed;fps\r\n"a cat; on grass";3;29.97\r\n;;\r\n',
        'sep=;\r\nprompt;seed;fps\r\n"a cat; on grass";3;29.97\r\n',
        "prompt\tseed\tfps\na cat; on grass\t3\t30000/1001\n",
        'Prompt,Seed,FPS\n"a cat; on grass",3,29.97\n',
        ',prompt,seed,fps,num_frames\n0,"a cat; on grass",3.0,29.97,\n',
    ],
)
def test_tables_of_excel_and_pandas(chitu: Chitu, tiny_folder: Path, text: str) -> None:
    rows, _ = planned(chitu, tiny_folder, "p.csv", text.encode())
    row = {"prompt": "a cat; on grass", "seed": 3, "fps": "30000/1001"}
    plain, _ = planned(chitu, tiny_folder, "q.jsonl", json.dumps(row).encode())
    assert [row["seed"] for row in rows] == [3]
    assert [row["result"] for row in rows] == [row["result"] for row in plain]


@pytest.mark.usefixtures("nothing_loads")
def test_names_come_from_ids_or_from_what_is_asked_for(chitu: Chitu, tiny_folder: Path) -> None:
    lines = [
        {"prompt": "a", "id": "cat 1"},
        {"prompt": "a", "id": 2},
        {"prompt": "a", "task_id": "t.3"},
        {"prompt": "a"},
        {"prompt": "a", "seed": 3.0},
        {"prompt": "a", "seed": 3, "priority": 7},
    ]
    rows, _ = planned(chitu, tiny_folder, "p.jsonl", "\n".join(map(json.dumps, lines)).encode())
    names = [str(row["result"]).removeprefix("out/") for row in rows]
    assert names[:3] == ["cat 1.mp4", "2.mp4", "t.3.mp4"]
    assert names[5] == names[4].replace(".mp4", "-2.mp4")
    again, _ = planned(chitu, tiny_folder, "q.jsonl", json.dumps(lines[4]).encode())
    assert again[0]["result"] == rows[4]["result"] != rows[3]["result"]


@pytest.mark.usefixtures("nothing_loads")
@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"seed": -1}, f"from 0 to {2**63 - 1}; leave it out"),
        ({"seed": 2**64}, f"from 0 to {2**63 - 1}"),
        ({"save_path": "a\x1b[2J.mp4"}, "control character"),
        ({"id": "a\x1b[2J"}, "control character"),
        ({"id": [1]}, "use a plain name"),
        ({"fps": "25,0"}, "a number from 1 to 240"),
    ],
)
def test_bad_values_are_named(chitu: Chitu, tiny_folder: Path, row: dict[str, object], said: str) -> None:
    Path("p.jsonl").write_text(json.dumps({"prompt": "x", **row}))
    code, out, err = chitu("batch", "p.jsonl", "--model", tiny_folder)
    assert code == 2 and said in err and "\x1b" not in out + err


def test_bad_rows_are_skipped_when_asked(chitu: Chitu, tiny_folder: Path) -> None:
    Path("p.jsonl").write_text('{"prompt": "a"}\nnot json\n{"prompt": "b", "num_frames": 32}\n')
    words = ("batch", "p.jsonl", "-o", "out", "--model", tiny_folder, "--steps", 1, "--skip-bad", "--json")
    code, out, err = chitu(*words)
    assert code == 1 and "2 bad rows left out" in err
    assert [row["status"] for row in last_event(out)["rows"]] == ["finished", "bad row", "bad row"]
    assert set(by_prompt()) == {"a"}


@pytest.mark.usefixtures("nothing_loads")
def test_space_is_checked_for_all_rows_before_any_work(
    chitu: Chitu, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two forecasts of each: 400 raw videos of 128 x 128 x 9 need 337.5 MiB and their recipes."""
    from chitu_diffusion.media import video

    rows = [
        {"prompt": "x", "id": n, "save_path": f"{n}.npy", "num_frames": 9, "width": 128, "height": 128}
        for n in range(400)
    ]
    Path("p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = ("batch", "p.jsonl", "-o", "out", "--model", tiny_folder)
    for free, code in ((100 * 2**20, 2), (355 * 2**20, 0)):
        monkeypatch.setattr(video, "free_space", lambda place, free=free: (free, Path("disk"), 1))
        found, _, err = chitu(*words, *([] if code else ["--dry-run"]))
        assert found == code, err
        assert ("twice the forecast" in err and "'disk' has 100.0 MiB free" in err) == bool(code)
    assert os.listdir(".") == ["p.jsonl"]
