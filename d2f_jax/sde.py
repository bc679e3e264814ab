"""Random samplers of a flow: noise that is taken away is put back, and the same distribution is reached at every time.

With score(x, t) of a path, `dx = (u + w score) dt + sqrt(2 w) dW` has the marginals of `dx = u dt` for any
w(t) >= 0 (SiT, arXiv 2401.08740, equation 8). A step goes from t to a larger t; the last one adds no noise.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from d2f_jax import flow
from d2f_jax.errors import InputError
from d2f_jax.flow import LINEAR, Path
from d2f_jax.sampling import Velocity, step_noise

LastStep = Literal["mean", "euler", "none"]
Form = Literal["constant", "SBDM", "sigma", "linear", "decreasing", "increasing-decreasing"]


@dataclasses.dataclass(frozen=True)
class SDE:
    """`form` and `norm` give w(t), in SiT's names.

    Near data the score is too steep to follow: the last `last_step_size` of time is one step without noise, along the
    equation's mean ("mean") or along the flow ("euler"). With "none" the last step is one like the others.
    """

    form: Form = "sigma"
    norm: float = 1.0
    last_step: LastStep = "euler"
    last_step_size: float = 0.04


def diffusion_weight(sde: SDE, t: ArrayLike, path: Path = LINEAR) -> jax.Array:
    """w(t), float32. "SBDM" is that of the diffusion with the same marginals, infinite at t = 0.

    A start just behind 0 is no way out: the first step of size h from there moves the state by h/t times itself.
    """
    t = jnp.asarray(t, jnp.float32)
    point = path.at(t)
    match sde.form:
        case "constant":
            return jnp.full_like(t, sde.norm)
        case "SBDM":
            return sde.norm * point.wronskian * point.sigma / point.alpha
        case "sigma":
            return sde.norm * point.sigma
        case "linear":
            return sde.norm * (1 - t)
        case "decreasing":
            return 0.25 * (sde.norm * jnp.cos(jnp.pi * t) + 1) ** 2
        case "increasing-decreasing":
            return sde.norm * jnp.sin(jnp.pi * t) ** 2


def score(velocity: jax.Array, x: jax.Array, t: ArrayLike, path: Path = LINEAR) -> jax.Array:
    """Gradient of the log density of x_t, `(t u - x)/(1 - t)` of the linear path.

    It is minus the expected noise `sigma x_0 + sigma_min z` over its variance. Both parts of the noise are expected in
    proportion to their variances, and `alpha u - alpha' x` is free of the data.
    """
    point = path.at(jnp.asarray(t, jnp.float32))
    size = point.wronskian * point.sigma + point.d_alpha * path.sigma_min**2
    return (point.alpha * velocity - point.d_alpha * x) / size


def grid(sde: SDE, first: float, num_steps: int, shift: float = 1.0) -> np.ndarray:
    """Times float32 [N+1] from `first` to 1, for `solve`.

    Raises InputError where w is infinite, and where there is no room for the last step.
    """
    if sde.form == "SBDM" and first == 0:
        raise InputError(
            "the SDE form SBDM is infinite at t = 0, where this flow begins; use sigma, or begin=last_timestep with an "
            "aligned flow whose last timestep is not all noise"
        )
    if sde.last_step == "none":
        return (first + (1 - first) * flow.shifted(np.linspace(0.0, 1.0, num_steps + 1), shift)).astype(np.float32)
    if num_steps < 2 or not 0 < sde.last_step_size < 1 - first:
        raise InputError(
            f"an SDE of {num_steps} steps whose last has size {sde.last_step_size}: give 2 steps or more, and a size "
            f"between 0 and {1 - first:.3f}"
        )
    end = 1 - sde.last_step_size
    noisy = first + (end - first) * flow.shifted(np.linspace(0.0, 1.0, num_steps), shift)
    return np.append(noisy, 1.0).astype(np.float32)


def solve(
    sde: SDE,
    velocity: Velocity,
    x: jax.Array,
    grid: jax.Array,
    keys_B: jax.Array,
    solver: Literal["euler", "heun"] = "euler",
    path: Path = LINEAR,
) -> jax.Array:
    """Steps of Euler and Maruyama, or SiT's stochastic Heun, along `grid` (see `grid`), perhaps padded.

    The state is float32; `keys_B` are random keys, one for each example.
    """
    grid = jnp.asarray(grid, jnp.float32)
    count = jnp.sum(grid[1:] != grid[:-1])
    stages = {"euler": 1, "heun": 2}[solver]

    def step(i: jax.Array, x: jax.Array) -> jax.Array:
        t, h, last = grid[i], grid[i + 1] - grid[i], i == count - 1
        silent = last & (sde.last_step != "none")
        along_flow = last & (sde.last_step == "euler")
        gain = jnp.where(silent, 0, jnp.sqrt(2 * diffusion_weight(sde, t, path) * h))
        noisy = x + gain * step_noise(keys_B, i, x.shape[1:])
        base = {"euler": x, "heun": noisy}[solver]

        def stage(j: jax.Array, slopes: jax.Array) -> jax.Array:
            y, t_j = base + j * h * slopes[0], t + j * h
            u = velocity(y, t_j)
            drift = jnp.where(along_flow, u, u + diffusion_weight(sde, t_j, path) * score(u, y, t_j, path))
            return slopes.at[j].set(drift)

        # At data there is no score to look at: the last step has one stage.
        used = jnp.where(last, 1, stages)
        slopes = jax.lax.fori_loop(0, used, stage, jnp.zeros((stages, *x.shape), jnp.float32))
        return noisy + h * jnp.sum(slopes, axis=0) / used

    return jax.lax.fori_loop(0, count, step, jnp.asarray(x, jnp.float32))
