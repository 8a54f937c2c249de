"""Image to video: the first frame is given, perhaps the last, and a sentence says what happens."""

from __future__ import annotations

from dataclasses import replace

from chitu_diffusion.backend import DiffusionBackend
from chitu_diffusion.pipelines.encoding import encode_keyframes
from chitu_diffusion.pipelines.text_to_video import TextToVideo
from chitu_diffusion.task import Conditioning, DiffusionUserParams


class ImageToVideo(TextToVideo):
    """As Wan2.2-I2V-A14B: the frames that are known stand behind the latent's channels, and there is no image
    encoder.
    """

    def condition(self, backend: DiffusionBackend, request: DiffusionUserParams) -> Conditioning:
        """The text, and the known frames."""
        text = super().condition(backend, request)
        return replace(text, concat_latents=encode_keyframes(backend, request))
