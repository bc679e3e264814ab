"""Stable Diffusion's denoising UNet (1.x, 2.x and their family), as diffusers' `UNet2DConditionModel`."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from d2f_jax.errors import InputError
from d2f_jax.models import config as configs
from d2f_jax.models.layers import Block, Build, Downsample2D, Recompute, ResnetBlock2D, Transformer2DModel, Upsample2D

Remat = Literal["none", "elementwise", "gathers", "resnets", "attentions", "blocks"]

_NEUTRAL = {
    "act_fn": ("silu",),
    "addition_embed_type": (None,),
    "addition_time_embed_dim": (None,),
    "attention_type": ("default",),
    "center_input_sample": (False,),
    "class_embed_type": (None,),
    "class_embeddings_concat": (False,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "cross_attention_norm": (None,),
    "dropout": (0.0,),
    "downsample_padding": (1,),
    "dual_cross_attention": (False,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "mid_block_only_cross_attention": (None, False),
    "mid_block_scale_factor": (1,),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "num_attention_heads": (None,),  # diffusers refuses it too
    "num_class_embeds": (None,),
    "only_cross_attention": (False,),
    "projection_class_embeddings_input_dim": (None,),
    "resnet_out_scale_factor": (1.0,),
    "resnet_skip_time_act": (False,),
    "resnet_time_scale_shift": ("default",),
    "reverse_transformer_layers_per_block": (None,),
    "time_cond_proj_dim": (None,),
    "time_embedding_act_fn": (None,),
    "time_embedding_dim": (None,),
    "time_embedding_type": ("positional",),
    "timestep_post_act": (None,),
}
_IGNORED = "addition_embed_type_num_heads"  # of an embedding that is refused


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """The keys of `unet/config.json`, with diffusers' defaults."""

    sample_size: int | tuple[int, int] | None = None  # side, or height and width, of the latent that it was trained at
    in_channels: int = 4
    out_channels: int = 4
    flip_sin_to_cos: bool = True
    freq_shift: int = 0
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    up_block_types: tuple[str, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int | tuple[int, ...] = 2
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    cross_attention_dim: int = 1280
    transformer_layers_per_block: int | tuple[int, ...] = 1
    attention_head_dim: int | tuple[int, ...] = 8  # for historical reasons the number of heads, not their width
    use_linear_projection: bool = False
    upcast_attention: bool = False  # kept for the export; attention's softmax is in float32 here in any case

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "UNetConfig":
        """Raises InputError naming a key or value that describes another network."""
        self = configs.read(cls, config, neutral=_NEUTRAL, ignored=_IGNORED)
        levels = len(self.block_out_channels)
        for name in ("down_block_types", "up_block_types"):
            types = getattr(self, name)
            kind = "Down" if name.startswith("down") else "Up"
            if len(types) != levels or set(types) - {f"CrossAttn{kind}Block2D", f"{kind}Block2D"}:
                raise InputError(
                    f"config.json: {name}={list(types)} is not {levels} of CrossAttn{kind}Block2D and {kind}Block2D"
                )
        for name in ("layers_per_block", "transformer_layers_per_block", "attention_head_dim"):
            value = getattr(self, name)
            if isinstance(value, tuple) and len(value) != levels:
                raise InputError(
                    f"config.json: {name}={list(value)} is not one number, nor one for each of {levels} levels"
                )
        if isinstance(self.sample_size, tuple) and len(self.sample_size) != 2:
            raise InputError(f"config.json: sample_size={list(self.sample_size)} is not one side, nor height and width")
        return self

    @property
    def sample_shape(self) -> tuple[int, int] | None:
        """Height and width of the latent that it was trained at, where that is told."""
        return (self.sample_size, self.sample_size) if isinstance(self.sample_size, int) else self.sample_size

    def level(self, name: str, i: int) -> int:
        """A key that may be one number, or one for each level."""
        value = getattr(self, name)
        return value[i] if isinstance(value, tuple) else value


class UNet2DConditionModel(nnx.Module):
    """`unet(sample_BxHxWxC, timestep, text_BxLxD) -> prediction_BxHxWxC`, float32.

    `timestep` is a scalar or [B], integer or fractional. Latents of any size: where a level's height or width is odd,
    the way up goes back to the size of the way down.
    """

    def __init__(
        self,
        config: UNetConfig,
        *,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        self.config, self.dtype = config, dtype
        build = Build(dtype, param_dtype, rngs)
        channels = config.block_out_channels
        self.conv_in = build.conv(config.in_channels, channels[0], 3)
        self.time_embedding = TimestepEmbedding(channels[0], build=Build(jnp.float32, param_dtype, rngs))
        self.down_blocks = nnx.List(DownBlock(config, i, build=build) for i in range(len(channels)))
        self.mid_block = MidBlock(config, build=build)
        self.up_blocks = nnx.List(UpBlock(config, i, build=build) for i in reversed(range(len(channels))))
        self.conv_norm_out = build.group_norm(channels[0], config.norm_num_groups, config.norm_eps)
        self.conv_out = build.conv(channels[0], config.out_channels, 3)

    def __call__(self, sample: jax.Array, timestep: jax.Array, text_BxLxD: jax.Array) -> jax.Array:
        time_B = jnp.broadcast_to(jnp.asarray(timestep, jnp.float32), sample.shape[:1])
        time_BxD = self.time_embedding(sinusoids(time_B, self.config))
        text_BxLxD = text_BxLxD.astype(self.dtype)
        h = self.conv_in(sample.astype(self.dtype))
        skips = [h]
        for block in self.down_blocks:
            h, new = block(h, time_BxD, text_BxLxD)
            skips += new
        h = self.mid_block(h, time_BxD, text_BxLxD)
        for block in self.up_blocks:
            h = block(h, skips, time_BxD, text_BxLxD)
        return self.conv_out(nnx.silu(self.conv_norm_out(h))).astype(jnp.float32)

    def set_remat(self, remat: Remat) -> None:
        """What is computed again in the backward pass instead of kept: less memory, more work.

        "elementwise" is norms, activations and scores, which is little work; with "gathers" blocks also gather their
        weights again. The others do both, and compute again all that is inside of residual blocks ("resnets"), of
        transformers ("attentions"), or of both ("blocks").
        """
        kinds = {"resnets": (ResnetBlock2D,), "attentions": (Transformer2DModel,)}
        kinds["blocks"] = kinds["resnets"] + kinds["attentions"]
        lighter: dict[Remat, Recompute] = {"none": "nothing", "elementwise": "elementwise"}
        for _, module in nnx.iter_modules(self):
            if isinstance(module, Block):
                named = isinstance(module, kinds.get(remat, ()))
                module.recompute = "everything" if named else lighter.get(remat, "gathers")

    def gather(self, gathered: Callable[[nnx.State], nnx.State]) -> "UNet2DConditionModel":
        """The network with `gathered(parameters)`; blocks that gather again keep theirs and do it when they compute."""
        blocks = {path: module for path, module in nnx.iter_modules(self) if isinstance(module, Block)}
        again = [path for path, block in blocks.items() if block.recompute in ("gathers", "everything")]
        structure, later, once = nnx.split(self, lambda path, _: any(path[: len(at)] == at for at in again), ...)
        network = nnx.merge(structure, later, gathered(once))
        for path, module in nnx.iter_modules(network):
            if isinstance(module, Block) and path in again:
                module.gathered = gathered
        return network


def sinusoids(time_B: jax.Array, config: UNetConfig) -> jax.Array:
    """Sines and cosines [B, C] of the timestep at geometric frequencies from 1 to 1/10000."""
    half = config.block_out_channels[0] // 2
    frequency = jnp.exp(-math.log(10000) * jnp.arange(half, dtype=jnp.float32) / (half - config.freq_shift))
    angle = time_B[:, None] * frequency[None, :]
    parts = [jnp.sin(angle), jnp.cos(angle)]
    return jnp.concatenate(parts[::-1] if config.flip_sin_to_cos else parts, axis=-1)


class TimestepEmbedding(nnx.Module):
    def __init__(self, width: int, *, build: Build) -> None:
        self.linear_1 = build.linear(width, 4 * width)
        self.linear_2 = build.linear(4 * width, 4 * width)

    def __call__(self, x_BxC: jax.Array) -> jax.Array:
        return self.linear_2(nnx.silu(self.linear_1(x_BxC)))


def _resnet(config: UNetConfig, inputs: int, outputs: int, build: Build) -> ResnetBlock2D:
    time_width = 4 * config.block_out_channels[0]
    groups, eps = config.norm_num_groups, config.norm_eps
    return ResnetBlock2D(inputs, outputs, time_width=time_width, groups=groups, eps=eps, build=build)


def _transformer(config: UNetConfig, level: int, build: Build) -> Transformer2DModel:
    return Transformer2DModel(
        config.block_out_channels[level],
        heads=config.level("attention_head_dim", level),
        context_width=config.cross_attention_dim,
        depth=config.level("transformer_layers_per_block", level),
        groups=config.norm_num_groups,
        linear_projection=config.use_linear_projection,
        build=build,
    )


class DownBlock(nnx.Module):
    """Level `i` on the way down; returns its output and what it leaves for the way up."""

    def __init__(self, config: UNetConfig, i: int, *, build: Build) -> None:
        channels, depth = config.block_out_channels, config.level("layers_per_block", i)
        inputs = [channels[max(i - 1, 0)]] + [channels[i]] * (depth - 1)
        self.resnets = nnx.List(_resnet(config, n, channels[i], build) for n in inputs)
        if config.down_block_types[i] == "CrossAttnDownBlock2D":
            self.attentions = nnx.List(_transformer(config, i, build) for _ in inputs)
        else:
            self.attentions = None
        last = i == len(channels) - 1
        self.downsamplers = None if last else nnx.List([Downsample2D(channels[i], one_sided=False, build=build)])

    def __call__(self, h: jax.Array, time_BxD: jax.Array, text_BxLxD: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        skips = []
        for i, resnet in enumerate(self.resnets):
            h = resnet(h, time_BxD)
            if self.attentions is not None:
                h = self.attentions[i](h, text_BxLxD)
            skips.append(h)
        if self.downsamplers is not None:
            h = self.downsamplers[0](h)
            skips.append(h)
        return h, skips


class MidBlock(nnx.Module):
    def __init__(self, config: UNetConfig, *, build: Build) -> None:
        last = len(config.block_out_channels) - 1
        width = config.block_out_channels[last]
        self.resnets = nnx.List(_resnet(config, width, width, build) for _ in range(2))
        self.attentions = nnx.List([_transformer(config, last, build)])

    def __call__(self, h: jax.Array, time_BxD: jax.Array, text_BxLxD: jax.Array) -> jax.Array:
        h = self.attentions[0](self.resnets[0](h, time_BxD), text_BxLxD)
        return self.resnets[1](h, time_BxD)


class UpBlock(nnx.Module):
    """Level `i` on the way up; takes its skips off the end of the list."""

    def __init__(self, config: UNetConfig, i: int, *, build: Build) -> None:
        channels, depth = config.block_out_channels, config.level("layers_per_block", i) + 1
        top = len(channels) - 1
        below, above = channels[min(i + 1, top)], channels[max(i - 1, 0)]
        inputs = [below] + [channels[i]] * (depth - 1)
        skips = [channels[i]] * (depth - 1) + [above]
        self.resnets = nnx.List(
            _resnet(config, n + skip, channels[i], build) for n, skip in zip(inputs, skips, strict=True)
        )
        if config.up_block_types[top - i] == "CrossAttnUpBlock2D":
            self.attentions = nnx.List(_transformer(config, i, build) for _ in inputs)
        else:
            self.attentions = None
        self.upsamplers = nnx.List([Upsample2D(channels[i], build=build)]) if i > 0 else None

    def __call__(self, h: jax.Array, skips: list[jax.Array], time_BxD: jax.Array, text_BxLxD: jax.Array) -> jax.Array:
        for i, resnet in enumerate(self.resnets):
            h = resnet(jnp.concatenate([h, skips.pop()], axis=-1), time_BxD)
            if self.attentions is not None:
                h = self.attentions[i](h, text_BxLxD)
        if self.upsamplers is not None:
            h = self.upsamplers[0](h, (skips[-1].shape[1], skips[-1].shape[2]))
        return h
