"""Attention: one function, which chooses the backend."""

from typing import Literal

import jax
import jax.numpy as jnp

Backend = Literal["auto", "xla", "cudnn"]


def attention(
    q_BxLxNxD: jax.Array,
    k_BxMxNxD: jax.Array,
    v_BxMxNxD: jax.Array,
    *,
    is_causal: bool = False,
    backend: Backend = "auto",
) -> jax.Array:
    """softmax(q k^T / sqrt(D)) v [B, L, N, D] in the dtype of `q`, the softmax in float32.

    `"cudnn"` is the fused kernel of NVIDIA GPUs; `"auto"` takes it where it can run and pays: half precision and 1024
    queries or more.
    """
    if backend == "auto":
        backend = "cudnn" if _cudnn_pays(q_BxLxNxD) else "xla"
    return jax.nn.dot_product_attention(q_BxLxNxD, k_BxMxNxD, v_BxMxNxD, is_causal=is_causal, implementation=backend)


def _cudnn_pays(q_BxLxNxD: jax.Array) -> bool:
    _, length, _, width = q_BxLxNxD.shape
    half = q_BxLxNxD.dtype in (jnp.bfloat16, jnp.float16)
    # Head widths over 128 need Hopper; Stable Diffusion 1.x has 160 at its coarsest, where there are few tokens anyway.
    return jax.default_backend() == "gpu" and half and length >= 1024 and width % 8 == 0 and width <= 128
