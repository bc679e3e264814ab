"""CLIP's text tower, as transformers' `CLIPTextModel`: OpenAI's CLIP-L, and OpenCLIP-H as SD 2.x ships it."""

import dataclasses
from collections.abc import Mapping
from typing import Any

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
        self = configs.read(cls, config, neutral=_NEUTRAL, ignored=_IGNORED)
        if self.hidden_act not in _ACTIVATIONS:
            raise InputError(f"config.json: hidden_act={self.hidden_act!r} is not one of {', '.join(_ACTIVATIONS)}")
        return self


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
        self.encoder = Encoder(config, build=build)
        self.final_layer_norm = build.layer_norm(config.hidden_size, config.layer_norm_eps)

    def __call__(self, input_ids_BxL: jax.Array) -> jax.Array:
        return self.final_layer_norm(self.encoder(self.embeddings(input_ids_BxL))).astype(jnp.float32)


class Embeddings(nnx.Module):
    def __init__(self, config: CLIPTextConfig, *, build: Build) -> None:
        options = {"dtype": build.dtype, "param_dtype": build.param_dtype, "rngs": build.rngs}
        self.token_embedding = nnx.Embed(config.vocab_size, config.hidden_size, **options)
        self.position_embedding = nnx.Embed(config.max_position_embeddings, config.hidden_size, **options)

    def __call__(self, ids_BxL: jax.Array) -> jax.Array:
        return self.token_embedding(ids_BxL) + self.position_embedding(jnp.arange(ids_BxL.shape[1]))[None]


class Encoder(nnx.Module):
    def __init__(self, config: CLIPTextConfig, *, build: Build) -> None:
        self.layers = nnx.List(EncoderLayer(config, build=build) for _ in range(config.num_hidden_layers))

    def __call__(self, x_BxLxD: jax.Array) -> jax.Array:
        for layer in self.layers:
            x_BxLxD = layer(x_BxLxD)
        return x_BxLxD


class EncoderLayer(nnx.Module):
    def __init__(self, config: CLIPTextConfig, *, build: Build) -> None:
        self.layer_norm1 = build.layer_norm(config.hidden_size, config.layer_norm_eps)
        self.self_attn = CausalAttention(config, build=build)
        self.layer_norm2 = build.layer_norm(config.hidden_size, config.layer_norm_eps)
        self.mlp = MLP(config, build=build)

    def __call__(self, x_BxLxD: jax.Array) -> jax.Array:
        x_BxLxD = x_BxLxD + self.self_attn(self.layer_norm1(x_BxLxD))
        return x_BxLxD + self.mlp(self.layer_norm2(x_BxLxD))


class CausalAttention(nnx.Module):
    def __init__(self, config: CLIPTextConfig, *, build: Build) -> None:
        self.heads = config.num_attention_heads
        width = config.hidden_size
        self.q_proj, self.k_proj = build.linear(width, width), build.linear(width, width)
        self.v_proj, self.out_proj = build.linear(width, width), build.linear(width, width)

    def __call__(self, x_BxLxD: jax.Array) -> jax.Array:
        q, k, v = (
            project(x_BxLxD).reshape(*x_BxLxD.shape[:2], self.heads, -1)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.out_proj(attention(q, k, v, is_causal=True).reshape(x_BxLxD.shape))


class MLP(nnx.Module):
    def __init__(self, config: CLIPTextConfig, *, build: Build) -> None:
        self.act = config.hidden_act
        self.fc1 = build.linear(config.hidden_size, config.intermediate_size)
        self.fc2 = build.linear(config.intermediate_size, config.hidden_size)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc2(_ACTIVATIONS[self.act](self.fc1(x)))
