"""From a request to a video: what is asked, the stages, and the denoising loop."""
