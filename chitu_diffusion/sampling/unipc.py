"""UniPC of second order on a flow's schedule ("UniPC", arXiv 2302.04867): Wan's usual solver.

diffusers' `UniPCMultistepScheduler` with the settings of `USUAL`, of its own so that no run waits for the
import of diffusers; other settings are left to diffusers. Steps are its operations in its order: equal bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

USUAL: Mapping[str, Any] = MappingProxyType(
    {
        "beta_end": 0.02, "beta_schedule": "linear", "beta_start": 0.0001, "disable_corrector": [],
        "dynamic_thresholding_ratio": 0.995, "final_sigmas_type": "zero", "lower_order_final": True,
        "predict_x0": True, "prediction_type": "flow_prediction", "rescale_betas_zero_snr": False,
        "sample_max_value": 1.0, "shift_terminal": None, "sigma_max": None, "sigma_min": None,
        "solver_order": 2, "solver_p": None, "solver_type": "bh2", "steps_offset": 0, "thresholding": False,
        "time_shift_type": "exponential", "timestep_spacing": "linspace", "trained_betas": None,
        "use_beta_sigmas": False, "use_dynamic_shifting": False, "use_exponential_sigmas": False,
        "use_flow_sigmas": True, "use_karras_sigmas": False,
    }
)  # fmt: skip
"""Settings under which `UniPC` is that scheduler; beside them stand num_train_timesteps and flow_shift."""
_ORDER = 2
_NEARLY_ONE = 1e-6


def suits(settings: Mapping[str, Any]) -> bool:
    """Whether a scheduler's settings are the usual ones."""
    given = {**settings}
    given.pop("num_train_timesteps", None)
    given.pop("flow_shift", None)
    return all(name in USUAL and USUAL[name] == value for name, value in given.items())


class UniPC:
    """A scheduler that has taken no step.

    Args:
        steps: of the whole schedule.
        shift: of the flow.
        train_timesteps: 1000 in Wan's.

    Attributes:
        timesteps: [steps] int64. sigmas: [steps + 1] float32.
        model_outputs: the last two predictions of the data.
        last_sample: the latent before the last step.
        lower_order_nums: steps taken, at most 2.
        this_order: of the last step.
    """

    def __init__(self, steps: int, shift: float, train_timesteps: int) -> None:
        sigmas = np.linspace(1, 1 / train_timesteps, steps + 1)[:-1]
        sigmas = shift * sigmas / (1 + (shift - 1) * sigmas)
        if abs(sigmas[0] - 1) < _NEARLY_ONE:
            sigmas[0] -= _NEARLY_ONE  # the logarithm of 1 - sigma is asked for
        self.timesteps = torch.from_numpy(sigmas * train_timesteps).to(torch.int64)
        self.sigmas = torch.from_numpy(np.append(sigmas, 0).astype(np.float32))
        self.model_outputs: list[Tensor | None] = [None] * _ORDER
        self.last_sample: Tensor | None = None
        self.lower_order_nums = 0
        self.this_order = 0
        self._index = 0

    def set_begin_index(self, index: int) -> None:
        """The step that comes next."""
        self._index = index

    def step(
        self, velocity: Tensor, timestep: Tensor, latent: Tensor, return_dict: bool = False
    ) -> tuple[Tensor]:
        """Correct the latent by what its velocity says, and predict the next one. Both [B, C, ...]."""
        index = self._index
        data = latent - self.sigmas[index] * velocity
        if index and self.last_sample is not None:
            latent = self._corrected(data)
        self.model_outputs = [*self.model_outputs[1:], data]
        self.this_order = min(_ORDER, len(self.timesteps) - index, self.lower_order_nums + 1)
        self.last_sample = latent
        following = self._predicted(latent)
        self.lower_order_nums = min(self.lower_order_nums + 1, _ORDER)
        self._index += 1
        return (following,)

    def _predicted(self, latent: Tensor) -> Tensor:
        before, data = self.model_outputs
        assert data is not None
        h, kept, taken = self._straight(self._index, self._index + 1)
        moved = kept * latent - taken * torch.expm1(-h) * data
        bend: Tensor | float = 0.0
        if self.this_order == _ORDER:
            assert before is not None
            bend = 0.5 * ((before - data) / self._ratio(self._index - 1, self._index, h))
        return (moved - taken * torch.expm1(-h) * bend).to(latent.dtype)

    def _corrected(self, data: Tensor) -> Tensor:
        """The latent at this step, from the one before and both ends' predictions of the data."""
        latent = self.last_sample
        older, before = self.model_outputs
        assert latent is not None and before is not None
        h, kept, taken = self._straight(self._index - 1, self._index)
        moved = kept * latent - taken * torch.expm1(-h) * before
        bend: Tensor | float = 0.0
        last = torch.ones((), dtype=latent.dtype) * 0.5
        if self.this_order == _ORDER:
            assert older is not None
            ratio = self._ratio(self._index - 2, self._index - 1, h)
            first, last = _weights(ratio, -h).to(latent.dtype)
            bend = first * ((older - before) / ratio)
        return (moved - taken * torch.expm1(-h) * (bend + last * (data - before))).to(latent.dtype)

    def _straight(self, start: int, end: int) -> tuple[Tensor, Tensor, Tensor]:
        """(h, what is kept of the latent, what is taken of the data) of a step."""
        h = self._log_ratio(end) - self._log_ratio(start)
        return h, self.sigmas[end] / self.sigmas[start], 1 - self.sigmas[end]

    def _ratio(self, before: int, start: int, h: Tensor) -> Tensor:
        return (self._log_ratio(before) - self._log_ratio(start)) / h

    def _log_ratio(self, index: int) -> Tensor:
        """Half the logarithm of signal to noise."""
        return torch.log(1 - self.sigmas[index]) - torch.log(self.sigmas[index])


def _weights(ratio: Tensor, hh: Tensor) -> Tensor:
    """Of the two differences of the corrector: the solution of equation (13), B(h) = e^h - 1."""
    ones = torch.ones(())
    points = torch.stack([ratio, ones])
    grown = torch.expm1(hh)
    first = grown / hh - 1
    second = first / hh - 1 / 2
    right = torch.stack([first * 1 / grown, second * 2 / grown])
    return torch.linalg.solve(torch.stack([points**0, points**1]), right)
