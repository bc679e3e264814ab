"""The held-out loss: every example once in each bin of time, with noise that nothing but its number decides."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from d2f_jax import flops, sharding, validation
from d2f_jax import step as steps

NONE: Any = None  # prepared batches need no networks
FROZEN, ENCODE = steps.Frozen(NONE, NONE, NONE), functools.partial(steps.encoded, steps.Networks(NONE, NONE, NONE))
COUNT = 13
LATENTS = np.random.default_rng(0).normal(size=(COUNT, 2, 2, 3)).astype(np.float32)


def mesh_of(devices: int) -> jax.sharding.Mesh:
    return sharding.make_mesh(devices, 1, jax.devices()[:devices])


def batches(size: int, **arrays: np.ndarray) -> list[tuple[steps.Batch, np.ndarray]]:
    """The examples in batches of `size`; the last one filled up with rows that count for nothing."""
    made = []
    for start in range(0, COUNT, size):
        index_B = np.arange(start, start + size)
        rows = np.minimum(index_B, COUNT - 1)
        batch = {"latent_mean": LATENTS, "text_states": np.zeros((COUNT, 3, 2), np.float32)} | arrays
        batch = {name: jnp.asarray(x[rows]) for name, x in batch.items()}
        made.append((batch | {"weight": batch.get("weight", 1) * jnp.asarray(index_B < COUNT, jnp.float32)}, index_B))
    return made


def judged(loss: Any, examples: Any, *, mesh: jax.sharding.Mesh | None = None, seed: int = 0) -> np.ndarray:
    """The mean of each bin."""
    program = validation.make_validation_loss(loss, ENCODE, mesh or mesh_of(1), seed)
    values = validation.evaluate(program, NONE, frozen=FROZEN, batches=examples)
    means = [values[f"validation_loss/t{i / 8:.3f}"] for i in range(8)]
    assert len(values) == 9 and values["validation_loss"] == pytest.approx(np.mean(means))
    return np.array(means)


def of_noise(_params: Any, found: steps.Encoded, draws: steps.Draws) -> jax.Array:
    """Different for every latent, noise and time."""
    return jnp.sum(found.mean * jnp.sin(draws.x_0), (1, 2, 3)) + draws.t_B


def of_time(_params: Any, _found: steps.Encoded, draws: steps.Draws) -> jax.Array:
    return draws.t_B


def test_every_bin_has_its_own_eighth_of_time() -> None:
    assert np.array_equal(np.floor(8 * judged(of_time, batches(COUNT))), np.arange(8))

    def in_the_second(_params: Any, _found: steps.Encoded, draws: steps.Draws) -> jax.Array:
        return jnp.where((draws.t_B >= 1 / 8) & (draws.t_B < 2 / 8), 1.0, 0.0)

    assert judged(in_the_second, batches(COUNT)).tolist() == [0, 1, 0, 0, 0, 0, 0, 0]


def test_two_evaluations_are_the_same_and_two_seeds_are_not() -> None:
    means = judged(of_noise, batches(COUNT))
    assert np.array_equal(means, judged(of_noise, batches(COUNT)))
    assert not np.isclose(means, judged(of_noise, batches(COUNT), seed=1)).any()


@pytest.mark.parametrize(("size", "devices"), [(4, 1), (8, 8), (16, 2)])
def test_neither_batches_nor_devices_matter(size: int, devices: int) -> None:
    means = judged(of_noise, batches(COUNT))
    np.testing.assert_allclose(judged(of_noise, batches(size), mesh=mesh_of(devices)), means, rtol=1e-5)


def test_a_batch_is_encoded_once_for_all_bins() -> None:
    def encode(frozen: steps.Frozen, batch: steps.Batch) -> steps.Encoded:
        found = ENCODE(frozen, batch)
        return found._replace(mean=found.mean @ jnp.eye(3))

    def counted(encode: Any) -> int:
        ((batch, index_B),) = batches(COUNT)
        program = validation.make_validation_loss(of_noise, encode, mesh_of(1), 0)
        return flops.count(program, NONE, FROZEN, batch, index_B)

    assert counted(encode) - counted(ENCODE) == 2 * 3 * LATENTS.size


def test_what_could_not_be_read_counts_for_nothing() -> None:
    weight = np.ones(COUNT, np.float32)
    weight[[2, 5]] = 0
    broken = np.where(weight[:, None, None, None] > 0, LATENTS, np.nan)
    means = judged(of_noise, batches(4, weight=weight, latent_mean=broken))
    kept = judged(of_noise, batches(COUNT, weight=weight))
    assert np.isfinite(means).all() and not np.isclose(kept, judged(of_noise, batches(COUNT))).any()
    np.testing.assert_allclose(means, kept, rtol=1e-5)
    program = validation.make_validation_loss(of_noise, ENCODE, mesh_of(1), 0)
    nothing = batches(4, weight=np.zeros(COUNT, np.float32))
    assert validation.evaluate(program, NONE, frozen=FROZEN, batches=nothing) == {}


def test_noise_that_belongs_to_an_example_is_taken_and_the_posterior_has_none() -> None:
    def distance(_params: Any, found: steps.Encoded, draws: steps.Draws) -> jax.Array:
        return jnp.sum(jnp.abs(draws.x_0 - found.mean) + jnp.abs(draws.posterior_noise), (1, 2, 3))

    assert judged(distance, batches(4)).all() and not judged(distance, batches(4, noise=LATENTS)).any()
