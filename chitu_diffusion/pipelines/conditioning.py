"""What a task's networks are told beside the latent, readied for all of its steps."""

from __future__ import annotations

import torch
from torch import Tensor

from chitu_diffusion.models.wan.text_kv import TextKVCache, rows_that_differ
from chitu_diffusion.models.wan.transformer import WanTransformer
from chitu_diffusion.task import Conditioning


class PreparedConditioning:
    """A conditioning on the device, with the text's projected rows and cross-attention keys under each
    expert.

    What it holds beyond the conditioning can be dropped at any time and comes back by itself.

    Attributes:
        embeddings, control, control_scale: text, control latents and scale of the conditioning.

    Args:
        conditioning: of a task; a bare [branches, L, D] is a text alone.
        device: where to; None leaves it where it is.
    """

    def __init__(self, conditioning: Conditioning | Tensor, device: torch.device | None = None) -> None:
        if isinstance(conditioning, Tensor):
            conditioning = Conditioning(conditioning)
        embeddings = conditioning.text.to(device)
        concat = conditioning.concat_latents
        first = conditioning.first_frame
        image = conditioning.image
        control = conditioning.control_latents
        self.control = None if control is None else control.to(device)
        self.control_scale = conditioning.control_scale
        self.embeddings = embeddings
        self._concat = None if concat is None else concat.to(device)
        self._first = None if first is None else first.to(device)
        self._image = None if image is None else image.to(device)
        self._rows = rows_that_differ(embeddings)
        self._kv: dict[tuple[object, ...], TextKVCache] = {}

    def __len__(self) -> int:
        return self.embeddings.shape[0]

    @property
    def bytes(self) -> int:
        """Memory held beyond the embeddings; see `TextKVCache.bytes`."""
        return sum(kv.bytes for kv in self._kv.values())

    @property
    def first_timestep(self) -> float | None:
        """What the first latent frame's tokens are told; None: the time of all others."""
        return None if self._first is None else 0.0

    def composed(self, latent: Tensor) -> Tensor:
        """A latent [B, C, T, H, W] with the first frame in its place, where it is known."""
        if self._first is None:
            return latent
        return torch.cat(
            [self._first.to(latent).expand(len(latent), -1, -1, -1, -1), latent[:, :, 1:]], dim=2
        )

    def model_input(self, latent: Tensor) -> Tensor:
        """What a forward takes for a latent [B, C, T, H, W]: [B, C + C', T, H, W]."""
        latent = self.composed(latent)
        if self._concat is None:
            return latent
        return torch.cat([latent, self._concat.to(latent).expand(len(latent), -1, -1, -1, -1)], dim=1)

    def kv_for(
        self, network: WanTransformer, expert: int, branches: tuple[int, ...], batch: int
    ) -> TextKVCache:
        """Some branches' text, each `batch` times, under one expert, whose weights are on the device now."""
        device = self.embeddings.device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        place = (expert, branches, batch, autocast)
        if place not in self._kv:
            text = self.embeddings[list(branches)].repeat_interleave(batch, dim=0)
            image: Tensor | TextKVCache | None = self._image
            if image is not None:  # one for all branches, and so are its keys
                like = [kv for key, kv in self._kv.items() if (key[0], key[3]) == (expert, autocast)]
                image = like[0] if like else image
            self._kv[place] = network.make_text_kv(text, self._rows, image)
        return self._kv[place]
