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
_FEW = 1024  # tokens; scores of fewer are small, and XLA fuses their softmax into the products


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
    precision and 1024 queries or more, and for splash as many keys.
    """
    chosen = _chosen(q_BxLxNxD, k_BxMxNxD, is_causal) if backend == "auto" else backend
    if chosen == "splash":
        return _splash_over_mesh(q_BxLxNxD, k_BxMxNxD, v_BxMxNxD)
    return jax.nn.dot_product_attention(q_BxLxNxD, k_BxMxNxD, v_BxMxNxD, is_causal=is_causal, implementation=chosen)


def _chosen(q_BxLxNxD: jax.Array, k_BxMxNxD: jax.Array, is_causal: bool) -> Backend:
    length, width = q_BxLxNxD.shape[1], q_BxLxNxD.shape[3]
    half = q_BxLxNxD.dtype in (jnp.bfloat16, jnp.float16)
    if not half or length < _FEW:
        return "xla"
    match devices.platform():
        # Head widths over 128 need Hopper; Stable Diffusion 1.x has 160 at its coarsest, where there are few tokens.
        case "gpu" if width % 8 == 0 and width <= 128:
            return "cudnn"
        case "tpu" if not is_causal and k_BxMxNxD.shape[1] >= _FEW and length % 128 == 0 == k_BxMxNxD.shape[1] % 128:
            return "splash"
        case _:
            return "xla"


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
