"""The full-size models of the Wan family: sizes, experts and defaults, as their authors have them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

from chitu_diffusion.models.kinds import CONTROLLED_VIDEO, IMAGE_TO_VIDEO, TEXT_IMAGE_TO_VIDEO
from chitu_diffusion.models.spec import Defaults, LatentGeometry, ModelSpec
from chitu_diffusion.models.wan.cache_coefficients import WAN_1_3B, WAN_14B
from chitu_diffusion.models.wan.config import WanConfig
from chitu_diffusion.models.wan.vae_22 import VAE_22

_SMALL = WanConfig(num_attention_heads=12, ffn_dim=8960, num_layers=30)
_LARGE = WanConfig()
_LARGE_IMAGE = WanConfig(in_channels=36)
_MIDDLE = WanConfig(
    num_attention_heads=24, in_channels=48, out_channels=48, ffn_dim=14336, num_layers=30
)  # its VAE has 48 channels
_LARGE_CLIP = WanConfig(in_channels=36, image_dim=1280, added_kv_proj_dim=5120)
_LARGE_FRAMES = replace(_LARGE_CLIP, pos_embed_seq_len=514)
_SMALL_VACE = replace(_SMALL, vace_layers=tuple(range(0, 30, 2)), vace_in_channels=96)
_LARGE_VACE = replace(_LARGE, vace_layers=tuple(range(0, 40, 5)), vace_in_channels=96)

# Wan2.1, wan/configs/wan_i2v_14B.py: against a camera that shakes; and, between two frames, cuts.
_STEADY = "镜头晃动，" + Defaults().negative_prompt
_STEADY_UNCUT = "镜头切换，" + _STEADY

FULL_SIZE: Mapping[str, ModelSpec] = MappingProxyType(
    {
        spec.name: spec
        for spec in (
            ModelSpec(
                "Wan2.1-T2V-1.3B",
                (_SMALL,),
                hub_ids=("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "Wan-AI/Wan2.1-T2V-1.3B"),
                defaults=Defaults(shift=5.0),
                measured=WAN_1_3B,
            ),
            ModelSpec(
                "Wan2.1-T2V-14B",
                (_LARGE,),
                hub_ids=("Wan-AI/Wan2.1-T2V-14B-Diffusers", "Wan-AI/Wan2.1-T2V-14B"),
                defaults=Defaults(shift=5.0),
                measured=WAN_14B,
            ),
            ModelSpec(
                "Wan2.1-I2V-14B-480P",
                (_LARGE_CLIP,),
                kind=IMAGE_TO_VIDEO,
                hub_ids=("Wan-AI/Wan2.1-I2V-14B-480P-Diffusers", "Wan-AI/Wan2.1-I2V-14B-480P"),
                defaults=Defaults(steps=40, shift=3.0, negative_prompt=_STEADY),
            ),
            ModelSpec(
                "Wan2.1-I2V-14B-720P",
                (_LARGE_CLIP,),
                kind=IMAGE_TO_VIDEO,
                hub_ids=("Wan-AI/Wan2.1-I2V-14B-720P-Diffusers", "Wan-AI/Wan2.1-I2V-14B-720P"),
                defaults=Defaults(height=720, width=1280, steps=40, shift=5.0, negative_prompt=_STEADY),
            ),
            ModelSpec(
                "Wan2.1-FLF2V-14B-720P",
                (_LARGE_FRAMES,),
                kind=IMAGE_TO_VIDEO,
                hub_ids=("Wan-AI/Wan2.1-FLF2V-14B-720P-diffusers", "Wan-AI/Wan2.1-FLF2V-14B-720P"),
                defaults=Defaults(
                    height=720, width=1280, guidance=(5.5,), shift=16.0, negative_prompt=_STEADY_UNCUT
                ),
            ),
            ModelSpec(
                "Wan2.1-VACE-1.3B",
                (_SMALL_VACE,),
                kind=CONTROLLED_VIDEO,
                hub_ids=("Wan-AI/Wan2.1-VACE-1.3B-diffusers", "Wan-AI/Wan2.1-VACE-1.3B"),
                defaults=Defaults(shift=16.0),
            ),
            ModelSpec(
                "Wan2.1-VACE-14B",
                (_LARGE_VACE,),
                kind=CONTROLLED_VIDEO,
                hub_ids=("Wan-AI/Wan2.1-VACE-14B-diffusers", "Wan-AI/Wan2.1-VACE-14B"),
                defaults=Defaults(shift=16.0),
            ),
            ModelSpec(
                "Wan2.2-T2V-A14B",
                (_LARGE, _LARGE),
                boundary=0.875,
                hub_ids=("Wan-AI/Wan2.2-T2V-A14B-Diffusers", "Wan-AI/Wan2.2-T2V-A14B"),
                defaults=Defaults(steps=40, guidance=(4.0, 3.0), shift=12.0),
                measured=WAN_14B,
            ),
            ModelSpec(
                "Wan2.2-I2V-A14B",
                (_LARGE_IMAGE, _LARGE_IMAGE),
                kind=IMAGE_TO_VIDEO,
                boundary=0.9,
                hub_ids=("Wan-AI/Wan2.2-I2V-A14B-Diffusers", "Wan-AI/Wan2.2-I2V-A14B"),
                defaults=Defaults(steps=40, guidance=(3.5, 3.5), shift=5.0),
            ),
            ModelSpec(
                "Wan2.2-TI2V-5B",
                (_MIDDLE,),
                kind=TEXT_IMAGE_TO_VIDEO,
                hub_ids=("Wan-AI/Wan2.2-TI2V-5B-Diffusers", "Wan-AI/Wan2.2-TI2V-5B"),
                geometry=LatentGeometry.of_vae(VAE_22),
                defaults=Defaults(height=704, width=1280, num_frames=121, fps=24, shift=5.0),
            ),
        )
    }
)

# Where a folder says nothing and looks like no full-size model: what suits wan-tiny's size.
SMALL_DEFAULTS = Defaults(height=128, width=128, num_frames=33, negative_prompt="")
