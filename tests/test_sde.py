"""Random samplers reach the distribution that the flow reaches, whatever noise they add on the way."""

import dataclasses
import functools
import itertools
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from schedules import SD, config

from d2f_jax import InputError, NoiseSchedule, sampling, sde
from d2f_jax.alignment import Alignment
from d2f_jax.flow import LINEAR, Path, PathName
from d2f_jax.sampler import Sampler
from d2f_jax.sde import SDE

KEY = jax.random.key(0)
STD = 0.5  # of Gaussian data, whose velocity and score are known
PATHS = [LINEAR, Path("gvp"), Path(sigma_min=0.3)]
each_path = pytest.mark.parametrize("path", PATHS, ids=["linear", "gvp", "sigma_min"])


def variance(t, path: Path = LINEAR):
    alpha, sigma = path.at(jnp.float32(t))[:2]
    return (alpha * STD) ** 2 + sigma**2 + path.sigma_min**2


def velocity(x: jax.Array, t: jax.Array, path: Path = LINEAR) -> jax.Array:
    alpha, sigma, d_alpha, d_sigma = path.at(t)
    return x * (alpha * d_alpha * STD**2 + sigma * d_sigma) / variance(t, path)


def drawn(
    how: SDE, num_steps: int, solver: str, first: float = 0.05, count: int = 1 << 16, path: Path = LINEAR
) -> np.ndarray:
    keys = jax.random.split(jax.random.key(0), 8)
    noise = jax.vmap(lambda key: jax.random.normal(key, (count // 8,)))(jax.random.split(jax.random.key(1), 8))
    grid = sampling.pad_grid(sde.grid(how, first, num_steps), num_steps + 9)
    x = jnp.sqrt(variance(first, path)) * noise
    field = functools.partial(velocity, path=path)
    return np.asarray(jax.jit(lambda x, grid: sde.solve(how, field, x, grid, keys, solver, path))(x, grid))


@each_path
def test_the_score_is_the_gradient_of_the_log_density(path: Path) -> None:
    x = jnp.linspace(-2, 2, 9)
    for t in (0.0, 0.1, 0.5, 0.9):
        truth = jax.vmap(jax.grad(lambda x, t=t: -(x**2) / (2 * variance(t, path))))(x)
        score = sde.score(velocity(x, jnp.float32(t), path), x, t, path)
        np.testing.assert_allclose(score, truth, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("path", ["linear", "gvp"])
@pytest.mark.parametrize("form", get_args(sde.Form))
def test_the_forms_are_the_published_ones(form: sde.Form, path: PathName) -> None:
    """Any weight would give the right marginals, so the formulas of SiT, which the paper's code has too, stand here."""
    t, norm = np.linspace(0.05, 1, 20), 0.7
    turn, sigma = np.pi / 2 * t, 1 - t
    ratio, fall = 1 / t, -1.0  # alpha'/alpha and sigma'
    if path == "gvp":
        sigma, ratio, fall = np.cos(turn), np.pi / 2 / np.tan(turn), -np.pi / 2 * np.sin(turn)
    published = {
        "constant": np.full(20, norm),
        "SBDM": norm * (ratio * sigma**2 - sigma * fall),
        "sigma": norm * sigma,
        "linear": norm * (1 - t),
        "decreasing": 0.25 * (norm * np.cos(np.pi * t) + 1) ** 2,
        "increasing-decreasing": norm * np.sin(np.pi * t) ** 2,
    }[form]
    weight = sde.diffusion_weight(SDE(form, norm=norm), jnp.asarray(t, jnp.float32), Path(path))
    np.testing.assert_allclose(weight, published, rtol=1e-4, atol=1e-6)


@each_path
def test_the_flow_reaches_the_data(path: Path) -> None:
    x = jnp.linspace(-2, 2, 9)
    end = sampling.solve(functools.partial(velocity, path=path), x, np.linspace(0, 1, 65), "rk4")
    np.testing.assert_allclose(end, x * jnp.sqrt(variance(1, path) / variance(0, path)), rtol=1e-4)


def test_a_sampler_begins_at_noise_without_the_path_s_width() -> None:
    """So what it reaches is narrower than the path's end by what it began below the path's start."""
    schedule, path, sampler = NoiseSchedule.from_config(config(SD, "epsilon")), Path(sigma_min=0.3), Sampler("rk4")
    naive = Alignment(timestep=False, state=False, velocity=False, raw_time=True, sigma_min=0.3)
    field, x = functools.partial(velocity, path=path), jnp.linspace(-2, 2, 8)[:, None]
    grid, keys = sampler.grid(schedule, naive, {}, 64), jax.random.split(KEY, 8)
    ends = sampler.sample(schedule, naive, field, x, grid, set_alpha_to_one=True, keys_B=keys)
    np.testing.assert_allclose(ends, x * jnp.sqrt(variance(1, path) / (1 + 0.3**2)), rtol=1e-4)


@each_path
@pytest.mark.parametrize("form", get_args(sde.Form))
@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_every_form_reaches_the_data(form: sde.Form, solver: str, path: Path) -> None:
    # Tilted forms are steep near t = 0; all converge to data of the same spread.
    samples = drawn(SDE(form, norm=0.5, last_step_size=0.01), 250, solver, path=path)
    assert samples.std() == pytest.approx(np.sqrt(variance(1, path)), rel=0.02)
    assert abs(samples.mean()) < 0.01
    kurtosis = (samples**4).mean() / samples.var() ** 2
    assert kurtosis == pytest.approx(3, rel=0.02)


@pytest.mark.parametrize("last_step", get_args(sde.LastStep))
def test_last_steps(last_step: sde.LastStep) -> None:
    samples = drawn(SDE("sigma", last_step=last_step), 100, "euler")
    assert samples.std() == pytest.approx(STD, rel=0.03)


def drift(how: SDE, x: jax.Array, t: float) -> jax.Array:
    u = velocity(x, jnp.float32(t))
    return u + sde.diffusion_weight(how, t) * sde.score(u, x, t)


@pytest.mark.parametrize("solver", ["euler", "heun"])
@pytest.mark.parametrize("last_step", get_args(sde.LastStep))
def test_steps_are_the_published_ones(solver: str, last_step: sde.LastStep) -> None:
    """Two of them: one with noise, and the last, which has its own rule and is never Heun's."""
    how, keys = SDE("sigma", norm=2.0, last_step=last_step), jax.random.split(jax.random.key(0), 8)
    x = begun = jnp.linspace(-2, 2, 8)[:, None]
    times, h, end = [0.3, 0.6, 1.0], 0.3, 0.4
    noise = [jnp.sqrt(2 * 2.0 * (1 - times[i])) * sampling.step_noise(keys, i, (1,)) for i in range(2)]
    if solver == "euler":
        x = x + h * drift(how, x, 0.3) + jnp.sqrt(h) * noise[0]
    else:
        x = x + jnp.sqrt(h) * noise[0]
        first = drift(how, x, 0.3)
        x = x + h / 2 * (first + drift(how, x + h * first, 0.6))
    match last_step:
        case "mean":
            x = x + end * drift(how, x, 0.6)
        case "euler":
            x = x + end * velocity(x, jnp.float32(0.6))
        case "none":
            noisy = x + jnp.sqrt(end) * noise[1]
            x = noisy + end * drift(how, x if solver == "euler" else noisy, 0.6)
    ours = sde.solve(how, velocity, begun, jnp.array(times), keys, solver)
    np.testing.assert_allclose(ours, x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_random_solvers_are_of_first_weak_order(solver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """SiT's Heun adds its noise before the step, not along it, and gains no order by its second stage.

    The velocity is linear, so what one unit of each noise becomes tells the variance of what is reached, exactly.
    """
    errors, steps = [], np.array([64, 96, 128, 192])
    for n in steps:
        monkeypatch.setattr(sde, "step_noise", lambda keys, i, _: 1.0 * (jnp.arange(len(keys)) == i)[:, None])
        x = jnp.zeros((n + 1, 1)).at[n].set(jnp.sqrt(variance(0.05)))
        grid = jnp.linspace(0.05, 0.8, n + 1)  # not up to data, where the score is steep
        ends = sde.solve(SDE("sigma", last_step="none"), velocity, x, grid, jax.random.split(KEY, n + 1), solver)
        errors.append(abs(float(jnp.sum(ends**2)) - variance(0.8)))
    assert -np.polyfit(np.log(steps), np.log(errors), 1)[0] == pytest.approx(1, abs=0.15)


def test_without_noise_it_is_the_flow() -> None:
    x = jnp.linspace(-2, 2, 8)[:, None]
    how = SDE("constant", norm=0.0)
    grid, keys = sde.grid(how, 0.1, 12), jax.random.split(jax.random.key(0), 8)
    for solver in ("euler", "heun"):
        ours = sde.solve(how, velocity, x, grid, keys, solver)
        plain = sampling.solve(velocity, x, grid[:-1], solver)
        last = sampling.solve(velocity, plain, grid[-2:], "euler")
        np.testing.assert_allclose(ours, last, rtol=1e-5)


@pytest.mark.parametrize("name", ["sde_euler", "sde_heun"])
def test_samplers_follow_the_path_of_the_flow(name: str) -> None:
    schedule, sampler = NoiseSchedule.from_config(config(SD, "epsilon")), Sampler(name)
    naive = Alignment(timestep=False, state=False, velocity=False, raw_time=True)
    x, keys = jnp.linspace(-2, 2, 8)[:, None], jax.random.split(jax.random.key(0), 8)
    ends = []
    for path in PATHS:
        field, how = (
            functools.partial(velocity, path=path),
            dataclasses.replace(naive, path=path.name, sigma_min=path.sigma_min),
        )
        grid = sampler.grid(schedule, how, {}, 12)
        ends.append(sampler.sample(schedule, how, field, x, grid, set_alpha_to_one=True, keys_B=keys))
        direct = sde.solve(SDE(), field, x, grid, keys, name.removeprefix("sde_"), path)
        np.testing.assert_array_equal(ends[-1], direct)
    assert all(np.abs(a - b).max() > 0.01 for a, b in itertools.combinations(ends, 2))


def test_padding_and_other_rows_change_nothing() -> None:
    x, keys = jnp.linspace(-2, 2, 8)[:, None], jax.random.split(jax.random.key(0), 8)
    grid = sde.grid(SDE(), 0.0, 9)
    whole = sde.solve(SDE(), velocity, x, grid, keys)
    np.testing.assert_array_equal(sde.solve(SDE(), velocity, x, sampling.pad_grid(grid, 40), keys), whole)
    np.testing.assert_allclose(sde.solve(SDE(), velocity, x[3:5], grid, keys[3:5]), whole[3:5], rtol=1e-6)


def test_refusals() -> None:
    with pytest.raises(InputError, match=r"SBDM is infinite at t = 0, .* use sigma, or begin=last_timestep with an"):
        sde.grid(SDE("SBDM"), 0.0, 10)
    with pytest.raises(InputError, match="give 2 steps or more"):
        sde.grid(SDE(), 0.0, 1)
    with pytest.raises(InputError, match=r"a size between 0 and 0\.9"):
        sde.grid(SDE(last_step_size=0.95), 0.1, 10)
