"""Diff2Flow's alignment between a diffusion model and a flow (arXiv 2506.02221, section 3), in closed form.

Flow time `t` runs from 0 (noise) to 1 (data), the diffusion timestep `tau` from T-1 (noise) to 0. With
`alpha = sqrt(alphas_cumprod[tau])` and `sigma = sqrt(1 - alphas_cumprod[tau])` the two processes meet at

    t = alpha / (alpha + sigma),    x_t = x_tau / (alpha + sigma).

As alpha² + sigma² = 1, all coefficients follow from t alone: `s = 1/sqrt(t² + (1-t)²)`, `alpha = t s`,
`sigma = (1-t) s`, `x_tau = s x_t`. Only the network's timestep is interpolated. Below the last timestep's flow time
there is no diffusion state: timestep and coefficients stay at the last one. Above the first one's, the timestep stays 0
and the coefficients follow t.

`convention="reference"` reproduces the paper's published code instead, for checkpoints finetuned with it: it reads the
coefficients from a table of T+1 entries that begins with a clean one and hands the network that table's index, so that
state and timestep are one step apart; below the last timestep's flow time its index wraps around.

Times are scalars or [B], states [B, ...]; everything is computed and returned in float32.
"""

import dataclasses
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from d2f_jax.errors import InputError
from d2f_jax.flow import LINEAR, Path, PathName, per_example
from d2f_jax.schedule import NoiseSchedule

Convention = Literal["exact", "reference"]


def flow_time(schedule: NoiseSchedule, timestep: ArrayLike, *, convention: Convention = "exact") -> jax.Array:
    """f_t: the flow time of a diffusion timestep, which may be fractional; clamped to the schedule's own timesteps."""
    table = schedule.alphas_cumprod if convention == "exact" else _full_table(schedule)
    return _read(_flow_times(table), timestep)


def diffusion_timestep(schedule: NoiseSchedule, t: ArrayLike, *, convention: Convention = "exact") -> jax.Array:
    """f_t inverse: the timestep to hand to the network at flow time `t`, float32 and in general fractional."""
    t = jnp.asarray(t, jnp.float32)
    if convention == "reference":
        return _reference_timestep(schedule, t)
    times = _flow_times(schedule.alphas_cumprod)
    return jnp.interp(t, times[::-1], jnp.arange(len(times) - 1, -1, -1, dtype=jnp.float32))


def to_diffusion(
    schedule: NoiseSchedule, x_t: jax.Array, t: ArrayLike, *, convention: Convention = "exact"
) -> jax.Array:
    """f_x inverse: the network's input `s x_t` for the flow state `x_t`."""
    x_t = jnp.asarray(x_t, jnp.float32)
    if convention == "reference":
        timestep = _reference_timestep(schedule, jnp.asarray(t, jnp.float32))
        return x_t * per_example(_reference_scale(schedule, timestep), x_t)
    return x_t * per_example(_coefficients(schedule, t).s, x_t)


def to_flow(
    schedule: NoiseSchedule, x_tau: jax.Array, timestep: ArrayLike, *, convention: Convention = "exact"
) -> jax.Array:
    """f_x: the flow state `x_tau / (alpha + sigma)` of a diffusion state at `timestep`."""
    x_tau = jnp.asarray(x_tau, jnp.float32)
    if convention == "reference":
        return x_tau / per_example(_reference_scale(schedule, timestep), x_tau)
    return x_tau / per_example(_coefficients(schedule, flow_time(schedule, timestep)).s, x_tau)


def velocity(
    schedule: NoiseSchedule, prediction: jax.Array, x_t: jax.Array, t: ArrayLike, *, convention: Convention = "exact"
) -> jax.Array:
    """The flow's velocity `x_1 - x_0` that a network's prediction at flow state `x_t` and time `t` implies."""
    prediction, x_t = jnp.asarray(prediction, jnp.float32), jnp.asarray(x_t, jnp.float32)
    if convention == "reference":
        return _reference_velocity(schedule, prediction, x_t, t)
    c = Coefficients(*(per_example(value, x_t) for value in _coefficients(schedule, t)))
    match schedule.prediction_type:
        case "epsilon":
            return (x_t - prediction) / c.t
        case "v_prediction":
            return c.s**2 * (2 * c.t - 1) * x_t - c.s * prediction
        case "sample":
            return (prediction - x_t) / c.noise


@dataclasses.dataclass(frozen=True)
class Alignment:
    """What a flow takes over from the diffusion model; all three are Diff2Flow, none is naive flow matching.

    `timestep`: the network gets `diffusion_timestep`; otherwise `T (1 - t)` or, with `raw_time`, t itself.
    `state`: the network sees `to_diffusion` of the flow's state; otherwise the state as it is.
    `velocity`: the network's prediction is turned into a velocity; otherwise it is the velocity.
    `path` and `sigma_min` are the flow's own. Raises InputError for others than the linear path, without a width, with
    any of the three.
    """

    timestep: bool = True
    state: bool = True
    velocity: bool = True
    raw_time: bool = False
    convention: Convention = "exact"
    path: PathName = "linear"
    sigma_min: float = 0.0

    def __post_init__(self) -> None:
        if self.flow_path != LINEAR and (self.timestep or self.state or self.velocity):
            raise InputError(
                f"path={self.path}, sigma_min={self.sigma_min}: only the linear path with sigma_min=0 can be aligned "
                "with diffusion; use it, or align nothing, which is flow_matching"
            )

    @property
    def flow_path(self) -> Path:
        return Path(self.path, self.sigma_min)

    @property
    def complete(self) -> bool:
        return self.timestep and self.state and self.velocity


ALIGNED = Alignment()


def velocity_field(
    schedule: NoiseSchedule, predict: Callable[[jax.Array, jax.Array], jax.Array], how: Alignment = ALIGNED
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """The flow that a diffusion network implies, `(x_t [B, ...], t scalar or [B]) -> velocity` in float32.

    `predict(x, tau)` is the network with its conditioning bound; tau has the shape of t.
    """
    convention = how.convention

    def field(fm_x: jax.Array, t: jax.Array) -> jax.Array:
        t = jnp.asarray(t, jnp.float32)
        if how.timestep:
            tau = diffusion_timestep(schedule, t, convention=convention)
        else:
            tau = t if how.raw_time else schedule.num_train_timesteps * (1 - t)
        prediction = predict(to_diffusion(schedule, fm_x, t, convention=convention) if how.state else fm_x, tau)
        if not how.velocity:
            return prediction.astype(jnp.float32)
        return velocity(schedule, prediction, fm_x, t, convention=convention)

    return field


class Coefficients(NamedTuple):
    """`t` held at or above the last timestep's flow time, `s` there, `1 - t` held at or above the first timestep's."""

    t: jax.Array
    s: jax.Array
    noise: jax.Array


def _coefficients(schedule: NoiseSchedule, t: ArrayLike) -> Coefficients:
    times = _flow_times(schedule.alphas_cumprod)
    t = jnp.clip(jnp.asarray(t, jnp.float32), times[-1], 1.0)
    return Coefficients(t, jax.lax.rsqrt(t**2 + (1 - t) ** 2), jnp.maximum(1 - t, 1 - times[0]))


def _flow_times(alphas_cumprod: jax.Array) -> jax.Array:
    alpha, sigma = jnp.sqrt(alphas_cumprod), jnp.sqrt(1 - alphas_cumprod)
    return alpha / (alpha + sigma)


# The published code's way: two tables, two offsets.


def _full_table(schedule: NoiseSchedule) -> jax.Array:
    """`alphas_cumprod` [T+1] behind a clean entry."""
    return jnp.concatenate([jnp.ones(1, jnp.float32), schedule.alphas_cumprod])


def _reference_timestep(schedule: NoiseSchedule, t: jax.Array) -> jax.Array:
    """0 .. T by linear interpolation in the T+1 flow times. Below the last its left neighbour is the clean entry."""
    rising = _flow_times(_full_table(schedule))[::-1]
    last = len(rising) - 1
    # At t = 1 the published code reads past the end; the last interval goes on to hold there.
    left = jnp.minimum(jnp.searchsorted(rising, t, side="right") - 1, last - 1)
    below, above = rising[jnp.where(left < 0, last, left)], rising[left + 1]
    return last - (left + (t - below) / (above - below))


def _reference_scale(schedule: NoiseSchedule, timestep: ArrayLike) -> jax.Array:
    table = _full_table(schedule)
    return _read(jnp.sqrt(table) + jnp.sqrt(1 - table), timestep)


def _reference_velocity(schedule: NoiseSchedule, prediction: jax.Array, x_t: jax.Array, t: ArrayLike) -> jax.Array:
    """Inverts with the T-entry table, one step from the one that scaled the state."""
    timestep = _reference_timestep(schedule, jnp.asarray(t, jnp.float32))
    dm_x = x_t * per_example(_reference_scale(schedule, timestep), x_t)
    table = schedule.alphas_cumprod
    match schedule.prediction_type:
        case "epsilon":
            gain, noise_gain = (_read(f, timestep) for f in (jnp.sqrt(1 / table), jnp.sqrt(1 / table - 1)))
            return per_example(gain, x_t) * dm_x - (per_example(noise_gain, x_t) + 1) * prediction
        case "v_prediction":
            alpha, sigma = (per_example(_read(f, timestep), x_t) for f in (jnp.sqrt(table), jnp.sqrt(1 - table)))
            return (alpha - sigma) * dm_x - (alpha + sigma) * prediction
        case "sample":
            raise InputError("convention='reference' knows epsilon and v_prediction only; use convention='exact'")


def _read(table: jax.Array, timestep: ArrayLike) -> jax.Array:
    """`table` at a fractional index, held at both ends."""
    return jnp.interp(jnp.asarray(timestep, jnp.float32), jnp.arange(len(table), dtype=jnp.float32), table)
