"""Wrong calls of what the API page names: each is a ValueError that says what was found and what to use,
before any network runs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from running import CAT, config_for, task_for

from chitu_diffusion.backend import DiffusionBackend
from chitu_diffusion.config import EngineConfig
from chitu_diffusion.errors import UsageError
from chitu_diffusion.flexcache.manager import parse_flexcache
from chitu_diffusion.generator import Generator
from chitu_diffusion.task import CascadeStage, Conditioning, DiffusionTask, DiffusionUserParams

LATENT = torch.zeros(1, 4, 2, 4, 4)
TEXT = torch.zeros(1, 512, 32)
NAN = torch.full_like(LATENT, math.nan)
META = torch.empty_like(LATENT, device="meta")


class Lent:
    """A generator, its backend and its network, with a record of what has run."""

    def __init__(self, backend: DiffusionBackend) -> None:
        self.backend = backend
        self.generator = Generator(backend)
        self.model: Any = backend.model_pool[0]
        self.ran: list[str] = []
        parts = {
            "text encoder": backend.text_encoder.network,
            "transformer": backend.model_pool[0].patch_embedding,
            "vae": backend.vae.network.post_quant_conv,
        }
        for name, part in parts.items():
            part.register_forward_pre_hook(lambda *_, name=name: self.ran.append(name))


@pytest.fixture(scope="module")
def lent(tiny_folder, tmp_path_factory) -> Lent:
    lent = Lent(DiffusionBackend(config_for(tiny_folder, tmp_path_factory.mktemp("outputs"))))
    lent.generator.encode_text("")  # what hooks see is seen
    lent.generator.denoise_loop(LATENT, TEXT, 1, 1.0)
    lent.generator.decode_vae(LATENT)
    assert set(lent.ran) == {"text encoder", "transformer", "vae"}
    return lent


def loop(**given: Any) -> Callable[[Lent], object]:
    return lambda lent: lent.generator.denoise_loop(
        **{"latent": LATENT, "embeddings": TEXT, "num_steps": 2, **given}
    )


def forward(method: str, *given: Any, **more: Any) -> Callable[[Lent], object]:
    """A forward of the page with its leading arguments replaced."""
    whole = [*given, *(LATENT, TEXT, 500)[len(given) :]]
    if method == "forward_with_cache":
        more = {"step_idx": 0, **more}
    return lambda lent: getattr(lent.generator, method)(*whole, **more)


def bound(step: Any) -> Callable[[Lent], object]:
    """A step of a task of four."""

    def call(lent: Lent) -> object:
        manager = lent.backend.flexcache_manager
        manager.bind(parse_flexcache({"strategy": "interval", "warmup": 0, "cooldown": 0}, 4))
        try:
            return lent.generator.forward_with_cache(LATENT, TEXT, 500, step)
        finally:
            manager.release()

    return call


def on(method: str, *given: Any, **more: Any) -> Callable[[Lent], object]:
    return lambda lent: getattr(lent.generator, method)(*given, **more)


WRONG: list[tuple[Callable[[Lent], object], str]] = [
    (lambda _: DiffusionBackend({"infer": {"device": "cpu"}}), "args is a dict; use EngineConfig"),  # type: ignore[arg-type]
    (lambda _: DiffusionBackend("wan-tiny"), "args is a str; use EngineConfig"),  # type: ignore[arg-type]
    (lambda _: Generator(None), "backend is a NoneType; use DiffusionBackend"),  # type: ignore[arg-type]
    (lambda _: Generator(EngineConfig()), "backend is a EngineConfig"),  # type: ignore[arg-type]
    (on("encode_text", 5), "prompt = 5: use a text"),
    (on("encode_text", None), "prompt = None"),
    (on("encode_text", []), r"prompt = \[\]"),
    (on("encode_text", [CAT, 5]), "prompt = 5: must be text"),
    (on("encode_text", b"a cat"), "prompt = b'a cat'"),
    (on("encode_text", "x" * 20_001), "has 20001 characters: use at most 20000"),
    (loop(latent=[0.0]), "latent is a list; use a tensor"),
    (loop(latent=LATENT[0]), r"latent is \[4, 2, 4, 4\]; use \[B, 4, T, H, W\]"),
    (loop(latent=torch.zeros(1, 3, 2, 4, 4)), r"latent is \[1, 3, 2, 4, 4\]; use \[B, 4"),
    (loop(latent=torch.zeros(0, 4, 2, 4, 4)), r"latent is \[0, 4"),
    (loop(latent=LATENT.long()), r"latent is torch.int64.*latent.float\(\)"),
    (loop(latent=LATENT.bool()), "latent is torch.bool"),
    (loop(latent=LATENT.to(torch.complex64)), "latent is torch.complex64"),
    (loop(latent=META), "latent is on meta, and holds no values"),
    (loop(latent=LATENT.to_sparse()), "torch.sparse_coo; use dense floats"),
    (loop(latent=NAN), "NaN detected in latent"),
    (loop(latent=NAN + math.inf), "NaN detected in latent"),
    (loop(embeddings=TEXT[0]), r"embeddings are \[512, 32\]; use \[1, L, 32\]"),
    (loop(embeddings=TEXT.expand(3, -1, -1)), r"embeddings are \[3, 512, 32\]"),
    (loop(embeddings=TEXT[:, :, :31]), r"embeddings are \[1, 512, 31\].*as encode_text gives"),
    (loop(embeddings=TEXT[:, :0]), r"embeddings are \[1, 0, 32\]"),
    (loop(embeddings=TEXT[:, :7]), "embeddings have 7 rows, the model's negative prompt 512"),
    (loop(embeddings=CAT), "embeddings is a str; use a tensor"),
    (loop(embeddings=Conditioning(TEXT, [1.0])), "concat_latents is a list; use a tensor"),
    (loop(embeddings=Conditioning(TEXT, META)), "concat_latents is on meta"),
    (loop(embeddings=TEXT + math.inf), "Inf detected in embeddings"),
    *(
        (loop(num_steps=steps), "num_steps = .*whole number from 1 to 1000")
        for steps in (0, -1, 2.5, True, "4")
    ),
    (loop(num_steps=None), "num_steps = None"),
    (loop(num_steps=10**9), "num_steps = 1000000000"),
    *(
        (loop(guidance_scale=scale), "guidance_scale = .*number from 0 to 100")
        for scale in (math.nan, math.inf, -1.0, "7", True, [4.0, 3.0], 1e9)
    ),
    (loop(guidance_scale=(4.0, 3.0)), "has one transformer; use one number"),
    (loop(guidance_scale=(4.0, 3.0, 2.0)), "one number, or two"),
    (loop(resolution=(32, 32)), "latent and resolution both say"),
    (loop(init_latent=LATENT), "latent and init_latent both say"),
    (loop(num_frames=5), "latent and num_frames both say"),
    (loop(strength=0.5), "strength = 0.5: it is of an init_latent"),
    *(
        (loop(latent=None, resolution=size), r"resolution = .*use \(height, width\)")
        for size in (32, (32,), (32, 36), (0, 32), (-8, 32), (32, 8200), (32.0, 32), (True, 32), "32x32")
    ),
    (loop(latent=None, num_frames=4), "num_frames = 4: frames must be 4n.1: 1 or 5"),
    (loop(latent=None, num_frames=0), "num_frames = 0"),
    (loop(latent=None, init_latent=LATENT[0]), r"init_latent is \[4, 2, 4, 4\]"),
    (loop(latent=None, init_latent=NAN), "NaN detected in init_latent"),
    (loop(latent=None, init_latent=LATENT, num_frames=9), "9 are 3 latent frames, init_latent has 2"),
    *(
        (loop(latent=None, init_latent=LATENT, strength=strength), "strength = .*number from 0.01 to 1")
        for strength in (0, 1.5, math.nan, "half", True)
    ),
    *((loop(seed=seed), "seed = .*whole number from 0") for seed in (-1, 1.5, None, "x", 2**64)),
    *((loop(model=model), "model = .*use one of backend.model_pool") for model in (1, -1, True, "high", 0.0)),
    (loop(model=torch.nn.Linear(1, 1)), "model = Linear: use one of backend.model_pool, which has 1"),
    (on("upsample", LATENT[0]), r"latent is \[4, 2, 4, 4\]"),
    *(
        (on("upsample", LATENT, scale), "scale = .*use a number")
        for scale in (0, -2, math.nan, "2", None, 1e9)
    ),
    (on("decode_vae", LATENT[0]), r"latent is \[4, 2, 4, 4\]; use \[B, 4"),
    (on("decode_vae", LATENT.int()), "latent is torch.int32"),
    (on("decode_vae", NAN), "NaN detected in latent"),
    (on("decode_vae", None), "latent is a NoneType"),
    (on("decode_vae_tiled", torch.zeros(1, 16, 2, 4, 4)), r"latent is \[1, 16"),
    (on("decode_vae_tiled", NAN), "NaN detected"),
    *(
        (on("decode_vae_tiled", LATENT, size), "tile_size = .*from 1 to 1024")
        for size in (0, -8, "8", 8.0, None)
    ),
    *(
        (on(method, None), "task is a NoneType; use DiffusionTask")
        for method in ("generate_step", "get_progress")
    ),
    (on("generate_step", task_for().params), "task is a DiffusionUserParams"),
    (on("generate_step", {"prompt": CAT}), "task is a dict"),
    (on("generate_multi_stage", None), "task is a NoneType"),
    (on("get_progress", "task"), "task is a str"),
    (lambda _: DiffusionTask.from_user_request(CAT), r"use DiffusionUserParams\(prompt"),  # type: ignore[arg-type]
    *((on("check_nan", value, "x"), "x is a .*use a tensor") for value in (None, [math.nan], 1.0)),
    (on("check_nan", META, "x"), "x is on meta"),
    *(
        case
        for method in ("forward_with_cp", "forward_with_cfg_parallel", "forward_with_cache")
        for case in (
            (forward(method, LATENT[0]), r"latent is \[4, 2, 4, 4\]"),
            (forward(method, torch.zeros(1, 4, 2, 5, 4)), "not multiples of the patch"),
            (forward(method, LATENT.long()), "latent is torch.int64"),
            (forward(method, META), "latent is on meta"),
            (forward(method, LATENT, TEXT[0]), r"embeddings are \[512, 32\]; use \[1, L, 32\]"),
            (forward(method, LATENT, TEXT.long()), "embeddings is torch.int64"),
            (forward(method, LATENT, TEXT, 1001), "timestep = 1001.*use 0 to 1000"),
            (forward(method, LATENT, TEXT, -0.5), "timestep = -0.5"),
            (forward(method, LATENT, TEXT, math.nan), "timestep = nan"),
            (forward(method, LATENT, TEXT, torch.tensor([1.0, 2.0])), r"timestep is \[2\]"),
            (forward(method, LATENT, TEXT, torch.empty(0)), r"timestep is \[0\]"),
            (forward(method, LATENT, TEXT, torch.empty(1, device="meta")), "timestep is on meta"),
            (forward(method, LATENT, TEXT, "500"), "timestep = '500'; use a number"),
            (forward(method, LATENT, TEXT, None), "timestep = None"),
        )
    ),
    (forward("forward_with_cfg_parallel", guidance_scale="3"), "guidance_scale = '3'"),
    (forward("forward_with_cfg_parallel", guidance_scale=(3.0, 2.0)), "has one transformer"),
    (forward("forward_with_cfg_parallel", LATENT, TEXT[:, :7]), "embeddings have 7 rows"),
    (forward("forward_with_cache", model=3), "model = 3: use one of backend.model_pool"),
    *((forward("forward_with_cache", step_idx=step), "step_idx = ") for step in (-1, 1.0, None, "0", True)),
    *((bound(step), "step_idx = .*0 to 3, as the bound task has") for step in (4, -1)),
    (lambda lent: lent.backend.flexcache_manager.should_reuse("0"), "step_idx = '0'"),
    (lambda lent: lent.model(LATENT[0], TEXT, 500), r"latent is \[4, 2, 4, 4\]"),
    (lambda lent: lent.model(LATENT, TEXT.expand(3, -1, -1)[:, :, :5], 500), r"embeddings are \[3, 512, 5\]"),
    (lambda lent: lent.model(LATENT, TEXT, "500"), "timestep = '500'"),
    (lambda lent: lent.model.forward_with_cache(LATENT, TEXT, None), "cached_features is a NoneType"),
]


def test_wrong_calls_are_refused_in_words_before_anything_runs(lent):
    """All in one, for the hundred of them take a second; what goes wrong is listed whole."""
    assert len(WRONG) > 60
    found = []
    for number, (call, words) in enumerate(WRONG):
        lent.ran.clear()
        try:
            with pytest.raises(ValueError, match=words):
                call(lent)
            assert not lent.ran, f"{lent.ran} ran"
        except (Exception, pytest.fail.Exception) as error:
            found.append(f"{number}, {words}: {type(error).__name__}: {str(error)[:200]}")
    assert not found, "\n".join(found)


def test_a_terminated_backend_says_so(tiny_folder, make_config):
    backend = DiffusionBackend(make_config(tiny_folder))
    backend.terminate()
    lent = Generator(backend)
    for call in (
        lambda: lent.encode_text(CAT),
        lambda: lent.denoise_loop(LATENT, TEXT),
        lambda: lent.decode_vae(LATENT),
        lambda: lent.decode_vae_tiled(LATENT),
        lambda: lent.upsample(LATENT),
        lambda: lent.forward_with_cp(LATENT, TEXT, 500),
        lambda: lent.forward_with_cache(LATENT, TEXT, 500, 0),
        lambda: lent.forward_with_cfg_parallel(LATENT, TEXT, 500),
        lambda: lent.generate_step(task_for()),
    ):
        with pytest.raises(UsageError, match="terminated; make a new one"):
            call()


def test_numbers_of_numpy_are_numbers(lent):
    """As they come out of arrays and tables; what is stored of them are Python's."""
    generator = lent.generator
    text = generator.encode_text([CAT, ""])
    own = generator.denoise_loop(None, text, 2, 3.0, resolution=(24, 40), num_frames=5, seed=7)
    number = np.int64
    size = (np.int32(24), np.uint16(40))
    again = generator.denoise_loop(
        None, text, number(2), np.float32(3), resolution=size, num_frames=number(5), seed=number(7)
    )
    assert torch.equal(own, again)
    for time in (np.float32(500), np.int64(500), np.float64(500)):
        forward = generator.forward_with_cp(own.repeat(1, 1, 1, 2, 2), text, time)
        assert torch.equal(forward, generator.forward_with_cp(own.repeat(1, 1, 1, 2, 2), text, 500))
    generator.decode_vae_tiled(own, number(8))
    generator.upsample(own, number(2))
    generator.forward_with_cache(LATENT, text, 500, number(0))
    params = DiffusionUserParams(
        CAT,
        seed=number(5),
        num_frames=np.int32(5),
        guidance_scale=np.float32(2.5),
        cascade=[CascadeStage(number(32), number(32), number(1), np.float32(1))],
    )
    assert json.loads(json.dumps(params.to_mapping())) == json.loads(
        json.dumps(
            DiffusionUserParams(
                CAT, seed=5, num_frames=5, guidance_scale=2.5, cascade=[CascadeStage(32, 32, 1)]
            ).to_mapping()
        )
    )
    with pytest.raises(UsageError, match="must be a whole number"):
        DiffusionUserParams(CAT, seed=np.float64(5.5))
    with pytest.raises(UsageError, match="must be a whole number"):
        DiffusionUserParams(CAT, seed=np.bool_(True))


def test_odd_but_right_calls_run(lent):
    """The empty prompt, other float dtypes, strides that are not contiguous, times of every kind."""
    generator = lent.generator
    assert generator.encode_text("").shape == (1, 512, 32)
    latent = torch.randn(1, 4, 2, 4, 4)
    turned = latent.transpose(-1, -2).contiguous().transpose(-1, -2)
    assert not turned.is_contiguous()
    text = generator.encode_text([CAT, ""])
    for same in (turned, latent.double()):
        loops = [generator.denoise_loop(given, text, 2) for given in (latent, same)]
        assert torch.equal(*loops)
        # the VAE leaves a float64 latent's statistics in float64: one rounding less
        assert torch.allclose(generator.decode_vae(latent), generator.decode_vae(same), atol=1e-5)
        forwards = [generator.forward_with_cp(given, text, 500) for given in (latent, same)]
        assert torch.equal(*forwards)
    assert generator.denoise_loop(latent.half(), text.double(), 1).dtype == torch.float32
    expected = generator.forward_with_cp(latent, text, 500)
    for time in (500.0, torch.tensor(500), torch.tensor([500.0]), torch.tensor([500], dtype=torch.int32)):
        assert torch.equal(generator.forward_with_cp(latent, text, time), expected)
    assert generator.denoise_loop(latent, text, 2, guidance_scale=None).shape == latent.shape
    generator.check_nan(torch.arange(3), "whole numbers")
    generator.check_nan(torch.ones(3).to(torch.float8_e4m3fn), "8 bits")
