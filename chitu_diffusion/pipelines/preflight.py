"""What a run would find of its settings, its model and its machine before its first unit, told without
reading a weight: device, dtype, kernel, memory, files, and whether each request can be done. Makes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from chitu_diffusion.attention import candidates
from chitu_diffusion.backend import DiffusionBackend
from chitu_diffusion.config import EngineConfig
from chitu_diffusion.distributed.plan import ParallelPlan
from chitu_diffusion.distributed.process_groups import ProcessGroups
from chitu_diffusion.errors import ChituError
from chitu_diffusion.memory.control_groups import main_memory
from chitu_diffusion.memory.device import total_memory
from chitu_diffusion.models.loading import check_folder
from chitu_diffusion.models.registry import FoundModel
from chitu_diffusion.pipelines.admission import Admission
from chitu_diffusion.pipelines.request_notes import request_notes
from chitu_diffusion.task import DiffusionTask


@dataclass(frozen=True)
class Memory:
    """Bytes at the worst moment of a request, and of what there is.

    Attributes:
        level: the memory level that it comes to.
        device, device_free, device_total: of the device.
        host, host_free: of main memory; on a CPU, of that same memory.
    """

    level: int
    device: int
    device_free: int
    device_total: int
    host: int
    host_free: int


@dataclass(frozen=True)
class Outlook:
    """What becomes of one request.

    Attributes:
        notes: what the run would say of it.
        memory: that it needs; None where it is refused.
        problem: by which it is refused; None where it can be done.
    """

    notes: Sequence[str]
    memory: Memory | None
    problem: ChituError | None


@dataclass(frozen=True)
class Preflight:
    """What a run would work with.

    Attributes:
        device, dtype: as they will be.
        attention: the kernel's name, or those that are timed when the first step comes.
        outlooks: of the tasks, by task id.
    """

    device: str
    dtype: str
    attention: str
    outlooks: Mapping[str, Outlook]


def preflight(
    config: EngineConfig, model: FoundModel, tasks: Sequence[DiffusionTask], layout: ParallelPlan | None
) -> Preflight:
    """Look ahead.

    Args:
        config: the settings.
        model: of `resolve_model`.
        tasks: resolved or not.
        layout: of the ranks; None for one.

    Raises:
        UsageError: settings that this machine or this model cannot follow.
        ModelError: the model is not here, or its files do not hold what its configs say.
    """
    backend = DiffusionBackend.without_weights(config, model, ProcessGroups(layout))
    try:
        check_folder(model.required())
        admission = Admission(backend)
        return Preflight(
            str(backend.device),
            str(backend.dtype).removeprefix("torch."),
            _attention(backend),
            {task.task_id: _outlook(backend, admission, task) for task in tasks},
        )
    finally:
        backend.terminate()


def _attention(backend: DiffusionBackend) -> str:
    head_dim = backend.spec.transformers[0].attention_head_dim
    ring = backend.groups.plan.ring > 1
    timed = candidates(backend.device, backend.dtype, head_dim, for_ring=ring)
    automatic = backend.args.infer.attn_type == "auto" and len(timed) > 1
    return (
        f"the fastest of {', '.join(each.name for each in timed)}" if automatic else backend.attn_backend.name
    )


def _outlook(backend: DiffusionBackend, admission: Admission, task: DiffusionTask) -> Outlook:
    try:
        admission.admit(task)
    except ChituError as error:
        return Outlook((), None, error)
    assert task.resolved is not None
    memory = _memory(backend, admission, task)
    notes = request_notes(task.params, task.resolved, backend.spec, backend.text_encoder)
    asked = backend.args.infer.diffusion.low_mem_level
    if memory.level > asked:
        notes.append(f"at memory level {asked} it does not fit; the level rises to {memory.level}")
    if memory.device > memory.device_free or memory.host > memory.host_free:
        notes.append("less memory is free than it is thought to need, so that it may run out")
    return Outlook(notes, memory, None)


def _memory(backend: DiffusionBackend, admission: Admission, task: DiffusionTask) -> Memory:
    """At the first level from the one that is asked for at which it fits, or at the highest."""
    assert task.resolved is not None
    host = main_memory()
    on_gpu = backend.device.type == "cuda"
    free, total = (
        torch.cuda.mem_get_info(backend.device) if on_gpu else (host.free, total_memory(backend.device))
    )
    level = backend.low_mem_level
    while True:
        on_device, at_home = admission.bytes_needed(task.resolved, level)
        if on_device <= free or level >= admission.top_level:
            return Memory(level, on_device, free, total, at_home if on_gpu else on_device, host.free)
        level += 1
