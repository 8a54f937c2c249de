"""What a person asks for, as plain values that are checked where they are made. Knows no model, and imports
no torch.
"""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from numbers import Integral, Real
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

from chitu_diffusion.errors import UsageError, nearest, plain_number
from chitu_diffusion.files.places import expand_home
from chitu_diffusion.media.control_inputs import InputImages, mask_of
from chitu_diffusion.media.frame_rate import Rate, frame_rate
from chitu_diffusion.media.image import InputImage
from chitu_diffusion.media.input_video import InputVideo
from chitu_diffusion.sampling.recipes import NO_RECIPE, recipe_named
from chitu_diffusion.task.lora import checked_loras

MAX_SEED = 2**63 - 1
MAX_PROMPT = 20_000
SIZE_STEP = 8
"""Pixels: the VAE's stride."""
IMAGE_PREPROCESSING = ("diffusers", "official")
INPUTS = ("image", "last_image", "video", "mask", "reference_images")
"""Fields that hold pictures or a video, known by their hash."""
_WHOLE = ("height", "width", "num_frames", "num_inference_steps", "seed", "priority")
_EXACT = 2**53
"""Below it a float holds every whole number."""
LEAST_STRENGTH = 0.01
LEAST_SHIFT = 0.01
_MOST_SCALE = 10.0
"""Of a control stream's hints, to either side of 0."""
MOST_SHIFT = 100
"""Of a cascade's stage: its whole schedule has steps / strength steps."""
FRAME_STEP = 4
"""The VAE's stride in time: a video has 4n + 1 frames."""
_NUMBERS = (
    "height", "width", "num_frames", "fps", "num_inference_steps", "guidance_scale", "seed", "priority",
    "strength",
)  # fmt: skip
_DIFFUSERS_NAMES = MappingProxyType(
    {
        "output_type": "use result.frames or result.to_pil()",
        "return_dict": "engine.generate gives a result with frames, recipe, seed and task",
        "generator": "use seed=42; its noise is drawn on the CPU",
        "num_videos_per_prompt": "use a list of prompts, engine.generate([prompt] * 2), or a seed for each",
        "latents": "use generator.denoise_loop(latent, embeddings)",
        "prompt_embeds": "use generator.denoise_loop(latent, embeddings)",
        "negative_prompt_embeds": "use generator.denoise_loop(latent, embeddings)",
        "guidance_scale_2": "use guidance_scale=(high noise, low noise)",
        "sampler": "it is a setting: EngineConfig(infer={'sampler': 'euler'})",
        "scheduler": "the solver is a setting: EngineConfig(infer={'sampler': 'euler'})",
        "device": "it is a setting: EngineConfig(infer={'device': 'cpu'})",
        "dtype": "it is a setting: EngineConfig(infer={'dtype': 'float32'})",
        "model": "it is a setting: EngineConfig(models={'name': 'wan-tiny'})",
        "frames": "use num_frames",
        "denoising_strength": "use strength",
        "guidance": "use guidance_scale",
        "cfg": "use guidance_scale",
        "size": "use height and width",
        "output": "use save_path",
        "callback_on_step_end": "hand it to engine.generate or engine.submit, beside the request",
        "callback_on_step_end_tensor_inputs": "callback_on_step_end is given the latents",
        "callback": "use callback_on_step_end of engine.generate and engine.submit",
        "callback_steps": "callback_on_step_end is called after each step",
        "num_images_per_prompt": "use a list of prompts, engine.generate([prompt] * 2), or a seed for each",
        "image_embeds": "hand over the picture, image=",
        "sigmas": "the model says them, in `defaults` of its chitu.json, or sampler_recipe",
        "timesteps": "the model says them, in `defaults` of its chitu.json, or sampler_recipe",
        "recipe": "use sampler_recipe; 'chitu reproduce' makes a video again from its recipe",
        "max_sequence_length": "it is the model's",
        "attention_kwargs": "use the setting infer.attn_type",
        "steps": "use num_inference_steps",
        "cfg_scale": "use guidance_scale",
        "image_path": "use image, which takes a file's name too",
        "end_image": "use last_image",
        "loras": "use lora, one or a list",
        "checkpoints": "hand it to engine.submit, beside the request",
        "on_event": "hand it to Engine",
    }
)
"""What diffusers' pipelines and others call it, or what is asked elsewhere, and what it is here."""


@dataclass(frozen=True)
class CascadeStage:
    """One stage of a cascade (`DiffusionUserParams.cascade`): denoise at a size of its own.

    Args:
        height, width: pixels, multiples of 8.
        num_inference_steps: denoising steps of this stage.
        mask: of the control video, where white is made anew and black kept: a video, or a picture for all
            frames, see `mask_of`. None: all is made anew.
        reference_images: pictures of what a controlled model shall show, one or a list, see `InputImages.of`.
            They are put on white, whole.
        conditioning_scale: weight of the control video, mask and references, from -10 to 10; a list has a
            number for each layer of the control stream. None is 1.
        strength: share of the noise schedule that this stage runs, 0.01 to 1; 1 starts from
            pure noise (the base), less re-noises the upsampled latent to that level (SDEdit,
            arXiv:2108.01073).
        expert: index into the model pool; None leaves it to the timestep, as without a cascade.
    """

    height: int
    width: int
    num_inference_steps: int
    strength: float = 1.0
    expert: int | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            object.__setattr__(self, name, plain_number(value))


@dataclass(frozen=True)
class DiffusionUserParams:
    """What a person asks for. None means the model's own default.

    Args:
        prompt: the text.
        negative_prompt: what the video should not be; None is the model's own.
        height, width: pixels, multiples of 8. With an image and neither, as many as the model's own, in the
            image's shape.
        num_frames: 4n + 1.
        fps: frames per second of the written file, 1 to 240: 24, 23.976 or "24000/1001"; kept whole or as a
            Fraction, see `frame_rate`.
        num_inference_steps: denoising steps.
        guidance_scale: weight of classifier-free guidance (arXiv:2207.12598); at most 1 runs the
            prompt's branch alone. For a two-expert model a pair (high noise, low noise) may stand.
        seed: of the starting noise, drawn on the CPU; None draws one, and it is kept in the task.
        save_path: .mp4, .gif, .npy or a folder for png frames; None names a file by the task's id.
        flexcache: a cache strategy's name, or {"strategy": name, ...its parameters}.
        role: who asks; the fair policy shares steps over roles.
        priority: larger goes first under the priority policy.
        image: the first frame: a file's name, or in memory, see `InputImage.of`. It is stretched to the size.
        last_image: the last frame, likewise.
        image_preprocessing: how both are resized: "diffusers" (Lanczos; an image encoder sees the middle) or
            "official", as Wan's authors do it (bicubic without a filter; it sees all, squashed; of
            Wan2.2-TI2V-5B Lanczos, and what stands out of the size is cut off). None is the first.
        video: what a text-to-video model makes anew: a file's name, or in memory, see `InputVideo.of`. Its
            first frames are taken as they come, as many as fit 4n + 1 and the model's own number; its shape
            and rate count where no size or fps is asked for. For a VACE model it is the control
            video.
        mask: of the control video, where white is made anew and black kept: a video, or a picture for all
            frames, see `mask_of`. None: all is made anew.
        reference_images: pictures of what a controlled model shall show, one or a list, see `InputImages.of`.
            They are put on white, whole.
        conditioning_scale: weight of the control video, mask and references, from -10 to 10; a list has a
            number for each layer of the control stream. None is 1.
        strength: share of the schedule that a video goes through after it was noised, 0.01 to 1; None: 0.8.
        lora: adapters of the transformers: "FILE" (or the name of a shipped one), "FILE:0.8",
            "FILE@high:0.8", a `Lora` or a table of its fields, or a list of them. Their changes add up.
        cascade: stages of rising resolution in place of a single denoising; see `CascadeStage`.
        shift: of the noise schedule, as Wan's authors call it: a larger one spends more steps on much noise;
            None is the model's own.
        sampler_recipe: how step-distilled weights are sampled, a name of `sampling.recipes.RECIPES`; None is
            the model's own, "none" the usual solver.
        task_id: a label of the caller's own; letters, digits, '.', '_', '-' only.

    Numbers may be numpy's, and whole ones floats without a fraction, as pandas gives them.

    Raises:
        UsageError (a ValueError): naming the field, the value, and what to use.
    """

    prompt: str = ""
    negative_prompt: str | None = None
    height: int | None = None
    width: int | None = None
    num_frames: int | None = None
    fps: Rate | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | tuple[float, float] | None = None
    seed: int | None = None
    save_path: str | None = None
    flexcache: str | Mapping[str, Any] | None = None
    role: str = "user"
    priority: int = 0
    image: Any = None
    last_image: Any = None
    video: Any = None
    mask: Any = None
    reference_images: Any = None
    conditioning_scale: float | tuple[float, ...] | None = None
    strength: float | None = None
    cascade: tuple[CascadeStage, ...] | None = None
    task_id: str | None = None
    shift: float | None = None
    sampler_recipe: str | None = None
    lora: Any = None
    image_preprocessing: str | None = None

    def __new__(cls, *values: Any, **fields: Any) -> Self:
        _check_names(cls, fields)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for name in _NUMBERS:
            object.__setattr__(self, name, plain_number(vars(self)[name]))
        if not isinstance(self.prompt, str) or not any(map(_is_seen, self.prompt)):
            raise UsageError(
                f"prompt = {self.prompt!r}: must be a sentence, such as 'a red car'", field="prompt"
            )
        for name in ("seed", "negative_prompt"):
            if isinstance(getattr(self, name), list | tuple):
                raise UsageError(
                    f"{name} = {getattr(self, name)!r}: {_ONE_EACH.format(name=name)}", field=name
                )
        for name in ("prompt", "negative_prompt"):
            text = getattr(self, name)
            if text is not None:
                check_text(name, text)
        for name in _WHOLE:
            object.__setattr__(self, name, _whole(getattr(self, name)))
        object.__setattr__(self, "fps", frame_rate(self.fps))
        for name in ("height", "width"):
            _check_size(name, getattr(self, name))
        check_frames(self.num_frames)
        _check_fps(self.fps)
        check_integer("num_inference_steps", self.num_inference_steps, 1, 1000)
        check_integer("seed", self.seed, 0, MAX_SEED, "; leave it out to have one drawn")
        check_integer("priority", self.priority, -(2**31), 2**31)
        check_guidance(self.guidance_scale)
        _check_shift(self.shift)
        check_strength(self.strength)
        object.__setattr__(self, "save_path", expand_home(self.save_path))
        _check_save_path(self.save_path)
        _check_label("task_id", self.task_id)
        _check_recipe(self.sampler_recipe)
        if self.image_preprocessing not in (None, *IMAGE_PREPROCESSING):
            raise UsageError(
                f"image_preprocessing = {self.image_preprocessing!r}: use {' or '.join(IMAGE_PREPROCESSING)}",
                field="image_preprocessing",
            )
        if not isinstance(self.role, str) or not self.role:
            raise UsageError(f"role = {self.role!r}: must be a name", field="role")
        check_text("role", self.role)
        object.__setattr__(self, "cascade", _checked_cascade(self.cascade))
        for name in ("image", "last_image"):
            # read now: what is asked for does not change with the file
            object.__setattr__(self, name, InputImage.of(name, getattr(self, name)))
        object.__setattr__(self, "video", InputVideo.of(self.video))
        object.__setattr__(self, "mask", mask_of(self.mask))
        images = InputImages.of("reference_images", self.reference_images)
        object.__setattr__(self, "reference_images", images)
        object.__setattr__(self, "conditioning_scale", _checked_scale(self.conditioning_scale))
        object.__setattr__(self, "lora", checked_loras(self.lora))

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> DiffusionUserParams:
        """From a row of a batch file or a recipe; unknown names are refused with the nearest."""
        _check_names(cls, values)
        if "prompt" not in values:
            raise UsageError("prompt is missing", field="prompt")
        cascade = values.get("cascade")
        stages = (
            tuple(_cascade_stage(stage) for stage in cascade)
            if isinstance(cascade, list | tuple)
            else cascade
        )
        guidance = values.get("guidance_scale")
        pair = tuple(guidance) if isinstance(guidance, list) else guidance
        return cls(**{**values, "cascade": stages, "guidance_scale": pair})

    def to_mapping(self) -> dict[str, Any]:
        """Plain JSON values, for the recipe in the file; of a picture or video its name, size and hash."""
        inputs = self.inputs()
        plain = dataclasses.replace(
            self, image=None, last_image=None, video=None, mask=None, reference_images=None
        )
        fps = str(self.fps) if isinstance(self.fps, Fraction) else self.fps
        return {**dataclasses.asdict(plain), "fps": fps} | {
            name: given.to_mapping() for name, given in inputs.items()
        }

    def inputs(self) -> dict[str, Any]:
        """The pictures and videos that it brings, by field; each is known by its `sha256`."""
        return {name: vars(self)[name] for name in INPUTS if vars(self)[name] is not None}


_ONE_EACH = (
    "one for each request; for several use engine.generate([DiffusionUserParams(prompt, {name}=each) for "
    "each in ...])"
)


def _is_seen(sign: str) -> bool:
    return sign.isprintable() and not sign.isspace()


def _check_names(kind: type[DiffusionUserParams], given: Iterable[str]) -> None:
    names = {f.name for f in dataclasses.fields(kind)}
    for name in given:
        if name in _DIFFUSERS_NAMES:
            raise UsageError(f"'{name}' is not taken here: {_DIFFUSERS_NAMES[name]}", field=name)
        if name not in names:
            raise UsageError(f"unknown field '{name}'.{nearest(name, names)}", field=name)


def check_text(name: str, text: object) -> None:
    """Raises UsageError for what is no text, or too long."""
    if not isinstance(text, str):
        raise UsageError(f"{name} = {text!r}: must be text", field=name)
    if len(text) > MAX_PROMPT:
        raise UsageError(f"{name} has {len(text)} characters: use at most {MAX_PROMPT}", field=name)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UsageError(
            f"{name} is not valid text: {error.reason} at character {error.start}", field=name
        ) from None


def _whole(value: Any) -> Any:
    """numpy's whole numbers, and floats without a fraction, as int; anything else as it is."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return value
    if isinstance(value, Integral):
        return int(value)
    number = float(value)
    return int(number) if abs(number) < _EXACT and number.is_integer() else value


def _check_fps(value: object) -> None:
    if value is None or (isinstance(value, int | Fraction) and value is not True and 1 <= value <= 240):
        return
    raise UsageError(
        f"fps = {value!r}: must be a number from 1 to 240, such as 24, 23.976 or 24000/1001", field="fps"
    )


def check_integer(name: str, value: object, low: int, high: int, more: str = "") -> None:
    """Raises UsageError for what is neither None nor a whole number from `low` to `high`."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise UsageError(f"{name} = {value!r}: must be a whole number from {low} to {high}{more}", field=name)


def _check_size(name: str, value: int | None) -> None:
    check_integer(name, value, SIZE_STEP, 8192)
    if value is not None and value % SIZE_STEP:
        low = value - value % SIZE_STEP
        high = value - value % SIZE_STEP + SIZE_STEP
        raise UsageError(
            f"{name} = {value}: must be a multiple of {SIZE_STEP}: {max(low, SIZE_STEP)} or {high}",
            field=name,
        )


def check_frames(value: int | None) -> None:
    """Raises UsageError for what is neither None nor 4n + 1."""
    check_integer("num_frames", value, 1, 4001)
    if value is not None and value % FRAME_STEP != 1:
        low = (value - 1) // FRAME_STEP * FRAME_STEP + 1
        raise UsageError(
            f"num_frames = {value}: frames must be 4n+1: {low} or {low + FRAME_STEP}", field="num_frames"
        )


def check_guidance(value: object) -> None:
    """Raises UsageError for what is neither None, a scale, nor a pair of scales."""
    scales = value if isinstance(value, tuple) else (value,)
    if len(scales) not in (1, 2):
        raise UsageError(
            f"guidance_scale = {value!r}: one number, or two (high noise, low noise)", field="guidance_scale"
        )
    for scale in scales:
        if scale is None and not isinstance(value, tuple):
            continue
        if isinstance(scale, bool) or not isinstance(scale, int | float) or not 0 <= scale <= 100:
            raise UsageError(
                f"guidance_scale = {scale!r}: must be a number from 0 to 100; 3 to 7.5 is usual",
                field="guidance_scale",
            )


def check_strength(value: Any) -> None:
    """Raises UsageError for what is neither None nor a share of a schedule."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if value is not None and (not number or not LEAST_STRENGTH <= value <= 1):
        raise UsageError(
            f"strength = {value!r}: must be a number from {LEAST_STRENGTH} to 1; 0.8 is usual",
            field="strength",
        )


def _checked_scale(value: Any) -> Any:
    """A scale of the control stream, or one for each of its layers."""
    layers = isinstance(value, list | tuple)
    scales = [plain_number(each) for each in (value if layers else [value])]
    for scale in scales:
        number = isinstance(scale, int | float) and not isinstance(scale, bool)
        if (scale is not None or layers) and (not number or not -_MOST_SCALE <= scale <= _MOST_SCALE):
            raise UsageError(
                f"conditioning_scale = {value!r}: use a number from {-_MOST_SCALE:g} to {_MOST_SCALE:g}, or "
                "a list; 1 is usual",
                field="conditioning_scale",
            )
    return tuple(scales) if layers else scales[0]


def _check_shift(value: Any) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if value is not None and (not number or not LEAST_SHIFT <= value <= MOST_SHIFT):  # NaN is refused, too
        raise UsageError(
            f"shift = {value!r}: must be a number from {LEAST_SHIFT} to {MOST_SHIFT}; 3 to 12 is usual",
            field="shift",
        )


def _check_save_path(value: object) -> None:
    if value is None:
        return
    if isinstance(value, Path):
        return
    if not isinstance(value, str) or not value or "\0" in value:
        raise UsageError(f"save_path = {value!r}: must be a file or folder name", field="save_path")


def _check_label(name: str, value: object) -> None:
    if value is None:
        return
    plain = (
        isinstance(value, str)
        and 0 < len(value) <= 100
        and all(c.isascii() and (c.isalnum() or c in "._-") for c in value)
    )
    if not plain or str(value).startswith("."):
        raise UsageError(
            f"{name} = {value!r}: use letters, digits, '.', '_' and '-', not starting with '.'", field=name
        )


def _check_recipe(name: object) -> None:
    if name not in (None, NO_RECIPE):
        recipe_named(str(name))


def _cascade_stage(value: Any) -> Any:
    """A stage from a table of its fields; anything else is left for the check of the whole."""
    if not isinstance(value, Mapping):
        return value
    known = dataclasses.fields(CascadeStage)
    for name in value:
        if name not in {f.name for f in known}:
            raise UsageError(
                f"cascade has no field '{name}'.{nearest(str(name), [f.name for f in known])}",
                field="cascade",
            )
    for f in known:
        if f.name not in value and f.default is dataclasses.MISSING:
            raise UsageError(f"cascade: a stage lacks {f.name}", field="cascade")
    return CascadeStage(**value)


def _checked_cascade(stages: Any) -> Any:
    if stages is None:
        return None
    if not isinstance(stages, list | tuple) or not all(isinstance(stage, CascadeStage) for stage in stages):
        raise UsageError(
            f"cascade = {stages!r}: use stages, each with height, width and num_inference_steps",
            field="cascade",
        )
    numbers = ("height", "width", "num_inference_steps", "expert")
    stages = tuple(
        dataclasses.replace(stage, **{name: _whole(getattr(stage, name)) for name in numbers})
        for stage in stages
    )
    for stage in stages:
        _check_cascade_stage(stage)
    return stages


def _check_cascade_stage(stage: CascadeStage) -> None:
    if None in (stage.height, stage.width, stage.num_inference_steps):
        raise UsageError(
            f"cascade = {stage}: each stage needs height, width and num_inference_steps", field="cascade"
        )
    _check_size("cascade height", stage.height)
    _check_size("cascade width", stage.width)
    check_integer("cascade num_inference_steps", stage.num_inference_steps, 1, 1000)
    check_integer("cascade expert", stage.expert, 0, 1)
    number = isinstance(stage.strength, int | float) and not isinstance(stage.strength, bool)
    if not number or not LEAST_STRENGTH <= stage.strength <= 1:
        raise UsageError(
            f"cascade strength = {stage.strength!r}: must be from {LEAST_STRENGTH} to 1", field="cascade"
        )


def draw_seed() -> int:
    """A fresh seed, small enough to be typed."""
    return secrets.randbelow(2**31)
