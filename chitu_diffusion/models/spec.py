"""A model without its weights: its sizes, and what a request gets where it says nothing. Imports no torch, so
that a request can be checked against its model before anything is loaded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from chitu_diffusion.errors import UsageError
from chitu_diffusion.flexcache.calibration import Calibration
from chitu_diffusion.flexcache.schedule import NOTHING_MEASURED, Measured
from chitu_diffusion.models.kinds import TEXT_TO_VIDEO, ModelKind
from chitu_diffusion.models.wan.config import WanConfig
from chitu_diffusion.sampling.noise_levels import NoiseLevels
from chitu_diffusion.sampling.recipes import NO_RECIPE, recipe_named
from chitu_diffusion.sampling.registry import AUTO, SOLVERS, USUAL

# The negative prompt that Wan's authors sample with (Wan2.1, wan/configs/shared_config.py).
_NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，"
    "残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，"
    "三条腿，背景人很多，倒着走"
)


@dataclass(frozen=True)
class LatentGeometry:
    """How pixels become latents.

    Attributes:
        stride: pixels a latent cell spans along (frames, rows, columns); the first frame stands alone.
        channels: of the latent.
        decoder_cost: work of decoding a pixel, roughly, in units of Wan2.1's.
    """

    stride: tuple[int, int, int] = (4, 8, 8)
    channels: int = 16
    decoder_cost: float = 1.0

    def latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(C, T, H, W) of the latent of a video of 4n + 1 frames."""
        frames, rows, columns = self.stride
        return self.channels, (num_frames - 1) // frames + 1, height // rows, width // columns

    @classmethod
    def of_vae(cls, config: Mapping[str, Any]) -> LatentGeometry:
        """From the `config.json` of an `AutoencoderKLWan`."""
        halvings = config.get("temperal_downsample", (False, True, True))
        patch = config.get("patch_size") or 1
        spatial = 2 ** (len(config.get("dim_mult", (1, 2, 4, 4))) - 1) * patch
        stride = (2 ** sum(map(bool, halvings)), spatial, spatial)
        width = config.get("decoder_base_dim") or config.get("base_dim", 96)
        return cls(stride, int(config.get("z_dim", 16)), (width / 96 / patch) ** 2)


@dataclass(frozen=True)
class Defaults:
    """What a request gets where it says nothing.

    Attributes:
        guidance: one scale per expert, high noise first; 1 for what was distilled to do without.
        shift: of the flow's noise schedule, as the authors sample; None leaves it to the checkpoint's
            scheduler.
        sampler: its solver's name.
        sigmas, timesteps: the list of noise levels that step-distilled weights are sampled on, one for each
            of `steps`; see `NoiseLevels.listed`. None is the solver's own schedule.
        sampler_recipe: name of the row of `sampling.recipes` that all this is of; None for none.
        negative_prompt: the other branch of classifier-free guidance.
    """

    height: int = 480
    width: int = 832
    num_frames: int = 81
    fps: int = 16
    steps: int = 50
    guidance: tuple[float, ...] = (5.0,)
    shift: float | None = None
    negative_prompt: str = _NEGATIVE_PROMPT
    sampler: str = USUAL
    sigmas: tuple[float, ...] | None = None
    timesteps: tuple[float, ...] | None = None
    sampler_recipe: str | None = None

    @property
    def levels(self) -> NoiseLevels | None:
        """The list as noise levels and what the network is told at each; None where there is none."""
        return NoiseLevels.listed(self.sigmas, self.timesteps, self.shift or 1.0)


@dataclass(frozen=True)
class ModelSpec:
    """A model, without its weights.

    Attributes:
        name: what settings and `chitu models` call it.
        kind: what it makes of what.
        transformers: one config, or two for experts: high noise first.
        boundary: of two experts, the share of the 1000 timesteps below which the second takes over.
        hub_ids: on the Hugging Face hub; diffusers' layout first, then the official one.
        text_tokens, text_dim: shape of the text embeddings.
        measured: on this model, for caches that rest on it.
        calibration: what `chitu calibrate` left in its folder, or None.
        authors_shift: the shift that the authors of these networks sample with; None where nobody knows.
        words: all that its training's captions had, lower-case, what people ask for first; none where its
            folder does not say.
        trained_sizes: (height, width, frames) of its training; likewise.
        own_recipe: (name of the sampler recipe of its weights, what told it: a note or a name); None for
            weights that are sampled as usual.
        solver: what settings ask for, see `with_sampler`.
    """

    name: str
    transformers: tuple[WanConfig, ...]
    kind: ModelKind = TEXT_TO_VIDEO
    boundary: float | None = None
    hub_ids: tuple[str, ...] = ()
    geometry: LatentGeometry = field(default_factory=LatentGeometry)
    defaults: Defaults = field(default_factory=Defaults)
    text_tokens: int = 512
    measured: Measured = field(default_factory=lambda: NOTHING_MEASURED)
    calibration: Calibration | None = None
    authors_shift: float | None = None
    words: tuple[str, ...] = ()
    trained_sizes: tuple[tuple[int, int, int], ...] = ()
    own_recipe: tuple[str, str] | None = None
    solver: str = AUTO

    @property
    def kind_in_words(self) -> str:
        """What it makes of what, and whether by two experts."""
        between = self.transformers[0].pos_embed_seq_len is not None
        title = "first and last frame to video" if between else self.kind.title
        return f"{title}, two experts" if len(self.transformers) == 2 else title

    @property
    def text_dim(self) -> int:
        """Width of the text embeddings."""
        return self.transformers[0].text_dim

    def latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(C, T, H, W) of the latent that is computed: the video's own, up to whole patches."""
        channels, *cells = self.geometry.latent_shape(num_frames, height, width)
        return channels, *self.whole_patches(cells)

    def whole_patches(self, cells: Sequence[int]) -> tuple[int, int, int]:
        """Cells of a latent along (frames, rows, columns), up to whole patches."""
        steps = self.transformers[0].patch_size
        frames, rows, columns = (-(-cell // step) * step for cell, step in zip(cells, steps, strict=True))
        return frames, rows, columns

    def size_of_shape(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) of a video in a picture's shape: at most as many pixels as the model's own, in
        whole patches (Wan2.1, wan/image2video.py).
        """
        area = self.defaults.height * self.defaults.width
        patch = self.transformers[0].patch_size
        steps = [stride * cells for stride, cells in zip(self.geometry.stride[1:], patch[1:], strict=True)]
        # the largest n with n * step <= sqrt(area * ratio), exactly: the authors' floats miss some by one
        ratios = ((height, width), (width, height))
        rows, columns = (
            max(1, math.isqrt(area * side // (other * step**2))) * step
            for (side, other), step in zip(ratios, steps, strict=True)
        )
        return rows, columns

    def with_sampler(self, name: str) -> ModelSpec:
        """The model with a solver in place of its own; "auto" leaves it, with its own recipe.

        A solver that cannot be run on the model's list has a schedule of its own, by the model's shift.
        """
        if name == AUTO:
            return self if self.own_recipe is None else self.with_recipe(self.own_recipe[0])
        own = replace(self.defaults, sampler=name)
        if not SOLVERS[name].takes_list:
            own = replace(own, sigmas=None, timesteps=None)
        return replace(self, defaults=own, solver=name)

    def with_recipe(self, name: str | None) -> ModelSpec:
        """The model sampled by a row of `sampling.recipes`; None leaves it as it is, and so does "none" a
        model that has no recipe of its own.

        Raises:
            UsageError: no such row, one that settings' solver is not of, or "none" for distilled weights.
        """
        own = self.defaults.sampler_recipe
        if name in (None, own) or (name == NO_RECIPE and own is None):
            return self
        if name == NO_RECIPE:
            raise UsageError(
                f"sampler_recipe = {name!r}: the weights of {self.name} were distilled for {own}; for "
                "another schedule use infer.sampler = unipc",
                field="sampler_recipe",
            )
        recipe = recipe_named(str(name))
        if self.solver not in (AUTO, recipe.sampler):
            raise UsageError(
                f"sampler_recipe = {name!r} is sampled with {recipe.sampler}, and infer.sampler is "
                f"{self.solver}; leave one of them out",
                field="sampler_recipe",
            )
        if len(self.transformers) > 1 and not recipe.for_two:
            raise UsageError(
                f"sampler_recipe = {name!r}: it is of one transformer, and {self.name} has two; use "
                "lightx2v-4step, or weights of one",
                field="sampler_recipe",
            )
        levels = recipe.levels
        defaults = replace(
            self.defaults,
            steps=len(levels.sigmas),
            guidance=(recipe.guidance,) * len(self.transformers),
            shift=1.0,  # of a list there is none
            sampler=recipe.sampler,
            sigmas=levels.sigmas,
            timesteps=levels.timesteps,
            sampler_recipe=name,
        )
        return replace(self, defaults=defaults, boundary=recipe.boundary(self.boundary))

    def recipe_note(self, guidance: Sequence[float]) -> str | None:
        """What to say of the recipe that a task is sampled by; None for none.

        Args:
            guidance: the task's, of each expert.
        """
        name = self.defaults.sampler_recipe
        if name is None:
            return self.own_recipe and (
                f"its weights were distilled for sampler recipe {self.own_recipe[0]}, as "
                f"{self.own_recipe[1]} says, and infer.sampler = {self.solver} samples them as usual"
            )
        recipe = recipe_named(name)
        told = f", as {self.own_recipe[1]} says" if self.own_recipe and self.own_recipe[0] == name else ""
        note = f"sampler recipe {name} ({recipe.describe()}){told}"
        if any(scale > max(1, recipe.guidance) for scale in guidance):
            note += f"; guidance above {recipe.guidance:g} is not what these weights were distilled for"
        return note

    def shift_note(self, shift: float | None) -> str | None:
        """What to say of a task's shift that is the folder's and not its authors'; None for nothing."""
        own = self.defaults.shift
        if self.defaults.levels or shift is None or shift != own or self.authors_shift in (None, own):
            return None
        authors = f"{self.authors_shift:g}"
        return (
            f"shift {shift:g} as the folder says; the authors of {self.name} use {authors}: --shift {authors}"
        )

    def tokens(self, num_frames: int, height: int, width: int) -> int:
        """Length of the sequence that the transformer sees."""
        latent = self.latent_shape(num_frames, height, width)[1:]
        patch = self.transformers[0].patch_size
        return math.prod(-(-cells // size) for cells, size in zip(latent, patch, strict=True))
