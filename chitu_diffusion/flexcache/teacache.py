"""Steps are skipped while the time embedding has hardly moved. Knows timesteps' embeddings; no latent.

TeaCache, "Timestep Embedding Tells: It's Time to Cache for Video Diffusion Model" (arXiv:2411.19108):
delta_t = mean|m_t - m_{t-1}| / mean|m_{t-1}| with m the modulation that the blocks get, acc += P(delta_t)
with a polynomial fitted on the model, skip while acc < threshold, else compute and acc = 0; a skipped step
adds the last residual.

On Wan m depends on the timestep alone, so the whole pattern is known before step 0; it is computed there,
with one transfer from the device. Coefficients belong to the model (`models/wan/cache_coefficients.py`); a
model that has none takes P(x) = x.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from chitu_diffusion.errors import UsageError
from chitu_diffusion.flexcache.schedule import Schedule
from chitu_diffusion.flexcache.strategy import Strategy, check_choice, check_number, check_numbers

_IDENTITY = (1.0, 0.0)


@dataclass(frozen=True)
class TeaCache(Strategy):
    """Skips by the timestep embedding.

    Args:
        threshold: of the accumulated change; 0 never skips.
        signal: "modulation", the projection that the blocks get, or "time", the embedding before it. Each has
            a polynomial.
        coefficients: highest power first; empty takes the model's own.
    """

    threshold: float = 0.1
    signal: str = "modulation"
    coefficients: tuple[float, ...] = ()

    def check(self) -> None:
        """A threshold from 0, numbers for coefficients."""
        check_number("threshold", self.threshold)
        check_choice("signal", self.signal, ("modulation", "time"))
        check_numbers("coefficients", self.coefficients)

    def computed(self, schedule: Schedule) -> Sequence[bool]:
        """The published rule over the schedule's own embeddings."""
        own = schedule.measured.get("teacache" if self.signal == "modulation" else "teacache_time", ())
        changes = embedding_changes(schedule, self.signal)
        coefficients = self.coefficients or own or _IDENTITY
        return accumulate(changes, self.protected(schedule), self.threshold, coefficients)


def embedding_changes(schedule: Schedule, signal: str) -> list[float]:
    """mean|m_t - m_{t-1}| / mean|m_{t-1}| for each step; 0 at the first. One transfer from the device.

    Raises:
        UsageError: the schedule comes without a network.
    """
    import torch

    if schedule.embed_time is None:
        raise UsageError(
            "flexcache teacache needs the model's time embedding: bind the manager with the task's "
            "schedule, or use interval or meancache, which need none",
            field="flexcache",
        )
    which = ("time", "modulation").index(signal)
    # [N, width]
    states = torch.stack([schedule.embed_time(step)[which].float() for step in range(schedule.num_steps)])
    changes = (states[1:] - states[:-1]).abs().mean(1) / states[:-1].abs().mean(1)
    return [0.0, *changes.tolist()]


def accumulate(
    changes: Sequence[float], protected: Sequence[bool], threshold: float, coefficients: Sequence[float]
) -> list[bool]:
    """For each step, whether it is computed: the accumulated polynomial reached the threshold."""
    flags = []
    accumulated = 0.0
    for change, guarded in zip(changes, protected, strict=True):
        polynomial = 0.0
        for coefficient in coefficients:
            polynomial = polynomial * change + coefficient
        accumulated += polynomial
        flags.append(guarded or threshold == 0 or accumulated >= threshold)
        if flags[-1]:
            accumulated = 0.0
    return flags
