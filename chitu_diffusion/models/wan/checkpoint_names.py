"""What a parameter is called in the official Wan files, given its name in diffusers' layout. Strings only.

Each function is one-to-one, so a table made of it over a network's parameters serves both directions. Shapes
are the same in both layouts. Sources of the facts: the parameter names of the two implementations themselves
(Wan-Video/Wan2.1, wan/modules, and diffusers / transformers).
"""

from __future__ import annotations

import re

# (diffusers, official); first match wins, and each stands at the start of a name or behind a dot.
_TRANSFORMER = (
    ("condition_embedder.time_embedder.linear_1", "time_embedding.0"),
    ("condition_embedder.time_embedder.linear_2", "time_embedding.2"),
    ("condition_embedder.time_proj", "time_projection.1"),
    ("condition_embedder.text_embedder.linear_1", "text_embedding.0"),
    ("condition_embedder.text_embedder.linear_2", "text_embedding.2"),
    ("condition_embedder.image_embedder.norm1", "img_emb.proj.0"),
    ("condition_embedder.image_embedder.ff.net.0.proj", "img_emb.proj.1"),
    ("condition_embedder.image_embedder.ff.net.2", "img_emb.proj.3"),
    ("condition_embedder.image_embedder.norm2", "img_emb.proj.4"),
    ("condition_embedder.image_embedder", "img_emb"),
    ("proj_out", "head.head"),
)
_BLOCK = (
    ("to_q", "q"),
    ("to_k", "k"),
    ("to_v", "v"),
    ("to_out.0", "o"),
    ("norm_q", "norm_q"),
    ("norm_k", "norm_k"),
    ("add_k_proj", "k_img"),
    ("add_v_proj", "v_img"),
    ("norm_added_k", "norm_k_img"),
)
_TEXT_LAYER = {
    "layer.0.layer_norm": "norm1",
    "layer.0.SelfAttention.relative_attention_bias": "pos_embedding.embedding",
    "layer.0.SelfAttention.q": "attn.q",
    "layer.0.SelfAttention.k": "attn.k",
    "layer.0.SelfAttention.v": "attn.v",
    "layer.0.SelfAttention.o": "attn.o",
    "layer.1.layer_norm": "norm2",
    "layer.1.DenseReluDense.wi_0": "ffn.gate.0",
    "layer.1.DenseReluDense.wi_1": "ffn.fc1",
    "layer.1.DenseReluDense.wo": "ffn.fc2",
}
_RESIDUAL = {
    "norm1": "residual.0",
    "conv1": "residual.2",
    "norm2": "residual.3",
    "conv2": "residual.6",
    "conv_shortcut": "shortcut",
}
_VAE_TOP = {
    "quant_conv": "conv1",
    "post_quant_conv": "conv2",
    "encoder.conv_in": "encoder.conv1",
    "encoder.norm_out": "encoder.head.0",
    "encoder.conv_out": "encoder.head.2",
    "decoder.conv_in": "decoder.conv1",
    "decoder.norm_out": "decoder.head.0",
    "decoder.conv_out": "decoder.head.2",
}
# The encoder's embedding is the shared one under a second name; files hold either or both.
TEXT_TIES = {"encoder.embed_tokens.weight": "shared.weight"}


def official_transformer_name(name: str) -> str:
    """`WanTransformer`'s parameter name -> the official one.

    Note that norm2 and norm3 change places: official norm3 is the affine one before the cross-attention.
    """
    if name == "scale_shift_table":
        return "head.modulation"
    for ours, theirs in _TRANSFORMER:
        if name.startswith(ours + "."):
            return (theirs + name[len(ours) :]).replace("img_emb.pos_embed", "img_emb.emb_pos")
    match = re.fullmatch(r"((?:vace_)?blocks\.\d+)\.(.+)", name)
    return name if match is None else f"{match[1]}.{_official_block_name(match[2])}"


def _official_block_name(name: str) -> str:
    if name == "scale_shift_table":
        return "modulation"
    place, _, rest = name.partition(".")
    if place in ("attn1", "attn2"):
        attention = "self_attn" if place == "attn1" else "cross_attn"
        projection, _, kind = rest.rpartition(".")
        return f"{attention}.{dict(_BLOCK)[projection]}.{kind}"
    if place in ("proj_in", "proj_out"):  # of the control stream
        return f"{'before_proj' if place == 'proj_in' else 'after_proj'}.{rest}"
    if place == "norm2":
        return f"norm3.{rest}"
    if name.startswith("ffn.net.0.proj."):
        return name.replace("net.0.proj", "0")
    return name.replace("ffn.net.2.", "ffn.2.")


def official_text_name(name: str) -> str:
    """`UMT5EncoderModel`'s parameter name -> the one in `models_t5_umt5-xxl-enc-bf16.pth`."""
    if TEXT_TIES.get(name, name) == "shared.weight":
        return "token_embedding.weight"
    if name == "encoder.final_layer_norm.weight":
        return "norm.weight"
    match = re.fullmatch(r"encoder\.block\.(\d+)\.(.+)\.weight", name)
    if match is None or match[2] not in _TEXT_LAYER:
        raise KeyError(f"{name!r} is not a parameter of a UMT5 encoder")
    return f"blocks.{match[1]}.{_TEXT_LAYER[match[2]]}.weight"


def official_vae_name(name: str, res_blocks: int = 2, residual: bool = False) -> str:
    """`AutoencoderKLWan`'s parameter name -> the one in `Wan2.1_VAE.pth` or, `residual`, `Wan2.2_VAE.pth`.

    Args:
        name: the parameter.
        res_blocks: `num_res_blocks` of the VAE's config: official up-sampling blocks stand in one flat list,
            each level taking res_blocks + 1 residual blocks and one resampler.
        residual: `is_residual`: each level is a list of its own there.
    """
    place, _, kind = name.rpartition(".")
    if place in _VAE_TOP:
        return f"{_VAE_TOP[place]}.{kind}"
    half, _, rest = place.partition(".")
    if match := re.fullmatch(r"mid_block\.resnets\.(\d)\.(.+)", rest):
        return f"{half}.middle.{2 * int(match[1])}.{_RESIDUAL[match[2]]}.{kind}"
    if match := re.fullmatch(r"mid_block\.attentions\.0\.(.+)", rest):
        return f"{half}.middle.1.{match[1]}.{kind}"
    if residual and (match := re.fullmatch(r"(down|up)_blocks\.(\d+)\.resnets\.(\d+)\.(.+)", rest)):
        level = f"{match[1]}samples"
        return f"{half}.{level}.{match[2]}.{level}.{match[3]}.{_RESIDUAL[match[4]]}.{kind}"
    if residual and (match := re.fullmatch(r"(down|up)_blocks\.(\d+)\.(?:down|up)sampler\.(.+)", rest)):
        level = f"{match[1]}samples"
        after = res_blocks + (match[1] == "up")
        return f"{half}.{level}.{match[2]}.{level}.{after}.{match[3]}.{kind}"
    if match := re.fullmatch(r"down_blocks\.(\d+)\.(.+)", rest):
        return f"{half}.downsamples.{match[1]}.{_RESIDUAL.get(match[2], match[2])}.{kind}"
    if match := re.fullmatch(r"up_blocks\.(\d+)\.resnets\.(\d+)\.(.+)", rest):
        flat = int(match[1]) * (res_blocks + 2) + int(match[2])
        return f"{half}.upsamples.{flat}.{_RESIDUAL[match[3]]}.{kind}"
    if match := re.fullmatch(r"up_blocks\.(\d+)\.upsamplers\.0\.(.+)", rest):
        flat = int(match[1]) * (res_blocks + 2) + res_blocks + 1
        return f"{half}.upsamples.{flat}.{match[2]}.{kind}"
    raise KeyError(f"{name!r} is not a parameter of a Wan VAE")
