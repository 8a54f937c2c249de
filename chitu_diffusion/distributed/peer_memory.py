"""Memory of other GPUs and numbers to wait for, of ranks on one machine: CUDA's own means, through its driver
library.

An arena is shared by CUDA's inter-process handles and written by copies from GPU to GPU, over NVLink where
there is any. The numbers lie in host memory that all ranks map and register: a GPU raises and awaits them as
a stream operation (CUDA driver API, "Stream Memory Operations"), 6 us from one H200 to another, as with
numbers in GPU memory; and the host can raise them as well, whatever the GPU is stuck in, which is how
`release` sets a rank free. On two H200 a rank whose peer was killed in the middle of its exchanges ended in
order, naming it.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import secrets
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from chitu_diffusion.distributed.host import machine_id

_LINE = 64
"""Bytes from one number to the next: a cache line each."""
_ARRIVED, _READ, _QUEUED, _SENT = range(4)
"""Kinds of numbers: two that peers raise, and two between this rank's own streams, in place of events, which
cost the host several times as much."""
_NUMBERS = 1 << 32
_AHEAD = 1 << 30
"""Numbers are compared modulo 2^32, by their signed difference: so far ahead, nothing waits."""
_OUT_OF_MEMORY = 2
_TRIAL = 1 << 16
_TRIAL_SECONDS = 5.0
_RELEASED_EVERY = 0.01
_GIVEN_UP = "given up"


class PeerMemoryError(RuntimeError):
    """What CUDA or the system refused."""


class CudaPeerMemory:
    """See `p2p_collectives.PeerMemory`. `open_peer_memory` makes them.

    Args:
        index, size: of this rank in its group.
        device: of this rank.
        store: of the group alone; its ranks meet there.
        timeout: seconds for a meeting.

    Attributes:
        held: bytes of this GPU's memory, which torch does not know of.

    Raises:
        OSError: no driver.
    """

    def __init__(
        self, index: int, size: int, device: torch.device, store: dist.Store, timeout: float
    ) -> None:
        self.index = index
        self.size = size
        self._device = device
        self._store = store
        self._timeout = timeout
        self._cuda = _driver()
        self._side = torch.cuda.Stream(device, priority=-1)
        self._place = torch.cuda._utils._get_device_index(device)
        self._meetings = 0
        self._latest = 0
        self._forks = 0
        self._sends = 0
        self._awaited: dict[tuple[int, int], int] = {}
        self._seen: tuple[int, ...] = ()
        self._moved = time.monotonic()
        self.held = 0
        self._own: int | None = None
        self._theirs: dict[int, int] = {}
        self._released = threading.Event()
        self._gone = threading.Event()
        self._flags: ctypes.Array[ctypes.c_uint32] | None = None
        self._flags_at = 0

    # -- what `p2p_collectives.PeerMemory` says

    def resize(self, size: int) -> Tensor | None:
        torch.cuda.synchronize(self._device)
        self._close()
        self.meet(None)  # nobody maps our memory, or writes there
        self._free()
        if not all(self.meet(self._allocate(size))):
            self._free()
            return None
        handles = self.meet(self._handle())
        opened = self._open(handles)
        if not all(self.meet(opened)):
            self._close()
            self.meet(None)
            self._free()
            return None
        assert self._own is not None
        return torch.as_tensor(_Raw(self._own, size), device=self._device)

    def fork(self) -> None:
        self._forks += 1
        self._signal(self._main(), _QUEUED, self.index, self._forks)
        self._await(self._side.cuda_stream, _QUEUED, self.index, self._forks)

    def wait_read(self, peer: int, number: int) -> None:
        self._await(self._side.cuda_stream, _READ, peer, number)

    def copy(self, x: Tensor, peer: int, offset: int) -> None:
        assert x.is_contiguous()
        size = x.numel() * x.element_size()
        _check(
            self._cuda.cuMemcpyAsync(self._theirs[peer] + offset, x.data_ptr(), size, self._side.cuda_stream),
            "a copy",
        )

    def signal_arrived(self, peer: int, number: int) -> None:
        self._signal(self._side.cuda_stream, _ARRIVED, peer, number)

    def sent(self) -> Callable[[], None]:
        self._sends += 1
        number = self._sends
        self._signal(self._side.cuda_stream, _SENT, self.index, number)
        return lambda: self._await(self._main(), _SENT, self.index, number)

    def wait_arrived(self, peer: int, number: int) -> None:
        self._await(self._main(), _ARRIVED, peer, number)

    def signal_read(self, peer: int, number: int) -> None:
        self._signal(self._main(), _READ, peer, number)

    def waiting(self) -> float:
        """See `PeerMemory`; from another thread."""
        if self._flags is None:
            return 0.0
        awaited = dict(self._awaited)
        seen = tuple(self._number(kind, source) for kind, source in awaited)
        # compared as the GPU does it, see `_AHEAD`
        missing = ((number - found) % _NUMBERS for number, found in zip(awaited.values(), seen, strict=True))
        under_way = any(0 < steps < _NUMBERS // 2 for steps in missing)
        if seen != self._seen or not under_way:
            self._seen = seen
            self._moved = time.monotonic()
        return time.monotonic() - self._moved

    def release(self) -> None:
        """See `PeerMemory`. Peers that do not know yet may still put numbers back, so it is done again and
        again until `detach`.
        """
        if not self._released.is_set():
            self._released.set()
            threading.Thread(target=self._keep_released, name="chitu-release", daemon=True).start()

    # -- beginning and end

    def detach(self) -> None:
        """Let go of the others' memory. Ours stays until `free`, for they may not have let go of it."""
        if self._gone.is_set():
            return
        # a device in error, which whoever used it has heard of; here nothing must stop the end
        with suppress(RuntimeError):
            torch.cuda.synchronize(self._device)
            self._close()
        self._gone.set()
        with suppress(RuntimeError):
            self._unmap()

    def free(self) -> None:
        """After every peer's `detach`: give our memory back."""
        self._free()

    def meet(self, value: Any, timeout: float | None = None) -> list[Any]:
        """Everyone's value, JSON, by index; all come.

        Args:
            value: ours.
            timeout: seconds, where it is not the usual.

        Raises:
            PeerMemoryError: one did not come in time or said that it will not, or `release` was called
                meanwhile.
        """
        timeout = self._timeout if timeout is None else timeout
        self._meetings += 1
        began = time.monotonic()
        self._store.set(f"{self._meetings}/{self.index}", json.dumps(value))
        keys = [f"{self._meetings}/{index}" for index in range(self.size)]
        while not self._store.check(keys):
            if self._store.check([_GIVEN_UP]):
                raise PeerMemoryError(self._store.get(_GIVEN_UP).decode())
            if self._released.is_set() and not self._gone.is_set():
                raise PeerMemoryError("cut short")
            if time.monotonic() - began > timeout:
                raise PeerMemoryError(f"a rank of the group did not come within {timeout:g} s")
            time.sleep(0.001)
        return [json.loads(self._store.get(key)) for key in keys]

    def map_numbers(self) -> None:
        """Make the numbers on the first peer, and find them from the others. All come.

        Raises:
            PeerMemoryError: not here, or not there.
        """
        with ExitStack() as files:
            problem = None
            place = self.meet(self._new_numbers(files))[0]
            try:
                self._find_numbers(place, files)
            except (OSError, PeerMemoryError) as error:
                problem = str(error)
            problems = self.meet(problem)  # until here the first one's file must be open
        if any(problems):
            raise PeerMemoryError(next(problem for problem in problems if problem))

    def trial(self) -> None:
        """Send random bytes round and look whether they come, before anything relies on it. All come.

        Raises:
            PeerMemoryError: they do not, here or there.
        """
        arena = self.resize(_TRIAL * self.size)
        if arena is None:
            raise PeerMemoryError("the GPUs do not reach each other's memory")
        x = torch.randint(256, (_TRIAL,), dtype=torch.uint8, device=self._device)
        sums = self.meet(int(x.long().sum()))
        self.fork()
        for peer in self._others():
            self.copy(x, peer, self.index * _TRIAL)
            self.signal_arrived(peer, 1)
        for peer in self._others():
            self.wait_arrived(peer, 1)
        self.sent()()
        event = torch.cuda.current_stream(self._device).record_event()
        began = time.monotonic()
        while not event.query() and time.monotonic() - began < _TRIAL_SECONDS:
            time.sleep(0.001)
        if not event.query():
            self.release()
            raise PeerMemoryError("a copy from GPU to GPU did not arrive")
        found = [int(part.long().sum()) for part in arena.split(_TRIAL)]
        if not all(self.meet(all(found[peer] == sums[peer] for peer in self._others()))):
            raise PeerMemoryError("a copy from GPU to GPU brought something else")
        torch.cuda.synchronize(self._device)
        self._set_numbers(0)  # everyone's copies are here
        self._forks = 0
        self._sends = 0
        self._awaited.clear()
        self.meet(None)

    # -- within

    def _new_numbers(self, files: ExitStack) -> dict[str, Any] | None:
        """On the first peer: memory for all numbers, and where the others find it."""
        if self.index != 0:
            return None
        # in no folder, and gone with the last process that has it
        file = os.memfd_create("chitu-numbers")
        token = secrets.token_hex(16)
        files.callback(os.close, file)
        os.ftruncate(file, _numbers_size(self.size))
        os.pwrite(file, token.encode(), _numbers_size(self.size) - len(token))
        return {"machine": machine_id(), "process": os.getpid(), "file": file, "token": token}

    def _find_numbers(self, place: dict[str, Any], files: ExitStack) -> None:
        size = _numbers_size(self.size)
        token = place["token"].encode()
        file = place["file"]
        if place["machine"] is None or place["machine"] != machine_id():
            raise PeerMemoryError("not all ranks of the group are on one machine")
        if self.index != 0:
            file = os.open(f"/proc/{place['process']}/fd/{file}", os.O_RDWR)
            files.callback(os.close, file)
        if os.pread(file, len(token), size - len(token)) != token:
            raise PeerMemoryError("the first rank's memory cannot be found")
        self._flags = (ctypes.c_uint32 * (size // 4)).from_buffer(mmap.mmap(file, size))
        self._register(ctypes.addressof(self._flags), size)

    def _others(self) -> list[int]:
        return [peer for peer in range(self.size) if peer != self.index]

    def _call(self, name: str, *given: object) -> None:
        _check(getattr(self._cuda, name)(*given), name)

    def _main(self) -> int:
        """The stream on which the caller computes, as the driver knows it."""
        return int(torch._C._cuda_getCurrentRawStream(self._place))

    def _await(self, stream: int, kind: int, source: int, number: int) -> None:
        self._latest = max(self._latest, number)
        self._awaited[kind, source] = number
        # 0: until the number there is this one or a later one
        at = self._number_at(kind, self.index, source)
        _check(self._cuda.cuStreamWaitValue32_v2(stream, at, number % _NUMBERS, 0), "waiting for a number")

    def _signal(self, stream: int, kind: int, to: int, number: int) -> None:
        # 0: after everything that the stream wrote before
        at = self._number_at(kind, to, self.index)
        _check(self._cuda.cuStreamWriteValue32_v2(stream, at, number % _NUMBERS, 0), "raising a number")

    def _number(self, kind: int, source: int) -> int:
        """What has been told to this rank."""
        assert self._flags is not None
        return self._flags[(self._number_at(kind, self.index, source) - self._flags_at) // 4]

    def _number_at(self, kind: int, to: int, source: int) -> int:
        return self._flags_at + ((kind * self.size + to) * self.size + source) * _LINE

    def _keep_released(self) -> None:
        while not self._gone.wait(_RELEASED_EVERY):
            self._set_numbers(self._latest + _AHEAD)

    def _set_numbers(self, number: int) -> None:
        """What this rank's streams wait for."""
        for kind in (_ARRIVED, _READ, _QUEUED, _SENT):
            for source in range(self.size):
                if self._flags is not None:
                    self._flags[(self._number_at(kind, self.index, source) - self._flags_at) // 4] = (
                        number % _NUMBERS
                    )

    def _allocate(self, size: int) -> bool:
        found = ctypes.c_uint64()
        with torch.cuda.device(self._device):
            code = self._cuda.cuMemAlloc_v2(ctypes.byref(found), ctypes.c_size_t(size))
            if code == _OUT_OF_MEMORY:
                torch.cuda.empty_cache()  # torch may hold what it does not use
                code = self._cuda.cuMemAlloc_v2(ctypes.byref(found), ctypes.c_size_t(size))
        self._own, self.held = (None, 0) if code else (found.value, size)
        return code == 0

    def _handle(self) -> str | None:
        assert self._own is not None
        handle = _Handle()
        code = self._cuda.cuIpcGetMemHandle(ctypes.byref(handle), ctypes.c_uint64(self._own))
        return None if code else bytes(handle).hex()

    def _open(self, handles: list[str | None]) -> bool:
        for peer in self._others():
            text = handles[peer]
            found = ctypes.c_uint64()
            if text is None:
                return False
            handle = _Handle.from_buffer_copy(bytes.fromhex(text))
            with torch.cuda.device(self._device):
                # 1: the GPUs may have to be introduced to each other
                if self._cuda.cuIpcOpenMemHandle_v2(ctypes.byref(found), handle, ctypes.c_uint(1)):
                    return False
            self._theirs[peer] = found.value
        return True

    def _close(self) -> None:
        with torch.cuda.device(self._device):
            for pointer in self._theirs.values():
                # refused, it stays mapped until the process ends
                self._cuda.cuIpcCloseMemHandle(ctypes.c_uint64(pointer))
        self._theirs = {}

    def _free(self) -> None:
        if self._own is not None:
            own = self._own
            self._own = None
            self.held = 0
            with torch.cuda.device(self._device):
                self._call("cuMemFree_v2", ctypes.c_uint64(own))

    def _register(self, address: int, size: int) -> None:
        found = ctypes.c_uint64()
        with torch.cuda.device(self._device):
            # 3: known to all contexts, and mapped
            self._call(
                "cuMemHostRegister_v2", ctypes.c_void_p(address), ctypes.c_size_t(size), ctypes.c_uint(3)
            )
            self._call(
                "cuMemHostGetDevicePointer_v2",
                ctypes.byref(found),
                ctypes.c_void_p(address),
                ctypes.c_uint(0),
            )
        self._flags_at = found.value

    def _unmap(self) -> None:
        if self._flags is not None and self._flags_at:
            with torch.cuda.device(self._device):
                self._cuda.cuMemHostUnregister(ctypes.c_void_p(ctypes.addressof(self._flags)))


def open_peer_memory(
    index: int,
    size: int,
    device: torch.device,
    store: dist.Store,
    timeout: float,
    hold: Callable[[CudaPeerMemory], None] = lambda memory: None,
    broken: Callable[[], str | None] = lambda: None,
) -> tuple[CudaPeerMemory | None, str | None]:
    """Peer memory between the ranks of a group that has been tried; or None, and why, on all of them. All
    come.

    Args:
        index, size: of this rank in its group.
        device: of this rank.
        store: of the group alone.
        timeout: seconds for each meeting.
        hold: is given the memory before they wait for anything: whoever cuts this short releases them, and
            detaches them.
        broken: why this was cut short; None as long as it was not.

    Raises:
        PeerMemoryError: this was cut short, or a rank did not come in time.
    """
    memory = None
    problem = None
    try:
        memory = CudaPeerMemory(index, size, device, store, timeout)
        hold(memory)
        memory.map_numbers()
        memory.trial()
    except (OSError, AttributeError, RuntimeError) as error:
        problem = str(error) or type(error).__name__
        store.set(_GIVEN_UP, problem)  # whoever waits for us goes on at once
    store.set(f"opened/{index}", json.dumps(problem))
    keys = [f"opened/{peer}" for peer in range(size)]
    began = time.monotonic()
    while not store.check(keys):
        if broken() is not None:
            raise PeerMemoryError(broken())
        if time.monotonic() - began > timeout:
            raise PeerMemoryError(f"a rank of the group did not come within {timeout:g} s")
        time.sleep(0.001)
    problems = [json.loads(store.get(key)) for key in keys]
    if not any(problems):
        return memory, None
    if memory is not None:
        # the trial's few bytes stay with the process, for another rank may not have let go of them
        memory.detach()
    return None, next(problem for problem in problems if problem)


class _Handle(ctypes.Structure):
    """CUDA's name of an allocation, for other processes."""

    _fields_ = (("bytes", ctypes.c_ubyte * 64),)


class _Raw:
    """Memory at an address, as torch takes it."""

    def __init__(self, address: int, size: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (size,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }


def _numbers_size(size: int) -> int:
    """Bytes of the four tables of numbers and a line more, in whole pages."""
    page = mmap.PAGESIZE
    return -(-(4 * size * size + 1) * _LINE // page) * page


def _check(code: int, what: str) -> None:
    if code:
        raise PeerMemoryError(f"{what}: CUDA error {code}")


def _driver() -> ctypes.CDLL:
    """CUDA's driver library.

    Raises:
        OSError: there is none.
    """
    driver = ctypes.CDLL("libcuda.so.1")
    # of those that are called for every exchange; named here, their arguments can be plain numbers
    driver.cuMemcpyAsync.argtypes = [ctypes.c_uint64, ctypes.c_uint64, ctypes.c_size_t, ctypes.c_void_p]
    for operation in (driver.cuStreamWaitValue32_v2, driver.cuStreamWriteValue32_v2):
        operation.argtypes = [ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint]
    return driver
