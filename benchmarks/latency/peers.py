"""diffusers' Wan transformer with our weights, in the ways its users run it: eager, compiled, with
FlashAttention-3, and with torchao's 8-bit linear layers and 8-bit attention.

Knows diffusers and torchao; no engine of ours. `offer_flash_attention_3` must be called before diffusers is
imported anywhere, for diffusers looks for its kernels once.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from chitu_diffusion.models.wan.config import WanConfig

_KERNELS = "fa3_fwd_interface"
"""The module of the FlashAttention-3 wheel that can be had ready built (forward only)."""

_BRIDGE = '''"""FlashAttention-3 under the names that diffusers (this module's) and torch
(`torch.ops.flash_attn_3`) ask for."""
import torch
from fa3_fwd_interface import *
from fa3_fwd_interface import flash_attn_func, flash_attn_varlen_func

_library = torch.library.Library("flash_attn_3", "DEF")
_forward = torch.ops.fa3_fwd.fwd
_library.define(str(_forward.default._schema).removeprefix("fa3_fwd::"))
_library.impl("fwd", lambda *values: _forward(*values), "CUDA")


def _no_backward(*values):
    raise NotImplementedError("these kernels have no backward pass")


_library.define("bwd(Tensor grad) -> Tensor")
_library.impl("bwd", _no_backward, "CUDA")
'''


def offer_flash_attention_3() -> str | None:
    """Makes the wheel `fa3-fwd` look like an installed `flash_attn_3`; returns why not, or None where it is
    done.

    diffusers asks whether a package `flash_attn_3` can be found and has a version, then imports
    `flash_attn_interface`; torch (for torchao's 8-bit attention) imports the same module and takes
    `torch.ops.flash_attn_3.fwd`. A folder with both and a version's record answers every one of these
    questions as an installation would; nothing of diffusers, torch or torchao is changed.

    Raises:
        RuntimeError: diffusers is imported already.
    """
    if importlib.util.find_spec("flash_attn_interface") is not None:
        return None
    if importlib.util.find_spec(_KERNELS) is None:
        return (
            f"no FlashAttention-3: neither flash_attn_interface nor {_KERNELS} is installed (pip install "
            "fa3-fwd)"
        )
    if "diffusers" in sys.modules:
        raise RuntimeError(
            "diffusers is imported already and has looked for FlashAttention-3; offer it first"
        )
    folder = Path(tempfile.mkdtemp(prefix="flash_attn_3-"))
    write_bridge(folder)
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    return None


def write_bridge(folder: Path) -> None:
    """The package, its record and the module of functions, in a folder that is to go onto the path."""
    (folder / "flash_attn_interface.py").write_text(_BRIDGE, encoding="utf-8")
    package = folder / "flash_attn_3"
    record = folder / "flash_attn_3-3.0.0.dist-info"
    package.mkdir()
    (package / "__init__.py").write_text("", encoding="utf-8")
    record.mkdir()
    (record / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: flash_attn_3\nVersion: 3.0.0\n", encoding="utf-8"
    )


def twin(config: WanConfig, weights: Mapping[str, Tensor], device: torch.device) -> nn.Module:
    """diffusers' transformer that shares its weights with a `state_dict` of ours: no second copy.

    The rotary tables are no weights; they are made anew, in float32 as `from_pretrained` leaves them.
    """
    from diffusers import WanTransformer3DModel

    fields = {key: value for key, value in config.to_json().items() if not key.startswith("_")}
    fields["patch_size"] = tuple(fields["patch_size"])
    with torch.device("meta"):
        model = WanTransformer3DModel(**fields)
    model.load_state_dict(dict(weights), strict=True, assign=True)
    model.rope = type(model.rope)(config.attention_head_dim, config.patch_size, config.rope_max_seq_len)
    return model.to(device).eval().requires_grad_(False)


def eight_bit_linears(model: nn.Module, tuned: bool = True) -> None:
    """torchao's float8 for weights and activations, a scale for each row, in every linear layer of the
    blocks.

    tuned: with the compiler's options that torchao sets, which time each kernel's launch: two minutes for one
    block.
    """
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_

    config = Float8DynamicActivationFloat8WeightConfig(granularity=PerRow(), set_inductor_config=tuned)
    quantize_(
        model,
        config,
        filter_fn=lambda module, name: isinstance(module, nn.Linear) and name.startswith("blocks."),
    )


def eight_bit_attention(model: nn.Module) -> nn.Module:
    """torchao's 8-bit FlashAttention-3, with rotary embedding and quantisation fused where the compiler finds
    them.
    """
    from torchao.prototype.attention import apply_low_precision_attention

    return apply_low_precision_attention(model)


@contextmanager
def compiler_settings_kept() -> Iterator[None]:
    """torchao sets the compiler's options for good, its attention a pass on every graph; this puts them back
    for the others.
    """
    from torch._inductor import config

    keys = (
        "pre_grad_custom_pass",
        "coordinate_descent_tuning",
        "coordinate_descent_check_all_directions",
        "force_fuse_int_mm_with_mul",
        "fx_graph_cache",
        "triton.unique_kernel_names",
    )
    known = config.get_config_copy()
    with config.patch({key: known[key] for key in keys if key in known}):
        yield


def one_forward(model: nn.Module, latent: Tensor, timestep: Tensor, text: Tensor) -> Callable[[], Tensor]:
    """A call of diffusers' transformer for one guidance branch."""

    def call() -> Tensor:
        with torch.no_grad():
            velocity: Tensor = model(
                hidden_states=latent, timestep=timestep, encoder_hidden_states=text, return_dict=False
            )[0]
        return velocity

    return call
