"""The train step: pure, the same on any number of devices, and training no more than it should."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small
import twins
from flax import nnx
from jax.sharding import AxisType, Mesh
from schedules import SD, config

from d2f_jax import InputError, NoiseSchedule, lora, optim, sharding
from d2f_jax import step as steps
from d2f_jax.models.clip import CLIPTextConfig, CLIPTextModel
from d2f_jax.models.unet import UNet2DConditionModel, UNetConfig
from d2f_jax.models.vae import AutoencoderKL, VAEConfig

OPTIMIZER = optim.adamw(learning_rate=2e-3, warmup_steps=0, weight_decay=0.0, max_grad_norm=1.0)
OPTIONS = steps.StepOptions(latent_scale=0.5, ema_decay=0.9, lora_scale=1.0, convention="exact")
BATCH = {"image": twins.random(4, 16, 16, 3).clip(-1, 1), "input_ids": np.arange(48).reshape(4, 12)}


def setting(*, with_lora: bool = False) -> tuple[Any, steps.Frozen, Any]:
    """The compiled step, what stays, and what is trained, of small networks."""
    rngs = nnx.Rngs(0)
    modules = (
        UNet2DConditionModel(UNetConfig(**small.UNET), rngs=rngs),
        AutoencoderKL(VAEConfig(**twins.SMALL_VAE), rngs=rngs),
        CLIPTextModel(CLIPTextConfig(**twins.SMALL_CLIP | small.CLIP), rngs=rngs),
    )
    (unet_def, unet), (vae_def, vae), (text_def, text) = map(nnx.split, modules)
    schedule = NoiseSchedule.from_config(config(SD, "v_prediction"))
    step = steps.make_train_step(steps.Networks(unet_def, vae_def, text_def), schedule, OPTIMIZER, OPTIONS)
    if with_lora:
        return step, steps.Frozen(unet, vae, text), lora.init(unet, jax.random.key(1), rank=4)
    return step, steps.Frozen(None, vae, text), unet


def run(step: Any, frozen: steps.Frozen, trained: Any, count: int, *, devices: int = 1, seed: int = 0):
    """State and losses after `count` steps on `devices` devices."""
    mesh = Mesh(np.array(jax.devices()[:devices]), ("data",), axis_types=(AxisType.Auto,))
    everywhere = sharding.replicated(mesh)
    state, frozen = jax.device_put((steps.init_state(jax.tree.map(jnp.copy, trained), OPTIMIZER), frozen), everywhere)
    batch = jax.device_put(BATCH, sharding.batch_split(mesh))
    key = jax.device_put(jax.random.key(seed), everywhere)
    losses = []
    for _ in range(count):
        state, metrics = step(state, frozen, batch, key)
        losses.append(float(metrics["loss"]))
    return state, losses


def leaves(tree: Any) -> list[np.ndarray]:
    return [np.asarray(x) for x in jax.tree.leaves(tree)]


@pytest.fixture(scope="module")
def full() -> tuple[Any, steps.Frozen, Any]:
    return setting()


def test_the_same_key_gives_the_same_run_and_another_does_not(full: tuple) -> None:
    one, losses = run(*full, 3)
    two, again = run(*full, 3)
    assert losses == again
    for a, b in zip(leaves(one), leaves(two), strict=True):
        np.testing.assert_array_equal(a, b)
    assert run(*full, 3, seed=1)[1] != losses


def test_the_step_draws_by_its_own_number(full: tuple) -> None:
    _, losses = run(*full, 2)
    step, frozen, trained = full
    state = steps.init_state(jax.tree.map(jnp.copy, trained), OPTIMIZER)
    later = steps.TrainState(state.step + 1, state.trained, state.ema, state.opt_state)
    _, metrics = step(later, frozen, BATCH, jax.random.key(0))
    assert float(metrics["loss"]) != losses[0]


def test_two_devices_equal_one(full: tuple) -> None:
    assert len(jax.devices()) >= 2
    one, losses = run(*full, 3)
    two, others = run(*full, 3, devices=2)
    np.testing.assert_allclose(others, losses, rtol=1e-5)
    for a, b in zip(leaves(one.ema), leaves(two.ema), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4)  # Adam's first steps are signs: rounding near zero shows


def test_training_learns(full: tuple) -> None:
    _, losses = run(*full, 60)
    assert np.mean(losses[-10:]) < 0.9 * np.mean(losses[:10])


def test_the_average_follows_its_law(full: tuple) -> None:
    step, frozen, trained = full
    state = steps.init_state(jax.tree.map(jnp.copy, trained), OPTIMIZER)
    expected = leaves(state.ema)
    for n in range(3):
        state, _ = step(state, frozen, BATCH, jax.random.key(0))
        decay = min(0.9, 1 - (1 + n) ** -0.75)
        expected = [decay * e + (1 - decay) * new for e, new in zip(expected, leaves(state.trained), strict=True)]
    for e, a in zip(expected, leaves(state.ema), strict=True):
        np.testing.assert_allclose(a, e, atol=1e-6)


def test_adapters_are_all_that_is_trained() -> None:
    step, frozen, adapters = setting(with_lora=True)
    before = leaves(frozen)
    state, losses = run(step, frozen, adapters, 2)
    count = sum(x.size for x in leaves(adapters))
    assert sum(x.size for x in leaves(state.trained)) == count
    assert sum(x.size for x in leaves(optax.tree.get(state.opt_state, "mu"))) == count
    for a, b in zip(before, leaves(frozen), strict=True):
        np.testing.assert_array_equal(a, b)
    assert any(adapter.b.any() for adapter in state.trained.values())
    # Zero-initialised adapters begin where the whole network begins.
    np.testing.assert_allclose(losses[0], run(*setting(), 1)[1][0], rtol=1e-6)


def test_the_old_state_is_donated(full: tuple) -> None:
    step, frozen, trained = full
    state = steps.init_state(jax.tree.map(jnp.copy, trained), OPTIMIZER)
    step(state, frozen, BATCH, jax.random.key(0))
    assert all(x.is_deleted() for x in jax.tree.leaves(state.trained))


def test_batches_divide_over_the_devices() -> None:
    mesh = sharding.make_mesh()
    assert mesh.size == len(jax.local_devices())
    sharding.check_batch_size(2 * mesh.size, mesh)
    for size in (0, -1, mesh.size + 1):
        with pytest.raises(InputError, match=f"batch_size={size} does not divide over {mesh.size} devices"):
            sharding.check_batch_size(size, mesh)
