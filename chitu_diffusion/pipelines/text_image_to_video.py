"""Text to video and image to video by one network, as Wan2.2-TI2V-5B: a first frame that is known lies in
the latent itself, and its tokens are told the time 0.
"""

from __future__ import annotations

from dataclasses import replace

from chitu_diffusion.backend import DiffusionBackend
from chitu_diffusion.pipelines.encoding import encode_first_frame
from chitu_diffusion.pipelines.text_to_video import TextToVideo
from chitu_diffusion.task import Conditioning, DiffusionUserParams


class TextImageToVideo(TextToVideo):
    """Without an image it is text to video: all tokens have one time."""

    def condition(self, backend: DiffusionBackend, request: DiffusionUserParams) -> Conditioning:
        """The text, and the first frame where the request has one."""
        text = super().condition(backend, request)
        return (
            text if request.image is None else replace(text, first_frame=encode_first_frame(backend, request))
        )
