"""What a task's networks are told beside the latent, and what they made of it."""

from __future__ import annotations

import torch
from torch import Tensor

from chitu_diffusion.models.wan.text_kv import TextKVCache, rows_that_differ
from chitu_diffusion.models.wan.transformer import WanTransformer


class TextConditioning:
    """A text, and its projected rows and cross-attention keys under each expert, for all steps of a task.

    What it holds beyond `embeddings` can be dropped at any time and comes back by itself.

    Args:
        embeddings: [branches, L, D], the prompt's branch first.
    """

    def __init__(self, embeddings: Tensor) -> None:
        self.embeddings = embeddings
        self._rows = rows_that_differ(embeddings)
        self._kv: dict[tuple[object, ...], TextKVCache] = {}

    def __len__(self) -> int:
        return self.embeddings.shape[0]

    @property
    def bytes(self) -> int:
        """Memory held beyond the embeddings; see `TextKVCache.bytes`."""
        return sum(kv.bytes for kv in self._kv.values())

    def kv_for(
        self, network: WanTransformer, expert: int, branches: tuple[int, ...], batch: int
    ) -> TextKVCache:
        """Some branches' text, each `batch` times, under one expert, whose weights are on the device now."""
        device = self.embeddings.device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        place = (expert, branches, batch, autocast)
        if place not in self._kv:
            text = self.embeddings[list(branches)].repeat_interleave(batch, dim=0)
            self._kv[place] = network.make_text_kv(text, self._rows)
        return self._kv[place]
