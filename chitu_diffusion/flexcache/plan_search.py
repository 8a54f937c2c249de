"""Plans found by calculation: which steps of a schedule are computed, and what the others take in their
place.

Everything is computed from one matrix, the mean inner products of what full-compute runs passed through: the
velocity of each guidance branch at each step, and the latent. A skipped step takes a linear combination of
what the last `order` computed steps left (their velocities, and the last one's latent); its coefficients are
the least-squares ones. Reuse, Taylor in sigma and MeanCache's predictor are members of that family, so that a
fit is at least as near as any of them.

The error of a gap, computed steps ... < i < j and the next one k, is what the sampler integrates over it:

    || sum_{j < t < k} r_t (v_t - prediction_t) ||^2,    r_t = d(last latent) / d(velocity of step t)

v the guided velocity. Summed over the gaps of a schedule it is what dynamic programming makes least for a
number of computed steps; a state is the last `order` of them, on which a gap's error depends. The network's
answer to the error is measured apart (`gain`): how much an error at a noise level has grown or shrunk at the
end.

Knows numbers only: no tensors of a task, no strategy. Shapes: n steps, B guidance branches, rows = (B + 1) n.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Fresh = tuple[int, ...]
"""The last few computed steps, oldest first."""

_RIDGE_VALUE = 1e-6
_RIDGE_DIFFERENCE = 1e-3
"""Of a coefficient's own square mean, on values and on their divided differences. Differences are small and
noisy in bfloat16, and hardly lose by it; shrinking the value itself by 1e-4 would cost 2 dB at 60 % of the
work."""

_AT_ONCE = 2048
"""States whose gaps are weighed in one go; more of them leave the processor's cache."""


@dataclass(frozen=True)
class Traces:
    """Second moments of full-compute runs.

    Attributes:
        sigmas: noise levels [n + 1], from about 1 down to 0.
        moments: mean inner products [rows, rows] over runs and numbers of a latent; rows are the prompt's
            velocities at steps 0 .. n-1, the other branch's where there are two, and the latents.
        response: d(last latent) / d(velocity) of each step, [n]: the sampler's own weights.
        gain: how an error at each step has grown at the end, [n]; 1 where it was not measured.
        guidance: scale at which branches are combined at each step, [n].
    """

    sigmas: Array
    moments: Array
    response: Array
    gain: Array
    guidance: Array

    @property
    def num_steps(self) -> int:
        """n."""
        return len(self.sigmas) - 1

    @property
    def branches(self) -> int:
        """B."""
        return len(self.moments) // self.num_steps - 1

    def combination(self, step: int) -> Array:
        """Weights [B] of the branches in a step's guided velocity."""
        scale = self.guidance[step]
        return np.array([scale, 1 - scale]) if self.branches == 2 else np.ones(1)

    def of_prompt(self) -> Traces:
        """The prompt's branch alone: what is left where guidance is off."""
        n = self.num_steps
        rows = [*range(n), *range(self.branches * n, (self.branches + 1) * n)]
        return replace(self, moments=self.moments[np.ix_(rows, rows)])

    def resampled(
        self, sigmas: Sequence[float], response: Sequence[float], guidance: Sequence[float]
    ) -> Traces:
        """The same runs seen at other noise levels, linear in sigma between the steps that were recorded.

        Finer steps than the recorded ones seem smoother than they are.

        Args:
            sigmas, response, guidance: of the other schedule.
        """
        wanted = np.asarray(sigmas, dtype=np.float64)
        weights = _interpolation(self.sigmas[:-1], wanted[:-1])  # [new, n]
        spread = np.kron(np.eye(self.branches + 1), weights)
        return replace(
            self,
            sigmas=wanted,
            moments=spread @ self.moments @ spread.T,
            response=np.asarray(response, dtype=np.float64),
            gain=weights @ self.gain,
            guidance=np.asarray(guidance, dtype=np.float64),
        )


def _interpolation(known: Array, wanted: Array) -> Array:
    """Weights [wanted, known] of linear interpolation between falling places; the ends hold on."""
    weights = np.zeros((len(wanted), len(known)))
    for row, place in enumerate(wanted):
        after = int(np.clip(np.searchsorted(-known, -place), 1, len(known) - 1)) if len(known) > 1 else 0
        before = max(after - 1, 0)
        span = known[before] - known[after]
        share = float(np.clip((known[before] - place) / span, 0, 1)) if span else 0.0
        weights[row, before] += 1 - share
        weights[row, after] += share
    return weights


def _basis(traces: Traces, states: NDArray[np.int64]) -> tuple[NDArray[np.int64], Array]:
    """What predictions may combine after each state [N, m] of computed steps, oldest first.

    Returns:
        rows of the moments [N, B m + 1] (each branch's velocities, newest first, then the newest latent), and
        the change of basis [N, B m + 1, B m + 1] to the newest velocity and divided differences to older
        ones: so written each is of its own size, and a ridge weighs evenly.
    """
    n = traces.num_steps
    branches = traces.branches
    (count, depth) = states.shape
    steps = states[:, ::-1]
    places = traces.sigmas[steps]
    differences = np.tile(np.eye(depth), (count, 1, 1))
    triangle = differences.copy()
    for power in range(1, depth):
        span = places[:, :-power] - places[:, power:]
        differences = (differences[:, :-1] - differences[:, 1:]) / span[:, :, None]
        triangle[:, power] = differences[:, 0]
    change = np.zeros((count, branches * depth + 1, branches * depth + 1))
    for branch in range(branches):
        own = slice(branch * depth, (branch + 1) * depth)
        change[:, own, own] = triangle
    change[:, -1, -1] = 1
    rows = [branch * n + steps for branch in range(branches)] + [branches * n + steps[:, :1]]
    return np.concatenate(rows, axis=1), change


def fitted(
    traces: Traces, states: NDArray[np.int64], longest: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], Array]:
    """Least-squares predictions of the `longest` steps that follow each state [N, m].

    Returns:
        rows of the moments that are combined [N, F], rows that are predicted [N, longest, B], weights [N, F,
        longest, B]. Steps past the last one stand for the last.
    """
    n = traces.num_steps
    branches = traces.branches
    rows, change = _basis(traces, states)
    steps = np.minimum(states[:, -1:] + 1 + np.arange(longest), n - 1)
    targets = steps[:, :, None] + n * np.arange(branches)
    flat = targets.reshape(len(states), -1)
    square = change @ traces.moments[rows[:, :, None], rows[:, None, :]] @ change.transpose(0, 2, 1)
    diagonal = np.arange(square.shape[1])
    depth = states.shape[1]
    square[:, diagonal, diagonal] *= 1 + np.where(diagonal % depth == 0, _RIDGE_VALUE, _RIDGE_DIFFERENCE)
    weights = np.linalg.solve(square, change @ traces.moments[rows[:, :, None], flat[:, None, :]])
    return rows, targets, (change.transpose(0, 2, 1) @ weights).reshape(*rows.shape, longest, branches)


def gap_errors(traces: Traces, states: NDArray[np.int64], longest: int) -> Array:
    """Mean squares [N, longest + 1] that gaps of 0, 1, ... skipped steps after each state add at the end."""
    n = traces.num_steps
    count = len(states)
    if longest == 0:
        return np.zeros((count, 1))
    rows, targets, weights = fitted(traces, states, longest)
    steps = targets[:, :, 0]  # the first branch's rows are the steps
    guided = np.zeros((n, len(traces.moments)))  # each step's velocity, by its weight in the last latent
    for step in range(n):
        own = step + n * np.arange(traces.branches)
        guided[step, own] = traces.combination(step) * (traces.response * traces.gain)[step]
    drift = np.einsum("nflb,nlb->nfl", weights, guided[steps[:, :, None], targets])  # [N, F, longest]
    across = (traces.moments @ guided.T)[rows[:, :, None], steps[:, None, :]]
    among = traces.moments[rows[:, :, None], rows[:, None, :]]
    whole = (guided @ traces.moments @ guided.T)[steps[:, :, None], steps[:, None, :]]
    mixed = drift.transpose(0, 2, 1) @ across
    product = whole - mixed - mixed.transpose(0, 2, 1) + drift.transpose(0, 2, 1) @ (among @ drift)
    # of two skipped steps' errors, [N, longest, longest]: a gap's error sums the upper left square
    own = np.diagonal(product, axis1=1, axis2=2)
    errors = (2 * np.tril(product).sum(-1) - own).cumsum(-1)
    return np.concatenate([np.zeros((count, 1)), np.maximum(errors, 0)], axis=1)


@dataclass(frozen=True)
class Found:
    """A plan: its computed steps, and the mean square error of the last latent that is expected."""

    fresh: Fresh
    error: float


def best_plans(
    traces: Traces,
    most: int,
    *,
    order: int,
    longest: int,
    required: Collection[int] = (),
    switches: Collection[int] = (),
) -> dict[int, Found]:
    """For each number of computed steps up to `most`, the plan of least expected error.

    Dynamic programming over steps; a state is the last `order` computed steps. Step 0 is always computed.

    Args:
        order: how many computed steps a prediction looks at.
        longest: skipped steps in a row, at most.
        required: steps that must be computed.
        switches: among these, steps from which on nothing older may be looked at.

    Returns:
        by number of computed steps; numbers that `longest` and `required` rule out are missing.
    """
    n = traces.num_steps
    reached = _Reached(most)
    reached.offer((0,), None, np.where(np.arange(most + 1) == 1, 0.0, np.inf))
    errors = _known_errors(traces, most, order, longest, switches)
    for newest in range(n):
        for state in reached.at(newest):
            so_far = reached.errors[state]
            if _fewest(state, n, longest) > most:
                continue
            for skipped, added in enumerate(errors(state)):
                following = newest + 1 + skipped
                if following == n:
                    reached.offer((n,), state, so_far + added)
                    break
                after = (following,) if following in switches else (*state, following)[-order:]
                reached.offer(after, state, np.concatenate([[np.inf], so_far[:-1] + added]))
                if following in required or following in switches:
                    break
    ended = reached.errors.get((n,), np.full(most + 1, np.inf))
    counts = [int(count) for count in np.flatnonzero(np.isfinite(ended))]
    return {count: Found(reached.way_to((n,), count), float(ended[count])) for count in counts}


class _Reached:
    """For each state and number of computed steps, the least error so far and the state it came from."""

    def __init__(self, most: int) -> None:
        self.errors: dict[Fresh, Array] = {}
        self._numbers: dict[Fresh, int] = {}
        self._states: list[Fresh] = []
        self._from: list[NDArray[np.int64]] = []
        self._by_newest: dict[int, list[Fresh]] = {}
        self._most = most

    def at(self, newest: int) -> list[Fresh]:
        """States whose newest step this is."""
        return self._by_newest.get(newest, [])

    def offer(self, state: Fresh, before: Fresh | None, errors: Array) -> None:
        """Another way to a state."""
        if state not in self.errors:
            self.errors[state] = np.full(self._most + 1, np.inf)
            self._numbers[state] = len(self._states)
            self._states.append(state)
            self._from.append(np.full(self._most + 1, -1))
            self._by_newest.setdefault(state[-1], []).append(state)
        known = self.errors[state]
        better = errors < known
        known[better] = errors[better]
        self._from[self._numbers[state]][better] = -1 if before is None else self._numbers[before]

    def way_to(self, end: Fresh, count: int) -> Fresh:
        """The `count` computed steps of the best way to the end, which is none of them."""
        number = self._from[self._numbers[end]][count]
        steps: list[int] = []
        while number >= 0:
            steps.append(self._states[number][-1])
            number = self._from[number][count]
            count = count - 1
        return tuple(reversed(steps))


def _fewest(state: Fresh, steps: int, longest: int) -> int:
    """Computed steps that a plan through a state has at the least."""
    before = -(-state[0] // (longest + 1))
    after = -(-(steps - state[-1]) // (longest + 1)) - 1
    return before + len(state) + after


def _known_errors(
    traces: Traces, most: int, order: int, longest: int, switches: Collection[int]
) -> Callable[[Fresh], Array]:
    """`gap_errors` of every possible state, in one go for each number of remembered steps and some thousand
    states.
    """
    n = traces.num_steps
    known = {}
    states: list[Fresh] = [(0,), *((step,) for step in sorted(switches))]
    while states:
        for begin in range(0, len(states), _AT_ONCE):
            some = states[begin : begin + _AT_ONCE]
            ahead = min(longest, n - 1 - some[0][-1])
            for state, errors in zip(some, gap_errors(traces, np.array(some), ahead), strict=True):
                known[state] = errors[: n - state[-1]]
        after = {
            (*s, k)[-order:]
            for s in states
            for k in range(s[-1] + 1, min(s[-1] + longest + 2, n))
            if k not in switches
        }
        needed = (state for state in after - known.keys() if _fewest(state, n, longest) <= most)
        states = sorted(needed, key=lambda state: state[::-1])  # those with the least ahead go together
    return known.__getitem__


def predictions(
    traces: Traces, fresh: Fresh, order: int, switches: Collection[int] = ()
) -> dict[int, tuple[list[int], list[list[float]]]]:
    """For each skipped step of a plan: the computed steps that it looks at, oldest first, and its weights.

    Weights are [B, B * steps + 1]: for each branch those of the steps' velocities, branch by branch in each
    step, and that of the newest step's latent.
    """
    n = traces.num_steps
    branches = traces.branches
    found: dict[int, tuple[list[int], list[list[float]]]] = {}
    for place, newest in enumerate(fresh):
        following = fresh[place + 1] if place + 1 < len(fresh) else n
        if following == newest + 1:
            continue
        since = max((step for step in switches if step <= newest), default=0)
        looked_at = [step for step in fresh[: place + 1] if step >= since][-order:]
        _, _, weights = fitted(traces, np.array([looked_at]), following - newest - 1)  # [1, F, skipped, B]
        newest_first = np.arange(branches * len(looked_at)).reshape(branches, -1)
        columns = [*newest_first[:, ::-1].T.flatten(), branches * len(looked_at)]
        for step in range(newest + 1, following):
            found[step] = (looked_at, weights[0, columns, step - newest - 1].T.tolist())
    return found
