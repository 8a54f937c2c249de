"""Text to video: the plain kind of model, whose way all others share but for what they change."""

from __future__ import annotations

from itertools import pairwise

from chitu_diffusion.backend import DiffusionBackend
from chitu_diffusion.pipelines.encoding import encode_text
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
