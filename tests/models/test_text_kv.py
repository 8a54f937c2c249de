"""What a step does once for all: the prompt's part of the network, the branches' common start; and that no
step waits.
"""

from __future__ import annotations

import secrets
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import UniPCMultistepScheduler
from running import config_for, latent_and_video, relative_error, task_for
from small_networks import CONFIG, reference, twin
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from chitu_diffusion.attention.kernels import AttentionContext, sdpa, sdpa_weighted, split_weight
from chitu_diffusion.backend import DiffusionBackend
from chitu_diffusion.distributed.process_groups import ProcessGroups
from chitu_diffusion.flexcache.manager import FlexCacheManager
from chitu_diffusion.generator import FiniteCheck, Generator
from chitu_diffusion.models.kinds import TEXT_TO_VIDEO
from chitu_diffusion.models.wan.block import WanAttention
from chitu_diffusion.models.wan.block_inputs import SharedCfgPrefix
from chitu_diffusion.models.wan.text_kv import TextKVCache, dedup_padding, rows_that_differ
from chitu_diffusion.models.wan.transformer import WanTransformer
from chitu_diffusion.pipelines import conditioning, denoising, stages
from chitu_diffusion.pipelines.conditioning import PreparedConditioning
from chitu_diffusion.sampling.solvers import Sampler
from chitu_diffusion.task import TaskStatus


@pytest.fixture(autouse=True)
def fresh_numbers() -> None:
    seed = secrets.randbelow(2**31)
    print("torch seed", seed)
    torch.manual_seed(seed)


@pytest.fixture(scope="module")
def backend(tiny_folder, tmp_path_factory):
    return DiffusionBackend(config_for(tiny_folder, tmp_path_factory.mktemp("outputs")))


def padded(*lengths: int, positions: int = 64) -> Tensor:
    """Text of given lengths, zeros behind."""
    text = torch.zeros(len(lengths), positions, CONFIG.text_dim)
    for row, length in enumerate(lengths):
        text[row, :length] = torch.randn(length, CONFIG.text_dim)
    return text


# -- padding


@pytest.mark.parametrize(
    ("lengths", "rows"), [((5,), 6), ((5, 9), 10), ((0,), 1), ((63, 2), 64), ((64,), 64)]
)
def test_rows_that_differ(lengths: tuple[int, ...], rows: int) -> None:
    text = padded(*lengths)
    assert rows_that_differ(text) == rows
    folded, positions, bias = dedup_padding(text)
    assert folded.shape[1] == rows and positions == 64
    weights = torch.ones(1, rows) if bias is None else bias.exp()
    assert torch.allclose(weights.sum(), torch.tensor(64.0))


@pytest.mark.parametrize("lengths", [(5,), (3, 20)])
@torch.no_grad()
def test_folded_padding_is_padding(lengths: tuple[int, ...]) -> None:
    ours = twin(reference(CONFIG))
    text = padded(*lengths, positions=512)
    latent = torch.randn(len(lengths), 6, 2, 4, 6)
    timestep = torch.rand(len(lengths)) * 1000
    expected = ours(latent, text, timestep)
    prepared = ours.make_text_kv(text)
    assert prepared.rows.shape[1] == max(lengths) + 1
    embedded = ours.embed(latent, prepared, timestep)
    found = ours.final_layer(ours.run_blocks(embedded), embedded.time)
    # one row with a bias sums otherwise than 500 rows do
    assert relative_error(ours.unpatchify(found, embedded.grid), expected) < 1e-5
    # as on a GPU: the row stands as often as it should; the attention then sees what it always saw
    copied = replace(prepared, positions=512, bias=None, _kept={})
    assert copied.keys(0, ours.blocks[0].text_keys).k.shape[1] == 512
    again = ours.final_layer(ours.run_blocks(replace(embedded, text=copied)), embedded.time)
    assert relative_error(ours.unpatchify(again, embedded.grid), expected) < 2e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_weighted_key_in_16_bits_weighs_what_it_should(dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(1, rows, 2, 16).to(dtype) for rows in (40, 5, 5))
    # what the padding says is plain to see
    k[:, -1] = 0
    v[:, -1] = 3
    bias = torch.tensor([[0, 0, 0, 0, 507.0]]).log1p()
    q64 = q.double()
    k64 = k.double()
    v64 = v.double()
    expected = sdpa(q64, *(torch.cat([x, x[:, -1:].expand(-1, 507, -1, -1)], dim=1) for x in (k64, v64)))
    # here the kernel takes the bias in float32: what is left is the rounding of q, k, v and of the result
    assert (sdpa_weighted(q64, k64, v64, bias) - expected).abs().max() < 1e-5
    assert relative_error(sdpa_weighted(q, k, v, bias).double(), expected) < 2 * torch.finfo(dtype).eps
    # a GPU's kernels take it in 16 bits, for keys that stand twice
    twice = split_weight(bias, dtype)
    assert twice.dtype == dtype and twice.shape == (1, 10)
    found = sdpa_weighted(q64, torch.cat([k64, k64], 1), torch.cat([v64, v64], 1), twice.double())
    rounded = sdpa_weighted(q64, k64, v64, bias.to(dtype).double())
    assert relative_error(found, expected) < 5e-4
    assert relative_error(found, expected) < relative_error(rounded, expected)
    for count in torch.arange(2, 513):
        weight = split_weight(count.float().log().reshape(1, 1), dtype).double().exp().sum()
        assert abs(float(weight / count) - 1) < 5e-4


# -- once a task


@pytest.fixture
def key_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry, the number of rows, for each time that a block makes keys of a text."""
    from chitu_diffusion.models.wan.block import WanBlock

    calls = []
    make = WanBlock.text_keys

    def counted(self: WanBlock, rows: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(rows.shape[0])
        return make(self, rows)

    monkeypatch.setattr(WanBlock, "text_keys", counted)
    return calls


@pytest.mark.parametrize(
    ("mode", "level"), [("batched", 0), ("sequential", 0), ("sequential", 4), ("batched", 3)]
)
def test_keys_are_made_once_a_task(mode, level, tiny_folder, make_config, key_calls) -> None:
    """Of every block, whatever the memory level; and tasks that take turns do not mix."""
    settings = make_config(tiny_folder)
    settings.infer.diffusion.cfg_batch = mode
    settings.infer.diffusion.low_mem_level = level
    made = Generator(DiffusionBackend(settings))
    prompts = ("a red fish swims left in the sea", "two dogs jump")
    alone = [latent_and_video(made, task_for(prompt=prompt, num_inference_steps=5))[0] for prompt in prompts]
    key_calls.clear()
    tasks = [task_for(prompt=prompt, num_inference_steps=5) for prompt in prompts]
    while tasks[1].status is not TaskStatus.DECODING:
        for task in tasks:
            made.generate_step(task)
    assert key_calls == ([2] * 4 if mode == "batched" else [1] * 8)  # 2 blocks, 2 tasks
    for task, latent in zip(tasks, alone, strict=True):
        assert torch.equal(task.buffer.latent, latent)
        assert task not in made.stages._derived


def test_each_expert_has_its_own_keys(two_experts_folder, make_config, key_calls) -> None:
    made = Generator(DiffusionBackend(make_config(two_experts_folder)))
    task = task_for(num_inference_steps=20)
    latent, _ = latent_and_video(made, task)
    assert key_calls == [2] * 4  # 2 blocks of 2 experts
    forgetful = task_for(num_inference_steps=20)
    while forgetful.status is not TaskStatus.DECODING:
        made.generate_step(forgetful)
        made.stages.forget()
    assert torch.equal(forgetful.buffer.latent, latent)


def test_autocast_does_not_reuse_what_float32_made(backend) -> None:
    latent = torch.randn(1, 4, 2, 4, 4)
    embeddings = Generator(backend).encode_text(["A cat", "ugly"])
    kept = PreparedConditioning(embeddings)
    timestep = torch.tensor(500)
    with torch.no_grad():
        plain = denoising.predict_velocity(backend, latent, kept, timestep, expert=0)
        with torch.autocast("cpu", torch.bfloat16):
            found = denoising.predict_velocity(backend, latent, kept, timestep, expert=0)
            fresh = denoising.predict_velocity(
                backend, latent, PreparedConditioning(embeddings), timestep, expert=0
            )
        again = denoising.predict_velocity(backend, latent, kept, timestep, expert=0)
    assert torch.equal(found, fresh) and torch.equal(again, plain) and not torch.equal(found.float(), plain)


def test_running_out_of_memory_drops_the_keys(backend, monkeypatch) -> None:
    made = Generator(backend)
    task = task_for(num_inference_steps=4)
    whole = task_for(num_inference_steps=4)
    expected, _ = latent_and_video(made, whole)
    for _ in range(3):
        made.generate_step(task)
    assert made.stages._derived[task].text.bytes > 0
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(
            WanAttention, "cross_attend", lambda *_: (_ for _ in ()).throw(MemoryError("none left"))
        )
        made.generate_step(task)
    assert task not in made.stages._derived
    assert torch.equal(latent_and_video(made, task)[0], expected)


def test_a_known_prompt_needs_no_text_encoder(tiny_folder, make_config) -> None:
    """The second task of a batch leaves the text encoder where it is, and the negative prompt is encoded once
    for all.
    """
    settings = make_config(tiny_folder)
    settings.infer.diffusion.low_mem_level = 2
    lent = DiffusionBackend(settings)
    made = Generator(lent)
    runs = []
    used = []
    lent.text_encoder.network.register_forward_hook(lambda *_: runs.append(1))
    use = lent.offload.use
    lent.offload.use = lambda name: (used.append(name), use(name))[1]
    for prompt in ("a red fish", "two dogs", "a red  fish"):
        made.generate_step(task_for(prompt=prompt))
    assert len(runs) == 3  # two prompts and the negative one
    assert used == ["text_encoder"] * 2


# -- what the branches have in common


@torch.no_grad()
def test_branches_share_what_is_before_the_text() -> None:
    ours = twin(reference(CONFIG))
    latent = torch.randn(2, 6, 2, 4, 6)
    timestep = torch.rand(2) * 1000
    text = torch.randn(4, 7, CONFIG.text_dim)
    rows: list[int] = []

    def attention(q: Tensor, k: Tensor, v: Tensor, where: AttentionContext) -> Tensor:
        rows.append(len(q))
        return sdpa(q, k, v)

    expected = torch.cat([ours(latent, branch, timestep) for branch in text.chunk(2)])
    assert relative_error(ours(latent, text, timestep, attention=attention), expected) < 2e-6
    assert rows == [2, 4, 4]  # the first block's attention ran for one branch
    # one branch after the other
    rows.clear()
    start = SharedCfgPrefix()
    found = []
    for branch in text.chunk(2):
        embedded = replace(ours.embed(latent, branch, timestep), start=start)
        tokens = ours.run_blocks(embedded, attention=attention)
        found.append(ours.unpatchify(ours.final_layer(tokens, embedded.time), embedded.grid))
    assert rows == [2, 2, 2, 2, 2]
    assert torch.equal(torch.cat(found), expected)


@pytest.mark.parametrize("mode", ["batched", "sequential"])
@pytest.mark.parametrize("cache", [None, "pab", "taylorseer", "fbcache", "meancache", "cfg_gate"])
def test_caches_see_every_branch(mode, cache, tiny_folder, make_config) -> None:
    """Batched or in turn, with whatever cache: the same video, so the shared start hides nothing from any of
    them.
    """
    settings = make_config(tiny_folder)
    settings.infer.diffusion.cfg_batch = mode
    made = Generator(DiffusionBackend(settings))
    latent, _ = latent_and_video(made, task_for(num_inference_steps=8, flexcache=cache))
    settings.infer.diffusion.cfg_batch = "sequential" if mode == "batched" else "batched"
    other, _ = latent_and_video(
        Generator(DiffusionBackend(settings)), task_for(num_inference_steps=8, flexcache=cache)
    )
    assert relative_error(latent, other) < 1e-5


@pytest.mark.usefixtures("gelu_apart")
@torch.no_grad()
def test_compiled_blocks_share_too() -> None:
    ours = twin(reference(CONFIG))
    latent = torch.randn(1, 6, 2, 4, 4)
    text = torch.randn(2, 7, CONFIG.text_dim)
    names = list(ours.state_dict())
    expected = ours(latent, text, torch.tensor([300.0]))
    torch._dynamo.reset()
    ours.compile_blocks(backend="eager", fullgraph=True)
    assert torch.equal(ours(latent, text, torch.tensor([300.0])), expected)
    assert list(ours.state_dict()) == names
    torch._dynamo.reset()


def test_the_rotary_table_is_made_once_a_shape() -> None:
    ours = WanTransformer(CONFIG)
    first = ours.rope_table((2, 3, 4))
    again = ours.rope_table((2, 3, 4))
    assert first[0] is again[0] and ours.rope_table((2, 4, 3))[0] is not first[0]


# -- no step waits for the device


class Waits(TorchDispatchMode):
    """Collects whatever makes the CPU wait for a GPU: numbers that are read, copies across, answers that are
    looked at.
    """

    READS = ("_local_scalar_dense", "linalg_check_errors", "nonzero", "unique", "masked_select")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.launched = 0

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(operator)
        out = operator(*args, **(kwargs or {}))
        devices = {tensor.device.type for tensor in (*args, out) if isinstance(tensor, Tensor)}
        self.launched += "meta" in devices
        if ("meta" in devices and any(word in name for word in self.READS)) or (
            "copy" in name and len(devices) > 1
        ):
            self.found.append(name)
        return out


class Deferred(FiniteCheck):
    """A check whose answer has not arrived; to wait for it inside a step would be the step's fault."""

    def __init__(self, tensor: Tensor, name: str) -> None:
        super().__init__(tensor, name)
        self.required = False

    @property
    def is_known(self) -> bool:
        return False

    def require(self) -> None:
        self.required = True


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A device that computes shapes alone and refuses to give numbers: what runs on it without a word waits
    for nothing.
    """
    # the one thing that the device does not know
    monkeypatch.setattr(torch, "autocast", lambda device_type, enabled: nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device_type: False)
    return torch.device("meta")


@pytest.mark.parametrize("name", ["unipc", "dpm++", "euler"])
@pytest.mark.parametrize("mode", ["batched", "sequential"])
def test_no_step_waits_for_the_device(gpu, mode, name, monkeypatch) -> None:
    """Every step but the first, which may prepare. The last but one's check is asked for when the last is
    under way.
    """
    with gpu:
        network = WanTransformer(CONFIG).requires_grad_(False)
    sampler = Sampler(name, {"flow_shift": 3.0})
    lent: Any = SimpleNamespace(
        use_adapters=lambda loras: None,
        device=gpu,
        groups=ProcessGroups(),
        sampler_for=lambda recipe: sampler,
        model_pool=[network],
        attention=sdpa,
        choose_attention=lambda tokens, expert: None,
        set_precision=lambda expert, timestep, state: False,
        compile_note=lambda: None,
        flexcache_manager=FlexCacheManager(),
        offload=SimpleNamespace(use=lambda name: None, prefetched_blocks=lambda name: None),
        args=SimpleNamespace(infer=SimpleNamespace(diffusion=SimpleNamespace(cfg_batch=mode))),
        spec=SimpleNamespace(boundary=None, kind=TEXT_TO_VIDEO, transformers=[CONFIG]),
    )
    for room in (denoising, stages):
        monkeypatch.setattr(room, "FiniteCheck", Deferred)
    monkeypatch.setattr(conditioning, "rows_that_differ", lambda text: 8)
    task = task_for(height=32, width=32, num_frames=5, num_inference_steps=6, guidance_scale=5.0)
    task.resolved = task.params
    task.status = TaskStatus.DENOISING
    task.num_inference_steps = 6
    task.buffer.conditioning = torch.randn(2, 16, CONFIG.text_dim, device=gpu)
    task.buffer.latent = torch.randn(1, 6, 2, 4, 4, device=gpu)
    task.buffer.sampler = sampler.begin(6)
    units = stages.Stages(lent)
    units._denoise(task)
    for step in range(1, 6):
        before: Any = units._derived[task].check
        assert not before.required
        with Waits() as waits:
            units._denoise(task)
        assert not waits.found and waits.launched > 100
        assert before.required and (task not in units._derived) == (step == 5)
    assert task.status is TaskStatus.DECODING


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: float(x.sum()),
        lambda x: bool((x > 0).all()),
        lambda x: torch.zeros(()).to(x.device),
        lambda x: x.cpu(),
        lambda x: x.copy_(torch.zeros(2, 2)),
        lambda x: torch.linalg.solve(x, x),
        lambda x: x.nonzero(),
        lambda x: UniPCMultistepScheduler(
            use_flow_sigmas=True, prediction_type="flow_prediction"
        ).set_timesteps(3, device=x.device),
    ],
)
def test_a_wait_is_seen(gpu, wait) -> None:
    x = torch.randn(2, 2, device=gpu)
    with Waits() as waits:
        refused = False
        try:
            wait(x)
        except (RuntimeError, NotImplementedError):
            refused = True
    assert refused or waits.found


def test_a_late_answer_is_the_answer() -> None:
    FiniteCheck(torch.zeros(3), "zeros").require()
    for value, kind in ((torch.nan, "NaN"), (torch.inf, "Inf"), (-torch.inf, "Inf")):
        check = FiniteCheck(torch.tensor([0.0, value]), "latent")
        assert check.is_known
        with pytest.raises(ValueError, match=f"{kind} detected in latent"):
            check.require()


def test_bytes_are_what_is_held() -> None:
    prepared = TextKVCache(torch.zeros(1, 10, 60), 10, keep=True)
    prepared.keys(0, lambda rows: (torch.zeros(1, 10, 3, 20), torch.zeros(1, 10, 3, 20)))
    assert prepared.bytes == 3 * 10 * 60 * 4
