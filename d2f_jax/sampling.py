"""Samplers as pure functions: solvers of a flow's equation, DDIM of a diffusion model, the bridge between them.

A grid is an argument of the compiled program, and how many of its points count is decided when it runs: pad grids to
one length (`pad_grid`, `pad_timesteps`) and one program serves every number of steps. Random samplers take `keys_B`,
one key for every example, so that an example does not depend on its batch.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from d2f_jax import alignment, flow
from d2f_jax.errors import InputError
from d2f_jax.schedule import NoiseSchedule

Velocity = Callable[[jax.Array, jax.Array], jax.Array]  # (x_t [B, ...], t: a scalar, or [B] of adaptive steps)
Predict = Callable[[jax.Array, jax.Array], jax.Array]  # (x_tau, tau likewise) -> the diffusion network's prediction
Solver = Literal["euler", "heun", "midpoint", "rk4"]
Adaptive = Literal["dopri5", "dopri8", "bosh3", "adaptive_heun"]  # torchdiffeq's names, of orders 5, 8, 3 and 2
Spacing = Literal["leading", "trailing", "linspace", "quad"]


class Tableau(NamedTuple):
    """An explicit Runge-Kutta method: stage i looks at `t + c[i] h` and at `x + h a[i] @ slopes`."""

    a: np.ndarray
    b: np.ndarray
    c: np.ndarray


def _tableau(a: list[list[float]], b: list[float]) -> Tableau:
    rows = np.array(a, np.float32)
    return Tableau(rows, np.array(b, np.float32), rows.sum(axis=1))


TABLEAUS: dict[Solver, Tableau] = {
    "euler": _tableau([[0]], [1]),
    "heun": _tableau([[0, 0], [1, 0]], [1 / 2, 1 / 2]),
    "midpoint": _tableau([[0, 0], [1 / 2, 0]], [0, 1]),
    "rk4": _tableau([[0, 0, 0, 0], [1 / 2, 0, 0, 0], [0, 1 / 2, 0, 0], [0, 0, 1, 0]], [1 / 6, 1 / 3, 1 / 3, 1 / 6]),
}


def flow_grid(schedule: NoiseSchedule, num_steps: int, *, shift: float = 1.0, aligned: bool = True) -> np.ndarray:
    """Flow times float32 [N+1] up to 1, uniform, or denser near noise for a `shift` above 1.

    The first is the last diffusion timestep's, before which an aligned flow knows nothing; without alignment it is 0.
    """
    first = float(alignment.flow_time(schedule, schedule.num_train_timesteps - 1)) if aligned else 0.0
    return (first + (1 - first) * flow.shifted(np.linspace(0.0, 1.0, num_steps + 1), shift)).astype(np.float32)


def pad_grid(grid: np.ndarray, length: int) -> np.ndarray:
    """`grid` followed by its last point, between which `solve` takes no steps."""
    return np.concatenate([grid, np.full(length - len(grid), grid[-1], np.float32)])


def reversed_grid(grid: jax.Array) -> jax.Array:
    """From the last point of a grid, perhaps padded, back to its first one, padded alike."""
    grid = jnp.asarray(grid, jnp.float32)
    count = jnp.sum(grid[1:] != grid[:-1])
    return grid[jnp.maximum(count - jnp.arange(len(grid)), 0)]


def from_noise(noise: jax.Array, t: ArrayLike) -> jax.Array:
    """The flow's state at its first time `t`: a diffusion prior begins with x_tau = noise, which is x_t = noise / s."""
    return jnp.asarray(noise, jnp.float32) * jnp.sqrt(t**2 + (1 - t) ** 2)


def to_noise(x: jax.Array, t: ArrayLike) -> jax.Array:
    """The noise that a flow with state `x` at its first time `t` began with."""
    return jnp.asarray(x, jnp.float32) / jnp.sqrt(t**2 + (1 - t) ** 2)


def solve(velocity: Velocity, x: jax.Array, grid: jax.Array, solver: Solver = "euler") -> jax.Array:
    """Steps along `grid` [N+1], which rises to data or falls to noise; the state is float32.

    The network is compiled once, whatever the solver; it is evaluated as often as a step has stages.
    """
    grid = jnp.asarray(grid, jnp.float32)
    step = _runge_kutta(velocity, grid, solver)
    return jax.lax.fori_loop(0, jnp.sum(grid[1:] != grid[:-1]), step, jnp.asarray(x, jnp.float32))


def trajectory(velocity: Velocity, x: jax.Array, grid: jax.Array, solver: Solver = "euler") -> jax.Array:
    """The states float32 [N+1, ...] at all points of `grid`, of which `solve` gives the last."""
    grid, x = jnp.asarray(grid, jnp.float32), jnp.asarray(x, jnp.float32)
    step = _runge_kutta(velocity, grid, solver)

    def keep(i: jax.Array, states: jax.Array) -> jax.Array:
        return states.at[i + 1].set(step(i, states[i]))

    states = jnp.zeros((len(grid), *x.shape), jnp.float32).at[0].set(x)
    return jax.lax.fori_loop(0, len(grid) - 1, keep, states)


def _runge_kutta(velocity: Velocity, grid: jax.Array, solver: Solver) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """`step(i, x)` goes from `grid[i]` to the next point."""
    a, b, c = map(jnp.asarray, TABLEAUS[solver])

    def weighed(weights: jax.Array, slopes: jax.Array) -> jax.Array:
        # Not a dot product, which TPUs would round to bfloat16.
        return jnp.sum(weights.reshape(-1, *(1,) * (slopes.ndim - 1)) * slopes, axis=0)

    def step(i: jax.Array, x: jax.Array) -> jax.Array:
        t, h = grid[i], grid[i + 1] - grid[i]

        def stage(j: jax.Array, slopes: jax.Array) -> jax.Array:
            return slopes.at[j].set(velocity(x + h * weighed(a[j], slopes), t + c[j] * h))

        if len(c) == 1:
            return x + h * velocity(x, t)
        slopes = jax.lax.fori_loop(0, len(c), stage, jnp.zeros((len(c), *x.shape), jnp.float32))
        return x + h * weighed(b, slopes)

    return step


def diffusers_sigmas(grid: np.ndarray) -> list[float]:
    """`sigmas` for diffusers' `EulerDiscreteScheduler.set_timesteps`; its steps are then Euler's on `grid`.

    A grid from t = 0, as schedules of zero terminal SNR have it, begins there with an infinite sigma. It becomes 4095,
    about the largest that diffusers itself computes for them; the steps then agree to 1/4095.
    """
    return [float((1 - t) / t) for t in np.maximum(grid[:-1], 2.0**-12).astype(np.float64)] + [0.0]


def ddim_timesteps(
    num_train_timesteps: int, num_steps: int, spacing: Spacing = "leading", steps_offset: int = 0
) -> np.ndarray:
    """diffusers' DDIM timesteps, float32 [N], falling; "quad" are those of DDIM's authors, denser near data.

    `steps_offset` moves "leading" and "quad" up, but none beyond the last that the network knows: as many steps as
    there are timesteps are all of them, where diffusers reads past the end. Raises InputError for more steps than that.
    """
    if not 1 <= num_steps <= num_train_timesteps:
        raise InputError(f"num_steps={num_steps}: DDIM takes 1 to {num_train_timesteps}, the schedule's timesteps")
    match spacing:
        case "leading":
            steps = np.arange(num_steps) * (num_train_timesteps // num_steps)
        case "trailing":
            steps = np.round(np.arange(num_train_timesteps, 0, -num_train_timesteps / num_steps))[::-1] - 1
        case "linspace":
            steps = np.linspace(0, num_train_timesteps - 1, num_steps).round()
        case "quad":  # up to four fifths of the way, as published
            steps = np.floor(np.linspace(0, np.sqrt(0.8 * num_train_timesteps), num_steps) ** 2)
        case unknown:
            raise InputError(f"timestep_spacing={unknown!r} is not one of {', '.join(get_args(Spacing))}")
    if spacing in ("leading", "quad"):
        steps = steps + min(steps_offset, num_train_timesteps - 1 - steps[-1])
    return steps[::-1].astype(np.float32)


def pad_timesteps(timesteps: np.ndarray, length: int) -> np.ndarray:
    """`timesteps` followed by -1s, which `ddim` does not step through."""
    return np.concatenate([timesteps, np.full(length - len(timesteps), -1, np.float32)]).astype(np.float32)


def ddim(
    schedule: NoiseSchedule,
    predict: Predict,
    x: jax.Array,
    timesteps: jax.Array,
    final_alpha_cumprod: ArrayLike,
    *,
    eta: ArrayLike = 0.0,
    temperature: ArrayLike = 1.0,
    noise_dropout: float = 0.0,
    keys_B: jax.Array | None = None,
) -> jax.Array:
    """DDIM (arXiv 2010.02502, equations 12 and 16) from x_tau = noise along `timesteps` [N], which fall.

    `eta` is the share of a step's noise that is drawn anew, with `keys_B`: 0 is deterministic, 1 DDPM's posterior. Of
    what is drawn, `temperature` times is added; a share `noise_dropout` of its values is 0, the others are larger in
    turn. As in DDIM's and the paper's published code, the noise that is kept does not make up for either.
    `final_alpha_cumprod` is the signal power that the last step goes to: 1, or `alphas_cumprod[0]` for schedulers with
    `set_alpha_to_one=false`. Timesteps may be fractional; alpha and sigma then follow from their flow time. The step is
    the textbook's, written for the diffusion state, so that agreement with `solve` is a test of both.
    """
    timesteps = jnp.asarray(timesteps, jnp.float32)
    count, alphas, sigmas = _levels(schedule, timesteps, final_alpha_cumprod)

    def step(i: jax.Array, x: jax.Array) -> jax.Array:
        data, noise = data_and_noise(schedule, predict(x, timesteps[i]), x, alphas[i], sigmas[i])
        sigma, next_alpha, next_sigma = sigmas[i], alphas[i + 1], sigmas[i + 1]
        if keys_B is None:
            return next_alpha * data + next_sigma * noise
        fresh = eta * next_sigma / sigma * jnp.sqrt(jnp.maximum(sigma**2 - next_sigma**2, 0)) / next_alpha
        kept = jnp.sqrt(jnp.maximum(next_sigma**2 - fresh**2, 0))
        drawn = temperature * step_noise(keys_B, i, x.shape[1:])
        if noise_dropout:
            drawn *= dropout_mask(keys_B, i, x.shape[1:], noise_dropout)
        return next_alpha * data + kept * noise + fresh * drawn

    return jax.lax.fori_loop(0, count, step, jnp.asarray(x, jnp.float32))


def ddim_inverse(
    schedule: NoiseSchedule, predict: Predict, x: jax.Array, timesteps: jax.Array, final_alpha_cumprod: ArrayLike
) -> jax.Array:
    """From data to the noise that `ddim` makes it of, to first order: its steps backwards, with the same arguments.

    A step takes the prediction at the timestep that it goes to for that of the state that it comes from, as diffusers'
    `DDIMInverseScheduler` and the paper's published code do. Of "sample" predictions the final power is less than 1.
    """
    timesteps = jnp.asarray(timesteps, jnp.float32)
    count, alphas, sigmas = _levels(schedule, timesteps, final_alpha_cumprod)

    def step(k: jax.Array, x: jax.Array) -> jax.Array:
        i = count - 1 - k
        data, noise = data_and_noise(schedule, predict(x, timesteps[i]), x, alphas[i + 1], sigmas[i + 1])
        return alphas[i] * data + sigmas[i] * noise

    return jax.lax.fori_loop(0, count, step, jnp.asarray(x, jnp.float32))


def _levels(
    schedule: NoiseSchedule, timesteps: jax.Array, final_alpha_cumprod: ArrayLike
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """How many of `timesteps` [N] count, and alpha and sigma [N+1] at each of these and where the last step ends."""
    count = jnp.sum(timesteps >= 0)
    t = alignment.flow_time(schedule, timesteps)
    s = 1 / jnp.sqrt(t**2 + (1 - t) ** 2)
    final = jnp.asarray(final_alpha_cumprod, jnp.float32)
    alphas = jnp.append(t * s, 0.0).at[count].set(jnp.sqrt(final))
    return count, alphas, jnp.append((1 - t) * s, 0.0).at[count].set(jnp.sqrt(1 - final))


def data_and_noise(
    schedule: NoiseSchedule, prediction: jax.Array, x: jax.Array, alpha: jax.Array, sigma: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """What a prediction at the diffusion state `x` takes for its data and its noise, float32."""
    prediction = prediction.astype(jnp.float32)
    match schedule.prediction_type:
        case "epsilon":
            return (x - sigma * prediction) / alpha, prediction
        case "v_prediction":
            return alpha * x - sigma * prediction, alpha * prediction + sigma * x
        case "sample":
            return prediction, (x - alpha * prediction) / sigma


def step_noise(keys_B: jax.Array, step: ArrayLike, shape: tuple[int, ...]) -> jax.Array:
    """float32 [B, *shape] for one step of a random sampler."""
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, step), shape))(keys_B)


def dropout_mask(keys_B: jax.Array, step: ArrayLike, shape: tuple[int, ...], rate: float) -> jax.Array:
    """float32 [B, *shape] for one step: 0 at a share `rate` of places, 1 / (1 - rate) at the others."""
    # Beyond all steps, so that no key is one of `step_noise`.
    masks = jax.vmap(lambda key: jax.random.bernoulli(jax.random.fold_in(key, 2**16 + step), 1 - rate, shape))
    return masks(keys_B) / (1 - rate)


def guided(without: jax.Array, with_text: jax.Array, scale: ArrayLike, rescale: ArrayLike = 0.0) -> jax.Array:
    """Classifier-free guidance (arXiv 2207.12598) of predictions [B, ...], in float32.

    `rescale` is how far, 0 to 1, its standard deviation is brought back to that `with_text` (arXiv 2305.08891, section
    3.4), against too bright pictures.
    """
    without, with_text = without.astype(jnp.float32), with_text.astype(jnp.float32)
    out = without + scale * (with_text - without)
    axes = tuple(range(1, out.ndim))
    factor = jnp.std(with_text, axis=axes, keepdims=True) / jnp.maximum(jnp.std(out, axis=axes, keepdims=True), 1e-12)
    return out * (1 + rescale * (factor - 1))
