"""Training objectives: one number per example from a network's prediction.

`Predict` is the diffusion network with its conditioning bound: `(dm_x_BxHxWxC, tau_B) -> prediction_BxHxWxC`. Data
`x_1` and noise `x_0` are [B, H, W, C]. `valid_BxHxWx1`, 1 where data is known and 0 where not, restricts every mean to
what is known, though all of it is finite; an example without any has no loss. The mathematics is float32.
"""

import dataclasses
from collections.abc import Callable
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from d2f_jax import alignment, flow
from d2f_jax.alignment import Alignment
from d2f_jax.errors import InputError
from d2f_jax.schedule import NoiseSchedule

Predict = Callable[[jax.Array, jax.Array], jax.Array]
Name = Literal["diff2flow", "flow_matching", "diffusion"]
Norm = Literal["l2", "l1"]


@dataclasses.dataclass(frozen=True)
class Objective:
    """What is trained, and at which times.

    "diff2flow" and "flow_matching" are one loss, of the velocity, and differ by what `alignment` takes over from the
    diffusion model. "diffusion" is the model's own loss, weighted by min-SNR if `min_snr_gamma` is not 0. `norm` is of
    the error: "l2" squares it, "l1" takes its size. Raises InputError for min-SNR of an error that is not squared, and
    for times that begin at the last timestep's without alignment.
    """

    name: Name = "diff2flow"
    alignment: Alignment = alignment.ALIGNED
    times: flow.TimeDistribution = flow.UNIFORM
    min_snr_gamma: float = 0.0
    norm: Norm = "l2"

    def __post_init__(self) -> None:
        if self.norm not in get_args(Norm):
            raise InputError(f"norm={self.norm!r} is not one of {', '.join(get_args(Norm))}")
        if self.min_snr_gamma and self.norm != "l2":
            raise InputError(f"min_snr_gamma={self.min_snr_gamma} weighs squared errors; use 0 for norm={self.norm!r}")
        if self.times.begin == "last_timestep" and not (self.name == "diff2flow" and self.alignment.complete):
            raise InputError(
                "times that begin at the last timestep's are of diff2flow, all aligned; set config.objective.begin=zero"
            )


def first_time(objective: Objective, schedule: NoiseSchedule) -> float:
    """The flow time at which training begins.

    Before the last diffusion timestep's an aligned epsilon network is told that timestep, and asked for noise that is
    not there. On Stable Diffusion's schedule these are 6% of uniform times, and half the weight of all its errors.
    """
    if objective.times.begin == "zero":
        return 0.0
    return float(alignment.flow_time(schedule, schedule.num_train_timesteps - 1))


def loss(
    objective: Objective,
    schedule: NoiseSchedule,
    predict: Predict,
    x_1: jax.Array,
    x_0: jax.Array,
    t_B: jax.Array,
    valid_BxHxWx1: jax.Array | None = None,
    path_noise: jax.Array | None = None,
) -> jax.Array:
    """The objective's loss [B] at flow times `t_B`; a path with `sigma_min` needs `path_noise`, normal like `x_0`."""
    match objective.name:
        case "diff2flow" | "flow_matching":
            how = objective.alignment
            field = alignment.velocity_field(schedule, predict, how)
            return flow_matching(field, x_1, x_0, t_B, valid_BxHxWx1, how.flow_path, path_noise, objective.norm)
        case "diffusion":
            tau_B = discrete_timestep(schedule, t_B)
            gamma = objective.min_snr_gamma
            return diffusion(schedule, predict, x_1, x_0, tau_B, gamma, valid_BxHxWx1, objective.norm)


def flow_matching(
    velocity: Callable[[jax.Array, jax.Array], jax.Array],
    x_1: jax.Array,
    x_0: jax.Array,
    t_B: jax.Array,
    valid_BxHxWx1: jax.Array | None = None,
    path: flow.Path = flow.LINEAR,
    path_noise: jax.Array | None = None,
    norm: Norm = "l2",
) -> jax.Array:
    """Squared error [B], or another `norm`, of a velocity field along `path` (arXiv 2302.00482, equation 10).

    With the aligned field of a diffusion network it is Diff2Flow's objective (arXiv 2506.02221, section 3): the network
    sees the diffusion state and timestep that correspond to flow time, and only what is asked of its prediction is new.
    """
    x_t = flow.interpolate(x_1, x_0, t_B, path)
    if path.sigma_min:
        assert path_noise is not None, "a path with sigma_min needs its noise"
        x_t += path.sigma_min * path_noise
    error = velocity(x_t, t_B) - flow.velocity_target(x_1, x_0, t_B, path)
    return _mean(error, norm, valid_BxHxWx1)


def diffusion(
    schedule: NoiseSchedule,
    predict: Predict,
    x_1: jax.Array,
    x_0: jax.Array,
    tau_B: jax.Array,
    min_snr_gamma: float = 0.0,
    valid_BxHxWx1: jax.Array | None = None,
    norm: Norm = "l2",
) -> jax.Array:
    """Squared error [B], or another `norm`, of the diffusion model's own prediction at timesteps `tau_B`, int32.

    With `min_snr_gamma` it weighs as if the error were that of the data, `min(SNR, gamma)` times (arXiv 2303.09556).
    """
    x_1, x_0 = jnp.asarray(x_1, jnp.float32), jnp.asarray(x_0, jnp.float32)
    power_B = schedule.alphas_cumprod[tau_B]
    alpha, sigma = (flow.per_example(jnp.sqrt(power), x_1) for power in (power_B, 1 - power_B))
    target = {"epsilon": x_0, "v_prediction": alpha * x_0 - sigma * x_1, "sample": x_1}[schedule.prediction_type]
    prediction = predict(alpha * x_1 + sigma * x_0, tau_B.astype(jnp.float32)).astype(jnp.float32)
    loss_B = _mean(prediction - target, norm, valid_BxHxWx1)
    return loss_B * _min_snr_weight(schedule, power_B, min_snr_gamma) if min_snr_gamma else loss_B


def discrete_timestep(schedule: NoiseSchedule, t_B: jax.Array) -> jax.Array:
    """The diffusion timestep, int32, of rank `1 - t` among all of them: uniform times draw each alike."""
    count = schedule.num_train_timesteps
    return jnp.clip(jnp.floor(count * (1 - t_B)), 0, count - 1).astype(jnp.int32)


def _min_snr_weight(schedule: NoiseSchedule, power_B: jax.Array, gamma: float) -> jax.Array:
    """min(SNR, gamma) divided by how much more the prediction's error is than the data's."""
    snr_B = power_B / (1 - power_B)
    match schedule.prediction_type:
        case "epsilon":  # of min(SNR, gamma)/SNR, what has no 0/0 at zero terminal SNR
            return jnp.minimum(1, gamma / jnp.maximum(snr_B, 1e-12))
        case "v_prediction":
            return jnp.minimum(snr_B, gamma) / (snr_B + 1)
        case "sample":
            return jnp.minimum(snr_B, gamma)


def _mean(error: jax.Array, norm: Norm, valid_BxHxWx1: jax.Array | None) -> jax.Array:
    """[B], of the squares or sizes of errors where they are valid."""
    x = error**2 if norm == "l2" else jnp.abs(error)
    if valid_BxHxWx1 is None:
        return jnp.mean(x, axis=(1, 2, 3))
    weight = jnp.broadcast_to(valid_BxHxWx1, x.shape).astype(jnp.float32)
    return jnp.sum(x * weight, axis=(1, 2, 3)) / jnp.maximum(jnp.sum(weight, axis=(1, 2, 3)), 1e-6)
