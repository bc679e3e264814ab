"""What a pipeline compiles: from noise, text and perhaps pictures to latents, and from these to pictures or depth."""

import dataclasses
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from d2f_jax import likelihood, lora, sampling, sharding
from d2f_jax.alignment import Alignment
from d2f_jax.models.devices import split_over
from d2f_jax.sampler import Sampler
from d2f_jax.schedule import NoiseSchedule
from d2f_jax.task import Task

Direction = Literal["sample", "trajectory", "invert", "bits"]


@dataclasses.dataclass(frozen=True)
class Model:
    """All of a pipeline that is not parameters. `set_alpha_to_one` is DDIM's, see `Sampler.sample`."""

    unet: nnx.GraphDef
    vae: nnx.GraphDef
    text_encoder: nnx.GraphDef
    schedule: NoiseSchedule
    alignment: Alignment
    task: Task
    latent_scale: float
    set_alpha_to_one: bool


def make_program(
    model: Model, mesh: Mesh | None, how: Sampler, direction: Direction, guided: bool
) -> Callable[..., jax.Array]:
    """`make_latents` jitted, with latents decoded: to uint8 images [B, H, W, 3], or depth float32 [B, H, W].

    Depth is from 0, near, to 1, far. What "invert" and "bits" give stays as it is; of a "trajectory" [B, N+1, ...] all
    is decoded.
    """
    compute = make_latents(model, how, direction, guided)

    @split_over(mesh)
    def program(unet_state, vae_state, text_state, adapters, *rest):
        params = (unet_state, vae_state, text_state, adapters)
        if mesh is not None:  # once, and not in every step of the sampler
            params = sharding.gathered(mesh, params)
        latents, vae_state = compute(*params, *rest), params[1]
        if direction in ("invert", "bits"):
            return latents

        def decoded(latents: jax.Array) -> jax.Array:
            pixels = nnx.merge(model.vae, vae_state).decode(latents / model.latent_scale).astype(jnp.float32)
            if model.task.of_pictures:
                return jnp.clip(jnp.mean(pixels, axis=-1) / 2 + 0.5, 0, 1)
            return jnp.round(jnp.clip(pixels / 2 + 0.5, 0, 1) * 255).astype(jnp.uint8)

        if direction == "trajectory":  # one point of time after another, as they would not fit together
            return jnp.moveaxis(jax.lax.map(decoded, jnp.moveaxis(latents, 1, 0)), 0, 1)
        return decoded(latents)

    # Gathered on every device, so that every process has all images.
    return jax.jit(program, out_shardings=None if mesh is None else sharding.replicated(mesh))


def make_latents(model: Model, how: Sampler, direction: Direction, guided: bool) -> Callable[..., jax.Array]:
    """Parameters, token ids, noise, keys, grid and guidance to latents as the UNet sees them; "invert" images to noise.

    "bits" is images to bits per dimension [B] of their latents, by `likelihood.variational_bound` on the grid.
    Of a "trajectory" they are [B, N+1, H, W, C], the flow's states at all points of the grid.

    `(unet, vae, text_encoder, adapters, ids_BxL, negative_BxL, start, keys_Bx2, pictures, grid, (scale, rescale))`;
    parameters are states, `pictures` uint8 [B, H, W, 3] what depth is made of, else None. Raises InputError for DDIM of
    a flow that is no diffusion model.
    """
    how.check(model.alignment, at_noise=model.task.start == "noise")

    def latents(
        unet_state, vae_state, text_state, adapters, ids_BxL, negative_BxL, start, keys, pictures, grid, guidance
    ):
        unet, encode_text = nnx.merge(model.unet, unet_state), nnx.merge(model.text_encoder, text_state)
        text_BxLxD = encode_text(_pairs(negative_BxL, ids_BxL) if guided else ids_BxL)

        def encode(images: jax.Array) -> jax.Array:
            pixels = images.astype(jnp.float32) / 127.5 - 1
            return nnx.merge(model.vae, vae_state).encode(pixels).mean * model.latent_scale

        picture = None if pictures is None else encode(pictures)
        lora.attach(unet, adapters, scale=1.0, condition=picture)

        def predict(dm_x: jax.Array, tau: jax.Array) -> jax.Array:
            tau_B = jnp.broadcast_to(tau, dm_x.shape[:1])
            x = model.task.network_input(dm_x, picture)
            if not guided:
                return unet(x, tau_B, text_BxLxD)
            both = unet(_pairs(x, x), _pairs(tau_B, tau_B), text_BxLxD)
            both = both.reshape(-1, 2, *both.shape[1:])
            return sampling.guided(both[:, 0], both[:, 1], scale=guidance[0], rescale=guidance[1])

        if direction == "bits":
            keys_B = jax.random.wrap_key_data(keys)
            return likelihood.variational_bound(model.schedule, predict, encode(start), grid, keys_B).bits
        if direction == "invert":
            return how.invert(
                model.schedule,
                model.alignment,
                predict,
                encode(start),
                grid,
                set_alpha_to_one=model.set_alpha_to_one,
            )
        source = model.task.source(start, picture)
        if direction == "trajectory":
            return how.trajectory(model.schedule, model.alignment, predict, source, grid)
        return how.sample(
            model.schedule,
            model.alignment,
            predict,
            source,
            grid,
            set_alpha_to_one=model.set_alpha_to_one,
            keys_B=jax.random.wrap_key_data(keys),
        )

    return latents


def _pairs(a: jax.Array, b: jax.Array) -> jax.Array:
    """[2B, ...], rows in turn: those of a device stay there, which one after the other would not."""
    return jnp.stack([a, b], axis=1).reshape(-1, *a.shape[1:])
