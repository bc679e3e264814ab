"""The flow: a path from noise at t = 0 to data at t = 1, straight unless said otherwise."""

import dataclasses
from typing import Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from d2f_jax.errors import InputError

PathName = Literal["linear", "gvp"]
Begin = Literal["last_timestep", "zero"]
Times = TypeVar("Times", jax.Array, np.ndarray)


class PathPoint(NamedTuple):
    """Shares of data and noise at a time, and their derivatives by time."""

    alpha: jax.Array
    sigma: jax.Array
    d_alpha: jax.Array
    d_sigma: jax.Array

    @property
    def wronskian(self) -> jax.Array:
        """`alpha' sigma - alpha sigma'`: 1 on the linear path, pi/2 on "gvp"."""
        return self.d_alpha * self.sigma - self.alpha * self.d_sigma


@dataclasses.dataclass(frozen=True)
class Path:
    """`x_t = alpha x_1 + sigma x_0 + sigma_min z`, with standard normal z.

    "linear" has alpha = t, sigma = 1 - t; "gvp" alpha = sin(pi t/2), sigma = cos(pi t/2), which keeps the variance
    where it is 1 at both ends (SiT, arXiv 2401.08740, section 2). `sigma_min`, of the linear path alone, is the width
    around each straight line (arXiv 2302.00482, equation 14), and does not move: the velocity is the same. Samplers
    begin at `x_0` alone, as in the paper's published code: its standard deviation 1 is below that of the path's start,
    `sqrt(1 + sigma_min^2)`, by 0.5% for a width of 0.1, and so is that of what they reach. Raises InputError for both
    together.
    """

    name: PathName = "linear"
    sigma_min: float = 0.0

    def __post_init__(self) -> None:
        if self.sigma_min and self.name != "linear":
            raise InputError(f"sigma_min={self.sigma_min} is of the linear path; use 0 for {self.name}")

    def at(self, t: jax.Array) -> PathPoint:
        match self.name:
            case "linear":
                return PathPoint(t, 1 - t, jnp.ones_like(t), -jnp.ones_like(t))
            case "gvp":
                sin, cos, quarter = jnp.sin(jnp.pi / 2 * t), jnp.cos(jnp.pi / 2 * t), jnp.pi / 2
                return PathPoint(sin, cos, quarter * cos, -quarter * sin)


LINEAR = Path()


def interpolate(x_1: jax.Array, x_0: jax.Array, t: ArrayLike, path: Path = LINEAR) -> jax.Array:
    """`alpha x_1 + sigma x_0`; `t` is a scalar or [B] for data `x_1` and noise `x_0` [B, ...]. float32."""
    x_1, x_0 = jnp.asarray(x_1, jnp.float32), jnp.asarray(x_0, jnp.float32)
    point = path.at(per_example(t, x_1))
    return point.alpha * x_1 + point.sigma * x_0


def velocity_target(x_1: jax.Array, x_0: jax.Array, t: ArrayLike, path: Path = LINEAR) -> jax.Array:
    """The derivative of the path, `x_1 - x_0` of the linear one, in float32."""
    x_1, x_0 = jnp.asarray(x_1, jnp.float32), jnp.asarray(x_0, jnp.float32)
    point = path.at(per_example(t, x_1))
    return point.d_alpha * x_1 + point.d_sigma * x_0


@dataclasses.dataclass(frozen=True)
class TimeDistribution:
    """How flow times are drawn for training: `name`, then `shift` towards noise (see `shifted`).

    "logit_normal" is the sigmoid of a normal variable with `mean` and `std` (arXiv 2403.03206, section 3.1); a positive
    mean draws more times near data. They `begin` at 0, as in the paper's published code, or at the last diffusion
    timestep's flow time, where samplers begin.
    """

    name: Literal["uniform", "logit_normal"] = "uniform"
    mean: float = 0.0
    std: float = 1.0
    shift: float = 1.0
    begin: Begin = "zero"


UNIFORM = TimeDistribution()


def sample_times(
    key: jax.Array, shape: tuple[int, ...], times: TimeDistribution = UNIFORM, first: float = 0.0
) -> jax.Array:
    """Flow times between `first` and 1, float32."""
    match times.name:
        case "uniform":
            t = jax.random.uniform(key, shape)
        case "logit_normal":
            t = jax.nn.sigmoid(times.mean + times.std * jax.random.normal(key, shape))
    return first + (1 - first) * shifted(t, times.shift)


def shifted(t: Times, shift: float) -> Times:
    """`t` with the odds of noise against data, `(1 - t)/t`, multiplied by `shift` (arXiv 2403.03206, equation 23)."""
    return t / (t + shift * (1 - t))


def per_example(t: ArrayLike, x: jax.Array) -> jax.Array:
    """`t`, a scalar or [B], as float32 that multiplies `x` [B, ...] example by example."""
    t = jnp.asarray(t, jnp.float32)
    return t.reshape(t.shape + (1,) * (x.ndim - t.ndim))
