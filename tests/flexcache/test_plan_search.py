"""Plans by calculation: against brute force, against sums done by hand in float64, on schedules of other
lengths.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from chitu_diffusion.errors import UsageError
from chitu_diffusion.flexcache import plan_search as planning
from chitu_diffusion.flexcache.manager import parse_flexcache
from chitu_diffusion.flexcache.plan_search import Traces, best_plans, fitted, gap_errors, predictions
from chitu_diffusion.models.registry import resolve_model

SEED = int(np.random.SeedSequence().entropy % 2**31)


def random_traces(
    n: int, branches: int = 2, numbers: int = 400, seed: int = SEED
) -> tuple[Traces, np.ndarray]:
    """Smooth random runs, and their rows [(branches + 1) n, numbers]."""
    rng = np.random.default_rng(seed)
    sigmas = np.concatenate([np.sort(rng.uniform(0.05, 1, n))[::-1], [0.0]])
    powers = np.stack([sigmas[:-1] ** power for power in range(5)], 1)
    curves = [powers @ rng.normal(size=(5, numbers)) for _ in range(branches + 1)]
    rows = np.concatenate(curves) + 0.02 * rng.normal(size=((branches + 1) * n, numbers))
    gain = rng.uniform(0.5, 5, n)
    return Traces(sigmas, rows @ rows.T / numbers, np.diff(sigmas), gain, rng.uniform(2, 7, n)), rows


def cost_of(traces: Traces, fresh: tuple[int, ...], order: int) -> float:
    """A plan's error, gap by gap."""
    ends = [*fresh[1:], traces.num_steps]
    total = 0.0
    for place, following in enumerate(ends):
        state = fresh[: place + 1][-order:]
        total += gap_errors(traces, np.array([state]), following - state[-1] - 1)[0, -1]
    return total


@pytest.mark.parametrize(("order", "longest"), [(1, 9), (2, 3), (3, 2)])
def test_the_best_plan_is_the_best_of_all(order, longest) -> None:
    traces, _ = random_traces(9)
    found = best_plans(traces, 9, order=order, longest=longest)
    for count in range(1, 10):
        every = [(0, *rest) for rest in itertools.combinations(range(1, 9), count - 1)]
        allowed = [plan for plan in every if max(np.diff([*plan, 9])) <= longest + 1]
        costs = {plan: cost_of(traces, plan, order) for plan in allowed}
        assert (count in found) == bool(allowed), SEED
        if allowed:
            assert found[count].error == pytest.approx(min(costs.values()), rel=1e-9, abs=1e-15), SEED
            assert costs[found[count].fresh] == pytest.approx(min(costs.values()), rel=1e-9, abs=1e-15), SEED


def test_random_edge_errors_too(monkeypatch) -> None:
    """Not only errors that come from runs: any table of them."""
    rng = np.random.default_rng(SEED)
    known = {}

    def errors(traces, states, longest):
        drawn = [
            [known.setdefault((*state, k), rng.uniform()) for k in range(longest)]
            for state in states.tolist()
        ]
        return np.pad(np.array(drawn), ((0, 0), (1, 0)))

    monkeypatch.setattr(planning, "gap_errors", errors)
    traces, _ = random_traces(8)
    found = best_plans(traces, 8, order=2, longest=7)
    for count in range(1, 9):
        best = np.inf
        for rest in itertools.combinations(range(1, 8), count - 1):
            plan = (0, *rest)
            cost = 0.0
            for place, following in enumerate([*plan[1:], 8]):
                skipped = following - plan[place] - 1
                cost += known[(*plan[: place + 1][-2:], skipped - 1)] if skipped else 0.0
            best = min(best, cost)
        assert found[count].error == pytest.approx(best), SEED


def test_required_steps_are_computed_and_nothing_older_than_a_switch_is_looked_at() -> None:
    traces, _ = random_traces(12)
    found = best_plans(traces, 7, order=3, longest=4, required=(5, 6, 7), switches=(6,))
    assert set(found[7].fresh) >= {0, 5, 6, 7}
    looked_at = [
        steps for step, (steps, _) in predictions(traces, found[7].fresh, 3, (6,)).items() if step > 6
    ]
    assert looked_at and all(min(steps) >= 6 for steps in looked_at)


@pytest.mark.parametrize("branches", [1, 2])
def test_predictions_are_least_squares(branches) -> None:
    """Against numpy's own solver on the rows themselves; the ridge costs less than a thousandth."""
    traces, rows = random_traces(10, branches)
    state = (1, 4, 6)
    step = 8
    (looked_at, weights) = predictions(traces, (0, 1, 4, 6, 9), 3)[step]
    assert looked_at == list(state)
    used = [rows[branch * 10 + s] for s in state for branch in range(branches)] + [rows[branches * 10 + 6]]
    for branch in range(branches):
        target = rows[branch * 10 + step]
        exact = np.linalg.lstsq(np.stack(used, 1), target, rcond=None)[0]
        best = np.square(np.stack(used, 1) @ exact - target).sum()
        ours = np.square(np.array(weights[branch]) @ np.stack(used) - target).sum()
        assert best * (1 - 1e-9) <= ours <= best + 1e-3 * np.square(target).sum(), SEED


def test_gap_errors_are_what_the_sampler_integrates() -> None:
    traces, rows = random_traces(10)
    drift = np.zeros(rows.shape[1])
    for step in (6, 7, 8):
        _, weights = predictions(traces, (0, 3, 5, 9), 2)[step]
        used = np.stack([rows[3], rows[13], rows[5], rows[15], rows[25]])
        guided = traces.combination(step) @ (rows[[step, 10 + step]] - np.array(weights) @ used)
        drift += traces.response[step] * traces.gain[step] * guided
        error = gap_errors(traces, np.array([[3, 5]]), step - 5)[0, -1]
        assert error == pytest.approx(np.square(drift).mean(), rel=1e-6), SEED


def test_reuse_and_lines_are_members_of_the_family() -> None:
    """No prediction is worse than plain reuse or a line in sigma through the same steps."""
    traces, rows = random_traces(12)
    rows_of, _, weights = fitted(traces, np.array([[4, 6]]), 3)
    for skipped in range(3):
        step = 7 + skipped
        line = rows[6] + (traces.sigmas[step] - traces.sigmas[6]) / (traces.sigmas[6] - traces.sigmas[4]) * (
            rows[6] - rows[4]
        )
        ours = weights[0, :, skipped, 0] @ rows[rows_of[0]]
        others = [np.square(other - rows[step]).mean() for other in (rows[6], line)]
        assert np.square(ours - rows[step]).mean() <= min(others) + 1e-3 * np.square(rows[step]).mean(), SEED


def test_other_schedules_are_the_same_runs_between_the_steps() -> None:
    traces, rows = random_traces(16)
    same = traces.resampled(traces.sigmas, traces.response, traces.guidance)
    np.testing.assert_allclose(same.moments, traces.moments, atol=1e-12)
    places = np.linspace(traces.sigmas[0], traces.sigmas[15], 9)
    other = traces.resampled([*places, 0.0], np.full(9, 0.1), np.full(9, 5.0))
    at = [
        np.stack([np.interp(-places, -traces.sigmas[:-1], column) for column in part.T], 1)
        for part in np.split(rows, 3)
    ]
    seen = np.concatenate(at)
    np.testing.assert_allclose(other.moments, seen @ seen.T / seen.shape[1], atol=1e-9)
    assert other.num_steps == 9 and other.branches == 2 and other.of_prompt().branches == 1
    np.testing.assert_allclose(other.of_prompt().moments[:9, :9], other.moments[:9, :9])


def test_a_speed_beyond_the_steps_is_refused_with_the_most_that_can_be() -> None:
    with pytest.raises(UsageError, match="use at most 20"):
        parse_flexcache({"strategy": "plan", "speedup": 20.5}, 20)
    assert parse_flexcache({"strategy": "plan", "speedup": 20}, 20)


@pytest.mark.parametrize("most", [1, 2, 3])
def test_few_computed_steps_are_searched_among_few_states(monkeypatch, most) -> None:
    """What is not looked at is no part of so short a plan: a search without a limit finds the same."""
    traces = resolve_model("wan-tiny").spec.calibration.traces()
    short = traces.resampled(traces.sigmas[::5], np.diff(traces.sigmas[::5]), traces.guidance[::5])
    weighed: list[int] = []
    weigh = planning.gap_errors
    monkeypatch.setattr(
        planning,
        "gap_errors",
        lambda t, states, ahead: weighed.append(len(states)) or weigh(t, states, ahead),
    )
    found = planning.best_plans(short, most, order=3, longest=9)
    few = sum(weighed)
    weighed.clear()
    whole = planning.best_plans(short, 10, order=3, longest=9)
    assert found == {count: plan for count, plan in whole.items() if count <= most}
    assert few < sum(weighed)
