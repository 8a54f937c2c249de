"""The page's face of the pipeline: stages by hand, a task unit by unit, and single forwards.

A `Generator` holds nothing of any task that does not follow from the task itself, so that another one, on
another backend, can take it over at any step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from chitu_diffusion.backend import DiffusionBackend
from chitu_diffusion.errors import UsageError
from chitu_diffusion.pipelines import stages
from chitu_diffusion.pipelines.conditioning import PreparedConditioning
from chitu_diffusion.pipelines.denoising import Probe, cached_predictor, denoise, predict_velocity, predictor
from chitu_diffusion.pipelines.encoding import encode_text
from chitu_diffusion.pipelines.finite_check import FiniteCheck
from chitu_diffusion.pipelines.guidance import active_branches, apply_cfg, expert_at
from chitu_diffusion.pipelines.request import guidance_pair
from chitu_diffusion.task import DiffusionTask, Progress, TaskStatus


class Generator:
    """Runs tasks on a backend's networks; make as many as you like.

    Args:
        backend: lends the networks.
        probe: is told of every forward of a task, for measurements.
    """

    def __init__(self, backend: DiffusionBackend, probe: Probe | None = None) -> None:
        self.backend = backend
        self.stages = stages.Stages(backend, probe)

    def encode_text(self, prompt: str | list[str]) -> Tensor:
        """Text embeddings [B, seq_len, hidden] of a prompt (B = 1) or of several; rank 0 encodes for all."""
        return encode_text(self.backend, [prompt] if isinstance(prompt, str) else list(prompt))

    @torch.no_grad()
    def denoise_loop(
        self,
        latent: Tensor,
        embeddings: Tensor,
        num_steps: int = 50,
        guidance_scale: float | tuple[float, float] = 7.0,
        seed: int = 0,
    ) -> Tensor:
        """Denoise a latent in one go.

        Args:
            latent: [B, C, T, H, W], noise (see `sampling.noise.initial_noise`).
            embeddings: [2, L, D], the prompt's branch, then the negative one; or [1, L, D], and then the
                model's own negative prompt is the other branch.
            num_steps: denoising steps.
            guidance_scale: at most 1 runs the prompt's branch alone; a pair is (high noise, low noise).
            seed: of fresh noise, for a sampler that takes some.

        Returns:
            [B, C, T, H, W] float32, on the backend's device.

        Raises:
            NonFiniteError: NaN or Inf appeared.
        """
        scales = guidance_pair(guidance_scale)
        if max(scales) > 1 and embeddings.shape[0] == 1:
            negative = self.encode_text(self.backend.spec.defaults.negative_prompt)
            embeddings = torch.cat([embeddings.to(negative.device), negative])
        text = PreparedConditioning(embeddings.to(self.backend.device))
        latent = latent.to(self.backend.device, torch.float32)
        state = self.backend.sampler.begin(num_steps, seed=seed)
        predict = predictor(self.backend, text, num_steps)
        for step in denoise(self.backend, latent, state, scales, predict):
            latent = step.latent
        return latent

    def decode_vae(self, latent: Tensor) -> Tensor:
        """Latent [B, C, T, H, W] -> video frames [B, T', 3, H', W'], float32 in [0, 1]."""
        return stages.decode(self.backend, latent)

    def decode_vae_tiled(self, latent: Tensor, tile_size: int = 8) -> Tensor:
        """`decode_vae` in tiles of `tile_size` latent pixels, equal up to rounding: less memory, more
        time.
        """
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
        return self.stages.advance(task)

    def generate_multi_stage(self, task: DiffusionTask) -> Progress:
        """Run a task of several stages to its end: a cascade of sizes, or two experts over one latent.

        Returns:
            the last event.

        Raises:
            UsageError: the task has one stage and one transformer; `generate_step` is for these.
        """
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
        if task.status is TaskStatus.FINISHED:
            return 1.0
        return task.current_step / max(task.num_inference_steps, 1)

    def check_nan(self, tensor: Tensor, name: str) -> None:
        """Raise if a tensor holds NaN or Inf. One device sync.

        Raises:
            NonFiniteError (a ValueError): "NaN detected in NAME", or "Inf ...".
        """
        FiniteCheck(tensor, name).require()

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
        at = torch.as_tensor(timestep).reshape(-1)[0]
        text = embeddings.to(self.backend.device)
        return predict_velocity(self.backend, latent, text, at, expert=self._expert_at(at))

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
        at = torch.as_tensor(timestep).reshape(-1)[0]
        expert = self._expert_at(at)
        scale = self.backend.spec.defaults.guidance[expert] if guidance_scale is None else guidance_scale
        text = embeddings.to(self.backend.device)
        branches = active_branches(scale)
        velocity = predict_velocity(self.backend, latent, text, at, expert=expert, branches=branches)
        return apply_cfg(velocity, scale)

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
        at = torch.as_tensor(timestep).reshape(-1)[0]
        text = PreparedConditioning(embeddings.to(self.backend.device))
        predict = cached_predictor(self.backend, text, step_idx)
        return predict(latent, at, self._expert_at(at) if expert is None else expert, tuple(range(len(text))))

    def _expert_at(self, timestep: Tensor) -> int:
        return expert_at(timestep, self.backend.spec.boundary)
