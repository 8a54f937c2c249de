"""What a request comes to against the model: refused, or filled in, with its notes, cost and time. Loads no
torch and no weights. Pictures and videos are looked at in another process, see `media_check`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from chitu_diffusion.config import EngineConfig, cache_dir
from chitu_diffusion.errors import UsageError, WillNotFitError, counted, nearest
from chitu_diffusion.flexcache.registry import STRATEGIES
from chitu_diffusion.models.registry import TINY, model_of
from chitu_diffusion.pipelines.paces import Paces
from chitu_diffusion.pipelines.request import check_cache, guidance_pair, resolve_task, steps_of
from chitu_diffusion.pipelines.time_left import TaskTimes, setup_of, units_of
from chitu_diffusion.service.answers import rate_number
from chitu_diffusion.service.dialect import Upload, VideoRequest
from chitu_diffusion.service.jobs import NewJob, WorkerInfo
from chitu_diffusion.service.media_check import checked_media
from chitu_diffusion.service.settings import ServiceConfig
from chitu_diffusion.task import DiffusionTask, DiffusionUserParams
from chitu_diffusion.task.lora import shipped_adapters

_SEED_BITS = 31
"""Of a seed that is drawn: JavaScript and 32-bit clients can repeat it."""
_NVIDIA = Path("/proc/driver/nvidia")


@dataclasses.dataclass(frozen=True)
class Planned:
    """A request that the model can do."""

    params: DiffusionUserParams
    resolved: DiffusionUserParams
    notes: tuple[str, ...]
    tokens: int
    steps: int

    @property
    def cost(self) -> float:
        """Tokens times steps."""
        return float(self.tokens * self.steps)


class Planner:
    """Requests against one model.

    Args:
        engine: names the model, and how it runs.

    Raises:
        ModelError: there is none.
    """

    def __init__(self, engine: EngineConfig, service: ServiceConfig) -> None:
        self.engine = engine
        model = model_of(engine.models)
        model.required()
        self.spec = model.spec.with_sampler(engine.infer.sampler)
        self._loras = None if service.loras is None else Path(service.loras).absolute()
        self._scrubbed = [str(Path(service.data).absolute()), *([str(self._loras)] if self._loras else [])]
        infer = engine.infer
        # torch, which would know, takes longer to import than the whole front
        on_gpu = infer.device.startswith("cuda") or (infer.device == "auto" and _NVIDIA.exists())
        self._device = "cuda" if on_gpu else "cpu"
        ranks = max(1, service.gpus_per_worker)
        self._setup = setup_of(infer, self.spec.name, ranks, infer.device, infer.dtype, infer.threads)

    @property
    def model(self) -> str:
        """What workers are asked for."""
        return self.engine.models.name

    @property
    def models(self) -> tuple[str, ...]:
        """The names that requests may call it by."""
        return tuple(dict.fromkeys((self.spec.name, *self.spec.hub_ids, self.model)))

    def plan(self, request: VideoRequest, uploads: Mapping[str, Upload]) -> Planned:
        """Check and fill in.

        Args:
            uploads: by the field: image, last_image, video, or input_reference for whichever it is.

        Raises:
            UsageError: what cannot be, naming the field; no path stands in it.
        """
        try:
            return self._plan(request, uploads)
        except (UsageError, WillNotFitError) as error:
            said = str(error)
            for place in self._scrubbed:
                said = said.replace(f"{place}/", "")
            error.args = (said,)
            raise

    def _plan(self, request: VideoRequest, uploads: Mapping[str, Upload]) -> Planned:
        if request.model is not None and request.model not in self.models:
            raise UsageError(
                f"model = {request.model!r:.200}: this server has another."
                f"{nearest(request.model, self.models)}",
                field="model",
            )
        notes = list(request.notes)
        fields = dict(request.fields) | self._media(uploads)
        if request.loras:
            fields["lora"] = [self._lora(*each) for each in request.loras]
        if request.seconds is not None:
            fields["num_frames"] = self._frames(request.seconds, fields.get("fps"), notes)
        if fields.get("seed") is None:
            fields["seed"] = secrets.randbits(_SEED_BITS)
        if "width" in fields and "height" in fields:
            self._check_multiple(int(fields["width"]), int(fields["height"]))
        params = DiffusionUserParams.from_mapping(fields)
        resolved = resolve_task(DiffusionTask.from_user_request(params), self.spec, None)
        item = 4 if self.engine.infer.dtype == "float32" else 2
        check_cache(resolved, self.spec, item, self.engine.infer.diffusion.cache_memory_gb)
        if request.hold_at_step is not None and request.hold_at_step >= steps_of(resolved):
            raise UsageError(
                f"hold_at_step = {request.hold_at_step}: it has {steps_of(resolved)} steps; use less",
                field="hold_at_step",
            )
        tokens = self.spec.tokens(resolved.num_frames or 1, resolved.height or 0, resolved.width or 0)
        return Planned(params, resolved, (*notes, *self._notes(resolved)), tokens, steps_of(resolved))

    def require_fit(self, planned: Planned, workers: Sequence[WorkerInfo]) -> None:
        """Raises WillNotFitError: no worker has room for it; says how many frames of this size one has."""
        most = _most_tokens(workers)
        if most is None or planned.tokens <= most:
            return
        height = planned.resolved.height or 0
        width = planned.resolved.width or 0
        frames = planned.resolved.num_frames or 1
        stride = self.spec.geometry.stride[0]
        fitting = [n for n in range(1, frames, stride) if self.spec.tokens(n, height, width) <= most]
        use = f"use {counted(fitting[-1], 'frame')} of this size" if fitting else "use a smaller size"
        raise WillNotFitError(
            f"{width}x{height} with {frames} frames is {planned.tokens} tokens, and no worker has memory for "
            f"more than {most}; {use}"
        )

    def new_job(self, planned: Planned, request: VideoRequest, uploads: Mapping[str, Upload]) -> NewJob:
        """Without an owner yet. Its hash is of what was asked: the same form sent again has the same."""
        asked = dict(request.asked) | {name: {"sha256": file.sha256} for name, file in uploads.items()}
        text = json.dumps(asked, sort_keys=True, ensure_ascii=False, default=str)
        kept = json.loads(text)
        for name, file in uploads.items():
            kept[name]["file"] = Path(file.path).name
        return NewJob(
            owner="",
            model=self.model,
            request=kept,
            resolved=planned.resolved.to_mapping(),
            body_sha256=hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest(),
            seed=planned.resolved.seed,
            priority=request.priority,
            notes=planned.notes,
            cost=planned.cost,
            hold_at_step=request.hold_at_step,
            webhook=request.webhook,
        )

    def estimate(self, planned: Planned, workers: Sequence[WorkerInfo]) -> dict[str, Any]:
        """Seconds by what this machine remembers, and whether a worker says that it fits."""
        resolved = planned.resolved
        times = TaskTimes(
            Paces.of_settings(cache_dir(), self._setup), self._device, self.spec.geometry.decoder_cost
        )
        units = units_of(self.spec, resolved, self.engine.infer)
        most = _most_tokens(workers)
        return {
            "object": "video.estimate",
            "model": self.spec.name,
            "seconds": round(times.left(units), 2),
            "is_measured": times.is_measured(units),
            "fits": None if most is None else planned.tokens <= most,
            "tokens": planned.tokens,
            "steps": planned.steps,
            "size": f"{resolved.width}x{resolved.height}",
            "num_frames": resolved.num_frames,
            "fps": resolved.to_mapping()["fps"],
            "notes": list(planned.notes),
        }

    def defaults(self) -> dict[str, Any]:
        """The model, as JSON values."""
        own = self.spec.defaults
        return {
            "id": self.spec.name,
            "object": "model",
            "created": 0,
            "owned_by": "chitu",
            "aliases": list(self.models[1:]),
            "kind": self.spec.kind.title,
            "takes_image": self.spec.kind.takes_image,
            "needs_image": self.spec.kind.needs_image,
            "defaults": {
                "size": f"{own.width}x{own.height}",
                "num_frames": own.num_frames,
                "fps": own.fps,
                "num_inference_steps": own.steps,
                "guidance_scale": list(own.guidance),
            },
            "words": list(self.spec.words),
            "caches": list(STRATEGIES),
            "loras": [file.stem for file in self._adapters()],
            "trained_sizes": [
                {"size": f"{width}x{height}", "num_frames": frames}
                for height, width, frames in self.spec.trained_sizes
            ],
        }

    def _media(self, uploads: Mapping[str, Upload]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, upload in uploads.items():
            kind, facts = checked_media(name, upload.path)
            field = kind if name == "input_reference" else name
            if field in found or (field == "video") != (kind == "video"):
                raise UsageError(f"{name}: it is {kind}, or given twice; send one file a field", field=name)
            found[field] = facts
        return found

    def _lora(self, name: str, strength: float, expert: str | None) -> dict[str, Any]:
        there = self._adapters()
        file = next((file for file in there if name in (file.name, file.stem)), None)
        if file is None:
            hint = nearest(name, [file.stem for file in there]) if there else " This server has none."
            raise UsageError(f"lora: there is no adapter {name!r}.{hint}", field="lora")
        return {"path": str(file), "strength": strength, "expert": expert}

    def _adapters(self) -> list[Path]:
        own = sorted(self._loras.glob("*.safetensors")) if self._loras else []
        return [*own, *(shipped_adapters().values() if self.spec.name == TINY else ())]

    def _frames(self, seconds: float, fps: Any, notes: list[str]) -> int:
        rate = rate_number(fps or self.spec.defaults.fps)
        step = self.spec.geometry.stride[0]
        frames = max(0, math.ceil((seconds * rate - 1) / step)) * step + 1
        if frames != seconds * rate:
            notes.append(f"{seconds:g} s at {rate:g} fps became {frames} frames, {frames / rate:.3g} s")
        return frames

    def _check_multiple(self, width: int, height: int) -> None:
        """Refuse sizes that the model cannot have, with both neighbours."""
        for name, value, step in zip(
            ("height", "width"), (height, width), self.spec.geometry.stride[1:], strict=True
        ):
            if value % step and value > 0:
                below = value // step * step
                use = f"{below} or {below + step}" if below else f"{step}"
                raise UsageError(f"{name} = {value}: use {use}, a multiple of {step}", field=name)

    def _notes(self, resolved: DiffusionUserParams) -> list[str]:
        sampled = self.spec.with_recipe(resolved.sampler_recipe)
        said = (
            sampled.shift_note(resolved.shift),
            sampled.recipe_note(guidance_pair(resolved.guidance_scale)),
        )
        size = (resolved.height or 0, resolved.width or 0)
        notes = [note for note in said if note]
        for name in ("image", "last_image"):
            given = vars(resolved)[name]
            notes += given.notes(*size, name) if given else []
        return notes + (resolved.video.notes(resolved.num_frames or 1, *size) if resolved.video else [])


def _most_tokens(workers: Sequence[WorkerInfo]) -> int | None:
    """What the largest worker has memory for; None: there is none, or one has not said."""
    said = [int(worker.fits["tokens"]) for worker in workers if "tokens" in worker.fits]
    return max(said) if said and len(said) == len(workers) else None
