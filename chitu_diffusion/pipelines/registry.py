"""The pipeline of each kind of model."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from chitu_diffusion.models.kinds import CONTROLLED_VIDEO, IMAGE_TO_VIDEO, TEXT_IMAGE_TO_VIDEO, TEXT_TO_VIDEO
from chitu_diffusion.models.spec import ModelSpec
from chitu_diffusion.pipelines.controlled_video import ControlledVideo
from chitu_diffusion.pipelines.image_to_video import ImageToVideo
from chitu_diffusion.pipelines.text_image_to_video import TextImageToVideo
from chitu_diffusion.pipelines.text_to_video import TextToVideo

PIPELINES: Mapping[str, TextToVideo] = MappingProxyType(
    {
        TEXT_TO_VIDEO.model_type: TextToVideo(),
        IMAGE_TO_VIDEO.model_type: ImageToVideo(),
        TEXT_IMAGE_TO_VIDEO.model_type: TextImageToVideo(),
        CONTROLLED_VIDEO.model_type: ControlledVideo(),
    }
)
"""By `model_type`, as `models.kinds.KINDS`."""


def pipeline_of(spec: ModelSpec) -> TextToVideo:
    """The pipeline that makes a model's videos."""
    return PIPELINES[spec.kind.model_type]
