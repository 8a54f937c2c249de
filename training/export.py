"""Writes a finished run as a checkpoint folder in diffusers' own layout, in bfloat16.

The folder opens in diffusers (`WanPipeline.from_pretrained`) and in chitu_diffusion alike. It is
written beside its place and renamed, so that a half-written checkpoint is never seen.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import UniPCMultistepScheduler
from safetensors.torch import load_file, save_file
from torch import Tensor

from chitu_diffusion.evaluation.prompts import ACTORS, COLOURS
from chitu_diffusion.models.registry import write_metadata
from chitu_diffusion.models.spec import Defaults
from chitu_diffusion.weights.hashing import ModelFiles
from chitu_diffusion.weights.manifest import write_manifest
from training import autoencoder, denoiser, latents, text
from training.world import around, chinese, vocabulary_corpus

_CAPTIONS = 60_000
"""Of which each word that a caption may have comes some dozens of times."""

_OF_PAIRS = ("while", "beside")
"""Words of sentences about two actors that no other sentence has."""

SHARD_BYTES = 12 * 2**20
FLOW_SHIFT = 3.0
DEFAULTS = Defaults(
    height=128,
    width=128,
    num_frames=33,
    fps=16,
    steps=50,
    guidance=(5.0,),
    shift=FLOW_SHIFT,
    negative_prompt="",
)


def start_from(folder: Path, run: Path) -> None:
    """Let a run begin with the weights of a finished folder (bfloat16, as shipped) instead of fresh ones. A
    run that has begun is left as it is.

    The tokenizer grows by the words that it lacks, and the text encoder by their rows.
    """
    if (run / "vae.safetensors").exists():
        return

    def tensors(part: str) -> dict[str, Tensor]:
        files = sorted((folder / part).glob("*.safetensors"))
        return {name: value.float() for file in files for name, value in load_file(file).items()}

    run.mkdir(parents=True, exist_ok=True)
    if not (run / "tokenizer").exists():
        shutil.copytree(folder / "tokenizer", run / "tokenizer")
        text.grow_tokenizer(run / "tokenizer")
    if not (run / "encoder.safetensors").exists():
        encoder = tensors("text_encoder")
        encoder["shared.weight"] = text.grown_rows(encoder["shared.weight"], text.make_tokenizer(run))
        save_file(encoder, run / "encoder.safetensors")
    config = json.loads((folder / "vae" / "config.json").read_text(encoding="utf-8"))
    latents.save_statistics(run, torch.tensor(config["latents_mean"]), torch.tensor(config["latents_std"]))
    encoder = {f"encoder.{name}": value for name, value in load_file(run / "encoder.safetensors").items()}
    denoiser.save_average(
        run, {f"dit.{name}": value for name, value in tensors("transformer").items()} | encoder
    )
    save_file(tensors("vae"), run / "vae.safetensors")


def write_shards(folder: Path, stem: str, tensors: dict[str, Tensor]) -> None:
    """bfloat16 safetensors of at most `SHARD_BYTES` each, with an index where there are several."""
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, value in tensors.items():
        small = value.detach().to("cpu", torch.bfloat16).contiguous()
        if size + small.nbytes > SHARD_BYTES and shards[-1]:
            shards.append({})
            size = 0
        shards[-1][name] = small
        size += small.nbytes
    if len(shards) == 1:
        save_file(shards[0], folder / f"{stem}.safetensors", metadata={"format": "pt"})
        return
    index: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(shard, file)
    total = sum(value.nbytes for shard in shards for value in shard.values())
    write_json(
        folder / f"{stem}.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": index}
    )


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def known_words() -> list[str]:
    """Every word that says something of a clip, or stands between two that do: actors and colours first, then
    by the alphabet, Chinese ones last.
    """
    corpus = vocabulary_corpus(_CAPTIONS, seed=1)
    words = {word for line in corpus for word in re.findall(r"[\w']+", line.lower())}
    words |= {*around.BETWEEN, *_OF_PAIRS, *chinese.words()}
    return [*ACTORS, *COLOURS, *sorted(words - {*ACTORS, *COLOURS})]


def export(run: Path, target: Path) -> None:
    """The averaged networks of `run` as a checkpoint folder at `target` (replaced if it is there)."""
    device = torch.device("cpu")
    part = target.with_name(target.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    tokenizer = text.make_tokenizer(run)
    nets = denoiser.build(len(tokenizer), device)
    if not denoiser.take_average(run, nets):
        raise FileNotFoundError(f"{run} holds no trained weights yet; run the stage 'dit' first")
    write_shards(part / "transformer", "diffusion_pytorch_model", dict(nets.dit.state_dict()))
    write_json(part / "transformer" / "config.json", denoiser.CONFIG.to_json())

    nets.encoder.to(torch.bfloat16).save_pretrained(part / "text_encoder", safe_serialization=True)
    tokenizer.save_pretrained(part / "tokenizer")

    vae = autoencoder.load(run, device)
    scale = torch.load(run / "statistics.pt", weights_only=True)
    vae.register_to_config(latents_mean=scale["mean"].tolist(), latents_std=scale["std"].tolist())
    vae.to(torch.bfloat16).save_pretrained(part / "vae")

    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=FLOW_SHIFT,
        num_train_timesteps=1000,
    )
    scheduler.save_pretrained(part / "scheduler")
    write_json(part / "model_index.json", {
        "_class_name": "WanPipeline", "_diffusers_version": "0.42.1", "boundary_ratio": None,
        "expand_timesteps": True,
        "scheduler": ["diffusers", "UniPCMultistepScheduler"], "text_encoder": ["transformers",
        "UMT5EncoderModel"],
        "tokenizer": ["transformers", "PreTrainedTokenizerFast"], "transformer": ["diffusers",
        "WanTransformer3DModel"],
        "transformer_2": [None, None], "vae": ["diffusers", "AutoencoderKLWan"],
    })  # fmt: skip
    sizes = [list(shape) for shape in latents.SHAPES]
    write_metadata(part, "wan-tiny", DEFAULTS, words=known_words(), trained_sizes=sizes)
    write_manifest(ModelFiles(part), "shipped")
    if target.exists():
        for kept in ("README.md", "LICENSE"):
            if (target / kept).exists():
                shutil.copy(target / kept, part / kept)
        shutil.rmtree(target)
    part.rename(target)
    size = sum(f.stat().st_size for f in target.rglob("*") if f.is_file())
    print(f"exported {target}: {size / 2**20:.2f} MiB", flush=True)
