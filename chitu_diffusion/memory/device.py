"""How much memory a device has, how to let go of what nobody uses, and what running out of it looks like."""

from __future__ import annotations

import gc

import torch

from chitu_diffusion.memory.control_groups import main_memory, resident_memory
from chitu_diffusion.memory.offload import TOP_LEVEL

_CPU_COMPLAINTS = (
    "DefaultCPUAllocator",
    "CUDA out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on the device or in main memory."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    # the CPU allocator and the CUDA libraries have no class of their own for it
    return isinstance(error, RuntimeError) and any(complaint in str(error) for complaint in _CPU_COMPLAINTS)


def empty_cache(device: torch.device) -> None:
    """Let go of what nobody uses: Python's cycles and the device's cached blocks."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


def top_useful_level(device: torch.device) -> int:
    """The last memory level that saves anything: on a CPU, where home is the device, only tiling helps."""
    return TOP_LEVEL if device.type == "cuda" else 1


def total_memory(device: torch.device) -> int:
    """Bytes of memory that the device has in all; for the CPU, main memory or the container's limit."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return main_memory().total


def usable_memory(device: torch.device) -> int:
    """Bytes that this process may have in all: of a GPU all, for running out of it is survived; of the
    CPU what is free, and what this process has already.
    """
    if device.type == "cuda":
        return total_memory(device)
    here = main_memory()
    return min(here.total, here.free + resident_memory())
