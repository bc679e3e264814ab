"""TAESD, the tiny distilled autoencoder of Stable Diffusion's latents, as diffusers' `AutoencoderTiny`."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from d2f_jax.errors import InputError
from d2f_jax.models import config as configs
from d2f_jax.models.layers import Build
from d2f_jax.models.vae import DiagonalGaussian

_NEUTRAL = {
    "act_fn": ("relu",),
    "upsample_fn": ("nearest",),
    "upsampling_scaling_factor": (2,),
    "shift_factor": (0.0, None),
}
_IGNORED = "block_out_channels force_upcast"  # diffusers sets both by itself
_CLAMP = 3.0  # the decoder looks at latents through tanh, at most so large


@dataclasses.dataclass(frozen=True)
class TinyConfig:
    """The keys of `vae/config.json`, with diffusers' defaults. Its latents have unit variance as they are.

    `num_encoder_blocks` and `num_decoder_blocks` are the blocks at each size of the picture. `latent_magnitude` and
    `latent_shift`, by which diffusers stores latents as bytes, are kept for the export.
    """

    in_channels: int = 3
    out_channels: int = 3
    encoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64)
    decoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64)
    num_encoder_blocks: tuple[int, ...] = (1, 3, 3, 3)
    num_decoder_blocks: tuple[int, ...] = (3, 3, 3, 1)
    latent_channels: int = 4
    latent_magnitude: float = 3
    latent_shift: float = 0.5
    scaling_factor: float = 1.0

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "TinyConfig":
        """Raises InputError naming a key or value that describes another network."""
        self = configs.read(cls, config, neutral=_NEUTRAL, ignored=_IGNORED)
        for side in ("encoder", "decoder"):
            widths, blocks = (getattr(self, key) for key in (f"{side}_block_out_channels", f"num_{side}_blocks"))
            # diffusers takes other widths, but its convolutions between them do not fit together.
            if len(set(widths)) != 1 or not len(widths) == len(blocks) == len(self.num_encoder_blocks):
                raise InputError(
                    f"config.json: {side}_block_out_channels={list(widths)} with num_{side}_blocks={list(blocks)} is "
                    "not supported (only one width is, and as many sizes in the encoder as in the decoder)"
                )
        return self

    @property
    def downsampling(self) -> int:
        """Pixels to a latent's side."""
        return 2 ** (len(self.num_encoder_blocks) - 1)


class AutoencoderTiny(nnx.Module):
    """Images [B, H, W, 3] in [-1, 1] to latents [B, H/f, W/f, C] and back, as `AutoencoderKL`; results float32."""

    def __init__(
        self,
        config: TinyConfig,
        *,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        self.config, self.dtype = config, dtype
        build = Build(dtype, param_dtype, rngs)
        self.encoder = Layers(_encoder(config, build))
        self.decoder = Layers(_decoder(config, build))

    def encode(self, image: jax.Array) -> DiagonalGaussian:
        """A Gaussian without width: an image has one latent. The network sees values from 0 to 1."""
        mean = self.encoder(((image + 1) / 2).astype(self.dtype)).astype(jnp.float32)
        return DiagonalGaussian(mean, jnp.full_like(mean, -jnp.inf))

    def decode(self, latent: jax.Array) -> jax.Array:
        clamped = jnp.tanh(latent / _CLAMP) * _CLAMP
        return 2 * self.decoder(clamped.astype(self.dtype)).astype(jnp.float32) - 1


class Layers(nnx.Module):
    """One after another; those without parameters are among them, so that all keep their checkpoint's numbers."""

    def __init__(self, layers: Sequence[nnx.Module]) -> None:
        self.layers = nnx.List(layers)

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in self.layers:
            x = layer(x)
        return x


class Relu(nnx.Module):
    def __call__(self, x: jax.Array) -> jax.Array:
        return nnx.relu(x)


class Upsample(nnx.Module):
    """Nearest neighbour, to twice the size."""

    def __call__(self, x: jax.Array) -> jax.Array:
        return x.repeat(2, axis=1).repeat(2, axis=2)


class Block(nnx.Module):
    """Three convolutions around a residual, ReLU after each and after the sum."""

    def __init__(self, width: int, *, build: Build) -> None:
        first, second, third = (build.conv(width, width, 3) for _ in range(3))
        self.conv = nnx.List([first, Relu(), second, Relu(), third])

    def __call__(self, x: jax.Array) -> jax.Array:
        h = x
        for layer in self.conv:
            h = layer(h)
        return nnx.relu(h + x)


def _encoder(config: TinyConfig, build: Build) -> list[nnx.Module]:
    width = config.encoder_block_out_channels[0]
    layers: list[nnx.Module] = [build.conv(config.in_channels, width, 3)]
    for i, blocks in enumerate(config.num_encoder_blocks):
        if i > 0:
            layers.append(build.conv(width, width, 3, stride=2, bias=False))
        layers += [Block(width, build=build) for _ in range(blocks)]
    return [*layers, build.conv(width, config.latent_channels, 3)]


def _decoder(config: TinyConfig, build: Build) -> list[nnx.Module]:
    width = config.decoder_block_out_channels[0]
    layers: list[nnx.Module] = [build.conv(config.latent_channels, width, 3), Relu()]
    for i, blocks in enumerate(config.num_decoder_blocks):
        if i > 0:
            layers += [Upsample(), build.conv(width, width, 3, bias=False)]
        layers += [Block(width, build=build) for _ in range(blocks)]
    return [*layers, build.conv(width, config.out_channels, 3)]
