"""`chitu calibrate` from runs to file to videos: its fits against float64, its plans against full compute,
its refusals.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from running import config_for, latent_and_video, psnr, task_for

from chitu_diffusion.backend import DiffusionBackend
from chitu_diffusion.errors import CheckpointError, UsageError
from chitu_diffusion.evaluation.calibrate import CalibrationRun, calibrate, growth, polynomial
from chitu_diffusion.evaluation.traces import trace
from chitu_diffusion.flexcache.calibration import (
    CALIBRATION_FILE,
    Verified,
    read_calibration,
    write_calibration,
)
from chitu_diffusion.generator import Generator
from chitu_diffusion.models.folder import read_folder
from chitu_diffusion.models.registry import spec_of_folder
from chitu_diffusion.pipelines import stages

SEED = int(np.random.SeedSequence().entropy % 2**31)
STEPS = 12
PROMPTS = ("A cat walking on grass", "a red fish swims left in the sea", "two dogs jump, the sky is blue")


@pytest.fixture(scope="module")
def calibrated(tiny_folder, tmp_path_factory):
    """A copy of the random model, calibrated: (folder, calibration)."""
    folder = tmp_path_factory.mktemp("calibrated") / "model"
    shutil.copytree(tiny_folder, folder)
    jobs = [CalibrationRun(prompt, 0) for prompt in PROMPTS[:2]]
    config = config_for(folder, folder / "outputs")
    found = calibrate(
        config,
        jobs,
        [CalibrationRun(PROMPTS[2], 1)],
        settings={"num_inference_steps": STEPS},
        speeds=(1.5, 2, 3),
    )
    write_calibration(found, folder)
    return folder, found


def backend_of(folder):
    return DiffusionBackend(config_for(folder, folder / "outputs"))


def video_of(backend, **params):
    return latent_and_video(Generator(backend), task_for(**params))[1]


def test_teacache_fit_finds_a_known_polynomial() -> None:
    rng = np.random.default_rng(SEED)
    known = rng.normal(size=5)
    signals = rng.uniform(0.01, 0.5, 80)
    np.testing.assert_allclose(polynomial(signals, np.polyval(known, signals)), known, rtol=1e-5, atol=1e-6)


def test_few_places_take_fewer_powers() -> None:
    found = polynomial(np.array([0.1, 0.2, 0.1, 0.2]), np.array([1.0, 3.0, 1.0, 3.0]))
    np.testing.assert_allclose(np.polyval(found, [0.1, 0.2, 0.15]), [1, 3, 2], atol=1e-9)
    assert len(found) == 5


def test_growth_is_a_geometric_mean_between_the_probed_steps() -> None:
    found = growth(np.linspace(1, 0, 11), [{2: 4.0, 6: 1.0}, {2: 1.0, 6: 1.0}])
    np.testing.assert_allclose(found[[0, 2, 4, 6, 9]], [2, 2, np.sqrt(2), 1, 1])
    np.testing.assert_allclose(growth(np.linspace(1, 0, 5), [{}]), np.ones(4))


def test_a_trace_is_the_run_that_a_task_makes(tiny_folder, tmp_path, monkeypatch) -> None:
    """Moments, ratios and changes against what hooks around the blocks of a usual run see, in float64."""
    backend = DiffusionBackend(config_for(tiny_folder, tmp_path))
    found = trace(backend, {"prompt": PROMPTS[0], "seed": 3, "num_inference_steps": 6}, probes=(3,))
    velocities = []
    latents = []
    entered = []
    left = []
    network = backend.model_pool[0]
    hooks = [
        network.patch_embedding.register_forward_hook(
            lambda _, __, output: entered.append(output[:1].double())
        ),
        network.blocks[-1].register_forward_hook(
            lambda _, __, output: left.append(output.chunk(2)[0].double())
        ),
    ]
    task = task_for(num_inference_steps=6)
    generator = Generator(backend)
    usual = stages.cached_predictor

    def noted(*given):
        predict = usual(*given)

        def noting(latent, *rest):
            velocity = predict(latent, *rest)
            latents.append(latent.double().flatten())
            velocities.append([branch.double().flatten() for branch in velocity.chunk(2)])
            return velocity

        return noting

    monkeypatch.setattr(stages, "cached_predictor", noted)
    latent_and_video(generator, task)
    for hook in hooks:
        hook.remove()
    rows = torch.stack([*(v[0] for v in velocities), *(v[1] for v in velocities), *latents])
    np.testing.assert_allclose(found.moments, rows @ rows.T / rows.shape[1], rtol=1e-4, atol=1e-5)
    residuals = torch.stack([after - before for before, after in zip(entered, left, strict=True)]).flatten(1)
    sizes = residuals.abs().mean(1)
    np.testing.assert_allclose(found.ratios[1:], sizes[1:] / sizes[:-1], rtol=1e-4)
    np.testing.assert_allclose(
        found.changes[1:], (residuals[1:] - residuals[:-1]).abs().mean(1) / sizes[:-1], rtol=1e-4
    )
    assert found.ratios[0] == 1 and found.changes[0] == 0 and 0 < found.gains[3] < 100


def test_what_is_written_is_what_is_read(calibrated) -> None:
    folder, found = calibrated
    assert read_calibration(folder) == found
    spec = spec_of_folder(read_folder(folder))
    assert spec.calibration == found and spec.measured["magcache"] == found.measured["magcache"]
    assert len(found.measured["teacache"]) == 5 and len(found.gain) == STEPS
    assert found.about["weights_sha256"] == backend_of(folder).weights_sha256()


def test_plans_are_nearer_than_a_hand_made_one(calibrated) -> None:
    folder, found = calibrated
    assert [row.speedup for row in found.table] == [1.5, 2.0, 3.0]
    assert found.table[0].psnr[0] > found.table[2].psnr[0]
    backend = backend_of(folder)
    near = {}
    for name, flexcache in (
        ("exact", None),
        ("plan", {"strategy": "plan", "speedup": 2}),
        ("hand-made", {"strategy": "meancache", "fresh": STEPS // 2}),
    ):
        video = video_of(backend, prompt=PROMPTS[2], seed=9, num_inference_steps=STEPS, flexcache=flexcache)
        near[name] = psnr(video, near.get("video", video))
        near.setdefault("video", video)
    assert near["plan"] > near["hand-made"] + 3  # 50.7 and 38.5 dB when this was written


@pytest.mark.parametrize("steps", [7, 12, 20])
@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_a_plan_runs_on_schedules_of_other_lengths_and_without_guidance(calibrated, steps, guidance) -> None:
    folder, _ = calibrated
    backend = backend_of(folder)
    own = {"num_inference_steps": steps, "guidance_scale": guidance, "seed": 4}
    task = task_for(**own, flexcache={"strategy": "plan", "speedup": 2})
    video = latent_and_video(Generator(backend), task)[1]
    assert f"saved work in {steps - steps // 2} of {steps} steps" in " ".join(task.notes)
    assert psnr(video, video_of(backend, **own)) > 20


def test_a_plan_that_skips_nothing_changes_no_bit(calibrated) -> None:
    backend = backend_of(calibrated[0])
    plan = {"strategy": "plan", "fresh": STEPS}
    assert torch.equal(
        video_of(backend, num_inference_steps=STEPS, flexcache=plan),
        video_of(backend, num_inference_steps=STEPS),
    )


def test_protected_steps_stay_computed_and_impossible_plans_name_one_that_is(calibrated) -> None:
    backend = backend_of(calibrated[0])
    guarded = {"strategy": "plan", "fresh": 6, "warmup": 4, "cooldown": 2}
    assert torch.isfinite(video_of(backend, num_inference_steps=STEPS, flexcache=guarded)).all()
    task = task_for(num_inference_steps=STEPS, flexcache={"strategy": "plan", "fresh": 3, "longest": 1})
    with pytest.raises(AssertionError, match="no plan computes 3 of 12 steps.*use fresh=6"):
        latent_and_video(Generator(backend), task)


def test_two_experts_start_anew_at_the_switch(two_experts_folder, tmp_path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(two_experts_folder, folder)
    config = config_for(folder, tmp_path)
    own = {"num_inference_steps": STEPS}
    found = calibrate(
        config, [CalibrationRun(PROMPTS[0], 0)], [CalibrationRun(PROMPTS[1], 1)], settings=own, speeds=(1.5,)
    )
    assert found.table[0].psnr[0] > 20
    write_calibration(found, folder)
    backend = backend_of(folder)
    task = task_for(**own, flexcache={"strategy": "plan", "speedup": 1.5})
    video = latent_and_video(Generator(backend), task)[1]
    assert any("expert" in event for event in task.notes)
    assert psnr(video, video_of(backend, **own)) > 20


def test_picking_from_the_table(calibrated) -> None:
    rows = [
        Verified({"strategy": "plan", "speedup": speed}, speed, (decibels, decibels, decibels), (1, 1, 1), 3)
        for speed, decibels in ((1.5, 45.0), (2.0, 40.0), (4.0, 30.0))
    ]
    table = dataclasses.replace(calibrated[1], table=tuple(rows))
    assert table.for_fidelity(35).speedup == 2.0 and table.for_fidelity(30).speedup == 4.0
    assert table.for_speedup(3) == ({"strategy": "plan", "speedup": 3.0}, 35.0)
    assert table.for_speedup(2)[1] == 40.0 and table.for_speedup(8)[1] is None
    with pytest.raises(UsageError, match="kept 45.0 dB"):
        table.for_fidelity(50)
    with pytest.raises(UsageError, match="above 1"):
        table.for_speedup(1)


def test_other_weights_and_broken_files_are_refused(calibrated, tmp_path) -> None:
    folder, found = calibrated
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    write_calibration(dataclasses.replace(found, about={**found.about, "weights_sha256": "0" * 64}), other)
    task = task_for(num_inference_steps=STEPS, flexcache="plan")
    with pytest.raises(AssertionError, match="calibrated with other weights.*chitu calibrate"):
        latent_and_video(Generator(backend_of(other)), task)


@pytest.mark.parametrize("harm", [
    lambda said: {}, lambda said: [], lambda said: {**said, "about": {}}, lambda said: {**said,
    "gain": said["gain"][1:]},
    lambda said: {**said, "moments": said["moments"][:-1]}, lambda said: {**said,
    "sigmas": said["sigmas"][::-1]},
    lambda said: {**said, "gain": [float("nan")] * len(said["gain"])},
])  # fmt: skip
def test_a_damaged_file_is_as_none(calibrated, tmp_path, caplog, harm) -> None:
    """The model still opens, with a warning that names the file and what to do."""
    folder, _ = calibrated
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    assert spec_of_folder(read_folder(other)).calibration is not None
    file = other / CALIBRATION_FILE
    file.write_text(json.dumps(harm(json.loads(file.read_text()))))
    with pytest.raises(CheckpointError, match="measure again with 'chitu calibrate'"):
        read_calibration(other)
    assert spec_of_folder(read_folder(other)).calibration is None
    assert str(file) in caplog.text


# -- the command line


def test_calibrate_then_generate_by_fidelity(chitu, tiny_folder, tmp_path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS[:2]) + "\n")
    code, out, err = chitu(
        "calibrate", "--model", folder, "--prompts", "prompts.txt", "--steps", 8, "--device", "cpu"
    )
    assert code == 0 and out.strip() == str(folder / CALIBRATION_FILE), err
    assert "| forwards saved |" in err
    asked = ("generate", "a cat", "--model", folder, "--steps", 8, "--device", "cpu", "--seed", 1)
    code, out, err = chitu(*asked, "--fidelity", "10dB", "-o", "cat.npy")
    assert (
        code == 0 and "cache plan:speedup=" in err and "dB to expect" in err and "over 1 checked video" in err
    ), err
    recipe = json.loads((tmp_path / "cat.npy.json").read_text())
    assert recipe["params"]["flexcache"]["strategy"] == "plan"
    code, out, err = chitu(*asked, "--speedup", 2, "--dry-run")
    assert code == 0 and "cache plan:speedup=2: 2 times fewer forwards" in err, err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--fidelity", "35dB"), "random-tiny was not calibrated; 'chitu calibrate --model "),
        (("--speedup", "2"), "--speedup: random-tiny was not calibrated"),
        (("--speedup", "2", "--fidelity", "35"), "use one of them"),
        (("--speedup", "2", "--cache", "pab"), "use one of them"),
        (("--cache", "plan"), "was not calibrated; 'chitu calibrate"),
    ],
)
def test_not_calibrated_says_the_command(chitu, tiny_folder, flags, said) -> None:
    code, _, err = chitu("generate", "a cat", "--model", tiny_folder, "--device", "cpu", *flags)
    assert code in (1, 2) and said in err, err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--prompts", "none.txt"), "--prompts none.txt"),
        (("--prompts", "one.txt"), "use at least two"),
        (("--steps", "3"), "use at least 4"),
        (("--seeds", "x"), "a whole number"),
    ],
)
def test_calibrate_refuses(chitu, tiny_folder, tmp_path, flags, said) -> None:
    (tmp_path / "one.txt").write_text("a cat\n")
    code, _, err = chitu("calibrate", "--model", tiny_folder, "--device", "cpu", *flags)
    assert code == 2 and said in err, err


def test_calibrate_wants_a_picture_where_the_model_does(chitu, image_folder, tmp_path) -> None:
    words = ("calibrate", "--model", image_folder, "--device", "cpu", "--steps", 4, "--size", "16x16")
    (tmp_path / "two.txt").write_text("a cat\na dog\n")
    code, _, err = chitu(*words)
    assert code == 2 and "use --image FILE" in err and "loading" not in err, err
    Image.new("RGB", (16, 16), "red").save("red.png")
    code, out, err = chitu(*words, "--image", "red.png", "--prompts", "two.txt", "-o", "found")
    assert code == 0 and Path(out.strip()).is_file(), err
