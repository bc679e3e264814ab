"""The flow: a straight path from noise at t = 0 to data at t = 1."""

import dataclasses
from typing import Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

Times = TypeVar("Times", jax.Array, np.ndarray)


def interpolate(x_1: jax.Array, x_0: jax.Array, t: ArrayLike) -> jax.Array:
    """`t x_1 + (1 - t) x_0`; `t` is a scalar or [B] for data `x_1` and noise `x_0` [B, ...]. float32."""
    x_1, x_0 = jnp.asarray(x_1, jnp.float32), jnp.asarray(x_0, jnp.float32)
    t = per_example(t, x_1)
    return t * x_1 + (1 - t) * x_0


def velocity_target(x_1: jax.Array, x_0: jax.Array) -> jax.Array:
    """`x_1 - x_0`, the derivative of the path, in float32."""
    return jnp.asarray(x_1, jnp.float32) - jnp.asarray(x_0, jnp.float32)


@dataclasses.dataclass(frozen=True)
class TimeDistribution:
    """How flow times are drawn for training: `name`, then `shift` towards noise (see `shifted`).

    "logit_normal" is the sigmoid of a normal variable with `mean` and `std` (arXiv 2403.03206, section 3.1); a positive
    mean draws more times near data.
    """

    name: Literal["uniform", "logit_normal"] = "uniform"
    mean: float = 0.0
    std: float = 1.0
    shift: float = 1.0


UNIFORM = TimeDistribution()


def sample_times(key: jax.Array, shape: tuple[int, ...], times: TimeDistribution = UNIFORM) -> jax.Array:
    """Flow times between 0 and 1, float32."""
    match times.name:
        case "uniform":
            t = jax.random.uniform(key, shape)
        case "logit_normal":
            t = jax.nn.sigmoid(times.mean + times.std * jax.random.normal(key, shape))
    return shifted(t, times.shift)


def shifted(t: Times, shift: float) -> Times:
    """`t` with the odds of noise against data, `(1 - t)/t`, multiplied by `shift` (arXiv 2403.03206, equation 23)."""
    return t / (t + shift * (1 - t))


def per_example(t: ArrayLike, x: jax.Array) -> jax.Array:
    """`t`, a scalar or [B], as float32 that multiplies `x` [B, ...] example by example."""
    t = jnp.asarray(t, jnp.float32)
    return t.reshape(t.shape + (1,) * (x.ndim - t.ndim))
