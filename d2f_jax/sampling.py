"""Samplers as pure functions: Euler steps of a flow, deterministic DDIM of a diffusion model, the bridge between them.

A grid is an argument of the compiled program, and how many of its points count is decided when it runs: pad grids to
one length (`pad_grid`, `pad_timesteps`) and one program serves every number of steps.
"""

from collections.abc import Callable
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from d2f_jax import alignment
from d2f_jax.errors import InputError
from d2f_jax.schedule import NoiseSchedule

Velocity = Callable[[jax.Array, jax.Array], jax.Array]  # (x_t, scalar t) -> velocity
Predict = Callable[[jax.Array, jax.Array], jax.Array]  # (x_tau, scalar tau) -> the diffusion network's prediction
Spacing = Literal["leading", "trailing", "linspace"]


def flow_grid(schedule: NoiseSchedule, num_steps: int) -> np.ndarray:
    """Flow times float32 [N+1], uniform from the last diffusion timestep's to 1."""
    first = float(alignment.flow_time(schedule, schedule.num_train_timesteps - 1))
    return np.linspace(first, 1.0, num_steps + 1).astype(np.float32)


def pad_grid(grid: np.ndarray, length: int) -> np.ndarray:
    """`grid` followed by 1s, which `euler` does not step through."""
    return np.concatenate([grid, np.ones(length - len(grid), np.float32)])


def initial_state(noise: jax.Array, grid: jax.Array) -> jax.Array:
    """Where the flow starts: the diffusion prior begins with x_tau = noise, which is x_t = noise / s(t_0)."""
    t = grid[0]
    return jnp.asarray(noise, jnp.float32) * jnp.sqrt(t**2 + (1 - t) ** 2)


def euler(velocity: Velocity, x: jax.Array, grid: jax.Array) -> jax.Array:
    """Euler steps from `grid[0]` to 1 along `grid` [N+1], which rises; the state is float32."""
    grid = jnp.asarray(grid, jnp.float32)

    def step(i: jax.Array, x: jax.Array) -> jax.Array:
        return x + (grid[i + 1] - grid[i]) * velocity(x, grid[i])

    return jax.lax.fori_loop(0, jnp.sum(grid[:-1] < 1), step, jnp.asarray(x, jnp.float32))


def diffusers_sigmas(grid: np.ndarray) -> list[float]:
    """`sigmas` for diffusers' `EulerDiscreteScheduler.set_timesteps`; its steps are then those of `euler` on `grid`.

    A grid from t = 0, as schedules of zero terminal SNR have it, begins there with an infinite sigma. It becomes 4095,
    about the largest that diffusers itself computes for them; the steps then agree to 1/4095.
    """
    return [float((1 - t) / t) for t in np.maximum(grid[:-1], 2.0**-12).astype(np.float64)] + [0.0]


def ddim_timesteps(
    num_train_timesteps: int, num_steps: int, spacing: Spacing = "leading", steps_offset: int = 0
) -> np.ndarray:
    """diffusers' DDIM timesteps, float32 [N], falling. Raises InputError for more steps than timesteps."""
    if not 1 <= num_steps <= num_train_timesteps:
        raise InputError(f"num_steps={num_steps}: DDIM takes 1 to {num_train_timesteps}, the schedule's timesteps")
    match spacing:
        case "leading":
            steps = np.arange(num_steps) * (num_train_timesteps // num_steps) + steps_offset
        case "trailing":
            steps = np.round(np.arange(num_train_timesteps, 0, -num_train_timesteps / num_steps))[::-1] - 1
        case "linspace":
            steps = np.linspace(0, num_train_timesteps - 1, num_steps).round()
        case unknown:
            raise InputError(f"timestep_spacing={unknown!r} is not one of {', '.join(get_args(Spacing))}")
    return steps[::-1].astype(np.float32)


def pad_timesteps(timesteps: np.ndarray, length: int) -> np.ndarray:
    """`timesteps` followed by -1s, which `ddim` does not step through."""
    return np.concatenate([timesteps, np.full(length - len(timesteps), -1, np.float32)]).astype(np.float32)


def ddim(
    schedule: NoiseSchedule, predict: Predict, x: jax.Array, timesteps: jax.Array, final_alpha_cumprod: ArrayLike
) -> jax.Array:
    """Deterministic DDIM (arXiv 2010.02502, eta = 0) from x_tau = noise along `timesteps` [N], which fall.

    `final_alpha_cumprod` is the signal power that the last step goes to: 1, or `alphas_cumprod[0]` for schedulers with
    `set_alpha_to_one=false`. Timesteps may be fractional; alpha and sigma then follow from their flow time. The step is
    the textbook's, written for the diffusion state, so that agreement with `euler` is a test of both.
    """
    timesteps = jnp.asarray(timesteps, jnp.float32)
    count = jnp.sum(timesteps >= 0)
    t = alignment.flow_time(schedule, timesteps)
    s = 1 / jnp.sqrt(t**2 + (1 - t) ** 2)
    final = jnp.asarray(final_alpha_cumprod, jnp.float32)
    alphas = jnp.append(t * s, 0.0).at[count].set(jnp.sqrt(final))
    sigmas = jnp.append((1 - t) * s, 0.0).at[count].set(jnp.sqrt(1 - final))

    def step(i: jax.Array, x: jax.Array) -> jax.Array:
        prediction = predict(x, timesteps[i]).astype(jnp.float32)
        alpha, sigma = alphas[i], sigmas[i]
        match schedule.prediction_type:
            case "epsilon":
                data, noise = (x - sigma * prediction) / alpha, prediction
            case "v_prediction":
                data, noise = alpha * x - sigma * prediction, alpha * prediction + sigma * x
            case "sample":
                data, noise = prediction, (x - alpha * prediction) / sigma
        return alphas[i + 1] * data + sigmas[i + 1] * noise

    return jax.lax.fori_loop(0, count, step, jnp.asarray(x, jnp.float32))
