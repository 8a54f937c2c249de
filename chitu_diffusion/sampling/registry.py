"""Which solvers there are: one row each, from which settings, flags, help and models' folders take the names.

Imports no torch, so that a name can be checked before anything is loaded. A row has a diffusers scheduler, or
an update: what makes the next latent of this one and its velocity, and needs nothing but the present step. A
latent is x = (1 - sigma) data + sigma noise, its velocity v = noise - data; sums are in their dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

AUTO = "auto"
"""In a setting: the model's own solver."""
USUAL = "unipc"
"""Of a model that names none."""


Update = Callable[["Tensor", "Tensor", float, float, Callable[[], "Tensor"]], "Tensor"]
"""(latent, velocity, sigma now, sigma after the step, gives fresh noise of the latent's shape) -> the next
latent.
"""


def euler(
    latent: Tensor, velocity: Tensor, sigma: float, next_sigma: float, noise: Callable[[], Tensor]
) -> Tensor:
    """Along the velocity: x' = x + (sigma' - sigma) v."""
    return latent + (next_sigma - sigma) * velocity


def renoise(
    latent: Tensor, velocity: Tensor, sigma: float, next_sigma: float, noise: Callable[[], Tensor]
) -> Tensor:
    """To the data that the velocity points at, and back with fresh noise: x0 = x - sigma v, x' = (1 - sigma')
    x0 + sigma' noise.

    How consistency models ("Latent Consistency Models", arXiv:2310.04378) and distribution matching
    distillation (DMD2, arXiv:2405.14867) are sampled. The data is kept in the noise's dtype.
    """
    data = latent - sigma * velocity
    if next_sigma == 0:
        return data
    fresh = noise()
    kept = data.to(fresh.dtype).to(data.dtype)
    return (1 - next_sigma) * kept + next_sigma * fresh.to(data.dtype)


@dataclass(frozen=True)
class LibraryScheduler:
    """A diffusers scheduler: its class, what it remembers, and the settings that make it solve a flow."""

    class_name: str
    shift_key: str
    history: tuple[str, ...] = ()
    flow: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class SolverKind:
    """One solver.

    Attributes:
        help: a few words.
        library: whose steps it takes on a schedule of its own; None takes `update` there too.
        update: of a step on an explicit list of noise levels; None cannot be run on one.
        linear: whether the last latent is linear in all velocities, and follows from them and the first.
    """

    help: str
    library: LibraryScheduler | None = None
    update: Update | None = None
    linear: bool = True

    @property
    def takes_list(self) -> bool:
        """Whether it can be run on an explicit list of noise levels."""
        return self.update is not None


_FLOW_SETTINGS = (("prediction_type", "flow_prediction"), ("use_flow_sigmas", True))
SOLVERS: Mapping[str, SolverKind] = MappingProxyType(
    {
        "unipc": SolverKind(
            "second order, predicts and corrects",
            LibraryScheduler(
                "UniPCMultistepScheduler",
                "flow_shift",
                ("model_outputs", "last_sample", "lower_order_nums", "this_order"),
                _FLOW_SETTINGS,
            ),
        ),
        "dpm++": SolverKind(
            "second order, multistep",
            LibraryScheduler(
                "DPMSolverMultistepScheduler",
                "flow_shift",
                ("model_outputs", "lower_order_nums"),
                _FLOW_SETTINGS,
            ),
        ),
        "euler": SolverKind(
            "first order; also on a distilled model's list",
            LibraryScheduler("FlowMatchEulerDiscreteScheduler", "shift"),
            euler,
        ),
        "renoise": SolverKind(
            "fresh noise at each step, for models distilled by DMD or LCM", update=renoise, linear=False
        ),
    }
)
SAMPLER_HELP = "; ".join(f"{name}: {kind.help}" for name, kind in SOLVERS.items())
