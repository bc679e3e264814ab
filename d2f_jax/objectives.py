"""Training objectives: one number per example from a network's prediction.

`Predict` is the diffusion network with its conditioning bound: `(dm_x_BxHxWxC, tau_B) -> prediction_BxHxWxC`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from d2f_jax import alignment, flow
from d2f_jax.alignment import Convention
from d2f_jax.schedule import NoiseSchedule

Predict = Callable[[jax.Array, jax.Array], jax.Array]


def diff2flow(
    schedule: NoiseSchedule,
    predict: Predict,
    x_1: jax.Array,
    x_0: jax.Array,
    t_B: jax.Array,
    convention: Convention = "exact",
) -> jax.Array:
    """Squared error [B] of the flow velocity that a diffusion network implies (Diff2Flow, arXiv 2506.02221, section 3).

    The network sees what it was trained on, the diffusion state and timestep that correspond to flow time `t_B`; only
    what is asked of its prediction is new. `x_1` is data, `x_0` noise, both [B, H, W, C]; the mathematics is float32.
    """
    fm_x = flow.interpolate(x_1, x_0, t_B)
    dm_x = alignment.to_diffusion(schedule, fm_x, t_B, convention=convention)
    tau_B = alignment.diffusion_timestep(schedule, t_B, convention=convention)
    velocity = alignment.velocity(schedule, predict(dm_x, tau_B), fm_x, t_B, convention=convention)
    return jnp.mean((velocity - flow.velocity_target(x_1, x_0)) ** 2, axis=(1, 2, 3))
