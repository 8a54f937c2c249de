"""How step-distilled weights are sampled, as their authors do: one row each, by name.

A row has the noise levels and what the network is told at each, derived from the authors' formula; the update
of a step; how the first latent is scaled; which expert takes a step; and the arithmetic of the latent. The
levels hold for these weights alone: another list of as many steps gives another video, and a worse one.
Knows numbers and names; imports no torch. (The record in a video, from which it is made again, is also called
a recipe; it holds the name of the row.)
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from chitu_diffusion.errors import UsageError, nearest
from chitu_diffusion.sampling.noise_levels import TRAINED_STEPS, NoiseLevels, shifted

NO_RECIPE = "none"
"""In a request: the model's usual solver, whatever else would choose a row."""


@dataclass(frozen=True)
class SamplerRecipe:
    """One row.

    Attributes:
        source: whose weights, and where it is written down.
        levels: noise levels, and what the network is told at each.
        sampler: of `registry.SOLVERS`; its update of a step.
        scales_start: the first latent is sigma times noise, where it is noise alone else.
        high_steps: of two experts, steps of the first; None leaves it to the timestep.
        guidance: of all experts; 1 is the prompt's branch alone.
        latent: what the latent is kept in between steps. For all but float32, a step is taken in float64.
        one_generator: fresh noise goes on from the starting noise, in the latent's dtype and with frames
            before channels, in place of a stream for each step.
        for_two: whether it holds for two experts; DMD's of two go on from the boundary by another formula.
    """

    source: str
    levels: NoiseLevels
    sampler: Literal["euler", "renoise"]
    scales_start: bool = False
    high_steps: int | None = None
    guidance: float = 1.0
    latent: Literal["float32", "float64", "bfloat16"] = "float32"
    one_generator: bool = False
    for_two: bool = True

    def boundary(self, boundary: float | None) -> float | None:
        """Share of the 1000 timesteps below which the second expert takes over.

        Args:
            boundary: the model's; None for one expert.
        """
        if boundary is None or self.high_steps is None:
            return boundary
        before, after = self.levels.timesteps[self.high_steps - 1 : self.high_steps + 1]
        return (before + after) / 2 / TRAINED_STEPS

    def describe(self) -> str:
        """In a few words: steps, update, guidance."""
        steps = len(self.levels.sigmas)
        return f"{steps} step{'s' if steps > 1 else ''}, {self.sampler}, guidance {self.guidance:g}"


def _on_shifted_grid(places: Sequence[float], shift: float) -> NoiseLevels:
    """Places on the grid of 1000 steps before its shift; the network is told 1000 sigma."""
    sigmas = tuple(shifted(place / TRAINED_STEPS, shift) for place in places)
    return NoiseLevels(sigmas, tuple(TRAINED_STEPS * sigma for sigma in sigmas))


def _nearest_on_shifted_grid(times: Sequence[int], shift: float) -> NoiseLevels:
    """For each time the noise level of the shifted grid of 1000 steps whose own time is nearest; the network
    is told the time.
    """
    grid = [shifted(place / TRAINED_STEPS, shift) for place in range(TRAINED_STEPS, 0, -1)]
    sigmas = tuple(min(grid, key=lambda sigma: abs(TRAINED_STEPS * sigma - time)) for time in times)
    return NoiseLevels(sigmas, tuple(map(float, times)))


def _trigonometric(sigma_max: float, steps: int) -> NoiseLevels:
    """Angles of the trigonometric flow as noise levels, sin / (cos + sin); the network is told 1000 sigma in
    bfloat16 (rCM, arXiv:2510.08431).
    """
    angles = (math.atan(sigma_max), 1.5, 1.4, 1.0)[:steps]
    sigmas = tuple(math.sin(angle) / (math.cos(angle) + math.sin(angle)) for angle in angles)
    return NoiseLevels(sigmas, tuple(_in_bfloat16(TRAINED_STEPS * sigma) for sigma in sigmas))


def _in_bfloat16(value: float) -> float:
    """The nearest number of 8 significant bits, of two the even one."""
    share, exponent = math.frexp(value)
    return math.ldexp(round(share * 256), exponent - 8)


def _every(nth: int, steps: int, shift: float) -> NoiseLevels:
    """Every nth of the Euler steps of a library that shifts its grid, whose last place is shifted already."""
    last = shifted(1 / TRAINED_STEPS, shift)
    places = [TRAINED_STEPS * (1 - (1 - last) * step / (steps - 1)) for step in range(0, steps, nth)]
    return _on_shifted_grid(places, shift)


_QUARTERS = (1000, 750, 500, 250)
_DMD = _nearest_on_shifted_grid((1000, 757, 522), 8)


def _rcm(
    source: str, sigma_max: float, steps: int = 4, sampler: Literal["euler", "renoise"] = "renoise"
) -> SamplerRecipe:
    return SamplerRecipe(
        source, _trigonometric(sigma_max, steps), sampler, scales_start=True, latent="float64"
    )


RECIPES: Mapping[str, SamplerRecipe] = MappingProxyType(
    {
        "lightx2v-4step": SamplerRecipe(
            "LightX2V's distilled Wan2.1 and Wan2.2 (step_distill/scheduler.py)",
            _on_shifted_grid(_QUARTERS, 5),
            "euler",
            high_steps=2,
        ),
        "lightx2v-flf2v-4step": SamplerRecipe(
            "LightX2V on first and last frame (wan_distill_moe_flf2v_with_lora.json)",
            _on_shifted_grid(_QUARTERS, 16),
            "euler",
            high_steps=2,
        ),
        "wan2.2-lightning": SamplerRecipe(
            "Wan2.2-Lightning (fm_solvers_euler.py)", _on_shifted_grid(_QUARTERS, 5), "euler"
        ),
        "fastwan": SamplerRecipe(
            "FastWan2.1 and 2.2 (FastVideo, DmdDenoisingStage)",
            _DMD,
            "renoise",
            latent="bfloat16",
            one_generator=True,
            for_two=False,
        ),
        "causvid": SamplerRecipe(
            "CausVid, bidirectional (bidirectional_inference.py)",
            _DMD,
            "renoise",
            latent="bfloat16",
            for_two=False,
        ),
        **{
            f"rcm{'' if steps == 4 else f'-{steps}step'}": _rcm("rCM and TurboWan2.1", 80, steps)
            for steps in (4, 3, 2, 1)
        },
        "rcm-720p": _rcm("rCM and TurboWan2.1, the authors' example at 720p", 120),
        "turbowan2.2-i2v": _rcm("TurboWan2.2-I2V-A14B (wan2.2_i2v_infer.py)", 200),
        "turbowan2.2-i2v-ode": _rcm("TurboWan2.2-I2V-A14B with --ode: sharper", 200, sampler="euler"),
        "accvideo": SamplerRecipe("AccVideo (sample_wanx)", _every(5, 50, 5), "euler"),
        "accvideo-i2v-480p": SamplerRecipe(
            "AccVideo's image to video at 480p", _every(5, 50, 3), "euler"
        ),
    }
)  # fmt: skip
_CAUSAL = (
    "its weights make a video in chunks of three frames, each seeing those before, which is not done here; "
    "use bidirectional weights, such as LightX2V's or FastWan"
)
_REFUSED = MappingProxyType({"self-forcing": _CAUSAL, "causvid-causal": _CAUSAL})
_KNOWN_NAMES: Sequence[tuple[str, str]] = (
    (r"self.?forcing(?!.*lora)", "self-forcing"),
    (r"fastwan", "fastwan"),
    (r"causvid.*bidirectional|bidirectional.*causvid", "causvid"),
    (r"turbowan2.2.*i2v", "turbowan2.2-i2v"),
    (r"turbowan2.1|(^|[-_])rcm([-_.]|$)", "rcm"),
    (r"accvid(eo)?.*i2v.*480p", "accvideo-i2v-480p"),
    (r"accvid(eo)?", "accvideo"),
    (r"wan2.2.*(lightning|seko)", "wan2.2-lightning"),
    (r"wan.?tiny.*4.?step", "lightx2v-4step"),
    (r"lightx2v.*4.?step|(cfg.?)?step.?distill|distill.*(lightx2v|4.?step)", "lightx2v-4step"),
)
"""How published files and folders are called, in any letter case, and the row that they are sampled by."""


def recipe_named(name: str) -> SamplerRecipe:
    """A row by its name.

    Raises:
        UsageError: there is none, or it is one that cannot be run here; says why.
    """
    if name in _REFUSED:
        raise UsageError(f"sampler_recipe = {name!r}: {_REFUSED[name]}", field="sampler_recipe")
    if name not in RECIPES:
        raise UsageError(f"sampler_recipe = {name!r}.{nearest(name, RECIPES)}", field="sampler_recipe")
    return RECIPES[name]


def recipe_of_names(names: Iterable[str]) -> tuple[str, str] | None:
    """(row's name, name that told it) for the names of a model's folder and files, or of an adapter's; None
    where none is known.
    """
    for name in names:
        for pattern, recipe in _KNOWN_NAMES:
            if re.search(pattern, name, re.IGNORECASE):
                return recipe, name
    return None
