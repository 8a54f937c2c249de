"""Compiled pieces of the blocks: how often they are compiled, beside what, and what happens when they cannot
be.

The compiler's own code generation is left out (backend "eager"): tracing and its guards are what decides all
of this.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partialmethod
from pathlib import Path

import pytest
import torch
from small_networks import COMPILED, EverySite
from torch import Tensor
from torch._dynamo.utils import counters

from chitu_diffusion.attention import sdpa
from chitu_diffusion.attention.kernels import AttentionContext, AttentionFn
from chitu_diffusion.backend import DiffusionBackend
from chitu_diffusion.config import EngineConfig, keep_compiled_code
from chitu_diffusion.errors import CompileError
from chitu_diffusion.generator import Generator
from chitu_diffusion.models.wan.transformer import WanTransformer
from chitu_diffusion.ops.float8_linear import Float8Plan, set_float8, to_float8
from chitu_diffusion.ops.fused import has_linear_gelu
from chitu_diffusion.task import DiffusionTask, DiffusionUserParams, TaskStatus

Inputs = tuple[Tensor, Tensor, Tensor]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def network() -> WanTransformer:
    return WanTransformer(COMPILED).eval().requires_grad_(False)


def inputs(frames: int = 2, rows: int = 4, columns: int = 4, text: int = 7) -> Inputs:
    return torch.randn(1, 4, frames, rows, columns), torch.randn(1, text, 24), torch.tensor([300.0])


def other_attention(scale: float) -> AttentionFn:
    """A closure that the compiler could not look through: it asks for a tensor's value."""

    def attend(q: Tensor, k: Tensor, v: Tensor, where: AttentionContext) -> Tensor:
        assert float(q.sum()) == float(q.sum())
        return sdpa(q * scale, k, v)

    return attend


@pytest.mark.usefixtures("gelu_apart")
@torch.no_grad()
def test_blocks_share_graphs_and_a_new_size_adds_one_set() -> None:
    ours = network()
    first = inputs()
    second = inputs(3, 4, 6)
    expected = [ours(*first), ours(*second)]
    ours.compile_blocks(backend="eager")
    assert torch.equal(ours(*first), expected[0])
    assert graphs() == 2  # before and after the attention, for all five blocks
    for _ in range(2):
        assert torch.equal(ours(*second), expected[1])
        assert torch.equal(ours(*first), expected[0])
    assert graphs() == 4
    assert sum(counters["graph_break"].values()) == 0


@pytest.mark.usefixtures("gelu_apart")
@torch.no_grad()
def test_texts_and_attentions_may_vary() -> None:
    ours = network()
    plain = network()
    texts = [inputs(text=length) for length in (7, 9, 12, 30)]
    plain.load_state_dict(ours.state_dict())
    ours.compile_blocks(backend="eager")
    for scale, args in enumerate(texts, start=1):
        attention = other_attention(scale)
        assert torch.equal(ours(*args, attention=attention), plain(*args, attention=attention))
    assert graphs() == 2


@pytest.mark.usefixtures("gelu_apart")
@torch.no_grad()
def test_caches_inside_blocks_run_compiled_pieces() -> None:
    ours = network()
    args = inputs()
    expected = ours(*args)
    ours.compile_blocks(backend="eager")
    assert torch.equal(ours(*args, cache=EverySite()), expected)
    assert graphs() == 3  # project, cross_attention, feed_forward
    assert torch.equal(ours(*args), expected)
    assert graphs() == 4  # and now after_attention


@pytest.mark.usefixtures("gelu_apart")
@torch.no_grad()
def test_8_bits_are_one_more_set_and_switching_is_free() -> None:
    ours = network()
    args = inputs()
    layers = to_float8(list(ours.blocks), Float8Plan())
    expected = {}
    for mode in (False, True):
        set_float8(layers, mode)
        expected[mode] = ours(*args)
    ours.compile_blocks(backend="eager")
    for mode in (False, True, False, True):
        set_float8(layers, mode)
        assert torch.equal(ours(*args), expected[mode])
    # edge blocks, inner blocks in 16 bits, inner blocks in 8 bits: two pieces each
    assert graphs() == 6


@torch.no_grad()
def test_what_cannot_be_compiled_says_so() -> None:
    def broken(graph: torch.fx.GraphModule, example: list[Tensor]) -> Callable[..., object]:
        raise RuntimeError("no such compiler")

    ours = network()
    ours.compile_blocks(backend=broken)
    with pytest.raises(CompileError, match=r"WanBlock\.project cannot be compiled.*infer\.compile=false"):
        ours(*inputs())


@torch.no_grad()
def test_too_many_sizes_are_an_error_and_not_uncompiled() -> None:
    ours = network()
    ours.compile_blocks(backend="eager")
    with torch._dynamo.config.patch(recompile_limit=2), pytest.raises(CompileError, match="Limit"):
        for columns in (2, 4, 6, 8):
            ours(*inputs(columns=columns))


@pytest.mark.usefixtures("gelu_apart")
def test_a_task_hears_of_it(
    tiny_folder: Path,
    make_config: Callable[..., EngineConfig],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(
        WanTransformer, "compile_blocks", partialmethod(WanTransformer.compile_blocks, backend="eager")
    )
    latents = []
    notes = []
    for compiled in (False, True):
        backend = DiffusionBackend(make_config(tiny_folder, infer__compile=compiled))
        task = DiffusionTask.from_user_request(DiffusionUserParams("a red fish", seed=3, save_path=None))
        generator = Generator(backend)
        while task.status in (TaskStatus.PENDING, TaskStatus.ENCODING, TaskStatus.DENOISING):
            notes.append(generator.generate_step(task).message)
        latents.append(task.buffer.latent)
        assert ("compiling" in caplog.text) == compiled
        backend.terminate()
    assert torch.equal(*latents)
    told = [note for note in notes if note and "compiled" in note]
    # two pieces, each once more for the first block, whose start both branches share
    assert len(told) == 1 and "compiled 4 piece(s) in" in told[0]


def test_compiled_code_is_kept_between_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import os

    monkeypatch.setenv("CHITU_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "there")
    keep_compiled_code()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "there"
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    keep_compiled_code()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "inductor")


def test_a_gelu_inside_a_product_is_left_to_the_compiler_on_a_cpu() -> None:
    """Code generation has nothing for oneDNN's: `infer.compile` would end at the first block."""
    x = torch.randn(2, 8, 16)
    weight = torch.randn(32, 16)

    def chosen(x: Tensor) -> Tensor:
        return x + has_linear_gelu(x, weight, False)

    with torch.no_grad():
        assert torch.equal(torch.compile(chosen, fullgraph=True, backend="eager")(x), x)
        assert torch.equal(chosen(x), x + torch.backends.mkldnn.is_available())
