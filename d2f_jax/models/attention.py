"""Attention: one function, which chooses the backend that the devices have."""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention
from jax.sharding import PartitionSpec as P

from d2f_jax.models import devices

Backend = Literal["xla", "cudnn", "splash"]
FUSED = "fused attention"
"""Name of the splash kernel's results under `jax.checkpoint`."""
_FEW = {"tpu": 1024, "gpu": 256}  # queries; with fewer XLA is as fast on an H200, and moves as little on a TPU
_AMPERE, _HOPPER = 8.0, 9.0  # compute capabilities from which on cuDNN has the kernel, and for more than 128 features


def attention(
    q_BxLxNxD: jax.Array,
    k_BxMxNxD: jax.Array,
    v_BxMxNxD: jax.Array,
    *,
    is_causal: bool = False,
    backend: Backend | Literal["auto"] = "auto",
) -> jax.Array:
    """softmax(q k^T / sqrt(D)) v [B, L, N, D] in the dtype of `q`, the softmax in float32.

    Fused kernels keep no scores [B, N, L, M]: `"cudnn"` is that of NVIDIA GPUs, `"splash"` of TPUs (in Pallas, which
    interprets it elsewhere; not causal, L and M multiples of 128). `"auto"` takes them where they can run and pay: half
    precision, 256 queries or more on a GPU and 1024 on a TPU, and there as many keys.
    """
    chosen = _chosen(q_BxLxNxD, k_BxMxNxD, is_causal) if backend == "auto" else backend
    if chosen == "splash":
        return _splash_over_mesh(q_BxLxNxD, k_BxMxNxD, v_BxMxNxD)
    if chosen == "cudnn" and (q_BxLxNxD.shape[1] % 2 or k_BxMxNxD.shape[1] % 2):
        return _of_odd_length(q_BxLxNxD, k_BxMxNxD, v_BxMxNxD, is_causal)
    return jax.nn.dot_product_attention(q_BxLxNxD, k_BxMxNxD, v_BxMxNxD, is_causal=is_causal, implementation=chosen)


def _chosen(q_BxLxNxD: jax.Array, k_BxMxNxD: jax.Array, is_causal: bool) -> Backend:
    (_, queries, _, width), keys, platform = q_BxLxNxD.shape, k_BxMxNxD.shape[1], devices.platform()
    if q_BxLxNxD.dtype not in (jnp.bfloat16, jnp.float16) or queries < _FEW.get(platform or "", queries + 1):
        return "xla"
    if platform == "tpu":
        return "xla" if is_causal or keys < _FEW["tpu"] or queries % 128 or keys % 128 else "splash"
    needed = _AMPERE if width <= 128 else _HOPPER
    return "cudnn" if width % 8 == 0 and width <= 256 and devices.compute_capability() >= needed else "xla"


def _of_odd_length(q_BxLxNxD: jax.Array, k_BxMxNxD: jax.Array, v_BxMxNxD: jax.Array, is_causal: bool) -> jax.Array:
    """cuDNN's, of a token more: for a gradient JAX refuses odd numbers, such as the text's 77 or 17 x 17 pixels."""
    keys = jnp.full(k_BxMxNxD.shape[:1], k_BxMxNxD.shape[1], jnp.int32)
    q, k, v = (jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0))) for x in (q_BxLxNxD, k_BxMxNxD, v_BxMxNxD))
    out = jax.nn.dot_product_attention(q, k, v, is_causal=is_causal, key_value_seq_lengths=keys, implementation="cudnn")
    return out[:, : q_BxLxNxD.shape[1]]


def _splash_over_mesh(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    mesh, fused = devices.mesh(), functools.partial(_splash, interpret=devices.platform() != "tpu")
    if mesh is None or mesh.size == 1:
        return fused(q, k, v)
    rows = P(mesh.axis_names)
    return jax.shard_map(fused, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False)(q, k, v)


def _splash(q_BxLxNxD: jax.Array, k_BxMxNxD: jax.Array, v_BxMxNxD: jax.Array, *, interpret: bool) -> jax.Array:
    _, length, heads, width = q_BxLxNxD.shape
    queries, keys = _block(length), _block(k_BxMxNxD.shape[1])
    mask = splash_attention.MultiHeadMask([splash_attention.FullMask((length, k_BxMxNxD.shape[1]))] * heads)
    kernel = splash_attention.make_splash_mha_single_device(
        mask,
        block_sizes=splash_attention.BlockSizes(
            block_q=queries, block_kv=keys, block_q_dkv=queries, block_kv_dkv=keys, use_fused_bwd_kernel=True
        ),
        residual_checkpoint_name=FUSED,
        interpret=interpret,
    )
    q, k, v = (x.swapaxes(1, 2) for x in (q_BxLxNxD * width**-0.5, k_BxMxNxD, v_BxMxNxD))
    out_BxNxLxD: Any = jax.vmap(kernel)(q, k, v)
    return out_BxNxLxD.swapaxes(1, 2)


def _block(length: int) -> int:
    """Of what a kernel works through at once: the largest that divides `length`."""
    return next(block for block in (1024, 512, 256, 128) if length % block == 0)
