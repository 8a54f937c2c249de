"""What a transformer's forward is given, checked before anything is computed: a latent, a text, a time.

Knows shapes, dtypes and devices; computes nothing, and never waits for a device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from chitu_diffusion.errors import UsageError, plain_number
from chitu_diffusion.models.wan.config import TRAINED_STEPS, WanConfig
from chitu_diffusion.models.wan.positions import Grid
from chitu_diffusion.models.wan.text_kv import TextKVCache


def require_floats(tensor: object, name: str, shape: str) -> Tensor:
    """A tensor of floating-point numbers that holds values.

    Args:
        name: what an error calls it.
        shape: what an error says to use, such as "[B, C, T, H, W]".

    Raises:
        UsageError: anything else.
    """
    if not isinstance(tensor, Tensor):
        raise UsageError(f"{name} is a {type(tensor).__name__}; use a tensor {shape}", field=name)
    if not tensor.is_floating_point() or tensor.layout != torch.strided:
        raise UsageError(
            f"{name} is {tensor.dtype}, {tensor.layout}; use dense floats {shape}: {name}.float()", field=name
        )
    return tensor


def latent_grid(latent: object, config: WanConfig, device: torch.device) -> Grid:
    """The token grid of a latent for a network on a device.

    Raises:
        UsageError: not [B, C, T, H, W] of the network's channels, of whole patches and on its device.
    """
    channels = config.in_channels
    latent = require_floats(latent, "latent", f"[B, {channels}, T, H, W]")
    if latent.ndim != 5 or latent.shape[1] != channels or 0 in latent.shape:
        raise UsageError(f"latent is {list(latent.shape)}; use [B, {channels}, T, H, W]", field="latent")
    patch = config.patch_size
    if any(size % step for size, step in zip(latent.shape[2:], patch, strict=True)):
        raise UsageError(
            f"latent axes {list(latent.shape[2:])} are not multiples of the patch {list(patch)}; pad "
            "them, or use denoise_loop, which does",
            field="latent",
        )
    _require_device(latent, "latent", device)
    frames, rows, columns = (size // step for size, step in zip(latent.shape[2:], patch, strict=True))
    return frames, rows, columns


def text_copies(text: object, batch: int, config: WanConfig, device: torch.device) -> int:
    """How many guidance branches' text there is for a batch of latents.

    Raises:
        UsageError: not [k * batch, L, D] of the network's width and on its device.
    """
    width = config.text_dim
    rows = text.rows if isinstance(text, TextKVCache) else text
    rows = require_floats(rows, "embeddings", f"[{batch}, L, {width}]")
    if isinstance(text, TextKVCache):
        width = config.dim
    if rows.ndim != 3 or 0 in rows.shape or rows.shape[0] % batch or rows.shape[2] != width:
        raise UsageError(
            f"embeddings are {list(rows.shape)}; use [{batch}, L, {width}], or as many rows for each "
            "guidance branch",
            field="embeddings",
        )
    _require_device(rows, "embeddings", device)
    return rows.shape[0] // batch


def require_image(image: object, config: WanConfig, batch: int) -> None:
    """An image encoder's rows where, and only where, the network attends to them.

    Raises:
        UsageError: none, one too many, or not [1 or batch, I, image_dim].
    """
    width = config.image_dim
    if width is None and image is None:
        return
    if width is None:
        raise UsageError("this network attends to no image; leave image out", field="image")
    rows = config.pos_embed_seq_len
    shape = f"[1 or {batch}, {rows or 'I'}, {width}]"
    if image is None:
        raise UsageError(
            "this network attends to an image, too; use make_text_kv(text, image=...), or Conditioning(text, "
            f"image=...), with rows {shape} as pipelines.encoding.encode_pictures gives them",
            field="image",
        )
    image = require_floats(image, "image", shape)
    fits = image.ndim == 3 and image.shape[0] in (1, batch) and image.shape[2] == width
    if not fits or image.shape[1] != (rows or max(1, image.shape[1])):
        raise UsageError(f"image is {list(image.shape)}; use {shape}", field="image")


def check_control(
    control: object, scale: float | tuple[float, ...], config: WanConfig, latent: Tensor
) -> None:
    """Control latents that the network takes and that lie on its latent, and a scale for each hint.

    Raises:
        UsageError: something else.
    """
    if control is None:
        return
    if config.vace_layers is None:
        raise UsageError("this network takes no control; leave control out", field="control")
    expected = [len(latent), config.vace_in_channels, *latent.shape[2:]]
    control = require_floats(control, "control", f"{expected}")
    if list(control.shape) not in (expected, [1, *expected[1:]]):
        raise UsageError(f"control is {list(control.shape)}; use {expected}, or one for all", field="control")
    _require_device(control, "control", latent.device)
    if isinstance(scale, tuple) and len(scale) != len(config.vace_layers):
        raise UsageError(
            f"control_scale has {len(scale)} numbers; use one, or {len(config.vace_layers)}",
            field="control_scale",
        )


def read_timestep(timestep: object, batch: int, device: torch.device, name: str = "timestep") -> Tensor:
    """Times as [batch] or [1] on a device; those that lie on a GPU are not looked at.

    Args:
        timestep: a number, or a tensor: a scalar, [1] or [batch].
        name: what an error calls it.

    Raises:
        UsageError: anything else, or a time outside 0 to 1000.
    """
    times = []
    timestep = plain_number(timestep)
    if isinstance(timestep, Tensor):
        real = timestep.dtype != torch.bool and not timestep.is_complex()
        if timestep.ndim > 1 or timestep.numel() not in (1, batch) or not real:
            found = f"{list(timestep.shape)} of {timestep.dtype}"
            raise UsageError(f"{name} is {found}; use a number, or a tensor [1] or [{batch}]", field=name)
        if timestep.device.type == "cpu":
            times = timestep.reshape(-1).tolist()
    elif isinstance(timestep, int | float) and not isinstance(timestep, bool):
        times = [float(timestep)]
    else:
        raise UsageError(f"{name} = {timestep!r}; use a number, or a tensor [1] or [{batch}]", field=name)
    for time in times:
        if not 0 <= time <= TRAINED_STEPS:
            raise UsageError(
                f"{name} = {time}; use 0 to {TRAINED_STEPS}, as a solver's timesteps are", field=name
            )
    if len(times) == 1:
        # filled in place: a copy from the CPU would wait for all that the device still has to do
        return torch.full((1,), times[0], device=device)
    return torch.as_tensor(timestep).reshape(-1).to(device)


def _require_device(tensor: Tensor, name: str, device: torch.device) -> None:
    if tensor.device != device:
        raise UsageError(
            f"{name} is on {tensor.device}, the network's weights on {device}; use {name}.to('{device}')",
            field=name,
        )
