"""Which weights are on the device now.

A `OffloadManager` moves whole parts (encoders, each expert, VAE) between the device and their home in
main memory as the memory level asks, and streams an expert's blocks through two slots on the device at the
highest level. It knows modules and devices; not what the modules compute, nor tasks.

    level 0   every part stays on the device
    level 1   the same (the VAE decodes in tiles; that is the generator's business)
    level 2   an encoder is on the device only while it encodes
    level 3   one of encoder, expert, VAE at a time (the VAE may stay beside an expert)
    level 4   as 3, and an expert's blocks pass through the device one by one, the next copied while one
              computes

Weights do not change here, so that going home is free after the first time: the copy in main memory stays
and the one on the device is dropped; whoever changes one writes into all of its `copies`, and who gives a
part other tensors says so (`retake`). Where the device is the CPU, home and device are one and parts do not
move; blocks are streamed all the same.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

TOP_LEVEL = 4
HOME = torch.device("cpu")
_ALIGNMENT = 256
"""Bytes at which each tensor begins in a block's buffer: what the device's loads like best."""
_NOTHING: frozenset[Tensor] = frozenset()
_PIN_FROM = 1 << 20
"""Bytes from which a tensor is worth pinning: locking memory costs a system call each."""


def tensors_of(module: nn.Module) -> list[Tensor]:
    """Every parameter and buffer once, tied ones included once."""
    return [*module.parameters(), *module.buffers()]


def bytes_of(module: nn.Module) -> int:
    """Size of the weights."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors_of(module))


class PinnedMemory:
    """Main memory that the device can read at full speed and without the CPU waiting.

    Tensors are locked where they lie (`cudaHostRegister`), without a copy and without the rounding up to a
    power of two of torch's pinned allocator. Where locking fails, copies are slower but right.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._locked: list[Tensor] = []
        # runs when this object goes, also when nobody called `release`; the list keeps the memory alive until
        # then
        self.release = weakref.finalize(self, _unlock, self._locked)

    def lock(self, tensor: Tensor) -> None:
        """Lock a contiguous tensor in main memory; small ones are left alone."""
        size = tensor.numel() * tensor.element_size()
        if not self._cuda or size < _PIN_FROM or tensor.is_pinned():
            return
        code = torch.cuda.cudart().cudaHostRegister(tensor.data_ptr(), size, 0)
        if int(code) == 0:
            self._locked.append(tensor)

    def unlock(self, tensor: Tensor) -> None:
        """Let go of a tensor that nobody will copy any more."""
        gone = [locked for locked in self._locked if locked is tensor]
        self._locked[:] = [locked for locked in self._locked if locked is not tensor]
        _unlock(gone)


def _unlock(locked: list[Tensor]) -> None:
    for tensor in locked:
        torch.cuda.cudart().cudaHostUnregister(tensor.data_ptr())
    locked.clear()


class OffloadedModule:
    """One network and its home.

    Args:
        module: the network; its tensors' `data` points to the device or to main memory.
        device: where it runs.
        apart: whether home and device are two memories. For a CPU they are not, and nothing moves.
        memory: locks what comes home.

    Attributes:
        home: tensor -> its copy in main memory, for tensors that have been home.
    """

    def __init__(self, module: nn.Module, device: torch.device, apart: bool, memory: PinnedMemory) -> None:
        self.module = module
        self.device = device
        self.home: dict[Tensor, Tensor] = {}
        self._apart = apart
        self._memory = memory
        # what the last complete move left on the device (minus which tensors), so that being there already
        # costs nothing; None while a move is under way, and after one that was cut short
        self._there: bool | None = None
        self._left_out = _NOTHING

    def on_device(self, leave_out: frozenset[Tensor] | None = None) -> None:
        """Bring every tensor but `leave_out` to the device."""
        leave_out = _NOTHING if leave_out is None else leave_out
        if self._there is True and self._left_out is leave_out:
            return
        self._there = None
        for tensor in self._tensors():
            if tensor not in leave_out and self._is_home(tensor):
                # a blocking copy: whoever changes the home's owner next need not ask whether it is done
                tensor.data = self._home_of(tensor).to(self.device, copy=True)
        self._there = True
        self._left_out = leave_out

    def to_host(self) -> None:
        """Leave the device."""
        if not self._apart or self._there is False:
            return
        self._there = None
        for tensor in self._tensors():
            if not self._is_home(tensor):
                tensor.data = self._home_of(tensor)
        self._there = False

    def is_on_device(self) -> bool:
        """Whether every tensor is there."""
        return not any(self._is_home(tensor) for tensor in self._tensors())

    def retake(self) -> None:
        """Its tensors are others now: forget where those that are gone have their home."""
        self._there = None
        for tensor in self.home.keys() - set(tensors_of(self.module)):
            self._memory.unlock(self.home.pop(tensor))

    def _tensors(self) -> list[Tensor]:
        # weights that this process does not have are nowhere and stay there
        return [tensor for tensor in tensors_of(self.module) if not tensor.is_meta]

    def _is_home(self, tensor: Tensor) -> bool:
        if self.device != HOME:
            return tensor.device == HOME
        return self._apart and tensor in self.home and tensor.data_ptr() == self.home[tensor].data_ptr()

    def _home_of(self, tensor: Tensor) -> Tensor:
        if tensor not in self.home:
            home = tensor.data if tensor.device == HOME != self.device else tensor.data.to(HOME, copy=True)
            self.home[tensor] = home.contiguous()
            self._memory.lock(self.home[tensor])
        return self.home[tensor]


@dataclass(frozen=True)
class _Place:
    """Where a tensor lies in its block's buffer."""

    tensor: Tensor
    start: int
    shape: torch.Size
    dtype: torch.dtype

    def view(self, buffer: Tensor) -> Tensor:
        """This tensor inside `buffer` [bytes] uint8."""
        size = self.shape.numel() * self.dtype.itemsize
        return buffer[self.start : self.start + size].view(self.dtype).view(self.shape)


class BlockPrefetcher:
    """A network's blocks, each on the device while it is its turn: iterate over it in place of the blocks.

    Every block's tensors lie in one buffer in main memory, so that a block is one copy. Two slots on the
    device take turns: while block i computes from one, block i + 1 is copied into the other on a stream of
    its own, ordered by events.

    Args:
        blocks: in the order in which they run.
        device: where they run. On the CPU the slots are copied as well, so that this very path is what tests
            run.
        memory: locks the buffers.
        home: tensor -> its home; entries of the blocks are replaced by views of the buffers.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        device: torch.device,
        memory: PinnedMemory,
        home: dict[Tensor, Tensor],
    ) -> None:
        self.blocks = list(blocks)
        self.device = device
        self._places: list[list[_Place]] = []
        self._buffers: list[Tensor] = []
        for block in self.blocks:
            self._collect(block, memory, home)
        self.tensors = frozenset(place.tensor for places in self._places for place in places)
        self._slots: list[Tensor] = []
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._filled: list[torch.cuda.Event] = []
        self._freed: list[torch.cuda.Event] = []

    def __len__(self) -> int:
        return len(self.blocks)

    def __iter__(self) -> Iterator[nn.Module]:
        self._make_slots()
        self._fill(0)
        for index, block in enumerate(self.blocks):
            if index + 1 < len(self.blocks):
                self._fill(index + 1)
            self._enter(index)
            try:
                yield block
            finally:
                self._leave(index)

    def release(self) -> None:
        """Give the slots' memory back."""
        if self._side is not None:
            # a copy that nobody waited for (a forward that raised) must not land in memory that others hold
            # by then
            torch.cuda.current_stream(self.device).wait_stream(self._side)
        self._slots = []
        self._filled = []
        self._freed = []

    def unlock(self, memory: PinnedMemory) -> None:
        """Give the slots back, and unlock the buffers; tensors lie in them still."""
        self.release()
        for buffer in self._buffers:
            memory.unlock(buffer)

    def _collect(self, block: nn.Module, memory: PinnedMemory, home: dict[Tensor, Tensor]) -> None:
        places = []
        end = 0
        for tensor in tensors_of(block):
            places.append(_Place(tensor, end, tensor.shape, tensor.dtype))
            end += -(-tensor.numel() * tensor.element_size() // _ALIGNMENT) * _ALIGNMENT
        buffer = torch.empty(end, dtype=torch.uint8, device=HOME)
        for place in places:
            place.view(buffer).copy_(home.pop(place.tensor, place.tensor.data))
            home[place.tensor] = place.tensor.data = place.view(buffer)
        memory.lock(buffer)
        self._places.append(places)
        self._buffers.append(buffer)

    def _make_slots(self) -> None:
        if self._slots:
            return
        size = max(buffer.numel() for buffer in self._buffers)
        self._slots = [torch.empty(size, dtype=torch.uint8, device=self.device) for _ in range(2)]
        if self._side is not None:
            self._filled = [torch.cuda.Event() for _ in range(2)]
            self._freed = [torch.cuda.Event() for _ in range(2)]
            for event in self._freed:
                event.record(torch.cuda.current_stream(self.device))

    def _fill(self, index: int) -> None:
        buffer = self._buffers[index]
        slot = self._slots[index % 2]
        if self._side is None:
            slot[: buffer.numel()].copy_(buffer)
            return
        with torch.cuda.stream(self._side):
            self._side.wait_event(self._freed[index % 2])
            slot[: buffer.numel()].copy_(buffer, non_blocking=True)
            self._filled[index % 2].record(self._side)

    def _enter(self, index: int) -> None:
        if self._side is not None:
            torch.cuda.current_stream(self.device).wait_event(self._filled[index % 2])
        for place in self._places[index]:
            place.tensor.data = place.view(self._slots[index % 2])

    def _leave(self, index: int) -> None:
        for place in self._places[index]:
            place.tensor.data = place.view(self._buffers[index])
        if self._side is not None and self._freed:
            self._freed[index % 2].record(torch.cuda.current_stream(self.device))


@dataclass(frozen=True)
class OffloadPart:
    """A network that moves as a whole, or block by block.

    Attributes:
        module: wherever its weights lie now.
        kind: "encoder", "denoiser" or "decoder".
        blocks: that a denoiser's forward runs one after the other.
    """

    module: nn.Module
    kind: str
    blocks: Sequence[nn.Module] = ()


class OffloadManager:
    """Keeps on the device what the memory level allows.

    Args:
        device: where networks run.
        parts: the networks, by name.
        level: 0 to 4; may be set again at any time between two uses.
        apart: whether home and device are two memories; None: unless the device is the CPU. True on a CPU
            moves weights between two places in main memory, which serves tests alone.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        parts: Mapping[str, OffloadPart],
        level: int = 0,
        apart: bool | None = None,
    ) -> None:
        self.device = device
        apart = device != HOME if apart is None else apart
        self._memory = PinnedMemory(device)
        self._parts = {
            name: OffloadedModule(part.module, device, apart, self._memory) for name, part in parts.items()
        }
        self._blocks = {name: part.blocks for name, part in parts.items() if part.kind == "denoiser"}
        self._kinds = {name: part.kind for name, part in parts.items()}
        self._encoders = {name for name, part in parts.items() if part.kind == "encoder"}
        self._decoders = {name for name, part in parts.items() if part.kind == "decoder"}
        self._streams: dict[str, BlockPrefetcher] = {}
        self._level = level
        self.set_level(level)

    @property
    def level(self) -> int:
        """The memory level."""
        return self._level

    def set_level(self, level: int) -> None:
        """Enter a level: what it does not allow leaves the device at once."""
        if not 0 <= level <= TOP_LEVEL:
            raise ValueError(f"memory level {level}: use 0 to {TOP_LEVEL}")
        self._level = level
        if level >= 2:
            self._send_home(self._encoders)
        if level >= 3:
            self._send_home(set(self._parts) - self._decoders)
        if level < TOP_LEVEL:
            self._stop_streams()

    def use(self, name: str) -> None:
        """Make the part ready to run. At level 4 an expert's blocks stay home: see `prefetched_blocks`."""
        self._send_home(set(self._parts) - {name} - self._companions(name))
        if self._level == TOP_LEVEL and name in self._blocks:
            self._parts[name].on_device(leave_out=self._stream(name).tensors)
        else:
            self._parts[name].on_device()

    def place(self) -> None:
        """Bring what the level keeps on the device there (all below level 2), ready for the first task."""
        for name, part in self._parts.items():
            if self._level < 2 or (self._level == 2 and name not in self._encoders):
                part.on_device()

    def prefetched_blocks(self, name: str) -> BlockPrefetcher | None:
        """At level 4 the expert's blocks as a stream; below it None (the network's own blocks are there)."""
        return self._stream(name) if self._level == TOP_LEVEL else None

    def offload_all(self) -> None:
        """Send everything home; the next `use` brings back what it needs."""
        self._send_home(set(self._parts))

    def on_device(self) -> set[str]:
        """Names of the parts with all of their weights on the device."""
        return {name for name, part in self._parts.items() if part.is_on_device()}

    def part_bytes(self) -> dict[str, tuple[str, int]]:
        """Kind of each part, and size of its weights."""
        return {name: (self._kinds[name], bytes_of(part.module)) for name, part in self._parts.items()}

    def largest_block_bytes(self) -> int:
        """Size of the largest block."""
        return max((bytes_of(block) for blocks in self._blocks.values() for block in blocks), default=0)

    def copies(self, name: str, tensor: Tensor) -> list[Tensor]:
        """Wherever the values of a part's tensor lie between two uses: on the device, at home, or both."""
        home = self._parts[name].home.get(tensor)
        here = tensor.data
        return [here] if home is None or home.data_ptr() == here.data_ptr() else [here, home]

    def retake(self, name: str) -> None:
        """A part has other tensors than before; to be told between two uses."""
        if (stream := self._streams.pop(name, None)) is not None:
            stream.unlock(self._memory)
        self._parts[name].retake()

    def close(self) -> None:
        """Unlock main memory and drop the slots."""
        self._stop_streams()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self._memory.release()

    def _companions(self, name: str) -> set[str]:
        """Parts that may stay on the device while `name` runs."""
        if self._level < 2:
            return set(self._parts)
        if self._level == 2:
            return set(self._parts) - self._encoders
        return self._decoders if name in self._blocks else set()

    def _send_home(self, names: set[str]) -> None:
        for name in names:
            self._parts[name].to_host()
            if name in self._streams:
                self._streams[name].release()

    def _stream(self, name: str) -> BlockPrefetcher:
        if name not in self._streams:
            part = self._parts[name]
            part.to_host()
            self._streams[name] = BlockPrefetcher(self._blocks[name], self.device, self._memory, part.home)
        return self._streams[name]

    def _stop_streams(self) -> None:
        for stream in self._streams.values():
            stream.release()
