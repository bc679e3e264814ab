"""The variational bound is one: no less than what data takes, nearer to it with more steps, made of Gaussians' KLs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
from schedules import SD, ZERO_SNR, config

from d2f_jax import NoiseSchedule, likelihood, sampling

STD = 0.7  # of Gaussian data, whose best prediction is known
KINDS = ["epsilon", "v_prediction", "sample"]


def ideal(schedule: NoiseSchedule, x: jax.Array, tau: jax.Array) -> jax.Array:
    """What a network that has learned Gaussian data exactly predicts."""
    power = schedule.alphas_cumprod[tau.astype(int)]
    alpha, sigma = jnp.sqrt(power), jnp.sqrt(1 - power)
    data, noise = (x * part / (power * STD**2 + 1 - power) for part in (alpha * STD**2, sigma))
    return {"epsilon": noise, "v_prediction": alpha * noise - sigma * data, "sample": data}[schedule.prediction_type]


def bound(schedule: NoiseSchedule, x: jax.Array, timesteps: np.ndarray, network=None) -> likelihood.Bound:
    keys = jax.random.split(jax.random.key(0), len(x))
    network = network or functools.partial(ideal, schedule)
    compute = jax.jit(lambda x, timesteps: likelihood.variational_bound(schedule, network, x, timesteps, keys))
    return compute(x, timesteps)


def gaussian_data(size: int) -> jax.Array:
    return STD * jax.random.normal(jax.random.key(1), (8, size))


@pytest.mark.parametrize("base", [SD, ZERO_SNR], ids=["sd", "zero-snr"])
def test_it_is_no_less_than_what_data_takes_and_nearer_with_steps(base: dict) -> None:
    schedule = NoiseSchedule.from_config(config(base, "v_prediction"))
    x, told = gaussian_data(1 << 14), []
    exact = np.mean(np.log(2 * np.pi * STD**2) + np.asarray(x) ** 2 / STD**2) / 2
    for num_steps in (5, 20, 100, 500):
        timesteps = sampling.pad_timesteps(sampling.ddim_timesteps(1000, num_steps, "linspace"), 512)
        told.append(float(jnp.mean(bound(schedule, x, timesteps).nats)))
        # Its expectation: what is not known of data at a signal-to-noise ratio r is STD^2 / (1 + r STD^2).
        power = np.asarray(schedule.alphas_cumprod, np.float64)[timesteps[:num_steps].astype(int)]
        snr = power / (1 - power)
        unknown = STD**2 / (1 + snr * STD**2)
        expected = (power[0] * (np.mean(np.asarray(x) ** 2) - 1) - np.log(1 - power[0])) / 2
        ratio = (1 - power[1:]) / (1 - power[:-1])
        expected += np.sum(ratio * np.diff(snr) * unknown[:-1] + ratio - 1 - np.log(ratio)) / 2
        expected += (np.log(2 * np.pi / snr[-1]) + snr[-1] * unknown[-1]) / 2
        assert told[-1] == pytest.approx(expected, abs=0.01)
    assert told[0] > told[1] > told[2] > told[3] > exact
    assert told[3] - exact < 0.02


def gaussians_kl(mean, variance, other_mean, other_variance) -> float:
    """From the definition."""

    def density(x, mean, variance):
        return np.exp(-((x - mean) ** 2) / (2 * variance)) / np.sqrt(2 * np.pi * variance)

    def integrand(x):
        p = density(x, mean, variance)
        log_ratio = (x - other_mean) ** 2 / other_variance - (x - mean) ** 2 / variance
        return p * (log_ratio + np.log(other_variance / variance)) / 2

    reach = 12 * np.sqrt(variance)
    return scipy.integrate.quad(integrand, mean - reach, mean + reach)[0]


@pytest.mark.parametrize("kind", KINDS)
def test_its_terms_are_the_divergences_of_ddpm_s_gaussians(kind: str) -> None:
    schedule = NoiseSchedule.from_config(config(SD, kind))
    timesteps, x = np.array([999, 600, 150, 0, -1], np.float32), jnp.array([[0.8]])

    def network(x: jax.Array, tau: jax.Array) -> jax.Array:
        return ideal(schedule, x, tau) + 0.1 * jnp.sin(x + tau)

    ours = bound(schedule, x, timesteps, network)
    a = np.asarray(schedule.alphas_cumprod, np.float64)
    keys = jax.random.split(jax.random.key(0), 1)
    steps, data = 0.0, float(x[0, 0])
    for i, (tau, before) in enumerate([(999, 600), (600, 150), (150, 0), (0, None)]):
        noisy = np.sqrt(a[tau]) * data + np.sqrt(1 - a[tau]) * float(sampling.step_noise(keys, i, (1,))[0, 0])
        out = float(network(jnp.float32(noisy), jnp.float32(tau)))
        found = {
            "epsilon": (noisy - np.sqrt(1 - a[tau]) * out) / np.sqrt(a[tau]),
            "v_prediction": np.sqrt(a[tau]) * noisy - np.sqrt(1 - a[tau]) * out,
            "sample": out,
        }[kind]
        if before is None:
            variance = (1 - a[0]) / a[0]
            last = np.log(2 * np.pi * variance) / 2 + (data - found) ** 2 / (2 * variance)
            continue
        # DDPM's posterior, equation 7, of the step from `tau` to `before`.
        beta = 1 - a[tau] / a[before]
        of_data = np.sqrt(a[before]) * beta / (1 - a[tau])
        of_state = np.sqrt(1 - beta) * (1 - a[before]) / (1 - a[tau])
        variance = beta * (1 - a[before]) / (1 - a[tau])
        steps += gaussians_kl(of_data * data + of_state * noisy, variance, of_data * found + of_state * noisy, beta)
    prior = gaussians_kl(np.sqrt(a[999]) * data, 1 - a[999], 0.0, 1.0)
    np.testing.assert_allclose(ours.prior, prior, rtol=1e-3)
    np.testing.assert_allclose(ours.steps, steps, rtol=1e-3)
    np.testing.assert_allclose(ours.data, last, rtol=1e-3)
    np.testing.assert_allclose(ours.bits, (prior + steps + last) / np.log(2), rtol=1e-3)


def test_it_does_not_depend_on_padding_or_on_other_rows() -> None:
    schedule, x = NoiseSchedule.from_config(config(SD, "epsilon")), gaussian_data(4)
    timesteps, keys = sampling.ddim_timesteps(1000, 7, "linspace"), jax.random.split(jax.random.key(0), 8)
    network = functools.partial(ideal, schedule)
    whole = likelihood.variational_bound(schedule, network, x, timesteps, keys)
    padded = sampling.pad_timesteps(timesteps, 20)
    part = likelihood.variational_bound(schedule, network, x[3:5], padded, keys[3:5])
    np.testing.assert_allclose(part.nats, whole.nats[3:5], rtol=1e-5)
