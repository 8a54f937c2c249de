"""Guidance branches over ranks: each takes one, and all get every velocity. Where counts differ, each rank
runs all.
"""

from __future__ import annotations

import torch
from torch import Tensor

from chitu_diffusion.distributed.collectives import Peers


def own_branches(branches: tuple[int, ...], peers: Peers) -> tuple[int, ...]:
    """The branches that this rank runs: one where there is one for each rank, else all."""
    return branches[peers.index : peers.index + 1] if len(branches) == peers.size else branches


def all_branches(velocity: Tensor, branches: int, peers: Peers) -> Tensor:
    """The velocity of every branch, [branches * B, ...], from that of `own_branches`."""
    return torch.cat(peers.all_gather(velocity.contiguous())) if branches == peers.size else velocity
