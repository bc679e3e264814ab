"""The flow: a straight path from noise at t = 0 to data at t = 1."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike


def interpolate(x_1: jax.Array, x_0: jax.Array, t: ArrayLike) -> jax.Array:
    """`t x_1 + (1 - t) x_0`; `t` is a scalar or [B] for data `x_1` and noise `x_0` [B, ...]. float32."""
    x_1, x_0 = jnp.asarray(x_1, jnp.float32), jnp.asarray(x_0, jnp.float32)
    t = per_example(t, x_1)
    return t * x_1 + (1 - t) * x_0


def velocity_target(x_1: jax.Array, x_0: jax.Array) -> jax.Array:
    """`x_1 - x_0`, the derivative of the path, in float32."""
    return jnp.asarray(x_1, jnp.float32) - jnp.asarray(x_0, jnp.float32)


def sample_times(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Flow times, uniform on [0, 1), float32."""
    return jax.random.uniform(key, shape)


def per_example(t: ArrayLike, x: jax.Array) -> jax.Array:
    """`t`, a scalar or [B], as float32 that multiplies `x` [B, ...] example by example."""
    t = jnp.asarray(t, jnp.float32)
    return t.reshape(t.shape + (1,) * (x.ndim - t.ndim))
