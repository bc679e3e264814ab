"""Stable Diffusion's autoencoder, as diffusers' `AutoencoderKL`."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from d2f_jax.errors import InputError
from d2f_jax.models import config as configs
from d2f_jax.models.layers import Attention, Build, Downsample2D, GroupNorm, ResnetBlock2D, Upsample2D

_EPS = 1e-6  # of every norm in the autoencoder
_NEUTRAL = {"act_fn": ("silu",), "shift_factor": (None, 0.0), "latents_mean": (None,), "latents_std": (None,)}


@dataclasses.dataclass(frozen=True)
class VAEConfig:
    """The keys of `vae/config.json`, with diffusers' defaults. Latents times `scaling_factor` have unit variance."""

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",)
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",)
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    latent_channels: int = 4
    norm_num_groups: int = 32
    sample_size: int = 32
    scaling_factor: float = 0.18215
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True
    force_upcast: bool = True  # kept for the export, where half precision may overflow

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "VAEConfig":
        """Raises InputError naming a key or value that describes another network."""
        self = configs.read(cls, config, neutral=_NEUTRAL, ignored="")
        levels = len(self.block_out_channels)
        for types, kind in (
            (self.down_block_types, "DownEncoderBlock2D"),
            (self.up_block_types, "UpDecoderBlock2D"),
        ):
            if types != (kind,) * levels:
                raise InputError(f"config.json: block types {list(types)} are not supported (only {levels} {kind} are)")
        return self

    @property
    def downsampling(self) -> int:
        """Pixels to a latent's side."""
        return 2 ** (len(self.block_out_channels) - 1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DiagonalGaussian:
    """What the encoder says of the latent: mean and log variance [B, H, W, C], float32, unscaled."""

    mean: jax.Array
    logvar: jax.Array

    @property
    def std(self) -> jax.Array:
        return jnp.exp(0.5 * self.logvar)


class AutoencoderKL(nnx.Module):
    """Images [B, H, W, 3] in [-1, 1] to latents [B, H/f, W/f, C] and back; latents unscaled, results float32."""

    def __init__(
        self,
        config: VAEConfig,
        *,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        self.config, self.dtype = config, dtype
        build = Build(dtype, param_dtype, rngs)
        latent = config.latent_channels
        self.encoder = Encoder(config, build=build)
        self.decoder = Decoder(config, build=build)
        self.quant_conv = build.conv(2 * latent, 2 * latent, 1) if config.use_quant_conv else None
        self.post_quant_conv = build.conv(latent, latent, 1) if config.use_post_quant_conv else None

    def encode(self, image: jax.Array) -> DiagonalGaussian:
        h = self.encoder(image.astype(self.dtype))
        if self.quant_conv is not None:
            h = self.quant_conv(h)
        mean, logvar = jnp.split(h.astype(jnp.float32), 2, axis=-1)
        return DiagonalGaussian(mean, jnp.clip(logvar, -30, 20))

    def decode(self, latent: jax.Array) -> jax.Array:
        h = latent.astype(self.dtype)
        if self.post_quant_conv is not None:
            h = self.post_quant_conv(h)
        return self.decoder(h).astype(jnp.float32)


class Encoder(nnx.Module):
    def __init__(self, config: VAEConfig, *, build: Build) -> None:
        channels, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = build.conv(config.in_channels, channels[0], 3)
        self.down_blocks = nnx.List(EncoderBlock(config, i, build=build) for i in range(len(channels)))
        self.mid_block = MidBlock(config, build=build)
        self.conv_norm_out = build.group_norm(channels[-1], groups, _EPS)
        self.conv_out = build.conv(channels[-1], 2 * config.latent_channels, 3)

    def __call__(self, x: jax.Array) -> jax.Array:
        h = self.conv_in(x)
        for block in self.down_blocks:
            h = block(h)
        return self.conv_out(nnx.silu(self.conv_norm_out(self.mid_block(h))))


class Decoder(nnx.Module):
    def __init__(self, config: VAEConfig, *, build: Build) -> None:
        channels, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = build.conv(config.latent_channels, channels[-1], 3)
        self.mid_block = MidBlock(config, build=build)
        self.up_blocks = nnx.List(DecoderBlock(config, i, build=build) for i in reversed(range(len(channels))))
        self.conv_norm_out = build.group_norm(channels[0], groups, _EPS)
        self.conv_out = build.conv(channels[0], config.out_channels, 3)

    def __call__(self, h: jax.Array) -> jax.Array:
        h = self.mid_block(self.conv_in(h))
        for block in self.up_blocks:
            h = block(h)
        return self.conv_out(nnx.silu(self.conv_norm_out(h)))


def _resnets(config: VAEConfig, inputs: int, outputs: int, depth: int, build: Build) -> nnx.List:
    groups = config.norm_num_groups
    return nnx.List(
        ResnetBlock2D(n, outputs, time_width=None, groups=groups, eps=_EPS, build=build)
        for n in [inputs] + [outputs] * (depth - 1)
    )


class EncoderBlock(nnx.Module):
    def __init__(self, config: VAEConfig, i: int, *, build: Build) -> None:
        channels = config.block_out_channels
        self.resnets = _resnets(config, channels[max(i - 1, 0)], channels[i], config.layers_per_block, build)
        last = i == len(channels) - 1
        self.downsamplers = None if last else nnx.List([Downsample2D(channels[i], one_sided=True, build=build)])

    def __call__(self, h: jax.Array) -> jax.Array:
        for resnet in self.resnets:
            h = resnet(h)
        return h if self.downsamplers is None else self.downsamplers[0](h)


class DecoderBlock(nnx.Module):
    def __init__(self, config: VAEConfig, i: int, *, build: Build) -> None:
        channels = config.block_out_channels
        below = channels[min(i + 1, len(channels) - 1)]
        self.resnets = _resnets(config, below, channels[i], config.layers_per_block + 1, build)
        self.upsamplers = nnx.List([Upsample2D(channels[i], build=build)]) if i > 0 else None

    def __call__(self, h: jax.Array) -> jax.Array:
        for resnet in self.resnets:
            h = resnet(h)
        return h if self.upsamplers is None else self.upsamplers[0](h)


class MidBlock(nnx.Module):
    def __init__(self, config: VAEConfig, *, build: Build) -> None:
        width, groups = config.block_out_channels[-1], config.norm_num_groups
        self.resnets = nnx.List([*_resnets(config, width, width, 2, build)])
        attention = [PixelAttention(width, groups, build=build)] if config.mid_block_add_attention else []
        self.attentions = nnx.List(attention)

    def __call__(self, h: jax.Array) -> jax.Array:
        h = self.resnets[0](h)
        for attention in self.attentions:
            h = attention(h)
        return self.resnets[1](h)


class PixelAttention(Attention):
    """Single-head self-attention over the pixels of a feature map, around a residual."""

    def __init__(self, width: int, groups: int, *, build: Build) -> None:
        super().__init__(width, heads=1, bias=True, build=build)
        self.group_norm: GroupNorm = build.group_norm(width, groups, _EPS)

    def __call__(self, x: jax.Array) -> jax.Array:  # pyright: ignore[reportIncompatibleMethodOverride]
        batch, height, width, channels = x.shape
        tokens_BxLxD = self.group_norm(x).reshape(batch, height * width, channels)
        return x + super().__call__(tokens_BxLxD).reshape(x.shape)
