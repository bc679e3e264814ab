"""The train step: pure, jitted, donated. Everything it needs is an argument; everything it changes is its result."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from d2f_jax import flow, lora, objectives, optim
from d2f_jax.alignment import Convention
from d2f_jax.schedule import NoiseSchedule

Batch = dict[str, jax.Array]  # image_BxHxWx3 in [-1, 1], input_ids_BxL
Metrics = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Networks:
    """The three networks without their parameters: what is static under jit."""

    unet: nnx.GraphDef
    vae: nnx.GraphDef
    text_encoder: nnx.GraphDef


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Frozen:
    """Parameters that are not trained; `unet` is the base under LoRA adapters, else None."""

    unet: nnx.State | None
    vae: nnx.State
    text_encoder: nnx.State


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """`trained` is the UNet's parameters or its LoRA adapters; `ema` and the optimizer hold no others."""

    step: jax.Array
    trained: Any
    ema: Any
    opt_state: optax.OptState


@dataclasses.dataclass(frozen=True)
class StepOptions:
    """`latent_scale` is the VAE's scaling factor, `lora_scale` the adapters' output scale."""

    latent_scale: float
    ema_decay: float
    lora_scale: float
    convention: Convention


def init_state(trained: Any, optimizer: optax.GradientTransformation) -> TrainState:
    # The average is a copy: the step donates its state, and a buffer can be donated only once.
    return TrainState(jnp.zeros((), jnp.int32), trained, jax.tree.map(jnp.copy, trained), optimizer.init(trained))


def unet_params(trained: Any, base: nnx.State | None, lora_scale: float) -> nnx.State:
    """The UNet's parameters: `trained` themselves, or `base` with them merged in as adapters."""
    return trained if base is None else lora.merge(base, trained, scale=lora_scale)


def make_train_step(
    networks: Networks, schedule: NoiseSchedule, optimizer: optax.GradientTransformation, options: StepOptions
) -> Callable[[TrainState, Frozen, Batch, jax.Array], tuple[TrainState, Metrics]]:
    """`step(state, frozen, batch, root_key) -> (state, metrics)`; the first argument is donated.

    Randomness comes from `fold_in(root_key, state.step)`, so a resumed run draws what an uninterrupted one would have.
    """

    def step(state: TrainState, frozen: Frozen, batch: Batch, root_key: jax.Array) -> tuple[TrainState, Metrics]:
        latent_key, noise_key, time_key = jax.random.split(jax.random.fold_in(root_key, state.step), 3)
        text_BxLxD = nnx.merge(networks.text_encoder, frozen.text_encoder)(batch["input_ids"])
        x_1 = nnx.merge(networks.vae, frozen.vae).encode(batch["image"]).sample(latent_key) * options.latent_scale
        x_0 = jax.random.normal(noise_key, x_1.shape)
        t_B = flow.sample_times(time_key, x_1.shape[:1])

        def loss_fn(trained: Any) -> jax.Array:
            unet = nnx.merge(networks.unet, unet_params(trained, frozen.unet, options.lora_scale))

            def predict(dm_x: jax.Array, tau_B: jax.Array) -> jax.Array:
                return unet(dm_x, tau_B, text_BxLxD)

            return objectives.diff2flow(schedule, predict, x_1, x_0, t_B, options.convention).mean()

        loss, grads = jax.value_and_grad(loss_fn)(state.trained)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.trained)
        trained = optax.apply_updates(state.trained, updates)
        ema = optim.ema_update(state.ema, trained, optim.ema_decay(state.step, options.ema_decay))
        metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads)}
        return TrainState(state.step + 1, trained, ema, opt_state), metrics

    return jax.jit(step, donate_argnums=0)
