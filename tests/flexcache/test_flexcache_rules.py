"""Each cache's rule beside a plain float64 re-computation of what its paper says, on signals that a real run
recorded.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from running import config_for, relative_error, task_for
from torch import Tensor

from chitu_diffusion.backend import DiffusionBackend
from chitu_diffusion.errors import UsageError
from chitu_diffusion.flexcache import predictors
from chitu_diffusion.flexcache.manager import FlexCacheManager, parse_flexcache
from chitu_diffusion.flexcache.registry import parse_strategy
from chitu_diffusion.flexcache.schedule import Schedule
from chitu_diffusion.generator import Generator
from chitu_diffusion.models.registry import resolve_model
from chitu_diffusion.models.wan.cache_coefficients import WAN_1_3B, WAN_14B
from chitu_diffusion.pipelines import denoising
from chitu_diffusion.pipelines.request import check_cache, resolve_task
from chitu_diffusion.task import TaskStatus

STEPS = 20


@pytest.fixture(scope="module")
def backend(tiny_folder, tmp_path_factory):
    return DiffusionBackend(config_for(tiny_folder, tmp_path_factory.mktemp("outputs")))


@pytest.fixture(scope="module")
def schedule(backend) -> Schedule:
    return denoising.schedule_of(backend, backend.sampler.begin(STEPS))


def strategy(name: str, **parameters):
    return parse_strategy({"strategy": name, **parameters})[1]


def fresh_steps(name: str, schedule: Schedule, level: str | None = None, **parameters) -> list[int]:
    plan = strategy(name, **parameters).plan(schedule)
    actions = next(iter(plan.values())) if level is None else plan[level]
    return [step for step, action in enumerate(actions) if action == "compute"]


def bare(steps: int) -> Schedule:
    return Schedule.bare(steps)


@pytest.mark.parametrize("cache", ["magcache", {"strategy": "plan", "speedup": 2}], ids=["magcache", "plan"])
def test_what_was_not_measured_is_told_before_any_work(backend, cache) -> None:
    bare_spec = replace(backend.spec, measured={}, calibration=None)
    resolved = resolve_task(task_for(num_inference_steps=10, flexcache=cache), bare_spec, "")
    with pytest.raises(UsageError, match="no ratios were measured|was not calibrated"):
        check_cache(resolved, bare_spec, 4, None)
    check_cache(resolved, resolve_model("wan-tiny").spec, 4, None)


# -- plans


def test_interval_computes_every_nth() -> None:
    assert fresh_steps("interval", bare(10), interval=3) == [0, 3, 6, 9]
    assert fresh_steps("interval", bare(10), interval=3, warmup=3, cooldown=2) == [0, 1, 2, 5, 8, 9]
    assert fresh_steps("taylorseer", bare(12), interval=4, warmup=3) == [0, 1, 2, 6, 10, 11]


def test_full_steps_lie_around_the_switch_of_experts() -> None:
    two = replace(bare(12), experts=(0,) * 6 + (1,) * 6)
    assert fresh_steps("interval", two, interval=4, switch=2) == [0, 4, 5, 6, 7, 11]
    assert fresh_steps("meancache", two, steps="0", switch=1) == [0, 5, 6]


LISTED = {
    30: [*range(20), 24, 28, 32, 36, 40, 43, 45, 47, 48, 49],
    25: [*range(17), 24, 32, 40, 43, 45, 47, 48, 49],
    17: [*range(9), 10, 17, 24, 31, 38, 45, 48, 49],
    10: [0, 1, 3, 7, 14, 21, 28, 35, 42, 49],
}


def test_meancache_plans_are_the_published_ones_and_exist_for_any_number_of_steps() -> None:
    for fresh, steps in LISTED.items():
        assert fresh_steps("meancache", bare(50), fresh=fresh) == steps
    assert fresh_steps("meancache", bare(50)) == LISTED[30]
    for count in (2, 4, 7, 20, 33, 50, 100):
        for fresh in range(2, count + 1):
            steps = fresh_steps("meancache", bare(count), fresh=fresh)
            assert len(steps) == fresh and steps[0] == 0 and steps[-1] == count - 1
    for same in ("0-2+5", [5, 0, 1, 2]):
        assert fresh_steps("meancache", bare(6), steps=same) == [0, 1, 2, 5]
    for wrong in ({"steps": "1-3"}, {"steps": "a"}, {"fresh": -1}, {"steps": 3}):
        with pytest.raises(UsageError):
            strategy("meancache", **wrong)
    with pytest.raises(UsageError, match="at most the task's 4 steps"):
        parse_flexcache({"strategy": "meancache", "fresh": 5}, 4)


def test_pab_counts_inside_its_window(schedule) -> None:
    times = schedule.timesteps
    inside = [step for step, time in enumerate(times) if 450 < time < 930]
    for level, steps in (("attention", 2), ("cross", 3)):
        saved = [step for index, step in enumerate(inside) if index % steps]
        expected = [step for step in range(STEPS) if step not in saved]
        assert fresh_steps("pab", schedule, level) == expected
    assert "ffn" not in strategy("pab").plan(schedule)
    assert set(strategy("pab", self_range=1, cross_range=1, ffn_range=2).plan(schedule)) == {"ffn"}


def test_blockdance_and_the_gate_keep_to_their_windows() -> None:
    assert fresh_steps("blockdance", bare(20), group=3) == [0, 1, 2, 3, 4, 5, 8, 11, 14, 17, 18, 19]
    assert strategy("blockdance", boundary=0.6).span(30) == (0, 17)
    assert fresh_steps("cfg_gate", bare(12), interval=3, cooldown=0) == [0, 1, 2, 3, 4, 5, 8, 11]
    assert fresh_steps("cfg_gate", bare(8), interval=0) == [0, 1, 2, 3, 7]


@pytest.mark.parametrize("signal", ["modulation", "time"])
def test_teacache_follows_its_polynomial(schedule, signal) -> None:
    """acc += P(mean|m - m'| / mean|m'|), computed once it reaches the threshold: in float64, from the
    embeddings.
    """
    which = ("time", "modulation").index(signal)
    states = [schedule.embed_time(step)[which].double().numpy() for step in range(STEPS)]
    for coefficients, threshold in (((1.0, 0.0), 1.9), ((3.0, -0.2, 0.9, 0.01), 8.0)):
        expected = [0]
        total = 0.0
        for step in range(1, STEPS):
            change = np.abs(states[step] - states[step - 1]).mean() / np.abs(states[step - 1]).mean()
            total += np.polyval(coefficients, change)
            if total >= threshold or step == STEPS - 1:
                expected.append(step)
                total = 0.0
        found = fresh_steps(
            "teacache", schedule, signal=signal, threshold=threshold, coefficients=list(coefficients)
        )
        assert found == expected and 2 < len(found) < STEPS
    with pytest.raises(UsageError, match="time embedding"):
        strategy("teacache").plan(bare(4))


def test_coefficients_come_from_the_model(schedule) -> None:
    own = replace(schedule, measured=WAN_1_3B)
    assert fresh_steps("teacache", own, threshold=0.2) == fresh_steps(
        "teacache", schedule, threshold=0.2, coefficients=list(WAN_1_3B["teacache"])
    )
    assert fresh_steps("magcache", own) == fresh_steps(
        "magcache", schedule, ratios=list(WAN_1_3B["magcache"])
    )
    with pytest.raises(UsageError, match=r"no ratios were measured on random-tiny.*meancache"):
        strategy("magcache").plan(schedule)


@pytest.mark.parametrize(("threshold", "longest"), [(0.12, 2), (0.12, 4), (0.02, 9), (0.0, 2)])
def test_magcache_multiplies_measured_ratios(threshold, longest) -> None:
    expected = []
    product = 1.0
    error = 0.0
    run = 0
    for step, ratio in enumerate(WAN_14B["magcache"]):
        if step >= 10:
            product = product * ratio
            run = run + 1
            error += abs(1 - product)
        if step < 10 or error >= threshold or run > longest:
            expected.append(step)
            product = 1.0
            error = 0.0
            run = 0
    ratios = list(WAN_14B["magcache"])
    assert fresh_steps("magcache", bare(50), threshold=threshold, longest=longest, ratios=ratios) == expected
    half = fresh_steps("magcache", bare(25), threshold=threshold, longest=longest, ratios=ratios)
    assert half[:5] == [0, 1, 2, 3, 4] and (len(half) == 25) == (threshold == 0)


# -- predictors


def test_taylor_weights_are_the_published_recursion() -> None:
    values = np.random.default_rng(0).normal(size=(3, 5))
    places = [2.0, 5.0, 6.0]
    at = 8.0
    f1 = (values[2] - values[1]) / 1.0
    before = (values[1] - values[0]) / 3.0
    f2 = (f1 - before) / 1.0
    x = 2.0
    for order, expected in (
        (0, values[2]),
        (1, values[2] + f1 * x),
        (2, values[2] + f1 * x + f2 * x * x / 2),
    ):
        records = [
            {"at": at, "value": torch.from_numpy(value)} for at, value in zip(places, values, strict=True)
        ]
        assert np.allclose(predictors.predict("taylor", order, records, at=at).numpy(), expected, atol=1e-6)
    # exact on a straight line, whatever the spacing
    line = [{"at": at, "value": torch.tensor([3 * at + 1])} for at in places]
    assert float(predictors.predict("taylor", 1, line, at=8.0)) == pytest.approx(25.0)


def test_velocity_prediction_is_meancaches_formula() -> None:
    random = np.random.default_rng(0)
    sigmas = [0.9, 0.7, 0.6]
    v = random.normal(size=(3, 2, 1, 1, 1, 4))
    x = random.normal(size=(3, 1, 1, 1, 1, 4))
    records = [
        {"at": sigma, "value": torch.from_numpy(value), "latent": torch.from_numpy(latent)}
        for sigma, value, latent in zip(sigmas, v, x, strict=True)
    ]
    now = 0.5
    following = 0.45
    for window in (1, 2):
        start = 2 - window
        mean = (x[2] - x[start]) / (sigmas[2] - sigmas[start])
        jvp = (v[start] - mean) / (sigmas[2] - sigmas[start])
        expected = v[2] - jvp * (following - now)
        found = predictors.predict("velocity", window, records, at=now, sigma=now, next_sigma=following)
        assert np.allclose(found.numpy(), expected, atol=1e-6)
    alone = predictors.predict("velocity", 1, records[-1:], at=now, sigma=now, next_sigma=following)
    assert torch.equal(alone, records[-1]["value"])


# -- decisions that depend on data, against what a run recorded


def recorded(
    backend: DiffusionBackend, monkeypatch, **flexcache
) -> tuple[list[Tensor], list[Tensor], list[bool]]:
    """Of each step: the latent before it, the stacked velocities, whether the cache said to skip."""
    latents = []
    velocities = []
    skipped = []
    original = FlexCacheManager.velocity

    def spy(manager, step, latent, branches, compute: Callable[[tuple[int, ...]], Tensor]) -> Tensor:
        value = original(manager, step, latent, branches, compute)
        latents.append(latent)
        velocities.append(value)
        return value

    monkeypatch.setattr(FlexCacheManager, "velocity", spy)
    task = task_for(num_inference_steps=STEPS, flexcache=flexcache)
    generator = Generator(backend)
    while task.status is not TaskStatus.DECODING:
        before = task.buffer.cache
        generator.generate_step(task)
        assert task.error is None, task.error_message
        state = task.buffer.cache
        if before is not None and state is not None:
            skipped.append(state["notes"].get("decided", [-1]) == [task.current_step - 1, True])
    return latents, velocities, [*skipped, False]  # the last step is protected


@pytest.mark.parametrize("threshold", [0.3, 0.8])
def test_easycache_decides_by_the_latents_way(backend, monkeypatch, threshold) -> None:
    latents, velocities, skipped = recorded(
        backend, monkeypatch, strategy="easycache", threshold=threshold, warmup=4
    )
    x = [latent.double() for latent in latents]
    v = [velocity.double() for velocity in velocities]
    error = 0.0
    rate = math.nan
    full = 0
    expected = []
    for step in range(STEPS):
        skips = False
        if 4 <= step < STEPS - 1:
            error += float(rate * (x[step] - x[step - 1]).abs().mean() / v[step - 1][:1].abs().mean())
            skips = error < threshold
        expected.append(skips)
        if skips:
            offset = v[full] - x[full]
            assert relative_error(v[step], x[step] + offset) < 1e-5
        else:
            error = 0.0
            full = step
            if step:
                rate = float(
                    (v[step][:1] - v[step - 1][:1]).abs().mean() / (x[step] - x[step - 1]).abs().mean()
                )
    assert skipped == expected and 0 < sum(skipped) < STEPS - 5


@pytest.mark.parametrize(
    ("name", "threshold", "longest"), [("fbcache", 0.07, 0), ("fbcache", 0.5, 2), ("dbcache", 0.3, 1)]
)
def test_first_blocks_decide_by_their_residual(backend, monkeypatch, name, threshold, longest) -> None:
    own = {"strategy": name, "threshold": threshold, "longest": longest, "first_blocks": 1, "last_blocks": 0}
    latents, _, skipped = recorded(backend, monkeypatch, **own)
    network = backend.model_pool[0]
    text = Generator(backend).encode_text([task_for().params.prompt])
    timesteps = backend.sampler.begin(STEPS)["timesteps"]
    known = None
    run = 0
    expected = []
    with torch.no_grad():
        for step, latent in enumerate(latents):
            e = network.embed(latent, text, timesteps[step].reshape(1))
            after = network.blocks[0](
                e.tokens, e.text.keys(0, network.blocks[0].text_keys), e.modulation, e.rope
            )
            residual = (after - e.tokens).double()
            skips = 4 <= step < STEPS - 1 and not (longest and run >= longest)
            skips = skips and float((residual - known).abs().mean() / known.abs().mean()) < threshold
            expected.append(skips)
            run = run + 1 if skips else 0
            known = known if skips else residual
    assert skipped == expected and 0 < sum(skipped) < STEPS - 5
