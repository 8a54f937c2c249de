"""What attention over several ranks needs of the ranks it runs with. Knows no process, backend or layout."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class RecvBuffer:
    """Where what the others send arrives, one part behind the other.

    Attributes:
        whole: [rows of all parts, ...].
        parts: views of `whole` by sender; among them this one's own place, which no exchange touches.
    """

    whole: Tensor
    parts: list[Tensor]

    @classmethod
    def new(cls, rows: Sequence[int], shape: Sequence[int], like: Tensor) -> "RecvBuffer":
        """In new memory of the dtype and device of `like`: rows[p] rows of `shape` from peer p."""
        whole = like.new_empty(sum(rows), *shape)
        return cls(whole, list(whole.split(list(rows))))


class Collectives(Protocol):
    """Ranks that talk to each other, this one among them. All of them make every call, in the same order."""

    @property
    def size(self) -> int:
        """How many."""
        ...

    @property
    def index(self) -> int:
        """Which of them this one is."""
        ...

    def recv_buffer(self, rows: Sequence[Sequence[int]], shape: Sequence[int], like: Tensor) -> RecvBuffer:
        """Room for an exchange, until `release_buffers`.

        Args:
            rows: rows[p][s] is what peer p gets from peer s; all give the same table.
            shape: of a row.
            like: has the dtype and device.
        """
        ...

    def release_buffers(self) -> None:
        """All recv_buffers have been read, and the others may write there again."""
        ...

    def all_to_all(self, leaving: Sequence[Tensor], recv_buffer: RecvBuffer) -> Callable[[], None]:
        """Begin to send leaving[p] to each other peer p and to fill recv_buffer.parts[p] from it; the result
        waits for all.

        What leaves is contiguous; this one's own place stays as it is.
        """
        ...

    def ring_shift(self, leaving: Sequence[Tensor], recv_buffers: Sequence[RecvBuffer]) -> Callable[[], None]:
        """Begin to send tensors to the next peer and to fill each recv_buffer from the one before; the result
        waits for both.
        """
        ...

    def all_gather(self, x: Tensor) -> list[Tensor]:
        """Everyone's x, of one shape."""
        ...

    def broadcast(self, x: Tensor) -> Tensor:
        """The first peer's x, of one shape, in everyone's x."""
        ...

    def send_to_rank0(self, x: Tensor) -> None:
        """Hand x to the first peer, which calls `recv_from`."""
        ...

    def recv_from(self, index: int, arriving: Tensor) -> Tensor:
        """At the first peer: what peer `index` sends."""
        ...


class SingleRank:
    """The one rank of a group of one: every exchange is what it has itself."""

    size = 1
    index = 0

    def recv_buffer(self, rows: Sequence[Sequence[int]], shape: Sequence[int], like: Tensor) -> RecvBuffer:
        """New memory."""
        return RecvBuffer.new(rows[0], shape, like)

    def release_buffers(self) -> None:
        """Nobody else writes."""

    def all_to_all(self, leaving: Sequence[Tensor], recv_buffer: RecvBuffer) -> Callable[[], None]:
        """Nobody else is there."""
        return lambda: None

    def ring_shift(self, leaving: Sequence[Tensor], recv_buffers: Sequence[RecvBuffer]) -> Callable[[], None]:
        """What leaves comes back."""
        for source, buffer in zip(leaving, recv_buffers, strict=True):
            buffer.whole.copy_(source)
        return lambda: None

    def all_gather(self, x: Tensor) -> list[Tensor]:
        """x alone."""
        return [x]

    def broadcast(self, x: Tensor) -> Tensor:
        """x."""
        return x

    def send_to_rank0(self, x: Tensor) -> None:
        """Nobody else is there."""

    def recv_from(self, index: int, arriving: Tensor) -> Tensor:
        """Nobody else is there."""
        return arriving


SINGLE = SingleRank()
