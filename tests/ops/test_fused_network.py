"""The whole network on the fused kernels, in Triton's interpreter (on a GPU: as they are), against the plain
one.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from small_networks import COMPILED, EverySite
from torch import Tensor

from chitu_diffusion.models.wan.transformer import WanTransformer
from chitu_diffusion.ops import fused
from chitu_diffusion.ops.float8_linear import Float8Plan, set_float8, to_float8

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [
    pytest.mark.skipif(not fused.HAS_TRITON, reason="the kernels need Triton: pip install triton"),
    pytest.mark.filterwarnings("ignore:overflow encountered in exp"),
]


@pytest.fixture(autouse=True)
def kernels_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    for room in ("models.wan.transformer", "models.wan.block", "ops.float8_linear"):
        monkeypatch.setattr(f"chitu_diffusion.{room}.can_fuse", lambda x: not torch.is_grad_enabled())


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("cross_attn_norm", [True, False])
@pytest.mark.parametrize("float8", [False, True])
@torch.no_grad()
def test_kernels_and_torch_give_one_velocity(
    cross_attn_norm: bool, float8: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with torch.device(DEVICE):
        network = (
            WanTransformer(replace(COMPILED, num_layers=2, cross_attn_norm=cross_attn_norm))
            .eval()
            .requires_grad_(False)
        )
        latent = torch.randn(2, 4, 1, 2, 6)
        text = torch.randn(2, 7, 24)
        time = torch.tensor([900.0, 20.0])
    if float8:
        set_float8(to_float8(list(network.blocks), Float8Plan(keep=("attn2.to_k", "attn2.to_v"))), True)
    launched: list[str] = []
    for name in ("residual_norm", "qk_norm_rotate", "activation"):
        operator = getattr(fused.fused_triton, name)
        monkeypatch.setattr(
            fused.fused_triton,
            name,
            lambda *args, name=name, operator=operator: launched.append(name) or operator(*args),
        )
    network.use_fused(False)
    expected = network(latent, text, time)
    assert not launched
    network.use_fused(True)
    # the interpreter's own rounding to 8 bits is coarser than a GPU's, see test_fused
    bound = (3e-2 if DEVICE == "cpu" else 5e-3) if float8 else 1e-5
    assert relative_error(network(latent, text, time), expected) < bound
    # in every block q's and k's turn; a norm before the first module and one residual behind each of the
    # three; the head's norm
    assert launched.count("qk_norm_rotate") == 2
    assert launched.count("residual_norm") == 2 * 4 + 1
    # in 8 bits two outputs of attention, the GELU, and the rows for q where no norm comes before them
    assert launched.count("activation") == (0 if not float8 else 2 * 3 if cross_attn_norm else 2 * 4)
    if cross_attn_norm:
        assert relative_error(network(latent, text, time, cache=EverySite()), expected) < bound
        longer = torch.randn(2, 4, 2, 2, 4, device=DEVICE)
        known = network(longer, text, time, first_timestep=0.0)  # the first frame's tokens
        network.use_fused(False)
        assert relative_error(known, network(longer, text, time, first_timestep=0.0)) < bound
        network.use_fused(True)
    launched.clear()
    with torch.enable_grad():
        network(latent, text, time)
    assert not launched
