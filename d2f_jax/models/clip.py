"""CLIP as transformers has it: the text tower that Stable Diffusion listens to, and both towers, which score pictures.

`CLIPTextModel` is OpenAI's CLIP-L, or OpenCLIP-H as SD 2.x ships it.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from d2f_jax.errors import InputError
from d2f_jax.models import config as configs
from d2f_jax.models.attention import attention
from d2f_jax.models.layers import Build

_ACTIVATIONS = {"quick_gelu": lambda x: x * nnx.sigmoid(1.702 * x), "gelu": lambda x: nnx.gelu(x, approximate=False)}
_NEUTRAL = {"attention_dropout": (0.0,), "dropout": (0.0,), "model_type": ("clip_text_model",)}
# Of training from scratch, and of transformers itself.
_IGNORED = (
    "architectures initializer_factor initializer_range dtype "
    "torch_dtype transformers_version id2label label2id use_cache return_dict output_attentions output_hidden_states "
    "chunk_size_feed_forward is_encoder_decoder problem_type gradient_checkpointing"
)


@dataclasses.dataclass(frozen=True)
class CLIPTextConfig:
    """The keys of `text_encoder/config.json`, with transformers' defaults."""

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    projection_dim: int = 512  # this and the token ids are kept for the export; nothing here pools or projects
    bos_token_id: int | None = 49406
    eos_token_id: int | None = 49407
    pad_token_id: int | None = 1

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "CLIPTextConfig":
        """Raises InputError naming a key or value that describes another network."""
        return _checked(configs.read(cls, config, neutral=_NEUTRAL, ignored=_IGNORED))


@dataclasses.dataclass(frozen=True)
class CLIPVisionConfig:
    """The keys of `vision_config` in CLIP's `config.json`, with transformers' defaults."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    image_size: int = 224
    patch_size: int = 32
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5


@dataclasses.dataclass(frozen=True)
class CLIPConfig:
    """Of both towers and the space in which they meet."""

    text: CLIPTextConfig
    vision: CLIPVisionConfig
    projection_dim: int = 512

    @classmethod
    def from_dicts(cls, text: Mapping[str, Any], vision: Mapping[str, Any], projection_dim: int) -> "CLIPConfig":
        """Of `text_config` and `vision_config` as transformers fills them in; keys that are no fields change nothing.

        Raises InputError naming a value that describes another network.
        """
        if vision.get("num_channels", 3) != 3:
            raise InputError(f"config.json: num_channels={vision['num_channels']} is not supported (only 3 is)")

        def known(kind: type, config: Mapping[str, Any]) -> dict[str, Any]:
            return {field.name: config[field.name] for field in dataclasses.fields(kind) if field.name in config}

        towers = CLIPTextConfig(**known(CLIPTextConfig, text)), CLIPVisionConfig(**known(CLIPVisionConfig, vision))
        return cls(_checked(towers[0]), _checked(towers[1]), projection_dim)


class CLIPTextModel(nnx.Module):
    """`text_encoder(input_ids_BxL) -> last_hidden_state_BxLxD`, after the final norm, float32; attention is causal."""

    def __init__(
        self,
        config: CLIPTextConfig,
        *,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        self.config, self.dtype = config, dtype
        build = Build(dtype, param_dtype, rngs)
        self.embeddings = Embeddings(config, build=build)
        self.encoder = Encoder(config, is_causal=True, build=build)
        self.final_layer_norm = build.layer_norm(config.hidden_size, config.layer_norm_eps)

    def __call__(self, input_ids_BxL: jax.Array) -> jax.Array:
        return self.final_layer_norm(self.encoder(self.embeddings(input_ids_BxL))).astype(jnp.float32)


class CLIPModel(nnx.Module):
    """Both towers: `embed_text` and `embed_images` give vectors whose cosine says how well they go together."""

    def __init__(
        self,
        config: CLIPConfig,
        *,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        self.config = config
        build = Build(dtype, param_dtype, rngs)
        self.text_model = CLIPTextModel(config.text, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.vision_model = CLIPVisionModel(config.vision, build=build)
        self.text_projection = build.linear(config.text.hidden_size, config.projection_dim, bias=False)
        self.visual_projection = build.linear(config.vision.hidden_size, config.projection_dim, bias=False)

    def embed_text(self, input_ids_BxL: jax.Array) -> jax.Array:
        """float32 [B, P], not normalised: what the text tower says at the token that ends the text."""
        # Configs written before transformers 4.31 say 2 and mean the largest token id, which ends the text there.
        end = self.config.text.eos_token_id
        end_B = jnp.argmax(input_ids_BxL if end == 2 else input_ids_BxL == end, axis=1)
        states_BxLxD = self.text_model(input_ids_BxL)
        return self.text_projection(states_BxLxD[jnp.arange(len(end_B)), end_B]).astype(jnp.float32)

    def embed_images(self, pixels_BxSxSx3: jax.Array) -> jax.Array:
        """float32 [B, P], not normalised; S is `image_size`, the pixels are standardised (`metrics.clip_pixels`)."""
        return self.visual_projection(self.vision_model(pixels_BxSxSx3)).astype(jnp.float32)


class CLIPVisionModel(nnx.Module):
    """`vision_model(pixels_BxSxSx3) -> pooled_BxD`: the class token, normalised."""

    def __init__(self, config: CLIPVisionConfig, *, build: Build) -> None:
        self.embeddings = VisionEmbeddings(config, build=build)
        self.pre_layrnorm = build.layer_norm(config.hidden_size, config.layer_norm_eps)  # so the checkpoints spell it
        self.encoder = Encoder(config, is_causal=False, build=build)
        self.post_layernorm = build.layer_norm(config.hidden_size, config.layer_norm_eps)

    def __call__(self, pixels_BxSxSx3: jax.Array) -> jax.Array:
        return self.post_layernorm(self.encoder(self.pre_layrnorm(self.embeddings(pixels_BxSxSx3)))[:, 0])


class VisionEmbeddings(nnx.Module):
    """A token for each patch behind the class token, with positions."""

    def __init__(self, config: CLIPVisionConfig, *, build: Build) -> None:
        options = {"dtype": build.dtype, "param_dtype": build.param_dtype, "rngs": build.rngs}
        width, patch = config.hidden_size, config.patch_size
        self.class_embedding = nnx.Param(jnp.zeros(width, build.param_dtype))
        self.patch_embedding = nnx.Conv(
            3, width, (patch, patch), strides=patch, padding="VALID", use_bias=False, **options
        )
        self.position_embedding = nnx.Embed((config.image_size // patch) ** 2 + 1, width, **options)

    def __call__(self, pixels_BxSxSx3: jax.Array) -> jax.Array:
        patches_BxHxWxD = self.patch_embedding(pixels_BxSxSx3)
        count, *_, width = patches_BxHxWxD.shape
        first_Bx1xD = jnp.broadcast_to(self.class_embedding[...], (count, 1, width)).astype(patches_BxHxWxD.dtype)
        tokens_BxLxD = jnp.concatenate([first_Bx1xD, patches_BxHxWxD.reshape(count, -1, width)], 1)
        return tokens_BxLxD + self.position_embedding(jnp.arange(tokens_BxLxD.shape[1]))[None]


class Embeddings(nnx.Module):
    def __init__(self, config: CLIPTextConfig, *, build: Build) -> None:
        options = {"dtype": build.dtype, "param_dtype": build.param_dtype, "rngs": build.rngs}
        self.token_embedding = nnx.Embed(config.vocab_size, config.hidden_size, **options)
        self.position_embedding = nnx.Embed(config.max_position_embeddings, config.hidden_size, **options)

    def __call__(self, ids_BxL: jax.Array) -> jax.Array:
        return self.token_embedding(ids_BxL) + self.position_embedding(jnp.arange(ids_BxL.shape[1]))[None]


class Encoder(nnx.Module):
    def __init__(self, config: CLIPTextConfig | CLIPVisionConfig, *, is_causal: bool, build: Build) -> None:
        layers = range(config.num_hidden_layers)
        self.layers = nnx.List(EncoderLayer(config, is_causal=is_causal, build=build) for _ in layers)

    def __call__(self, x_BxLxD: jax.Array) -> jax.Array:
        for layer in self.layers:
            x_BxLxD = layer(x_BxLxD)
        return x_BxLxD


class EncoderLayer(nnx.Module):
    def __init__(self, config: CLIPTextConfig | CLIPVisionConfig, *, is_causal: bool, build: Build) -> None:
        self.layer_norm1 = build.layer_norm(config.hidden_size, config.layer_norm_eps)
        self.self_attn = SelfAttention(config, is_causal=is_causal, build=build)
        self.layer_norm2 = build.layer_norm(config.hidden_size, config.layer_norm_eps)
        self.mlp = MLP(config, build=build)

    def __call__(self, x_BxLxD: jax.Array) -> jax.Array:
        x_BxLxD = x_BxLxD + self.self_attn(self.layer_norm1(x_BxLxD))
        return x_BxLxD + self.mlp(self.layer_norm2(x_BxLxD))


class SelfAttention(nnx.Module):
    def __init__(self, config: CLIPTextConfig | CLIPVisionConfig, *, is_causal: bool, build: Build) -> None:
        self.heads, self.is_causal = config.num_attention_heads, is_causal
        width = config.hidden_size
        self.q_proj, self.k_proj = build.linear(width, width), build.linear(width, width)
        self.v_proj, self.out_proj = build.linear(width, width), build.linear(width, width)

    def __call__(self, x_BxLxD: jax.Array) -> jax.Array:
        q, k, v = (
            project(x_BxLxD).reshape(*x_BxLxD.shape[:2], self.heads, -1)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.out_proj(attention(q, k, v, is_causal=self.is_causal).reshape(x_BxLxD.shape))


class MLP(nnx.Module):
    def __init__(self, config: CLIPTextConfig | CLIPVisionConfig, *, build: Build) -> None:
        self.act = config.hidden_act
        self.fc1 = build.linear(config.hidden_size, config.intermediate_size)
        self.fc2 = build.linear(config.intermediate_size, config.hidden_size)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc2(_ACTIVATIONS[self.act](self.fc1(x)))


_Tower = TypeVar("_Tower", CLIPTextConfig, CLIPVisionConfig)


def _checked(config: _Tower) -> _Tower:
    if config.hidden_act not in _ACTIVATIONS:
        raise InputError(f"config.json: hidden_act={config.hidden_act!r} is not one of {', '.join(_ACTIVATIONS)}")
    return config
