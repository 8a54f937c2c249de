"""The shift of the noise schedule: of the request, the folder, the model's authors; and one model by any
name."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from running import CAT, config_for, model_of, task_for

from chitu_diffusion.backend import DiffusionBackend
from chitu_diffusion.engine import Engine
from chitu_diffusion.errors import UsageError
from chitu_diffusion.flexcache.calibration import read_calibration
from chitu_diffusion.models import registry
from chitu_diffusion.models.registry import ASSETS, FoundModel, resolve_model
from chitu_diffusion.models.spec import ModelSpec
from chitu_diffusion.pipelines.request import resolve_task
from chitu_diffusion.sampling.registry import SOLVERS
from chitu_diffusion.sampling.solvers import Sampler

OTHER = 7.0


@pytest.fixture
def model(tiny_folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_folder, tmp_path / "model")


def with_default(folder: Path, **defaults: object) -> Path:
    """Changes what `chitu.json` says; None takes it out."""
    file = folder / "chitu.json"
    said = json.loads(file.read_text())
    said["defaults"] |= defaults
    said["defaults"] = {name: value for name, value in said["defaults"].items() if value is not None}
    file.write_text(json.dumps(said))
    return folder


def latent_of(folder: Path, tmp_path: Path, **fields: object) -> torch.Tensor:
    with Engine(config_for(folder, tmp_path)) as engine:
        task = engine.submit(CAT, seed=1, save_path=str(tmp_path / "a.npy"), **fields)
        while task.status != "decoding":
            engine.step()
        return task.buffer.latent


@pytest.mark.parametrize("sampler", SOLVERS)
@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0, 12.0])
def test_a_state_with_a_shift_is_that_of_a_config_with_it(sampler: str, shift: float) -> None:
    """For every solver, schedule and steps, to the bit."""
    config = {"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True,
              "prediction_type": "flow_prediction", "num_train_timesteps": 1000}  # fmt: skip
    asked = Sampler(sampler, {**config, "flow_shift": 5.0})
    own = Sampler(sampler, {**config, "flow_shift": shift})
    states = (asked.begin(6, shift=shift), own.begin(6))
    latents = [torch.randn(1, 2, 1, 3, 3, generator=torch.Generator().manual_seed(0))] * 2
    for step in range(6):
        assert torch.equal(states[0]["sigmas"], states[1]["sigmas"])
        velocity = torch.randn(1, 2, 1, 3, 3, generator=torch.Generator().manual_seed(step))
        moved = [
            solver.step(state, velocity, latent)
            for solver, state, latent in zip((asked, own), states, latents, strict=True)
        ]
        latents = [latent for latent, _ in moved]
        states = tuple(state for _, state in moved)
        assert torch.equal(*latents)
    expected = shift * 0.5 / (1 + (shift - 1) * 0.5)  # the middle of the grid
    assert min(abs(float(sigma) - expected) for sigma in own.begin(6)["sigmas"]) < 0.02


def test_request_folder_and_scheduler_are_one_shift(model: Path, tmp_path: Path) -> None:
    """A request's shift, `chitu.json`'s and the scheduler's own give the same bits; the first counts most."""
    plain = latent_of(model, tmp_path)
    asked = latent_of(model, tmp_path, shift=OTHER)
    assert not torch.equal(plain, asked)
    assert torch.equal(plain, latent_of(model, tmp_path, shift=3.0))
    assert torch.equal(asked, latent_of(with_default(model, shift=OTHER), tmp_path))
    assert torch.equal(plain, latent_of(model, tmp_path, shift=3.0))
    with_default(model, shift=None)
    file = model / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "flow_shift": OTHER}))
    assert torch.equal(asked, latent_of(model, tmp_path))


@pytest.mark.parametrize("shift", [0, -1, float("nan"), float("inf"), 1e6, "3", True])
def test_shifts_that_cannot_be(shift: object) -> None:
    with pytest.raises(UsageError, match="shift = .*0.01 to 100"):
        task_for(shift=shift)


def test_a_list_of_noise_levels_has_no_shift(model: Path, tmp_path: Path) -> None:
    with_default(model, sampler="euler", sigmas=[1.0, 0.8, 0.5], steps=3)
    spec = model_of(config_for(model, tmp_path)).spec
    with pytest.raises(UsageError, match="leave it out"):
        resolve_task(task_for(shift=OTHER), spec, None)
    resolved = resolve_task(task_for(), spec, None)
    again = task_for(shift=resolved.shift)
    assert resolve_task(again, spec, None).shift == resolved.shift  # a recipe's request is taken


def test_plan_and_recipe_say_the_shift(chitu, model: Path, tmp_path: Path) -> None:
    words = ("generate", CAT, "--model", model, "--device", "cpu", "--seed", 1)
    code, _, err = chitu(*words, "--dry-run", "--shift", OTHER)
    assert code == 0 and "shift 7" in err
    code, out, _ = chitu(*words, "--dry-run", "--json")
    plan = json.loads(out)
    assert code == 0 and plan["tasks"][0]["shift"] == 3.0 and plan["sampler"] == "unipc"
    assert chitu(*words, "--shift", OTHER, "-o", "a.npy")[0] == 0
    recipe = json.loads((tmp_path / "a.npy.json").read_text())
    assert recipe["params"]["shift"] == recipe["sampler"]["shift"] == OTHER
    assert chitu("reproduce", "a.npy", "--model", model, "--check", "--device", "cpu")[0] == 0
    code, _, err = chitu(*words, "--shift", "-1")
    assert code == 2 and "--shift" in err
    Path("rows.csv").write_text("prompt,shift\na cat,7\na cat,x\n")
    code, _, err = chitu("batch", "rows.csv", "--model", model, "--dry-run")
    assert code == 2 and "line 3: shift = 'x': must be a number" in err
    Path("rows.csv").write_text("prompt,shift\na cat,7\na cat,\n")
    assert chitu("batch", "rows.csv", "--model", model, "--dry-run")[0] == 0


@pytest.fixture
def known(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> ModelSpec:
    """The tiny networks under a name, as if authors had published them who sample with shift 12."""
    found = resolve_model(str(tiny_folder)).spec
    defaults = dataclasses.replace(found.defaults, shift=12.0)
    spec = dataclasses.replace(found, name="Tiny-1B", hub_ids=("them/Tiny-1B",), defaults=defaults)
    monkeypatch.setattr(registry, "FULL_SIZE", {spec.name: spec})
    return spec


def test_what_is_not_as_its_authors_have_it_is_said(chitu, model, known, tmp_path) -> None:
    """As in Wan2.2-A14B, whose converted folders say 3 and whose authors say 12."""
    words = ("generate", CAT, "--model", model, "--device", "cpu", "--seed", 1)
    for flags, said in (((), True), (("--shift", 12), False)):
        code, _, err = chitu(*words, "--dry-run", *flags)
        assert code == 0 and ("authors of random-tiny use 12: --shift 12" in err) == said, err
    assert json.loads(chitu(*words, "--dry-run", "--json")[1])["authors_shift"] == 12.0
    code, out, _ = chitu(*words, "-o", "a.npy", "--json")
    assert code == 0 and "the authors of random-tiny use 12" in out
    assert json.loads((tmp_path / "a.npy.json").read_text())["sampler"]["authors_shift"] == 12.0
    with_default(model, shift=12.0)
    assert "authors" not in chitu(*words, "--dry-run")[2]


def test_a_model_by_name_and_by_folder_is_one_model(model, known, monkeypatch, tmp_path) -> None:
    """Name, folder beside a name, and folder: calibration, defaults, shift."""
    with_default(model, steps=7, shift=OTHER)
    calibration = read_calibration(ASSETS / "wan-tiny")
    shutil.copy(ASSETS / "wan-tiny" / "flexcache.json", model)
    monkeypatch.setattr(registry, "cached_folder", lambda hub_ids: model)
    found = [resolve_model("Tiny-1B"), resolve_model("them/tiny-1b"), resolve_model("Tiny-1B", model),
             resolve_model(str(model))]  # fmt: skip
    assert all(isinstance(each, FoundModel) and each.spec == found[0].spec for each in found)
    assert found[0].spec.calibration == calibration
    assert (found[0].spec.defaults.steps, found[0].spec.defaults.shift) == (7, OTHER)
    config = config_for(Path("Tiny-1B"), tmp_path)
    assert DiffusionBackend(config).sampler.shift == OTHER
