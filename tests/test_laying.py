"""Peer memory that is being opened: a rank that cannot tells the others, and whoever waits can be cut short.
No GPU.
"""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import torch
from test_copies import PATIENCE, Store, in_threads

from chitu_diffusion.distributed import peer_memory
from chitu_diffusion.distributed.peer_memory import CudaPeerMemory, PeerMemoryError, open_peer_memory


class Unwilling(CudaPeerMemory):
    """Peer memory without a GPU, whose trial on rank 1 ends as it is told."""

    def __init__(self, index: int, size: int, device: object, store: Any, timeout: float) -> None:
        self.index, self.size, self._store, self._timeout, self._meetings = index, size, store, timeout, 0
        self._released, self._gone, self._latest = threading.Event(), threading.Event(), 0
        self._flags, self._flags_at, self._device = None, 0, torch.device("cpu")

    def map_numbers(self) -> None:
        self.meet(None)

    def trial(self) -> None:
        if self.index == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.meet(None)

    def detach(self) -> None:
        self._gone.set()


def test_a_rank_without_memory_for_the_trial_tells_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer_memory, "CudaPeerMemory", Unwilling)
    store, began = Store(), time.monotonic()
    found = in_threads(lambda index: open_peer_memory(index, 2, torch.device("cpu"), store, PATIENCE))  # type: ignore[arg-type]
    assert found == [(None, "CUDA out of memory")] * 2
    assert time.monotonic() - began < PATIENCE / 2


@pytest.mark.parametrize("meets", [True, False])
def test_opening_is_cut_short(meets: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone in a meeting, or after it has given up: whoever interrupts the groups has the memory already."""
    monkeypatch.setattr(peer_memory, "CudaPeerMemory", Unwilling)
    held: list[CudaPeerMemory] = []
    why: list[str] = []

    def alone(_: int) -> str:
        try:
            open_peer_memory(
                0 if meets else 1,
                3,
                torch.device("cpu"),
                Store(),
                PATIENCE,
                held.append,
                lambda: why[0] if why else None,
            )  # type: ignore[arg-type]
        except PeerMemoryError as error:
            return str(error)
        return "opened"

    def cancel() -> None:
        why.append("rank 2 is lost")
        held[0]._released.set()

    threading.Timer(0.3, cancel).start()
    began = time.monotonic()
    assert in_threads(alone, 1) == ["rank 2 is lost"]
    assert time.monotonic() - began < PATIENCE / 2
