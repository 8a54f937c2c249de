"""What attention over several ranks needs of the ranks it runs with. Knows no process, backend or layout."""

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor


class Peers(Protocol):
    """Ranks that talk to each other, one of which is this one. Every call is made by all of them, in the same order."""

    @property
    def size(self) -> int:
        """How many."""
        ...

    @property
    def index(self) -> int:
        """Which of them this one is."""
        ...

    def swap(self, leaving: Sequence[Tensor], arriving: Sequence[Tensor]) -> Callable[[], None]:
        """Begin to send leaving[p] to each other peer p and to fill arriving[p] from it; the result waits for all.

        All contiguous; this one's own places stay as they are.
        """
        ...

    def pass_on(self, leaving: Sequence[Tensor], arriving: Sequence[Tensor]) -> Callable[[], None]:
        """Begin to send tensors to the next peer and to fill `arriving` from the one before; the result waits for both."""
        ...

    def all_gather(self, x: Tensor) -> list[Tensor]:
        """Everyone's x, of one shape."""
        ...

    def broadcast(self, x: Tensor) -> Tensor:
        """The first peer's x, of one shape, in everyone's x."""
        ...

    def send_to_first(self, x: Tensor) -> None:
        """Hand x to the first peer, which calls `receive_from`."""
        ...

    def receive_from(self, index: int, arriving: Tensor) -> Tensor:
        """At the first peer: what peer `index` sends."""
        ...


class Alone:
    """The one rank of a group of one: every exchange is what it has itself."""

    size = 1
    index = 0

    def swap(self, leaving: Sequence[Tensor], arriving: Sequence[Tensor]) -> Callable[[], None]:
        """Nobody else is there."""
        return lambda: None

    def pass_on(self, leaving: Sequence[Tensor], arriving: Sequence[Tensor]) -> Callable[[], None]:
        """What leaves comes back."""
        for source, target in zip(leaving, arriving, strict=True):
            target.copy_(source)
        return lambda: None

    def all_gather(self, x: Tensor) -> list[Tensor]:
        """x alone."""
        return [x]

    def broadcast(self, x: Tensor) -> Tensor:
        """x."""
        return x

    def send_to_first(self, x: Tensor) -> None:
        """Nobody else is there."""

    def receive_from(self, index: int, arriving: Tensor) -> Tensor:
        """Nobody else is there."""
        return arriving


ALONE = Alone()
