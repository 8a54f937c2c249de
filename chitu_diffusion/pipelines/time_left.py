"""What a task has still to do, unit by unit, and how long that takes on this machine.

In this order counts what is known of a unit: others of its kind in this task (but the first, which compiles
and warms up), the paces that this machine remembers of its size, the task's steps of other kinds and sizes,
paces of other sizes, a first guess. Knows
requests, models by their configs, and plans of step caches; no networks. Imports no torch, so that
`--dry-run` can ask it.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePath
from types import MappingProxyType
from typing import TYPE_CHECKING

from chitu_diffusion.attn_schedule import AttnSchedule
from chitu_diffusion.config import cache_dir
from chitu_diffusion.errors import UsageError
from chitu_diffusion.flexcache.registry import parse_strategy
from chitu_diffusion.flexcache.schedule import Schedule
from chitu_diffusion.flexcache.strategy import Plan
from chitu_diffusion.pipelines.guidance import active_branches, expert_at
from chitu_diffusion.pipelines.paces import Paces, Unit
from chitu_diffusion.pipelines.request import computed_frames, guidance_pair, stages_of, steps_of
from chitu_diffusion.task import DiffusionTask, DiffusionUserParams, TaskStatus

if TYPE_CHECKING:
    from chitu_diffusion.backend import DiffusionBackend
    from chitu_diffusion.config import InferSettings
    from chitu_diffusion.models.spec import ModelSpec

_FIRST_GUESS: Mapping[str, Mapping[str, float]] = MappingProxyType(
    {
        "cpu": {"encoding": 2.6e-11, "denoising": 2.6e-11, "decoding": 9e-5, "saving": 2e-7},
        "cuda": {"encoding": 1e-14, "denoising": 3.5e-15, "decoding": 2.5e-8, "saving": 1e-7},
    }
)
"""Seconds for each unit of work before anything was measured, of two CPU cores and of one H200; a decoding's
is that of Wan's own VAE.
"""
_TEXT_LAYERS = 280
"""Multiply-adds of UMT5 for each token, in units of its width squared: 24 layers of attention and gated
feed-forward."""
_SLOWER = (0.1, 10.0)
"""How much slower than expected a machine is taken to be, at least and at most."""


def setup_of(
    infer: InferSettings, model: str, world: int, device: str, dtype: str, threads: int | None
) -> str:
    """What paces depend on beside the unit, in words.

    Args:
        world: ranks that share the work.
        device, dtype, threads: as they are, or as the settings say; the others are taken from these.
    """
    words = [model, device, dtype, f"{threads} threads", f"{world} ranks", f"attention {infer.attn_type}"]
    words += [f"memory level {infer.diffusion.low_mem_level}"]
    words += [infer.quant, "fused" if infer.fused else "not fused", "compiled" if infer.compile else ""]
    return ", ".join(word for word in words if word)


def units_of(
    spec: ModelSpec,
    resolved: DiffusionUserParams,
    infer: InferSettings,
    *,
    plan: Plan | None = None,
    experts: Sequence[int] = (),
) -> list[Unit]:
    """All units of a resolved request, in their order.

    Args:
        plan: of its cache, where it is known; None takes what follows from the number of steps alone.
        experts: of each step, where they are known.
    """
    steps = steps_of(resolved)
    late = AttnSchedule.from_text(infer.attn_schedule)
    late_from = steps if late is None else late.begins(steps) or 0
    fp8_from = steps if infer.quant == "none" else round(infer.quant_from * steps)
    strategy = None if resolved.flexcache is None else parse_strategy(resolved.flexcache)[1]
    if strategy is not None and plan is None:
        try:
            plan = strategy.plan(Schedule.bare(steps))
        except UsageError:
            plan = None  # it needs a network or a calibration: the first step makes it
    scales = guidance_pair(resolved.guidance_scale)
    units = [_encoding(spec, resolved)]
    for stage in stages_of(resolved):
        whole = _operations(spec, computed_frames(resolved, spec), stage.height, stage.width)
        for _ in range(stage.num_inference_steps):
            step = len(units) - 1
            expert = experts[step] if step < len(experts) else stage.expert or 0
            branches = len(active_branches(scales[expert]))
            actions = {
                level: found[step]
                for level, found in (plan or {}).items()
                if step < len(found) and found[step] != "compute"
            }
            words = ["denoising", *(f"{level}={action}" for level, action in actions.items())]
            words += [late.kernel] if late is not None and step >= late_from else []
            words += ["fp8"] if step >= fp8_from else []
            share = 1.0 if strategy is None else strategy.work_left(actions)
            units.append(Unit(" ".join(words), branches * whole, share))
    pixels = float((resolved.num_frames or 1) * (resolved.height or 1) * (resolved.width or 1))
    form = "memory" if resolved.save_path is None else PurePath(resolved.save_path).suffix.lower() or "folder"
    return [*units, Unit("decoding", pixels), Unit(f"saving {form}", pixels)]


def _encoding(spec: ModelSpec, resolved: DiffusionUserParams) -> Unit:
    text = 2.0 * spec.text_tokens * _TEXT_LAYERS * spec.text_dim**2
    given = (
        "" if resolved.image is None and resolved.video is None else " image" if resolved.image else " video"
    )
    given = " control" if spec.kind.takes_control else given
    return Unit(f"encoding{given}", text)


def _operations(spec: ModelSpec, frames: int, height: int, width: int) -> float:
    """Multiply-adds of one branch's forward: products with weights, and attention."""
    config = spec.transformers[0]
    tokens = spec.tokens(frames, height, width)
    weights = 6 * config.dim**2 + 2 * config.dim * config.ffn_dim
    layers = config.num_layers + len(config.vace_layers or ())
    return float(layers * tokens * (weights + 2 * tokens * config.dim))


class TaskTimes:
    """What the units of one task took in this process, and what others of it will take.

    Args:
        paces: what this machine remembers.
        device: "cpu" or "cuda", for the first guess.
        decoder_cost: as `LatentGeometry`'s, likewise.
    """

    def __init__(self, paces: Paces, device: str, decoder_cost: float = 1.0) -> None:
        self._paces = paces
        self._guess = dict(_FIRST_GUESS[device])
        self._guess["decoding"] *= decoder_cost
        self._taken: dict[Unit, list[float]] = {}
        self._waiting: Unit | None = None

    def add(self, unit: Unit, seconds: float, *, is_pending: bool = False) -> None:
        """A unit was done.

        Args:
            is_pending: the device still works on it, and what was waited for is the unit before.
        """
        done = [each for each in (self._waiting, None if is_pending else unit) if each is not None]
        self._waiting = unit if is_pending else None
        whole = sum(each.work * each.share for each in done)
        for each in done:
            self._taken.setdefault(each, []).append(seconds * each.work * each.share / whole)

    def left(self, units: Sequence[Unit]) -> float:
        """Seconds of units that come, and of the one on which the device still works."""
        waiting = [] if self._waiting is None else [self._waiting]
        return sum(count * self._seconds(unit) for unit, count in Counter([*waiting, *units]).items())

    def is_measured(self, units: Sequence[Unit]) -> bool:
        """Whether this machine remembers units of each kind and about this size."""
        return all(self._paces.seconds_near(unit) is not None for unit in set(units))

    def remember(self) -> None:
        """Tell the paces what was measured, and keep them."""
        for unit, taken in self._taken.items():
            self._paces.add(unit, _mean(taken[1:] or taken))
        self._paces.save()

    def _seconds(self, unit: Unit) -> float:
        taken = self._taken.get(unit, [])
        if len(taken) > 1:
            return _mean(taken[1:])
        if (remembered := self._paces.seconds_near(unit)) is not None:
            expected = remembered * self._slower(self._paces.seconds_near)
            # what is remembered may be of a busy hour, and no later step takes longer than the first
            return min(expected, taken[0]) if taken else expected
        steady = {each: found[1:] for each, found in self._taken.items() if found[1:]}
        alike = {each: found for each, found in steady.items() if each.kind == unit.kind}
        if taken and not alike:
            return taken[0]
        steps = {
            each: found
            for each, found in (alike or steady or self._taken).items()
            if each.stage == "denoising" == unit.stage
        }
        if steps:
            work = sum(len(found) * each.work * each.share for each, found in steps.items())
            return sum(map(sum, steps.values())) / work * unit.work * unit.share
        remembered = self._paces.seconds(unit)  # of another size
        return self._guessed(unit) * self._slower(self._guessed) if remembered is None else remembered

    def _guessed(self, unit: Unit) -> float:
        return self._guess[unit.stage] * unit.work * unit.share

    def _slower(self, expected: Callable[[Unit], float | None]) -> float:
        """How much slower this task's steps are than was expected of them; 1 before a second one."""
        took = 0.0
        hoped = 0.0
        for unit, taken in self._taken.items():
            each = expected(unit) if unit.stage == "denoising" and len(taken) > 1 else None
            if each is not None:
                took += sum(taken[1:])
                hoped += each * len(taken[1:])
        return min(max(took / hoped, _SLOWER[0]), _SLOWER[1]) if hoped else 1.0


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


class TimeLeft:
    """The times of tasks that run on a backend."""

    def __init__(self, backend: DiffusionBackend) -> None:
        self._backend = backend
        self._paces: Paces | None = None
        self._tasks: weakref.WeakKeyDictionary[DiffusionTask, TaskTimes] = weakref.WeakKeyDictionary()
        self._units: weakref.WeakKeyDictionary[DiffusionTask, list[Unit]] = weakref.WeakKeyDictionary()

    def after(
        self, task: DiffusionTask, stage: TaskStatus, step: int, seconds: float, *, is_pending: bool
    ) -> float | None:
        """Seconds until a task ends, after one of its units; None where it has ended.

        Args:
            stage, step: of the unit; steps of the whole task, from 0.
            seconds: that it took.
            is_pending: see `TaskTimes.add`.
        """
        if task.resolved is None or task.status in (TaskStatus.FAILED, TaskStatus.CANCELLED):
            return None
        if task not in self._units or task.status is TaskStatus.DENOISING:
            self._units[task] = self._units_of(task, task.resolved)
        units = self._units[task]
        places = {
            TaskStatus.ENCODING: 0,
            TaskStatus.DENOISING: 1 + step,
            TaskStatus.DECODING: len(units) - 2,
            TaskStatus.SAVING: len(units) - 1,
        }
        if task not in self._tasks:
            geometry = self._backend.spec.geometry
            self._paces = self._paces or self._paces_here()
            self._tasks[task] = TaskTimes(self._paces, self._backend.device.type, geometry.decoder_cost)
        times = self._tasks[task]
        times.add(units[places[stage]], seconds, is_pending=is_pending)
        if not task.is_finished():
            return times.left(units[places[stage] + 1 :])
        if self._backend.groups.rank == 0:
            times.remember()
        return None

    def _units_of(self, task: DiffusionTask, resolved: DiffusionUserParams) -> list[Unit]:
        spec = self._backend.spec
        cache = task.buffer.cache
        state = task.buffer.sampler
        switches = spec.boundary is not None and not resolved.cascade
        timesteps = state["timesteps"] if state is not None and switches else ()
        experts = [expert_at(timestep, spec.boundary) for timestep in timesteps]
        plan = None if cache is None else cache["plan"]
        return units_of(spec, resolved, self._backend.args.infer, plan=plan, experts=experts)

    def _paces_here(self) -> Paces:
        import torch

        backend = self._backend
        infer = backend.args.infer
        about = (infer, backend.spec.name, backend.groups.plan.world)
        on_gpu = backend.device.type == "cuda"
        device = torch.cuda.get_device_name(backend.device) if on_gpu else backend.device.type
        dtype = str(backend.dtype).removeprefix("torch.")
        here = setup_of(*about, device, dtype, torch.get_num_threads())
        return Paces(cache_dir(), here, setup_of(*about, infer.device, infer.dtype, infer.threads))
