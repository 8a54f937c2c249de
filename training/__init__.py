"""Training of the shipped `wan-tiny`: `python -m training` makes the whole checkpoint from nothing.

Five stages, each bounded by a share of one dial (minutes on the device), each resumable:

    text      a tokenizer from captions                       `training.text`
    vae       the causal video autoencoder, on drawn clips    `training.autoencoder`
    judge     the classifier that scores adherence            `training.judging`
    latents   drawn clips through the autoencoder, once       `training.latents`
    dit       the diffusion transformer and the text encoder  `training.denoiser`

Data is drawn by `training.world`; nothing is downloaded. Imports go from here
into the package, never back.
"""
