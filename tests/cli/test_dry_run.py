"""`--dry-run`, `models ls` and `doctor` look at what they vouch for: they say what the run would, and end
with its exit code.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import WAN_TINY, Chitu

from chitu_diffusion.engine import Engine
from chitu_diffusion.memory import device
from chitu_diffusion.pipelines import preflight

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
HUGE = ("--size", "2048x2048", "--frames", "801")


def broken(folder: Path, how: str) -> Path:
    """A copy of a model that is not whole any more."""
    file = next((folder / "transformer").glob("*.safetensors"))
    if how == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    elif how == "missing":
        file.unlink()
    elif how == "another":
        config = folder / "vae" / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"z_dim": 32}))
    else:
        shutil.rmtree(folder / "tokenizer")
    return folder


BROKEN = ("cut", "missing", "another", "tokenizer")


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (HUGE, 3, "with 801 frames needs about"),
        (("--attention", "foo"), 2, "--attention 'foo': no such kernel"),
        (("--attn-schedule", "foo@50%"), 2, "--attn-schedule 'foo': no such kernel"),
        (("--device", "tpu"), 2, "--device 'tpu': use 'auto', 'cpu', 'cuda' or 'cuda:N'"),
        pytest.param(("--device", "cuda"), 2, "--device 'cuda': this machine has 0", marks=no_gpu),
        pytest.param(("--attention", "fa3"), 2, "--attention 'fa3': it runs on an NVIDIA GPU", marks=no_gpu),
        (("--quant", "fp8", "--set", "infer.quant_keep=x"), 2, "no layer is called 'x'"),
        (("--dtype", "int8"), 2, "--dtype 'int8'"),
        (("--sampler", "foo"), 2, "--sampler 'foo'"),
        (("--cache", "foo"), 2, "--cache"),
        (("--parallel", "u4"), 2, "--parallel"),
        (("--model", "wan-tony"), 4, "Did you mean 'wan-tiny'?"),
        (("--model", "x" * 300), 4, "no such model or folder"),
        (("--model", "~no-such-user/x"), 4, "no such model or folder"),
        (("--set", "models.ckpt_dir=none-such"), 4, "there is no folder none-such"),
    ],
    ids=str,
)
def test_a_dry_run_is_refused_as_the_run_is(
    chitu: Chitu, tiny_folder: Path, words: tuple[str, ...], code: int, said: str
) -> None:
    model = () if "--model" in words else ("--model", tiny_folder)
    for more in ((), ("--dry-run",)):
        found, out, err = chitu("generate", "a cat", "-o", "v.npy", *model, *words, *more)
        assert (found, out) == (code, ""), err
        assert said in err and "Traceback" not in err and "unexpected" not in err
    assert not list(Path().iterdir())


@pytest.mark.parametrize("how", BROKEN)
def test_a_model_that_is_not_whole_is_4(chitu: Chitu, tiny_folder: Path, tmp_path: Path, how: str) -> None:
    folder = broken(Path(shutil.copytree(tiny_folder, tmp_path / "model")), how)
    words = ("generate", "a cat", "--model", folder, "-o", "v.npy")
    for more in ((), ("--dry-run",)):
        code, out, err = chitu(*words, *more)
        assert (code, out) == (4, ""), err
    code, out, _ = chitu("doctor", "--model", folder)
    assert code == 4 and "lack  model" in out
    (tmp_path / "p.txt").write_text("a cat\n")
    assert chitu("batch", "p.txt", "--model", folder, "--dry-run")[0] == 4


@pytest.mark.parametrize("name", ["wan-tony", "no/where", "/no/where", "~no-such-user/x"])
@pytest.mark.parametrize(
    "words",
    [
        ("batch", "p.txt", "--model"),
        ("calibrate", "--model"),
        ("doctor", "--model"),
        ("eval", "adherence", "--model"),
        ("eval", "cache", "--model"),
        ("models", "verify"),
        ("models", "pull"),
    ],
    ids=str,
)
def test_a_model_that_is_not_there_is_4_for_every_command(
    chitu: Chitu, words: tuple[str, ...], name: str
) -> None:
    Path("p.txt").write_text("a cat\n")
    code, out, err = chitu(*words, name)
    assert code == 4, err
    assert "no such model or folder" in out + err
    assert chitu("models", "convert", name, "target")[0] == 4


def test_ls_looks_into_the_files(chitu: Chitu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from chitu_diffusion.models import registry

    shutil.copytree(WAN_TINY, tmp_path / "assets" / "wan-tiny")
    monkeypatch.setattr(registry, "ASSETS", tmp_path / "assets")
    row = json.loads(chitu("models", "ls", "--json")[1])[0]
    assert row["here"] and row["where"].endswith("wan-tiny")
    broken(tmp_path / "assets" / "wan-tiny", "cut")
    row = json.loads(chitu("models", "ls", "--json")[1])[0]
    assert not row["here"] and "truncated" in row["where"]


# -- what it says


def test_a_dry_run_says_what_the_run_does(chitu: Chitu, make_config) -> None:
    """Device, dtype, kernel, notes and memory, with those of an engine."""
    words = (
        "generate",
        "a dragon over a castle",
        "--device",
        "cpu",
        "--seed",
        1,
        "--size",
        "64x64",
        "--frames",
        5,
    )
    plan = json.loads(chitu(*words, "--dry-run", "--json", "-o", "v.npy")[1])
    task = plan["tasks"][0]
    with Engine(make_config(WAN_TINY)) as engine:
        backend = engine.backend
        result = engine.generate(
            "a dragon over a castle", height=64, width=64, num_frames=5, num_inference_steps=1
        )
        needs = backend.memory_estimate().peak(0, backend.spec.tokens(5, 64, 64), 5, 64, 64)
        made = (str(backend.device), str(backend.dtype), backend.attn_backend.name)
    assert (plan["device"], f"torch.{plan['dtype']}", plan["attention"]) == made
    assert task["memory"]["device"] == needs == task["memory"]["host"]
    assert 0 < task["memory"]["device_free"] <= task["memory"]["device_total"]
    said = "; ".join(result.task.notes)
    assert len(task["notes"]) == 2 and all(note in said for note in task["notes"]), said
    assert any("dragon, castle" in note for note in task["notes"])
    err = chitu(*words, "--dry-run")[2]
    assert all(note in err for note in task["notes"]) and "memory  about " in err
    assert not list(Path().iterdir())


@pytest.mark.parametrize(
    "quant", [(), ("--quant", "fp8"), ("--quant", "fp8", "--set", "infer.quant_originals=0")]
)
def test_the_weights_of_a_dry_run_are_the_engines(
    chitu: Chitu, tiny_folder: Path, make_config, quant
) -> None:
    from chitu_diffusion.backend import DiffusionBackend
    from chitu_diffusion.models.registry import resolve_model

    args = make_config(tiny_folder, infer__dtype="bfloat16")
    if quant:
        args.infer.quant = "fp8"
        args.infer.quant_keep = "attn2.to_k"
        args.infer.quant_originals = len(quant) == 2
    model = resolve_model(str(tiny_folder))
    with Engine(args) as engine:
        real = engine.backend.memory_estimate()
    planned = DiffusionBackend.without_weights(args, model).memory_estimate()
    for role, (kind, size) in real.parts.items():
        # what stays in float32, of norms and the like, is counted as the rest
        assert planned.parts[role][0] == kind
        assert planned.parts[role][1] == pytest.approx(size, rel=0.15)


def test_a_level_that_will_rise_is_said(chitu: Chitu, monkeypatch: pytest.MonkeyPatch) -> None:
    """Free memory that holds a tiled decode, and no whole one."""
    words = ("generate", "a cat", "--size", "512x512", "--frames", 33, "--dry-run", "--json")
    needs = [
        json.loads(chitu(*words, "--low-mem-level", level)[1])["tasks"][0]["memory"]["device"]
        for level in (0, 1)
    ]
    assert needs[0] > needs[1]
    here = preflight.main_memory()
    monkeypatch.setattr(preflight, "main_memory", lambda: here._replace(free=needs[1]))
    (task,) = json.loads(chitu(*words)[1])["tasks"]
    assert task["memory"]["level"] == 1 and "the level rises to 1" in task["notes"][-1]
    monkeypatch.setattr(preflight, "main_memory", lambda: here._replace(free=needs[1] - 1))
    assert "may run out" in json.loads(chitu(*words)[1])["tasks"][0]["notes"][-1]
    # and what is free beside this process decides whether it is refused
    monkeypatch.setattr(device, "resident_memory", lambda: 0)
    monkeypatch.setattr(device, "main_memory", lambda: here._replace(free=needs[1] // 2))
    code, out, _ = chitu(*words)
    assert code == 3 and "needs about" in json.loads(out)["tasks"][0]["problem"]


def test_some_that_fit_and_some_that_do_not(chitu: Chitu, tiny_folder: Path) -> None:
    rows = [{"prompt": "a cat"}, {"prompt": "a cat", "height": 4096, "width": 4096, "num_frames": 801}]
    Path("p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    code, out, err = chitu("batch", "p.jsonl", "--model", tiny_folder, "--dry-run", "--json")
    told = json.loads(out.splitlines()[-1])
    assert code == 1 and [row["status"] for row in told["rows"]] == ["to make", "failed"]
    assert "needs about" in told["rows"][1]["result"]
    assert "device cpu, dtype float32, attention sdpa" in err or torch.cuda.is_available()


def test_rows_are_told_what_the_model_does_not_know(chitu: Chitu) -> None:
    Path("p.txt").write_text("a cat\na dragon\n")
    code, _, err = chitu("batch", "p.txt", "--dry-run")
    assert code == 0
    assert (
        "line 2: words of the prompt that wan-tiny does not know: dragon" in err
        and "line 1: words" not in err
    )


# -- doctor


def test_a_pipe_gets_a_finding_a_line(
    chitu: Chitu, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    findings = json.loads(chitu("doctor", "--model", tiny_folder, "--json")[1])["findings"]
    for columns in ("20", "400"):
        monkeypatch.setenv("COLUMNS", columns)
        lines = chitu("doctor", "--model", tiny_folder)[1].splitlines()
        assert len(lines) == len(findings)
        for line, finding in zip(lines, findings, strict=True):
            start = f"{finding['status']:<5} {finding['name']}: "
            assert line.startswith(start) and line == line.rstrip(), line
    assert any(
        line.startswith("ok    model") and "whole; its default video needs about" in line for line in lines
    )


def test_doctor_ends_as_the_run_would(chitu: Chitu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHITU_INFER__DEVICE", "tpu")
    code, out, _ = chitu("doctor")
    assert code == 2 and "lack  settings: device = 'tpu': use" in out
    monkeypatch.setenv("CHITU_INFER__DEVICE", "auto")
    monkeypatch.setenv("CHITU_INFER__TREADS", "2")
    code, out, _ = chitu("doctor")
    assert code == 2 and "Did you mean 'CHITU_INFER__THREADS'?" in out


def test_doctor_tells_folders_that_cannot_be_written(chitu: Chitu, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("file").write_text("")
    monkeypatch.setenv("CHITU_CACHE_DIR", "file/cache")
    findings = {each["name"]: each for each in json.loads(chitu("doctor", "--json")[1])["findings"]}
    assert findings["this folder"]["status"] == findings["temporary folder"]["status"] == "ok"
    assert findings["cache folder"]["status"] == "note"
    assert "CHITU_CACHE_DIR" in findings["cache folder"]["remedy"]
    assert [entry.name for entry in Path().iterdir()] == ["file"]


def test_leftover_variables_do_not_trouble_a_dry_run_of_ranks(
    chitu: Chitu, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The launcher gives its ranks their own, whatever another tool left."""
    for name, value in {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "SLURM_PROCID": "3"}.items():
        monkeypatch.setenv(name, value)
    words = ("generate", "a cat", "--model", tiny_folder, "--gpus", 2, "--device", "cpu", "-o", "v.npy")
    code, _, err = chitu(*words, "--dry-run")
    assert code == 0 and "nothing was made" in err, err
