"""From a task to a video, one unit at a time.

A unit is the encoding of the text, one denoising step, the decoding, or the saving. A `Generator` holds
nothing of any task: `generate_step` is a function of the backend's networks and the task's own state,
computes the unit's results first and puts them into the task last, so that a unit that was cut short (out of
memory, Ctrl+C) can be run again, by this generator or another. It knows stages, guidance and experts; not
queues, retries or command lines.
"""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from types import MappingProxyType

import torch
from torch import Tensor

from chitu_diffusion.backend import DiffusionBackend
from chitu_diffusion.distributed.sharding import broadcast_from_rank0, gather_strips
from chitu_diffusion.errors import NonFiniteError, StageError, TaskError, UsageError, without_frames
from chitu_diffusion.flexcache.manager import fork
from chitu_diffusion.flexcache.registry import parse_flexcache
from chitu_diffusion.media.video import write_video
from chitu_diffusion.memory.device import is_out_of_memory
from chitu_diffusion.memory.offload import TEXT_ENCODER, VAE
from chitu_diffusion.pipelines import denoising
from chitu_diffusion.pipelines.recipe import recipe_of
from chitu_diffusion.pipelines.request import guidance_pair, resolve_request, stages_of
from chitu_diffusion.sampling.solvers import SamplerState, initial_noise, upsample_latent
from chitu_diffusion.task import CascadeStage, DiffusionTask, DiffusionUserParams, Progress, TaskStatus

logger = logging.getLogger(__name__)

_TILE_SIZES = (32, 16, 8)
"""Latent pixels: the largest that still cuts a latent in more than one tile is taken, for larger tiles waste
less overlap.
"""


class Generator:
    """Runs tasks on a backend's networks. Holds no state of any task; make as many as you like.

    Args:
        backend: lends the networks.
    """

    def __init__(self, backend: DiffusionBackend) -> None:
        self.backend = backend
        self._stages: Mapping[TaskStatus, Callable[[DiffusionTask], str | None]] = MappingProxyType(
            {
                TaskStatus.ENCODING: self._encode,
                TaskStatus.DENOISING: self._denoise,
                TaskStatus.DECODING: self._decode,
                TaskStatus.SAVING: self._save,
            }
        )

    # -- the stages by hand

    @torch.no_grad()
    def encode_text(self, prompt: str | list[str]) -> Tensor:
        """Text embeddings [B, seq_len, hidden] of a prompt (B = 1) or of several; rank 0 encodes for all.

        What was encoded before is remembered by its content, the negative prompt first of all; then nothing
        is run or moved. Autocast is off here: T5's activations do not fit float16's range.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)

        def encode() -> Tensor:
            encoder, device = self.backend.text_encoder, self.backend.device
            known = encoder.recall(prompts, device)
            if known is not None:
                return known
            self.backend.offload.use(TEXT_ENCODER)
            with torch.autocast(device_type=device.type, enabled=False):
                return encoder.encode(prompts)

        return broadcast_from_rank0(encode, self.backend.groups.world, self.backend.device)

    @torch.no_grad()
    def denoise_loop(
        self,
        latent: Tensor,
        embeddings: Tensor,
        num_steps: int = 50,
        guidance_scale: float | tuple[float, float] = 7.0,
    ) -> Tensor:
        """Denoise a latent in one go.

        Args:
            latent: [B, C, T, H, W], noise (see `sampling.initial_noise`).
            embeddings: [2, L, D], the prompt's branch, then the negative one; or [1, L, D], and then the
                model's own negative prompt is the other branch.
            num_steps: denoising steps.
            guidance_scale: at most 1 runs the prompt's branch alone; a pair is (high noise, low noise).

        Returns:
            [B, C, T, H, W] float32, on the backend's device.

        Raises:
            NonFiniteError: NaN or Inf appeared.
        """
        scales = guidance_pair(guidance_scale)
        if max(scales) > 1 and embeddings.shape[0] == 1:
            negative = self.encode_text(self.backend.spec.defaults.negative_prompt)
            embeddings = torch.cat([embeddings.to(negative.device), negative])
        embeddings, latent = embeddings.to(self.backend.device), latent.to(self.backend.device, torch.float32)
        sampler, text = self.backend.sampler, denoising.TaskText(embeddings)
        state = sampler.begin(num_steps)
        check: FiniteCheck | None = None
        while not sampler.is_done(state):
            timestep = sampler.timestep(state)
            expert = self._expert_at(timestep)
            asked = denoising.active_branches(scales[expert])
            velocity = denoising.predict_velocity(
                self.backend, latent, text, timestep, expert=expert, branches=asked
            )
            latent, state = sampler.step(state, denoising.apply_cfg(velocity, scales[expert]), latent)
            before, check = check, FiniteCheck(latent, "latent")
            if before is not None:
                before.require()
        if check is not None:
            check.require()
        return latent

    @torch.no_grad()
    def decode_vae(self, latent: Tensor) -> Tensor:
        """Latent [B, C, T, H, W] -> video frames [B, T', 3, H', W'], float32 in [0, 1]."""
        self.backend.offload.use(VAE)
        return self.backend.vae.decode(latent.to(self.backend.device))

    @torch.no_grad()
    def decode_vae_tiled(self, latent: Tensor, tile_size: int = 8) -> Tensor:
        """`decode_vae` in tiles of `tile_size` latent pixels, equal up to rounding: less memory, more
        time.
        """
        self.backend.offload.use(VAE)
        return self.backend.vae.decode_tiled(latent.to(self.backend.device), tile_size=tile_size)

    @torch.no_grad()
    def decode_vae_shared(self, latent: Tensor) -> Tensor | None:
        """`decode_vae` with each rank decoding a strip of the frame: all of it on rank 0, None on the
        others.
        """
        self.backend.offload.use(VAE)
        latent, vae = latent.to(self.backend.device), self.backend.vae
        axis = -1 if latent.shape[-1] >= latent.shape[-2] else -2
        return gather_strips(
            lambda low, high: vae.decode_strip(latent, low, high, axis),
            latent.shape[axis],
            axis,
            self.backend.groups.world,
        )

    # -- a task, unit by unit

    @torch.no_grad()
    def generate_step(self, task: DiffusionTask) -> Progress:
        """Advance a task by one unit.

        A unit that raises ends the task as failed, with a `StageError` in `task.error`, and the event says
        so. Running out of memory, and whatever is not an `Exception` (Ctrl+C), is raised, and leaves the task
        as it was before the unit: call again, here or on another generator. Before it is raised, the networks
        leave the device, so that there is room for whatever comes next; they come back by themselves.

        Raises:
            UsageError: the backend is terminated.
            torch.OutOfMemoryError, MemoryError, RuntimeError: memory ran out.
        """
        if task.is_finished():
            return self._event(task, task.status, 0.0, None)
        self.backend.require_alive()
        if task.status is TaskStatus.PENDING:
            task.status, task.started_at = TaskStatus.ENCODING, time.time()
        stage, step, began = task.status, task.current_step, time.perf_counter()
        message: str | None = None
        out_of_memory: BaseException | None = None
        try:
            message = self._stages[stage](task)
        except Exception as error:
            if is_out_of_memory(error):
                out_of_memory = without_frames(error)
            else:
                message = self._fail(task, stage, step, error)
        finally:
            self.backend.flexcache_manager.release()
        if out_of_memory is not None:
            # raised outside of the handler and without its frames, which hold the unit's tensors
            task.buffer.text = None  # made anew when it is needed
            self.backend.offload.offload_all()
            raise out_of_memory
        seconds = time.perf_counter() - began
        task.seconds[stage] = task.seconds.get(stage, 0.0) + seconds
        return self._event(task, stage, seconds, message)

    def run(self, task: DiffusionTask) -> Iterator[Progress]:
        """Advance a task to its end; yields one event a unit. Memory running out is raised, as by
        `generate_step`.
        """
        while not task.is_finished():
            yield self.generate_step(task)

    def generate_multi_stage(self, task: DiffusionTask) -> Progress:
        """Run a task of several stages to its end: a cascade of sizes, or two experts over one latent.

        Returns:
            the last event.

        Raises:
            UsageError: the task has one stage and one transformer; `run` is for these.
        """
        if not task.params.cascade and len(self.backend.model_pool) == 1:
            raise UsageError(
                f"task {task.task_id} has one stage and {self.backend.spec.name} one transformer; "
                "set cascade in its parameters, or use run(task)",
                field="cascade",
            )
        event = self._event(task, task.status, 0.0, None)
        for event in self.run(task):
            logger.debug("%s: %s %d/%d", task.task_id, event.stage, event.step, event.total_steps)
        return event

    def get_progress(self, task: DiffusionTask) -> float:
        """Share of the denoising steps that are done, 0.0 to 1.0; 1.0 for a finished task."""
        if task.status is TaskStatus.FINISHED:
            return 1.0
        return task.current_step / max(task.num_inference_steps, 1)

    def check_nan(self, tensor: Tensor, name: str) -> None:
        """Raise if a tensor holds NaN or Inf. One device sync.

        Raises:
            NonFiniteError (a ValueError): "NaN detected in NAME", or "Inf ...".
        """
        FiniteCheck(tensor, name).require()

    # -- forwards of the page

    @torch.no_grad()
    def forward_with_cp(self, latent: Tensor, embeddings: Tensor, timestep: Tensor) -> Tensor:
        """Velocity [branches * B, C, T, H, W] with the sequence spread over the ranks: the same on each of
        them.

        Each rank has an even share of the tokens (on one rank: all), whatever frames they lie in.

        Args:
            latent: [B, C, T, H, W].
            embeddings: [branches, L, D].
            timestep: scalar or [1].
        """
        time = torch.as_tensor(timestep).reshape(-1)[0]
        text = embeddings.to(self.backend.device)
        return denoising.predict_velocity(self.backend, latent, text, time, expert=self._expert_at(time))

    @torch.no_grad()
    def forward_with_cfg_parallel(
        self, latent: Tensor, embeddings: Tensor, timestep: Tensor, guidance_scale: float | None = None
    ) -> Tensor:
        """Guided velocity [B, C, T, H, W] float32 with one branch a rank; where the layout has no two, each
        runs both.

        Args:
            latent: [B, C, T, H, W].
            embeddings: [2, L, D], the prompt's branch first.
            timestep: scalar or [1].
            guidance_scale: None is the model's own.
        """
        time = torch.as_tensor(timestep).reshape(-1)[0]
        expert = self._expert_at(time)
        scale = self.backend.spec.defaults.guidance[expert] if guidance_scale is None else guidance_scale
        text, asked = embeddings.to(self.backend.device), denoising.active_branches(scale)
        velocity = denoising.predict_velocity(self.backend, latent, text, time, expert=expert, branches=asked)
        return denoising.apply_cfg(velocity, scale)

    @torch.no_grad()
    def forward_with_cache(
        self, latent: Tensor, embeddings: Tensor, timestep: Tensor, step_idx: int, expert: int | None = None
    ) -> Tensor:
        """Velocity [branches * B, C, T, H, W], with whatever the bound task's cache saves.

        Args:
            latent: [B, C, T, H, W].
            embeddings: [branches, L, D].
            timestep: scalar or [1].
            step_idx: the step of the task that `flexcache_manager` is bound to, from 0; unbound, nothing is
                reused.
            expert: None leaves it to the timestep.
        """
        time = torch.as_tensor(timestep).reshape(-1)[0]
        expert = self._expert_at(time) if expert is None else expert
        text = denoising.TaskText(embeddings.to(self.backend.device))
        return self._cached_velocity(latent, text, tuple(range(len(text))), time, step_idx, expert)

    def _cached_velocity(
        self,
        latent: Tensor,
        text: denoising.TaskText,
        asked: tuple[int, ...],
        timestep: Tensor,
        step_idx: int,
        expert: int,
    ) -> Tensor:
        manager = self.backend.flexcache_manager

        def compute(branches: tuple[int, ...]) -> Tensor:
            cache_for = partial(manager.cache_for, step_idx)
            return denoising.predict_velocity(
                self.backend, latent, text, timestep, expert=expert, branches=branches, cache_for=cache_for
            )

        return manager.velocity(step_idx, latent, asked, compute)

    # -- the units: each computes first and changes the task last

    def _encode(self, task: DiffusionTask) -> str | None:
        resolved = self.resolve(task)
        cache = parse_flexcache(resolved.flexcache, resolved.num_inference_steps or 0)
        prompts = [resolved.prompt]
        if max(guidance_pair(resolved.guidance_scale)) > 1:
            prompts.append(resolved.negative_prompt or "")
        embeddings = self.encode_text(prompts)
        self.check_nan(embeddings, "text embeddings")
        task.resolved = resolved
        task.num_inference_steps = resolved.num_inference_steps or 0
        task.buffer.embeddings, task.buffer.cache = embeddings, cache
        task.status = TaskStatus.DENOISING
        return f"seed {task.seed}" if task.params.seed is None else None

    def _denoise(self, task: DiffusionTask) -> str | None:
        resolved, buffer, sampler = _resolved(task), task.buffer, self.backend.sampler
        stages = stages_of(resolved)
        stage = stages[task.cascade_stage]
        latent, state = self._position(task, stage)
        timestep = sampler.timestep(state)
        expert = self._expert_at(timestep) if stage.expert is None else stage.expert
        scales = guidance_pair(resolved.guidance_scale)
        scale = scales[expert]
        text = buffer.text or denoising.TaskText(_present(buffer.embeddings).to(self.backend.device))
        asked = denoising.active_branches(scale)[: len(text)]
        # the manager writes into a copy, which becomes the task's only when the unit is done
        cache = None if buffer.cache is None else fork(buffer.cache)
        unplanned = cache is not None and cache["plan"] is None
        schedule = denoising.schedule_of(self.backend, state, scales) if unplanned else None
        self.backend.flexcache_manager.bind(cache, key=[expert, len(asked), *latent.shape], schedule=schedule)
        velocity = self._cached_velocity(latent, text, asked, timestep, task.current_step, expert)
        latent, state = sampler.step(state, denoising.apply_cfg(velocity, scale), latent)
        check, before = FiniteCheck(latent, "latent"), buffer.check
        if before is not None:
            before.require()  # while the device works on this step: see `FiniteCheck`
        pending: FiniteCheck | None = check
        if check.is_known or sampler.is_done(state):
            check.require()
            pending = None
        notes = [f"expert {expert}"] if task.expert is not None and task.expert != expert else []
        notes += [note for note in (self.backend.compile_note(),) if note]
        buffer.latent, buffer.sampler, buffer.cache, buffer.text, task.expert = (
            latent,
            state,
            cache,
            text,
            expert,
        )
        buffer.check = pending
        task.current_step += 1
        if sampler.is_done(state):
            buffer.sampler = None
            task.cascade_stage += 1
            if task.cascade_stage == len(stages):
                task.status = TaskStatus.DECODING
                buffer.embeddings = buffer.cache = buffer.text = None
                if cache is not None:
                    notes.append(
                        f"cache {cache['strategy']} saved work in {cache['reused']} of {cache['num_steps']} "
                        "steps"
                    )
        return "; ".join(notes) or None

    def _position(self, task: DiffusionTask, stage: CascadeStage) -> tuple[Tensor, SamplerState]:
        """The latent and solver state before the coming step; at a stage's first step they are made."""
        sampler, device = self.backend.sampler, self.backend.device
        if task.buffer.sampler is not None:
            return _present(task.buffer.latent).to(device), task.buffer.sampler
        state = sampler.begin(stage.num_inference_steps, stage.strength)
        frames = _resolved(task).num_frames or 1
        shape = (1, *self.backend.spec.geometry.latent_shape(frames, stage.height, stage.width))
        noise = initial_noise(shape, task.seed, stream=task.cascade_stage).to(device)
        if task.cascade_stage == 0:
            return noise, state
        larger = upsample_latent(_present(task.buffer.latent).to(device), shape[-2], shape[-1])
        return sampler.renoise(state, larger, noise), state

    def _decode(self, task: DiffusionTask) -> str | None:
        latent, alone = _present(task.buffer.latent), self.backend.groups.plan.world == 1
        video: Tensor | None = None
        if self.backend.low_mem_level == 0 and not alone:
            video = self.decode_vae_shared(latent)
        elif self.backend.groups.rank == 0:
            tiled = self.backend.low_mem_level >= 1
            video = self.decode_vae_tiled(latent, tile_size_for(latent)) if tiled else self.decode_vae(latent)
        if video is not None:
            self.check_nan(video, "video")
        task.buffer.video, task.buffer.latent = video, None
        task.status = TaskStatus.SAVING
        return None

    def _save(self, task: DiffusionTask) -> str | None:
        """Write the video; rank 0 alone has it."""
        resolved = _resolved(task)
        if self.backend.groups.rank > 0:
            task.buffer.save_path = resolved.save_path
            task.end(TaskStatus.FINISHED)
            return None
        video = _present(task.buffer.video)[0]  # [T, 3, H, W]
        frames = video.mul(255).round_().clamp_(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        path = write_video(
            frames,
            resolved.save_path or "",
            fps=resolved.fps or 1,
            quality=self.backend.args.output.quality,
            recipe=recipe_of(task, self.backend),
        )
        task.buffer.save_path = str(path)
        task.end(TaskStatus.FINISHED)
        return f"saved {path}"

    # -- small parts

    def resolve(self, task: DiffusionTask) -> DiffusionUserParams:
        """The task's request with the model's defaults filled in.

        Raises:
            UsageError: what this model cannot do.
        """
        output_dir = self.backend.args.output.dir
        return resolve_request(
            task.params, self.backend.spec, seed=task.seed, task_id=task.task_id, output_dir=output_dir
        )

    def _expert_at(self, timestep: Tensor) -> int:
        return denoising.expert_at(timestep, self.backend.spec.boundary)

    def _fail(self, task: DiffusionTask, stage: TaskStatus, step: int, error: Exception) -> str:
        logger.debug("task %s failed\n%s", task.task_id, traceback.format_exc())
        failure = StageError(
            str(stage), step if stage is TaskStatus.DENOISING else None, without_frames(error)
        )
        task.end(TaskStatus.FAILED, failure)
        return str(failure)

    def _event(self, task: DiffusionTask, stage: TaskStatus, seconds: float, message: str | None) -> Progress:
        if message is not None:
            task.events.append(message)
        eta = None
        if task.current_step and not task.is_finished():
            pace = task.seconds.get(TaskStatus.DENOISING, 0.0) / task.current_step
            eta = pace * (task.num_inference_steps - task.current_step)
        return Progress(
            task.task_id,
            task.status,
            stage,
            task.current_step,
            task.num_inference_steps,
            seconds,
            eta,
            message,
        )


class FiniteCheck:
    """Whether a tensor is free of NaN and Inf: asked now, answered later.

    On a GPU the answer travels while the device works on, so that whoever asks for it a step later waits for
    that step's end alone and the device never runs empty. On a CPU it is known at once.

    Args:
        tensor: of any shape.
        name: what an error calls it.
    """

    def __init__(self, tensor: Tensor, name: str) -> None:
        self._name = name
        found = torch.stack([torch.isnan(tensor).any(), torch.isinf(tensor).any()])
        self._arrival: torch.cuda.Event | None = None
        if tensor.device.type == "cuda":
            self._found = torch.empty(2, dtype=torch.bool, pin_memory=True).copy_(found, non_blocking=True)
            self._arrival = torch.cuda.Event()
            self._arrival.record(torch.cuda.current_stream(tensor.device))
        else:
            self._found = found

    @property
    def is_known(self) -> bool:
        """Whether the answer is there already."""
        return self._arrival is None

    def require(self) -> None:
        """Wait for the answer.

        Raises:
            NonFiniteError (a ValueError): "NaN detected in NAME", or "Inf ...".
        """
        if self._arrival is not None:
            self._arrival.synchronize()
        nan, inf = self._found.tolist()
        if nan or inf:
            raise NonFiniteError(f"{'NaN' if nan else 'Inf'} detected in {self._name}")


def tile_size_for(latent: Tensor) -> int:
    """Latent pixels of a tile that saves memory on this latent and wastes little overlap."""
    longest = max(latent.shape[-2:])
    return next((size for size in _TILE_SIZES if size < longest), _TILE_SIZES[-1])


def _resolved(task: DiffusionTask) -> DiffusionUserParams:
    if task.resolved is None:
        raise TaskError(f"task {task.task_id} is {task.status} but was never encoded")
    return task.resolved


def _present(tensor: Tensor | None) -> Tensor:
    if tensor is None:
        raise TaskError("a tensor that the stage before leaves in the task's buffer is missing")
    return tensor
