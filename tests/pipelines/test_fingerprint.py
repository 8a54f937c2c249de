"""One fingerprint: the same before loading and after, another for whatever makes another video."""

from __future__ import annotations

import dataclasses
import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from running import CAT, config_for, model_of

from chitu_diffusion.backend import DiffusionBackend
from chitu_diffusion.config import EngineConfig
from chitu_diffusion.engine import Engine
from chitu_diffusion.flexcache.calibration import read_calibration, write_calibration
from chitu_diffusion.models.registry import ASSETS, TINY, resolve_model
from chitu_diffusion.pipelines.fingerprint import differences, fingerprint_before_loading, fingerprint_of
from chitu_diffusion.weights import hashing
from chitu_diffusion.weights.hashing import FileHashes

Change = Callable[[Path, EngineConfig], None]


@pytest.fixture
def model(tiny_folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_folder, tmp_path / "model", ignore=shutil.ignore_patterns("manifest.json"))


def edited(file: str, **said: object) -> Change:
    """A change of a JSON file in the folder."""

    def change(folder: Path, config: EngineConfig) -> None:
        place = folder / file
        place.write_text(json.dumps({**json.loads(place.read_text()), **said}))

    return change


def flipped(file: str) -> Change:
    def change(folder: Path, config: EngineConfig) -> None:
        data = bytearray((folder / file).read_bytes())
        data[-1] ^= 0x40
        (folder / file).write_bytes(data)

    return change


def with_setting(name: str, value: object) -> Change:
    return lambda folder, config: setattr(config.infer, name, value)


CHANGES: dict[str, Change] = {
    "weights": flipped("vae/diffusion_pytorch_model.safetensors"),
    "configs": edited("vae/config.json", latents_mean=[0.0] * 4),
    "boundary": edited("scheduler/scheduler_config.json", solver_order=1),
    "tokenizer": edited("tokenizer/tokenizer_config.json", padding_side="left"),
    "shift": edited("scheduler/scheduler_config.json", flow_shift=7.0),
    "own shift": edited("chitu.json", defaults={"shift": 7.0}),
    "sampler": with_setting("sampler", "euler"),
    "dtype": with_setting("dtype", "bfloat16"),
    "quant": with_setting("quant", "fp8"),
    "attention schedule": with_setting("attn_schedule", "math@2"),
}


def before(config: EngineConfig) -> dict[str, object]:
    found = resolve_model(config.models.name, config.models.ckpt_dir)
    sampled = found._replace(spec=found.spec.with_sampler(config.infer.sampler))  # as the command line does
    return fingerprint_before_loading(config, sampled, None)


@pytest.mark.parametrize("change", [*CHANGES, "nothing"])
def test_before_loading_it_is_what_it_is_after(model, tmp_path, change) -> None:
    config = config_for(model, tmp_path)
    config.infer.quant_keep = ""
    if change in CHANGES:
        CHANGES[change](model, config)
    early = before(config)
    late = fingerprint_of(DiffusionBackend(config))
    assert late == {**early, "attention": late["attention"]} and not differences(late, early)
    assert json.loads(json.dumps(late)) == late  # as it stands in a file


@pytest.mark.parametrize("change", CHANGES)
def test_what_makes_another_video_is_another(model, tmp_path, change) -> None:
    config = config_for(model, tmp_path)
    first = before(config)
    CHANGES[change](model, config)
    assert len(differences(first, before(config))) == 1


def test_kernels_that_are_exact_are_alike_where_none_is_asked_for(model, tmp_path) -> None:
    here = before(config_for(model, tmp_path))
    made = {**here, "attention": "math"}
    assert not differences(made, here) and not differences({**made, "device": "elsewhere"}, here)
    assert differences({**here, "attention": "sage"}, here) == ["attention sage, here auto"]
    assert differences(made, {**here, "attention": "sdpa"}) == ["attention math, here sdpa"]
    assert differences(made | {"attention": "of another version"}, here)


def test_it_does_not_hang_on_where_the_model_lies_or_what_wrote_it(model, tmp_path) -> None:
    first = before(config_for(model, tmp_path))
    edited("transformer/config.json", _diffusers_version="9.9.9", _name_or_path="elsewhere")(
        model, EngineConfig()
    )
    moved = model.rename(tmp_path / "elsewhere")
    assert before(config_for(moved, tmp_path)) == first


@pytest.mark.parametrize("change", [*CHANGES, "flag"])
def test_a_batch_is_done_only_by_the_same_model_and_settings(chitu, model, tmp_path, change) -> None:
    Path("rows.txt").write_text("a cat\n")
    words = ["batch", "rows.txt", "-o", "out", "--model", model, "--device", "cpu", "--steps", 2, "--seed", 1]
    words += ["--dtype", "float32", "--set", "infer.quant_keep="]
    assert chitu(*words)[0] == 0
    assert "1 done already, 0 to make" in chitu(*words)[2]
    config = config_for(model, tmp_path)
    if change == "flag":
        words += ["--shift", 7]
    else:
        CHANGES[change](model, config)
        changed = {"sampler", "dtype", "quant", "attn_schedule"}
        words += [
            word
            for name in changed
            if vars(config.infer)[name] != vars(config_for(model, tmp_path).infer)[name]
            for word in ("--set", f"infer.{name}={vars(config.infer)[name]}")
        ]
        words = [word for word in words if change != "dtype" or word not in ("--dtype", "float32")]
    code, _, said = chitu(*words, "--dry-run")
    assert code == 2 and "shows something else" in said
    assert "0 done already, 1 to make" in chitu(*words, "--dry-run", "--overwrite")[2]


def test_a_plan_of_other_weights_waits_for_no_hash_and_is_refused_once_it_is_known(
    model, tmp_path, monkeypatch
) -> None:
    monkeypatch.setenv("CHITU_CACHE_DIR", str(tmp_path / "cache"))
    calibration = read_calibration(ASSETS / TINY)
    assert calibration is not None
    about = {**calibration.about, "config_sha256": None}  # weights alone are another model's
    write_calibration(dataclasses.replace(calibration, about=about), model)
    go = threading.Event()
    hash_file = FileHashes._hash
    monkeypatch.setattr(hashing, "_QUICK", 0)
    monkeypatch.setattr(FileHashes, "_hash", lambda self, file: (go.wait(60), hash_file(self, file))[1])
    with Engine(config_for(model, tmp_path)) as engine:
        plan = {"strategy": "plan", "speedup": 2}
        task = engine.submit(CAT, seed=1, num_inference_steps=20, flexcache=plan)
        while task.current_step < 5:
            engine.step()
        assert task.status == "denoising" and not engine.backend.weights_are_hashed()
        go.set()
        engine.backend.weights_sha256()
        engine.step()
        assert task.status == "failed" and "calibrated with other weights" in str(task.error_message)


def test_a_promise_made_at_another_shift_is_told(chitu) -> None:
    words = ("generate", CAT, "--speedup", 2, "--dry-run", "--seed", 1)
    assert "it was checked with" not in chitu(*words)[2]
    assert "it was checked with sampler unipc at shift 3.0" in chitu(*words, "--shift", 9)[2]
    assert model_of(EngineConfig()).spec.calibration is not None
