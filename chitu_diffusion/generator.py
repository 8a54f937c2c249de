"""The page's face of the pipeline: stages by hand, a task unit by unit, and single forwards.

A `Generator` holds nothing of any task that does not follow from the task itself, so that another one, on
another backend, can take it over at any step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from chitu_diffusion.backend import DiffusionBackend
from chitu_diffusion.errors import UsageError, names_checked, require_kind
from chitu_diffusion.pipelines import page_inputs, stages
from chitu_diffusion.pipelines.conditioning import PreparedConditioning
from chitu_diffusion.pipelines.denoising import Probe, cached_predictor, denoise, predict_velocity, predictor
from chitu_diffusion.pipelines.encoding import encode_text
from chitu_diffusion.pipelines.finite_check import FiniteCheck
from chitu_diffusion.pipelines.guidance import active_branches, apply_cfg
from chitu_diffusion.pipelines.loop_start import Beginning, start_of_loop
from chitu_diffusion.pipelines.page_inputs import Embeddings, Guidance, ModelChoice, Timestep, forward_inputs
from chitu_diffusion.task import DiffusionTask, Progress, TaskStatus


@names_checked
class Generator:
    """Runs tasks on a backend's networks; make as many as you like.

    Args:
        backend: lends the networks.
        probe: is told of every forward of a task, for measurements.
    """

    def __init__(self, backend: DiffusionBackend, probe: Probe | None = None) -> None:
        require_kind("backend", backend, DiffusionBackend, "DiffusionBackend(args)")
        self.backend = backend
        self.stages = stages.Stages(backend, probe)

    def encode_text(self, prompt: str | list[str]) -> Tensor:
        """Text embeddings [B, seq_len, hidden] of a prompt (B = 1) or of several; rank 0 encodes for all."""
        return encode_text(self.backend, page_inputs.read_prompts(prompt))

    @torch.no_grad()
    def denoise_loop(
        self,
        latent: Tensor | None = None,
        embeddings: Embeddings | None = None,
        num_steps: int = 50,
        guidance_scale: Guidance = 7.0,
        *,
        model: ModelChoice = None,
        resolution: tuple[int, int] | None = None,
        init_latent: Tensor | None = None,
        num_frames: int | None = None,
        strength: float | None = None,
        seed: int = 0,
    ) -> Tensor:
        """Denoise a latent in one go.

        Args:
            latent: [B, C, T, H, W], noise (see `sampling.noise.initial_noise`). None draws it from `seed`, or
                begins with `init_latent`.
            embeddings: [2, L, D], the prompt's branch, then the negative one; or [1, L, D], and then the
                model's own negative prompt is the other branch. None is the empty prompt. An image-to-video
                model wants `Conditioning(text, concat_latents)`, or with `first_frame`.
            num_steps: denoising steps.
            guidance_scale: at most 1 runs the prompt's branch alone; a pair is (high noise, low noise); None
                is the model's own.
            model: one of `backend.model_pool`, or its index, for all steps; None leaves it to the timestep.
            resolution: (height, width) in pixels, multiples of 8. What the network computes is padded up to
                whole patches; what was asked for is cut out. None is the model's own, or `init_latent`'s.
            init_latent: [B, C, T, H, W], clean; brought to `resolution` and noised again, to be refined.
            num_frames: 4n + 1; None is the model's own, or `init_latent`'s.
            strength: share of the noise schedule that an `init_latent` goes through, 0.01 to 1; None is 0.5.
            seed: of the noise that is drawn here: with `init_latent` that of a cascade's second stage.

        Returns:
            [B, C, T, H, W] float32, on the backend's device.

        Raises:
            UsageError: a value that cannot be, or two that exclude each other.
            NonFiniteError: NaN or Inf appeared.
        """
        asked = Beginning(latent, init_latent, resolution, num_frames, strength, seed)
        start = start_of_loop(self.backend, asked, embeddings, num_steps, guidance_scale, model)
        latent = start.latent
        predict = predictor(self.backend, start.text, num_steps)
        for step in denoise(self.backend, latent, start.state, start.scales, predict, expert=start.expert):
            latent = step.latent
        return start.cut(start.text.composed(latent))

    def upsample(self, latent: Tensor, scale: float = 2) -> Tensor:
        """Latent [B, C, T, H, W] at `scale` times its rows and columns, bicubic by frame; float32."""
        return page_inputs.upsampled(latent, scale, self.backend.spec)

    def decode_vae(self, latent: Tensor) -> Tensor:
        """Latent [B, C, T, H, W] -> video frames [B, T', 3, H', W'], float32 in [0, 1]."""
        self.check_nan(page_inputs.check_latent(latent, self.backend.spec), "latent")
        return stages.decode(self.backend, latent)

    def decode_vae_tiled(self, latent: Tensor, tile_size: int = 8) -> Tensor:
        """`decode_vae` in tiles of `tile_size` latent pixels, equal up to rounding; less memory, slower."""
        tile_size = page_inputs.require_integer("tile_size", tile_size, 1, 1024)
        self.check_nan(page_inputs.check_latent(latent, self.backend.spec), "latent")
        return stages.decode_tiled(self.backend, latent, tile_size)

    @torch.no_grad()
    def generate_step(self, task: DiffusionTask) -> Progress:
        """Advance a task by one work unit.

        A unit that raises ends the task as failed, with a `StageError` in `task.error`, and the event says
        so. Running out of memory, and whatever is not an `Exception` (Ctrl+C), is raised, and leaves the task
        as it was before the unit: call again, here or on another generator. Before it is raised, the networks
        leave the device, so that there is room for whatever comes next; they come back by themselves.

        Raises:
            UsageError: the backend is terminated.
            torch.OutOfMemoryError, MemoryError, RuntimeError: memory ran out.
        """
        return self.stages.advance(page_inputs.check_task(task))

    def generate_multi_stage(self, task: DiffusionTask) -> Progress:
        """Run a task of several stages, a cascade of sizes or two experts, to its end; gives the last event.

        Raises:
            UsageError: the task has one stage and one transformer; `generate_step` is for these.
        """
        page_inputs.check_task(task)
        if not task.params.cascade and len(self.backend.model_pool) == 1:
            raise UsageError(
                f"task {task.task_id} has one stage and {self.backend.spec.name} one transformer; set "
                "cascade in its parameters, or call generate_step(task) until it is finished",
                field="cascade",
            )
        while not task.is_finished():
            self.generate_step(task)
        return self.generate_step(task)

    def get_progress(self, task: DiffusionTask) -> float:
        """Share of the denoising steps that are done, 0.0 to 1.0; 1.0 for a finished task."""
        if page_inputs.check_task(task).status is TaskStatus.FINISHED:
            return 1.0
        return task.current_step / max(task.num_inference_steps, 1)

    def check_nan(self, tensor: Tensor, name: str) -> None:
        """Raise NonFiniteError (a ValueError), "NaN detected in NAME", for NaN or Inf. One device sync."""
        FiniteCheck(page_inputs.check_values(tensor, name), name).require()

    @torch.no_grad()
    def forward_with_cp(self, latent: Tensor, embeddings: Embeddings, timestep: Timestep) -> Tensor:
        """Velocity [branches * B, C, T, H, W] with the sequence spread over the ranks: the same on each, of
        which each has an even share of the tokens (on one rank: all), whatever frames they lie in.

        Args:
            latent: [B, C, T, H, W].
            embeddings: [branches, L, D].
            timestep: 0 to 1000: a number, a scalar or [1].
        """
        latent, text, at, expert = forward_inputs(self.backend, latent, embeddings, timestep)
        return predict_velocity(self.backend, latent, text, at, expert=expert)

    @torch.no_grad()
    def forward_with_cfg_parallel(
        self, latent: Tensor, embeddings: Embeddings, timestep: Timestep, guidance_scale: Guidance = None
    ) -> Tensor:
        """Guided velocity [B, C, T, H, W] float32 with one branch a rank; where the layout has no two, each
        runs both.

        Args:
            latent, timestep: as for `forward_with_cp`.
            embeddings, guidance_scale: as for `denoise_loop`; None is the model's own scale.
        """
        latent, text, at, expert = forward_inputs(self.backend, latent, embeddings, timestep)
        scale = page_inputs.read_guidance(guidance_scale, self.backend.spec)[expert]
        text = page_inputs.guided(self.backend, text, scale)
        branches = active_branches(scale)
        velocity = predict_velocity(self.backend, latent, text, at, expert=expert, branches=branches)
        return apply_cfg(velocity, scale)

    @torch.no_grad()
    def forward_with_cache(
        self,
        latent: Tensor,
        embeddings: Embeddings,
        timestep: Timestep,
        step_idx: int,
        model: ModelChoice = None,
    ) -> Tensor:
        """Velocity [branches * B, C, T, H, W], with whatever the bound task's cache saves.

        Args:
            latent, embeddings, timestep: as for `forward_with_cp`.
            step_idx: step of the task that `flexcache_manager` is bound to; unbound, nothing is reused.
            model: as for `denoise_loop`.
        """
        latent, text, at, expert = forward_inputs(self.backend, latent, embeddings, timestep, model)
        ready = PreparedConditioning(text, self.backend.device)
        predict = cached_predictor(self.backend, ready, step_idx, self.backend.flexcache_manager.num_steps)
        return predict(latent, at, expert, tuple(range(len(ready))))
