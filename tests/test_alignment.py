"""The alignment's laws: exactness on an analytic case, round trips, finite gradients, the published code's numbers."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from schedules import SD, ZERO_SNR, config

from d2f_jax import InputError, NoiseSchedule, alignment

CASES = [(SD, "epsilon"), (SD, "v_prediction"), (SD, "sample"), (ZERO_SNR, "v_prediction"), (ZERO_SNR, "sample")]
IDS = [f"{'zero-snr' if base is ZERO_SNR else 'sd'}-{kind}" for base, kind in CASES]


@pytest.fixture(params=CASES, ids=IDS)
def schedule(request: pytest.FixtureRequest) -> NoiseSchedule:
    return NoiseSchedule.from_config(config(*request.param))


# Gaussian data of a mean and a deviation for each of eight coordinates: its ideal denoiser is linear.
MEAN, DEVIATION = np.linspace(-1, 1, 8), np.linspace(0.2, 0.9, 8)


def ideal(x: np.ndarray, alpha: np.ndarray, sigma: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Expected data and noise [B, 8] given `x = alpha data + sigma noise`, in float64."""
    excess = (x - alpha * MEAN) / (alpha**2 * DEVIATION**2 + sigma**2)
    return MEAN + alpha * DEVIATION**2 * excess, sigma * excess


def test_velocity_of_the_ideal_denoiser_is_the_flow_of_gaussian_data(schedule: NoiseSchedule) -> None:
    tau = np.arange(schedule.num_train_timesteps)
    power = np.asarray(schedule.alphas_cumprod, np.float64)[:, None]
    alpha, sigma = np.sqrt(power), np.sqrt(1 - power)
    exact_t = alpha / (alpha + sigma)
    t = alignment.flow_time(schedule, tau)
    noise, data = np.random.default_rng(0).normal(size=(2, len(tau), 8))
    fm_x = jnp.asarray(exact_t * (MEAN + DEVIATION * data) + (1 - exact_t) * noise, jnp.float32)

    # The network: ideal at the state and the timestep that it is handed.
    np.testing.assert_allclose(alignment.diffusion_timestep(schedule, t), tau, atol=2e-3)
    dm_x = np.asarray(alignment.to_diffusion(schedule, fm_x, t), np.float64)
    z, eps = ideal(dm_x, alpha, sigma)
    prediction = {"epsilon": eps, "v_prediction": alpha * eps - sigma * z, "sample": z}[schedule.prediction_type]
    velocity = alignment.velocity(schedule, jnp.asarray(prediction, jnp.float32), fm_x, t)

    z, eps = ideal(np.asarray(fm_x, np.float64), exact_t, 1 - exact_t)
    error = np.linalg.norm(velocity - (z - eps), axis=1) / np.linalg.norm(z - eps, axis=1)
    assert error.max() < 1e-5


@pytest.mark.parametrize(("t", "percent"), [(0.7, 0.8), (0.9, 3.5), (0.98, 8)])
def test_the_reference_convention_is_not_exact(t: float, percent: float) -> None:
    # Why there are two: with an ideal denoiser of data of deviation 0.5 the published code is off by so much.
    schedule = NoiseSchedule.from_config(config(SD, "epsilon"))
    x = jnp.linspace(-2, 2, 9)[None]
    off = {}
    for convention in ("exact", "reference"):
        dm_x = alignment.to_diffusion(schedule, x, t, convention=convention)
        tau = alignment.diffusion_timestep(schedule, t, convention=convention)
        # What the network takes `tau` for; above the first timestep's flow time it sees the state of `t` itself.
        seen = t if convention == "exact" else float(alignment.flow_time(schedule, tau))
        s = 1 / np.hypot(seen, 1 - seen)
        eps = (1 - seen) * s / ((seen * s) ** 2 / 4 + ((1 - seen) * s) ** 2) * dm_x
        velocity = alignment.velocity(schedule, eps, x, t, convention=convention)
        truth = (t / 4 - (1 - t)) / (t**2 / 4 + (1 - t) ** 2) * x
        off[convention] = float(jnp.linalg.norm(velocity - truth) / jnp.linalg.norm(truth))
    assert off["exact"] < 1e-5
    assert 100 * off["reference"] == pytest.approx(percent, rel=0.15)


@pytest.fixture(scope="module")
def published() -> dict[str, np.ndarray]:
    return dict(np.load(Path(__file__).parent / "data" / "reference_alignment.npz"))


@pytest.mark.parametrize(
    ("name", "kind", "zero_snr"), [("sd_eps", "epsilon", 0), ("sd_v", "v_prediction", 0), ("zsnr_v", "v_prediction", 1)]
)
def test_reference_reproduces_the_published_code(
    published: dict[str, np.ndarray], name: str, kind: str, zero_snr: int
) -> None:
    schedule = NoiseSchedule.from_config(config(ZERO_SNR if zero_snr else SD, kind))
    table = published["zsnr_alphas_cumprod" if zero_snr else "sd_alphas_cumprod"]
    np.testing.assert_allclose(schedule.alphas_cumprod, table, rtol=2e-5, atol=1e-7)
    # On its own table: a thousand float32 products round differently.
    schedule = NoiseSchedule(jnp.asarray(table), kind)  # pyright: ignore[reportArgumentType]
    t, x = jnp.asarray(published["t_fm"]), jnp.asarray(published["x_fm"])
    tau = alignment.diffusion_timestep(schedule, t, convention="reference")
    # Near t = 1 the table's neighbours differ by 0.03, so that a rounding of t moves the timestep by 4e-6 of a step.
    np.testing.assert_allclose(tau, published[f"{name}_dm_t"], atol=3e-3)
    dm_x = alignment.to_diffusion(schedule, x, t, convention="reference")
    np.testing.assert_allclose(dm_x, published[f"{name}_dm_x"], atol=4e-6)
    velocity = alignment.velocity(schedule, jnp.asarray(published["prediction"]), x, t, convention="reference")
    scale = np.abs(published[f"{name}_velocity"]).max(axis=(1, 2, 3), keepdims=True)
    assert (np.abs(velocity - published[f"{name}_velocity"]) / scale).max() < 5e-6


@pytest.mark.parametrize("convention", ["exact", "reference"])
def test_timestep_round_trip(schedule: NoiseSchedule, convention: alignment.Convention) -> None:
    tau = np.random.default_rng(1).uniform(0, schedule.num_train_timesteps - 1, 500).astype(np.float32)
    t = alignment.flow_time(schedule, tau, convention=convention)
    back = alignment.diffusion_timestep(schedule, t, convention=convention)
    np.testing.assert_allclose(back, tau, atol=4e-3)
    assert np.all(np.diff(t[np.argsort(tau)]) <= 0)


def test_flow_time_round_trip_and_its_ends(schedule: NoiseSchedule) -> None:
    last, first = (float(alignment.flow_time(schedule, i)) for i in (schedule.num_train_timesteps - 1, 0))
    t = np.linspace(last, first, 777, dtype=np.float32)
    tau = alignment.diffusion_timestep(schedule, t)
    np.testing.assert_allclose(alignment.flow_time(schedule, tau), t, atol=2e-6)
    assert alignment.diffusion_timestep(schedule, 0.0) == schedule.num_train_timesteps - 1
    assert alignment.diffusion_timestep(schedule, 1.0) == 0


@pytest.mark.parametrize("convention", ["exact", "reference"])
def test_state_round_trip(schedule: NoiseSchedule, convention: alignment.Convention) -> None:
    # Between timesteps the reference reads its scale from a table, the exact one takes it from t.
    tau = np.random.default_rng(2).uniform(1, schedule.num_train_timesteps - 2, 64).astype(np.float32)
    x = jax.random.normal(jax.random.key(0), (64, 2, 3, 4))
    t = alignment.flow_time(schedule, tau, convention=convention)
    there = alignment.to_flow(schedule, x, tau, convention=convention)
    np.testing.assert_allclose(alignment.to_diffusion(schedule, there, t, convention=convention), x, atol=1e-5)


def test_the_flow_state_is_the_interpolation(schedule: NoiseSchedule) -> None:
    tau = np.arange(0, schedule.num_train_timesteps, 37)
    power = np.asarray(schedule.alphas_cumprod)[tau][:, None]
    data, noise = np.random.default_rng(3).normal(size=(2, len(tau), 5)).astype(np.float32)
    t = np.asarray(alignment.flow_time(schedule, tau))[:, None]
    x_tau = jnp.asarray(np.sqrt(power) * data + np.sqrt(1 - power) * noise)
    np.testing.assert_allclose(alignment.to_flow(schedule, x_tau, tau), t * data + (1 - t) * noise, atol=2e-6)


@pytest.mark.parametrize("convention", ["exact", "reference"])
def test_everything_is_finite_on_the_closed_interval(schedule: NoiseSchedule, convention: alignment.Convention) -> None:
    grid = np.asarray(alignment.flow_time(schedule, np.arange(schedule.num_train_timesteps)))
    t = jnp.asarray(np.unique(np.concatenate([[0, 1e-7, 1 - 1e-7, 1], np.linspace(0, 1, 101), grid])), jnp.float32)
    x, prediction = jax.random.normal(jax.random.key(1), (2, len(t), 3))
    # The published code knows no such model.
    has_velocity = not (schedule.prediction_type == "sample" and convention == "reference")

    def everything(x: jax.Array, prediction: jax.Array, t: jax.Array) -> jax.Array:
        dm_x = alignment.to_diffusion(schedule, x, t, convention=convention)
        tau = alignment.diffusion_timestep(schedule, t, convention=convention)
        velocity = alignment.velocity(schedule, prediction, x, t, convention=convention) if has_velocity else prediction
        return jnp.stack([jnp.sum(dm_x**2), jnp.sum(velocity**2), jnp.sum(tau)])

    assert np.isfinite(everything(x, prediction, t)).all()
    for gradient in jax.jit(jax.jacrev(everything, argnums=(0, 1, 2)))(x, prediction, t):
        assert np.isfinite(gradient).all()


def test_jit_vmap_and_half_precision_change_nothing(schedule: NoiseSchedule) -> None:
    t = jnp.linspace(0, 1, 16)
    x, prediction = jax.random.normal(jax.random.key(2), (2, 16, 2, 2, 3)).astype(jnp.bfloat16)
    batched = alignment.velocity(schedule, prediction, x, t)
    assert batched.dtype == jnp.float32
    single = jax.jit(jax.vmap(alignment.velocity, in_axes=(None, 0, 0, 0)))(schedule, prediction, x, t)
    np.testing.assert_allclose(single, batched, rtol=2e-6, atol=1e-6)
    wide = alignment.velocity(schedule, prediction.astype(jnp.float32), x.astype(jnp.float32), t)
    np.testing.assert_array_equal(batched, wide)


def test_reference_has_no_sample_prediction() -> None:
    schedule = NoiseSchedule.from_config(config(SD, "sample"))
    with pytest.raises(InputError, match="epsilon and v_prediction only"):
        alignment.velocity(schedule, jnp.ones(3), jnp.ones(3), 0.5, convention="reference")
