"""The objective: zero for a network that knows, the plain flow-matching error for one that doesn't; and flow times."""

import dataclasses
from typing import Any, get_args

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from diffusers.training_utils import compute_snr
from schedules import SD, ZERO_SNR, config

from configs import quickstart
from d2f_jax import InputError, NoiseSchedule, alignment, flow, objectives, settings
from d2f_jax.alignment import Alignment
from d2f_jax.objectives import Objective

KINDS = ["epsilon", "v_prediction", "sample"]
NAIVE = Alignment(timestep=False, state=False, velocity=False)
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
    assert objectives.loss(Objective(), schedule, oracle(schedule), X_1, X_0, t_B).max() < 1e-6


def test_noise_that_is_known_has_a_loss_only_before_the_last_timestep() -> None:
    """The reason to train from there on."""
    schedule = NoiseSchedule.from_config(config(SD, "epsilon"))
    late = Objective(times=flow.TimeDistribution(begin="last_timestep"))
    first = objectives.first_time(late, schedule)
    assert objectives.first_time(Objective(), schedule) == 0 < first < 0.1
    t_B = flow.sample_times(jax.random.key(1), (len(X_1),), late.times, first)
    assert (t_B >= first).all() and (t_B < 1).all()
    assert objectives.loss(late, schedule, oracle(schedule), X_1, X_0, jnp.minimum(t_B, 0.99)).max() < 1e-6
    early = jnp.linspace(0, first / 2, len(X_1))
    assert objectives.loss(Objective(), schedule, oracle(schedule), X_1, X_0, early).min() > 0.2


@pytest.mark.parametrize(
    "changes", [{"name": "diffusion"}, {"name": "flow_matching"}, {"alignment": Alignment(velocity=False)}]
)
def test_only_what_is_aligned_begins_at_the_last_timestep(changes: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"are of diff2flow, all aligned; set config\.objective\.begin"):
        Objective(times=flow.TimeDistribution(begin="last_timestep"), **changes)


@pytest.mark.parametrize("kind", KINDS)
def test_the_network_sees_its_own_coordinates(kind: str) -> None:
    schedule = NoiseSchedule.from_config(config(SD, kind))
    tau_B = jnp.arange(32.0) * 31
    seen = {}

    def predict(dm_x: jax.Array, tau_B: jax.Array) -> jax.Array:
        seen.update(x=dm_x, tau=tau_B)
        return dm_x

    objectives.loss(Objective(), schedule, predict, X_1, X_0, alignment.flow_time(schedule, tau_B))
    power = schedule.alphas_cumprod[tau_B.astype(int)][:, None, None, None]
    np.testing.assert_allclose(seen["tau"], tau_B, atol=2e-3)
    np.testing.assert_allclose(seen["x"], jnp.sqrt(power) * X_1 + jnp.sqrt(1 - power) * X_0, atol=5e-6)


def test_the_loss_is_the_error_of_the_velocity() -> None:
    # An epsilon network whose noise is off by d has a velocity off by d/t.
    schedule = NoiseSchedule.from_config(config(SD, "epsilon"))
    t_B = jnp.linspace(0.1, 0.95, 32)
    loss_B = objectives.loss(Objective(), schedule, lambda dm_x, tau_B: X_0 + 0.3, X_1, X_0, t_B)
    np.testing.assert_allclose(loss_B, (0.3 / t_B) ** 2, rtol=1e-3)


@pytest.mark.parametrize("path", [flow.LINEAR, flow.Path("gvp")], ids=lambda path: path.name)
def test_a_path_has_the_velocity_as_derivative(path: flow.Path) -> None:
    t_B = jnp.linspace(0, 1, 32)
    x_t, rate = jax.jvp(lambda t_B: flow.interpolate(X_1, X_0, t_B, path), (t_B,), (jnp.ones(32),))
    np.testing.assert_allclose(rate, flow.velocity_target(X_1, X_0, t_B, path), atol=1e-6)
    np.testing.assert_allclose(x_t[0], X_0[0], atol=1e-6)
    np.testing.assert_allclose(x_t[-1], X_1[-1], atol=1e-6)


def test_the_linear_path_is_straight() -> None:
    t = jnp.float32(0.3)
    np.testing.assert_array_equal(flow.interpolate(X_1, X_0, t), t * X_1 + (1 - t) * X_0)
    np.testing.assert_array_equal(flow.velocity_target(X_1, X_0, t), X_1 - X_0)


def test_the_gvp_path_keeps_the_variance_of_data_and_noise() -> None:
    point = flow.Path("gvp").at(jnp.linspace(0, 1, 32))
    np.testing.assert_allclose(point.alpha**2 + point.sigma**2, np.ones(32), rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_network_that_knows_has_no_diffusion_loss(kind: str) -> None:
    schedule = NoiseSchedule.from_config(config(SD, kind))
    objective = Objective("diffusion")
    t_B = jnp.linspace(0, 1, 32)
    assert objectives.loss(objective, schedule, oracle(schedule), X_1, X_0, t_B).max() < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_the_diffusion_loss_is_that_of_diffusers(kind: str) -> None:
    schedule, scheduler = NoiseSchedule.from_config(config(SD, kind)), diffusers.DDPMScheduler(**config(SD, kind))
    tau_B = np.arange(32) * 32
    data, noise, tau = torch.tensor(np.asarray(X_1)), torch.tensor(np.asarray(X_0)), torch.tensor(tau_B)
    noisy = scheduler.add_noise(data, noise, tau)
    velocity = scheduler.get_velocity(data, noise, tau)
    target = {"epsilon": noise, "v_prediction": velocity, "sample": data}[kind]
    theirs = ((torch.sin(noisy + tau[:, None, None, None] / 100) - target) ** 2).mean((1, 2, 3))

    def predict(dm_x: jax.Array, tau_B: jax.Array) -> jax.Array:
        return jnp.sin(dm_x + tau_B[:, None, None, None] / 100)

    ours = objectives.diffusion(schedule, predict, X_1, X_0, jnp.asarray(tau_B))
    np.testing.assert_allclose(ours, theirs, rtol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_min_snr_weights_are_those_of_diffusers_training(kind: str) -> None:
    schedule, scheduler = NoiseSchedule.from_config(config(SD, kind)), diffusers.DDPMScheduler(**config(SD, kind))
    tau_B = np.arange(32) * 32
    snr = compute_snr(scheduler, torch.tensor(tau_B)).numpy()
    weight = np.minimum(snr, 5) / {"epsilon": snr, "v_prediction": snr + 1, "sample": 1}[kind]
    plain, weighted = (
        objectives.diffusion(schedule, lambda x, tau: jnp.zeros_like(x), X_1, X_0, jnp.asarray(tau_B), gamma)
        for gamma in (0.0, 5.0)
    )
    np.testing.assert_allclose(weighted, plain * weight, rtol=1e-4)


@pytest.mark.parametrize("name", get_args(objectives.Name))
def test_the_first_norm_is_the_mean_of_sizes(name: objectives.Name) -> None:
    schedule, t_B = NoiseSchedule.from_config(config(SD, "epsilon")), jnp.linspace(0.1, 0.9, 32)
    off = jnp.where(jnp.arange(2) == 0, 1.0, -3.0)  # of the two channels: 2 in the mean of sizes, 5 of squares

    def loss(norm: objectives.Norm, valid: jax.Array | None) -> jax.Array:
        objective = Objective(name, Alignment() if name == "diff2flow" else NAIVE, norm=norm)
        answer = {"diffusion": X_0, "diff2flow": X_0, "flow_matching": X_1 - X_0}[name] + off
        return objectives.loss(objective, schedule, lambda x, tau: answer, X_1, X_0, t_B, valid)

    gain = 1 / t_B if name == "diff2flow" else 1.0  # what an error of epsilon is in the velocity
    for valid in (None, jnp.ones((32, 4, 4, 1)).at[:, 1:].set(0)):
        np.testing.assert_allclose(loss("l1", valid), jnp.full(32, 2.0) * gain, rtol=1e-3)
        np.testing.assert_allclose(loss("l2", valid), jnp.full(32, 5.0) * gain**2, rtol=1e-3)


def test_refusals() -> None:
    with pytest.raises(InputError, match="norm='l3' is not one of l2, l1"):
        Objective(norm="l3")  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match="min_snr_gamma=5 weighs squared errors"):
        Objective("diffusion", min_snr_gamma=5, norm="l1")


def test_the_objective_is_weighted_as_it_says() -> None:
    schedule, t_B = NoiseSchedule.from_config(config(SD, "v_prediction")), jnp.linspace(0.01, 0.99, 32)
    plain, weighted = (
        objectives.loss(Objective("diffusion", min_snr_gamma=gamma), schedule, lambda x, tau: x, X_1, X_0, t_B)
        for gamma in (0.0, 5.0)
    )
    power = schedule.alphas_cumprod[objectives.discrete_timestep(schedule, t_B)]
    snr = power / (1 - power)
    np.testing.assert_allclose(weighted / plain, jnp.minimum(snr, 5) / (snr + 1), rtol=1e-4)


def test_the_published_objective_is_trained_in_its_own_coordinates() -> None:
    schedule, t_B = NoiseSchedule.from_config(config(SD, "epsilon")), jnp.linspace(0.02, 0.98, 32)
    x_t, seen = flow.interpolate(X_1, X_0, t_B), {}

    def predict(dm_x: jax.Array, tau_B: jax.Array) -> jax.Array:
        seen.update(x=dm_x, tau=tau_B)
        return 0.3 * dm_x

    losses = {}
    for convention in get_args(alignment.Convention):
        objective = Objective(alignment=Alignment(convention=convention))
        losses[convention] = objectives.loss(objective, schedule, predict, X_1, X_0, t_B)
        tau_B = alignment.diffusion_timestep(schedule, t_B, convention=convention)
        dm_x = alignment.to_diffusion(schedule, x_t, t_B, convention=convention)
        np.testing.assert_array_equal(seen["tau"], tau_B)
        np.testing.assert_array_equal(seen["x"], dm_x)
        velocity = alignment.velocity(schedule, 0.3 * dm_x, x_t, t_B, convention=convention)
        expected = jnp.mean((velocity - (X_1 - X_0)) ** 2, axis=(1, 2, 3))
        np.testing.assert_allclose(losses[convention], expected, rtol=1e-5)
    assert not np.allclose(losses["exact"], losses["reference"], rtol=1e-3)


def test_what_a_config_says_of_its_objective_is_trained() -> None:
    given = {"convention": "reference", "times": "logit_normal", "logit_mean": -0.5, "logit_std": 1.5, "shift": 3.0}
    settled = quickstart.get_config()
    settled.update_from_flattened_dict({f"objective.{key}": value for key, value in given.items()})
    made = settings.make_objective(settled)
    assert made == Objective(
        alignment=Alignment(convention="reference"), times=flow.TimeDistribution("logit_normal", -0.5, 1.5, 3.0)
    )
    changes = {"objective.name": "diffusion", "objective.min_snr_gamma": 5.0, "objective.convention": "exact"}
    settled.update_from_flattened_dict(changes)
    assert settings.make_objective(settled) == dataclasses.replace(
        made, name="diffusion", alignment=Alignment(), min_snr_gamma=5.0
    )


def test_min_snr_without_signal_is_finite() -> None:
    schedule = NoiseSchedule.from_config(config(ZERO_SNR, "v_prediction"))
    zeros = objectives.diffusion(schedule, lambda x, tau: x, X_1, X_0, jnp.full(32, 999), 5.0)
    np.testing.assert_array_equal(zeros, np.zeros(32))


@pytest.mark.parametrize(
    ("raw", "path"),
    [(True, flow.LINEAR), (False, flow.LINEAR), (True, flow.Path("gvp")), (True, flow.Path(sigma_min=0.1))],
)
def test_naive_flow_matching_knows_nothing_of_diffusion(raw: bool, path: flow.Path) -> None:
    schedule = NoiseSchedule.from_config(config(SD, "epsilon"))
    given = {"raw_time": raw, "path": path.name, "sigma_min": path.sigma_min}
    naive = Alignment(timestep=False, state=False, velocity=False, **given)
    t_B, path_noise = jnp.linspace(0, 1, 32), jax.random.normal(jax.random.key(1), X_0.shape)
    seen = {}

    def predict(x: jax.Array, tau_B: jax.Array) -> jax.Array:
        seen.update(x=x, tau=tau_B)
        return flow.velocity_target(X_1, X_0, t_B, path) + 0.5

    objective = Objective("flow_matching", naive)
    loss_B = objectives.loss(objective, schedule, predict, X_1, X_0, t_B, path_noise=path_noise)
    np.testing.assert_allclose(loss_B, np.full(32, 0.25), rtol=1e-5)
    np.testing.assert_allclose(
        seen["x"], flow.interpolate(X_1, X_0, t_B, path) + path.sigma_min * path_noise, atol=1e-6
    )
    np.testing.assert_allclose(seen["tau"], t_B if raw else 1000 * (1 - t_B), rtol=1e-6)


@pytest.mark.parametrize("part", ["timestep", "state", "velocity"])
def test_each_alignment_alone_changes_only_its_part(part: str) -> None:
    schedule = NoiseSchedule.from_config(config(SD, "v_prediction"))
    alone = Alignment(**{name: name == part for name in ("timestep", "state", "velocity")})
    t, seen = jnp.float32(0.7), {}

    def predict(x: jax.Array, tau: jax.Array) -> jax.Array:
        seen.update(x=x, tau=tau)
        return 0.3 * X_0

    out = alignment.velocity_field(schedule, predict, alone)(X_1, t)
    tau, x = alignment.diffusion_timestep(schedule, t), alignment.to_diffusion(schedule, X_1, t)
    np.testing.assert_array_equal(seen["tau"], tau if part == "timestep" else 1000 * (1 - t))
    np.testing.assert_array_equal(seen["x"], x if part == "state" else X_1)
    expected = alignment.velocity(schedule, 0.3 * X_0, X_1, t) if part == "velocity" else 0.3 * X_0
    np.testing.assert_array_equal(out, expected)


def test_only_what_is_valid_counts() -> None:
    schedule = NoiseSchedule.from_config(config(SD, "v_prediction"))
    t_B = jnp.linspace(0.1, 0.9, 32)
    half = jnp.concatenate([jnp.ones((32, 4, 2, 1)), jnp.zeros((32, 4, 2, 1))], axis=2).at[3].set(0)

    def loss(x_1: jax.Array, valid: jax.Array) -> jax.Array:
        return objectives.flow_matching(lambda x, t: jnp.zeros_like(x), x_1, X_0, t_B, valid)

    expected = jnp.mean((X_1 - X_0)[:, :, :2] ** 2, axis=(1, 2, 3)).at[3].set(0)
    np.testing.assert_allclose(loss(X_1, half), expected, rtol=1e-5)
    grad = jax.grad(lambda x_1: loss(x_1, half).sum())(X_1)
    assert np.isfinite(grad).all() and not grad[:, :, 2:].any() and not grad[3].any()
    for name in ("diff2flow", "diffusion"):
        predict = oracle(schedule)
        assert objectives.loss(Objective(name), schedule, predict, X_1, X_0, t_B, half).max() < 1e-5


def test_uniform_times_draw_every_timestep_alike() -> None:
    schedule = NoiseSchedule.from_config(config(SD, "epsilon"))
    t = (jnp.arange(1000) + 0.5) / 1000
    np.testing.assert_array_equal(objectives.discrete_timestep(schedule, t), np.arange(999, -1, -1))
    np.testing.assert_array_equal(objectives.discrete_timestep(schedule, jnp.array([0.0, 1.0])), [999, 0])


def test_flow_times_are_uniform() -> None:
    times = flow.sample_times(jax.random.key(1), (20_000,))
    assert scipy.stats.kstest(times, "uniform").pvalue > 1e-3


def test_flow_times_are_logit_normal() -> None:
    times = flow.sample_times(jax.random.key(1), (20_000,), flow.TimeDistribution("logit_normal", mean=-0.5, std=1.5))
    logits = scipy.special.logit(np.asarray(times, np.float64))
    assert scipy.stats.kstest(logits, scipy.stats.norm(-0.5, 1.5).cdf).pvalue > 1e-3


def test_a_shift_multiplies_the_odds_of_noise() -> None:
    plain = flow.sample_times(jax.random.key(1), (1000,))
    moved = flow.sample_times(jax.random.key(1), (1000,), flow.TimeDistribution(shift=3.0))
    np.testing.assert_allclose((1 - moved) / moved, 3 * (1 - plain) / plain, rtol=1e-3)
    np.testing.assert_array_equal(flow.shifted(plain, 1.0), plain)
    np.testing.assert_array_equal(flow.shifted(jnp.array([0.0, 1.0]), 3.0), [0, 1])
