"""The pipeline of each kind of model."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from chitu_diffusion.models.kinds import IMAGE_TO_VIDEO, TEXT_TO_VIDEO
from chitu_diffusion.models.spec import ModelSpec
from chitu_diffusion.pipelines.image_to_video import ImageToVideo
from chitu_diffusion.pipelines.text_to_video import TextToVideo

PIPELINES: Mapping[str, TextToVideo] = MappingProxyType(
    {TEXT_TO_VIDEO.class_name: TextToVideo(), IMAGE_TO_VIDEO.class_name: ImageToVideo()}
)
"""By `_class_name` of `model_index.json`."""


def pipeline_of(spec: ModelSpec) -> TextToVideo:
    """The pipeline that makes a model's videos."""
    return PIPELINES[spec.kind.class_name]
