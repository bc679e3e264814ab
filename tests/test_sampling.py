"""Euler steps in flow time are DDIM, both are what diffusers computes, and solvers have the order they should."""

import itertools
from typing import get_args

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

from d2f_jax import InputError, NoiseSchedule, adaptive, alignment, flow, sampling, sde
from d2f_jax.alignment import ALIGNED, Alignment
from d2f_jax.sampler import Sampler, SamplerName
from d2f_jax.sde import SDE


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
KEYS = jax.random.split(jax.random.key(5), 2)


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


@pytest.mark.parametrize("offset", [0, 1])
def test_all_timesteps_are_those_that_the_network_knows(offset: int) -> None:
    """diffusers' own list of them begins, with Stable Diffusion's offset, at 1000, where its table has no entry."""
    np.testing.assert_array_equal(sampling.ddim_timesteps(1000, 1000, "leading", offset), np.arange(999.0, -1, -1))
    np.testing.assert_array_equal(
        sampling.ddim_timesteps(1000, 500, "leading", offset), np.arange(998.0, -1, -2) + offset
    )


def test_quadratic_timesteps_are_the_published_ones() -> None:
    # The squares of ten even steps to sqrt(800), rounded down, and 1.
    assert sampling.ddim_timesteps(1000, 10, "quad", 1).tolist() == [800 * k * k // 81 + 1 for k in range(9, -1, -1)]
    assert sampling.ddim_timesteps(4, 2, "quad", 1).tolist() == [3, 0]  # nor do these go past the end


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


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("to_one", [True, False])
def test_inverted_ddim_is_that_of_diffusers(kind: str, spacing: sampling.Spacing, to_one: bool) -> None:
    schedule = NoiseSchedule.from_config(config(SD, kind))
    settings = {"timestep_spacing": spacing, "steps_offset": int(spacing == "leading")}
    theirs = diffusers.DDIMInverseScheduler(**config(SD, kind), clip_sample=False, set_alpha_to_one=to_one, **settings)
    theirs.set_timesteps(8)
    x = torch.tensor(NOISE)
    for tau in theirs.timesteps:
        x = theirs.step(network(x, tau), tau, x).prev_sample
    sampler = Sampler("ddim")
    grid = sampler.grid(schedule, ALIGNED, settings, 8)
    if kind == "sample" and to_one:  # diffusers divides by the noise that data does not have
        assert not np.isfinite(x).any()
        with pytest.raises(InputError, match="cannot invert prediction_type='sample'"):
            sampler.invert(schedule, ALIGNED, network, jnp.asarray(NOISE), grid, set_alpha_to_one=to_one)
    else:
        ours = sampler.invert(schedule, ALIGNED, network, jnp.asarray(NOISE), grid, set_alpha_to_one=to_one)
        assert_close(np.asarray(ours), x.numpy())


@pytest.mark.parametrize("name", ["ddim", "ddim_on_flow_grid"])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_ddim_finds_the_noise_that_it_made_a_sample_of(kind: str, name: str) -> None:
    schedule, sampler = NoiseSchedule.from_config(config(SD, kind)), Sampler(name)
    off = []
    for num_steps in (50, 200):
        grid = sampler.grid(schedule, ALIGNED, {"steps_offset": 1}, num_steps)
        data = sampler.sample(schedule, ALIGNED, network, jnp.asarray(NOISE), grid, set_alpha_to_one=False, keys_B=KEYS)
        noise = sampler.invert(schedule, ALIGNED, network, data, grid, set_alpha_to_one=False)
        off.append(np.abs(noise - NOISE).mean())
    assert off[1] / off[0] == pytest.approx(1 / 4, abs=0.1)  # of first order


def swirl(x: jax.Array, t: jax.Array) -> jax.Array:
    """Smooth, and linear neither in x nor in t."""
    return jnp.sin(3 * flow.per_example(t, x) + x) * x[..., ::-1] - 0.5 * x


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


@pytest.mark.parametrize("solver", sampling.TABLEAUS)
def test_a_trajectory_is_the_states_at_all_points(solver: sampling.Solver) -> None:
    grid = jnp.array([0.1, 0.25, 0.5, 0.6, 1.0])
    states = sampling.trajectory(swirl, jnp.asarray(NOISE), grid, solver)
    assert states.shape == (5, *NOISE.shape)
    for i in range(5):
        np.testing.assert_allclose(states[i], sampling.solve(swirl, NOISE, grid[: i + 1], solver), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("solver", "order"), [("dopri5", 5), ("dopri8", 8), ("bosh3", 3), ("adaptive_heun", 2)])
def test_adaptive_steps_are_as_many_as_the_tolerance_asks(solver: sampling.Adaptive, order: int) -> None:
    """A method of order p takes 1000^(1/p) times the steps for a tolerance 1000 times smaller."""
    evaluations, turns = [], 10 if order == 2 else 30

    def turning(x: jax.Array, t: jax.Array) -> jax.Array:
        jax.debug.callback(lambda t: evaluations.append(t), t)
        return turns * jnp.stack([-x[..., 1], x[..., 0]], axis=-1)

    naive = Alignment(timestep=False, state=False, velocity=False, raw_time=True)
    schedule, x = NoiseSchedule.from_config(config(SD, "epsilon")), jnp.array([[1.0, 0.0]])
    errors, counts, tolerances = [], [], np.array([1e-2, 1e-3, 1e-4, 1e-5])
    for tolerance in tolerances:
        sampler = Sampler(solver, rtol=tolerance, atol=tolerance)
        evaluations.clear()
        grid = sampler.grid(schedule, naive, {}, 4)
        end = sampler.sample(schedule, naive, turning, x, grid, set_alpha_to_one=True, keys_B=KEYS[:1])
        jax.effects_barrier()
        errors.append(np.abs(end[0] - np.array([np.cos(turns), np.sin(turns)])).max())
        counts.append(len(evaluations))
    assert all(3 * finer < coarser for coarser, finer in itertools.pairwise(errors)) and errors[-1] < 1e-3
    assert -np.polyfit(np.log(tolerances), np.log(counts), 1)[0] == pytest.approx(1 / order, abs=0.05)


@pytest.mark.parametrize("solver", adaptive.SOLVERS)
def test_adaptive_steps_meet_their_tolerance(solver: sampling.Adaptive) -> None:
    for ends in ((0.1, 1.0), (1.0, 0.1)):
        x = adaptive.solve(swirl, jnp.asarray(NOISE), *ends, solver, rtol=1e-5, atol=1e-5)
        assert np.abs(x - exact_swirl(NOISE, *ends)).mean() < 1e-4


def test_rounding_moves_no_step() -> None:
    """Here a tolerance that is a millionth larger, elsewhere a batch of another size."""
    ends = (jnp.asarray(NOISE), 0.1, 1.0, "dopri5")
    one, other = (adaptive.solve(swirl, *ends, rtol=rtol, atol=0.0) for rtol in (1e-4, 1.000001e-4))
    np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("solver", adaptive.SOLVERS)
def test_an_example_takes_steps_of_its_own(solver: sampling.Adaptive) -> None:
    """Beside one that turns slower, faster or not at all, and with one call of the network for all."""
    calls = []

    @jax.jit
    def turned(x: jax.Array, speed_B: jax.Array) -> jax.Array:
        def turning(x: jax.Array, t: jax.Array) -> jax.Array:
            jax.debug.callback(lambda t: calls.append(t), t)
            return (speed_B * t)[:, None] * jnp.stack([-x[:, 1], x[:, 0]], axis=-1)

        return adaptive.solve(turning, x, 0.0, 1.0, solver, rtol=1e-2, atol=1e-2)

    def told(*speeds: float) -> tuple[np.ndarray, int]:
        calls.clear()
        out = turned(jnp.tile(jnp.array([1.0, 0.0]), (len(speeds), 1)), jnp.array(speeds))
        jax.effects_barrier()
        assert all(t.shape == (len(speeds),) for t in calls)
        return np.asarray(out), len(calls)

    together, count = told(0.0, 20.0, 60.0)
    alone = [told(speed) for speed in (0.0, 20.0, 60.0)]
    np.testing.assert_allclose(together, np.concatenate([out for out, _ in alone]), atol=1e-6)
    assert alone[0][1] < alone[1][1] < alone[2][1] == count


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


def test_temperature_and_dropout_are_of_the_noise_that_is_drawn() -> None:
    """A step of diffusers' that is handed other noise: half of it, a quarter of its values 0 and the others 4/3."""
    schedule = NoiseSchedule.from_config(config(SD, "epsilon"))
    theirs = diffusers.DDIMScheduler(**config(SD, "epsilon"), clip_sample=False, steps_offset=1)
    theirs.set_timesteps(8)
    x, masks = torch.tensor(NOISE), []
    for i, tau in enumerate(theirs.timesteps):
        drawn = np.asarray(sampling.step_noise(KEYS, i, NOISE.shape[1:]))
        masks.append(np.asarray(sampling.dropout_mask(KEYS, i, NOISE.shape[1:], 0.25)))
        noise = torch.tensor(0.5 * drawn * masks[-1])
        x = theirs.step(network(x, tau), tau, x, eta=0.6, variance_noise=noise).prev_sample
    sampler = Sampler("ddim", eta=0.6, temperature=0.5, noise_dropout=0.25)
    grid = sampler.grid(schedule, ALIGNED, {"steps_offset": 1}, 8)
    ours = sampler.sample(schedule, ALIGNED, network, jnp.asarray(NOISE), grid, set_alpha_to_one=True, keys_B=KEYS)
    assert_close(np.asarray(ours), x.numpy(), tolerance=2e-5)
    assert np.mean(np.array(masks) == 0) == pytest.approx(0.25, abs=0.05)
    np.testing.assert_allclose(np.unique(masks), [0, 4 / 3], rtol=1e-6)
    assert np.abs(masks[0] - masks[1]).max() > 1 and np.abs(masks[0][0] - masks[0][1]).max() > 1


def test_at_temperature_zero_nothing_is_random() -> None:
    schedule = NoiseSchedule.from_config(config(SD, "v_prediction"))
    timesteps = sampling.ddim_timesteps(1000, 8)

    def ddim(temperature: float, keys: jax.Array) -> np.ndarray:
        options = {"eta": 0.8, "temperature": temperature, "keys_B": keys}
        return np.asarray(sampling.ddim(schedule, network, jnp.asarray(NOISE), timesteps, 1.0, **options))

    np.testing.assert_array_equal(ddim(0.0, KEYS), ddim(0.0, KEYS[::-1]))
    assert ddim(0.0, KEYS).std() < ddim(1.0, KEYS).std() < ddim(1.5, KEYS).std()


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("num_steps", [20, 1000])
def test_ddim_with_all_noise_is_ddpm(monkeypatch: pytest.MonkeyPatch, num_steps: int, kind: str) -> None:
    """By name, with the scheduler's config that comes with Stable Diffusion, whose DDIM keeps some noise at the end."""
    schedule, settings = NoiseSchedule.from_config(config(SD, kind)), {"steps_offset": 1}
    theirs = diffusers.DDPMScheduler(**config(SD, kind), clip_sample=False, steps_offset=int(num_steps < 1000))
    theirs.set_timesteps(num_steps)
    drawn = np.array(jax.vmap(lambda i: sampling.step_noise(KEYS, i, NOISE.shape[1:]))(jnp.arange(num_steps)))
    left = iter(torch.tensor(drawn))
    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *args, **kwargs: next(left))
    x = torch.tensor(NOISE)
    for tau in theirs.timesteps:
        x = theirs.step(network(x, tau), tau, x).prev_sample
    sampler = Sampler("ddim", eta=1.0)
    grid = sampler.grid(schedule, ALIGNED, settings, num_steps)
    ours = sampler.sample(schedule, ALIGNED, network, jnp.asarray(NOISE), grid, set_alpha_to_one=False, keys_B=KEYS)
    assert_close(np.asarray(ours), x.numpy(), tolerance=1e-3 if num_steps == 1000 else 1e-4)  # float32 adds up


@pytest.mark.parametrize("base", [SD, ZERO_SNR], ids=["sd", "zero-snr"])
def test_the_published_sampler_begins_at_zero(base: dict) -> None:
    schedule = NoiseSchedule.from_config(config(base, "v_prediction"))
    how, sampler = Alignment(convention="reference"), Sampler("euler", begin="zero")
    field = alignment.velocity_field(schedule, network, how)
    x = jnp.asarray(NOISE)
    for i in range(5):
        x += field(x, jnp.float32(i / 5)) / 5
    grid = sampler.grid(schedule, how, {}, 5)
    ours = sampler.sample(schedule, how, network, jnp.asarray(NOISE), grid, set_alpha_to_one=True, keys_B=KEYS)
    assert_close(np.asarray(ours), np.asarray(x))
    assert grid[0] == 0 and sampler.compiled_for == Sampler("euler")


@pytest.mark.parametrize("name", get_args(SamplerName))
def test_samplers_walk_the_grid_that_they_are_asked_for(name: SamplerName) -> None:
    schedule = NoiseSchedule.from_config(config(SD, "epsilon"))
    shift = 1.0 if name in ("ddim", *adaptive.SOLVERS) else 3.0
    ours = Sampler(name, shift=shift).grid(schedule, ALIGNED, {"timestep_spacing": "trailing"}, 6)
    flow_grid = sampling.flow_grid(schedule, 6, shift=shift)
    match name:
        case "ddim":
            expected = sampling.ddim_timesteps(1000, 6, "trailing")
            quad = Sampler(name, spacing="quad").grid(schedule, ALIGNED, {"timestep_spacing": "trailing"}, 6)
            np.testing.assert_array_equal(quad[:6], sampling.ddim_timesteps(1000, 6, "quad"))
        case "ddim_on_flow_grid":
            expected = alignment.diffusion_timestep(schedule, flow_grid[:-1])
        case "sde_euler" | "sde_heun":
            expected = sde.grid(SDE(), float(flow_grid[0]), 6, shift)
        case "dopri5" | "dopri8" | "bosh3" | "adaptive_heun":
            expected = flow_grid[[0, -1]]
        case _:
            expected = flow_grid
    np.testing.assert_array_equal(ours[: len(expected)], expected)
    assert len(np.unique(ours[len(expected) :])) <= 1  # padding, of which no step is made


@pytest.mark.parametrize("name", ["ddim", "ddim_on_flow_grid"])
@pytest.mark.parametrize("missing", ["timestep", "state", "velocity"])
def test_ddim_is_refused_to_a_flow_that_is_not_aligned(name: SamplerName, missing: str) -> None:
    schedule, how = NoiseSchedule.from_config(config(SD, "epsilon")), Alignment(**{missing: False})
    with pytest.raises(
        InputError, match=f"sampler='{name}' is of diffusion models and of flows aligned with them, and"
    ):
        Sampler(name).grid(schedule, how, {}, 4)
    with pytest.raises(InputError, match=f"sampler='{name}' starts at noise, this model's flow at the picture"):
        Sampler(name).grid(schedule, ALIGNED, {}, 4, at_noise=False)
    Sampler(name).check(ALIGNED)
    Sampler("heun").check(how, at_noise=False)


@pytest.mark.parametrize("name", ["sde_euler", "sde_heun"])
def test_random_samplers_are_refused_to_a_flow_from_pictures(name: SamplerName) -> None:
    """Their score is that of Gaussian noise at t = 0."""
    with pytest.raises(InputError, match=f"sampler='{name}' starts at noise, this model's flow at the picture"):
        Sampler(name).check(ALIGNED, at_noise=False)
    Sampler(name).check(Alignment(state=False))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"begin": "one"}, "begin='one' is not one of last_timestep, zero"),
        ({"begin": "zero", "name": "ddim"}, "begin='zero' is of steps in flow time, not of sampler='ddim'"),
        ({"begin": "zero", "name": "ddim_on_flow_grid"}, "not of sampler='ddim_on_flow_grid'"),
        ({"spacing": "quad", "name": "euler"}, "spacing='quad' is ddim's, not of sampler='euler'"),
        ({"eta": 1.0}, "eta=1.0 is DDIM's"),
        ({"shift": 2.0, "name": "ddim"}, "shift=2.0 is of flow time"),
        ({"temperature": 0.5, "name": "ddim"}, "temperature=0.5, noise_dropout=0.0 are of the noise that DDIM draws"),
        ({"noise_dropout": 0.5, "name": "euler"}, "with eta above 0; set eta, or leave them at 1 and 0"),
        ({"temperature": -1.0, "name": "ddim", "eta": 1.0}, "temperature=-1.0: give 0 or more"),
        ({"noise_dropout": 1.0, "name": "ddim", "eta": 1.0}, "noise_dropout=1.0: give a share from 0 to less than 1"),
    ],
)
def test_options_of_other_samplers_are_refused(options: dict, said: str) -> None:
    with pytest.raises(InputError, match=said):
        Sampler(**options)


def test_random_samplers_have_no_way_back() -> None:
    schedule = NoiseSchedule.from_config(config(SD, "epsilon"))
    for sampler, said in ((Sampler("sde_heun"), "'sde_heun' is random"), (Sampler("ddim", eta=0.5), "eta=0.5 is rand")):
        with pytest.raises(InputError, match=said):
            sampler.invert(schedule, ALIGNED, network, NOISE, np.array([0.1, 1.0]), set_alpha_to_one=True)


def test_guidance_is_rescaled_as_in_diffusers() -> None:
    without, with_text = np.random.default_rng(0).normal(size=(2, *NOISE.shape)).astype(np.float32)
    for rescale in (0.0, 0.7, 1.0):
        plain = torch.tensor(without + 7.5 * (with_text - without))
        theirs = rescale_noise_cfg(plain, torch.tensor(with_text), guidance_rescale=rescale)
        ours = sampling.guided(jnp.asarray(without), jnp.asarray(with_text), 7.5, rescale)
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
