"""The image encoder: transformers' CLIP vision network behind a room that takes pictures and gives the rows
that Wan2.1's image-to-video networks attend to. Knows no request and no device plan.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from chitu_diffusion.models.hollow import hollow
from chitu_diffusion.models.image_preprocessing import ImagePreprocessing

_CONFIG_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_channels",
    "image_size",
    "patch_size",
    "hidden_act",
    "layer_norm_eps",
    "projection_dim",
    "attention_dropout",
    "initializer_range",
    "initializer_factor",
)
TOWER = "vision_model"
"""What stands before each parameter's name, as most files have it."""


class ImageEncoder(nn.Module):
    """CLIP's vision tower ("Learning Transferable Visual Models", arXiv 2103.00020) as Wan uses it: the state
    before its last layer, of each patch and of the class.

    Args:
        network: of `build_image_encoder`, with weights.
        preprocessing: what it is shown of a picture.
        remembered: how many pictures' rows are kept in main memory, the last used ones; 1.3 MB each.
    """

    def __init__(self, network: nn.Module, preprocessing: ImagePreprocessing, remembered: int = 16) -> None:
        super().__init__()
        self.network = network
        self.preprocessing = preprocessing
        self._remembered = remembered
        # (picture, weights) -> [1, I, D] in main memory, the last used at the end
        self._known: OrderedDict[tuple[object, ...], Tensor] = OrderedDict()
        embeddings = self._tower.embeddings
        # follows from the config, so that no file has it
        places = torch.arange(embeddings.num_positions, device=embeddings.class_embedding.device)
        embeddings.register_buffer("position_ids", places[None], persistent=False)

    @property
    def _tower(self) -> Any:  # transformers' types do not say what its forward gives
        return self.network.get_submodule(TOWER)

    @torch.no_grad()
    def encode(self, pictures: Sequence[tuple[str, Callable[[], Tensor]]]) -> Tensor:
        """Rows of pictures, computed or remembered.

        Args:
            pictures: what each is known by, and what gives its pixels as the network takes them, [1, 3, side,
                side].

        Returns:
            [1, I of the first + I of the second ..., D] in the encoder's dtype and on its device.
        """
        device = self._tower.embeddings.class_embedding.device
        return torch.cat([self._rows(key, make).to(device) for key, make in pictures], dim=1)

    def recall(self, keys: Sequence[str], device: torch.device) -> Tensor | None:
        """What `encode` would give, on a device, if all of it is remembered: no encoder is needed then."""
        places = [self._place(key) for key in keys]
        if not all(place in self._known for place in places):
            return None
        return torch.cat([self._known[place].to(device) for place in places], dim=1)

    def _rows(self, key: str, make: Callable[[], Tensor]) -> Tensor:
        place = self._place(key)
        if place not in self._known:
            weight = self._tower.embeddings.class_embedding
            with torch.autocast(weight.device.type, enabled=False):
                states = self._tower(make().to(weight), output_hidden_states=True).hidden_states
            self._known[place] = states[-2].to("cpu", copy=True)
            if len(self._known) > self._remembered:
                self._known.popitem(last=False)
        self._known.move_to_end(place)
        return self._known[place]

    def _place(self, key: str) -> tuple[object, ...]:
        weights = list(self.network.parameters())
        # moving weights leaves these as they are; loading others, or converting them, does not
        return key, weights[0].dtype, sum(weight._version for weight in weights)


def build_image_encoder(config: Mapping[str, Any]) -> nn.Module:
    """The encoder of a transformers config, with no weights (on the meta device)."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    used = {key: value for key, value in config.items() if key in _CONFIG_FIELDS}
    with hollow():
        network = cast(nn.Module, CLIPVisionModel(CLIPVisionConfig.from_dict(used)))
    # where the class wraps the tower, the tower
    tower = dict(network.named_children()).get(TOWER, network)
    return nn.ModuleDict({TOWER: tower})
