"""Euler steps in flow time are DDIM, and both are what diffusers computes."""

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from schedules import SD, ZERO_SNR, config

from d2f_jax import NoiseSchedule, alignment, sampling


def network(x, tau):
    """A nonlinear denoiser that depends on its timestep; the same formula in JAX and in PyTorch."""
    sin = torch.sin if isinstance(x, torch.Tensor) else jnp.sin
    return 0.6 * x + 0.3 * sin(2 * x + tau / 300) - 0.1


def velocity_of(schedule: NoiseSchedule):
    def velocity(x, t):
        dm_x = alignment.to_diffusion(schedule, x, t)
        return alignment.velocity(schedule, network(dm_x, alignment.diffusion_timestep(schedule, t)), x, t)

    return velocity


NOISE = np.asarray(jax.random.normal(jax.random.key(0), (2, 4, 4, 3)))


def flow_samples(schedule: NoiseSchedule, grid: np.ndarray) -> np.ndarray:
    sample = jax.jit(lambda x, grid: sampling.euler(velocity_of(schedule), sampling.initial_state(x, grid), grid))
    return np.asarray(sample(NOISE, grid))


def euler_of_diffusers(scheduler_config: dict, grid: np.ndarray) -> np.ndarray:
    euler = diffusers.EulerDiscreteScheduler(**scheduler_config, timestep_spacing="leading")
    euler.set_timesteps(sigmas=sampling.diffusers_sigmas(grid))
    x = torch.tensor(NOISE) * euler.init_noise_sigma
    for tau in euler.timesteps:
        x = euler.step(network(euler.scale_model_input(x, tau), tau), tau, x).prev_sample
    return x.numpy()


def assert_close(ours: np.ndarray, theirs: np.ndarray, tolerance: float = 1e-5) -> None:
    assert np.abs(ours - theirs).max() <= tolerance * np.abs(theirs).max()


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("num_steps", [1, 2, 4, 10])
def test_euler_steps_are_those_of_diffusers(kind: str, num_steps: int) -> None:
    schedule = NoiseSchedule.from_config(config(SD, kind))
    grid = sampling.flow_grid(schedule, num_steps)
    assert_close(flow_samples(schedule, grid), euler_of_diffusers(config(SD, kind), grid))


def test_euler_steps_with_zero_terminal_snr() -> None:
    schedule = NoiseSchedule.from_config(config(ZERO_SNR, "v_prediction"))
    grid = sampling.flow_grid(schedule, 5)
    assert grid[0] == 0
    theirs = euler_of_diffusers(config(ZERO_SNR, "v_prediction"), grid)
    assert_close(flow_samples(schedule, grid), theirs, tolerance=1e-3)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("num_steps", [1, 3, 10])
def test_euler_steps_are_ddim(kind: str, num_steps: int) -> None:
    schedule = NoiseSchedule.from_config(config(SD, kind))
    grid = sampling.flow_grid(schedule, num_steps)
    tau = alignment.diffusion_timestep(schedule, grid[:-1])
    assert_close(
        flow_samples(schedule, grid), np.asarray(sampling.ddim(schedule, network, jnp.asarray(NOISE), tau, 1.0))
    )


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("to_one", [True, False])
def test_ddim_is_that_of_diffusers(kind: str, spacing: sampling.Spacing, to_one: bool) -> None:
    schedule = NoiseSchedule.from_config(config(SD, kind))
    offset = 1 if spacing == "leading" else 0
    theirs = diffusers.DDIMScheduler(
        **config(SD, kind),
        clip_sample=False,
        set_alpha_to_one=to_one,
        steps_offset=offset,
        timestep_spacing=spacing,
    )
    theirs.set_timesteps(8)
    timesteps = sampling.ddim_timesteps(1000, 8, spacing, offset)
    np.testing.assert_array_equal(timesteps, theirs.timesteps.numpy())
    if spacing == "linspace":
        return  # diffusers then steps to timesteps that are not the next ones of its own list
    x = torch.tensor(NOISE)
    for tau in theirs.timesteps:
        x = theirs.step(network(x, tau), tau, x).prev_sample
    final = 1.0 if to_one else schedule.alphas_cumprod[0]
    assert_close(np.asarray(sampling.ddim(schedule, network, jnp.asarray(NOISE), timesteps, final)), x.numpy())


def test_padding_changes_nothing() -> None:
    schedule = NoiseSchedule.from_config(config(SD, "v_prediction"))
    grid = sampling.flow_grid(schedule, 6)
    np.testing.assert_array_equal(flow_samples(schedule, grid), flow_samples(schedule, sampling.pad_grid(grid, 20)))
    timesteps = sampling.ddim_timesteps(1000, 6)
    padded = sampling.pad_timesteps(timesteps, 20)
    np.testing.assert_array_equal(
        sampling.ddim(schedule, network, jnp.asarray(NOISE), timesteps, 1.0),
        sampling.ddim(schedule, network, jnp.asarray(NOISE), padded, 1.0),
    )


def test_euler_is_of_first_order() -> None:
    schedule = NoiseSchedule.from_config(config(SD, "v_prediction"))
    fine = flow_samples(schedule, sampling.flow_grid(schedule, 4096))
    steps = np.array([32, 64, 128, 256])
    errors = [np.abs(flow_samples(schedule, sampling.flow_grid(schedule, n)) - fine).mean() for n in steps]
    order = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert order == pytest.approx(1, abs=0.15)


def test_one_step_with_the_true_velocity_is_exact() -> None:
    data = np.random.default_rng(1).normal(size=NOISE.shape).astype(np.float32)
    x = sampling.euler(lambda x, t: jnp.asarray(data - NOISE), jnp.asarray(NOISE), jnp.array([0.0, 1.0]))
    np.testing.assert_allclose(x, data, atol=1e-6)
