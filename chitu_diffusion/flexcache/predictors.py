"""What stands in for a value that is not computed: the last one, or an extrapolation of the last few.

Every predictor is a linear combination of records, and its weights are plain numbers computed in float64 from
where the records lie: no device sync, one pass over the tensors. Decision rules (which steps are fresh)
combine with any of them. Knows records; no strategy, site or task.

    reuse      the last value
    taylor     TaylorSeer, "From Reusable to Forecasting" (arXiv:2503.06923): F_0 = y, F_{i+1} = (F_i - F_i of
               the fresh step before) / (distance between the two), value = sum_i F_i x^i / i!, x the
               distance from the last fresh step
    velocity   MeanCache (arXiv:2601.19961), for velocities: mean velocity over the last fresh steps
               a = (x_end - x_start) / (sigma_end - sigma_start), J = (v_start - a) / (sigma_end -
               sigma_start), value = v_last - J (sigma_next - sigma_now)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

PREDICTORS = ("reuse", "taylor", "velocity")

Record = dict[str, Any]
"""One fresh value, as plain data: step; at: where it lies on the predictor's axis; value: tensor; latent: the
latent at which it was computed, or None."""


def records_needed(predictor: str, order: int) -> int:
    """How many of the last fresh values a predictor looks at."""
    return 1 if predictor == "reuse" else order + 1


def taylor_weights(places: Sequence[float], at: float, order: int) -> list[float]:
    """Weights of the values at `places` (newest first) in the Taylor extrapolation to `at`.

    The order is at most the number of values less one. Divided differences of the published rule: each is
    divided by the distance between the two fresh steps that it compares.
    """
    order = min(order, len(places) - 1)
    rows = [[float(row == column) for column in range(len(places))] for row in range(len(places))]
    distance = at - places[0]
    weights = [0.0] * len(places)
    for power in range(order + 1):
        share = distance**power / math.factorial(power)
        weights = [weight + share * factor for weight, factor in zip(weights, rows[0], strict=True)]
        rows = [
            [(a - b) / (places[row] - places[row + 1]) for a, b in zip(rows[row], rows[row + 1], strict=True)]
            for row in range(len(rows) - 1)
        ]
    return weights


def velocity_weights(
    sigmas: Sequence[float], now: float, following: float
) -> tuple[list[float], list[float]]:
    """Weights of the velocities and of the latents at `sigmas` (newest first) in MeanCache's prediction."""
    values = [0.0] * len(sigmas)
    latents = [0.0] * len(sigmas)
    values[0] = 1.0
    if len(sigmas) > 1:
        span = sigmas[0] - sigmas[-1]
        share = (following - now) / span  # v_last - share v_start + share a
        values[-1] -= share
        latents[0] += share / span
        latents[-1] -= share / span
    return values, latents


def predict(
    predictor: str,
    order: int,
    records: Sequence[Record],
    *,
    at: float,
    sigma: float = 0.0,
    next_sigma: float = 0.0,
) -> Tensor:
    """The value that a predictor gives.

    Args:
        predictor: one of `PREDICTORS`.
        order: of the Taylor sum, or how many fresh steps MeanCache's mean spans.
        records: fresh values, newest last.
        at: where the value is wanted, on the records' axis.
        sigma, next_sigma: noise level now and after this step; "velocity" looks at them, and its records'
            axis is sigma.

    Returns:
        a tensor of the records' shape and dtype. "reuse" gives the very tensor: do not write into it.
    """
    used = list(reversed(records))[: records_needed(predictor, order)]
    places = [float(record["at"]) for record in used]
    values = [record["value"] for record in used]
    if predictor == "reuse" or len(used) == 1:
        newest: Tensor = values[0]
        return newest
    if predictor == "taylor":
        return weighted(values, taylor_weights(places, at, order))
    of_values, of_latents = velocity_weights(places, sigma, next_sigma)
    # one latent for all the branches that are stacked in the velocity
    latents = [record["latent"] for record in used]
    moved = weighted(latents, of_latents)
    repeats = values[0].shape[0] // moved.shape[0]
    return (weighted(values, of_values).float() + moved.repeat(repeats, 1, 1, 1, 1)).to(values[0].dtype)


def weighted(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """sum_i weights_i tensors_i, summed in float32 and rounded once to the tensors' dtype."""
    total = tensors[0].float() * weights[0]
    for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
        if weight:
            total = total.add(tensor.float(), alpha=weight)
    return total.to(tensors[0].dtype)
