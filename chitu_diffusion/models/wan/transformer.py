"""The Wan diffusion transformer, as single-device code.

Names and shapes of the parameters are those of diffusers' `WanTransformer3DModel`. The network takes its
attention and its cache as arguments and is cut into pieces (`embed`, `run_blocks`, `final_layer`,
`unpatchify`), so that whoever shards the sequence, streams the blocks or caches features does it between the
pieces. It knows no rank, sampler, prompt or task.

Architecture: "Wan: Open and Advanced Large-Scale Video Generative Models", arXiv 2503.20314, section 4.2.

Precision. The residual stream has the dtype of the patch embedding's weight; every matrix product runs in its
own weight's dtype (or autocast's); LayerNorm, modulation, gates and rotary turns run in float32 and are
rounded once. With bfloat16 weights and `KEEP_FLOAT32` in float32 this is diffusers' own rule. Under autocast
with float32 weights, the stream and the time embedding stay float32.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from types import MethodType
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from chitu_diffusion.attention.kernels import AttentionContext, AttentionFn, DenseAttention, sdpa
from chitu_diffusion.flexcache.interface import MODULE_LEVELS, NO_CACHE, Level, Site, SiteInputs, StepCache
from chitu_diffusion.models.wan.block import Float32LayerNorm, WanBlock, WanVACEBlock
from chitu_diffusion.models.wan.block_inputs import BlockInputs, SharedCfgPrefix
from chitu_diffusion.models.wan.config import WanConfig
from chitu_diffusion.models.wan.embeddings import PatchEmbedding, TimeTextEmbedding
from chitu_diffusion.models.wan.forward_inputs import (
    check_control,
    latent_grid,
    read_timestep,
    require_image,
    text_copies,
)
from chitu_diffusion.models.wan.positions import Grid, RotaryTable, rope_table
from chitu_diffusion.models.wan.text_kv import TextKV, TextKVCache, dedup_padding
from chitu_diffusion.models.wan.token_times import TimeRows
from chitu_diffusion.ops.compile import compiled, let_length_vary
from chitu_diffusion.ops.float8_linear import Float8Linear
from chitu_diffusion.ops.fused import can_fuse, layer_norm

__all__ = ["KEEP_FLOAT32", "WanConfig", "WanFeatures", "WanTransformer", "WanVelocity"]

# Parts of parameter names that stay float32 when the rest is loaded in 16 bits (diffusers' rule for this
# network).
KEEP_FLOAT32 = ("time_embedder", "scale_shift_table", "norm1", "norm2", "norm3")


@dataclass(frozen=True)
class WanFeatures:
    """What one forward leaves for a later one that skips the blocks.

    Attributes:
        residual: [B, S, dim], what the block stack added to the tokens.
        timestep: [B] or [1], the time at which it did.
        first_timestep: that of the first latent frame, or None.
    """

    residual: Tensor
    timestep: Tensor
    first_timestep: Tensor | None = None


class WanVelocity(Tensor):
    """A forward's velocity [B, C, T, H, W], with what a later one can use in place of the blocks; whatever is
    computed from it is a plain tensor.
    """

    intermediate_features: WanFeatures
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]


class WanTransformer(nn.Module):
    """The velocity of a noisy latent under a text: v = noise - data, as flow matching on straight paths
    defines it.

    Args:
        config: sizes. Build under `models.hollow.hollow` to load weights afterwards; call `init_weights` to
            train anew.
    """

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.fused = True
        self.compiled = False
        self.patch_embedding = PatchEmbedding(
            config.in_channels, config.dim, kernel_size=config.patch_size, stride=config.patch_size
        )
        self.condition_embedder = TimeTextEmbedding(config)
        self.blocks = nn.ModuleList(WanBlock(config) for _ in range(config.num_layers))
        layers = config.vace_layers or ()
        self.vace_blocks = nn.ModuleList(WanVACEBlock(config, layer == 0) for layer in layers)
        if config.vace_in_channels is not None:
            self.vace_patch_embedding = PatchEmbedding(
                config.vace_in_channels, config.dim, kernel_size=config.patch_size, stride=config.patch_size
            )
        self.norm_out = Float32LayerNorm(config.dim, config.eps, elementwise_affine=False)
        self.proj_out = nn.Linear(config.dim, config.out_channels * config.patch_values)
        self.scale_shift_table = nn.Parameter(torch.empty(1, 2, config.dim).normal_(std=config.dim**-0.5))

    @property
    def stack(self) -> list[WanBlock]:
        """All blocks in the order in which they run: one of the control stream stands before the block that
        its hint follows.
        """
        layers = self.config.vace_layers or ()
        pairs = [
            (self.vace_blocks[layers.index(index)], block) if index in layers else (block,)
            for index, block in enumerate(self.blocks)
        ]
        return [cast(WanBlock, block) for pair in pairs for block in pair]

    def forward(
        self,
        latent: Tensor,
        embeddings: Tensor | TextKVCache,
        timestep: Tensor | float,
        *,
        attention: AttentionFn = sdpa,
        cache: StepCache = NO_CACHE,
        blocks: Iterable[nn.Module] | None = None,
        text_bias: Tensor | None = None,
        first_timestep: Tensor | float | None = None,
        control: Tensor | None = None,
        control_scale: float | tuple[float, ...] = 1.0,
    ) -> WanVelocity:
        """The velocity at `latent`, and the features that `forward_with_cache` can use later.

        Args:
            latent: [B, C, T, H, W]; T, H, W multiples of the patch.
            embeddings: [B, L, text_dim], the text encoder's output, or of `make_text_kv`. k B rows are those
                of k guidance branches of the latent, branch by branch.
            timestep: 0 to 1000, for all a number, a scalar or [1], or [B]; any dtype and device.
            attention: self-attention (q, k, v, where), in layout [B, S, heads, head_dim].
            cache: asked at the sites whose level is among `cache.levels`.
            blocks: yields this network's `stack` in order, each ready to run: for whoever streams them to the
                device.
            text_bias: [B, L] float32, see `TextKV.bias`, or None.
            first_timestep: as `timestep`, of the first latent frame's tokens: 0 where that frame is known.
                None: as the others'.
            control: [1 or B, vace_in_channels, T, H, W], for a network with `vace_layers`; None: no hints.
            control_scale: of its hints, for all or for each of `vace_layers`.

        Returns:
            [B, C, T, H, W], or [k B, C, T, H, W], in the dtype of the last matrix product.

        Raises:
            ValueError: inputs that do not fit the network or each other.
        """
        embedded = self.embed(latent, embeddings, timestep, first_timestep, control, control_scale)
        if text_bias is not None:
            embedded = replace(embedded, text=replace(embedded.text, bias=text_bias))
        tokens = self.run_blocks(embedded, attention=attention, cache=cache, blocks=blocks)
        velocity = self.unpatchify(self.final_layer(tokens, embedded.time), embedded.grid)
        output = velocity.as_subclass(WanVelocity)
        # copies of the times: solvers may move theirs in place
        time = torch.as_tensor(timestep).reshape(-1).clone()
        first = None if first_timestep is None else torch.as_tensor(first_timestep).reshape(-1).clone()
        output.intermediate_features = WanFeatures(tokens - embedded.tokens, time, first)
        return output

    def forward_with_cache(
        self,
        latent: Tensor,
        embeddings: Tensor | TextKVCache,
        cached_features: WanFeatures,
        timestep: Tensor | float | None = None,
    ) -> Tensor:
        """The velocity at `latent` with the blocks skipped: their residual comes from an earlier forward.

        Args:
            latent: [B, C, T, H, W], of the shape that made the features.
            embeddings: as for `forward`; text acts in the blocks alone, so only its shape is looked at.
            cached_features: `intermediate_features` of what `forward` gave.
            timestep: for the head's modulation; by default the one of the features.

        Raises:
            ValueError: features of another shape, or none.
        """
        if not isinstance(cached_features, WanFeatures):
            raise ValueError(
                f"cached_features is a {type(cached_features).__name__}; use the intermediate_features of "
                "what model(latent, embeddings, timestep) gave"
            )
        time = cached_features.timestep if timestep is None else timestep
        embedded = self.embed(latent, embeddings, time, cached_features.first_timestep)
        if cached_features.residual.shape != embedded.tokens.shape:
            raise ValueError(
                f"cached features are {list(cached_features.residual.shape)}, this latent's tokens "
                f"{list(embedded.tokens.shape)}; compute them with a latent and embeddings of these shapes"
            )
        tokens = embedded.tokens + cached_features.residual
        return self.unpatchify(self.final_layer(tokens, embedded.time), embedded.grid)

    def make_text_kv(
        self, text: Tensor, rows: int | None = None, image: Tensor | TextKVCache | None = None
    ) -> TextKVCache:
        """A padded text [B, N, text_dim] for any number of forwards with these weights; see `text_kv`.

        Args:
            rows: of `rows_that_differ`; None looks, which on a GPU waits for the device.
            image: an image encoder's rows [1 or B, I, image_dim], for a network that attends to them; or
                another text of this network, whose image it is, too.

        Raises:
            ValueError: an image for a network that takes none, none for one that does, or another shape.
        """
        if not isinstance(image, TextKVCache):
            require_image(image, self.config, len(text))
        folded, positions, bias = dedup_padding(text, rows)
        prepared = TextKVCache(self.condition_embedder.text_embedder(folded), positions, bias, keep=True)
        if isinstance(image, TextKVCache):
            prepared.image_of = image
        elif image is not None:
            prepared.image = self.condition_embedder.image_embedder(image)
        return prepared

    def embed(
        self,
        latent: Tensor,
        text: Tensor | TextKVCache,
        timestep: Tensor | float,
        first_timestep: Tensor | float | None = None,
        control: Tensor | None = None,
        control_scale: float | tuple[float, ...] = 1.0,
    ) -> BlockInputs:
        """Everything before the blocks: tokens, projected text, time embedding and positions.

        Args:
            latent: [B, C, T, H, W].
            text: [B, L, text_dim] for this forward alone, or of `make_text_kv` for several. A text of k B
                rows is that of k guidance branches of the latent, branch by branch: all that follows has k B
                rows, and what the branches have in common is computed once.
            timestep: 0 to 1000, for all a number, a scalar or [1], or [B].
            first_timestep, control, control_scale: as for `forward`.

        Raises:
            ValueError: inputs that do not fit the network or each other.
        """
        device = self.patch_embedding.weight.device
        grid = latent_grid(latent, self.config, device)
        copies = text_copies(text, latent.shape[0], self.config, device)
        times = [read_timestep(timestep, latent.shape[0], device)]
        if first_timestep is not None:
            times.insert(0, read_timestep(first_timestep, latent.shape[0], device, "first_timestep"))
        time, modulation = self._embed_times(times, grid[1] * grid[2])
        if isinstance(text, Tensor):
            require_image(None, self.config, len(text))
            text = TextKVCache(self.condition_embedder.text_embedder(text), text.shape[1])
        check_control(control, control_scale, self.config, latent)
        # autocast gives 16 bits here; the stream keeps the weights' dtype
        tokens = self.patch_embedding(latent).to(self.patch_embedding.weight.dtype)
        hints = None if control is None else self.vace_patch_embedding(control).to(tokens.dtype)
        return BlockInputs(
            tokens=tokens.repeat(copies, 1, 1) if copies > 1 else tokens,
            text=text,
            time=time.repeated(copies),
            modulation=modulation.repeated(copies),
            rope=self.rope_table(grid, latent.device),
            grid=grid,
            start=SharedCfgPrefix(copies) if copies > 1 else None,
            control=hints if hints is None else hints.repeat(copies * len(latent) // len(hints), 1, 1),
            control_scale=control_scale,
        )

    def run_blocks(
        self,
        embedded: BlockInputs,
        *,
        attention: AttentionFn = sdpa,
        cache: StepCache = NO_CACHE,
        blocks: Iterable[nn.Module] | None = None,
    ) -> Tensor:
        """The block stack: tokens [B, S, dim] -> tokens [B, S, dim]. S may be a part of the sequence."""
        stack = self.stack if blocks is None else blocks
        if "step" not in cache.levels:
            return self._run_stack(embedded, attention, cache, stack)
        return cache.at(
            Site("step", 0, len(self.blocks)),
            lambda: self._run_stack(embedded, attention, cache, stack),
            SiteInputs(embedded.tokens, embedded.modulation.latest),
        )

    def final_layer(self, tokens: Tensor, time: TimeRows) -> Tensor:
        """tokens [B, S, dim], time [B or 1, R, dim] -> [B, S, patch values x channels]; each token for
        itself.
        """
        shift, scale = (self.scale_shift_table.float() + time.rows.float().unsqueeze(2)).unbind(2)
        dtype = self.proj_out.weight.dtype
        fused = self.fused and can_fuse(tokens)
        affine = (1 + scale, shift)
        normed = layer_norm(tokens, affine, self.config.eps, dtype, fused=fused, split=time.split)
        return cast(Tensor, self.proj_out(normed))

    def unpatchify(self, values: Tensor, grid: Grid) -> Tensor:
        """[B, S, patch values x channels] of the whole sequence -> [B, C, T, H, W]."""
        p_t, p_h, p_w = self.config.patch_size
        values = values.reshape(values.shape[0], *grid, p_t, p_h, p_w, self.config.out_channels)
        # [B, t, h, w, p_t, p_h, p_w, C] -> [B, C, t, p_t, h, p_h, w, p_w]
        values = values.permute(0, 7, 1, 4, 2, 5, 3, 6)
        return values.flatten(6, 7).flatten(4, 5).flatten(2, 3)

    def rope_table(self, grid: Grid, device: torch.device | str = "cpu") -> RotaryTable:
        """Rotary cosines and sines of a whole grid, each [S, head_dim / 2] float32; the last few grids' are
        remembered.

        Raises:
            ValueError: a grid axis longer than `rope_max_seq_len`.
        """
        if max(grid) > self.config.rope_max_seq_len:
            raise ValueError(f"token grid {grid} exceeds the longest axis, {self.config.rope_max_seq_len}")
        return rope_table(grid, self.config.attention_head_dim, torch.device(device))

    def enable_gradient_checkpointing(self, enabled: bool = True) -> None:
        """Training keeps each block's input alone and recomputes the rest; no effect without gradients."""
        self.gradient_checkpointing = enabled

    def compile_blocks(self, **options: object) -> None:
        """Compiles the pieces of the blocks (`WanBlock.PIECES`) with `torch.compile`, each once for all
        blocks.

        One graph for each shape of the latent; the text may have any length. A piece that cannot be compiled
        whole raises `CompileError`: nothing is left uncompiled in silence.

        Args:
            options: of `torch.compile`.
        """
        self.compiled = True
        for name in WanBlock.PIECES:
            piece = compiled(getattr(WanBlock, name), **options)
            for block in self.stack:
                setattr(block, name, MethodType(piece, block))

    def use_fused(self, fused: bool) -> None:
        """Whether kernels of `ops.fused` do the work between the products, where they can run."""
        self.fused = fused
        for module in self.modules():
            if isinstance(module, WanBlock | Float8Linear):
                module.fused = fused

    @torch.no_grad()
    def init_weights(self) -> None:
        """Fresh weights to train from: Xavier, and zeros in the last layer: the first velocity is 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv3d):
                # a view: the convolution counts as its product
                nn.init.xavier_uniform_(module.weight.flatten(1))
                nn.init.zeros_(cast(Tensor, module.bias))
            elif isinstance(module, nn.RMSNorm | nn.LayerNorm) and module.elementwise_affine:
                module.reset_parameters()
        for embedder in (self.condition_embedder.time_embedder, self.condition_embedder.text_embedder):
            nn.init.normal_(embedder.linear_1.weight, std=0.02)
            nn.init.normal_(embedder.linear_2.weight, std=0.02)
        for table in [self.scale_shift_table, *(block.scale_shift_table for block in self.stack)]:
            nn.init.normal_(table, std=self.config.dim**-0.5)
        nn.init.zeros_(self.proj_out.weight)

    def _embed_times(self, times: list[Tensor], split: int) -> tuple[TimeRows, TimeRows]:
        """Time embedding and projection of one time or two, each [1] or [B].

        Args:
            split: tokens that have the first of two.
        """
        rows = max(len(each) for each in times)
        apart = torch.stack([each.float().expand(rows) for each in times], dim=1)  # [B or 1, R]
        time, modulation = (
            TimeRows(each.unflatten(0, apart.shape), split if len(times) == 2 else 0)
            for each in self.condition_embedder.embed_time(apart.flatten())
        )
        return time, modulation

    def _run_stack(
        self, embedded: BlockInputs, attention: AttentionFn, cache: StepCache, stack: Iterable[nn.Module]
    ) -> Tensor:
        here = embedded
        index = 0
        hint: Tensor | None = None
        for block in stack:
            if isinstance(block, WanVACEBlock):
                if here.control is not None:
                    control = self._run_control(block, index, here, embedded.tokens, attention)
                    hint = block.hint(control) * self._scale_at(index, embedded)
                    here = replace(here, control=control)
                continue
            compute = partial(self._run_block, cast(WanBlock, block), index, here, attention, cache, hint)
            if "block" in cache.levels:
                site = Site("block", index, len(self.blocks))
                tokens = cache.at(site, compute, SiteInputs(here.tokens, embedded.modulation.latest))
            else:
                tokens = compute()
            here = replace(here, tokens=tokens)
            hint = None
            index += 1
        return here.tokens

    def _scale_at(self, index: int, embedded: BlockInputs) -> float:
        """Of the hint after a block."""
        scale = embedded.control_scale
        return scale[(self.config.vace_layers or ()).index(index)] if isinstance(scale, tuple) else scale

    def _run_control(
        self, block: WanVACEBlock, index: int, here: BlockInputs, tokens: Tensor, attention: AttentionFn
    ) -> Tensor:
        """The control stream after the block that stands before block `index`; `tokens` as they were
        embedded.
        """
        assert here.control is not None  # or nobody asks
        entering = block.entering(here.control, tokens)
        # its text keys lie behind those of the main blocks
        inputs = self._block_inputs(
            block, index, replace(here, tokens=entering), attention, len(self.blocks) + index
        )
        return cast(Tensor, block(*inputs))

    def _block_inputs(
        self, block: WanBlock, index: int, embedded: BlockInputs, attention: AttentionFn, text_index: int
    ) -> tuple[Tensor, TextKV, TimeRows, RotaryTable, DenseAttention]:
        weighted = block.takes_bias(embedded.tokens, embedded.text.rows.dtype)
        text = embedded.text.keys(text_index, block.text_keys, weighted)
        if self.compiled:
            let_length_vary(text)
        where = AttentionContext(embedded.grid, index, len(self.blocks), embedded.step, embedded.num_steps)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attention(q, k, v, where)

        return embedded.tokens, text, embedded.modulation, embedded.rope, attend

    def _run_block(
        self,
        block: WanBlock,
        index: int,
        embedded: BlockInputs,
        attention: AttentionFn,
        cache: StepCache,
        hint: Tensor | None,
    ) -> Tensor:
        after = self._run_bare(block, index, embedded, attention, cache)
        return after if hint is None else after + hint

    def _run_bare(
        self, block: WanBlock, index: int, embedded: BlockInputs, attention: AttentionFn, cache: StepCache
    ) -> Tensor:
        """A block without a hint."""
        inputs = self._block_inputs(block, index, embedded, attention, index)
        tokens, text, modulation, rope, attend = inputs
        if MODULE_LEVELS & cache.levels:
            time = embedded.modulation.latest
            return block.forward_at_sites(*inputs, ask=partial(self._ask, cache, index, time))
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return cast(Tensor, checkpoint(block, *inputs, use_reentrant=False))
        if index == 0 and embedded.start is not None:
            first = partial(block.attend, rope=rope, dtype=text.v.dtype, attention=attend)
            attended = embedded.start.get(tokens, modulation, first)
            return cast(Tensor, block(attended, text, modulation, None, attend))
        return cast(Tensor, block(*inputs))

    def _ask(
        self,
        cache: StepCache,
        index: int,
        time: Tensor,
        level: Level,
        compute: Callable[[], Tensor],
        entering: Tensor,
    ) -> Tensor:
        if level not in cache.levels:
            return compute()
        return cache.at(Site(level, index, len(self.blocks)), compute, SiteInputs(entering, time))
