"""Text to video, and video to video (SDEdit, arXiv:2108.01073): the plain kind of model, whose way all others
share but for what they change.
"""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor

from chitu_diffusion.backend import DiffusionBackend
from chitu_diffusion.pipelines.encoding import encode_clip, encode_text
from chitu_diffusion.pipelines.request import guidance_pair
from chitu_diffusion.task import Conditioning, DiffusionUserParams, TaskStatus


class TextToVideo:
    """From a sentence to a video.

    Attributes:
        stages: of a task, in order.
    """

    stages = (TaskStatus.ENCODING, TaskStatus.DENOISING, TaskStatus.DECODING, TaskStatus.SAVING)

    def after(self, stage: TaskStatus) -> TaskStatus:
        """The stage that follows one."""
        return dict(pairwise(self.stages))[stage]

    def condition(self, backend: DiffusionBackend, request: DiffusionUserParams) -> Conditioning:
        """What the networks are told beside the latent.

        Args:
            request: resolved.
        """
        prompts = [request.prompt]
        if max(guidance_pair(request.guidance_scale)) > 1:
            prompts.append(request.negative_prompt or "")
        return Conditioning(encode_text(backend, prompts))

    def begins_from(self, backend: DiffusionBackend, request: DiffusionUserParams) -> Tensor | None:
        """The clean latent [1, C, T, H, W] float32 that is noised and made anew; None where all is made from
        noise.

        Args:
            request: resolved.
        """
        return None if request.video is None else encode_clip(backend, request)
