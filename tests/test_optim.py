"""Optimizer and weight average."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from d2f_jax import optim


def updates(steps: int, **options: float) -> list[float]:
    """Sizes of the updates of one parameter under a constant gradient of 1."""
    settings = {"learning_rate": 0.1, "warmup_steps": 0, "weight_decay": 0.0, "max_grad_norm": 1e9} | options
    optimizer = optim.adamw(**settings)
    parameter = jnp.ones(())
    state, sizes = optimizer.init(parameter), []
    for _ in range(steps):
        update, state = optimizer.update(jnp.ones(()), state, parameter)
        sizes.append(float(update))
    return sizes


def test_warmup_is_linear_and_then_constant() -> None:
    np.testing.assert_allclose(updates(6, warmup_steps=4), [0, -0.025, -0.05, -0.075, -0.1, -0.1], rtol=1e-5, atol=1e-8)


def test_weight_decay_is_decoupled() -> None:
    np.testing.assert_allclose(updates(1, weight_decay=0.5), [-0.1 * (1 + 0.5)], rtol=1e-5)


def test_clipping_is_by_the_global_norm() -> None:
    gradient = {"a": jnp.full(3, 4.0), "b": jnp.full(4, 3.0)}
    clip = optim.adamw(learning_rate=1.0, warmup_steps=0, weight_decay=0.0, max_grad_norm=1.0)
    _, state = clip.update(gradient, clip.init(gradient), gradient)
    mu = optax.tree.get(state, "mu")  # (1 - b1) * clipped gradient
    np.testing.assert_allclose(optax.tree.norm(mu), 0.1, rtol=1e-5)


def test_ema_decay_follows_the_published_law() -> None:
    n = jnp.array([0, 1, 100, 10**6])
    np.testing.assert_allclose(optim.ema_decay(n, 0.999), [0, 1 - 2**-0.75, 1 - 101**-0.75, 0.999], rtol=1e-6)


def test_average_of_a_constant_is_the_constant() -> None:
    tree = {"w": jax.random.normal(jax.random.key(0), (4,))}
    np.testing.assert_array_equal(optim.ema_update(tree, tree, jnp.float32(0.3))["w"], tree["w"])
