"""The train step: pure, jitted, donated. Everything it needs is an argument; everything it changes is its result."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import Mesh

from d2f_jax import flow, lora, objectives, optim, sharding
from d2f_jax.models.devices import split_over
from d2f_jax.models.layers import in_compute_dtype
from d2f_jax.objectives import Objective
from d2f_jax.schedule import NoiseSchedule
from d2f_jax.task import Task, whole_patches

Batch = dict[str, jax.Array]
"""image_BxHxWx3 uint8 or latent_mean_BxHxWxC (perhaps latent_std alike); input_ids_BxL or text_states_BxLxD.

With weight_B, 1 for an example and 0 for a row that could not be read, and perhaps noise_BxHxWxC. For depth also
depth_BxHxW from -1 to 1, or picture_mean beside the depth's latent_mean; and valid_BxHxW of pixels, or of latents.
"""
Metrics = dict[str, jax.Array]
Latents = Literal["sample", "mean"]
Tree = TypeVar("Tree")


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
    """All that a run goes on from.

    `trained` is the UNet's parameters or its LoRA adapters; `ema` and the optimizer hold no others. `ema` is None for a
    run that keeps no average. Counted from the start: `skipped_steps`, and `bad_examples` that could not be read;
    `bad_streak` is the skipped steps in a row.
    """

    step: jax.Array
    trained: Any
    ema: Any
    opt_state: optax.OptState
    root_key: jax.Array
    skipped_steps: jax.Array
    bad_streak: jax.Array
    bad_examples: jax.Array

    @property
    def averaged(self) -> Any:
        """What is judged and given away: the average, or where none is kept what is trained."""
        return self.trained if self.ema is None else self.ema


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepOptions:
    """`latent_scale` is the VAE's scaling factor, `lora_scale` the adapters' output scale.

    The batch is worked through in `accumulate` parts, whose gradients add up to that of the whole. `latents` are drawn
    from what the VAE tells of a picture, or its mean.
    """

    latent_scale: float
    lora_scale: float
    objective: Objective
    task: Task
    compute_dtype: str
    ema_decay: float
    ema_start: int
    accumulate: int
    latents: Latents = "sample"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Draws:
    """The randomness of a step, drawn for the whole batch: the parts it is worked through in do not matter."""

    posterior_noise: jax.Array
    x_0: jax.Array
    t_B: jax.Array
    path_noise: jax.Array


def init_state(
    trained: Any, optimizer: optax.GradientTransformation, root_key: jax.Array, *, average: bool = True
) -> TrainState:
    # The average is a copy: the step donates its state, and a buffer can be donated only once.
    zeros, ema = [jnp.zeros((), jnp.int32) for _ in range(4)], jax.tree.map(jnp.copy, trained) if average else None
    return TrainState(zeros[0], trained, ema, optimizer.init(trained), root_key, *zeros[1:])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class UNetParams:
    """The UNet's parameters, and adapters that are no change of them because they depend on the picture."""

    merged: nnx.State
    adapters: dict[str, lora.Adapter]


def unet_params(trained: Any, base: nnx.State | None, lora_scale: float) -> UNetParams:
    """`trained` themselves, or `base` with them merged in as adapters."""
    if base is None:
        return UNetParams(trained, {})
    plain, conditional = lora.split(trained, scale=lora_scale)
    return UNetParams(lora.merge(base, plain, scale=lora_scale), conditional)


def whole(mesh: Mesh, options: StepOptions, params: Tree) -> Tree:
    """Under jit: parameters whole on every device, in the type in which a step computes."""
    return sharding.gathered(mesh, in_compute_dtype(params, options.compute_dtype))


def ready(mesh: Mesh, options: StepOptions, frozen: Frozen) -> Frozen:
    """Under jit: with encoders that are `whole`, once for all parts of a batch, beside which they stay in memory."""
    vae, text_encoder = whole(mesh, options, (frozen.vae, frozen.text_encoder))
    return Frozen(frozen.unet, vae, text_encoder)


def make_loss(
    networks: Networks, schedule: NoiseSchedule, options: StepOptions, mesh: Mesh
) -> Callable[[UNetParams, "Encoded", Draws], jax.Array]:
    """`loss(unet_params, encoded, draws) -> [B]`, with parameters gathered inside: gradients come back split."""

    gather = functools.partial(whole, mesh, options)

    @split_over(mesh)
    def loss(params: UNetParams, found: Encoded, draws: Draws) -> jax.Array:
        unet = nnx.merge(networks.unet, params.merged).gather(gather)
        spread = found.std * draws.posterior_noise if options.latents == "sample" else 0
        x_1 = (found.mean + spread) * options.latent_scale
        picture = None if found.picture is None else found.picture * options.latent_scale
        x_0 = options.task.source(draws.x_0, picture)
        lora.attach(unet, gather(params.adapters), scale=1.0, condition=picture)

        def predict(dm_x: jax.Array, tau_B: jax.Array) -> jax.Array:
            return unet(options.task.network_input(dm_x, picture), tau_B, found.text_states)

        return objectives.loss(options.objective, schedule, predict, x_1, x_0, draws.t_B, found.valid, draws.path_noise)

    return loss


def make_train_step(
    networks: Networks,
    schedule: NoiseSchedule,
    optimizer: optax.GradientTransformation,
    options: StepOptions,
    mesh: Mesh,
) -> Callable[[TrainState, Frozen, Batch], tuple[TrainState, Metrics]]:
    """`step(state, frozen, batch) -> (state, metrics)`; the first argument is donated.

    Randomness comes from `fold_in(root_key, step)` and is drawn for the global batch: neither an interruption nor the
    number of devices or processes changes it. A step whose loss or gradient is not finite changes nothing but counters.
    """

    loss, objective = make_loss(networks, schedule, options, mesh), options.objective
    first = objectives.first_time(objective, schedule)

    def summed_loss(trained: Any, frozen: Frozen, batch: Batch, draws: Draws) -> jax.Array:
        params, found = unet_params(trained, frozen.unet, options.lora_scale), encoded(networks, frozen, batch)
        loss_B = loss(params, found, draws)
        return jnp.sum(loss_B * batch["weight"])

    @split_over(mesh)
    def step(state: TrainState, frozen: Frozen, batch: Batch) -> tuple[TrainState, Metrics]:
        examples, frozen = jnp.sum(batch["weight"]), ready(mesh, options, frozen)
        key = jax.random.fold_in(state.root_key, state.step)
        draws = sharding.split_rows(mesh, draw(key, objective.times, networks, frozen, batch, first))
        batch = batch | {"weight": batch["weight"] / jnp.maximum(examples, 1)}
        mean_loss, grads = accumulated(
            lambda *part: jax.value_and_grad(summed_loss)(state.trained, frozen, *part),
            sharding.parts(mesh, (batch, draws), options.accumulate),
        )
        grads = as_kept(mesh, sharding.split(mesh, grads))
        grad_norm = optax.tree.norm(grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.trained)
        trained = optax.apply_updates(state.trained, updates)
        ema = state.ema
        if ema is not None:
            ema = optim.ema_update(ema, trained, optim.ema_decay(state.step, options.ema_decay, options.ema_start))
        # A batch without a readable example has a loss of 0 and teaches nothing: it counts as a bad step too.
        good = jnp.isfinite(mean_loss) & jnp.isfinite(grad_norm) & (examples > 0)
        kept = [state.trained, state.ema, state.opt_state]
        new = jax.tree.map(lambda n, o: jnp.where(good, n, o), [trained, ema, opt_state], kept)
        bad = 1 - good.astype(jnp.int32)
        state = dataclasses.replace(
            state,
            step=state.step + 1,
            trained=new[0],
            ema=new[1],
            opt_state=new[2],
            skipped_steps=state.skipped_steps + bad,
            bad_streak=(state.bad_streak + 1) * bad,
            bad_examples=state.bad_examples + len(batch["weight"]) - examples.astype(jnp.int32),
        )
        counters = {name: getattr(state, name) for name in ("skipped_steps", "bad_streak", "bad_examples")}
        return sharding.split(mesh, state), {"loss": mean_loss, "grad_norm": grad_norm, **counters}

    return jax.jit(step, donate_argnums=0)


def as_kept(mesh: Mesh, grads: Tree) -> Tree:
    """Gradients, split as `sharding.kept` has them, in the order in which parameters are in memory.

    Those that cuDNN makes of convolutions are in its own, which XLA would take for the optimizer and the average too,
    and turn parameters, moments and average there and back.
    """
    return laid_out(mesh, grads) if mesh.devices.flat[0].platform == "gpu" else grads


def laid_out(mesh: Mesh, grads: Tree) -> Tree:
    def turned(x: jax.Array) -> jax.Array:
        if x.ndim < 4:
            return x
        return jax.lax.optimization_barrier(with_layout_constraint(x, Layout(major_to_minor=tuple(range(x.ndim)))))

    # By each device's share: the partitioner would gather what it is to lay out.
    return sharding.each_share(mesh, lambda grads: jax.tree.map(turned, grads), grads)


class Encoded(NamedTuple):
    """Mean and standard deviation of the unscaled latents [B, H, W, C] and the text's states [B, L, D], float32.

    Of depth, `picture` is the picture's latent, and `valid` bool [B, H, W, 1] where the whole patch is.
    """

    mean: jax.Array
    std: jax.Array
    text_states: jax.Array
    picture: jax.Array | None = None
    valid: jax.Array | None = None


def encoded(networks: Networks, frozen: Frozen, batch: Batch) -> Encoded:
    """What the loss is of: computed from pictures or captions, or taken from a batch that brings it.

    On a mesh `frozen` is `ready`. A depth map is encoded as a grey picture, and its latent is the mean.
    """
    if "text_states" in batch:
        text_BxLxD = batch["text_states"].astype(jnp.float32)
    else:
        text_BxLxD = nnx.merge(networks.text_encoder, frozen.text_encoder)(batch["input_ids"])
    if "latent_mean" in batch:
        mean = batch["latent_mean"].astype(jnp.float32)
        std = batch["latent_std"].astype(jnp.float32) if "latent_std" in batch else jnp.zeros_like(mean)
        if "picture_mean" not in batch:
            return Encoded(mean, std, text_BxLxD)
        return Encoded(mean, std, text_BxLxD, batch["picture_mean"].astype(jnp.float32), batch["valid"][..., None])
    image = batch["image"].astype(jnp.float32) / 127.5 - 1
    vae = nnx.merge(networks.vae, frozen.vae)
    latent = vae.encode(image)
    if "depth" not in batch:
        return Encoded(latent.mean, latent.std, text_BxLxD)
    mean = vae.encode(jnp.repeat(batch["depth"][..., None], 3, axis=-1)).mean
    valid = whole_patches(batch["valid"], mean.shape[1:3])[..., None]
    return Encoded(mean, jnp.zeros_like(mean), text_BxLxD, latent.mean, valid)


def draw(
    key: jax.Array,
    times: flow.TimeDistribution,
    networks: Networks,
    frozen: Frozen,
    batch: Batch,
    first: float,
) -> Draws:
    """For the whole batch, times from `first` on; noise that comes with it is taken instead of drawn."""
    posterior_key, noise_key, time_key = jax.random.split(key, 3)
    shape = latent_shape(networks, frozen, batch)
    x_0 = batch["noise"] if "noise" in batch else jax.random.normal(noise_key, shape)
    path_noise = jax.random.normal(jax.random.fold_in(noise_key, 1), shape)
    posterior_noise = jax.random.normal(posterior_key, shape)
    t_B = flow.sample_times(time_key, shape[:1], times, first)
    return Draws(posterior_noise, x_0, t_B, path_noise)


def latent_shape(networks: Networks, frozen: Frozen, batch: Batch) -> tuple[int, ...]:
    return jax.eval_shape(lambda f, b: encoded(networks, f, b).mean, frozen, batch).shape


def accumulated(compute: Callable[..., Tree], parts: Any) -> Tree:
    """The sum of `compute(*part)` over the leading axis of `parts`, one at a time."""
    first = jax.tree.map(lambda x: x[0], parts)
    if jax.tree.leaves(parts)[0].shape[0] == 1:
        return compute(*first)

    def add(total: Tree, part: Any) -> tuple[Tree, None]:
        return jax.tree.map(jnp.add, total, compute(*part)), None

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(compute, *first))
    return jax.lax.scan(add, zeros, parts)[0]
