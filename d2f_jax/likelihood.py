"""How likely data is to a diffusion model: the variational bound, in nats or bits per dimension."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from d2f_jax.sampling import Predict, data_and_noise, step_noise
from d2f_jax.schedule import NoiseSchedule


class Bound(NamedTuple):
    """Nats per dimension, float32 [B]; their sum is, in the mean over noise, no less than `-log p(x) / dimensions`."""

    prior: jax.Array
    steps: jax.Array
    data: jax.Array

    @property
    def nats(self) -> jax.Array:
        return self.prior + self.steps + self.data

    @property
    def bits(self) -> jax.Array:
        return self.nats / np.log(2)


def variational_bound(
    schedule: NoiseSchedule, predict: Predict, x: jax.Array, timesteps: ArrayLike, keys_B: jax.Array
) -> Bound:
    """Of data `x` [B, ...] under the chain of `timesteps` [N], which fall, perhaps padded (`sampling.pad_timesteps`).

    The bound of DDPM (arXiv 2006.11239, equation 5) whose steps have the variance `beta` of the forward ones, at which
    it is near even with few steps if data is uncertain. `prior` is the divergence of the first timestep's states from
    noise, `steps` that of the forward posteriors from the chain's Gaussians. Data is continuous, as latents are: `data`
    is the negative log density of a Gaussian around what is predicted at the last timestep, of the variance `1/SNR`
    there, and not the probability of a bin, as pictures of 8 bits have it. Noise is drawn once for each timestep, with
    `keys_B`, one for each example.
    """
    x, timesteps = jnp.asarray(x, jnp.float32), jnp.asarray(timesteps, jnp.float32)
    count, axes = jnp.sum(timesteps >= 0), tuple(range(1, x.ndim))
    power = schedule.alphas_cumprod[timesteps.astype(jnp.int32)]
    snr, is_last = power / (1 - power), jnp.arange(len(timesteps)) == count - 1
    # Of a step the posterior's variance over beta; with it a divergence is `(ratio - 1 - log ratio)/2` and the means'.
    ratio = (1 - jnp.roll(power, -1)) / (1 - power)
    weights = jnp.where(is_last, snr, ratio * (jnp.roll(snr, -1) - snr)) / 2
    least = jnp.where(is_last, jnp.log(2 * jnp.pi / snr), ratio - 1 - jnp.log(ratio)) / 2

    def keep(i: jax.Array, terms_NxB: jax.Array) -> jax.Array:
        alpha, sigma = jnp.sqrt(power[i]), jnp.sqrt(1 - power[i])
        noisy = alpha * x + sigma * step_noise(keys_B, i, x.shape[1:])
        found, _ = data_and_noise(schedule, predict(noisy, timesteps[i]), noisy, alpha, sigma)
        return terms_NxB.at[i].set(least[i] + weights[i] * jnp.mean((x - found) ** 2, axis=axes))

    terms_NxB = jax.lax.fori_loop(0, count, keep, jnp.zeros((len(timesteps), len(x)), jnp.float32))
    prior = (power[0] * (jnp.mean(x**2, axis=axes) - 1) - jnp.log1p(-power[0])) / 2
    return Bound(prior, jnp.sum(jnp.where(is_last[:, None], 0, terms_NxB), axis=0), terms_NxB[count - 1])
