"""Optimizers, their rate, and the weight average."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from d2f_jax import optim

OPTIONS = optim.OptimizerOptions(
    name="adamw",
    learning_rate=0.1,
    schedule="constant",
    warmup_steps=0,
    num_steps=10,
    final_rate=0.1,
    b1=0.9,
    b2=0.999,
    weight_decay=0.0,
    max_grad_norm=1e9,
    first_moment_dtype="float32",
)


def rates(steps: int, **changes: Any) -> list[float]:
    rate = optim.learning_rate(dataclasses.replace(OPTIONS, **changes))
    return [float(rate(n)) for n in range(steps)]


def trained(gradients: np.ndarray, start: np.ndarray, **changes: Any) -> np.ndarray:
    """A parameter after one step for each of the gradients."""
    optimizer = optim.make_optimizer(dataclasses.replace(OPTIONS, **changes))
    parameter = jnp.asarray(start)
    state = optimizer.init(parameter)
    for gradient in gradients:
        update, state = optimizer.update(jnp.asarray(gradient), state, parameter)
        parameter = optax.apply_updates(parameter, update)
    return np.asarray(parameter)


def test_warmup_is_linear_and_then_constant() -> None:
    np.testing.assert_allclose(rates(7, warmup_steps=4), [0, 0.025, 0.05, 0.075, 0.1, 0.1, 0.1], rtol=1e-6)


def test_cosine_falls_from_the_peak_to_the_final_rate() -> None:
    n = np.arange(9)
    falling = 0.1 * (0.1 + 0.9 * (1 + np.cos(np.pi * n / 8)) / 2)
    np.testing.assert_allclose(rates(13, schedule="cosine", warmup_steps=2), [0, 0.05, *falling, 0.01, 0.01], rtol=1e-5)


def test_exponential_falls_by_the_same_factor_every_step() -> None:
    found = np.array(rates(14, schedule="exponential", warmup_steps=2))
    np.testing.assert_allclose(found[3:11] / found[2:10], 0.1 ** (1 / 8), rtol=1e-5)
    np.testing.assert_allclose(found[[2, 10, 13]], [0.1, 0.01, 0.01], rtol=1e-5)


@pytest.mark.parametrize("schedule", ["constant", "cosine", "exponential"])
def test_a_warm_up_longer_than_the_run_only_rises(schedule: str) -> None:
    assert np.all(np.diff(rates(10, schedule=schedule, warmup_steps=50)) > 0)


@pytest.mark.parametrize(("name", "weight_decay"), [("adamw", 0.5), ("adamw", 0.0), ("adam", 0.0)])
def test_adam_is_pytorchs(name: str, weight_decay: float) -> None:
    rng = np.random.default_rng(0)
    gradients, start = rng.normal(size=(5, 3, 4)).astype(np.float32), rng.normal(size=(3, 4)).astype(np.float32)
    theirs = torch.nn.Parameter(torch.tensor(start))
    optimizer = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[name]([theirs], 0.1, weight_decay=weight_decay)
    for gradient in gradients:
        theirs.grad = torch.tensor(gradient)
        optimizer.step()
    ours = trained(gradients, start, name=name, weight_decay=weight_decay)
    np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=1e-5, atol=1e-6)


def test_adam_does_not_decay() -> None:
    start = np.ones((2, 2), np.float32)
    np.testing.assert_array_equal(trained(np.zeros((3, 2, 2), np.float32), start, name="adam", weight_decay=0.5), start)


def test_adafactor_descends_with_moments_of_rows_and_columns() -> None:
    optimizer = optim.make_optimizer(dataclasses.replace(OPTIONS, name="adafactor"))
    target = jnp.asarray(np.random.default_rng(0).normal(size=(128, 256)), jnp.float32)
    parameter = jnp.zeros_like(target)
    state = optimizer.init(parameter)
    assert sum(x.size for x in jax.tree.leaves(state)) < 128 + 256 + 10, "the second moments are not factored"
    for _ in range(50):
        update, state = optimizer.update(parameter - target, state, parameter)
        parameter = optax.apply_updates(parameter, update)
    assert float(jnp.mean((parameter - target) ** 2)) < 0.1 * float(jnp.mean(target**2))


def test_first_moments_in_half_the_bytes() -> None:
    state = optim.make_optimizer(dataclasses.replace(OPTIONS, first_moment_dtype="bfloat16")).init(jnp.ones(4))
    assert optax.tree.get(state, "mu").dtype == jnp.bfloat16
    assert optax.tree.get(state, "nu").dtype == jnp.float32


def test_clipping_is_by_the_global_norm() -> None:
    gradient = {"a": jnp.full(3, 4.0), "b": jnp.full(4, 3.0)}
    clip = optim.make_optimizer(dataclasses.replace(OPTIONS, max_grad_norm=1.0))
    _, state = clip.update(gradient, clip.init(gradient), gradient)
    mu = optax.tree.get(state, "mu")  # (1 - b1) * clipped gradient
    np.testing.assert_allclose(optax.tree.norm(mu), 0.1, rtol=1e-5)


def test_ema_decay_follows_the_published_law() -> None:
    n = jnp.array([0, 1, 100, 10**6])
    np.testing.assert_allclose(optim.ema_decay(n, 0.999), [0, 1 - 2**-0.75, 1 - 101**-0.75, 0.999], rtol=1e-6)


def test_before_its_start_the_average_is_a_copy() -> None:
    n = jnp.array([0, 49, 50, 51])
    np.testing.assert_allclose(optim.ema_decay(n, 0.999, start=50), [0, 0, 0, 1 - 2**-0.75], rtol=1e-6)


def test_average_of_a_constant_is_the_constant() -> None:
    tree = {"w": jax.random.normal(jax.random.key(0), (4,))}
    np.testing.assert_array_equal(optim.ema_update(tree, tree, jnp.float32(0.3))["w"], tree["w"])


def test_adafactor_decays_in_the_measure_of_the_rate() -> None:
    start = np.ones((2, 2), np.float32)
    ended = trained(np.zeros((1, 2, 2), np.float32), start, name="adafactor", weight_decay=0.5)
    np.testing.assert_allclose(ended, start * (1 - 0.1 * 0.5), rtol=1e-6)
