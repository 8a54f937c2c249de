"""Image to video: the first frame is given, perhaps the last, and a sentence says what happens."""

from __future__ import annotations

from dataclasses import replace

from chitu_diffusion.backend import DiffusionBackend
from chitu_diffusion.pipelines.encoding import encode_keyframes, encode_pictures
from chitu_diffusion.pipelines.text_to_video import TextToVideo
from chitu_diffusion.task import Conditioning, DiffusionUserParams


class ImageToVideo(TextToVideo):
    """The frames that are known stand behind the latent's channels; in Wan2.1 the networks also attend to
    what an image encoder makes of them.
    """

    def condition(self, backend: DiffusionBackend, request: DiffusionUserParams) -> Conditioning:
        """The text, the known frames, and their rows."""
        text = super().condition(backend, request)
        image = encode_pictures(backend, request) if backend.spec.transformers[0].image_dim else None
        return replace(text, concat_latents=encode_keyframes(backend, request), image=image)
