"""Pictures and videos that a request brings, against what its model takes. Imports no torch."""

from __future__ import annotations

from chitu_diffusion.errors import UsageError
from chitu_diffusion.media.input_video import InputVideo
from chitu_diffusion.models.spec import ModelSpec
from chitu_diffusion.task import DiffusionUserParams

STRENGTH = 0.8
"""Share of the noise schedule that a video goes through where the request names none: diffusers' own."""
_CONTROL = ("mask", "reference_images", "conditioning_scale")


def check_image(params: DiffusionUserParams, spec: ModelSpec) -> None:
    """Raises UsageError for a first or last image that the model cannot do with, or without."""
    if spec.kind.needs_image and params.image is None:
        raise UsageError(
            f"image is missing: {spec.name} makes a video that begins with one; use --image FILE or image=",
            field="image",
        )
    for name, image in (("image", params.image), ("last_image", params.last_image)):
        if image is not None and not spec.kind.takes_image:
            raise UsageError(
                f"{name}: {spec.name} is a {spec.kind.title} model and takes none; leave it out, or use a "
                "model such as Wan2.2-I2V-A14B",
                field=name,
            )
    if params.last_image is not None and spec.kind.token_times:
        raise UsageError(
            f"last_image: {spec.name} is told of the first frame alone; leave it out, or use a model such as "
            "Wan2.2-I2V-A14B",
            field="last_image",
        )
    if spec.transformers[0].pos_embed_seq_len is not None and params.last_image is None:
        raise UsageError(
            f"last_image is missing: {spec.name} makes a video between two; use --last-image FILE or "
            "last_image=, or a model such as Wan2.1-I2V-14B-720P",
            field="last_image",
        )
    if params.image_preprocessing is not None and params.image is None:
        raise UsageError(
            f"image_preprocessing = {params.image_preprocessing!r}: it is of an image; leave it out",
            field="image_preprocessing",
        )
    if params.last_image is not None and params.num_frames == 1:
        raise UsageError("last_image with one frame: use num_frames = 5 or more", field="last_image")


def check_video(params: DiffusionUserParams, spec: ModelSpec) -> None:
    """Raises UsageError for a video, or a strength, that the model cannot do with."""
    if spec.kind.takes_control and params.strength is not None:
        raise UsageError(
            f"strength = {params.strength:g}: to {spec.name} a video is a control and is not noised; use "
            "--conditioning-scale S or conditioning_scale=, or leave it out",
            field="strength",
        )
    if params.video is None:
        if params.strength is not None:
            raise UsageError(
                f"strength = {params.strength:g}: it is of a video; use --video FILE or video=, or leave "
                "it out",
                field="strength",
            )
        return
    if params.image is not None and not spec.kind.needs_image:
        raise UsageError("video and image together are not supported; use one of them", field="video")
    if spec.kind.needs_image:
        raise UsageError(
            f"video: {spec.name} is a {spec.kind.title} model and takes none; leave it out, or use a text to "
            "video model such as Wan2.2-T2V-A14B",
            field="video",
        )
    if params.cascade:
        raise UsageError("video and cascade together are not supported; use one of them", field="cascade")
    steps = params.num_inference_steps or spec.defaults.steps
    if int(steps * (params.strength or STRENGTH)) < 1:
        raise UsageError(
            f"strength = {params.strength:g}: of {steps} steps that is none; use {1 / steps:.2g} or more",
            field="strength",
        )


def check_control(params: DiffusionUserParams, spec: ModelSpec, num_frames: int) -> None:
    """Raises UsageError for a mask, reference images or a scale of theirs that the model cannot do with.

    Args:
        num_frames: that will be made.
    """
    if not spec.kind.takes_control:
        for name in _CONTROL:
            if vars(params)[name] is not None:
                raise UsageError(
                    f"{name}: {spec.name} is a {spec.kind.title} model and takes none; leave it out, or use "
                    "a model such as Wan2.1-VACE-14B",
                    field=name,
                )
        return
    if params.cascade:
        raise UsageError(
            f"cascade: {spec.name} is told of one size alone; use height and width", field="cascade"
        )
    mask = params.mask
    if mask is not None and params.video is None:
        raise UsageError("mask: it is of a video; use --video FILE or video=, or leave it out", field="mask")
    if isinstance(mask, InputVideo) and 1 < mask.frames < num_frames:
        raise UsageError(
            f"mask: it has {mask.frames} frames, and {num_frames} of the video are taken; use one of as "
            "many, a picture, or fewer num_frames",
            field="mask",
        )
    layers = len(spec.transformers[0].vace_layers or ())
    scale = params.conditioning_scale
    if isinstance(scale, tuple) and len(scale) != layers:
        raise UsageError(
            f"conditioning_scale has {len(scale)} numbers: {spec.name} has {layers} layers of control; use "
            f"one, or {layers}",
            field="conditioning_scale",
        )
