"""Guidance branches over ranks: each takes one, and all get every velocity. Where counts differ, each rank runs all."""

from __future__ import annotations

import torch
from torch import Tensor

from chitu_diffusion.attention.peers import Peers


def own_branches(text: Tensor, peers: Peers) -> Tensor:
    """The branches that this rank runs: text [branches, L, D] -> [1, L, D] where there is one for each rank, else all."""
    return text[peers.index : peers.index + 1] if len(text) == peers.size else text


def all_branches(velocity: Tensor, branches: int, peers: Peers) -> Tensor:
    """The velocity of every branch, [branches * B, ...], from that of `own_branches`."""
    return torch.cat(peers.all_gather(velocity.contiguous())) if branches == peers.size else velocity
