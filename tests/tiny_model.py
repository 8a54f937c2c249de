"""A complete text-to-video model with random weights, small enough for every test, in diffusers' own
layout.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

PROMPTS = (
    "A cat walking on grass",
    "a red fish swims left in the sea",
    "two dogs jump, the sky is blue",
    "blurry, static, ugly",
)
TEXT_DIM = 32
IMAGE_DIM = 24
IMAGE_SIDE = 28
LATENT_CHANNELS = 4


def write_tiny_model(
    folder: Path,
    *,
    experts: int = 1,
    shift: float = 3.0,
    seed: int = 0,
    heads: int = 2,
    image: bool = False,
    token_times: bool = False,
    clip: int = 0,
    control: bool = False,
) -> Path:
    """Writes a WanPipeline folder: 2 blocks with heads of 16 channels, VAE of base width 8, T5 of 2 layers
    with its own tokenizer.

    With two experts, they differ, and the boundary lies at 0.875 as in Wan2.2. With `image` it is a
    WanImageToVideoPipeline, whose networks take a mask of 4 channels and the keyframes' latent besides; with
    `clip` 1 or 2 also an image encoder's rows of as many pictures, as Wan2.1's do. With `token_times` it has
    `expand_timesteps` and a VAE with shortcuts and patches, as Wan2.2-TI2V-5B. With `control` it is a
    WanVACEPipeline, whose networks have a stream of control latents.
    """
    from diffusers import UniPCMultistepScheduler, WanImageToVideoPipeline, WanPipeline, WanVACEPipeline

    torch.manual_seed(seed)
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift, num_train_timesteps=1000
    )
    channels = 2 * LATENT_CHANNELS + 4 if image else LATENT_CHANNELS
    transformers = [_transformer(heads, channels, clip, control) for _ in range(experts)]
    usual = WanImageToVideoPipeline if image else WanPipeline
    pipeline = (WanVACEPipeline if control else usual)(
        **(_image_encoder() if clip else {}),
        tokenizer=_tokenizer(),
        text_encoder=_text_encoder(),
        vae=_vae(residual=token_times),
        scheduler=scheduler,
        transformer=transformers[0],
        transformer_2=transformers[1] if experts == 2 else None,
        boundary_ratio=0.875 if experts == 2 else None,
        **({} if control else {"expand_timesteps": token_times}),
    )
    pipeline.save_pretrained(folder)
    defaults = {
        "height": 32,
        "width": 32,
        "num_frames": 5,
        "fps": 8,
        "steps": 4,
        "negative_prompt": "blurry, ugly",
    }
    defaults["guidance"] = [4.0, 3.0] if experts == 2 else [5.0]
    (folder / "chitu.json").write_text(json.dumps({"name": "random-tiny", "defaults": defaults}))
    return folder


def _image_encoder():
    """CLIP of 3 layers on 4 patches."""
    from transformers import CLIPVisionConfig, CLIPVisionModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    config = CLIPVisionConfig(
        hidden_size=IMAGE_DIM,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=IMAGE_SIDE,
        patch_size=IMAGE_SIDE // 2,
        hidden_act="gelu",
    )
    side = {"height": IMAGE_SIDE, "width": IMAGE_SIDE}
    return {
        "image_encoder": CLIPVisionModel(config).eval(),
        "image_processor": CLIPImageProcessorPil(size={"shortest_edge": IMAGE_SIDE}, crop_size=side),
    }


def _transformer(heads: int, channels: int, clip: int = 0, control: bool = False):
    from diffusers import WanTransformer3DModel, WanVACETransformer3DModel

    more = {"vace_layers": [0, 1], "vace_in_channels": 2 * LATENT_CHANNELS + 64} if control else {}
    model = (WanVACETransformer3DModel if control else WanTransformer3DModel)(
        **more,
        patch_size=(1, 2, 2),
        num_attention_heads=heads,
        attention_head_dim=16,
        in_channels=channels,
        out_channels=LATENT_CHANNELS,
        text_dim=TEXT_DIM,
        freq_dim=32,
        ffn_dim=64,
        num_layers=2,
        cross_attn_norm=True,
        image_dim=IMAGE_DIM if clip else None,
        added_kv_proj_dim=16 * heads if clip else None,
        pos_embed_seq_len=2 * 5 if clip == 2 else None,
    )
    # diffusers starts some tables near zero; spread them so that time and text show in the output
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.add_(torch.randn_like(parameter) * 0.05)
        for block in model.blocks:
            block.attn2.to_out[0].weight.mul_(6)  # the prompt weighs enough that a wrong guidance cannot hide
        for block in model.vace_blocks if control else ():
            block.proj_out.weight.mul_(8)  # nor a wrong control
    return model.eval()


def _vae(residual: bool):
    from diffusers import AutoencoderKLWan

    mean = torch.randn(LATENT_CHANNELS).mul(0.2).tolist()
    deviation = torch.rand(LATENT_CHANNELS).add(0.5).tolist()
    if residual:
        stages = {"dim_mult": [1, 1, 1], "temperal_downsample": [True, True], "is_residual": True}
        stages |= {"patch_size": 2, "in_channels": 12, "out_channels": 12}
    else:
        stages = {"dim_mult": [1, 1, 1, 1], "temperal_downsample": [False, True, True]}
    return AutoencoderKLWan(
        base_dim=8,
        z_dim=LATENT_CHANNELS,
        num_res_blocks=1,
        latents_mean=mean,
        latents_std=deviation,
        **stages,
    ).eval()


def _text_encoder():
    from transformers import UMT5Config, UMT5EncoderModel

    config = UMT5Config(
        vocab_size=128,
        d_model=TEXT_DIM,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        dropout_rate=0.0,
    )
    return UMT5EncoderModel(config).eval()


def _tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>"
    )
    tokenizer.train_from_iterator(PROMPTS * 20, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
