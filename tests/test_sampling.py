"""Euler steps in flow time are DDIM, both are what diffusers computes, and solvers have the order they should."""

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from diffusers.schedulers import scheduling_ddpm
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
    sample = jax.jit(lambda x, grid: sampling.solve(velocity_of(schedule), sampling.from_noise(x, grid[0]), grid))
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


def swirl(x: jax.Array, t: jax.Array) -> jax.Array:
    """Smooth, and linear neither in x nor in t."""
    return jnp.sin(3 * t + x) * x[..., ::-1] - 0.5 * x


def exact_swirl(x: np.ndarray, first: float, last: float) -> np.ndarray:
    def f(t, y):
        y = y.reshape(x.shape)
        return (np.sin(3 * t + y) * y[..., ::-1] - 0.5 * y).ravel()

    x = x.astype(np.float64)
    return scipy.integrate.solve_ivp(f, (first, last), x.ravel(), rtol=1e-11, atol=1e-12).y[:, -1].reshape(x.shape)


@pytest.mark.parametrize(("solver", "expected"), [("euler", 1), ("heun", 2), ("midpoint", 2), ("rk4", 4)])
@pytest.mark.parametrize("back", [False, True])
def test_solvers_have_their_order_in_both_directions(solver: sampling.Solver, expected: int, back: bool) -> None:
    steps = np.array([4, 6, 8, 12] if solver == "rk4" else [32, 48, 64, 96])
    ends = (1.0, 0.1) if back else (0.1, 1.0)
    truth = exact_swirl(NOISE, *ends)
    solve = jax.jit(lambda x, grid: sampling.solve(swirl, x, grid, solver))
    errors = [np.abs(solve(NOISE, np.linspace(*ends, n + 1, dtype=np.float32)) - truth).mean() for n in steps]
    assert -np.polyfit(np.log(steps), np.log(errors), 1)[0] == pytest.approx(expected, abs=0.25)


def test_adaptive_steps_meet_their_tolerance() -> None:
    for ends in ((0.1, 1.0), (1.0, 0.1)):
        x = sampling.solve_adaptive(swirl, jnp.asarray(NOISE), *ends, rtol=1e-5, atol=1e-5)
        assert np.abs(x - exact_swirl(NOISE, *ends)).mean() < 1e-4


def test_back_and_forth_is_where_it_began() -> None:
    schedule = NoiseSchedule.from_config(config(SD, "v_prediction"))
    grid, field = sampling.flow_grid(schedule, 100), velocity_of(schedule)
    data = sampling.solve(field, sampling.from_noise(NOISE, grid[0]), grid, "heun")
    noise = sampling.to_noise(sampling.solve(field, data, grid[::-1], "heun"), grid[0])
    np.testing.assert_allclose(noise, NOISE, atol=5e-3)


def test_a_padded_grid_is_walked_back_whole() -> None:
    grid = np.array([0.1, 0.4, 1.0], np.float32)
    np.testing.assert_array_equal(sampling.reversed_grid(jnp.asarray(grid)), grid[::-1])
    padded = sampling.reversed_grid(jnp.asarray(sampling.pad_grid(grid, 6)))
    np.testing.assert_array_equal(padded, np.array([1.0, 0.4, 0.1, 0.1, 0.1, 0.1], np.float32))
    there, back = (sampling.solve(swirl, jnp.asarray(NOISE), g) for g in (grid[::-1], padded))
    np.testing.assert_array_equal(there, back)


def test_a_shifted_grid_keeps_its_ends_and_is_denser_near_noise() -> None:
    schedule = NoiseSchedule.from_config(config(SD, "v_prediction"))
    plain, moved = (sampling.flow_grid(schedule, 10, shift=shift) for shift in (1.0, 3.0))
    np.testing.assert_array_equal(plain[[0, -1]], moved[[0, -1]])
    assert (moved[1:-1] < plain[1:-1]).all() and (np.diff(moved) > 0).all()
    assert sampling.flow_grid(schedule, 4, aligned=False).tolist() == [0, 0.25, 0.5, 0.75, 1]


def test_one_step_with_the_true_velocity_is_exact() -> None:
    data = np.random.default_rng(1).normal(size=NOISE.shape).astype(np.float32)
    for solver in sampling.TABLEAUS:
        x = sampling.solve(lambda x, t: jnp.asarray(data - NOISE), jnp.asarray(NOISE), jnp.array([0.0, 1.0]), solver)
        np.testing.assert_allclose(x, data, atol=1e-6)


KEYS = jax.random.split(jax.random.key(5), 2)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("eta", [0.4, 1.0])
def test_ddim_with_noise_is_that_of_diffusers(kind: str, eta: float) -> None:
    schedule = NoiseSchedule.from_config(config(SD, kind))
    theirs = diffusers.DDIMScheduler(**config(SD, kind), clip_sample=False, steps_offset=1)
    theirs.set_timesteps(8)
    x = torch.tensor(NOISE)
    for i, tau in enumerate(theirs.timesteps):
        drawn = torch.tensor(np.asarray(sampling.step_noise(KEYS, i, NOISE.shape[1:])))
        x = theirs.step(network(x, tau), tau, x, eta=eta, variance_noise=drawn).prev_sample
    timesteps = sampling.ddim_timesteps(1000, 8, "leading", 1)
    ours = sampling.ddim(schedule, network, jnp.asarray(NOISE), timesteps, 1.0, eta=eta, keys_B=KEYS)
    assert_close(np.asarray(ours), x.numpy(), tolerance=2e-5)


def test_ddim_with_all_noise_is_ddpm(monkeypatch: pytest.MonkeyPatch) -> None:
    schedule = NoiseSchedule.from_config(config(SD, "epsilon"))
    theirs = diffusers.DDPMScheduler(**config(SD, "epsilon"), clip_sample=False, steps_offset=0)
    theirs.set_timesteps(20)
    drawn = [torch.tensor(np.asarray(sampling.step_noise(KEYS, i, NOISE.shape[1:]))) for i in range(20)]
    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *args, **kwargs: drawn.pop(0))
    x = torch.tensor(NOISE)
    for tau in theirs.timesteps:
        x = theirs.step(network(x, tau), tau, x).prev_sample
    timesteps = sampling.ddim_timesteps(1000, 20)
    ours = sampling.ddim(schedule, network, jnp.asarray(NOISE), timesteps, 1.0, eta=1.0, keys_B=KEYS)
    assert_close(np.asarray(ours), x.numpy(), tolerance=1e-4)


def test_guidance_is_rescaled_as_in_diffusers() -> None:
    without, with_text = np.random.default_rng(0).normal(size=(2, *NOISE.shape)).astype(np.float32)
    for rescale in (0.0, 0.7, 1.0):
        plain = torch.tensor(without + 7.5 * (with_text - without))
        theirs = rescale_noise_cfg(plain, torch.tensor(with_text), guidance_rescale=rescale)
        ours = sampling.guided(jnp.asarray(without), jnp.asarray(with_text), 7.5, rescale)
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
