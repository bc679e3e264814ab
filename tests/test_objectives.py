"""The objective: zero for a network that knows, the plain flow-matching error for one that doesn't; and flow times."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from schedules import SD, config

from d2f_jax import NoiseSchedule, alignment, flow, objectives

KINDS = ["epsilon", "v_prediction", "sample"]
X_1, X_0 = jax.random.normal(jax.random.key(0), (2, 32, 4, 4, 2))


def oracle(schedule: NoiseSchedule):
    """Knows data and noise, and answers as the schedule's prediction type asks."""

    def predict(dm_x: jax.Array, tau_B: jax.Array) -> jax.Array:
        t = flow.per_example(alignment.flow_time(schedule, tau_B), X_1)
        s = 1 / jnp.sqrt(t**2 + (1 - t) ** 2)
        return {"epsilon": X_0, "v_prediction": s * (t * X_0 - (1 - t) * X_1), "sample": X_1}[schedule.prediction_type]

    return predict


@pytest.mark.parametrize("kind", KINDS)
def test_a_network_that_knows_has_no_loss(kind: str) -> None:
    schedule = NoiseSchedule.from_config(config(SD, kind))
    last, first = (float(alignment.flow_time(schedule, i)) for i in (999, 0))
    t_B = jnp.linspace(last + 1e-4, first - 1e-4, 32)
    assert objectives.diff2flow(schedule, oracle(schedule), X_1, X_0, t_B).max() < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_the_network_sees_its_own_coordinates(kind: str) -> None:
    schedule = NoiseSchedule.from_config(config(SD, kind))
    tau_B = jnp.arange(32.0) * 31
    seen = {}

    def predict(dm_x: jax.Array, tau_B: jax.Array) -> jax.Array:
        seen.update(x=dm_x, tau=tau_B)
        return dm_x

    objectives.diff2flow(schedule, predict, X_1, X_0, alignment.flow_time(schedule, tau_B))
    power = schedule.alphas_cumprod[tau_B.astype(int)][:, None, None, None]
    np.testing.assert_allclose(seen["tau"], tau_B, atol=2e-3)
    np.testing.assert_allclose(seen["x"], jnp.sqrt(power) * X_1 + jnp.sqrt(1 - power) * X_0, atol=5e-6)


def test_the_loss_is_the_error_of_the_velocity() -> None:
    # An epsilon network whose noise is off by d has a velocity off by d/t.
    schedule = NoiseSchedule.from_config(config(SD, "epsilon"))
    t_B = jnp.linspace(0.1, 0.95, 32)
    loss_B = objectives.diff2flow(schedule, lambda dm_x, tau_B: X_0 + 0.3, X_1, X_0, t_B)
    np.testing.assert_allclose(loss_B, (0.3 / t_B) ** 2, rtol=1e-3)


def test_interpolation_has_the_velocity_as_derivative() -> None:
    t_B = jnp.linspace(0, 0.9, 32)
    step = (flow.interpolate(X_1, X_0, t_B + 0.1) - flow.interpolate(X_1, X_0, t_B)) / 0.1
    np.testing.assert_allclose(step, flow.velocity_target(X_1, X_0), atol=2e-5)
    np.testing.assert_array_equal(flow.interpolate(X_1, X_0, 0.0), X_0)
    np.testing.assert_array_equal(flow.interpolate(X_1, X_0, 1.0), X_1)


def test_flow_times_are_uniform() -> None:
    times = flow.sample_times(jax.random.key(1), (20_000,))
    assert scipy.stats.kstest(times, "uniform").pvalue > 1e-3
