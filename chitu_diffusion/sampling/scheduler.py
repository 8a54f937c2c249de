"""A solver as an object that remembers where it is, for denoising loops that are written by hand.

`DiffusionBackend.scheduler` makes it. It answers to the page's call and to that of diffusers' schedulers, and
takes the very steps of the sampler that tasks take.
"""

from __future__ import annotations

import math
from typing import Literal, overload

import torch
from torch import Tensor

from chitu_diffusion.errors import UsageError, names_checked, plain_number, require_kind
from chitu_diffusion.sampling.solvers import Sampler


@names_checked
class NoiseScheduler:
    """The steps of one latent, or one batch of them, in order.

    Args:
        sampler: whose steps.
        num_steps: denoising steps.
        seed: of fresh noise, for samplers that take some.

    Attributes:
        timesteps: [num_steps] on the CPU, or where `set_timesteps` put them.
        sigmas: [num_steps + 1] on the CPU; the last is 0.
        timestep: the time of the coming step, a scalar float32 on the CPU that `step` writes into; 0 after
            the last.

    Raises:
        UsageError (a ValueError): a number of steps that the sampler cannot take; says what it can.
    """

    def __init__(self, sampler: Sampler, num_steps: int, seed: int = 0) -> None:
        self._sampler = sampler
        self._seed = plain_number(seed)
        if type(self._seed) is not int or not 0 <= self._seed < 2**63:
            raise UsageError(f"seed = {seed!r}: use a whole number from 0 to {2**63 - 1}", field="seed")
        self.timestep = torch.zeros(())
        self.set_timesteps(num_steps)

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str = "cpu") -> None:
        """Begin anew, before the first of some steps.

        Raises:
            UsageError: as at the start.
        """
        self._shape: torch.Size | None = None
        self._state = self._sampler.begin(num_inference_steps, seed=self._seed)
        self.timesteps: Tensor = self._state["timesteps"].to(device)
        self.sigmas: Tensor = self._state["sigmas"]
        self.timestep.copy_(self._sampler.timestep(self._state))

    @overload
    def step(
        self, noise_pred: Tensor, timestep: Tensor | float, latent: Tensor, return_dict: Literal[True] = True
    ) -> Tensor: ...

    @overload
    def step(
        self, noise_pred: Tensor, timestep: Tensor | float, latent: Tensor, return_dict: Literal[False]
    ) -> tuple[Tensor]: ...

    def step(
        self, noise_pred: Tensor, timestep: Tensor | float, latent: Tensor, return_dict: bool = True
    ) -> Tensor | tuple[Tensor]:
        """The next latent, [B, C, T, H, W] float32.

        Args:
            noise_pred: the network's guided velocity at `latent`, of its shape, any dtype.
            timestep: the coming step's, `timestep` or an entry of `timesteps`.
            latent: [B, C, T, H, W].
            return_dict: False gives a tuple with the latent in it, as diffusers' schedulers do.

        Raises:
            UsageError (a ValueError): no tensors of floats, a timestep that is not the coming one, a velocity
                of another shape or device than the latent, a latent of another shape than before, or no step
                left.
        """
        sampler = self._sampler
        if sampler.is_done(self._state):
            raise UsageError(
                f"all {self._state['schedule']} steps are taken; call set_timesteps to begin anew",
                field="timestep",
            )
        self._check_tensors(noise_pred, latent)
        given: object = plain_number(timestep)
        if isinstance(given, Tensor):
            one = given.numel() == 1 and not given.is_complex() and not given.is_meta
            given = float(given) if one else f"{given.dtype} {list(given.shape)} on {given.device}"
        coming = float(sampler.timestep(self._state))
        # a list's times are float32
        if not isinstance(given, int | float) or not math.isclose(given, coming, rel_tol=1e-6):
            said = f"{given:g}" if isinstance(given, float) else given
            raise UsageError(
                f"timestep = {said}: the coming step's is {coming:g}; use scheduler.timestep, or the entries "
                "of scheduler.timesteps in order",
                field="timestep",
            )
        moved, self._state = sampler.step(self._state, noise_pred, latent)
        self._shape = latent.shape
        self.timestep.zero_()
        if not sampler.is_done(self._state):
            self.timestep.copy_(sampler.timestep(self._state))
        return moved if return_dict else (moved,)

    def _check_tensors(self, noise_pred: Tensor, latent: Tensor) -> None:
        _require_floats("noise_pred", noise_pred)
        _require_floats("latent", latent)
        if noise_pred.shape != latent.shape:
            raise UsageError(
                f"noise_pred is {list(noise_pred.shape)} and latent {list(latent.shape)}: use one shape, "
                "after guidance has joined the two branches",
                field="noise_pred",
            )
        if noise_pred.device != latent.device:
            raise UsageError(
                f"noise_pred is on {noise_pred.device} and latent on {latent.device}: use one device",
                field="noise_pred",
            )
        if self._shape not in (None, latent.shape):
            raise UsageError(
                f"latent is {list(latent.shape)}, at the step before it was {list(self._shape or ())}; call "
                "set_timesteps to begin another one",
                field="latent",
            )


def _require_floats(name: str, tensor: Tensor) -> None:
    require_kind(name, tensor, Tensor, "a tensor [B, C, T, H, W]")
    if not tensor.is_floating_point() or tensor.layout != torch.strided or tensor.is_meta:
        found = f"{tensor.dtype}, {tensor.layout} on {tensor.device}"
        raise UsageError(f"{name} is {found}; use dense floats with values", field=name)
