"""The stages of a task: encode the text, denoise by a step, decode, save.

A work unit is one encoding, one denoising step, one decoding or one saving. It computes first and changes the
task last, in one assignment, so that a unit that was cut short (out of memory, Ctrl+C) can be run again, here
or elsewhere. Knows tasks and a backend; not queues, retries or command lines.
"""

from __future__ import annotations

import logging
import time
import traceback
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from chitu_diffusion.adapters.merging import check_adapters
from chitu_diffusion.backend import DiffusionBackend
from chitu_diffusion.errors import StageError, TaskError, without_frames
from chitu_diffusion.files.faults import hit
from chitu_diffusion.flexcache.calibrated import require_same_model
from chitu_diffusion.flexcache.manager import fork
from chitu_diffusion.flexcache.registry import CacheState, parse_flexcache, parse_strategy
from chitu_diffusion.media.video import write_video
from chitu_diffusion.memory.device import is_out_of_memory
from chitu_diffusion.pipelines.conditioning import PreparedConditioning
from chitu_diffusion.pipelines.denoising import Predict, Probe, Step, cached_predictor, denoise, schedule_of
from chitu_diffusion.pipelines.fingerprint import identity_of
from chitu_diffusion.pipelines.finite_check import FiniteCheck
from chitu_diffusion.pipelines.guidance import expert_at
from chitu_diffusion.pipelines.hooks import TaskHooks
from chitu_diffusion.pipelines.recipe import recipe_of
from chitu_diffusion.pipelines.registry import pipeline_of
from chitu_diffusion.pipelines.request import (
    computed_frames,
    guidance_pair,
    resolve_task,
    stages_of,
    steps_of,
)
from chitu_diffusion.pipelines.request_notes import request_notes
from chitu_diffusion.pipelines.same_recipe import require_own_place
from chitu_diffusion.pipelines.text_to_video import TextToVideo
from chitu_diffusion.pipelines.time_left import TimeLeft
from chitu_diffusion.pipelines.vae import decode, decode_shared, decode_tiled
from chitu_diffusion.sampling.library import SamplerState
from chitu_diffusion.sampling.noise import pad_latent, upsample_latent
from chitu_diffusion.task import (
    CascadeStage,
    DiffusionTask,
    DiffusionUserParams,
    Progress,
    TaskBuffer,
    TaskStatus,
)

if TYPE_CHECKING:
    from chitu_diffusion.media.video import Frames

T = TypeVar("T")
logger = logging.getLogger(__name__)


_ENCODED = MappingProxyType(
    {"concat_latents": "image latents", "first_frame": "image latents", "image": "image embeddings"}
    | {"control_latents": "control latents"}
)
"""What errors call the parts of a conditioning beside its text."""


@dataclass
class _Derived:
    """What follows from a running task and does not lie in it: the networks' view of its text, and a check
    whose answer is on its way, with the latent that it is of.
    """

    text: PreparedConditioning
    check: FiniteCheck | None = None
    checked: Callable[[], Tensor | None] = lambda: None


class Stages:
    """Runs work units on a backend's networks.

    What it keeps of a task beside the task itself follows from it, and comes back by itself elsewhere.

    Args:
        backend: lends the networks.
        probe: is told of every forward.
    """

    def __init__(self, backend: DiffusionBackend, probe: Probe | None = None) -> None:
        self._backend = backend
        self._probe = probe
        self.hooks: weakref.WeakKeyDictionary[DiffusionTask, TaskHooks] = weakref.WeakKeyDictionary()
        self._derived: weakref.WeakKeyDictionary[DiffusionTask, _Derived] = weakref.WeakKeyDictionary()
        self._times = TimeLeft(backend)
        self._units: dict[TaskStatus, Callable[[DiffusionTask], str | None]] = {
            TaskStatus.ENCODING: self._encode,
            TaskStatus.DENOISING: self._denoise,
            TaskStatus.DECODING: self._decode,
            TaskStatus.SAVING: self._save,
        }

    @property
    def _pipeline(self) -> TextToVideo:
        return pipeline_of(self._backend.spec)

    def advance(self, task: DiffusionTask) -> Progress:
        """One work unit; see `Generator.generate_step`."""
        if task.is_finished():
            return _event(task, task.status, 0.0, None, None)
        self._backend.require_alive()
        if task.status is TaskStatus.PENDING:
            task.commit(status=self._pipeline.stages[0], started_at=time.time())
        stage = task.status
        step = task.current_step
        began = time.perf_counter()
        message: str | None = None
        out_of_memory: BaseException | None = None
        try:
            message = self._units[stage](task)
        except Exception as error:
            if is_out_of_memory(error):
                out_of_memory = without_frames(error)
            else:
                message = _fail(task, stage, step, error)
        finally:
            self._backend.flexcache_manager.release()
        if out_of_memory is not None:
            # raised outside of the handler and without its frames, which hold the unit's tensors
            self.forget()
            self._backend.offload.offload_all()
            raise out_of_memory
        seconds = time.perf_counter() - began
        task.seconds[stage] = task.seconds.get(stage, 0.0) + seconds
        eta = self._times.after(task, stage, step, seconds, is_pending=self._is_pending(task))
        return _event(task, stage, seconds, message, eta)

    def _is_pending(self, task: DiffusionTask) -> bool:
        """Whether the device still works on a task's last step."""
        derived = self._derived.get(task)
        return derived is not None and derived.check is not None

    def prune(self) -> None:
        """Let go of what is kept of tasks that do not denoise any more, and of hooks of those that ended."""
        for task in [task for task in self._derived if task.status is not TaskStatus.DENOISING]:
            del self._derived[task]
        for task in [task for task in self.hooks if task.is_finished()]:
            del self.hooks[task]

    def forget(self) -> None:
        """Let go of all that is kept: a few megabytes on the device for each task, made anew when needed."""
        self._derived.clear()

    # -- units

    def _encode(self, task: DiffusionTask) -> str | None:
        backend = self._backend
        resolved = resolve_task(task, backend.spec, backend.args.output.dir)
        steps = steps_of(resolved)
        cache = parse_flexcache(resolved.flexcache, steps)
        hit("encode.before")
        conditioning = self._pipeline.condition(backend, resolved)
        hit("encode.after", conditioning.text)
        FiniteCheck(conditioning.text, "text embeddings").require()
        begins = self._pipeline.begins_from(backend, resolved)
        if begins is not None:
            FiniteCheck(begins, "video latents").require()
        for name, what in _ENCODED.items():
            if vars(conditioning)[name] is not None:
                FiniteCheck(vars(conditioning)[name], what).require()
        task.commit(
            resolved=resolved,
            num_inference_steps=steps,
            buffer=replace(task.buffer, conditioning=conditioning, cache=cache, latent=begins),
            status=self._pipeline.after(TaskStatus.ENCODING),
        )
        notes = [f"seed {task.seed}"] if task.params.seed is None else []
        if resolved.strength is not None:
            notes += self._strength_notes(resolved)
        if backend.groups.rank == 0:
            notes += check_adapters(resolved.lora or (), backend.spec.transformers)
            notes += request_notes(task.params, resolved, backend.spec, backend.text_encoder)
        return "; ".join(notes) or None

    def _denoise(self, task: DiffusionTask) -> str | None:
        backend = self._backend
        resolved = _resolved(task)
        buffer = task.buffer
        stages = stages_of(resolved)
        stage = stages[task.cascade_stage]
        scales = guidance_pair(resolved.guidance_scale)
        backend.use_adapters(resolved.lora)
        latent, state = self._position(task, stage)
        derived = self._derived_from(task)
        self._require_calibrated(task)
        # the manager writes into a copy, which becomes the task's only when the unit is done
        cache = None if buffer.cache is None else fork(buffer.cache)
        hit("denoise.before", task.current_step)
        step = next(
            denoise(
                backend,
                latent,
                state,
                scales,
                self._bound(derived.text, cache, state, scales, task.current_step, task.num_inference_steps),
                branches=len(derived.text),
                expert=stage.expert,
                check=self._check_of(derived, buffer.latent),
            )
        )
        hit("denoise.after", task.current_step)
        self._derived[task] = _Derived(derived.text, step.check, weakref.ref(step.latent))
        after = self._latent_after(task, float(state["timesteps"][state["index"]]), step, derived.text)
        notes = [f"expert {step.expert}"] if task.expert is not None and task.expert != step.expert else []
        notes += [note for note in (backend.compile_note(),) if note]
        ended = backend.sampler_for(state["recipe"]).is_done(step.state)
        last = ended and task.cascade_stage + 1 == len(stages)
        if last:
            after = derived.text.composed(after)
        if last and cache is not None:
            saved = f"{cache['reused']} of {cache['num_steps']} steps"
            notes.append(f"cache {cache['strategy']} saved work in {saved}")
        task.commit(
            buffer=TaskBuffer(
                conditioning=None if last else buffer.conditioning,
                latent=after,
                sampler=None if ended else step.state,
                cache=None if last else cache,
            ),
            expert=step.expert,
            current_step=task.current_step + 1,
            cascade_stage=task.cascade_stage + ended,
            status=self._pipeline.after(TaskStatus.DENOISING) if last else TaskStatus.DENOISING,
        )
        self.prune()
        return "; ".join(notes) or None

    def _strength_notes(self, resolved: DiffusionUserParams) -> list[str]:
        """Where a video's noise lies below the first expert's."""
        (stage,) = stages_of(resolved)
        sampler = self._backend.sampler_for(resolved.sampler_recipe)
        state = sampler.begin(stage.num_inference_steps, stage.strength, shift=resolved.shift)
        whole = f"{stage.num_inference_steps} of {resolved.num_inference_steps} steps"
        notes = [
            f"video: strength {resolved.strength:g} takes {whole}, from noise {sampler.sigma(state):.3g}"
        ]
        if sampler.boundary is not None and expert_at(sampler.timestep(state), sampler.boundary) == 1:
            notes.append("the high-noise expert takes no step")
        return notes

    def _require_calibrated(self, task: DiffusionTask) -> None:
        """A plan of steps was measured on this model: asked at each step, for hashing goes on meanwhile."""
        spec = self._backend.spec
        asked = _resolved(task).flexcache
        if asked and spec.calibration is not None and parse_strategy(asked)[0] == "plan":
            require_same_model(spec.calibration, identity_of(self._backend, _resolved(task).lora), spec.name)

    def _latent_after(
        self, task: DiffusionTask, timestep: float, step: Step, text: PreparedConditioning
    ) -> Tensor:
        """A step's latent, or what the task's hook has put into its place."""
        hooks = self.hooks.get(task, TaskHooks())
        world = self._backend.groups.plan.world
        after = hooks.latent_after(
            task, task.current_step, timestep, step.latent, lambda: text.composed(step.clean()), world=world
        )
        if after is not step.latent:
            FiniteCheck(after, "latent").require()
        return after

    def _bound(
        self,
        text: PreparedConditioning,
        cache: CacheState | None,
        state: SamplerState,
        scales: tuple[float, float],
        step_idx: int,
        num_steps: int,
    ) -> Predict:
        """A predictor through the cache manager, which is bound to a task's cache for this step."""
        backend = self._backend
        cached = cached_predictor(backend, text, step_idx, num_steps, self._probe, state)
        unplanned = cache is not None and cache["plan"] is None
        schedule = schedule_of(backend, state, scales) if unplanned else None

        def predict(latent: Tensor, timestep: Tensor, expert: int, branches: tuple[int, ...]) -> Tensor:
            key = [expert, len(branches), *latent.shape]
            backend.flexcache_manager.bind(cache, key=key, schedule=schedule)
            return cached(latent, timestep, expert, branches)

        return predict

    def _derived_from(self, task: DiffusionTask) -> _Derived:
        found = self._derived.get(task)
        if found is None:
            found = _Derived(PreparedConditioning(_present(task.buffer.conditioning), self._backend.device))
        return found

    def _check_of(self, derived: _Derived, latent: Tensor | None) -> FiniteCheck | None:
        """What is still to be answered of a task's latent; asked anew where another one was checked."""
        if latent is None or derived.checked() is latent:
            return derived.check
        return FiniteCheck(latent, "latent")

    def _position(self, task: DiffusionTask, stage: CascadeStage) -> tuple[Tensor, SamplerState]:
        """The latent and solver state before the coming step; at a stage's first step they are made."""
        sampler = self._backend.sampler_for(_resolved(task).sampler_recipe)
        device = self._backend.device
        if task.buffer.sampler is not None:
            return _present(task.buffer.latent).to(device), task.buffer.sampler
        state = sampler.begin(
            stage.num_inference_steps,
            stage.strength,
            seed=task.seed,
            stream=task.cascade_stage,
            shift=_resolved(task).shift,
        )
        spec = self._backend.spec
        frames = computed_frames(_resolved(task), spec)
        shape = (1, *spec.latent_shape(frames, stage.height, stage.width))
        if task.cascade_stage == 0:
            clean = task.buffer.latent
            if clean is None:
                noise = sampler.first_latent(state, shape).to(device)
                hit("noise.after", noise)
                return noise, state
            return sampler.renoise(state, clean.to(device)), state
        before = stages_of(_resolved(task))[task.cascade_stage - 1]
        shown = spec.geometry.latent_shape(frames, before.height, before.width)
        low = _present(task.buffer.latent).to(device)[..., : shown[2], : shown[3]]
        rows, columns = spec.geometry.latent_shape(frames, stage.height, stage.width)[2:]
        larger = pad_latent(upsample_latent(low, rows, columns), shape)
        return sampler.renoise(state, larger), state

    def _decode(self, task: DiffusionTask) -> str | None:
        backend = self._backend
        resolved = _resolved(task)
        references = len(resolved.reference_images or ())
        latent = _present(task.buffer.latent)[:, :, references:]  # whose frames stand before the video's
        video: Tensor | None = None
        hit("decode.before")
        if backend.low_mem_level == 0 and backend.groups.plan.world > 1:
            video = decode_shared(backend, latent)
        elif backend.groups.rank == 0:
            tiled = backend.low_mem_level >= 1
            video = decode_tiled(backend, latent) if tiled else decode(backend, latent)
        if video is not None:
            video = video[..., : resolved.height, : resolved.width]  # of whole patches, what was asked for
            hit("decode.after", video)
            FiniteCheck(video, "video").require()
        # the latent stays until the video stands, for a checkpoint of this stage
        after = self._pipeline.after(TaskStatus.DECODING)
        task.commit(buffer=replace(task.buffer, video=video), status=after)
        return None

    def _save(self, task: DiffusionTask) -> str | None:
        """Hand the video over, and write it where it has a path; rank 0 alone has it."""
        backend = self._backend
        resolved = _resolved(task)
        if backend.groups.rank > 0:
            task.end(TaskStatus.FINISHED, save_path=resolved.save_path)
            return None
        frames = to_frames(_present(task.buffer.video))
        recipe = recipe_of(task, backend)
        hit("save.before")
        self._require_calibrated(task)
        hooks = self.hooks.get(task, TaskHooks())
        if hooks.on_video is not None:
            hooks.on_video(frames, recipe)
        if resolved.save_path is None:
            task.end(TaskStatus.FINISHED)
            return None
        require_own_place(task, resolved.save_path, recipe)
        path = write_video(
            frames,
            resolved.save_path,
            fps=resolved.fps or 1,
            quality=backend.args.output.quality,
            recipe=recipe,
        )
        task.end(TaskStatus.FINISHED, save_path=str(path))
        return f"saved {path}"


def to_frames(video: Tensor) -> Frames:
    """The first video of [B, T, 3, H, W] in [0, 1] as uint8 [T, H, W, 3] in main memory."""
    frames = video[0].mul(255).round_().clamp_(0, 255).to(torch.uint8)
    return frames.permute(0, 2, 3, 1).cpu().numpy()


def _resolved(task: DiffusionTask) -> DiffusionUserParams:
    if task.resolved is None:
        raise TaskError(f"task {task.task_id} is {task.status} but was never encoded")
    return task.resolved


def _present(value: T | None) -> T:
    if value is None:
        raise TaskError("what the stage before leaves in the task's buffer is missing")
    return value


def _fail(task: DiffusionTask, stage: TaskStatus, step: int, error: Exception) -> str:
    logger.debug("task %s failed\n%s", task.task_id, traceback.format_exc())
    failure = StageError(str(stage), step if stage is TaskStatus.DENOISING else None, without_frames(error))
    task.end(TaskStatus.FAILED, failure)
    return str(failure)


def _event(
    task: DiffusionTask, stage: TaskStatus, seconds: float, message: str | None, eta: float | None
) -> Progress:
    if message is not None:
        task.notes.append(message)
    done = task.current_step
    return Progress(task.task_id, task.status, stage, done, task.num_inference_steps, seconds, eta, message)
